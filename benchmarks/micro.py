"""The microbenchmark shapes Ray users know, on hpcray or on Ray, one script for both.

    supervisor                       runner (a fresh process per crash or hang)
    ----------                       ------------------------------------------
    init row: fresh processes        init(num_cpus=2)
    start runner  ---- argv ---->    for each row: set up, warm up, sample, tear down
    collect       <--- events ---    one JSON line per row begun and row finished
    kill + restart without the row that passed its limit

Why two processes: rows call `get` and `wait` as a user would, without a timeout, so
only another process can end a row that hangs. A row that a backend lacks, or that
fails, becomes an error string; the other rows are still measured.

What must not go in: anything that reads a backend's internals, or treats one
backend differently from the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness
from harness import Result

NUM_CPUS = 2
BATCH = 1000  # calls in flight in the pipelined rows, as in Ray's own benchmark
CLIENTS = 4  # submitters in the many-client rows
REFS = 10_000  # refs inside the object of `get_10k_refs`
ACTORS_STARTED = 10  # actors per batch of `actor_starts`

START_LIMIT_S = 60.0  # a runner must have begun its first row by then
EXIT_LIMIT_S = 20.0  # and must have ended this long after its last row
KILL_GRACE_S = 5.0  # between SIGTERM and SIGKILL, so that a backend can clean up


@dataclass(frozen=True, slots=True)
class Settings:
    seconds: float  # length of one sample
    repeat: int  # samples per row
    row_limit_s: float


@dataclass(frozen=True, slots=True)
class Remotes:
    """The remote functions and classes of all rows, made for one backend."""

    small_value: Any
    Server: Any
    AsyncServer: Any
    call_each: Any
    object_of_refs: Any
    stream: Any


def define_remotes(ray: Any) -> Remotes:
    # Local functions: every backend pickles those by value, however the script was
    # started. `ray.remote(...)` as a call, because a decorator of type Any is not typed.
    def small_value() -> bytes:
        return b"ok"

    small = ray.remote(small_value)

    class Server:
        def small_value(self) -> bytes:
            return b"ok"

        def run_tasks(self, count: int) -> None:
            ray.get([small.remote() for _ in range(count)])

    class AsyncServer:
        async def small_value(self) -> bytes:
            return b"ok"

    def call_each(servers: list[Any], count: int) -> None:
        ray.get([servers[i % len(servers)].small_value.remote() for i in range(count)])

    def object_of_refs(count: int) -> list[Any]:
        return [ray.put(1) for _ in range(count)]

    def stream(count: int) -> Iterator[bytes]:
        for _ in range(count):
            yield b"ok"

    return Remotes(
        small_value=small,
        Server=ray.remote(num_cpus=0)(Server),
        AsyncServer=ray.remote(num_cpus=0)(AsyncServer),
        call_each=ray.remote(call_each),
        object_of_refs=ray.remote(object_of_refs),
        stream=ray.remote(stream),
    )


class Bench:
    """What a row needs: the backend, its remotes, and the sampling loop."""

    def __init__(self, ray: Any, settings: Settings) -> None:
        self.ray = ray
        self.settings = settings
        self.remotes = define_remotes(ray)
        self.row = ""
        self.deadline = 0.0

    def begin(self, row: str) -> None:
        self.row = row
        # A slow row must report the samples it has before the supervisor kills it.
        self.deadline = time.perf_counter() + 0.7 * self.settings.row_limit_s

    def rate(
        self, unit: str, call: Callable[[], object], per_call: float = 1.0, warm: bool = True
    ) -> list[Result]:
        """Sample `per_call` × calls per second of `call`."""
        step = self.warm_up(call) if warm else 1
        samples: list[float] = []
        while self.wants_more(len(samples)):
            samples.append(per_call * self.sample(call, step, self.settings.seconds))
        return [Result.of(self.row, unit, samples)]

    def wants_more(self, done: int) -> bool:
        if done == 0:
            return True
        return done < self.settings.repeat and time.perf_counter() < self.deadline

    def warm_up(self, call: Callable[[], object]) -> int:
        """Run `call` for a while; return how many calls to make between looks at the clock."""
        warm_s = min(0.5, self.settings.seconds / 2)
        count = 0
        start = time.perf_counter()
        while (elapsed := time.perf_counter() - start) < warm_s:
            call()
            count += 1
        # About 20 looks per sample: cheap against the calls, and a sample ends within 5 %.
        return max(1, int(count / elapsed * self.settings.seconds / 20))

    @staticmethod
    def sample(call: Callable[[], object], step: int, seconds: float) -> float:
        count = 0
        start = time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            for _ in range(step):
                call()
            count += step
        return count / elapsed

    @contextlib.contextmanager
    def actors(self, remote_class: Any, count: int) -> Iterator[list[Any]]:
        """Actors that have answered once; killed at the end, so that rows do not add up."""
        actors = [remote_class.remote() for _ in range(count)]
        try:
            self.ray.get([actor.small_value.remote() for actor in actors])
            yield actors
        finally:
            for actor in actors:
                self.ray.kill(actor)


# --- The rows -----------------------------------------------------------------------


def tasks_sync(b: Bench) -> list[Result]:
    """One task at a time: submit, get."""
    return b.rate("tasks/s", lambda: b.ray.get(b.remotes.small_value.remote()))


def tasks_async(b: Bench) -> list[Result]:
    """Submit 1000 tasks, then get all."""
    small = b.remotes.small_value
    return b.rate("tasks/s", lambda: b.ray.get([small.remote() for _ in range(BATCH)]), BATCH)


def multi_client_tasks_async(b: Bench) -> list[Result]:
    """Four actors submit 1000 tasks each, at the same time."""
    with b.actors(b.remotes.Server, CLIENTS) as clients:
        return b.rate(
            "tasks/s", lambda: b.ray.get([c.run_tasks.remote(BATCH) for c in clients]),
            CLIENTS * BATCH,
        )


def actor_sync(b: Bench) -> list[Result]:
    """One call at a time to one actor."""
    return _calls_sync(b, b.remotes.Server)


def actor_async(b: Bench) -> list[Result]:
    """1000 calls to one actor, then get all."""
    return _calls_async(b, b.remotes.Server)


def n_n_actor_async(b: Bench) -> list[Result]:
    """Four tasks send 1000 calls each, round robin, to two actors."""
    return _calls_n_n(b, b.remotes.Server)


def get_small(b: Bench) -> list[Result]:
    """Get one small put object, again and again."""
    ref = b.ray.put(0)
    return b.rate("gets/s", lambda: b.ray.get(ref))


def put_small(b: Bench) -> list[Result]:
    """Put a small value, drop the ref."""
    return b.rate("puts/s", lambda: b.ray.put(0))


def put_100mb(b: Bench) -> list[Result]:
    """Put a 100 MB array, drop the ref; also against numpy.copyto into warm memory."""
    return _put_large(b, 100_000_000)


def put_500mb(b: Bench) -> list[Result]:
    """The same with 500 MB."""
    return _put_large(b, 500_000_000)


def get_10k_refs(b: Bench) -> list[Result]:
    """Get an object that holds 10,000 refs."""
    ref = b.remotes.object_of_refs.remote(REFS)
    b.ray.wait([ref])  # made before the clock starts
    return b.rate("gets/s", lambda: b.ray.get(ref))


def wait_1k_refs(b: Bench) -> list[Result]:
    """Submit 1000 tasks, wait for one at a time until none is left; whole rounds per second."""

    def round_of_waits() -> None:
        pending = [b.remotes.small_value.remote() for _ in range(BATCH)]
        # Fetching is asked for once per ref: Ray remembers the request, and its own
        # benchmark does the same. Asking in each of 1000 waits would flatter us.
        fetch_local = True
        while pending:
            _, pending = b.ray.wait(pending, num_returns=1, fetch_local=fetch_local)
            fetch_local = False

    return b.rate("rounds/s", round_of_waits)


def stream_items(b: Bench) -> list[Result]:
    """Take and get 1000 items of one generator task, one after the other."""

    def consume() -> None:
        for ref in b.remotes.stream.remote(BATCH):
            b.ray.get(ref)

    return b.rate("items/s", consume, BATCH)


def actor_starts(b: Bench) -> list[Result]:
    """Create ten actors, call each once, kill them."""

    def start_batch() -> None:
        with b.actors(b.remotes.Server, ACTORS_STARTED):
            pass

    return b.rate("actors/s", start_batch, ACTORS_STARTED, warm=False)


def async_actor_sync(b: Bench) -> list[Result]:
    """One call at a time to one asyncio actor."""
    return _calls_sync(b, b.remotes.AsyncServer)


def async_actor_async(b: Bench) -> list[Result]:
    """1000 calls to one asyncio actor, then get all."""
    return _calls_async(b, b.remotes.AsyncServer)


def n_n_async_actor_async(b: Bench) -> list[Result]:
    """Four tasks send 1000 calls each, round robin, to two asyncio actors."""
    return _calls_n_n(b, b.remotes.AsyncServer)


def _calls_sync(b: Bench, remote_class: Any) -> list[Result]:
    with b.actors(remote_class, 1) as (server,):
        return b.rate("calls/s", lambda: b.ray.get(server.small_value.remote()))


def _calls_async(b: Bench, remote_class: Any) -> list[Result]:
    with b.actors(remote_class, 1) as (server,):
        return b.rate(
            "calls/s", lambda: b.ray.get([server.small_value.remote() for _ in range(BATCH)]),
            BATCH,
        )


def _calls_n_n(b: Bench, remote_class: Any) -> list[Result]:
    call_each = b.remotes.call_each
    with b.actors(remote_class, NUM_CPUS) as servers:
        return b.rate(
            "calls/s",
            lambda: b.ray.get([call_each.remote(servers, BATCH) for _ in range(CLIENTS)]),
            CLIENTS * BATCH,
        )


def _put_large(b: Bench, nbytes: int) -> list[Result]:
    import numpy as np

    # Ones, not zeros: untouched zeros all map to one cached page, which would make
    # reading the source free.
    source = np.ones(nbytes // 8, dtype=np.int64)
    target = np.empty_like(source)
    b.warm_up(lambda: np.copyto(target, source))
    step = b.warm_up(lambda: b.ray.put(source))
    put_gbps: list[float] = []
    copyto_gbps: list[float] = []
    half_s = b.settings.seconds / 2
    # In turn, and the ratio per turn: a neighbour that takes memory bandwidth takes it
    # from both.
    while b.wants_more(len(put_gbps)):
        copyto_gbps.append(
            nbytes / 1e9 * b.sample(lambda: np.copyto(target, source), 1, half_s)
        )
        put_gbps.append(
            nbytes / 1e9 * b.sample(lambda: b.ray.put(source), min(step, 4), half_s)
        )
    ratios = [put / copy for put, copy in zip(put_gbps, copyto_gbps, strict=True)]
    return [
        Result.of(b.row, "GB/s", put_gbps),
        Result.of(f"{b.row}_copyto", "GB/s", copyto_gbps),
        Result.of(f"{b.row}_of_copyto", "ratio", ratios),
    ]


INIT_ROW = "init"
ROWS: dict[str, Callable[[Bench], list[Result]]] = {
    measure.__name__: measure
    for measure in (
        tasks_sync, tasks_async, multi_client_tasks_async, actor_sync, actor_async,
        n_n_actor_async, get_small, put_small, put_100mb, put_500mb, get_10k_refs,
        wait_1k_refs, stream_items, actor_starts, async_actor_sync, async_actor_async,
        n_n_async_actor_async,
    )
}


# --- The runner ---------------------------------------------------------------------

Emit = Callable[[dict[str, Any]], None]


def run_rows(backend: str, names: Sequence[str], settings: Settings, emit: Emit) -> None:
    """Measure `names` in this process, telling `emit` of each row begun and finished."""
    ray = harness.load_backend(backend)
    ray.init(num_cpus=NUM_CPUS)
    try:
        emit({"event": "ready", "versions": harness.versions(ray)})
        bench = Bench(ray, settings)
        # Start the workers outside every row.
        ray.get([bench.remotes.small_value.remote() for _ in range(100)])
        for name in names:
            emit({"event": "row", "name": name})
            bench.begin(name)
            try:
                results = ROWS[name](bench)
            except Exception as error:
                results = [Result.failed(name, f"{type(error).__name__}: {error}")]
            emit({"event": "results", "rows": [result.to_json() for result in results]})
    finally:
        ray.shutdown()
    emit({"event": "done"})


def run_init(backend: str, emit: Emit) -> None:
    """Time import, and init() to the first task's result, in this fresh process."""
    start = time.perf_counter()
    ray = harness.load_backend(backend)
    imported = time.perf_counter()
    ray.init(num_cpus=NUM_CPUS)
    value = ray.get(define_remotes(ray).small_value.remote())
    ready = time.perf_counter()
    assert value == b"ok", value
    emit({"event": "init", "import_s": imported - start, "init_s": ready - imported})
    ray.shutdown()
    emit({"event": "done"})


