"""The zygote: a small process that has imported everything and forks workers on request.

Why it exists: importing numpy and friends takes a tenth of a second on a laptop and minutes when
a thousand processes ask a parallel file system for it at once. The zygote pays once per node; a
fork takes a millisecond and shares the imported pages copy-on-write. And a process that has
called MPI_Init must not fork, so the node starts the zygote *before* that.

    node                                   zygote                        worker (a fork)
     |  python -m hpcray.worker.zygote       |
     |-------------- spawn ----------------->|  import, make the target, gc.freeze()
     |<------------- Ready ------------------|
     |-- PreloadRequest(modules) ----------->|  worker/preload.py; forks wait behind it
     |<------------- Preloaded(pid) ---------|  perhaps by a child that is the zygote from here on
     |-- ForkRequest(number) + 4 fds ------->|--- fork ------------------->| setsid, PDEATHSIG
     |<------------- Forked(number, pid) ----|                             | target(number, ...)
     |<------------- Exited(number, status) -|<-- SIGCHLD ------ exit -----|
     |-- ReapRequest(number) --------------->|  end its session, waitpid: the pid is free again
     |-- EOF (node gone) ------------------->|  end all sessions, exit

Most of a worker's start is page faults: what it changes is copied, page by page, for some 3 us
each. So whatever all workers have is made here, by the function that the target is the name of.

One datagram of a SOCK_SEQPACKET pair per message, msgpack inside, descriptors beside it.

A dead worker stays a zombie until its node says `ReapRequest`: so its pid and process group
cannot be reused while the node may still send signals to them.

What must not go in here: threads (a fork copies only the calling one, and whatever lock another
held stays locked for ever), user tasks, MPI.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import contextlib
import ctypes
import gc
import importlib
import json
import mmap
import os
import select
import shutil
import signal
import socket
import sys
import time
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import msgspec

from hpcray.worker import title
from hpcray.worker.own_process import (
    BLAS_VARIABLES,
    blas_controller,
    change_environment,
    default_threads,
    end_sessions,
    enter_as_ray,
    kill_sessions,
    limit_threads,
    thread_count,
    thread_limits,
)
from hpcray.worker.zygote_messages import (
    DEFAULT_GRACE_S,
    DEFAULT_TARGET,
    INLINE_SETTINGS_BYTES,
    CleanupRequest,
    Event,
    Exited,
    Forked,
    ForkRefused,
    ForkRequest,
    Preloaded,
    PreloadRequest,
    Ready,
    ReapRequest,
    Request,
    StopRequest,
    Trying,
)

# What a worker runs: (number, task_fd, client_fd, settings) -> exit code, None is 0. It comes from
# the function that the zygote is told, which it calls once.
Target = Callable[[int, int, int, dict[str, Any]], int | None]

_BLAS_NAMES = frozenset(os.fsencode(name) for name in BLAS_VARIABLES)

# What every worker needs; missing ones (numpy in a minimal installation) are not an error.
_ALWAYS_PRELOADED = ("msgspec", "cloudpickle", "numpy", "random", "threadpoolctl")

# Larger settings travel in a memfd.
_RECEIVE_BYTES = INLINE_SETTINGS_BYTES + 4096

# So many are told, for the sake of the datagram: nobody reads more.
_PROBLEMS = 50

# A process in uninterruptible sleep does not die of SIGKILL; do not wait for it for ever.
_REAP_LIMIT_S = 5.0
# Names that PreloadRequests have put into sys.modules, in the zygote and its workers.
preloaded: set[str] = set()

# Those of `signal` make enum members, in some 25 pages of memory: a fork copies each of them.
_set_handler = _signal.signal
_SIG_DFL, _SIGINT = int(signal.SIG_DFL), int(signal.SIGINT)
_DEFAULT_IN_FORKS = (int(signal.SIGCHLD), int(signal.SIGTERM), int(signal.SIGHUP))

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


class _NodeGone(Exception):
    """The other end of the socket is closed."""


class Zygote:
    """The serving half, after the imports. One thread; the loop is `serve`."""

    def __init__(self, node: socket.socket, target: Target | str) -> None:
        """`target` is a string, the reason, if it could not be imported."""
        self._node = node
        self._target = target
        self._pid = os.getpid()
        self._decoder = msgspec.msgpack.Decoder(Request)
        self._living: dict[int, int] = {}  # pid -> number
        self._dead: dict[int, int] = {}  # number -> pid, zombies
        self._burying: list[int] = []  # pids, zombies that the node is done with
        self._cleanup_folder = ""
        self._prctl = _load_prctl()
        self._take_stock()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # Shared with the workers: whether a SIGTERM is the end of the job.
        self._ending = mmap.mmap(-1, 1)

    def warm_up(self) -> None:
        """Do once what workers do first: libraries import more at their first use."""
        reseed(self._random)
        if self._blas is not None:
            self._blas.limit(limits=1)
        msgspec.msgpack.decode(msgspec.msgpack.encode({"": 0}), type=dict[str, Any])

    def _take_stock(self) -> None:
        """What imports have left behind, found out once so that a worker need not."""
        self._blas = blas_controller()
        self._random = _numpy_words()
        self._thread_limits = _more_than_one(thread_limits())

    def serve(self) -> None:
        """Until the node says stop or is gone. Afterwards no worker is left."""
        self._listen()
        self._prctl(_PR_SET_PDEATHSIG, 0)  # From here on, EOF on the socket does it.
        try:
            while True:
                poller = select.poll()  # anew: a heir has other descriptors
                poller.register(self._node, select.POLLIN)
                poller.register(self._wake_read, select.POLLIN)
                ready = [fd for fd, _ in poller.poll(0 if self._burying else None)]
                if not ready:
                    self._reap()
                # Exits first and one request per turn: a death is told at once, also while a
                # hundred fork requests are queued.
                if self._wake_read in ready:
                    self._report_exits()
                if self._node.fileno() in ready:
                    stop = self._serve_one_request()
                    if stop is not None:
                        self._end_workers(stop.grace_s)
                        break
        except _NodeGone:
            self._node.close()
            self._end_workers(DEFAULT_GRACE_S)
        if self._cleanup_folder:
            shutil.rmtree(self._cleanup_folder, ignore_errors=True)

    def _listen(self) -> None:
        """To the ends of workers; what else is said by signals is not for a zygote."""
        ignore_signals()
        signal.signal(signal.SIGCHLD, _no_action)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)

    def _serve_one_request(self) -> StopRequest | None:
        try:
            datagram, descriptors, flags, _ = socket.recv_fds(
                self._node, _RECEIVE_BYTES, 5, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        except ConnectionResetError as error:
            raise _NodeGone from error
        if not datagram:
            raise _NodeGone
        try:
            request = self._decoder.decode(datagram)
            match request:
                case ForkRequest():
                    if flags & socket.MSG_CTRUNC:
                        reason = "the zygote is out of file descriptors; raise `ulimit -n`"
                        self._send(ForkRefused(request.number, reason))
                    else:
                        self._fork(request, descriptors)
                case ReapRequest():
                    if request.number in self._dead:
                        self._burying.append(self._dead.pop(request.number))
                case CleanupRequest():
                    self._cleanup_folder = request.folder
                case PreloadRequest():
                    self._preload(request, descriptors)
                case StopRequest():
                    return request
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return None

    def _fork(self, request: ForkRequest, descriptors: list[int]) -> None:
        obstacle = self._obstacle()
        if obstacle:
            self._send(ForkRefused(request.number, obstacle))
            return
        try:
            pid = os.fork()
        except OSError as error:
            reason = f"fork failed ({error}); look at `ulimit -u` and at the memory of this host"
            self._send(ForkRefused(request.number, reason))
            return
        if pid == 0:
            self._become_worker(request, descriptors)
        self._living[pid] = request.number
        self._send(Forked(request.number, pid))

    def _obstacle(self) -> str:
        """Why no worker can be forked now; empty if one can."""
        if isinstance(self._target, str):
            return self._target
        if thread_count() == 1:
            return ""
        # Its trial has not shown it: it starts threads some time after the import.
        return (
            f"the zygote has {thread_count()} threads ({', '.join(_thread_names())}), and a fork "
            "would copy their locks but not them. Take the module that starts them out of preload "
            "and import it in the tasks instead"
        )

    def _preload(self, request: PreloadRequest, descriptors: list[int]) -> None:
        """Forks wait meanwhile; deaths are reported, and a node that hangs up ends it.

        Afterwards another process may be the zygote: then that one returns from here, too, and
        this one does not.
        """
        from hpcray.worker.preload import Preloading

        started_s = time.monotonic()
        settings = _read_settings(request, descriptors)
        before = set(sys.modules)
        if self._burying:
            self._reap()
        preloading = Preloading(
            settings["modules"], settings, request.patience_s, self._become_trial,
            None if self._living or self._dead else self._node)
        trial = 0
        while not preloading.done:
            if preloading.pid != trial:
                trial = preloading.pid
                self._send(Trying(trial))
            poller = select.poll()
            poller.register(preloading, select.POLLIN)
            poller.register(self._wake_read, select.POLLIN)
            poller.register(self._node, select.POLLRDHUP)
            ready = [fd for fd, _ in poller.poll(preloading.look_s * 1000)]
            if self._node.fileno() in ready:
                preloading.abandon()
                return
            if self._wake_read in ready:
                self._report_exits()
            preloading.step()
        if preloading.heir:
            self._end_with(preloading.heir)
        if preloading.inherited is not None:
            self._succeed(preloading.inherited)
        preloaded.update(sys.modules.keys() - before)
        self._take_stock()
        # Without a collection, which takes longer than a hundred forks and would tear holes in
        # pages that are shared: imports leave hardly any garbage.
        gc.freeze()
        problems = sorted(preloading.problems, key=lambda problem: not problem.crashed)
        self._send(Preloaded(
            time.monotonic() - started_s, tuple(problems[:_PROBLEMS]), request.quiet, self._pid))

    def _become_trial(self) -> None:
        """In the child. It has no worker's descriptors: it keeps to its standard streams."""
        os.setsid()
        self._prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self._pid:
            os._exit(1)
        self._prctl(_PR_SET_NAME, b"hpcray:trial")
        self._let_go()

    def _succeed(self, node: socket.socket) -> None:
        """The trial is the zygote now. It stays a child of the former one, and dies with it."""
        self._node = node
        self._pid = os.getpid()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._listen()
        self._prctl(_PR_SET_NAME, b"hpcray:zygote")

    def _end_with(self, heir: int) -> NoReturn:
        """The node knows this process as its child: it ends as its heir does, and after it. Until
        then it keeps the node's socket, so that the node sees the end when its exit status is
        there."""
        self._prctl(_PR_SET_NAME, b"hpcray:elder")
        _, status = os.waitpid(heir, 0)
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            import resource

            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # there is one already
            with contextlib.suppress(OSError):  # SIGKILL has no handler
                signal.signal(-code, signal.SIG_DFL)
            os.kill(self._pid, -code)
        os._exit(code)

    def _reap(self) -> None:
        """Kill what dead workers left in their sessions, then let go of their pids.

        When nothing else is to do, and for all at once: each look goes through all of /proc.
        """
        end_sessions(set(self._burying))
        for pid in self._burying:
            os.waitpid(pid, 0)  # Returns at once: a zombie.
        self._burying.clear()

    def _report_exits(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self._wake_read, 4096)) == 4096:
                pass
        # Signals coalesce, so look at every child. WNOWAIT leaves the zombie in place.
        for pid, number in list(self._living.items()):
            wait_status = _peek_exit(pid)
            if wait_status is not None:
                del self._living[pid]
                self._dead[number] = pid
                self._send(Exited(number, pid, wait_status))

    def _send(self, event: Event) -> None:
        # Blocking: a node that is slow to read slows down its own forks. It never blocks on
        # us in turn, and its end wakes this with an error.
        try:
            self._node.send(msgspec.msgpack.encode(event))
        except OSError as error:
            raise _NodeGone from error

    def _end_workers(self, grace_s: float) -> None:
        """SIGTERM to every worker's session, SIGKILL after the grace, reap. Bounded."""
        sessions = {*self._living, *self._dead.values(), *self._burying}
        if not sessions:
            return
        self._ending[0] = 1
        kill_sessions(set(self._living), signal.SIGTERM)
        waiting = select.poll()
        waiting.register(self._wake_read, select.POLLIN)
        deadline_s = time.monotonic() + grace_s
        while True:
            for pid in [pid for pid in self._living if _peek_exit(pid) is not None]:
                self._dead[self._living.pop(pid)] = pid
            remaining_s = deadline_s - time.monotonic()
            if not self._living or remaining_s <= 0:
                break
            # The wake-up byte is written by the signal handler, so no exit can be missed.
            waiting.poll(remaining_s * 1000)
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 4096)
        # The sessions of the dead too: what they started may have outlived them, and the
        # zombies keep the session ids from being reused. The last look finds nobody.
        deadline_s = time.monotonic() + _REAP_LIMIT_S
        while kill_sessions(sessions, signal.SIGKILL) and time.monotonic() < deadline_s:
            waiting.poll(2)  # They are not all our children: no signal tells of the last one.
        for pid in sessions:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

    # --- in the worker --------------------------------------------------------------------------

    def _become_worker(self, request: ForkRequest, descriptors: list[int]) -> NoReturn:
        """The child's side of the fork. Nothing may return or raise into the zygote's loop."""
        code = 1
        try:
            task_fd, client_fd = self._detach(request.number, descriptors[:4])
            settings = _read_settings(request, descriptors)
            self._take_settings(settings)
            settings["ending"] = self._ending
            for descriptor in descriptors[2:]:
                os.close(descriptor)
            assert not isinstance(self._target, str)
            code = self._target(request.number, task_fd, client_fd, settings) or 0
        except SystemExit as stop:
            code = _exit_code(stop)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(BaseException):  # The reader may be gone.
                    stream.flush()
            os._exit(code & 0xFF)

    def _detach(self, number: int, descriptors: list[int]) -> tuple[int, int]:
        """Own session, own end, own signals, own descriptors."""
        os.setsid()
        self._prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self._pid:  # It died before prctl: no signal will ever come.
            os._exit(1)
        self._prctl(_PR_SET_NAME, f"hpcray:w{number}".encode())
        self._let_go()
        task_fd, client_fd, stdout_fd, stderr_fd = descriptors
        os.dup2(stdout_fd, 1)  # stdin is /dev/null already.
        os.dup2(stderr_fd, 2)
        gc.enable()
        return task_fd, client_fd

    def _let_go(self) -> None:
        """Of the zygote's signals and descriptors."""
        signal.set_wakeup_fd(-1)
        for number in _DEFAULT_IN_FORKS:
            _set_handler(number, _SIG_DFL)
        _set_handler(_SIGINT, signal.default_int_handler)
        # The zygote was started with no others, and what a preload has opened belongs to that
        # module: its objects would later close numbers that have been reused meanwhile.
        self._node.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _take_settings(self, settings: dict[str, Any]) -> None:
        """Make the process look as if the job had started it, before any user code runs."""
        reseed(self._random)
        changes, env_vars = settings.get("environ") or {}, settings.get("env_vars") or {}
        limits = self._thread_limits
        if changes or env_vars:
            change_environment(changes, env_vars)
            if not (_BLAS_NAMES.isdisjoint(changes) and BLAS_VARIABLES.isdisjoint(env_vars)):
                default_threads()
                limits = _more_than_one(thread_limits())
        if limits:
            limit_threads(limits, self._blas)
        sys_path = settings.get("sys_path")
        if sys_path is not None:
            sys.path[:] = sys_path
        cwd = settings.get("cwd")
        if cwd is not None:
            try:
                os.chdir(cwd)
            except OSError as error:
                # The driver's directory need not exist on every host.
                print(f"hpcray: staying in {os.getcwd()}: {error}", file=sys.stderr)
        enter_as_ray(settings)


