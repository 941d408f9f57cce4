"""The zygote as a process: raw datagrams in and out, no pool in between."""

from __future__ import annotations

import importlib.util
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hpcray.node.pool import spawn_zygote
from hpcray.worker import own_process, zygote_messages
from hpcray.worker.zygote_messages import Exited, Forked, ForkRefused, Ready

HERE = str(Path(__file__).parent)
LIMIT_S = 20


def wait_readable(fd: Any, limit_s: float = LIMIT_S) -> None:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    assert poller.poll(limit_s * 1000), "nothing came"


def wait_gone(pids: list[int]) -> None:
    """Until none of these processes runs (zombies of other parents do not count)."""
    deadline_s = time.monotonic() + LIMIT_S
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            wait_readable(pidfd, deadline_s - time.monotonic())
        finally:
            os.close(pidfd)


class RawZygote:
    """The node's side by hand."""

    def __init__(self, **options: Any) -> None:
        environ = {**os.environ, **options.pop("environ", {})}
        environ.pop("PYTHONUNBUFFERED", None)  # Buffering is what one of the tests looks at.
        options.setdefault("target", "zygote_targets:prepare")
        self.socket, self.process = spawn_zygote(environ, sys_path=[HERE, *sys.path], **options)
        self.pid = self.process.pid

    def event(self, limit_s: float = LIMIT_S) -> zygote_messages.Event:
        wait_readable(self.socket, limit_s)
        event: zygote_messages.Event = msgspec.msgpack.decode(
            self.socket.recv(65536), type=zygote_messages.Event)
        return event

    def request(self, request: zygote_messages.Request, descriptors: tuple[int, ...] = ()) -> None:
        socket.send_fds(self.socket, [msgspec.msgpack.encode(request)], list(descriptors))

    def fork(self, number: int, **settings: Any) -> Worker:
        worker = Worker()
        encoded = msgspec.msgpack.encode(settings)
        self.request(zygote_messages.ForkRequest(number, encoded), worker.far_descriptors())
        worker.close_far()
        return worker

    def close(self) -> None:
        self.socket.close()
        self.process.wait(LIMIT_S)


