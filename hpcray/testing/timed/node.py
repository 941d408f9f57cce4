"""A node in virtual time: a real machine, and a loop that goes round as `node/server.py` does.

    hear clients --> hear peers --> machine.end_turn --> carry out --> (time passes) --> what leaves

A turn costs what the messages in it cost (`costs.py`), and what it decided leaves when that time
has passed. A node that has nothing to do looks at MPI as seldom as a real one, so a frame may lie
there for a while; looks that find nothing are not counted as work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from hpcray.node import outbox as out
from hpcray.node import server
from hpcray.node.connections import _DATAGRAMS_PER_TURN, _LIKELY_MORE_BYTES
from hpcray.node.journal import Journal
from hpcray.node.machine import Machine
from hpcray.protocol import messages, sizes, values
from hpcray.protocol import messages as m
from hpcray.testing.timed.clock import Running, World
from hpcray.testing.timed.costs import PER_OBJECT, weight
from hpcray.testing.timed.process import Process, Program
from hpcray.transport.base import Received
from hpcray.transport.peers import Outgoing, Peers

# As `transport/mpi.py`, which cannot be imported where there is no MPI.
FRAMES_PER_POLL = 64
# A frame is late by up to this share of its latency; drawn from the seed.
_JITTER = 0.5
_CAPACITY_BYTES = 8 << 30


class Node(Running):
    def __init__(
        self, world: World, rank: int, offered: dict[str, int],
        child: Callable[[Process, int, int], Program],
    ) -> None:
        """`child`: the program of a task that submits others."""
        super().__init__(world)
        self.rank = rank
        self.machine = Machine(
            rank, world.size, offered, _CAPACITY_BYTES, world.job_id, world.session)
        self.processes: dict[int, Process] = {}
        self._child = child
        self._journal = Journal(world.notices.append)
        self._peers = Peers(rank, world.size)
        self._sockets: dict[int, deque[bytes]] = {}
        self._readable: dict[int, None] = {}
        self._frames: deque[tuple[int, bytes]] = deque()
        self._dead: list[int] = []
        self._last_mpi_s = 0.0
        self._next_tick_s = 0.0
        self._zygote_free_s = 0.0
        # Of this turn: what the machine's part costs, but for the factor, and what the rest; and
        # what leaves at its end.
        self._machine_s = 0.0
        self._rest_s = 0.0
        self._to_clients: list[tuple[int, bytes]] = []
        self._to_workers: list[tuple[Process, bytes]] = []
        self._to_network: list[Outgoing] = []
        self._to_start: list[int] = []

    def add_process(self, number: int) -> Process:
        process = self.processes[number] = Process(self.world, self, number)
        process.child = self._child
        self._sockets[number] = deque()
        return process

    # --- what reaches it ----------------------------------------

    def from_client(self, number: int, datagram: bytes) -> None:
        self._sockets[number].append(datagram)
        self._readable[number] = None
        self.wake(self.world.clock.now_s)

    def from_network(self, rank: int, frame: bytes) -> None:
        self._frames.append((rank, frame))
        now_s = self.world.clock.now_s
        if now_s >= self.free_s:  # it sleeps, and looks at MPI now and then
            now_s += self._look_s(now_s) * self.world.rng.random()
        self.wake(now_s)

    def exited(self, number: int) -> None:
        self._dead.append(number)
        self.wake(self.world.clock.now_s)

    def _look_s(self, now_s: float) -> float:
        quiet_s = now_s - self._last_mpi_s
        for since_s, wait_s in server._MPI_WAITS_S:
            if quiet_s < since_s:
                return wait_s
        return server._MPI_QUIET_WAIT_S

    # --- a turn ----------------------------------------

    def step(self, now_s: float) -> None:
        costs = self.world.costs.node
        machine = self.machine
        self._machine_s = self._rest_s = 0.0
        events = self._hear_clients() | self._hear_peers(now_s)
        if self._dead:
            self._reap()
            events = True
        if events or now_s >= self._next_tick_s or now_s >= machine.due_s:
            self.usage.turns += 1
            self._rest_s += costs.turn_s
            if self.world.size > 1:
                self._rest_s += costs.poll_s
            if now_s >= self._next_tick_s:
                self._tick(machine, now_s)
            elif self._next_tick_s > now_s + server._TICK_S:
                self._next_tick_s = now_s + server._TICK_S
            for _ in range(8):
                self._decide(machine, now_s)
                if not self._carry_out(machine):
                    break
            self._send_to_peers(machine, now_s)
        usage = self.usage
        usage.counted_s += self._machine_s * costs.factor
        machine_s = self._machine_part()
        usage.frames_sent += len(self._to_network)
        self._rest_s += len(self._to_network) * costs.frame_sent_s
        usage.spent(now_s, machine_s + self._rest_s)
        self.free_s = now_s + machine_s + self._rest_s
        self._let_leave(self.free_s)
        if self._readable or self._frames or self._dead:
            self.wake(self.free_s)
        elif self._peers.restless:
            self.wake(self.free_s + self._look_s(self.free_s))
        self.wake(min(self._next_tick_s, machine.due_s))

    def _machine_part(self) -> float:
        """What the machine's own code costs in this turn."""
        return self._machine_s * self.world.costs.node.factor

    def _hear_clients(self) -> bool:
        if not self._readable:
            return False
        readable, self._readable = self._readable, {}
        for number in readable:
            box = self._sockets.get(number)
            if box is None:
                continue  # it is gone
            for _ in range(_DATAGRAMS_PER_TURN):
                datagram = box.popleft()
                self.usage.datagrams_received += 1
                self._rest_s += self.world.costs.node.datagram_received_s
                self._handle_datagram(number, datagram)
                if not box or len(datagram) < _LIKELY_MORE_BYTES:
                    break
            if box:
                self._readable[number] = None
        return True

    def _handle_datagram(self, number: int, datagram: bytes) -> None:
        batch = messages.decode_to_node(datagram)
        self._count_received(batch)
        self.machine.client_messages(number, batch)

    def _hear_peers(self, now_s: float) -> bool:
        events: list[Any] = []
        count = min(len(self._frames), FRAMES_PER_POLL)
        for _ in range(count):
            self._peers.arrived(*self._frames.popleft(), events)
        self.usage.frames_received += count
        self._rest_s += count * self.world.costs.node.frame_received_s
        self._to_network += self._peers.end_poll(events)
        for event in events:
            assert type(event) is Received
            if server._is_talk(self._handle_payload(event.rank, event.payload)):
                self._last_mpi_s = now_s
        return bool(events)

    def _handle_payload(self, rank: int, payload: bytes) -> list[Any]:
        batch = messages.decode_to_peer(payload)
        self._count_received(batch)
        self.machine.peer_messages(rank, batch)
        return batch

    def _count_received(self, batch: list[Any]) -> None:
        prices = self.world.received_prices
        received = self.usage.received
        cost_s = 0.0
        for message in batch:
            kind = type(message)
            count = weight(message) if kind in PER_OBJECT else 1
            received[kind] += count
            cost_s += prices[kind] * count
        self._machine_s += cost_s

    def _tick(self, machine: Machine, now_s: float) -> None:
        machine.tick(now_s)
        self._journal.record(machine)  # without a store, so nothing is written
        self._next_tick_s = now_s + (
            server._TICK_S if machine.wants_ticks else server._SLOW_TICK_S)

    def _decide(self, machine: Machine, now_s: float) -> None:
        box = machine.outbox
        before = _messages_in(box)
        self._end_turn(machine, now_s)
        decided = _messages_in(box) - before
        self.usage.decided += decided
        self._machine_s += decided * self.world.costs.node.decided_s

    def _end_turn(self, machine: Machine, now_s: float) -> None:
        machine.end_turn(now_s)

    # --- carrying out ----------------------------------------

    def _carry_out(self, machine: Machine) -> bool:
        """Whether it should decide again."""
        box = machine.outbox
        box.interrupts.clear()
        for number, batch in box.clients.items():
            if batch and number in self.processes:
                for datagram in self._encode(batch):
                    self._sends()
                    self._to_clients.append((number, datagram))
        box.clients.clear()
        tasks, box.tasks = box.tasks, []
        for number, batch in tasks:
            self._send_tasks(number, batch)
        again = bool(box.actions)
        while box.actions:
            actions, box.actions = box.actions, []
            for action in actions:
                self._act(machine, action)
        self.world.notices += box.notices + box.own_notices
        box.notices.clear()
        box.own_notices.clear()
        return again

    def _send_tasks(self, number: int, batch: list[Any]) -> None:
        process = self.processes.get(number)
        if process is not None:
            for datagram in self._encode(batch):
                self._sends()
                self._to_workers.append((process, datagram))

    def _sends(self) -> None:
        self.usage.datagrams_sent += 1
        self._rest_s += self.world.costs.node.datagram_sent_s

    def _send_to_peers(self, machine: Machine, now_s: float) -> None:
        for rank, batch in machine.outbox.peers.items():
            for start in range(0, len(batch), server._SMALL_BATCH):
                for payload in self._encode(batch[start : start + server._SMALL_BATCH]):
                    self._peers.send(rank, payload)
            if server._is_talk(batch):
                self._last_mpi_s = now_s
        machine.outbox.peers.clear()
        self._to_network += self._peers.flush()

    def _encode(self, batch: list[Any]) -> Iterable[bytes]:
        prices = self.world.sent_prices
        sent = self.usage.sent
        cost_s = 0.0
        for message in batch:
            kind = type(message)
            sent[kind] += 1
            cost_s += prices[kind]
        self._machine_s += cost_s
        encoded = messages.encode(batch)
        if len(encoded) <= sizes.DATAGRAM_MAX_BYTES:
            return (encoded,)
        return sizes.parts(batch, messages.encode)

    def _act(self, machine: Machine, action: out.Action) -> None:
        if isinstance(action, out.StartWorker):
            machine.connect(action.number)
            self.add_process(action.number)
            self._to_start.append(action.number)
        elif isinstance(action, out.TakeBack):
            self._take_back(machine, action.number)
        elif isinstance(action, out.KillWorker):
            process = self.processes.get(action.number)
            if process is not None:
                process.die()
        elif not isinstance(action, out.Introduce | out.IntroduceActor):
            raise AssertionError(f"simulated tasks have no need of a {type(action).__name__}")

    def _take_back(self, machine: Machine, number: int) -> None:
        process = self.processes.get(number)
        if process is None:
            return
        unread = [datagram for _, datagram in process.unread]
        unread += [datagram for other, datagram in self._to_workers if other is process]
        self._to_workers = [pair for pair in self._to_workers if pair[0] is not process]
        process.unread.clear()
        self.usage.datagrams_received += len(unread) + 1  # until there is nothing more
        self._rest_s += (len(unread) + 1) * self.world.costs.node.datagram_received_s
        taken = []
        for datagram in unread:
            for message in messages.decode_to_worker(datagram):
                if type(message) is m.Run:
                    taken.append(message.task_id)
                else:
                    self._send_tasks(number, [message])
        machine.dispatcher.taken_back(number, taken)

    def _let_leave(self, end_s: float) -> None:
        """What the turn has decided."""
        world = self.world
        wire = world.costs.wire
        arrives_s = end_s + wire.local_s
        for number, datagram in self._to_clients:
            process = self.processes.get(number)
            if process is not None:
                world.clock.at(arrives_s, process.from_node, datagram)
        for process, datagram in self._to_workers:
            process.unread.append((arrives_s, datagram))
            process.wake(arrives_s)
        for rank, frame in self._to_network:
            self.usage.frame_bytes += len(frame)
            flight_s = (wire.latency_s * (1 + _JITTER * world.rng.random())
                        + len(frame) / wire.bytes_per_s)
            world.clock.at(end_s + flight_s, world.to_node[rank], self.rank, frame)
        for number in self._to_start:  # the zygote forks one after the other
            self._zygote_free_s = max(self._zygote_free_s, end_s) + world.costs.client.start_s
            world.clock.at(self._zygote_free_s, self.processes[number].say_hello)
        self._to_clients.clear()
        self._to_workers.clear()
        self._to_network.clear()
        self._to_start.clear()

    def _reap(self) -> None:
        dead, self._dead = self._dead, []
        for number in dead:
            if self._sockets[number]:
                self._dead.append(number)  # once all that it said is heard
                continue
            del self.processes[number], self._sockets[number]
            self.machine.worker_exited(number, values.Failure(
                "WorkerCrashedError", "the simulated worker was told to end"))


def _messages_in(box: out.Outbox) -> int:
    return (sum(map(len, box.clients.values())) + sum(map(len, box.peers.values()))
            + sum(len(batch) for _, batch in box.tasks))
