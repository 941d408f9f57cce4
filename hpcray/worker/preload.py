"""Imports in advance: each module is tried in a child first, for what it does to a process.

    zygote                                trial, a fork of the zygote
      |------- fork ------------------------->|
      |<------ Verdict(1) --------------------|  modules[0] is fit; now it imports modules[1]
      |<------ Verdict(1, "starts a thread") -|  exits: nothing can be learned in it any more
      |  import modules[0]                    |
      |------- fork: another trial ---------->|  modules[2] ...
      |<------ Verdict(end) ------------------|  nothing was wrong: it can be the zygote as it is
      |------- the node's socket ------------>|  and it is, if there are no workers yet

Why a trial: a module that starts a thread, opens a GPU or calls MPI_Init as it is imported is of no
use in a process that forks; one that crashes or hangs would take all workers of the node along.

Workers are their zygote's children, so a zygote that has some keeps its place. It imports what is
fit by itself, a module while the trial is at the next one: where there are two CPUs the whole takes
little longer than the imports do.

What must not go in here: the sockets of the zygote, what is done with the problems.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import msgspec

from hpcray.launch.progress import cpu_progress
from hpcray.transport.patience import Patience
from hpcray.worker import own_process
from hpcray.worker.zygote_messages import Problem

# A trial for each module that spoils its process. Those that depend on it are found out cheaply
# (`_Watch`), but somewhere is an end: workers wait.
_TRIALS = 20
_TRIALS_S = 30.0
# A module that computes without end is given up after so many times the limit of no progress.
_ENDLESS = 10
_TEXT_CHARS = 300
_NAME_BYTES = 512
# An import may replace none of these: the zygote's or the worker's life hangs on them.
_SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP,
            own_process.INTERRUPT_SIGNAL)
# Whatever has one of them open has a driver's state, which a fork does not get.
_GPU_DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri/")


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """Without a problem: of the modules before `index` all are fit that were not told of, and
    `index` is what comes now. With one: `index` is not fit."""

    index: int
    problem: str = ""
    # It is the end of the trial: this module, which `index` imports or is, has spoilt its process.
    culprit: str = ""


class Preloading:
    """One request's modules on their way into this process: `step` whenever `fileno` is readable,
    and every `look_s`, until `done`.

    If `heir` is not 0 then, the process of that id serves the node now. In that process, which
    comes out of `step` or the constructor as well, `inherited` is its socket.
    """

    def __init__(
        self, modules: Sequence[str], settings: Mapping[str, Any], patience_s: float,
        in_child: Callable[[], None], node: socket.socket | None,
    ) -> None:
        """`in_child` makes a fork of the zygote independent of it. `node`: what a trial may
        inherit; None if the zygote has to stay."""
        self.problems: list[Problem] = []
        self.done = False
        self.heir = 0
        self.inherited: socket.socket | None = None
        self._node = node
        self._modules = [name for name in dict.fromkeys(modules) if name not in sys.modules]
        self._settings = settings
        self._patience_s = patience_s
        self._in_child = in_child
        self._unfit: set[str] = set()
        self._spoilers: set[str] = set()  # of those: what may not be imported on trial again
        self._next = 0  # what the zygote imports next
        self._trials = 0
        self._first_trial_s = time.monotonic()
        self.pid = 0
        self._socket: socket.socket | None = None
        self._stderr = -1
        self._begun = mmap.mmap(-1, _NAME_BYTES)  # what the trial has begun to import last
        self._trying = 0
        self._over = False  # the trial has said all
        self._clean = True  # it has imported all that it has begun to
        self._go_on()

    @property
    def look_s(self) -> float:
        return self._patience.look_s

    def fileno(self) -> int:
        assert self._socket is not None
        return self._socket.fileno()

    def step(self) -> None:
        """Hear the trial, without waiting for it; import what has been found fit."""
        assert self._socket is not None
        try:
            datagram = self._socket.recv(4096, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._see_whether_it_hangs()
            return
        if datagram:
            self._began_s = time.monotonic()
            verdict = msgspec.msgpack.decode(datagram, type=Verdict)
            self._trying = verdict.index
            if verdict.problem:
                self._drop(verdict.problem, culprit=verdict.culprit)
            self._over = bool(verdict.culprit) or verdict.index == len(self._modules)
            if self._node is None:
                self._import_to(verdict.index)
            elif self._over and self._clean:
                self._hand_over(self._node)
            return
        said = self._last_words()
        status = self._end_trial()
        if not self._over:
            how = f"crashes by signal {-status}" if status < 0 else f"exits with status {status}"
            self._drop(how + (f" ({said})" if said else ""), crashed=True, culprit=self._last())
        self._go_on()

    def abandon(self) -> None:
        """Import no more."""
        if self.pid:
            self._end_trial()
        self.done = True

    # --- the zygote's side ------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Another trial, if there is anything left to try."""
        index = self._trying
        self._import_to(index)
        if index >= len(self._modules):
            self.done = True
            return
        late = time.monotonic() - self._first_trial_s > _TRIALS_S
        if self._trials == _TRIALS or (late and self._trials > 1):
            self.problems.append(Problem(
                self._modules[index], f"is left out, and {len(self._modules) - index - 1} more: "
                f"{self._trials} others had to be"))
            self.done = True
            return
        self._trials += 1
        self._patience = Patience(self._patience_s)
        self._began_s = time.monotonic()
        self._over = False
        self._clean = True
        self._begun[0] = 0
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._stderr = os.memfd_create("stderr", os.MFD_CLOEXEC)
        try:
            self.pid = os.fork()
        except OSError as error:
            self.problems.append(Problem(self._modules[index], f"cannot be tried: {error}"))
            theirs.close()
            self._close()
            self.done = True
            return
        if self.pid == 0:
            self._socket.close()
            self._socket = theirs
            self.inherited = self._try(index)
            self._close()
            self.done = True
            return
        theirs.close()

    def _hand_over(self, node: socket.socket) -> None:
        """The trial is the zygote from here on; it needs no more than the node's socket."""
        assert self._socket is not None
        with contextlib.suppress(OSError):  # it is dead, as `step` will see
            socket.send_fds(self._socket, [b"!"], [node.fileno()])
            self.heir, self.pid = self.pid, 0
            self._close()
            self.done = True

    def _see_whether_it_hangs(self) -> None:
        now_s = time.monotonic()
        if self._patience.look(now_s, (self._trying, cpu_progress(self.pid))):
            why = f"hangs: no progress for {self._patience_s:g} s"
        elif now_s - self._began_s > self._patience_s * _ENDLESS:
            why = f"takes more than {self._patience_s * _ENDLESS:g} s"
        else:
            return
        if not self._over:
            self._drop(why, crashed=True, culprit=self._last())
        self._end_trial()
        self._go_on()

    def _drop(self, why: str, *, crashed: bool = False, culprit: str = "") -> None:
        """What is being tried is unfit, and so is what it has imported to its harm."""
        name = self._modules[self._trying]
        self._clean = False
        self._unfit.add(name)
        self._trying += 1
        if culprit not in ("", name):
            self._unfit.add(culprit)
            if culprit not in self._spoilers:
                self.problems.append(Problem(culprit, why[:_TEXT_CHARS], crashed))
            why, crashed = f"needs {culprit}", False
        if culprit:
            self._spoilers |= {name, culprit}
        self.problems.append(Problem(name, why[:_TEXT_CHARS], crashed))

    def _last(self) -> str:
        return self._begun[:].partition(b"\0")[0].decode() or self._modules[self._trying]

    def _import_to(self, end: int) -> None:
        names = [name for name in self._modules[self._next:end]
                 if name not in self._unfit and not _below(name, self._unfit)]
        self._next = max(self._next, end)
        if names:  # tried: so its surroundings have been entered before
            with surroundings(self._settings):
                for name in names:
                    problem = _import(name)
                    if problem:
                        self.problems.append(Problem(name, problem[:_TEXT_CHARS]))

    def _last_words(self) -> str:
        size = os.fstat(self._stderr).st_size
        data = os.pread(self._stderr, 4096, max(size - 4096, 0))
        lines = data.decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else ""

    def _end_trial(self) -> int:
        """Kill it and what it has started; how it ended."""
        own_process.end_sessions({self.pid})
        # It may have been quicker than its own setsid().
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        self._close()
        return os.waitstatus_to_exitcode(status)

    def _close(self) -> None:
        assert self._socket is not None
        self._socket.close()
        self._socket = None
        os.close(self._stderr)

    # --- the trial's side -------------------------------------------------------------------------

    def _try(self, index: int) -> socket.socket:
        """Returns only in a process that is the zygote from here on, with the node's socket."""
        code, inherited = 1, None
        try:
            self._in_child()
            with surroundings(self._settings, self._stderr), _Watch(
                    self._spoilers, self._begun) as watch:
                for number in range(index, len(self._modules)):
                    name = self._modules[number]
                    if name in sys.modules or _below(name, self._unfit):
                        continue
                    self._tell(Verdict(number))
                    watch.begin(name)
                    problem = _import(name)
                    harm = watch.end()
                    if harm:
                        self._tell(Verdict(number, harm, watch.culprit))
                    elif watch.asked:
                        self._tell(Verdict(number, f"needs {watch.asked}", watch.asked))
                    elif problem:
                        self._clean = False
                        self._unfit.add(name)
                        self._tell(Verdict(number, problem[:_TEXT_CHARS]))
                    if harm or watch.asked:
                        os._exit(0)
            self._tell(Verdict(len(self._modules)))
            if self._node is not None and self._clean:
                assert self._socket is not None
                _, fds, _, _ = socket.recv_fds(self._socket, 1, 1, socket.MSG_CMSG_CLOEXEC)
                inherited = socket.socket(fileno=fds[0])
            code = 0
        except BaseException:  # the zygote is gone, or the surroundings cannot be entered
            traceback.print_exc()  # into its last words
        finally:
            if inherited is None:
                os._exit(code)
        return inherited

    def _tell(self, verdict: Verdict) -> None:
        assert self._socket is not None
        self._socket.send(msgspec.msgpack.encode(verdict))