# --- small tools --------------------------------------------------------------------------------


def ignore_signals() -> None:
    """The end comes with the node's. A batch system that sends SIGTERM to every process of the
    job would otherwise take the one process away that can clean up."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def reseed(words: memoryview | None) -> None:
    """Fresh random numbers: after a fork every worker would draw the same ones. `random` itself
    sees to its own."""
    if words is not None:
        words[:] = os.urandom(len(words))
    elif "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.seed()  # a GPU's has the same seed in every process that is new


def _numpy_words() -> memoryview | None:
    """The state of numpy's global generator in memory, where new bytes are as good as a new seed.
    In a fork `seed()` costs a hundred page faults, a tenth of a worker's start.

    None: it is of a kind, or keeps its state in a way, that only numpy itself knows.
    """
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    generator = numpy.random.get_bit_generator()
    if generator.state["bit_generator"] != "MT19937":
        return None
    numpy.random.seed()  # nothing is left of what imports have drawn
    known = generator.state["state"]["key"].tobytes()
    words = memoryview(
        (ctypes.c_char * len(known)).from_address(generator.ctypes.state_address)).cast("B")
    return words if words == known else None


def _more_than_one(limits: dict[str, int]) -> dict[str, int]:
    """Nothing if each is one: that is what libraries in the zygote have, and 3 ms are saved."""
    return limits if any(limit != 1 for limit in limits.values()) else {}


def _no_action(signal_number: int, frame: types.FrameType | None) -> None:
    """A signal without a Python handler writes no wake-up byte."""


def _peek_exit(pid: int) -> int | None:
    """The wait status of a child that has ended, without reaping it."""
    result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if result is None:
        return None
    if result.si_code == os.CLD_EXITED:
        return result.si_status << 8
    return result.si_status | (0x80 if result.si_code == os.CLD_DUMPED else 0)


def _read_settings(
    request: ForkRequest | PreloadRequest, descriptors: list[int]
) -> dict[str, Any]:
    encoded = request.settings
    if not encoded:
        encoded = os.pread(descriptors[-1], os.fstat(descriptors[-1]).st_size, 0)
    return msgspec.msgpack.decode(encoded, type=dict[str, Any])


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1


def _thread_names() -> list[str]:
    names = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/comm") as comm:
            names.append(comm.read().strip())
    return names


def _load_prctl() -> Callable[..., int]:
    prctl: Callable[..., int] = ctypes.CDLL(None).prctl
    return prctl


# --- start --------------------------------------------------------------------------------------


def import_always() -> list[str]:
    """What every worker needs; problems for people."""
    problems: list[str] = []
    for name in _ALWAYS_PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
        if thread_count() > 1:
            problems.append(f"{name} starts threads: {', '.join(_thread_names())}")
    return problems


def load_target(name: str) -> Target | str:
    """What `module:function` returns, or why there is none."""
    module_name, _, function_name = name.partition(":")
    try:
        prepare: Callable[[], Target] = getattr(
            importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        return f"the worker's main function {name} cannot be imported: {error}"
    return prepare()


def main(arguments: Sequence[str] | None = None) -> None:
    import argparse

    title.prepare()
    parser = argparse.ArgumentParser(prog="hpcray.worker.zygote", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="socket of the node")
    parser.add_argument("--target", default=DEFAULT_TARGET, help="module:function, makes a Target")
    parser.add_argument("--sys-path", type=json.loads, help="JSON list: sys.path of the target")
    parser.add_argument("--restore", type=json.loads, default={}, help="JSON object: variables")
    parser.add_argument("--descriptor-limit", type=int, help="soft limit for workers")
    options = parser.parse_args(arguments)

    ignore_signals()
    # The driver's affair, in workers as well (unless a task handles them), and not inherited by
    # what they start, unlike SIG_IGN.
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, _no_action)
    # A node that dies during the imports is noticed this way; later by EOF.
    prctl = _load_prctl()
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(_PR_SET_NAME, b"hpcray:zygote")
    node = socket.socket(fileno=options.fd)
    node.set_inheritable(False)
    if options.descriptor_limit is not None:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (options.descriptor_limit, hard))

    started_s = time.monotonic()
    gc.disable()  # No collection may leave holes in pages that are about to be shared.
    # What was set for the time of the imports, and what they set themselves, is not the workers'.
    changes = {os.fsencode(name): None if value is None else os.fsencode(value)
               for name, value in options.restore.items()}
    started = dict(os.environb)
    if options.sys_path is not None:
        sys.path[:] = options.sys_path
    problems = import_always()
    target = load_target(options.target)
    if isinstance(target, str):
        problems.append(target)
    changes = {**dict.fromkeys(os.environb.keys() - started.keys()), **started, **changes}
    change_environment(changes, {})
    default_threads()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # the workers' too
    # User code must not find the zygote under the name of its own main module.
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv[:] = [""]
    zygote = Zygote(node, target)
    zygote.warm_up()
    sys.stdout.flush()  # What is buffered now would be printed once by every worker.
    sys.stderr.flush()
    gc.collect()
    gc.freeze()
    ready = Ready(os.getpid(), time.monotonic() - started_s, tuple(problems))
    try:
        node.send(msgspec.msgpack.encode(ready))
    except OSError:
        return  # The node is gone already.
    zygote.serve()


if __name__ == "__main__":
    # Under its real name, so that its classes exist once and `__main__` stays empty.
    from hpcray.worker.zygote import main as _main

    _main()
    # Not through interpreter shutdown: preloaded modules may hang there.
    os._exit(0)
