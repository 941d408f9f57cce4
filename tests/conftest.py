"""Nothing is left behind: no process, no /dev/shm entry, no file descriptor.

Every process started below this pytest carries a mark in its environment, so leftovers are found
even after they lost their parent, and another pytest on the same machine is never blamed:

    HPCRAY_TEST_SESSION = .../<mark of the outer pytest>/<mark of this pytest>

A pytest started inside a test (`mpirun -n 2 python -m pytest ...`) appends its own mark: the outer
one still sees what the inner ones leave, the inner ones do not see each other.

    after each test      orphans: marked processes that no longer descend from this pytest. Nobody
                         will end those. A cluster that a wider fixture keeps is not an orphan.
    after each module    everything: processes, /dev/shm entries, descriptors of this process
                         (of these only hpcray's names, and an MPI library's if the module has
                         `mpirun` tests and nobody else on the host ran MPI meanwhile: what other
                         programs make there is theirs)
    after the session    the same once more, for what session fixtures keep

Each check polls for up to `GRACE_S` before it fails: a worker that was told to end may take a
moment. What it reports it also kills, so that one culprit fails one test and not all that follow.

Ignored signals are inherited through fork and exec. A shell ignores SIGINT and SIGQUIT for what it
starts in the background, `nohup` ignores SIGHUP, and no test of Ctrl-C could pass below. So pytest
turns them into handlers that do nothing: it survives as it was told to, and its children start
with what a program starts with.

`@pytest.mark.leaves_behind("reason")` on a test or a module switches its checks off.

`few_descriptors` plays a host that has none left.

What must not go in: fixtures of a single room; those live in that room's own conftest.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

# How long a process may take to end after the test did. Arbitrary, but longer than any of our own
# shutdown deadlines on a loaded machine with two cores, and only ever spent when something is left.
GRACE_S = 5.0
POLL_S = 0.02

MARK_VARIABLE = "HPCRAY_TEST_SESSION"
MARK = uuid.uuid4().hex
# At import, so that whatever a plugin or a module starts during collection has the mark as well.
os.environ[MARK_VARIABLE] = f"{os.environ.get(MARK_VARIABLE, '')}/{MARK}"

for _number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)

# Helpers of the standard library: one for each process, ended by Python at exit.
_STANDARD_HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")

SHM = Path("/dev/shm")
# Open MPI, MPICH and the libraries below them. Nothing in a name of these says which run it is of.
MPI_SHM_PREFIXES = ("sm_segment", "vader_segment", "mpich", "ucx_shm", "psm", "ofi", "fi_shm")
# In the environment of a process some launcher started.
_LAUNCHED = (b"PMIX_RANK=", b"PMI_RANK=", b"OMPI_COMM_WORLD_RANK=")


@dataclass(frozen=True, slots=True)
class Process:
    """One process, safe against reuse of its pid by its start time."""

    pid: int
    start_ticks: int
    parent_pid: int
    state: str  # one letter; Z is a zombie: dead, and its parent has not waited for it
    command: str

    def __str__(self) -> str:
        zombie = " (zombie: nobody has waited for it)" if self.state == "Z" else ""
        return f"process {self.pid}{zombie}, child of {self.parent_pid}: {self.command}"

    @property
    def key(self) -> tuple[int, int]:
        return self.pid, self.start_ticks


def read_file(path: str) -> bytes:
    """A small file of /proc, or b"" if it is gone or not ours to read. No `open`: this is hot."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.read(fd, 1 << 20)
    except OSError:
        return b""
    finally:
        os.close(fd)


def read_process(pid: int) -> Process | None:
    """The process as /proc shows it, or None if it is gone."""
    # The name stands in brackets and may hold brackets and blanks itself: cut at the last one.
    head, _, tail = read_file(f"/proc/{pid}/stat").rpartition(b")")
    fields = tail.split()
    if not fields:
        return None
    name = head.partition(b"(")[2].decode(errors="replace")
    return Process(pid, int(fields[19]), int(fields[1]), fields[0].decode(), f"[{name}]")


def command_line(process: Process) -> str:
    """What it runs, or the kernel's short name for it where there is no command line (a zombie)."""
    arguments = read_file(f"/proc/{process.pid}/cmdline").replace(b"\0", b" ")
    return arguments.decode(errors="replace").strip() or process.command


def carries_mark(pid: int) -> bool:
    """Whether the process was started by exec below this pytest; a fork answers as its parent."""
    return MARK.encode() in read_file(f"/proc/{pid}/environ")