def _import(name: str) -> str:
    """What is wrong with it; nothing that it raises gets any further."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"cannot be imported: {error}"
    except BaseException as error:
        return f"raises {type(error).__name__}: {error}"
    return ""


def _below(name: str, packages: set[str]) -> bool:
    """Whether one of them is its package, or that one's."""
    while name := name.rpartition(".")[0]:
        if name in packages:
            return True
    return False


class _Watch(MetaPathFinder):
    """In a trial, in front of the finders: sees every import, and which module does the harm.

    Who asks for a spoiler is not fit either, even if it goes on without: in a worker it would find
    it. And a spoiler is not imported again to see that.
    """

    def __init__(self, spoilers: set[str], begun: mmap.mmap) -> None:
        self._spoilers = spoilers
        self._shared = begun
        self._watching = True
        self._stack = [""]
        self.asked = ""  # a spoiler
        self._before = _Process()
        self.harm = ""  # what has been done to this process
        self.culprit = ""  # by which module

    def __enter__(self) -> _Watch:
        sys.meta_path.insert(0, self)
        return self

    def __exit__(self, *_: object) -> None:
        """Loaders that nobody has used yet know this object for good."""
        sys.meta_path.remove(self)
        self._watching = False

    def begin(self, name: str) -> None:
        """Nothing else is being imported."""
        self._stack = [name]
        self._share(name)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        self._look()  # it was done by who imports this
        if fullname in self._spoilers:
            self.asked = fullname
            raise ImportError(f"{fullname} is not imported here")
        spec = None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    break
        loader: Any = None if spec is None else spec.loader
        # On the loader itself, so that the module sees the one that it has in a worker. Those of
        # frozen and builtin modules are shared classes.
        if hasattr(loader, "exec_module") and not isinstance(loader, type):
            with contextlib.suppress(AttributeError):  # it takes none
                loader.exec_module = partial(self._execute, loader, loader.exec_module, fullname)
                self._share(fullname)
        return spec

    def _execute(
        self, loader: Any, execute: Callable[[ModuleType], None], name: str, module: ModuleType
    ) -> None:
        del loader.exec_module
        if not self._watching:
            execute(module)
            return
        self._stack.append(name)
        self._share(name)
        try:
            execute(module)
        finally:
            self._look()
            self._stack.pop()
            self._share(self._stack[-1])

    def _look(self) -> None:
        if not self.harm:
            self.harm = self._before.harm()
            self.culprit = self._stack[-1]

    def end(self) -> str:
        """What the module that was begun has done, or one that it imports; empty if nothing."""
        self._look()
        return self.harm

    def _share(self, name: str) -> None:
        data = name.encode(errors="replace")[: _NAME_BYTES - 1]
        self._shared[: len(data) + 1] = data + b"\0"


