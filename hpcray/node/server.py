"""The node's loop: what happens becomes events for the machine, what it wants is carried out.

    drain sockets --> drain MPI --> machine.end_turn --> carry out --> wait
      clients           frames                            messages, datagrams, forks,
      zygote            data                              segments, transfers
      worker output

One thread; no call in it blocks. Waiting: in `epoll` until something happens on this host; with
other ranks at most 50 us to 20 ms, by how long ago anything was said that leads to more, because
MPI has no descriptor to wait for; not at all while data is moving.

What a job's life is, node/job.py says: this carries it out.
"""

from __future__ import annotations

import contextlib
import gc
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
from hpcray.node import beginning
from hpcray.node import outbox as out
from hpcray.node.connections import Connection, Connections
from hpcray.node.job import ENDING, JOINING, LEFT, RUNNING, JobLife
from hpcray.node.journal import Journal
from hpcray.node.local_workers import LocalWorkers
from hpcray.node.machine import Machine
from hpcray.node.output import WorkerOutput
from hpcray.node.pool import WorkerPool
from hpcray.node.processes import process_state
from hpcray.node.records import DRIVER
from hpcray.node.transfers import Segments, Transfers, ranks_to_map
from hpcray.node.watcher import Watcher
from hpcray.objects.budget import MINIMUM_SEGMENT_BYTES
from hpcray.protocol import ids, messages, sizes
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