class Worker:
    """The near ends of one worker's channels."""

    def __init__(self) -> None:
        kind = (socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.task, self._task_far = socket.socketpair(*kind)
        self.client, self._client_far = socket.socketpair(*kind)
        self.stdout, self._stdout_far = os.pipe()
        self.stderr, self._stderr_far = os.pipe()

    def far_descriptors(self) -> tuple[int, ...]:
        far = (self._task_far.fileno(), self._client_far.fileno())
        return (*far, self._stdout_far, self._stderr_far)

    def close_far(self) -> None:
        self._task_far.close()
        self._client_far.close()
        os.close(self._stdout_far)
        os.close(self._stderr_far)

    def hear(self) -> Any:
        wait_readable(self.client)
        return msgspec.msgpack.decode(self.client.recv(1 << 18))

    def output(self, stream: int) -> str:
        """Until the end of the stream."""
        chunks = []
        while True:
            wait_readable(stream)
            chunk = os.read(stream, 1 << 16)
            if not chunk:
                return b"".join(chunks).decode()
            chunks.append(chunk)

    def close(self) -> None:
        self.task.close()
        self.client.close()
        os.close(self.stdout)
        os.close(self.stderr)


@pytest.fixture(params=["itself", "heir"])
def raw(request: pytest.FixtureRequest) -> Iterator[RawZygote]:
    """A zygote, and one that was the trial of another."""
    descriptors = os.listdir("/proc/self/fd")
    node = RawZygote()
    ready = node.event()
    assert isinstance(ready, Ready)
    if request.param == "heir":
        preload(node, {"modules": ["this"]})
        assert not preloaded(node) and node.pid != ready.pid
    yield node
    node.close()
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


def test_zygote_forks_and_reports_the_exit(raw: RawZygote) -> None:
    worker = raw.fork(3, do="leave", code=5)
    forked = raw.event()
    assert isinstance(forked, Forked)
    exited = raw.event()
    assert exited == Exited(3, forked.pid, 5 << 8)
    assert isinstance(exited, Exited)
    assert exited.exit_code == 5
    with open(f"/proc/{forked.pid}/stat") as stat:
        assert stat.read().rpartition(")")[2].split()[0] == "Z", "the pid stays reserved"
    raw.request(zygote_messages.ReapRequest(3))
    wait_gone([forked.pid])
    worker.close()


def test_worker_is_a_process_of_its_own(raw: RawZygote, tmp_path: Path) -> None:
    path = [HERE, *sys.path]
    settings = {
        "do": "describe", "cwd": str(tmp_path), "sys_path": path,
        "environ": {b"NEW": b"this", b"TZ": b"UTC", b"HOME": None},
        "env_vars": {"TOP": "${NEW}!"}}
    two_threads = dict.fromkeys(own_process.BLAS_VARIABLES, "2")
    workers = [raw.fork(3, do="describe"), raw.fork(1, **settings),
               raw.fork(2, **{**settings, "env_vars": {"TOP": "${NEW}!", **two_threads}})]
    plain, one, two = (worker.hear() for worker in workers)
    assert one["pid"] == one["session"] != two["pid"]
    assert one["descriptors"][:3] == [0, 1, 2]
    assert len(one["descriptors"]) == 5, "standard streams, task and client channel"
    assert one["stdin"] == "/dev/null"
    assert one["cwd"] == str(tmp_path)
    assert one["sys_path"] == path
    wanted = {**plain["environ"], "NEW": "this", "TZ": "UTC", "TOP": "this!"}
    del wanted["HOME"]
    assert one["environ"] == wanted, "the zygote's own, changed"
    assert two["environ"] == {**wanted, **two_threads}
    assert one["random"] != two["random"]
    assert one["numpy_random"] != two["numpy_random"]
    assert set(one["blas_threads"]) <= {1}
    assert set(two["blas_threads"]) <= {2}
    assert "Zygote" not in one["main"]
    assert all(one["signals"])
    assert one["private_kib"] < 16 * 1024, "the imports are shared"
    for worker in workers:
        worker.close()


def test_output_is_line_buffered_and_flushed_at_the_end(raw: RawZygote) -> None:
    worker = raw.fork(1, do="chatter")
    assert worker.hear() == "said"
    wait_readable(worker.stdout)
    assert os.read(worker.stdout, 100) == b"first line\n"
    wait_readable(worker.stderr)
    assert os.read(worker.stderr, 100) == b"to stderr\n"
    worker.task.send(b"go on")
    assert worker.output(worker.stdout) == "half"
    worker.close()


@pytest.mark.parametrize(
    ("behaviour", "stdout", "stderr"),
    [("fail", "", "RuntimeError: as asked\n"), ("quit_with_message", "buffered", "good bye\n")],
)
def test_worker_that_fails_says_why(
    raw: RawZygote, behaviour: str, stdout: str, stderr: str
) -> None:
    worker = raw.fork(1, do=behaviour)
    assert worker.output(worker.stderr).endswith(stderr)
    assert worker.output(worker.stdout) == stdout
    assert isinstance(raw.event(), Forked)
    exited = raw.event()
    assert isinstance(exited, Exited)
    assert exited.exit_code == 1
    worker.close()


def test_worker_killed_by_a_signal_is_told_from_one_that_exits(raw: RawZygote) -> None:
    worker = raw.fork(1, do="echo")
    assert worker.hear() == "up"
    forked = raw.event()
    assert isinstance(forked, Forked)
    os.kill(forked.pid, signal.SIGSEGV)
    exited = raw.event()
    assert isinstance(exited, Exited)
    assert exited.exit_code == -signal.SIGSEGV
    worker.close()


def test_a_missing_target_is_a_problem_and_a_refusal() -> None:
    node = RawZygote(target="no_such_target:run")
    ready = node.event()
    assert isinstance(ready, Ready)
    assert len(ready.problems) == 1
    worker = node.fork(1, do="echo")
    refused = node.event()
    assert isinstance(refused, ForkRefused)
    assert "no_such_target" in refused.reason
    worker.close()
    node.close()


# --- preload ------------------------------------------------------------------------------------


class Modules:
    """A directory of modules to import."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []

    def add(self, name: str, source: str = "") -> None:
        self.names.append(name)
        *packages, _ = name.split(".")
        path = self.folder.joinpath(*packages)
        path.mkdir(parents=True, exist_ok=True)
        for depth in range(len(packages)):
            self.folder.joinpath(*packages[: depth + 1], "__init__.py").touch()
        self.folder.joinpath(*name.split(".")).with_suffix(".py").write_text(source)

    def settings(self, **more: Any) -> dict[str, Any]:
        path = [str(self.folder), HERE, *sys.path]
        return {"modules": self.names, "sys_path": path, **more}


@pytest.fixture
def modules(tmp_path: Path) -> Modules:
    folder = tmp_path / "modules"
    folder.mkdir()
    return Modules(folder)


def preload(node: RawZygote, settings: dict[str, Any], patience_s: float = LIMIT_S) -> None:
    node.request(zygote_messages.PreloadRequest(msgspec.msgpack.encode(settings), patience_s))


def preloaded(node: RawZygote) -> dict[str, zygote_messages.Problem]:
    while isinstance(event := node.event(3 * LIMIT_S), zygote_messages.Trying):
        pass
    assert isinstance(event, zygote_messages.Preloaded), event
    node.pid = event.pid
    assert len({problem.module for problem in event.problems}) == len(event.problems)
    return {problem.module: problem for problem in event.problems}


def imported(node: RawZygote, names: list[str]) -> list[str]:
    """Those that a new worker finds imported."""
    worker = node.fork(99, do="look", look_for=names)
    found: list[str] = worker.hear()[0]
    worker.close()
    return found


UNFIT = {
    "starts 1 thread":
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()",
    "starts a process": "import subprocess\nsubprocess.Popen(['sleep', '1000'])",
    "sets a handler of SIGTERM": "import signal\nsignal.signal(signal.SIGTERM, lambda *_: None)",
    "calls MPI_Init": """
import sys, types
mpi = sys.modules["mpi4py.MPI"] = types.ModuleType("mpi4py.MPI")
mpi.Is_initialized = lambda: True
""",
    "exits with status 0": "import os\nos._exit(0)",
    "crashes by signal 11 (the last words)":
        "import os, sys\nprint('the last words', file=sys.stderr)\nos.kill(os.getpid(), 11)",
    "hangs: no progress for 2 s": "import threading\nthreading.Event().wait()",
}
HARMLESS = {
    "cannot be imported: No module named 'no_such_module'": "import no_such_module",
    "raises ValueError: as asked": "raise ValueError('as asked')",
    "raises SystemExit: 3": "raise SystemExit(3)",
}


@pytest.mark.parametrize("problem", [*UNFIT, *HARMLESS])
def test_an_unfit_module_is_named_and_harms_nobody(
    raw: RawZygote, modules: Modules, problem: str
) -> None:
    modules.add("fit_before")
    modules.add("unfit", {**UNFIT, **HARMLESS}[problem])
    modules.add("fit_after")
    # It would find another world than in a process of its own, where that module is there.
    modules.add("dependent", "try:\n    import unfit\nexcept ImportError:\n    pass")
    modules.add("last", "import fit_before, fit_after")
    preload(raw, modules.settings(), 2.0)
    texts = {name: found.text for name, found in preloaded(raw).items()}
    expected = {"unfit": problem}
    if problem in UNFIT:
        expected["dependent"] = "needs unfit"
    elif "cannot be imported" not in problem:
        expected["dependent"] = problem
    assert texts == expected
    assert imported(raw, modules.names) == [name for name in modules.names if name not in expected]


@pytest.mark.parametrize("problem", UNFIT)
def test_it_is_the_module_that_does_it_who_is_named(
    raw: RawZygote, modules: Modules, problem: str
) -> None:
    """And not the first of those that import it."""
    modules.add("harmless_too")
    modules.add("outer", "import harmless_too\nimport inner\nimport json")
    modules.add("inner", UNFIT[problem] + "\nimport csv")
    modules.add("other", "from inner import csv")
    modules.names.remove("inner")
    preload(raw, modules.settings(), 2.0)
    texts = {name: found.text for name, found in preloaded(raw).items()}
    assert texts == {"inner": problem, "outer": "needs inner", "other": "needs inner"}
    assert imported(raw, [*modules.names, "inner"]) == ["harmless_too"]


def test_what_computes_without_end_has_an_end(raw: RawZygote, modules: Modules) -> None:
    modules.add("endless", "while True:\n    pass")
    modules.add("fit")
    preload(raw, modules.settings(), 0.2)
    assert preloaded(raw)["endless"].crashed
    assert imported(raw, modules.names) == ["fit"]


def test_a_package_that_is_unfit_takes_what_is_in_it_along(
    raw: RawZygote, modules: Modules
) -> None:
    modules.add("package.inner")
    modules.add("package.other")
    (modules.folder / "package" / "__init__.py").write_text("import os\nos.abort()")
    modules.names.insert(0, "package")
    modules.add("packaged")
    preload(raw, modules.settings())
    problems = preloaded(raw)
    assert list(problems) == ["package"]
    assert problems["package"].crashed
    assert imported(raw, modules.names) == ["packaged"]


def test_many_unfit_modules_come_to_an_end(raw: RawZygote, modules: Modules) -> None:
    for number in range(40):
        modules.add(f"unfit_{number}", UNFIT["exits with status 0"])
    preload(raw, modules.settings())
    problems = list(preloaded(raw).values())
    assert len(problems) < 40
    assert "is left out, and" in problems[-1].text
    assert imported(raw, modules.names) == []


def test_imports_have_a_workers_surroundings_and_leave_the_zygotes(
    modules: Modules, tmp_path: Path
) -> None:
    node = RawZygote(environ={"JE_ARROW_MALLOC_CONF": "dirty_decay_ms:5"})
    assert isinstance(node.event(), Ready)
    modules.add("marking", """
import os, sys
print("chatter")
print("chatter", file=sys.stderr)
assert os.getcwd() == os.environ["PLACE"] and os.environ["TOP"] == "<this>"
assert os.environ["OMP_NUM_THREADS"] == os.environ["NUMEXPR_NUM_THREADS"] == "1"
assert os.environ["JE_ARROW_MALLOC_CONF"] == "dirty_decay_ms:5,background_thread:false"
os.environ["MARK"] = "set by it"
""")
    modules.names.append("json.tool")  # a longer way to where it is found
    settings = modules.settings(
        cwd=str(tmp_path), environ={b"PLACE": str(tmp_path).encode(), b"NEW": b"this"},
        env_vars={"TOP": "<${NEW}>"})
    preload(node, settings)
    assert preloaded(node) == {}
    variables = ("PLACE", "NEW", "TOP", "MARK", "JE_ARROW_MALLOC_CONF", "NUMEXPR_NUM_THREADS")
    worker = node.fork(1, do="look", look_for=modules.names, variables=variables)
    found, environ = worker.hear()
    assert found == modules.names
    assert environ == {"MARK": "set by it", "JE_ARROW_MALLOC_CONF": "dirty_decay_ms:5",
                       "NUMEXPR_NUM_THREADS": "1"}
    worker.task.send(b"go on")
    assert worker.output(worker.stdout) == worker.output(worker.stderr) == ""
    worker.close()
    plain = node.fork(2, do="describe")
    seen = plain.hear()
    assert str(modules.folder) not in seen["sys_path"]
    assert seen["cwd"] == os.getcwd()
    plain.close()
    node.close()


def test_forks_wait_for_a_preload_and_deaths_are_told_meanwhile(
    raw: RawZygote, modules: Modules
) -> None:
    elder = raw.fork(1, do="echo")
    assert elder.hear() == "up"
    assert isinstance(raw.event(), Forked)
    gate = modules.folder / "gate"
    os.mkfifo(gate)
    # In the trial only: the zygote itself would be deaf meanwhile.
    modules.add("slow", f"""
import threading
if open("/proc/self/comm").read() == "hpcray:trial\\n":
    open({str(gate)!r}).read()
""")
    preload(raw, modules.settings())
    younger = raw.fork(2, do="look", look_for=modules.names)
    assert isinstance(raw.event(), zygote_messages.Trying)
    with open(gate, "w"):  # it is in the middle of the import
        elder.task.send(b"exit")
        exited = raw.event()
        assert isinstance(exited, Exited)
        assert exited.number == 1
    assert preloaded(raw) == {}
    assert younger.hear()[0] == ["slow"]
    elder.close()
    younger.close()


def test_an_open_gpu_is_seen_by_its_descriptor() -> None:
    code = """
from hpcray.worker import preload
preload._GPU_DEVICES = ("/dev/zero",)
before = preload._Process()
with open("/dev/full", "rb"):
    assert before.harm() == ""
with open("/dev/full", "rb"), open("/dev/zero", "rb"):
    assert before.harm() == "opens a GPU"
assert before.harm() == ""
"""
    subprocess.run([sys.executable, "-c", code], timeout=30, check=True)


COUNTS = "import os\nopen(os.environ['COUNT'], 'a').write(f'{os.getpid()} ')"


@pytest.mark.parametrize("workers", [False, True])
def test_a_clean_trial_is_the_zygote_unless_there_are_workers(
    raw: RawZygote, modules: Modules, workers: bool
) -> None:
    count = modules.folder / "count"
    before = raw.pid
    elder = raw.fork(1, do="echo")
    assert elder.hear() == "up"
    forked = raw.event()
    assert isinstance(forked, Forked)
    if not workers:
        elder.task.send(b"exit")
        assert isinstance(raw.event(), Exited)
        raw.request(zygote_messages.ReapRequest(1))
        wait_gone([forked.pid])
    modules.add("counted", COUNTS)
    preload(raw, modules.settings(environ={b"COUNT": str(count).encode()}))
    assert preloaded(raw) == {}
    assert (raw.pid == before) == workers
    pids = count.read_text().split()
    assert len(pids) == 1 + workers, "imported once, if that is enough"
    assert pids[-1] == str(raw.pid)
    if workers:
        elder.task.send(b"exit")
        assert raw.event() == Exited(1, forked.pid, 0)
    assert imported(raw, modules.names) == ["counted"]
    elder.close()


def test_a_trial_in_which_an_import_failed_is_not_the_zygote(
    raw: RawZygote, modules: Modules
) -> None:
    """It has what that import left behind, and a new process has not."""
    before = raw.pid
    modules.add("fit")
    modules.add("broken", "import csv, half_way\nraise ValueError('as asked')")
    modules.add("half_way")
    modules.names.remove("half_way")
    preload(raw, modules.settings())
    assert list(preloaded(raw)) == ["broken"]
    assert raw.pid == before
    assert imported(raw, [*modules.names, "half_way"]) == ["fit"]


def test_another_trial_goes_on_with_what_was_fit_and_is_the_zygote(
    raw: RawZygote, modules: Modules
) -> None:
    count = modules.folder / "count"
    before = raw.pid
    modules.add("fit", COUNTS)
    modules.add("unfit", UNFIT["starts 1 thread"])
    modules.add("after", COUNTS)
    preload(raw, modules.settings(environ={b"COUNT": str(count).encode()}))
    assert list(preloaded(raw)) == ["unfit"]
    trial, *pids = map(int, count.read_text().split())
    assert pids == [before, raw.pid] and trial not in pids
    assert imported(raw, modules.names) == ["fit", "after"]


def test_modules_see_the_loaders_that_they_have_in_a_worker(
    raw: RawZygote, modules: Modules
) -> None:
    modules.add("lazy", "import sys\nassert 'lazily' in sys.modules")
    modules.add("plain", """
import importlib.util, sys
lazy = importlib.util.find_spec("lazy")
def load():
    lazily = sys.modules["lazily"] = importlib.util.module_from_spec(lazy)
    lazy.loader.exec_module(lazily)
    assert not [name for loader in (lazy.loader, __spec__.loader) for name in vars(loader)
                if name not in ("name", "path")]
    assert not [finder for finder in sys.meta_path if "preload" in type(finder).__module__]
""")
    modules.names.remove("lazy")
    preload(raw, modules.settings())
    assert preloaded(raw) == {}
    worker = raw.fork(1, do="load", module="plain")
    assert worker.hear() == "loaded"
    worker.close()


@pytest.mark.parametrize("orderly", [False, True])
def test_the_end_does_not_wait_for_a_preload(modules: Modules, orderly: bool) -> None:
    node = RawZygote()
    assert isinstance(node.event(), Ready)
    gate = modules.folder / "gate"
    os.mkfifo(gate)
    modules.add("slow", f"import subprocess\nsubprocess.Popen(['sleep', '1000'])\n"
                        f"open({str(gate)!r}).read()")
    preload(node, modules.settings())
    trying = node.event()
    assert isinstance(trying, zygote_messages.Trying)
    with open(gate, "w"):
        if orderly:
            node.request(zygote_messages.StopRequest(1.0))
            node.socket.shutdown(socket.SHUT_WR)
        else:
            node.socket.close()
        assert node.process.wait(LIMIT_S) == 0
    assert not own_process.kill_sessions({trying.pid}, 0), "nor is anything of the trial left"
    node.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_libraries_imported_before_the_fork_work_after_it(
    raw: RawZygote, tmp_path: Path, threads: int
) -> None:
    pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    wanted = ["pandas", "pyarrow", "pyarrow.parquet", "pyarrow.compute", "pyarrow.dataset",
              "scipy", "scipy.linalg", "torch"]
    there = [name for name in wanted if importlib.util.find_spec(name.split(".")[0])]
    preload(raw, {"modules": there, "sys_path": sys.path}, 60.0)
    assert preloaded(raw) == {}
    env_vars = dict.fromkeys(own_process.BLAS_VARIABLES, str(threads)) if threads > 1 else {}
    workers = [raw.fork(number, do="use_libraries", folder=str(tmp_path), env_vars=env_vars)
               for number in (1, 2)]
    seeds = set()
    for worker in workers:
        wait_readable(worker.client, 60)
        found = worker.hear()
        assert found["imported"] == [name for name in there if "." not in name]
        assert found["pyarrow"] == [sum(range(100_000)), 2]
        assert found["pandas"] == {"x": sum(range(0, 1000, 2)), "y": sum(range(1, 1000, 2))}
        assert found["threads"] == [threads]
        assert found.get("scipy", 2.0) == 2.0
        if "torch" in there:
            assert found["torch"][:2] == [threads, 512.0 ** 3]
            seeds.add(found["torch"][2])
        worker.close()
    assert len(seeds) in (0, 2), "each as random as a new process"


@pytest.mark.parametrize("heir", [False, True])
def test_end_of_node_ends_whole_sessions(tmp_path: Path, heir: bool) -> None:
    node = RawZygote()
    assert isinstance(node.event(), Ready)
    kept = tmp_path / "somebody_elses"
    kept.touch()
    node.request(zygote_messages.CleanupRequest(str(tmp_path / "never_made")))
    if heir:
        preload(node, {"modules": ["this"]})
        assert not preloaded(node) and node.pid != node.process.pid
    family, stubborn = node.fork(1, do="family"), node.fork(2, do="stubborn")
    pids = family.hear()
    assert stubborn.hear() == "up"
    started_s = time.monotonic()
    node.close()
    assert node.process.returncode == 0
    wait_gone(pids)
    assert time.monotonic() - started_s < zygote_messages.DEFAULT_GRACE_S + 5
    assert kept.exists()
    family.close()
    stubborn.close()


@pytest.mark.parametrize("orderly", [True, False])
def test_what_workers_have_unpacked_goes_with_them(tmp_path: Path, orderly: bool) -> None:
    node = RawZygote()
    assert isinstance(node.event(), Ready)
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "unpacked").touch()
    node.request(zygote_messages.CleanupRequest(str(folder)))
    worker = node.fork(1, do="stubborn")
    assert worker.hear() == "up"
    if orderly:
        node.request(zygote_messages.StopRequest(0.0))
        node.process.wait(LIMIT_S)
    node.close()
    assert not folder.exists()
    worker.close()


def test_death_of_the_zygote_kills_its_workers(raw: RawZygote) -> None:
    worker = raw.fork(1, do="stubborn")
    assert worker.hear() == "up"
    forked = raw.event()
    assert isinstance(forked, Forked)
    raw.process.kill()
    wait_gone([forked.pid])
    worker.close()


def test_zygote_outlives_a_terminating_batch_system(raw: RawZygote) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        for pid in {raw.pid, raw.process.pid}:
            os.kill(pid, number)
    worker = raw.fork(1, do="leave", code=0)
    assert isinstance(raw.event(), Forked)
    worker.close()


def test_environment_for_imports_is_not_the_workers(raw: RawZygote) -> None:
    worker = raw.fork(1, do="describe")
    seen = worker.hear()["environ"]
    # threadpoolctl sets the last one.
    for name in ("PYTHONPATH", "KMP_DUPLICATE_LIB_OK"):
        assert seen.get(name) == os.environ.get(name), name
    worker.close()


def test_libraries_have_one_thread_unless_the_environment_says_more() -> None:
    node = RawZygote(environ={"OPENBLAS_NUM_THREADS": "2"})
    assert isinstance(node.event(), Ready)
    for environ, number in (({}, 2), ({b"OPENBLAS_NUM_THREADS": None}, 1),
                            ({b"OPENBLAS_NUM_THREADS": b"3"}, 3)):
        worker = node.fork(number, do="describe", environ=environ)
        found = worker.hear()
        assert {name: found["environ"].get(name) for name in own_process.BLAS_VARIABLES} == {
            **dict.fromkeys(own_process.BLAS_VARIABLES, "1"), "OPENBLAS_NUM_THREADS": str(number)}
        assert found["blas_threads"] == [number], "numpy brings OpenBLAS along"
        worker.close()
    node.close()


def test_workers_draw_random_numbers_of_their_own(raw: RawZygote, modules: Modules) -> None:
    """Whatever an import has drawn: normal numbers come in pairs, and one is kept."""
    modules.add("drawing", "import numpy, random\nnumpy.random.normal()\nrandom.gauss(0, 1)")
    preload(raw, modules.settings())
    assert preloaded(raw) == {}
    found: list[Any] = []
    for number in (1, 2, 3):
        worker = raw.fork(number, do="draw")
        found += worker.hear()
        worker.close()
    assert len(set(found)) == len(found)


def test_what_the_node_imports_of_it_is_light() -> None:
    code = (
        "import sys, hpcray.worker.own_process, hpcray.worker.zygote_messages;"
        "sys.exit(bool({'numpy', 'ctypes', 'cloudpickle', 'argparse'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0
