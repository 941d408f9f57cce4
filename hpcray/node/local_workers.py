"""Workers of this host: between the machine that asks for them and the pool that has them. Thin.

    StartWorker --> descriptors left? zygote there? --> forked, watched, connected
                    neither: `Dispatcher.worker_refused` says what is missing
    a death     --> heard out (what it still said, then those who may have called it) --> reaped
    a zygote's  --> its workers are dead; a new one, at once at first and then later and later
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from hpcray.node import outbox as out
from hpcray.node.connections import Connection, Connections
from hpcray.node.machine import Machine
from hpcray.node.output import WorkerOutput
from hpcray.node.pool import WorkerPool, ZygoteGoneError, ZygoteLost
from hpcray.node.watcher import READ, WRITE, Watcher
from hpcray.protocol import values, words
from hpcray.transport import datagrams
from hpcray.worker.zygote_messages import Exited, ForkRefused, Preloaded, Ready

# A batch system that ends a job sends SIGTERM to each of its processes, workers before the driver
# and us. Their death would be an error of the program: it is one if the job is still there then.
_TOLD_S = 0.5
# Descriptors of this process that workers leave to segments and messages, or an eighth of few. A
# worker takes 9 while it starts, 5 then; actors leave the same once more to workers for tasks.
_SPARE_DESCRIPTORS = 64
_SHORT_OF_DESCRIPTORS = (
    "its node is short of file descriptors, of which each worker takes 5; raise the hard limit "
    "(ulimit -Hn), or run fewer actors")
# A zygote that died before it was ready is followed by another one, later and later.
_ZYGOTE_DELAY_S = 0.1
_ZYGOTE_LAST_DELAY_S = 5.0


class LocalWorkers:
    def __init__(
        self, rank: int, host: str, pool: WorkerPool, watcher: Watcher, connections: Connections,
        output: WorkerOutput, read: Callable[[Connection], bool],
    ) -> None:
        self._rank = rank
        self._host = host
        self.pool = pool
        self._watcher = watcher
        self._connections = connections
        self._output = output
        self._read = read  # hear what a client has sent; False at its end
        self._settings: dict[str, Any] = {}
        self._preload_quietly = False  # nobody has named the modules: they may well be unfit
        self._machine: Machine | None = None
        # Dead ones, to be reaped.
        self.dead: list[tuple[int, values.Failure]] = []
        # Of a SIGTERM, and when that counts: others of the job may get one as well.
        self._told_to_die: list[tuple[float, int, values.Failure]] = []
        self._refused: dict[int, str] = {}  # of the dead: those that were never forked, and why
        self._zygote_fd = pool.fileno()
        self._zygote_due_s = math.inf  # when a new one is to be started
        self._zygote_delay_s = 0.0
        # When `turn` has something to do next: the loop looks at it all the time.
        self.due_s = math.inf
        watcher.watch(pool.fileno(), self._on_zygote)

    def begin(self, machine: Machine, settings: dict[str, Any], *, quiet: bool) -> None:
        """A job begins; `settings` are what its workers start with."""
        self._machine = machine
        self._settings = settings
        self._preload_quietly = quiet
        if self.pool.closed:  # by the end of an earlier job
            self.pool = self._connections.pool = self.pool.again()
            self._watch_zygote()

    def end(self) -> None:
        """The job ends: who dies now dies of that."""
        self._machine = None
        self._told_to_die.clear()
        self._set_due()

    def end_zygote(self) -> None:
        self._watcher.unwatch(self._zygote_fd)

    # --- what the machine asks for ----------------------------------------------------------------

    def start(self, machine: Machine, action: out.StartWorker) -> None:
        number = action.number
        handle = None
        reason, details = _descriptors_missing(1 if action.for_tasks else 2)
        if not reason:
            try:
                handle = self.pool.start(number, self._settings)
            except ZygoteGoneError:
                if self._zygote_delay_s > _ZYGOTE_DELAY_S:
                    reason = ("the process that starts workers dies as it starts, see its output "
                              "above")
                    details = "a library that the job preloads may crash"
                else:
                    reason = "the process that starts workers has died"
                    details = "a new one is being started"
            except OSError as error:
                reason, details = _SHORT_OF_DESCRIPTORS, str(error)
        if handle is None:
            machine.dispatcher.worker_refused(number, reason, details)
            return
        machine.connect(number)
        datagrams.enlarge_buffers(handle.task_socket)
        self._connections.add(number, handle.client_socket)
        self._watcher.watch(handle.client_socket.fileno(), partial(self._on_client, number))
        for stream, fd in (("stdout", handle.stdout_fd), ("stderr", handle.stderr_fd)):
            self._watcher.watch(fd, partial(self._on_output, number, stream))
        if self.pool.wants_write:
            self._watch_zygote()

    def kill(self, _machine: Machine, action: out.KillWorker) -> None:
        if action.number in self._connections.clients:
            self.pool.kill(action.number)

    def take_back(self, machine: Machine, action: out.TakeBack) -> None:
        if action.number in self._connections.clients:
            try:
                task_ids = self._connections.take_back(action.number)
            except datagrams.Malformed as error:
                # A task is lost, and nobody can say which: all of this worker's have crashed.
                self._connections.clients[action.number].fail(str(error))
            else:
                machine.dispatcher.taken_back(action.number, task_ids)

    def preload(self, _machine: Machine, action: out.Preload) -> None:
        # In order with the requests for workers. Without descriptors they import it themselves.
        with contextlib.suppress(OSError):
            self.pool.preload(action.modules, self._settings, quiet=self._preload_quietly)
        if self.pool.wants_write:
            self._watch_zygote()

    # --- what they do -----------------------------------------------------------------------------

    def _on_client(self, number: int, _fd: int) -> None:
        connection = self._connections.clients.get(number)
        if connection is not None and not self._read(connection):
            # A worker that hung up is dying: its exit follows.
            self._watcher.unwatch(connection.socket.fileno())
            if connection.fault:
                self.pool.kill(number)

    def _on_output(self, number: int, stream: str, fd: int) -> bool:
        """Pass worker output on towards the driver; False when there is no more."""
        more = self._output.read(self._machine, number, stream, fd)
        if more is None:
            self._watcher.unwatch(fd)
        return bool(more)

    # --- the zygote -------------------------------------------------------------------------------

    def _on_zygote(self, _fd: int) -> None:
        for event in self.pool.read_zygote():
            if isinstance(event, Exited) and event.exit_code == -signal.SIGTERM:
                self._told_to_die.append((
                    time.monotonic() + _TOLD_S, event.number, self._exit_failure(event)))
            elif isinstance(event, Exited):
                self.dead.append((event.number, self._exit_failure(event)))
            elif isinstance(event, ForkRefused):
                self._refused[event.number] = event.reason
                self.dead.append((event.number, values.Failure(
                    "WorkerCrashedError", f"no worker could be forked: {event.reason}")))
            elif isinstance(event, Ready):
                self._zygote_delay_s = 0.0
                for problem in event.problems:
                    self._output.notice(f"Warning: {problem}")
            elif isinstance(event, Preloaded):
                self._tell_problems(event)
            elif isinstance(event, ZygoteLost) and self.pool.closed:
                self._watcher.unwatch(self._zygote_fd)
            elif isinstance(event, ZygoteLost):
                self._zygote_lost(event)
        self._set_due()
        if self._zygote_fd == self.pool.fileno():
            self._watch_zygote()

    def _zygote_lost(self, event: ZygoteLost) -> None:
        failure = values.Failure(
            "WorkerCrashedError", "the process that starts workers on this node died "
            f"(exit code {event.exit_code}) and took its workers with it")
        self.dead.extend((number, failure) for number in event.numbers)
        self._watcher.unwatch(self._zygote_fd)
        if self._zygote_delay_s == 0.0:
            without = f", without {words.listed(list(event.dropped))}" * bool(event.dropped)
            self._output.notice(f"Warning: {failure.message}; starting a new one{without}")
        self._zygote_due_s = time.monotonic() + self._zygote_delay_s  # see `turn`
        self._zygote_delay_s = min(
            max(2 * self._zygote_delay_s, _ZYGOTE_DELAY_S), _ZYGOTE_LAST_DELAY_S)

    def _tell_problems(self, event: Preloaded) -> None:
        """Once for the job: nodes have the same modules as a rule, and a worker that imports one
        has its own error."""
        if self._rank == 0:
            for problem in event.problems:
                if problem.crashed or not event.quiet:
                    self._output.notice(
                        f"Warning: {problem.module} is not preloaded: it {problem.text}. "
                        "Workers that need it import it themselves")

    def _restart_zygote(self, now_s: float) -> None:
        """It is time; until then workers were refused."""
        self._zygote_due_s = math.inf
        if self.pool.closed:
            return
        try:
            self.pool.restart_zygote()
        except OSError:  # short of descriptors, processes or memory
            self._zygote_due_s = now_s + _ZYGOTE_LAST_DELAY_S
        else:
            self._watch_zygote()

    def _watch_zygote(self) -> None:
        fd = self.pool.fileno()
        if fd < 0:
            return
        mask = READ | (WRITE if self.pool.wants_write else 0)
        if self._watcher.watches(fd):
            self._watcher.change(fd, mask)
        else:
            self._zygote_fd = fd
            self._watcher.watch(fd, self._on_zygote, mask)

    # --- time, and deaths -------------------------------------------------------------------------

    def turn(self, now_s: float) -> None:
        """What is due by now."""
        while self._told_to_die and self._told_to_die[0][0] <= now_s:
            self.dead.append(self._told_to_die.pop(0)[1:])
        if self.dead:
            self.reap()
        if now_s >= self._zygote_due_s:
            self._restart_zygote(now_s)
        self._set_due()

    def _set_due(self) -> None:
        told_s = self._told_to_die[0][0] if self._told_to_die else math.inf
        self.due_s = min(self._zygote_due_s, told_s)

    def _exit_failure(self, event: Exited) -> values.Failure:
        code = event.exit_code
        connection = self._connections.clients.get(event.number)
        if connection is not None and connection.fault:
            how = f"was ended: {connection.fault}"
        elif code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:
                name = str(-code)
            how = f"was killed by signal {-code} ({name})"
            if -code == signal.SIGKILL:
                how += "; the out-of-memory killer, a batch limit or a person may have done it"
        else:
            how = f"exited with status {code}"
        return values.Failure(
            "WorkerCrashedError",
            f"the worker pid={event.pid} on {self._host} (rank {self._rank}) {how}")

    def reap(self) -> None:
        """Workers that have ended: what they still said is heard first, and then what those did who
        may have called their actors."""
        dead, self.dead = self.dead, []
        for number, failure in dead:
            connection = self._connections.clients.get(number)
            if connection is None:
                continue
            machine = self._machine
            if machine is not None:
                self._read_dry(connection)
                for caller in machine.may_have_called(number):
                    if caller in self._connections.clients:
                        self._read_dry(self._connections.clients[caller])
            self._connections.pop(number)
            self.detach(connection)
            self.pool.forget(number)
            reason = self._refused.pop(number, None)
            if machine is not None:
                if reason is not None:
                    machine.dispatcher.worker_refused(number, reason, "fork failed")
                machine.worker_exited(number, failure)

    def _read_dry(self, connection: Connection) -> None:
        while connection.readable() and self._read(connection):
            pass

    def detach(self, connection: Connection) -> None:
        """Pass on a worker's last words and stop watching it; its descriptors are the pool's."""
        number = connection.number
        handle = self.pool.handle(number)
        for stream, fd in (("stdout", handle.stdout_fd), ("stderr", handle.stderr_fd)):
            while self._on_output(number, stream, fd):
                pass
            self._watcher.unwatch(fd)
        self._output.forget(number)
        self._connections.detach(connection)


def _descriptors_missing(shares: int) -> tuple[str, str]:
    """Why this process should not take many more: (reason, numbers), or empty strings.

    `shares`: how many times the usual number is to be left.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = shares * min(_SPARE_DESCRIPTORS, limit // 8)
    try:
        # The lowest that is free: nearly as many are in use.
        lowest = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return _SHORT_OF_DESCRIPTORS, str(error)
    os.close(lowest)
    if lowest + spare < limit:
        return "", ""
    return _SHORT_OF_DESCRIPTORS, f"about {lowest:,} of {limit:,} are in use"