class _Process:
    """This one as it was. It is looked at thousands of times, so each look is a few system calls
    that read no directory."""

    def __init__(self) -> None:
        self._handlers = _handlers()
        self._free_fd = _free_fd()

    def harm(self) -> str:
        """What has been done to it, so that no fork of it is as good as a new one; empty if
        nothing."""
        threads = own_process.thread_count() - 1
        if threads:
            return f"starts {threads} thread{'s'[:threads > 1]}"
        handlers = _handlers()
        if handlers != self._handlers:
            number = next(number for number, before, now in zip(
                _SIGNALS, self._handlers, handlers, strict=True) if now is not before)
            return f"sets a handler of {signal.Signals(number).name}"
        with contextlib.suppress(ChildProcessError):  # there is none: what is expected
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            return "starts a process"
        mpi = sys.modules.get("mpi4py.MPI")
        if mpi is not None and mpi.Is_initialized():
            return "calls MPI_Init"
        free_fd = _free_fd()
        if free_fd != self._free_fd:  # it has opened or closed something
            self._free_fd = free_fd
            for fd in os.listdir("/proc/self/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/self/fd/{fd}").startswith(_GPU_DEVICES):
                        return "opens a GPU"
        return ""


def _handlers() -> list[object]:
    return [signal.getsignal(number) for number in _SIGNALS]


