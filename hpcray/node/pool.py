"""The worker pool: the node's hands on its zygote and its workers.

Thin: it starts, feeds, kills and buries workers when told to, and reports what happened to
them. How many workers there are, what they run and what a death means is decided elsewhere.
It has no thread and never blocks (`close` and `restart_zygote` apart): the node's loop polls
`fileno()` and the handles' descriptors, and calls the matching method.

    node                                              worker
    task_socket   ====== SOCK_SEQPACKET ============>  task_fd
    task_socket_worker_end  (a duplicate of the worker's end: `take_back` reads it)
    client_socket <===== SOCK_SEQPACKET ============>  client_fd
    stdout_fd     <----- pipe ----------------------   1
    stderr_fd     <----- pipe ----------------------   2

    absent --start--> starting --Forked--> running --Exited--> dead --forget--> absent
                          `---ForkRefused, ZygoteLost (also running)---^

Why datagrams can be taken back: sender, worker and node see the same kernel queue through the
same open file description, and the kernel hands out each datagram of it exactly once. So the
node reclaims unstarted tasks without the worker's help, be it deep in C code or stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

import hpcray
from hpcray.transport import datagrams
from hpcray.worker import own_process, zygote_messages
from hpcray.worker.zygote_messages import (
    Event,
    Exited,
    Forked,
    ForkRefused,
    Preloaded,
    Ready,
    Trying,
)

# Room for every event: the largest is Preloaded with its list of problems.
_EVENT_BYTES = 64 * 1024
# After SIGKILL the kernel needs moments; a zygote in uninterruptible sleep is left to it.
_KILLED_ZYGOTE_LIMIT_S = 5.0


class ZygoteGoneError(RuntimeError):
    """A worker was asked for while there is no zygote; `restart_zygote` makes one."""


@dataclass(frozen=True, slots=True)
class ZygoteLost:
    """The zygote died; so did `numbers`, every worker it had and every one not yet started."""

    numbers: tuple[int, ...]
    exit_code: int | None
    # It died while it preloaded these: no other zygote is asked to.
    dropped: tuple[str, ...] = ()


PoolEvent = Ready | Forked | ForkRefused | Exited | Preloaded | ZygoteLost

_event_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def raise_descriptor_limit() -> int:
    """Raise this process's soft limit on descriptors to the hard one; return the former.

    A worker takes its node 5 descriptors, 9 while it starts: 1,024 is too few for a large host.
    Workers get the former limit back: programs that use `select` rely on small numbers.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft


