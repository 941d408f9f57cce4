"""The node's loop: what happens becomes events for the machine, what it wants is carried out.

    drain sockets --> drain MPI --> machine.end_turn --> carry out --> wait
      clients           frames                            messages, datagrams, forks,
      zygote            data                              segments, transfers
      worker output

One thread; no call in it blocks. Waiting: in `epoll` until something happens on this host; with
other ranks at most 50 us to 20 ms, by how long ago anything was said that leads to more, because
MPI has no descriptor to wait for; not at all while data is moving.

The job's life at a node:

    JOINING --Joined to node 0--> (node 0: all joined and driver's Hello --Begin-->) RUNNING
    RUNNING --driver ends or is gone: Ending--> ENDING --> PARKED, or LEFT (see `_continue_ending`)
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from hpcray.launch.last_words import LastWords
from hpcray.launch.progress import cpu_progress
from hpcray.launch.resources import share_gpus
from hpcray.node import beginning
from hpcray.node import outbox as out
from hpcray.node.connections import Connection, Connections
from hpcray.node.journal import Journal
from hpcray.node.local_workers import LocalWorkers
from hpcray.node.machine import Machine
from hpcray.node.output import WorkerOutput
from hpcray.node.pool import WorkerPool
from hpcray.node.processes import process_state
from hpcray.node.records import DRIVER
from hpcray.node.transfers import Segments, Transfers, ranks_to_map
from hpcray.node.waiting import PATIENCE_S
from hpcray.node.watcher import Watcher
from hpcray.objects.budget import MINIMUM_SEGMENT_BYTES
from hpcray.protocol import ids, labels, messages, sizes, words
from hpcray.transport.base import (
    DataCancelled,
    DataReceived,
    DataSent,
    PeerLost,
    Received,
    Transport,
)
from hpcray.transport.patience import Patience

_TICK_S = 0.01
_SLOW_TICK_S = 1.0
# Lineage may be this old in the control store: one command for many tasks.
_JOURNAL_S = 0.1
# How long to sleep between looks at MPI, by how long ago another rank was last spoken with: a reply
# is most likely at once, and what has taken long waits 1 % longer. (since, sleep) in seconds; epoll
# alone knows milliseconds only. A look takes 25 to 80 us of a core: a quiet node, 0.4 % of it.
_MPI_WAITS_S = ((0.001, 0.00005), (0.01, 0.0002), (0.5, 0.001), (1.0, 0.005), (5.0, 0.01))
_MPI_QUIET_WAIT_S = 0.02
# Nothing follows from these: a node that says nothing else is quiet.
_NOT_TALK = (messages.Load,)
# A rank that gives no sign of life for so long at the end is left behind. After a failure the
# launcher is killing ranks already.
_SILENT_S = 10.0
_FAILED_SILENT_S = 2.0
# Workers have so long between SIGTERM and SIGKILL, and a zygote that gets no further may take so
# long to end them.
_GRACE_S = 1.0
_ZYGOTE_SILENT_S = 3.0
# The journal's thread ends without an event.
_ENDING_TICK_S = 0.005
_SPIN_S = 0.0002
# Up to so many messages for a peer are encoded at once.
_SMALL_BATCH = 64
# Encoded ahead for a slow peer.
_AHEAD_BYTES = 2 * 1024 * 1024

JOINING, RUNNING, ENDING, PARKED, LEFT = range(5)


class NodeServer:
    # Python finds attributes sooner so, if there are more than 30.
    __slots__ = (
        "_config", "_connections", "_driver", "_early", "_ended", "_ended_own",
        "_ending_park", "_epoch", "_job_count", "_job_key", "_joined", "_journal",
        "_last_mpi_s", "_last_words", "_late_s", "_left", "_machine", "_me", "_next_due_s",
        "_next_journal_s", "_next_look_s", "_next_tick_s", "_notices", "_output",
        "_packages", "_patience", "_postponed", "_segments", "_spin", "_state", "_stop_reason",
        "_to_peers", "_told_end", "_told_short", "_transfers", "_transport", "_unsent",
        "_watcher", "_why", "_workers", "_zygote_patience", "drop_shared_files", "exit_status",
        "left_behind", "rank", "size",
    )

    def __init__(
        self, *, transport: Transport | None, pool: WorkerPool, driver: socket.socket | None,
        joined: messages.Joined, journal: Journal, job_key: bytes, last_words: LastWords,
        spin: bool = False, notices: list[str] | None = None,
    ) -> None:
        self.rank = 0 if transport is None else transport.rank
        self.size = 1 if transport is None else transport.size
        self._transport = transport
        self._journal = journal
        self._me = joined
        self._job_key = job_key
        self._spin = spin
        # Warnings from before there was anybody to show them to; the journal goes on adding.
        self._notices = notices if notices is not None else []
        self._state = JOINING
        self._job_count = 0
        self._epoch = 0
        self._watcher = Watcher()
        self._connections = Connections(self._watcher, pool, self._handle)
        self._output = WorkerOutput(self.rank, self._connections, self._to_node0)
        self._workers = LocalWorkers(
            self.rank, joined.host, pool, self._watcher, self._connections, self._output,
            self._read_client)
        self._machine: Machine | None = None
        self._segments = Segments()
        self._transfers: Transfers | None = None
        self._joined: dict[int, messages.Joined] = {}
        self._ended: set[int] = set()
        # Ranks that did not say within the time that they have ended: MPI_Finalize would wait.
        self.left_behind: tuple[int, ...] = ()
        # Called once the job ends for good: who kills all of it then may kill the watchdog as well.
        self.drop_shared_files: Callable[[], None] = lambda: None
        self._config: dict[str, Any] | None = None
        self._early: list[tuple[int, list[Any]]] = []
        self._packages = ""
        self._last_mpi_s = time.monotonic()
        self._next_tick_s = 0.0
        # Until then a turn without events would do nothing.
        self._next_due_s = 0.0
        self._next_journal_s = 0.0
        # When ranks that have not joined are told of, once.
        self._late_s = time.monotonic() + PATIENCE_S
        self._ending_park = False
        self._ended_own = False
        self._told_end = False
        self._next_look_s = 0.0
        self._patience: dict[int, Patience] = {}
        self._zygote_patience = Patience(_ZYGOTE_SILENT_S)
        self._last_words = last_words
        self._stop_reason = ""
        # Node 0: why the job ends, if the driver did not say that it ends. Told at once.
        self._why = ""
        self._to_peers: dict[int, list[Any]] = {}  # of this turn
        # What waits for slow peers, as messages: they share their values with the records.
        self._unsent: dict[int, deque[Any]] = {}
        # Actions that this host was too short of something for; again at the next tick.
        self._postponed: list[out.Action] = []
        self._told_short = False
        self.exit_status = 0
        self._driver = driver
        if driver is not None:
            driver.setblocking(False)
            self._connections.add(DRIVER, driver)
            self._watcher.watch(driver.fileno(), self._on_driver)
        for fd, handler in journal.descriptors():
            self._watcher.watch(fd, handler)

    # --- the loop ---------------------------------------------------------------------------------

    def run(self) -> int:
        """Serve until the job is over; the exit status of this process."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver's affair
        # Records are outside garbage collection and machines make no cycles: look rarely.
        gc.collect()
        gc.freeze()
        gc.set_threshold(100_000, 20, 100)
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        # What a signal means is decided between two turns, by its number in the pipe.
        signal.signal(signal.SIGTERM, lambda *_: None)
        self._watcher.watch(wake_read, self._on_signal)
        self._join()
        transport = self._transport
        watcher = self._watcher
        while self._state != LEFT:
            now_s = time.monotonic()
            events = watcher.handle(0.0 if self._segments.touching else self._wait_s(now_s))
            now_s = time.monotonic()
            if transport is not None:
                for event in transport.poll():
                    if self._on_transport(event):
                        self._last_mpi_s = now_s
                    events = True
                if self._unsent:
                    self._flush_peers()
                if self._transfers is not None and self._transfers.copying:
                    self._transfers.copy_some(now_s)
                elif not events and now_s < self._next_due_s and self._state == RUNNING:
                    continue  # one of the many looks at MPI that find nothing
            if not events and self._segments.touching:
                self._segments.touch_some()
            if self._workers.dead:
                self._workers.bury()
            self._turn(now_s)
        signal.set_wakeup_fd(-1)
        os.close(wake_read)
        os.close(wake_write)
        return self.exit_status

    def _wait_s(self, now_s: float) -> float:
        """How long to sleep for want of events. Every wait ends by itself."""
        transport = self._transport
        tick_s = max(self._next_due_s - now_s, 0.0)
        if transport is None:
            return tick_s
        if transport.busy() or (self._transfers is not None and self._transfers.copying):
            return 0.0
        quiet_s = now_s - self._last_mpi_s
        if self._spin and quiet_s < _SPIN_S:
            os.sched_yield()
            return 0.0
        for since_s, wait_s in _MPI_WAITS_S:
            if quiet_s < since_s:
                return min(tick_s, wait_s)
        return min(tick_s, _MPI_QUIET_WAIT_S)

    def _turn(self, now_s: float) -> None:
        machine = self._machine
        if now_s >= self._workers.due_s:
            self._workers.turn(now_s)
        if self._notices and self._state == RUNNING:
            for text in self._notices:
                self._output.notice(text)
            self._notices.clear()
        if machine is not None:
            if now_s >= self._next_tick_s:
                machine.tick(now_s)
                self._connections.retry()
                if self._postponed:
                    machine.outbox.actions += self._postponed
                    self._postponed.clear()
                if self._transfers is not None:
                    self._transfers.tick(now_s)
                if now_s >= self._next_journal_s:
                    self._next_journal_s = now_s + _JOURNAL_S
                    self._journal.record(machine)
                fast = (machine.wants_ticks or self._journal_pending(machine)
                        or self._connections.short)
                self._next_tick_s = now_s + (_TICK_S if fast else _SLOW_TICK_S)
            elif self._next_tick_s > now_s + _TICK_S:
                # Something happened: a tick soon sees whether it left work for more.
                self._next_tick_s = now_s + _TICK_S
            # Carrying out may lead to new decisions (a take-back, a pull); it settles at once.
            for _ in range(8):
                machine.end_turn(now_s)
                if not self._carry_out(machine):
                    break
        elif self._state == JOINING and self.rank == 0 and now_s > self._late_s:
            self._tell_late()
        if self._output.deadline_s is not None:
            self._output.tick(now_s)
        if self._transport is not None or self._to_peers:
            self._flush_peers()
        # Without a job there is nothing to tick.
        due_s = now_s + _SLOW_TICK_S if machine is None else self._next_tick_s
        if self._workers.due_s < due_s:
            due_s = self._workers.due_s
        if self._output.deadline_s is not None:
            due_s = min(due_s, max(self._output.deadline_s, now_s + 0.001))
        if machine is not None:
            if machine.inventory.questions:
                due_s = now_s  # a slice of the answer every turn
            elif machine.due_s < due_s:
                due_s = machine.due_s
        if self._state == ENDING:
            self._continue_ending(now_s)
            due_s = now_s + _ENDING_TICK_S
        self._next_due_s = due_s

    @staticmethod
    def _journal_pending(machine: Machine) -> bool:
        return bool(
            machine.tasks.lineage or machine.new_functions or machine.actors.homes.changes
            or machine.requests.names.changes)

    # --- carrying out -----------------------------------------------------------------------------

    def _carry_out(self, machine: Machine) -> bool:
        """Send and do what the machine left in its outbox; whether it should decide again."""
        box = machine.outbox
        if box.interrupts:
            interrupts, box.interrupts = box.interrupts, []
            for number in interrupts:
                if number in self._connections.clients:
                    self._connections.send(number, box.clients.pop(number, []))
                    self._workers.pool.interrupt(number)
        if box.clients:
            clients = box.clients
            for number, batch in clients.items():
                if batch:
                    self._connections.send(number, batch)
            clients.clear()
        if box.tasks:
            tasks, box.tasks = box.tasks, []
            for number, batch in tasks:
                self._connections.send_tasks(number, batch)
        again = False
        while box.actions:
            actions, box.actions = box.actions, []
            for action in actions:
                if self._machine is not machine:
                    return False  # the one before has ended the job
                again = True
                try:
                    _ACTIONS[type(action)](self, machine, action)
                except OSError as error:
                    # This host is short of descriptors or memory: at the next tick.
                    self._postpone(action, error)
        if box.notices:
            notices, box.notices = box.notices, []
            for text in notices:
                self._output.notice(text)
        if box.own_notices:
            for text in box.own_notices:
                print(text, file=sys.stderr, flush=True)
            box.own_notices.clear()
        if box.peers:
            for rank, batch in box.peers.items():
                if batch:
                    self._to_peer(rank, batch)
            box.peers.clear()
        return again

    def _postpone(self, action: out.Action, error: OSError) -> None:
        self._postponed.append(action)
        self._next_tick_s = min(self._next_tick_s, time.monotonic() + 5 * _TICK_S)
        if not self._told_short:
            self._told_short = True
            self._output.notice(
                f"Warning: rank {self.rank} is short of file descriptors or memory and tries again "
                f"({error}); raise the limit (ulimit -n), or run fewer actors")

    def _grant_segment(self, machine: Machine, action: out.GrantSegment) -> None:
        if action.client not in self._connections.clients:
            return  # it died meanwhile: its segments went with it (NodeMemory.client_gone)
        try:
            fd = self._segments.create(action.segment, action.nbytes)
        except OSError as error:
            machine.memory.refused(action.client, action.segment, str(error))
            return
        if action.nbytes <= machine.memory.budget.free_bytes:
            if action.nbytes <= MINIMUM_SEGMENT_BYTES:
                self._segments.prepare_spare(action.nbytes)
        else:
            self._segments.drop_spare()
        self._connections.send(
            action.client, [messages.SegmentGrant(action.segment, action.nbytes)], (fd,))

    def _open_segment(self, machine: Machine, action: out.OpenSegment) -> None:
        if action.client in self._connections.clients and self._segments.has(action.segment):
            fd, nbytes = self._segments.descriptor(action.segment)
            self._connections.send(
                action.client, [messages.SegmentOpened(action.segment, nbytes)], (fd,))

    def _introduce(self, machine: Machine, action: out.Introduce) -> None:
        client = self._connections.clients.get(action.client)
        if client is not None:
            self._connections.send(
                action.worker, [messages.ChannelOf(action.client)], (client.socket.fileno(),))

    def _introduce_actor(self, machine: Machine, action: out.IntroduceActor) -> None:
        if action.worker in self._connections.clients:
            self._connections.send(
                action.client, [messages.ActorChannel(action.actor_id, action.worker)],
                (self._workers.pool.handle(action.worker).task_socket.fileno(),))

    def _close_segment(self, machine: Machine, action: out.CloseSegment) -> None:
        self._segments.close(action.segment)

    def _free_node_range(self, machine: Machine, action: out.FreeNodeRange) -> None:
        if self._segments.arena.has(action.segment):
            self._segments.arena.release(action.segment, action.offset)

    def _start_pull(self, machine: Machine, action: out.StartPull) -> None:
        assert self._transfers is not None
        self._transfers.start(action)

    def _serve_pull(self, machine: Machine, action: out.ServePull) -> None:
        assert self._transfers is not None
        self._transfers.serve(action)

    def _stop_job(self, machine: Machine, action: out.StopJob) -> None:
        self._end_job(park=action.park)

    # --- what happens on this host ----------------------------------------------------------------

    def _on_signal(self, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            if signal.SIGTERM in os.read(fd, 4096):
                self._terminate("SIGTERM")

    def _read_client(self, connection: Connection) -> bool:
        """Hear what the client sent; False at its end."""
        if self._connections.read(connection) is None:
            return False
        self._connections.inboxes.handle_all(connection.number)
        return True

    def _handle(self, number: int, batch: list[Any]) -> None:
        if self._machine is None:
            return
        try:
            self._machine.client_messages(number, batch)
        except Exception as error:
            # It named what there is not: a client's affair, and not the node's end. Loud all the
            # same, as the fault may be ours.
            traceback.print_exc()
            connection = self._connections.clients[number]
            connection.inbox.batches.clear()
            connection.fail(f"it sent what cannot be handled ({type(error).__name__}: {error})")

    def _on_driver(self, _fd: int) -> None:
        connection = self._connections.clients[DRIVER]
        if self._machine is None:
            self._driver_says_hello(connection)
        elif not self._read_client(connection):
            self._driver_gone()

    def _driver_says_hello(self, connection: Connection) -> None:
        if self._connections.read(connection) is None:
            self._driver_gone()
            return
        inbox = connection.inbox
        while inbox.batches:
            for message in inbox.batches.popleft():
                if type(message) is messages.Hello:
                    inbox.handled = 1  # a session's first datagram
                    self._config = message.config or {}
                    self._config["driver_pid"] = message.pid
                    self._begin_if_complete()
                elif type(message) is messages.EndJob:
                    self._end_job(park=message.park)

    def _driver_gone(self) -> None:
        connection = self._connections.pop(DRIVER)
        assert connection is not None
        if connection.fault:  # to our own stderr: the driver may not read any more
            self._output.notice(
                f"Error: the driver is disconnected and the job ends: {connection.fault}")
        self._watcher.unwatch(connection.socket.fileno())
        connection.socket.close()
        self._driver = None
        if self._state != ENDING:
            self.exit_status = self.exit_status or 1  # it did not say that it ends
            if self._transport is not None:
                # Without a launcher its parent sees how it ended. Here nobody says anything at
                # Ctrl-C, at a time limit or at a SIGTERM: the launcher ends all ranks by signals.
                self._tell_why(
                    "the driver has ended without shutdown(): it was killed, or ended by "
                    f"{self._last_words.who()}")
        self._end_job(park=False)

    # --- other ranks ------------------------------------------------------------------------------

    def _to_node0(self, message: Any) -> None:
        self._to_peer(0, [message])

    def _to_peer(self, rank: int, batch: list[Any]) -> None:
        self._to_peers.setdefault(rank, []).extend(batch)

    def _flush_peers(self) -> None:
        transport = self._transport
        if transport is None:
            self._to_peers.clear()
            return
        if self._to_peers:
            if any(_is_talk(batch) for batch in self._to_peers.values()):
                self._last_mpi_s = time.monotonic()  # an answer may come at once
            for rank, batch in self._to_peers.items():
                if rank in self._unsent:
                    self._unsent[rank].extend(batch)
                elif len(batch) <= _SMALL_BATCH:
                    self._send_to_peer(rank, batch)
                else:
                    self._unsent[rank] = deque(batch)
            self._to_peers.clear()
        if self._unsent:
            self._send_unsent()
        transport.flush()

    def _send_to_peer(self, rank: int, batch: list[Any]) -> None:
        assert self._transport is not None
        # The epoch keeps what was sent in one job from being heard in the next.
        prefix = self._epoch.to_bytes(4, "little")
        encoded = messages.encode(batch)
        if len(encoded) <= sizes.PAYLOAD_BYTES:
            self._transport.send(rank, prefix + encoded)
            return
        for payload in sizes.parts(batch, messages.encode, sizes.PAYLOAD_BYTES):
            self._transport.send(rank, prefix + payload)

    def _pass_on(self, payload: bytes) -> None:
        """To the next nodes of the tree, before anything else is said to them."""
        if self._transport is not None:
            for rank in beginning.children(self.rank, self.size):
                self._transport.send(rank, payload)

    def _send_unsent(self) -> None:
        """As much as is worth having ready for each peer that is slow."""
        assert self._transport is not None
        # At the end little is left, and this loop may be over before the peer has room.
        ahead_bytes = _AHEAD_BYTES if self._state in (JOINING, RUNNING) else 1 << 60
        for rank, unsent in list(self._unsent.items()):
            while unsent and self._transport.queued_bytes(rank) < ahead_bytes:
                self._send_to_peer(
                    rank, [unsent.popleft() for _ in range(min(_SMALL_BATCH, len(unsent)))])
                self._last_mpi_s = time.monotonic()
            if not unsent:
                del self._unsent[rank]

    def _on_transport(self, event: Any) -> bool:
        """Whether more is likely to follow at once."""
        if type(event) is Received:
            epoch = int.from_bytes(event.payload[:4], "little")
            batch = messages.decode_to_peer(memoryview(event.payload)[4:])
            if batch and type(batch[0]) is messages.Begin:
                self._pass_on(event.payload)
            self._on_peer(event.rank, epoch, batch)
            return _is_talk(batch)
        if type(event) is PeerLost:
            self._peer_lost(event)
        elif self._transfers is not None:
            if type(event) is DataReceived:
                self._transfers.received(event.transfer)
            elif type(event) is DataSent:
                self._transfers.sent(event.rank, event.transfer)
            elif type(event) is DataCancelled:
                self._transfers.cancelled(event.transfer)
        return True

    def _on_peer(self, rank: int, epoch: int, batch: list[Any]) -> None:
        rest = []
        for message in batch:
            kind = type(message)
            if kind is messages.Joined:
                self._joined[message.rank] = message
                self._begin_if_complete()
            elif kind is messages.Begin:
                if self._state not in (JOINING, PARKED):
                    continue  # node 0 said meanwhile that all is over
                self._epoch = epoch
                self._begin(message.job_id, beginning.unpack(message))
                early, self._early = self._early, []
                for early_rank, early_batch in early:
                    self._on_peer(early_rank, epoch, early_batch)
            elif kind is messages.Ending:
                if message.park and epoch > self._epoch:
                    rest.append(message)  # Begin comes by others, and later
                else:
                    self._end_job(park=message.park)
            elif kind is messages.Ended:
                self._ended.add(message.rank)
                if self.rank == 0 and self._state == RUNNING and epoch == self._epoch:
                    self._peer_left(message)
            elif kind is messages.Leave:
                self._state = LEFT
            elif kind is messages.PeerOutput:
                self._output.from_peer(rank, message)
            elif kind is messages.Notice and self._machine is None:
                self._output.notice(message.text)
            elif kind is messages.PullRefused:
                if self._transfers is not None:
                    self._transfers.refused(message.transfer)
            elif kind is messages.PullMapped:
                if self._transfers is not None:
                    self._transfers.mapped(rank, message)
            else:
                rest.append(message)
        if not rest:
            return
        if self._machine is not None and epoch == self._epoch:
            self._machine.peer_messages(rank, rest)
        elif epoch > self._epoch:
            self._early.append((rank, rest))  # a peer was told to begin before us

    def _peer_lost(self, event: PeerLost) -> None:
        self._ended.add(event.rank)
        if self._machine is not None:
            self._machine.node_lost(event.rank, event.reason)
        else:
            self._fail(f"rank {event.rank} is gone ({event.reason}) before the job had begun")

    def _fail_job(self, _machine: Machine, action: out.FailJob) -> None:
        self._fail(action.why)

    def _fail(self, why: str) -> None:
        self._tell_why(why)
        self.exit_status = 1
        self._end_job(park=False)

    def _peer_left(self, message: messages.Ended) -> None:
        """It ended on its own: somebody told it to. If that was the launcher, it is telling all of
        us, and the driver is gone before we could say which of the ranks was the first."""
        node = self._joined[message.rank]
        self._tell_why(self._told_to_end(message.rank, node, message.reason))
        self.exit_status = 1
        self._end_job(park=False)

    def _told_to_end(self, rank: int, node: messages.Joined, reason: str) -> str:
        who = "the node" if self.size == 1 else f"rank {rank}"
        return (f"{who} (pid {node.pid} on {node.host}) was told to end ({reason}), by "
                f"{self._last_words.who()}")

    def _tell_why(self, why: str) -> None:
        """Node 0: the job ends, and its driver did not say so. The first cause is told, to people
        and not through the driver, which may be dying as well."""
        if self._state in (ENDING, LEFT) or self._why:
            return
        self._output.flush()
        self._why = why
        self._last_words.say(f"the job ends: {why}")

    # --- the job's life ---------------------------------------------------------------------------

    def _join(self) -> None:
        if self.rank == 0:
            self._joined[0] = self._me
            self._begin_if_complete()
        else:
            self._to_peer(0, [self._me])

    def _tell_late(self) -> None:
        """The driver waits, and some rank has not joined: which."""
        missing = [str(rank) for rank in range(self.size) if rank not in self._joined]
        if self._config is not None and missing:
            self._late_s = math.inf
            self._output.notice(
                f"Warning: the job has waited for {PATIENCE_S:g} s for rank{'s'[:len(missing) > 1]}"
                f" {words.listed(missing, 8)} to join; {'they have' if missing[1:] else 'it has'} "
                "come through MPI_Init, and may be stopped or starting slowly.")

    def _begin_if_complete(self) -> None:
        """Node 0: everybody is here and the driver has said what it wants."""
        if self.rank != 0 or self._config is None or len(self._joined) < self.size:
            return
        if self._state not in (JOINING, PARKED):
            return
        wanted = self._config.get("num_gpus")
        try:
            gpus = share_gpus([(n.host, n.gpus) for _, n in sorted(self._joined.items())],
                              None if wanted is None else int(wanted))
        except ValueError as error:
            # Nothing begins; the driver may try again.
            self._config = None
            self._connections.send(DRIVER, [
                messages.Welcome(b"", self.rank, self.size, DRIVER, {"refused": str(error)})])
            return
        self._job_count = max(self._job_count + 1, self._config.get("session", 1))
        job_id = ids.job_id(self._job_count)
        self._epoch = self._job_count
        nodes = [
            messages.Joined(
                n.rank, n.host, n.address, n.pid,
                tuple(sorted(_resources(
                    {**dict(n.resources), "GPU": len(gpus[n.rank]) * messages.UNIT},
                    self._config).items())),
                tuple(sorted({
                    **dict(n.labels), **(self._config.get("labels") or {}),
                    labels.NODE_ID: ids.node_id_hex(n.rank, self._job_key.hex())}.items())))
            for _, n in sorted(self._joined.items())
        ]
        self._tell_capped(self._config)
        session = {
            "job_key": self._job_key.hex(),
            "nodes": nodes,
            "environ": self._config.pop("environ", {}),
            "setup_hook": self._config.pop("setup_hook", None),
            "gpus": gpus,
            "modules": self._config.pop("modules", ()),
            "config": self._config,
            "control": self._journal.address_bytes(),
            "secret": secrets.token_bytes(32),
        }
        message = beginning.pack(job_id, session)
        self._pass_on(self._epoch.to_bytes(4, "little") + messages.encode([message]))
        self._begin(job_id, beginning.unpack(message))
        assert self._machine is not None
        self._machine.connect(DRIVER)
        self._machine.clients[DRIVER].pid = self._config["driver_pid"]
        self._machine.welcome(DRIVER)

    def _tell_capped(self, config: dict[str, Any]) -> None:
        """Which nodes have less memory than `init` wants their object stores to have."""
        wanted = config.get("object_store_memory_bytes") or 0
        less = {f"rank {n.rank} has {words.size(nbytes)}" for n in self._joined.values()
                if (nbytes := dict(n.resources)["memory"] // messages.UNIT) < wanted}
        if less:
            self._output.notice(
                f"Warning: object_store_memory is {words.size(wanted)}, more than the memory of a "
                f"node ({words.listed(sorted(less))}). The object store of such a node takes what "
                "its memory allows.")

    def _begin(self, job_id: bytes, session: dict[str, Any]) -> None:
        config = session["config"]
        nodes = msgspec.convert(session["nodes"], list[messages.Joined])
        mine = dict(nodes[self.rank].resources)
        capacity_bytes = mine["object_store_memory"] // messages.UNIT
        # The secret and the control store's password are the nodes' own: clients do not get them.
        own = ("secret", "control", "nodes", "environ", "setup_hook", "gpus", "modules")
        public = {k: v for k, v in session.items() if k not in own}
        machine = Machine(self.rank, self.size, mine, capacity_bytes, job_id, public)
        for node in nodes:
            machine.joined(node)
        machine.explain.process_state = process_state
        if self.rank == 1 and self._transport is not None:
            machine.waiting.heard_of_node0 = partial(self._transport.heard, 0)
        self._machine = machine
        self._segments = Segments()
        if self._transport is not None:
            self._transfers = Transfers(
                machine.pulls, machine.outbox, self._segments, self._transport,
                ranks_to_map(machine.membership.living, self.rank))
        # Workers unpack runtime environments there; it is there only if one did.
        node_id = ids.node_id_hex(self.rank, session["job_key"])
        self._packages = os.path.join(tempfile.gettempdir(), f"hpcray-packages-{node_id}")
        # Workers are forks of the zygote, so they start with this node's environment.
        settings = {
            "environ": session["environ"], "setup_hook": session["setup_hook"],
            "env_vars": config.get("runtime_env", {}).get("env_vars"),
            "cwd": config.get("cwd") or os.getcwd(),
            "sys_path": config.get("sys_path"), "rank": self.rank,
            "host": self._me.host, "address": self._me.address,
            "namespace": config.get("namespace", ""), "packages": self._packages,
            "gpus": {"variable": self._me.gpus.variable, "ids": session["gpus"][self.rank]},
            "as_ray": config.get("as_ray", False),
        }
        self._workers.begin(
            machine, {k: v for k, v in settings.items() if v is not None},
            quiet=config.get("preload") == "auto")
        self._workers.pool.set_cleanup_folder(self._packages)
        self._workers.preload(machine, out.Preload(tuple(session["modules"])))
        self._journal.begin(
            job_id, session["secret"], session["control"], machine, config, self._me)
        self._output.begin([node.address for node in nodes], config.get("log_rules", {}))
        self._state = RUNNING
        self._next_tick_s = 0.0
        machine.dispatcher.start_workers(
            min(max(mine.get("CPU", 0) // messages.UNIT, 1), 16))

    def _terminate(self, reason: str) -> None:
        self.exit_status = 143
        self._stop_reason = reason
        if self.rank == 0:
            self._tell_why(self._told_to_end(0, self._me, reason))
        self._end_job(park=False)

    def _end_job(self, *, park: bool) -> None:
        """Start ending: tell everybody, end the workers."""
        if self._state in (ENDING, LEFT):
            if not park:
                self._ending_park = False
            return
        if self._state == PARKED and park:
            return  # node 0 said it twice
        self._state = ENDING
        self._ending_park = park
        self._ended_own = self._told_end = False
        self._next_look_s = 0.0
        self._patience.clear()
        # Nobody needs what has not been sent, but for what people are to see.
        for rank, unsent in self._unsent.items():
            self._unsent[rank] = deque(
                message for message in unsent
                if type(message) in (messages.PeerOutput, messages.Notice))
        if self.rank == 0:
            for rank in range(1, self.size):
                self._to_peer(rank, [messages.Ending(park)])
        self._flush_peers()
        if not park:
            self.drop_shared_files()
        if self._machine is not None:
            self._forget_job(self._machine)
        pool = self._workers.pool
        if not pool.closed:
            self._zygote_patience = Patience(_ZYGOTE_SILENT_S)
            pool.start_close(_GRACE_S)

    def _forget_job(self, machine: Machine) -> None:
        for number in list(self._connections.clients):
            if number == DRIVER:
                continue
            connection = self._connections.pop(number)
            assert connection is not None
            self._workers.detach(connection)
        self._workers.end()
        self._journal.record(machine)
        self._journal.start_end(machine)
        self._output.flush()
        self._machine = None
        self._transfers = None
        self._segments.close_all()

    def close(self) -> None:
        """After `run`: end what is left, whatever the state."""
        self.drop_shared_files()
        self._workers.pool.close(2.0)
        if self._packages:
            shutil.rmtree(self._packages, ignore_errors=True)
        self._segments.close_all()
        if self._driver is not None:
            self._driver.close()
        self._watcher.close()

    def _continue_ending(self, now_s: float) -> None:
        """Take the next step, if what it waits for is there. Nothing here blocks.

            own workers and journal ended --> rank r: Ended --> PARKED, or until Leave --> LEFT
                                          --> node 0: all Ended --> JobEnded --> PARKED, or
                                              driver has read all --> Leave to all --> LEFT

        Whoever gives no sign of life for a while is left behind.
        """
        if not self._own_end(now_s):
            return
        if self.rank != 0:
            self._ask_again(now_s, (0,), messages.Ended(self.rank, self._stop_reason))
            if self._ending_park:
                self._state = PARKED
            return
        missing = tuple(r for r in range(1, self.size) if r not in self._ended)
        if missing:
            self._ask_again(now_s, missing, messages.Ending(self._ending_park))
            return
        if not self._told_end:
            self._told_end = True
            self._connections.send(DRIVER, [messages.JobEnded(self._why)])
        driver = self._connections.clients.get(DRIVER)
        if not self._ending_park and driver is not None and driver.backlog:
            return  # it is slow to print what it gets; its end would be seen
        self._ended.clear()
        self._early.clear()
        self._config = None
        if self._ending_park:
            self._state = PARKED
            return
        for rank in range(1, self.size):
            self._to_peer(rank, [messages.Leave()])
        self._flush_peers()
        self._state = LEFT

    def _own_end(self, now_s: float) -> bool:
        """Whether this node's workers are gone and its journal is written."""
        if self._ended_own:
            return True
        pool = self._workers.pool
        if pool.fileno() >= 0:
            if not self._zygote_patience.look(now_s, cpu_progress(pool.zygote_pid)):
                return False
            self._workers.end_zygote()
        if not self._journal.ended(now_s):
            return False
        pool.close(0.0)  # kills a zygote that hangs
        if self._packages:
            shutil.rmtree(self._packages, ignore_errors=True)
        self._ended_own = True
        return True

    def _ask_again(self, now_s: float, ranks: tuple[int, ...], message: Any) -> None:
        """Say it to those we wait for: what they answer, be it an acknowledgement, is a sign of
        life. Without any, leave them behind."""
        if now_s < self._next_look_s:
            return
        assert self._transport is not None
        limit_s = _FAILED_SILENT_S if self.exit_status else _SILENT_S
        self._next_look_s = now_s + Patience(limit_s).look_s
        silent = []
        for rank in ranks:
            patience = self._patience.setdefault(rank, Patience(limit_s))
            patience.limit_s = limit_s
            if patience.look(now_s, self._transport.heard(rank)):
                silent.append(rank)
            else:
                self._to_peer(rank, [message])
        self._flush_peers()
        if silent:
            self.left_behind = tuple(silent)
            self._connections.send(DRIVER, [messages.JobEnded(self._why)])
            self._state = LEFT


def _is_talk(batch: list[Any]) -> bool:
    return any(type(message) not in _NOT_TALK for message in batch)


def _resources(detected: dict[str, int], config: dict[str, Any]) -> dict[str, int]:
    """What a node offers: what was found there, or what `init` says every node has."""
    result = dict(detected)
    for key, name in (("num_cpus", "CPU"), ("num_gpus", "GPU"), ("memory_bytes", "memory")):
        if config.get(key) is not None:
            result[name] = round(config[key] * messages.UNIT)
    # Of what the node has, whatever `init` says of the resource: a store that is larger than the
    # memory is ended by the kernel, and not by an error.
    memory_bytes = detected["memory"] // messages.UNIT
    store_bytes = config.get("object_store_memory_bytes") or int(memory_bytes * 0.3)
    result["object_store_memory"] = min(store_bytes, memory_bytes) * messages.UNIT
    for name, amount in (config.get("resources") or {}).items():
        result[name] = round(amount * messages.UNIT)
    return {name: amount for name, amount in result.items() if amount > 0}


_ACTIONS: dict[type, Callable[[NodeServer, Machine, Any], None]] = {
    out.StartWorker: lambda server, machine, action: server._workers.start(machine, action),
    out.KillWorker: lambda server, machine, action: server._workers.kill(machine, action),
    out.TakeBack: lambda server, machine, action: server._workers.take_back(machine, action),
    out.GrantSegment: NodeServer._grant_segment,
    out.OpenSegment: NodeServer._open_segment,
    out.CloseSegment: NodeServer._close_segment,
    out.Introduce: NodeServer._introduce,
    out.IntroduceActor: NodeServer._introduce_actor,
    out.FreeNodeRange: NodeServer._free_node_range,
    out.StartPull: NodeServer._start_pull,
    out.ServePull: NodeServer._serve_pull,
    out.Preload: lambda server, machine, action: server._workers.preload(machine, action),
    out.StopJob: NodeServer._stop_job,
    out.FailJob: NodeServer._fail_job,
}