def _free_fd() -> int:
    """The number that the next descriptor gets; -1 if there is none left."""
    try:
        fd = os.open("/", os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return -1
    os.close(fd)
    return fd


@contextlib.contextmanager
def surroundings(settings: Mapping[str, Any], stderr: int | None = None) -> Iterator[None]:
    """Those of a worker, but for what keeps libraries from starting threads; silent. What is
    imported there leaves its marks in the environment, as it does in a worker."""
    path = list(sys.path)
    environ = dict(os.environb)
    with contextlib.ExitStack() as undo:

        def owned(fd: int) -> int:
            undo.callback(os.close, fd)
            return fd

        here = owned(os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        nothing = owned(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC))
        for fd, stream in enumerate((sys.stdout, sys.stderr), 1):
            stream.flush()
            undo.callback(os.dup2, owned(os.dup(fd)), fd)
            undo.callback(stream.flush)
            os.dup2(nothing if fd == 1 or stderr is None else stderr, fd)
        undo.callback(os.fchdir, here)
        with contextlib.suppress(OSError):
            os.chdir(settings.get("cwd") or ".")
        undo.callback(sys.path.__setitem__, slice(None), path)
        if settings.get("sys_path") is not None:
            sys.path[:] = settings["sys_path"]
        own_process.change_environment(
            settings.get("environ") or {}, settings.get("env_vars") or {})
        os.environ.update(own_process.for_imports(os.environ))
        started = dict(os.environb)
        try:
            own_process.enter_as_ray(settings)
            yield
        finally:
            new = {name: value for name, value in os.environb.items()
                   if started.get(name) != value}
            gone = dict.fromkeys(os.environb.keys() - environ.keys())
            own_process.change_environment({**gone, **environ, **new}, {})