def spawn_zygote(
    environ: Mapping[str, str],
    *,
    target: str = zygote_messages.DEFAULT_TARGET,
    sys_path: Sequence[str] | None = None,
    descriptor_limit: int | None = None,
) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start a zygote; return the node's end of its socket (non-blocking) and the process.

    Call it from the main thread (the zygote's life hangs on the calling thread's until its
    imports are done). After MPI_Init it is safe too: the child is made by vfork and exec, which
    copies no page of this process. `environ` is the whole environment, without the launch
    identity; it is what workers start with. Requests may be sent at once; they wait.
    """
    # The package itself has to be found by the exec'd interpreter, however this process found
    # it; and threads of BLAS libraries must not be started. Both only while it starts.
    package_root = str(Path(hpcray.__file__).resolve().parent.parent)
    search_path = environ.get("PYTHONPATH")
    changes = own_process.for_imports(environ)
    changes["PYTHONPATH"] = package_root + (os.pathsep + search_path if search_path else "")
    node_end, zygote_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with zygote_end:
        # -P: no file of the current directory may stand in for a library.
        command = [sys.executable, "-P", "-m", "hpcray.worker.zygote"]
        command += ["--fd", str(zygote_end.fileno()), "--target", target]
        command += ["--restore", json.dumps({name: environ.get(name) for name in changes})]
        if sys_path is not None:
            command += ["--sys-path", json.dumps(list(sys_path))]
        if descriptor_limit is not None:
            command += ["--descriptor-limit", str(descriptor_limit)]
        try:
            process = subprocess.Popen(
                command,
                env={**environ, **changes},
                stdin=subprocess.DEVNULL,
                pass_fds=[zygote_end.fileno()],
                start_new_session=True,
            )
        except BaseException:
            node_end.close()
            raise
    node_end.setblocking(False)
    return node_end, process


@dataclass(slots=True, eq=False)
class WorkerHandle:
    """The node's ends of one worker's channels. Closed by `WorkerPool.forget` only."""

    number: int
    task_socket: socket.socket
    # Blocking, since the worker blocks on the same description: read with MSG_DONTWAIT only.
    task_socket_worker_end: socket.socket
    client_socket: socket.socket
    stdout_fd: int
    stderr_fd: int
    pid: int = 0  # 0 until Forked
    dead: bool = False
    # The zygote keeps its pid reserved and wants to hear when we are done with it.
    zombie: bool = False
    kill_when_forked: bool = False

    def close(self) -> None:
        for end in (self.task_socket, self.task_socket_worker_end, self.client_socket):
            end.close()
        os.close(self.stdout_fd)
        os.close(self.stderr_fd)


@dataclass(slots=True, eq=False)
class _Preload:
    """What every zygote of the pool is to import."""

    modules: tuple[str, ...]
    settings: Mapping[str, Any]
    patience_s: float
    quiet: bool


@dataclass(slots=True)
class _Outgoing:
    """A request on its way to the zygote, and descriptors to close once it is sent."""

    datagram: bytes
    # To be sent along. Those that are only lent (the task socket's worker end) are not in
    # `closing`, the others are.
    descriptors: list[int] = field(default_factory=list)
    closing: list[int] = field(default_factory=list)


class WorkerPool:
    """One zygote and its workers. The node's loop owns it; nothing in it is thread-safe."""

    def __init__(
        self,
        environ: Mapping[str, str],
        preload: Sequence[str] = (),
        *,
        target: str = zygote_messages.DEFAULT_TARGET,
        sys_path: Sequence[str] | None = None,
    ) -> None:
        """Starts the zygote: to be called before MPI_Init, from the main thread.

        `preload`: see `preload`; this is in advance, before a job has settings.
        """
        self._environ = dict(environ)
        self._preload = tuple(preload)
        self._preloads: list[_Preload] = []
        self._asked: deque[_Preload] = deque()  # of this zygote, and not answered
        self._unfit: set[str] = set()
        self._ready = False
        self._trial_pid = 0
        self._zygote_pid = 0
        self._target = target
        self._sys_path = sys_path
        self._cleanup_folder = ""
        self._descriptor_limit = raise_descriptor_limit()
        self._handles: dict[int, WorkerHandle] = {}
        self._outgoing: deque[_Outgoing] = deque()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._buffer = datagrams.receive_buffer()
        self._start_zygote()
        self.preload(self._preload)

    # --- the zygote -----------------------------------------------------------------------------

    def fileno(self) -> int:
        """Poll for reading, and for writing while `wants_write`; -1 without a zygote."""
        return -1 if self._socket is None else self._socket.fileno()

    @property
    def wants_write(self) -> bool:
        """The zygote's socket is full and requests wait; `flush` when it is writable."""
        return bool(self._outgoing)

    @property
    def zygote_pid(self) -> int:
        return self._zygote_pid

    def set_cleanup_folder(self, folder: str) -> None:
        """A folder, made by workers, that the zygote removes when they have ended."""
        self._cleanup_folder = folder
        if self._socket is not None and folder:
            self._send(_Outgoing(_encode(zygote_messages.CleanupRequest(folder))))

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it."""
        while self._outgoing and self._socket is not None:
            first = self._outgoing[0]
            try:
                socket.send_fds(self._socket, [first.datagram], first.descriptors)
            except BlockingIOError:
                return
            except OSError:
                # Too many descriptors in flight (ETOOMANYREFS): the zygote's next answer brings
                # us back here. Or it is gone: read_zygote meets the EOF and says so.
                return
            self._outgoing.popleft()
            _close_all(first.closing)
        if self._closed and self._socket is not None:
            with contextlib.suppress(OSError):  # it may be gone
                self._socket.shutdown(socket.SHUT_WR)

    def read_zygote(self) -> list[PoolEvent]:
        """What the zygote has reported; also sends what waits. Empty if there is nothing."""
        events: list[PoolEvent] = []
        while self._socket is not None:
            try:
                datagram = self._socket.recv(_EVENT_BYTES)
            except BlockingIOError:
                break
            except OSError:
                datagram = b""
            if not datagram:
                events.append(self._lose_zygote())
                return events
            event = _event_decoder.decode(datagram)
            self._note(event)
            if not isinstance(event, Trying):
                events.append(event)
        self.flush()
        return events

    def restart_zygote(self) -> None:
        """A new zygote after ZygoteLost. Its workers get numbers that are not in use."""
        if self._closed:
            raise ZygoteGoneError("the worker pool is closed")
        if self._socket is not None:
            raise RuntimeError("the zygote is alive: restart it after ZygoteLost only")
        self._start_zygote()

    def preload(
        self, modules: Sequence[str], settings: Mapping[str, Any] | None = None, *,
        patience_s: float = zygote_messages.PRELOAD_PATIENCE_S, quiet: bool = False,
    ) -> None:
        """Have this zygote, and those after it, import modules; workers asked for later have them.

        Each is tried in a child first: what is not fit for it is told by Preloaded. `settings` are
        those of the workers to come, and `quiet` comes back in the answer.

        Raises:
          OSError: this process is out of descriptors, and nothing is preloaded.
        """
        preload = _Preload(tuple(modules), settings or {}, patience_s, quiet)
        if modules:
            if self._socket is not None:
                self._ask_to_preload(preload)
            self._preloads.append(preload)

    # --- workers --------------------------------------------------------------------------------

    def start(self, number: int, settings: Mapping[str, Any]) -> WorkerHandle:
        """Ask for a worker. Its channels can be used at once; Forked or ForkRefused follows.

        `settings` holds what msgpack can carry; see `zygote_messages.WorkerSettings`.

        Raises:
          ZygoteGoneError: there is no zygote. ValueError: the number is in use.
          OSError: this process is out of descriptors.
        """
        if self._socket is None:
            raise ZygoteGoneError("there is no zygote to fork a worker; restart_zygote() first")
        if number in self._handles:
            raise ValueError(f"worker {number} exists already; forget it first")
        encoded = _encode(settings)
        with contextlib.ExitStack() as on_error:

            def owned(fd: int) -> int:
                on_error.callback(os.close, fd)
                return fd

            def pair() -> tuple[socket.socket, socket.socket]:
                near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                on_error.callback(near.close)
                on_error.callback(far.close)
                near.setblocking(False)
                return near, far

            task_near, task_far = pair()
            client_near, client_far = pair()
            pipes = []
            for _ in range(2):
                read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
                pipes.append((owned(read_fd), owned(write_fd)))
                os.set_blocking(read_fd, False)
            inline, memfd = _settings_memfd(encoded)
            on_error.pop_all()  # Nothing below fails.
        handle = WorkerHandle(
            number, task_near, task_far, client_near, pipes[0][0], pipes[1][0]
        )
        self._handles[number] = handle
        closing = [client_far.detach(), pipes[0][1], pipes[1][1], *memfd]
        request = zygote_messages.ForkRequest(number, inline)
        self._send(_Outgoing(_encode(request), [task_far.fileno(), *closing], closing))
        return handle

    def handle(self, number: int) -> WorkerHandle:
        return self._handles[number]

    def numbers(self) -> list[int]:
        """Every worker not yet forgotten, the dead included."""
        return list(self._handles)

    def send_task(self, number: int, datagram: bytes) -> int:
        """Queue one datagram for the worker: SENT, FULL or SHORT (transport/datagrams.py).

        Raises:
          ValueError: empty (it would read as the end).
        """
        if not datagram:
            raise ValueError("an empty datagram reads as the end of the channel")
        outcome = datagrams.send(self._handles[number].task_socket, datagram)
        # The duplicate keeps the other end open: a dead worker is no error here.
        assert outcome != datagrams.GONE
        return outcome

    def take_back(self, number: int) -> list[bytes]:
        """The datagrams that the worker has not read, in order; they are the node's again.

        Each datagram is received by the worker or returned here, never both and never neither.
        Of a worker that is reading at the same time, those in between may be either's.

        Raises:
          Malformed: a large one came without its content, as this process is out of descriptors.
        """
        worker_end = self._handles[number].task_socket_worker_end
        taken: list[bytes] = []
        while (received := datagrams.receive(worker_end, self._buffer)) is not None:
            taken.append(bytes(received[0]))
        return taken

    def kill(self, number: int) -> None:
        """SIGKILL the worker's process group; Exited follows. Of a dead worker: what it left."""
        handle = self._handles[number]
        if handle.pid:
            _kill_group(handle)
        elif not handle.dead:
            handle.kill_when_forked = True

    def interrupt(self, number: int) -> None:
        """Ring the worker's bell: a signal whose handler reads its client channel."""
        handle = self._handles[number]
        if handle.pid and not handle.dead:
            with contextlib.suppress(ProcessLookupError):
                os.kill(handle.pid, own_process.INTERRUPT_SIGNAL)

    def forget(self, number: int) -> None:
        """Close everything of a dead worker, once its sockets have been read dry.

        Kills what is left of its process group, and has the zygote end the rest of its session
        and let its pid go. The number is free again.

        Raises:
          RuntimeError: the worker is alive. KeyError: forgotten already.
        """
        handle = self._handles[number]
        if not handle.dead:
            raise RuntimeError(f"worker {number} is alive: kill it and wait for Exited")
        del self._handles[number]
        if handle.zombie:
            _kill_group(handle)
            if self._socket is not None:
                self._send(_Outgoing(_encode(zygote_messages.ReapRequest(number))))
        handle.close()

    def again(self) -> WorkerPool:
        """A new pool, with a new zygote, for the next job of this node. After `close`."""
        return WorkerPool(
            self._environ, [name for name in self._preload if name not in self._unfit],
            target=self._target, sys_path=self._sys_path)

    def start_close(self, grace_s: float) -> None:
        """Have the zygote end all workers and itself; ZygoteLost follows. Then call `close`.

        Workers get SIGTERM, and SIGKILL after `grace_s`.
        """
        self._closed = True
        if self._socket is not None:
            _close_outgoing(self._outgoing)
            self._send(_Outgoing(_encode(zygote_messages.StopRequest(grace_s))))
            if self._asked and not any(h.pid and not h.dead for h in self._handles.values()):
                # It is importing, which may take long, for nobody.
                assert self._process is not None
                self._process.kill()

    @property
    def closed(self) -> bool:
        """No worker is started any more; `start_close` or `close` was called."""
        return self._closed

    def close(self, timeout_s: float) -> None:
        """End the zygote and all workers, and close everything. Idempotent.

        Workers get SIGTERM, and SIGKILL after half of the time; after all of it the zygote is
        killed, which kills its workers. What they have not read or we have not read is lost.
        """
        if not self._closed:
            self.start_close(timeout_s / 2)
        deadline_s = time.monotonic() + timeout_s
        # The socket stays open until the zygote has closed its end: it must not take an orderly
        # end for our death, and what it reports on the way are pids we may have to kill.
        while self._socket is not None:
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0:
                self._lose_zygote()
                break
            poller = select.poll()
            writing = select.POLLOUT if self.wants_write else 0
            poller.register(self._socket, select.POLLIN | writing)
            poller.poll(remaining_s * 1000)
            self.read_zygote()
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()

    # --- inside ---------------------------------------------------------------------------------

    def _start_zygote(self) -> None:
        self._socket, self._process = spawn_zygote(
            self._environ,
            target=self._target,
            sys_path=self._sys_path,
            descriptor_limit=self._descriptor_limit,
        )
        self._zygote_pid = self._process.pid
        self.set_cleanup_folder(self._cleanup_folder)
        self._ready = False
        self._asked.clear()
        for preload in self._preloads:
            self._ask_to_preload(preload)

    def _ask_to_preload(self, preload: _Preload) -> None:
        modules = [name for name in preload.modules if name not in self._unfit]
        inline, memfd = _settings_memfd(_encode({**preload.settings, "modules": modules}))
        request = zygote_messages.PreloadRequest(inline, preload.patience_s, preload.quiet)
        self._asked.append(preload)
        self._send(_Outgoing(_encode(request), memfd, list(memfd)))

    def _send(self, outgoing: _Outgoing) -> None:
        # In order, behind what waits: a ReapRequest must not overtake its own fork request.
        self._outgoing.append(outgoing)
        self.flush()

    def _note(self, event: Event) -> None:
        match event:
            case Forked(number, pid):
                handle = self._handles[number]
                handle.pid = pid
                if handle.kill_when_forked:
                    _kill_group(handle)
            case Exited(number):
                self._handles[number].dead = True
                self._handles[number].zombie = True
            case ForkRefused(number):
                self._handles[number].dead = True
            case Ready():
                self._ready = True
            case Trying(pid):
                self._trial_pid = pid
            case Preloaded(_, problems, _, pid):
                self._asked.popleft()
                self._trial_pid = 0
                self._zygote_pid = pid
                # A new zygote need not find out again.
                self._unfit.update(problem.module for problem in problems)

    def _lose_zygote(self) -> ZygoteLost:
        assert self._socket is not None
        self._socket.close()
        self._socket = None
        _close_outgoing(self._outgoing)
        exit_code = self._end_process()
        self._process = None
        self._zygote_pid = 0
        numbers = tuple(number for number, h in self._handles.items() if not h.dead)
        self._kill_orphans()
        for handle in self._handles.values():
            handle.dead = True
            handle.zombie = False
        dropped: tuple[str, ...] = ()
        if self._ready and self._asked:
            # It may have died of that: it got past the trial, and would do so again.
            dropped = self._asked[0].modules
            self._preloads.remove(self._asked[0])
        return ZygoteLost(numbers, exit_code, dropped)

    def _end_process(self) -> int | None:
        """The zygote is dead or of no use: make sure of it."""
        assert self._process is not None
        self._process.kill()
        try:
            return self._process.wait(_KILLED_ZYGOTE_LIMIT_S)
        except subprocess.TimeoutExpired:
            return None

    def _kill_orphans(self) -> None:
        """PDEATHSIG has killed the workers themselves, not what they had started."""
        # Nothing keeps these ids from being reused any more. Within the moment since the
        # zygote's end a reuse would take a wrap-around of all pids. Whole sessions, as the
        # zygote would have done: a shell puts what it starts into groups of their own.
        sessions = {handle.pid for handle in self._handles.values() if handle.pid}
        if self._trial_pid:
            sessions.add(self._trial_pid)
            self._trial_pid = 0
        if sessions:
            own_process.end_sessions(sessions)


def _encode(message: Any) -> bytes:
    return msgspec.msgpack.encode(message)


def _settings_memfd(encoded: bytes) -> tuple[bytes, list[int]]:
    """What goes into the request, and what along with it."""
    if len(encoded) <= zygote_messages.INLINE_SETTINGS_BYTES:
        return encoded, []
    memfd = os.memfd_create("settings", os.MFD_CLOEXEC)
    try:
        with open(memfd, "wb", closefd=False) as file:
            file.write(encoded)
    except OSError:
        os.close(memfd)
        raise
    return b"", [memfd]


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
    descriptors.clear()


def _close_outgoing(outgoing: deque[_Outgoing]) -> None:
    while outgoing:
        _close_all(outgoing.popleft().closing)


def _kill_group(handle: WorkerHandle) -> None:
    """Its pid is reserved: the zygote reaps it only after `forget`."""
    try:
        os.killpg(handle.pid, signal.SIGKILL)
    except ProcessLookupError:
        # Forked a moment ago and not yet leader of its own group; or dead, with nobody left.
        with contextlib.suppress(ProcessLookupError):
            os.kill(handle.pid, signal.SIGKILL)