class Watch:
    """Tells which processes of this session are alive. Asks each foreign process only once."""

    def __init__(self) -> None:
        self._foreign: dict[int, int] = {}  # pid -> start_ticks of what is not ours
        self._foreign_ranks: set[int] = set()  # those that a launcher started
        self.foreign_rank_seen_s = float("-inf")  # by time.monotonic

    def alive(self) -> list[Process]:
        """Ours: marked, or a descendant of this pytest (a plain fork has no mark of its own)."""
        found: dict[int, Process] = {}
        unmarked: dict[int, Process] = {}
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        self._foreign = {p: s for p, s in self._foreign.items() if p in set(pids)}
        for pid in pids:
            if pid == os.getpid():
                continue
            process = read_process(pid)
            if process is None or self._foreign.get(pid) == process.start_ticks:
                continue
            (found if carries_mark(pid) else unmarked)[pid] = process
        # A child may have a lower pid than its parent once pids wrap: repeat until nothing moves.
        mine = {os.getpid(), *found}
        moved = True
        while moved:
            moved = False
            for pid, process in list(unmarked.items()):
                if process.parent_pid in mine:
                    found[pid] = unmarked.pop(pid)
                    mine.add(pid)
                    moved = True
        for pid, process in unmarked.items():
            self._foreign[pid] = process.start_ticks
            if any(name in read_file(f"/proc/{pid}/environ") for name in _LAUNCHED):
                self._foreign_ranks.add(pid)
        self._foreign_ranks &= self._foreign.keys()
        if self._foreign_ranks:
            self.foreign_rank_seen_s = time.monotonic()
        named = [replace(p, command=command_line(p)) for p in found.values()]
        return [p for p in named if not any(h in p.command for h in _STANDARD_HELPERS)]

    @staticmethod
    def orphans(processes: list[Process]) -> list[Process]:
        """Those whose line of parents does not lead to this pytest."""
        parents = {p.pid: p.parent_pid for p in processes}

        def is_orphan(process: Process) -> bool:
            pid = process.pid
            while pid in parents:
                pid = parents[pid]
            return pid != os.getpid()

        return [p for p in processes if is_orphan(p)]


def shm_entries() -> set[str]:
    """This user's entries in /dev/shm. MPI libraries keep files there; hpcray itself keeps none."""
    mine = set()
    for entry in os.scandir(SHM) if SHM.is_dir() else ():
        try:
            if entry.stat(follow_symlinks=False).st_uid == os.getuid():
                mine.add(entry.name)
        except FileNotFoundError:
            continue
    return mine


def in_use_by_others(name: str, ours: list[Process]) -> bool:
    """Whether a process that is not of this session has the /dev/shm entry mapped or open."""
    path = f"{SHM}/{name}"
    own_pids = {os.getpid(), *(p.pid for p in ours)}
    for pid in (int(n) for n in os.listdir("/proc") if n.isdigit() and int(n) not in own_pids):
        try:
            if path in Path(f"/proc/{pid}/maps").read_text():
                return True
            if any(t.startswith(path) for t in open_descriptors(pid).values()):
                return True
        except OSError:
            continue
    return False


def open_descriptors(pid: int | str = "self") -> dict[int, str]:
    """Descriptor -> what it is, e.g. "socket:[4711]"."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
        except OSError:  # the descriptor of the listing itself
            continue
    return found


def mpi_is_running() -> bool:
    """MPI in this very process keeps descriptors and shared files until it is finalised."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and bool(mpi.Is_initialized()) and not mpi.Is_finalized()


@dataclass
class Before:
    """What there was when a scope began, and whom to ask about it at its end."""

    watch: Watch
    uses_mpi: bool
    since_s: float
    processes: set[tuple[int, int]]
    shm: set[str]
    descriptors: dict[int, str]

    @classmethod
    def now(cls, watch: Watch, uses_mpi: bool) -> Before:
        since_s = time.monotonic()
        processes = {p.key for p in watch.alive()}
        return cls(watch, uses_mpi, since_s, processes, shm_entries(), open_descriptors())

    def new_processes(self) -> list[Process]:
        return [p for p in self.watch.alive() if p.key not in self.processes]

    def leftovers(self) -> list[Process | str]:
        processes = self.new_processes()
        left: list[Process | str] = list(processes)
        if not mpi_is_running():
            left += [f"{SHM}/{name}" for name in sorted(shm_entries() - self.shm)
                     if self._may_be_ours(name) and not in_use_by_others(name, processes)]
            # By number: what now stands where something else stood before is not growth, and
            # pytest's own capture files come and go that way.
            left += [f"file descriptor {fd} of pytest: {what}"
                     for fd, what in open_descriptors().items() if fd not in self.descriptors]
        return left

    def _may_be_ours(self, shm_name: str) -> bool:
        if shm_name.startswith(MPI_SHM_PREFIXES):
            return self.uses_mpi and self.watch.foreign_rank_seen_s < self.since_s
        return shm_name.startswith("hpcray")


