"""What the path between two nodes costs over bare MPI: large pulls and actor calls.

    python benchmarks/transport.py                      launches everything itself
    mpirun -n 2 hpcray run benchmarks/transport.py      the same inside a job

    raw_mpi.py (2 ranks)  ->  hpcray (2 ranks)  ->  raw_mpi.py again

Raw MPI runs before and after, because a shared machine drifts: the two raw numbers
bracket ours, and their distance says how much a difference means.

Warm pull: the destination range was used before and came free. Cold pull: every
object is kept, so each one lands in memory touched for the first time.

What must not go in: anything that reads the transport's internals; placement is by
`NodeAffinitySchedulingStrategy`, as a user would do it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness
from harness import Result

RAW_LIMIT_S = 120.0
JOB_LIMIT_S = 180.0
WAIT_LIMIT_S = 60.0
PIPELINED = 1000  # actor calls in flight


# --- hpcray, inside the job -----------------------------------------------------------


def measure_hpcray(nbytes: int, repeat: int) -> list[Result]:
    ray = harness.load_backend("hpcray")
    ray.init()
    try:
        near, far = two_nodes(ray)
        results: list[Result] = []
        producer = start_on(ray, make_producer(ray), far)
        # Cold first: afterwards the store has warm ranges to hand out again.
        results.append(rate_of("pull_cold", nbytes, pulls(ray, producer, nbytes, repeat, True)))
        pulls(ray, producer, nbytes, 3, False)  # warm up what the next row reuses
        results.append(rate_of("pull_warm", nbytes, pulls(ray, producer, nbytes, repeat, False)))
        for place, node_id in (("far", far), ("near", near)):
            results += actor_calls(ray, place, start_on(ray, make_producer(ray), node_id), repeat)
        return results
    finally:
        ray.shutdown()


def two_nodes(ray: Any) -> tuple[str, str]:
    """The driver's node and another one."""
    alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    near = ray.get_runtime_context().get_node_id()
    others = [node_id for node_id in alive if node_id != near]
    if not others:
        raise SystemExit("only one node: run `mpirun -n 2 hpcray run benchmarks/transport.py`")
    return near, others[0]


def make_producer(ray: Any) -> Any:
    class Producer:
        def make(self, nbytes: int, stamp: int) -> Any:
            import numpy as np

            return np.full(nbytes, stamp, dtype=np.uint8)

        def ping(self) -> None:
            pass

        def node_id(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

    return ray.remote(num_cpus=0)(Producer)


def start_on(ray: Any, remote_class: Any, node_id: str) -> Any:
    strategies = importlib.import_module(f"{ray.__name__}.util.scheduling_strategies")
    strategy = strategies.NodeAffinitySchedulingStrategy(node_id, soft=False)
    actor = remote_class.options(scheduling_strategy=strategy).remote()
    placed = ray.get(actor.node_id.remote(), timeout=WAIT_LIMIT_S)
    if placed != node_id:
        raise RuntimeError(f"the actor asked for node {node_id} and runs on {placed}")
    return actor


def pulls(ray: Any, producer: Any, nbytes: int, repeat: int, cold: bool) -> list[float]:
    """Seconds per `get` of an object that exists on the other node only."""
    kept: list[Any] = []
    times: list[float] = []
    for stamp in range(1, repeat + 1):
        ref = producer.make.remote(nbytes, stamp)
        # fetch_local=False: wait until it exists over there, without pulling it.
        ready, _ = ray.wait([ref], timeout=WAIT_LIMIT_S, fetch_local=False)
        if not ready:
            raise TimeoutError(f"the producer made no object within {WAIT_LIMIT_S:g} s")
        start = time.perf_counter()
        value = ray.get(ref, timeout=WAIT_LIMIT_S)
        times.append(time.perf_counter() - start)
        if value.nbytes != nbytes or value[0] != stamp or value[-1] != stamp:
            raise RuntimeError("the pulled object differs from the one that was made")
        if cold:
            kept.append((ref, value))
        del value, ref, ready
    return times


def actor_calls(ray: Any, place: str, actor: Any, repeat: int) -> list[Result]:
    def blocking() -> None:
        for _ in range(200):
            ray.get(actor.ping.remote())

    def pipelined() -> None:
        ray.get([actor.ping.remote() for _ in range(PIPELINED)])

    return [
        Result.of(f"{place}_call_blocking", "us", timed(blocking, repeat, 1e6 / 200), "lower"),
        Result.of(
            f"{place}_call_pipelined", "us", timed(pipelined, repeat, 1e6 / PIPELINED), "lower"
        ),
    ]


def timed(call: Callable[[], None], repeat: int, scale: float) -> list[float]:
    call()  # connections, worker, caches
    times: list[float] = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * scale)
    return times


def rate_of(name: str, nbytes: int, times_s: Sequence[float]) -> Result:
    return Result.of(name, "GB/s", [nbytes / s / 1e9 for s in times_s])