class NodeServer:
    __slots__ = (
        "_connections", "_driver", "_job", "_journal", "_last_mpi_s", "_last_words", "_machine",
        "_me", "_next_due_s", "_next_journal_s", "_next_tick_s", "_notices", "_output",
        "_own_end_done", "_packages", "_postponed", "_segments", "_spin", "_to_peers",
        "_told_short", "_transfers", "_transport", "_unsent", "_watcher", "_workers",
        "_zygote_patience", "drop_shared_files", "rank", "size",
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
        self._spin = spin
        # Warnings from before there was anybody to show them to; the journal goes on adding.
        self._notices = notices if notices is not None else []
        self._watcher = Watcher()
        self._connections = Connections(self._watcher, pool, self._handle)
        self._output = WorkerOutput(self.rank, self._connections, self._to_node0)
        self._last_words = last_words
        self._job = self._new_life(job_key)
        self._workers = LocalWorkers(
            self.rank, joined.host, pool, self._watcher, self._connections, self._output,
            self._read_client)
        self._machine: Machine | None = None
        self._segments = Segments()
        self._transfers: Transfers | None = None
        # Called once the job ends for good: who kills all of it then may kill the watchdog as well.
        self.drop_shared_files: Callable[[], None] = lambda: None
        self._packages = ""
        self._last_mpi_s = time.monotonic()
        self._next_tick_s = 0.0
        # Until then a turn without events would do nothing.
        self._next_due_s = 0.0
        self._next_journal_s = 0.0
        self._own_end_done = False
        self._zygote_patience = Patience(_ZYGOTE_SILENT_S)
        self._to_peers: dict[int, list[Any]] = {}  # of this turn
        # What waits for slow peers, as messages: they share their values with the records.
        self._unsent: dict[int, deque[Any]] = {}
        # Actions that this host was too short of something for; again at the next tick.
        self._postponed: list[out.Action] = []
        self._told_short = False
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
        self._job.start(time.monotonic())
        transport = self._transport
        watcher = self._watcher
        job = self._job
        while job.state != LEFT:
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
                elif not events and now_s < self._next_due_s and job.state == RUNNING:
                    continue  # one of the many looks at MPI that find nothing
            if not events and self._segments.touching:
                self._segments.touch_some()
            if self._workers.dead:
                self._workers.reap()
            self._turn(now_s)
        signal.set_wakeup_fd(-1)
        os.close(wake_read)
        os.close(wake_write)
        return job.exit_status

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
        if self._notices and self._job.state == RUNNING:
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
        elif self._job.state == JOINING:
            self._job.tell_late(now_s)
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
            elif self.size > 1 and machine.cluster.due_s < due_s:
                due_s = machine.cluster.due_s
        if self._job.state == ENDING:
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
        self._job.end(park=action.park)

    # --- what happens on this host ----------------------------------------------------------------

    def _on_signal(self, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            if signal.SIGTERM in os.read(fd, 4096):
                self._job.terminate("SIGTERM")

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
                    self._job.driver_wants({**(message.config or {}), "driver_pid": message.pid})
                elif type(message) is messages.EndJob:
                    self._job.end(park=message.park)

    def _driver_gone(self) -> None:
        connection = self._connections.pop(DRIVER)
        assert connection is not None
        if connection.fault:  # to our own stderr: the driver may not read any more
            self._output.notice(
                f"Error: the driver is disconnected and the job ends: {connection.fault}")
        self._watcher.unwatch(connection.socket.fileno())
        connection.socket.close()
        self._driver = None
        self._job.driver_gone(launched=self._transport is not None)

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
        prefix = self._job.epoch.to_bytes(4, "little")
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
        ahead_bytes = _AHEAD_BYTES if self._job.state in (JOINING, RUNNING) else 1 << 60
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
            if kind is messages.PeerOutput:
                self._output.from_peer(rank, message)
            elif kind is messages.PullRefused:
                if self._transfers is not None:
                    self._transfers.refused(message.transfer)
            elif kind is messages.PullMapped:
                if self._transfers is not None:
                    self._transfers.mapped(rank, message)
            else:
                rest.append(message)
        if rest:
            self._job.on_peer(rank, epoch, rest)

    def _deliver(self, rank: int, batch: list[Any]) -> None:
        assert self._machine is not None
        self._machine.peer_messages(rank, batch)

    def _peer_lost(self, event: PeerLost) -> None:
        if self._job.lost(event.rank, event.reason):
            assert self._machine is not None
            self._machine.node_lost(event.rank, event.reason)

    def _fail_job(self, _machine: Machine, action: out.FailJob) -> None:
        self._job.fail(action.why)

    # --- the job's life ---------------------------------------------------------------------------

    def _new_life(self, job_key: bytes) -> JobLife:
        job = JobLife(self._me, self.size, job_key)
        job.to_peer = lambda rank, message: self._to_peer(rank, [message])
        job.to_driver = lambda message: self._connections.send(DRIVER, [message])
        job.pass_on = lambda message: self._pass_on(
            job.epoch.to_bytes(4, "little") + messages.encode([message]))
        job.notice = lambda text: self._output.notice(text)
        job.say_last = self._say_last
        job.who_ends = self._last_words.who
        job.secret = partial(secrets.token_bytes, 32)
        job.control_address = self._journal.address_bytes
        job.begin = self._begin
        job.deliver = self._deliver
        job.end_here = self._end_here
        return job

    @property
    def exit_status(self) -> int:
        return self._job.exit_status

    @property
    def left_behind(self) -> tuple[int, ...]:
        """Ranks that did not say within the time that they have ended: MPI_Finalize would wait."""
        return self._job.left_behind

    def _say_last(self, text: str) -> None:
        self._output.flush()
        self._last_words.say(text)

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
        self._next_tick_s = 0.0
        machine.dispatcher.start_workers(
            min(max(mine.get("CPU", 0) // messages.UNIT, 1), 16))

        if self.rank == 0:
            machine.connect(DRIVER)
            machine.clients[DRIVER].pid = config["driver_pid"]
            machine.welcome(DRIVER)

    def _end_here(self, park: bool) -> None:
        """The job ends: what it has here goes."""
        self._own_end_done = False
        # Nobody needs what has not been sent, but for what people are to see.
        for rank, unsent in self._unsent.items():
            self._unsent[rank] = deque(
                message for message in unsent
                if type(message) in (messages.PeerOutput, messages.Notice))
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
        driver = self._connections.clients.get(DRIVER)
        transport = self._transport
        self._job.step(
            now_s, own_end=self._own_end(now_s), driver_reads=bool(driver and driver.backlog),
            heard=(lambda rank: None) if transport is None else transport.heard)
        self._flush_peers()

    def _own_end(self, now_s: float) -> bool:
        """Whether this node's workers are gone and its journal is written."""
        if self._own_end_done:
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
        self._own_end_done = True
        return True


def _is_talk(batch: list[Any]) -> bool:
    return any(type(message) not in _NOT_TALK for message in batch)


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
