"""A simulated cluster: N real `Machine`s in one process over the loopback transport.

    Process --datagrams--> SimulatedNode(Machine) --encoded batches--> LoopbackNetwork(reorder)
       ^------ datagrams, task channel, fake shared memory ------'

What is real: every machine, the protocol's bytes, the control transport, `node/transfers.py`.
What is not: processes (`testing/processes.py`), shared memory (byte arrays), time, and forks.
Order is drawn from one seeded generator, so a failure is repeated by its seed.

`run_until_quiet` ends when nothing can happen any more. If somebody still waits then, that is a
hang: it raises `Stuck` with the seed and the state of everybody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from hpcray.node import outbox as out
from hpcray.node.inbox import Inboxes
from hpcray.node.machine import Machine
from hpcray.node.records import DRIVER
from hpcray.node.transfers import Transfers
from hpcray.protocol import messages, values
from hpcray.protocol import messages as m
from hpcray.protocol.sizes import parts
from hpcray.testing.clients import DATAGRAM_BYTES, Script
from hpcray.testing.history import History
from hpcray.testing.memory import Arena
from hpcray.testing.processes import Process
from hpcray.testing.world import Fault, World, short
from hpcray.transport.base import DataCancelled, DataReceived, DataSent, PeerLost, Received
from hpcray.transport.loopback import LoopbackNetwork

ROUND_S = 0.0001
# Longer than any timeout of the machines (memory waits 2 s): after it nothing more comes.
QUIET_S = 3.0
# Small, so that many processes share a small store without moving megabytes.
SEGMENT_BYTES = 16 * 1024
_BACKGROUND = (m.Load, m.Demand, m.Grant, m.GrantUnused)


class Stuck(AssertionError):
    """Somebody waits and nothing can happen any more; or it does not end."""


class _Segments:
    """Stands for `node.transfers.Segments`, over byte arrays."""

    def __init__(self, node: SimulatedNode) -> None:
        self._node = node
        self.arena = Arena()

    def create_own(self, segment: int, nbytes: int) -> None:
        self._node.memory[segment] = memoryview(bytearray(nbytes))
        self.arena.add(segment, self._node.memory[segment], nbytes)

    def view(self, location: m.Located) -> memoryview:
        memory = self._node.memory[location.segment]
        return memory[location.offset : location.offset + location.nbytes]


class SimulatedNode:
    """A machine and the loop around it."""

    def __init__(
        self, cluster: SimulatedCluster, rank: int, resources: dict[str, int], capacity_bytes: int
    ) -> None:
        self.cluster = cluster
        self.rank = rank
        self.machine = Machine(
            rank, cluster.world.size, resources, capacity_bytes, cluster.world.job_id,
            {"job_key": "00"})
        self.machine.memory.budget.minimum_segment_bytes = SEGMENT_BYTES
        self.transport = cluster.network.transport(rank)
        self.memory: dict[int, memoryview] = {}
        self.segments = _Segments(self)
        self.transfers = Transfers(
            self.machine.pulls, self.machine.outbox,
            self.segments, self.transport, set())  # type: ignore[arg-type]
        self.processes: dict[int, Process] = {}
        self.sockets: dict[int, deque[bytes]] = {}
        self.inboxes = Inboxes(self._read, self.machine.client_messages)
        self.notices: list[str] = []
        self.failed = ""  # why the job cannot go on, if it has said so
        self._dead: list[Process] = []
        self._to_kill: list[int] = []
        self._to_peers: dict[int, list[Any]] = {}
        self._next_tick_s = 0.0

    def from_client(self, number: int, datagram: bytes) -> None:
        self.sockets[number].append(datagram)

    def exited(self, process: Process) -> None:
        self._dead.append(process)

    @property
    def busy(self) -> bool:
        return bool(self._dead or self._to_kill) or any(self.sockets.values())

    def step(self) -> bool:
        cluster = self.cluster
        machine = self.machine
        rng = cluster.world.rng
        progress = False
        for number in self._to_kill:
            process = self.processes.get(number)
            if process is not None and process.alive:
                process.die()
        self._to_kill.clear()
        numbers = [n for n, box in self.sockets.items() if box]
        rng.shuffle(numbers)
        for number in numbers:
            box = self.sockets[number]
            for _ in range(rng.randint(0, len(box))):
                progress = self._read(number) or progress
            self.inboxes.handle_all(number)
        for event in self.transport.poll():
            progress = self._on_transport(event) or progress
        self._reap()
        if cluster.world.now_s >= self._next_tick_s:
            self._next_tick_s = cluster.world.now_s + (0.01 if machine.wants_ticks else 1.0)
            machine.tick(cluster.world.now_s)
        elif machine.wants_ticks:
            self._next_tick_s = min(self._next_tick_s, cluster.world.now_s + 0.01)
        for _ in range(8):
            machine.end_turn(cluster.world.now_s)
            if not self._carry_out():
                break
            progress = True
        for rank, batch in self._to_peers.items():
            if rank not in machine.membership.lost:
                self.transport.send(rank, messages.encode(batch))
        self._to_peers.clear()
        self.transport.flush()
        if cluster.validating:
            machine.validate()
        return progress

    def _read(self, number: int) -> bool:
        box = self.sockets[number]
        if not box:
            return False
        # Now and then more than one, as from a real socket.
        for _ in range(len(box) if self.cluster.world.rng.random() < 0.3 else 1):
            self.inboxes.of[number].batches.append(messages.decode_to_node(box.popleft()))
        return True

    def _reap(self) -> None:
        """As the real node: a dead worker's channel is read dry first, and then its callers'."""
        still = []
        for process in self._dead:
            number = process.number
            if self.sockets[number]:
                still.append(process)
                continue
            for caller in self.machine.may_have_called(number):
                while self._read(caller):
                    self.inboxes.handle_all(caller)
            del self.processes[number], self.sockets[number], self.inboxes.of[number]
            self.cluster.forget(process)
            self.machine.worker_exited(number, values.Failure(
                "WorkerCrashedError", f"the worker exited with {process.exit_status}"))
        self._dead = still

    def _on_transport(self, event: Any) -> bool:
        kind = type(event)
        if kind is Received:
            rest: list[Any] = []
            progress = False
            for message in messages.decode_to_peer(event.payload):
                progress = progress or not isinstance(message, _BACKGROUND)
                if type(message) is m.PullRefused:
                    self.transfers.refused(message.transfer)
                else:
                    rest.append(message)
            if rest:
                self.machine.peer_messages(event.rank, rest)
            return progress
        if kind is DataReceived:
            self.transfers.received(event.transfer)
        elif kind is DataSent:
            self.transfers.sent(event.rank, event.transfer)
        elif kind is DataCancelled:
            self.transfers.cancelled(event.transfer)
        elif kind is PeerLost:
            self.machine.node_lost(event.rank, event.reason)
        return True

    def _carry_out(self) -> bool:
        box = self.machine.outbox
        box.interrupts.clear()  # simulated processes read their messages anyway
        for number, batch in list(box.clients.items()):
            process = self.processes.get(number)
            if batch and process is not None and process.alive:
                for datagram in parts(batch, messages.encode, DATAGRAM_BYTES):
                    process.inbox.append((datagram, []))
        box.clients.clear()
        tasks, box.tasks = box.tasks, []
        for number, batch in tasks:
            self._send_tasks(number, batch)
        again = False
        while box.actions:
            actions, box.actions = box.actions, []
            for action in actions:
                again = True
                self._act(action)
        self.notices += box.notices + box.own_notices
        box.notices.clear()
        box.own_notices.clear()
        for rank, batch in box.peers.items():
            self._to_peers.setdefault(rank, []).extend(batch)
        box.peers.clear()
        return again

    @staticmethod
    def _tell(process: Process, message: Any, descriptor: Any) -> None:
        """A message with a descriptor, which is simply what it would stand for."""
        process.inbox.append((messages.encode([message]), [descriptor]))

    def _send_tasks(self, number: int, batch: list[Any]) -> None:
        process = self.processes.get(number)
        if process is not None and process.alive:
            process.tasks.append(messages.encode(batch))

    def _act(self, action: Any) -> None:
        machine = self.machine
        kind = type(action)
        if kind is out.StartWorker:
            machine.connect(action.number)
            self.cluster.add_process(self, action.number)
        elif kind is out.KillWorker:
            self._to_kill.append(action.number)
        elif kind is out.TakeBack:
            process = self.processes.get(action.number)
            if process is None or not process.alive:
                return
            # Node and worker may draw from the queue in turn: it keeps what it drew.
            datagrams = list(process.tasks)
            kept: deque[bytes] = deque()
            if len(datagrams) > 1 and self.cluster.world.rng.random() < 0.5:
                kept.append(datagrams.pop(self.cluster.world.rng.randrange(len(datagrams))))
            process.tasks = kept
            taken = []
            for datagram in datagrams:
                for message in messages.decode_to_worker(datagram):
                    if type(message) is m.Run:
                        taken.append(message.task_id)
                    else:
                        self._send_tasks(action.number, [message])
            machine.dispatcher.taken_back(action.number, taken)
        elif kind is out.GrantSegment:
            process = self.processes.get(action.client)
            if process is None or not process.alive:
                return
            memory = self.memory[action.segment] = memoryview(bytearray(action.nbytes))
            self._tell(process, m.SegmentGrant(action.segment, action.nbytes), memory)
        elif kind is out.OpenSegment:
            process = self.processes.get(action.client)
            if process is not None and process.alive:
                memory = self.memory[action.segment]
                self._tell(process, m.SegmentOpened(action.segment, len(memory)), memory)
        elif kind is out.Introduce:
            process = self.processes.get(action.worker)
            if process is not None and process.alive and action.client in self.processes:
                self._tell(process, m.ChannelOf(action.client), ("inbox", action.client))
        elif kind is out.IntroduceActor:
            process = self.processes.get(action.client)
            if process is not None and process.alive:
                self._tell(process, m.ActorChannel(action.actor_id, action.worker),
                           ("tasks", action.worker))
        elif kind is out.CloseSegment:
            for record in machine.directory.records.values():
                if record.location is not None and record.location.segment == action.segment:
                    self.cluster.world.fault(f"segment {action.segment} closed under {record}")
            self.memory.pop(action.segment, None)
            if self.segments.arena.has(action.segment):
                self.segments.arena.remove(action.segment)
        elif kind is out.FreeNodeRange:
            if self.segments.arena.has(action.segment):
                self.segments.arena.release(action.segment, action.offset)
        elif kind is out.StartPull:
            self.transfers.start(action)
        elif kind is out.ServePull:
            self.transfers.serve(action)
        elif kind is out.FailJob:
            self.failed = self.failed or action.why

    def leftovers(self) -> list[str]:
        """What should not be there once nobody refers to anything."""
        machine = self.machine
        found: list[str] = []

        def check(what: str, thing: Any) -> None:
            if thing:
                found.append(f"rank {self.rank}: {what}: {thing!r}"[:1500])

        check("objects", list(machine.directory.records.values()))
        check("tasks", list(machine.tasks.records.values()))
        check("handovers", machine.directory._handovers)
        check("reports held back", not machine.directory.holders.idle)
        check("ranges in use", machine.memory._live)
        check("object bytes", machine.memory.object_bytes)
        check("transfers", self.transfers.active)
        check("queued", machine.dispatcher.queued())
        check("piled", machine.dispatcher.piled)
        check("hosted actors", list(machine.tables.hosted))
        check("actor homes", [(h.actor_id.hex(), h.state.name)
                              for h in machine.tables.homes.values()])
        check("routes", [(r.actor_id.hex(), r.state.name, r.sent)
                         for r in machine.tables.routes.values()])
        check("leases", machine.cluster._leases)
        check("bundles", machine.bundles.held)
        check("streams", list(machine.streams.records))
        check("names", list(machine.requests.names.entries))
        check("look-ups", machine.requests._look_ups)
        check("function waits", machine._function_waits)
        check("requests for memory", machine.memory._waiting)
        for client in machine.clients.values():
            check(f"held by client {client.number}", [short(i) for i in client.held])
            check(f"pinned by client {client.number}", client.pins)
        ledger = machine.dispatcher.ledger
        if ledger.free != ledger.total:
            found.append(f"rank {self.rank}: free {ledger.free} of {ledger.total}")
        for process in self.processes.values():
            check(f"arena of {process!r}", process.arena.used_bytes)
        check("arena of the node", self.segments.arena.used_bytes)
        return found


class SimulatedCluster:
    """See the module. `bodies` maps names to task, constructor and method bodies."""

    def __init__(
        self, size: int, bodies: dict[str, Callable[..., Any]], *, seed: int, cpus: int = 2,
        capacity_bytes: int = 8 << 20, reorder: bool = True, validating: bool = True,
        lazy: float = 0.2, time_scale: float = 1.0, resources: dict[str, int] | None = None,
        labels: dict[int, dict[str, str]] | None = None,
    ) -> None:
        self.world = World(size, seed, time_scale)
        self.history = History(self.world.fault)
        self.bodies = bodies
        self.validating = validating
        # The chance that somebody is not scheduled in a round.
        self.lazy = lazy
        # Per round: the chance that some busy worker is killed.
        self.death_rate = 0.0
        self.deaths = 0
        self.network = LoopbackNetwork(size, seed=seed, reorder=reorder)
        self.processes: dict[tuple[int, int], Process] = {}
        offered = {"CPU": cpus * m.UNIT, **(resources or {})}
        self.nodes = [SimulatedNode(self, rank, dict(offered), capacity_bytes)
                      for rank in range(size)]
        joined = [m.Joined(rank, f"host{rank}", "", rank, tuple(sorted(offered.items())),
                           tuple(sorted((labels or {}).get(rank, {}).items())))
                  for rank in range(size)]
        for node in self.nodes:
            for one in joined:
                node.machine.joined(one)
            node.machine.dispatcher.start_workers(cpus)
        head = self.nodes[0]
        head.machine.connect(DRIVER)
        self.driver = self.add_process(head, DRIVER)
        head.machine.welcome(DRIVER)

    @property
    def now_s(self) -> float:
        return self.world.now_s

    def add_process(self, node: SimulatedNode, number: int) -> Process:
        process = node.processes[number] = Process(
            self.world, self.history, self.bodies, node.rank, number,
            neighbours=node.processes, send=partial(node.from_client, number),
            exited=node.exited)
        node.sockets[number] = deque()
        node.inboxes.add(number)
        self.processes[(node.rank, number)] = process
        if number != DRIVER:
            process.outbox.append(m.Hello(1000 + number))
        return process

    def forget(self, process: Process) -> None:
        self.processes.pop((process.rank, process.number), None)

    # --- running ----------------------------------------

    def round(self) -> bool:
        """Everybody may do one thing, in a random order; whether anybody did."""
        rng = self.world.rng
        self.world.now_s += ROUND_S
        if self.death_rate and rng.random() < self.death_rate:
            self.kill_some_worker()
        things: list[SimulatedNode | Process] = [*self.nodes, *self.processes.values()]
        if self.lazy:
            rng.shuffle(things)
        progress = False
        for thing in things:
            if self.lazy and rng.random() < self.lazy:
                continue
            try:
                progress = thing.step() or progress
            except Exception as error:
                error.add_note(f"seed {self.world.seed}, {self.world.now_s:.4f} s, {thing!r}")
                raise
        return progress

    def kill_some_worker(self) -> None:
        busy = [p for p in self.processes.values() if p.number != DRIVER and p.alive and p.busy]
        if busy:
            # Rather one in the middle of what passes by its node.
            self.world.rng.choice([p for p in busy if p.due or (p.run and p.run.sender >= 0)]
                            or busy).die()
            self.deaths += 1

    def lose_node(self, rank: int) -> None:
        """The node and its processes end at once; the others' transports find out."""
        self.network.kill(rank)
        self.nodes = [node for node in self.nodes if node.rank != rank]
        for key in [key for key in self.processes if key[0] == rank]:
            del self.processes[key]

    @property
    def idle(self) -> bool:
        """Nothing is under way: only time can bring anything."""
        return self.network.quiet and not any(n.busy or n.transfers.active for n in self.nodes) \
            and not any(p.runnable for p in self.processes.values())

    def run_until_quiet(self, *, max_rounds: int = 200_000, max_s: float = 600.0) -> None:
        """Until nothing can happen any more.

        Raises:
          Stuck: somebody waits for ever, or it does not become quiet within the bounds.
        """
        last_s = self.world.now_s
        end_s = self.world.now_s + max_s
        for _ in range(max_rounds):
            if self.round():
                last_s = self.world.now_s
            elif self.idle:
                wakes = [p.wake_s for p in self.processes.values()
                         if p.wake_s is not None and p.alive]
                if wakes:
                    last_s = self.world.now_s
                    self.world.now_s = max(min([*wakes, self.world.now_s + 0.01]), self.world.now_s)
                elif self.world.now_s - last_s > QUIET_S:
                    self._check_nobody_waits()
                    return
                else:
                    wanted = any(n.machine.wants_ticks for n in self.nodes)
                    self.world.now_s += 0.01 if wanted else 0.5
            if self.world.now_s > end_s:
                break
        raise Stuck(f"seed {self.world.seed}: not quiet after {self.now_s:.2f} s\n"
                    f"{self.describe()}")

    def _check_nobody_waits(self) -> None:
        waiting = [p for p in self.processes.values() if p.script is not None]
        if waiting:
            raise Stuck(f"seed {self.world.seed}: nothing can happen any more, but "
                        f"{len(waiting)} wait\n{self.describe()}")

    def run(self, script: Script) -> None:
        """Run a driver's program to its end, then on until nothing happens any more."""
        self.driver.start(script)
        del script
        self.run_until_quiet()

    def describe(self) -> str:
        lines = [repr(p) for p in self.processes.values() if p.script is not None]
        for node in self.nodes:
            lines += node.leftovers()
        return "\n".join(lines)

    def check_nothing_is_left(self) -> None:
        found = [line for node in self.nodes for line in node.leftovers()]
        if found:
            raise Fault(
                f"seed {self.world.seed}: left when all refs are gone:\n" + "\n".join(found))