# --- Raw MPI and launching ------------------------------------------------------------


def measure_raw(mpirun: str, nbytes: int, repeat: int, when: str) -> tuple[list[Result], str]:
    """Run raw_mpi.py on two ranks of its own; a failure is a row, not an end."""
    command = [mpirun, "-n", "2", sys.executable, str(harness.BENCHMARKS / "raw_mpi.py"),
               "--nbytes", str(nbytes), "--repeat", str(repeat)]
    try:
        done = subprocess.run(
            command, env=harness.launch_environment(), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=RAW_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return [Result.failed(f"raw_{when}", f"not finished after {RAW_LIMIT_S:g} s")], ""
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        error = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return [Result.failed(f"raw_{when}", f"exit {done.returncode}: {error}")], ""
    found = json.loads(lines[-1])
    return [
        rate_of(f"raw_pull_cold_{when}", nbytes, found["pull_cold_s"]),
        rate_of(f"raw_pull_warm_{when}", nbytes, found["pull_warm_s"]),
        Result.of(f"raw_ping_{when}", "us", [s * 1e6 for s in found["ping_s"]], "lower"),
    ], found["mpi"]


def run_job(mpirun: str, options: argparse.Namespace) -> list[Result]:
    """The hpcray part as a job of two ranks, this script being its driver."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "inside.json"
        command = [
            mpirun, "-n", "2", *harness.hpcray_command(), "run", str(Path(__file__).resolve()),
            "--inside", "--json", str(output), "--nbytes", str(options.nbytes),
            "--repeat", str(options.repeat),
        ]
        try:
            # Its stdout to our stderr: our own stdout may carry JSON.
            done = subprocess.run(
                command, env=harness.launch_environment(), stdin=subprocess.DEVNULL,
                stdout=sys.stderr, timeout=JOB_LIMIT_S + 60,
            )
        except subprocess.TimeoutExpired:
            return [Result.failed("hpcray", f"the job did not end in {JOB_LIMIT_S + 60:g} s")]
        if not output.exists():
            return [Result.failed("hpcray", f"the job exited with {done.returncode}")]
        rows = json.loads(output.read_text())["rows"]
        return [Result.from_json(row) for row in rows]


def measure_inside(options: argparse.Namespace) -> list[Result]:
    try:
        with harness.hard_limit(JOB_LIMIT_S, "transport"):
            return measure_hpcray(options.nbytes, options.repeat)
    except Exception as error:
        return [Result.failed("hpcray", f"{type(error).__name__}: {error}")]


# --- Reading them together --------------------------------------------------------------


def ratios(results: Sequence[Result]) -> list[Result]:
    """Ours against the mean of raw before and after. Pulls: share of raw; calls: multiple."""
    values = {r.name: r.value for r in results if r.value is not None}

    def raw(kind: str) -> float | None:
        both = [values[k] for k in (f"raw_{kind}_before", f"raw_{kind}_after") if k in values]
        return statistics.mean(both) if both else None

    found: list[Result] = []
    for name, floor, better in (
        ("pull_cold", raw("pull_cold"), "higher"),
        ("pull_warm", raw("pull_warm"), "higher"),
        ("far_call_blocking", raw("ping"), "lower"),
        ("far_call_pipelined", raw("ping"), "lower"),
    ):
        if name in values and floor:
            found.append(Result.of(f"{name}_of_raw", "ratio", [values[name] / floor], better))
    return found


def main() -> None:
    options = parse_arguments()
    mpirun = options.mpirun or harness.beside_python("mpirun")
    inside = options.inside or harness.under_launcher()
    with_raw = not (options.inside or options.no_raw)
    if mpirun is None and (with_raw or not inside):
        raise SystemExit("no mpirun beside this Python or on PATH: give --mpirun PATH")
    before = harness.machine()
    results: list[Result] = []
    library = ""
    if with_raw and mpirun is not None:
        found, library = measure_raw(mpirun, options.nbytes, options.repeat, "before")
        results += found
    if inside or mpirun is None:
        results += measure_inside(options)
    else:
        results += run_job(mpirun, options)
    if with_raw and mpirun is not None:
        found, library_after = measure_raw(mpirun, options.nbytes, options.repeat, "after")
        results += found
        library = library or library_after
    results += ratios(results)
    document = {
        "benchmark": "transport", "date": harness.date(), "commit": harness.commit(),
        "machine": before, "versions": harness.versions(), "mpi": library,
        "nbytes": options.nbytes, "rows": [result.to_json() for result in results],
    }
    text = f"{options.nbytes / 2**20:g} MiB between two nodes, {library}\n"
    harness.report(document, text + harness.result_table(results), options.json)
    if any(result.error for result in results):
        raise SystemExit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="hpcray between two nodes against bare MPI.")
    parser.add_argument("--nbytes", type=int, default=64 << 20)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--mpirun", metavar="PATH")
    parser.add_argument("--no-raw", action="store_true", help="leave the bare MPI part out")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