# --- The supervisor -----------------------------------------------------------------


class ChildProblem(Exception):
    """The runner hung, crashed or said it failed. The text goes into the row."""


class Child:
    """A copy of this script in its own session, with a pipe for events."""

    def __init__(self, arguments: Sequence[str], backend: str) -> None:
        read_fd, write_fd = os.pipe()
        # Open for as long as the child: closed in `close`.
        self._log: IO[bytes] = tempfile.TemporaryFile()
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        env["RAY_USAGE_STATS_ENABLED"] = "0"  # no network traffic during a measurement
        try:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), "--backend", backend,
                 "--events-fd", str(write_fd), *arguments],
                stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
                pass_fds=(write_fd,), start_new_session=True, env=env,
            )
        except BaseException:
            os.close(read_fd)
            self._log.close()
            raise
        finally:
            os.close(write_fd)
        self._events = os.fdopen(read_fd, "rb", buffering=0)
        self._buffer = b""

    def event(self, limit_s: float) -> dict[str, Any]:
        """The next event.

        Raises:
          ChildProblem: none came within `limit_s`, or the child closed its pipe.
        """
        deadline = time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._events, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                # EOF is seen as readable; a child that hangs is seen by the limit.
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise ChildProblem(f"stopped: no result within {limit_s:.0f} s")
                chunk = self._events.read(65536)
                if not chunk:
                    raise ChildProblem(f"the driver {self._fate()}: {self._last_line()}")
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        return event

    def close(self) -> None:
        """End the child and what it left in its process group; politely first."""
        try:
            if self._process.poll() is None:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(KILL_GRACE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._events.close()
            self._log.close()

    def wait_for_exit(self) -> None:
        """After its last event: give the child time to shut its backend down."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_LIMIT_S)

    def _fate(self) -> str:
        try:
            code = self._process.wait(EXIT_LIMIT_S)
        except subprocess.TimeoutExpired:
            return "closed its pipe and hangs"
        return f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"

    def last_lines(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - 4000))
        return self._log.read().decode(errors="replace").strip() or "no output"

    def _last_line(self) -> str:
        return self.last_lines().splitlines()[-1].strip()


class Supervisor:
    """Runs the rows in children until each has a result or an error."""

    def __init__(self, backend: str, settings: Settings, total_limit_s: float) -> None:
        self._backend = backend
        self._settings = settings
        self._deadline = time.monotonic() + total_limit_s
        self._total_limit_s = total_limit_s
        self.results: list[Result] = []
        self.versions: dict[str, str] = {}
        self.notes: list[str] = []

    def run(self, names: Sequence[str]) -> None:
        pending = [name for name in names if name != INIT_ROW]
        if INIT_ROW in names:
            self._measure_init()
        # Ends: every turn takes at least one row off `pending`.
        while pending:
            if self._left_s() <= 0:
                self._fail(pending, f"skipped: the run has used its {self._total_limit_s:.0f} s")
                return
            pending = self._run_some(pending)

    def _measure_init(self) -> None:
        import_s: list[float] = []
        init_s: list[float] = []
        try:
            for _ in range(self._settings.repeat):
                child = Child(["--run-init"], self._backend)
                try:
                    event = child.event(self._bounded(START_LIMIT_S))
                    import_s.append(event["import_s"])
                    init_s.append(event["init_s"])
                    child.event(EXIT_LIMIT_S)
                    child.wait_for_exit()
                finally:
                    child.close()
        except ChildProblem as problem:
            self.notes.append(f"{INIT_ROW}: {harness.scrub(str(problem))}")
            if not init_s:
                self._fail([INIT_ROW], str(problem))
                return
        self._keep([
            Result.of(INIT_ROW, "s", init_s, better="lower"),
            Result.of("import", "s", import_s, better="lower"),
        ])

    def _run_some(self, names: list[str]) -> list[str]:
        """Run `names` in one child; return those still to do."""
        settings = self._settings
        child = Child(
            ["--run-rows", ",".join(names), "--seconds", str(settings.seconds),
             "--repeat", str(settings.repeat), "--row-limit", str(settings.row_limit_s)],
            self._backend,
        )
        left = list(names)
        started = False
        try:
            self.versions = child.event(self._bounded(START_LIMIT_S))["versions"]
            started = True
            while left:
                child.event(self._bounded(START_LIMIT_S))  # the row begins
                rows = child.event(self._bounded(settings.row_limit_s))["rows"]
                results = [Result.from_json(row) for row in rows]
                self._keep(results)
                left.pop(0)
                if any(result.error for result in results):
                    # What it said is worth more than the error; the others get a fresh one.
                    print(child.last_lines(), file=sys.stderr, flush=True)
                    return left
            child.event(EXIT_LIMIT_S)
            child.wait_for_exit()
        except ChildProblem as problem:
            if not left:
                self.notes.append(f"shutdown: {harness.scrub(str(problem))}")
            elif not started:
                # A backend that cannot start will not start for the next row either.
                self._fail(left, str(problem))
                left = []
            else:
                self._fail([left.pop(0)], str(problem))
        finally:
            child.close()
        return left

    def _left_s(self) -> float:
        return self._deadline - time.monotonic()

    def _bounded(self, limit_s: float) -> float:
        return max(1.0, min(limit_s, self._left_s()))

    def _fail(self, names: Sequence[str], error: str) -> None:
        self._keep([Result.failed(name, error) for name in names])

    def _keep(self, results: Sequence[Result]) -> None:
        for result in results:
            value = result.error or f"{harness.number(result.value)} {result.unit}"
            print(f"{result.name}: {value}", file=sys.stderr, flush=True)
        self.results.extend(results)


def main() -> None:
    options = parse_arguments()
    settings = Settings(options.seconds, options.repeat, options.row_limit)
    if options.events_fd is not None:
        run_child(options, settings)
        return
    pattern = re.compile(options.filter)
    names = [name for name in (INIT_ROW, *ROWS) if pattern.search(name)]
    if not names:
        raise SystemExit(f"no row matches {options.filter!r}; rows: {INIT_ROW}, {', '.join(ROWS)}")
    began = time.monotonic()
    before = harness.machine()
    if options.in_process:
        results, found, notes = run_here(options.backend, names, settings)
    else:
        supervisor = Supervisor(options.backend, settings, options.total_limit)
        supervisor.run(names)
        results, found, notes = supervisor.results, supervisor.versions, supervisor.notes
    document = {
        "backend": options.backend,
        "date": harness.date(),
        "commit": harness.commit(),
        "machine": before,
        "versions": found,
        "settings": {"seconds": settings.seconds, "repeat": settings.repeat,
                     "num_cpus": NUM_CPUS},
        "wall_s": round(time.monotonic() - began, 1),
        "notes": notes,
        "rows": [result.to_json() for result in results],
    }
    text = f"{options.backend} {found.get(options.backend, '')}\n" + harness.result_table(results)
    harness.report(document, "\n".join([text, *notes]), options.json)


def run_here(
    backend: str, names: Sequence[str], settings: Settings
) -> tuple[list[Result], dict[str, str], list[str]]:
    """Rows in this very process, for a job of several ranks. Nothing ends a row that hangs."""
    events: list[dict[str, Any]] = []
    run_rows(backend, [name for name in names if name != INIT_ROW], settings, events.append)
    rows = [row for event in events if event["event"] == "results" for row in event["rows"]]
    notes = [f"{INIT_ROW}: not measured in process"] if INIT_ROW in names else []
    return [Result.from_json(row) for row in rows], events[0]["versions"], notes


def run_child(options: argparse.Namespace, settings: Settings) -> None:
    # A daemon that a backend starts must not hold the pipe open after we are gone.
    os.set_inheritable(options.events_fd, False)
    with os.fdopen(options.events_fd, "w", buffering=1) as events:

        def emit(event: dict[str, Any]) -> None:
            events.write(json.dumps(event) + "\n")

        if options.run_init:
            run_init(options.backend, emit)
        else:
            run_rows(options.backend, options.run_rows.split(","), settings, emit)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Microbenchmarks of Ray Core's shapes.")
    parser.add_argument("--backend", choices=harness.BACKENDS, required=True)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE",
                        help="write JSON to FILE, or to stdout without one")
    parser.add_argument("--filter", default="", metavar="REGEX", help="rows whose name matches")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one sample")
    parser.add_argument("--repeat", type=int, default=3, help="samples per row")
    parser.add_argument("--row-limit", type=float, default=40.0, metavar="S")
    parser.add_argument("--total-limit", type=float, default=200.0, metavar="S")
    parser.add_argument("--in-process", action="store_true",
                        help="run the rows in this process, for a job of several ranks")
    parser.add_argument("--events-fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--run-rows", help=argparse.SUPPRESS)
    parser.add_argument("--run-init", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