def wait_until_none(look: Callable[[], list[Process | str]]) -> list[Process | str]:
    """Poll until `look` finds nothing; return what is still there after the grace time."""
    left = look()
    if left:
        gc.collect()  # a cycle may hold the last reference to a socket
    deadline_s = time.monotonic() + GRACE_S
    while left and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
        left = look()
    return left


def kill(left: list[Process | str]) -> None:
    """End what was reported, and only that: the start time is compared behind a pidfd."""
    for process in left:
        if not isinstance(process, Process) or process.state == "Z":
            continue
        try:
            pidfd = os.pidfd_open(process.pid)
        except OSError:
            continue
        try:
            now = read_process(process.pid)
            if now is not None and now.key == process.key:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        finally:
            os.close(pidfd)


def fail(who: str, left: list[Process | str], first_seen: dict[tuple[int, int], str]) -> None:
    lines = []
    for thing in left:
        since = first_seen.get(thing.key) if isinstance(thing, Process) else None
        lines.append(f"  {thing}" + (f"\n      first seen after {since}" if since else ""))
    kill(left)
    pytest.fail(f"{who} left behind, {GRACE_S:g} s after its end:\n" + "\n".join(lines),
                pytrace=False)  # fmt: skip


def is_exempt(node: pytest.Item | pytest.Collector) -> bool:
    mark = node.get_closest_marker("leaves_behind")
    if mark is not None and not mark.args:
        raise pytest.UsageError(f"{node.nodeid}: leaves_behind needs a reason")
    return mark is not None


# Process -> the test after which it was first seen, for the message of the module's check.
_first_seen: dict[tuple[int, int], str] = {}
_excused: set[tuple[int, int]] = set()


@pytest.fixture(scope="session")
def _watch() -> Watch:
    return Watch()


@pytest.fixture(scope="session", autouse=True)
def nothing_left_by_session(_watch: Watch) -> Iterator[None]:
    # Processes only: imports of the whole suite open descriptors that live as long as Python does.
    before = {p.key for p in _watch.alive()}
    yield
    left = wait_until_none(
        lambda: [p for p in _watch.alive() if p.key not in before | _excused]
    )
    if left:
        fail("the session", left, _first_seen)


@pytest.fixture(scope="module", autouse=True)
def nothing_left_by_module(request: pytest.FixtureRequest, _watch: Watch) -> Iterator[None]:
    tests = [i for i in request.session.items if i.path == request.path]
    before = Before.now(_watch, any(test.get_closest_marker("mpirun") for test in tests))
    yield
    # One exempt test exempts the module's check: what it leaves cannot be told from the rest.
    if any(is_exempt(test) for test in tests):
        _excused.update(p.key for p in before.new_processes())
        return
    left = wait_until_none(before.leftovers)
    if left:
        fail(f"module {request.node.nodeid}", left, _first_seen)


@pytest.fixture(autouse=True)
def no_orphan_left_by_test(request: pytest.FixtureRequest, _watch: Watch) -> Iterator[None]:
    before = {p.key for p in _watch.alive()}
    yield
    for process in _watch.alive():
        if process.key not in before:
            _first_seen.setdefault(process.key, request.node.nodeid)
    if is_exempt(request.node):
        return
    left = wait_until_none(
        lambda: [p for p in _watch.orphans(_watch.alive()) if p.key not in before]
    )
    if left:
        fail(request.node.nodeid, left, _first_seen)


@pytest.fixture
def few_descriptors() -> Iterator[Callable[[int], None]]:
    """Called with a number, leaves this process so many descriptors from then on."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []

    def leave(count: int) -> None:
        if not taken:
            highest = max(map(int, os.listdir("/proc/self/fd")))
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, limits[1]))
        try:
            while True:
                taken.append(os.dup(0))
        except OSError:
            for _ in range(count):
                os.close(taken.pop())

    yield leave
    for fd in taken:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
