"""NodeMemory: no request for memory is forgotten, no range is lost or given out twice.

NM-1  live counts and object_bytes are those of the objects placed and not freed.
NM-2  every request is answered: granted, denied, or told to look again; so is every pull.
NM-3  the budget's own invariants (SB-1 to SB-4).
NM-4  no segment with an object in it is closed.
NM-5  while a request waits, no process keeps an empty segment: what was freed reaches its owner
      before the question for what it can spare.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpcray.node import outbox as out
from hpcray.node.machine import Machine
from hpcray.objects.budget import NODE
from hpcray.protocol import ids
from hpcray.protocol import messages as m
from hpcray.testing.memory import Arena

CAPACITY_BYTES = 256 * 1024


class MemoryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(0, 1, {}, CAPACITY_BYTES, ids.job_id(1), {})
        self.memory = self.machine.memory
        self.now_s = 0.0
        self.arenas: dict[int, Arena] = {}
        self.node_arena = Arena()
        self.pulls = 0
        self.pulling: set[bytes] = set()  # wait for memory
        self.asking: dict[int, int] = {}  # client -> bytes it waits for
        self.placed: list[tuple[int, m.Located]] = []  # (owner, where)
        self.node_ranges: list[m.Located] = []
        for number in range(4):
            self.join(number)

    def join(self, number: int) -> None:
        self.machine.connect(number)
        self.arenas[number] = Arena()

    def turn(self) -> None:
        self.memory.end_turn()
        self.collect()

    def collect(self) -> None:
        box = self.machine.outbox
        while box.actions or any(box.clients.values()):
            actions, box.actions = box.actions, []
            for action in actions:
                if type(action) is out.GrantSegment:
                    if action.client not in self.arenas:
                        continue  # it died meanwhile
                    nbytes = self.asking.pop(action.client)
                    assert nbytes <= action.nbytes
                    self.arenas[action.client].add(
                        action.segment, memoryview(bytearray(action.nbytes)), action.nbytes)
                    assert self.place(action.client, nbytes)
                elif type(action) is out.StartPull:
                    self.start_pull(action)
                elif type(action) is out.CloseSegment:
                    used = [p for _, p in self.placed if p.segment == action.segment]
                    assert not used, "NM-4"
                    if self.node_arena.has(action.segment):
                        self.node_arena.remove(action.segment)
                elif type(action) is out.FreeNodeRange:
                    if self.node_arena.has(action.segment):
                        self.node_arena.release(action.segment, action.offset)
            clients = {n: list(batch) for n, batch in box.clients.items()}
            box.clients.clear()
            for number, batch in clients.items():
                for message in batch:
                    self.hear(number, message)

    def hear(self, number: int, message: object) -> None:
        arena = self.arenas.get(number)
        if arena is None:
            return
        if type(message) is m.Released:
            for offset in message.offsets:
                arena.release(message.segment, offset)
        elif type(message) is m.SegmentReclaim:
            for segment in arena.empty_segments():
                arena.remove(segment)
                self.memory.returned(self.machine.clients[number], segment)
        elif type(message) is m.SegmentDenied:
            nbytes = self.asking.pop(number)
            if message.retry and not self.place(number, nbytes):
                self.asking[number] = nbytes
                self.memory.request(self.machine.clients[number], nbytes, self.now_s)

    def place(self, number: int, nbytes: int) -> bool:
        found = self.arenas[number].allocate(nbytes)
        if found is None:
            return False
        location = m.Located(found[0], found[1], nbytes)
        self.placed.append((number, location))
        self.memory.used(location)
        return True

    @rule(which=st.integers(0, 3), nbytes=st.sampled_from((1, 20_000, 100_000, 300_000)))
    def write(self, which: int, nbytes: int) -> None:
        number = sorted(self.arenas)[which]
        if number in self.asking or self.place(number, nbytes):
            return
        self.asking[number] = nbytes
        self.memory.request(self.machine.clients[number], nbytes, self.now_s)
        self.turn()

    @precondition(lambda self: self.placed)
    @rule(data=st.data(), turn=st.booleans())
    def free(self, data: st.DataObject, turn: bool) -> None:
        _, location = self.placed.pop(data.draw(st.integers(0, len(self.placed) - 1)))
        self.memory.free(location)
        if turn:  # else the next message comes in the same datagram
            self.turn()

    @rule(nbytes=st.sampled_from((1, 3000, 20_000)))
    def pull(self, nbytes: int) -> None:
        """A copy for the node itself, as `Transfers.start` makes room for it."""
        self.turn()  # pulls start in the order of the node's actions
        self.pulls += 1
        self.start_pull(out.StartPull(self.pulls.to_bytes(28, "little"), 1, nbytes))
        self.turn()

    def start_pull(self, pull: out.StartPull) -> None:
        nbytes = pull.nbytes
        found = self.node_arena.allocate(nbytes)
        if found is None:
            granted = self.memory.grant_node(nbytes)
            if granted is None:
                self.pulling.discard(pull.object_id)
                if self.memory.await_room(pull, self.now_s):
                    self.pulling.add(pull.object_id)
                return
            self.node_arena.add(
                granted.segment_id, memoryview(bytearray(granted.nbytes)), granted.nbytes)
            found = self.node_arena.allocate(nbytes)
            assert found is not None
        self.memory.has_room(pull)
        self.pulling.discard(pull.object_id)
        location = m.Located(found[0], found[1], nbytes)
        self.placed.append((-1, location))
        self.memory.used(location)

    @precondition(lambda self: self.arenas)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.arenas)))
        del self.arenas[number]
        self.asking.pop(number, None)
        del self.machine.clients[number]
        self.memory.client_gone(number)
        self.turn()
        self.join(max(self.arenas, default=number) + number + 1)

    @rule(seconds=st.sampled_from((0.1, 3.0)))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.memory.tick(self.now_s)
        self.turn()

    @invariant()
    def books_balance(self) -> None:
        self.memory.budget.validate()  # NM-3
        live: dict[int, int] = {}
        for _, location in self.placed:
            live[location.segment] = live.get(location.segment, 0) + 1
        assert self.memory._live == live, "NM-1"
        assert self.memory.object_bytes == sum(p.nbytes for _, p in self.placed), "NM-1"

    @invariant()
    def nothing_idles_while_somebody_waits(self) -> None:
        if self.memory.waiting and not self.memory.released:
            assert not any(arena.empty_segments() for arena in self.arenas.values()), "NM-5"

    def teardown(self) -> None:
        self.time_passes(3.0)
        self.time_passes(3.0)
        assert not self.asking and not self.pulling, "NM-2"
        assert not self.memory.waiting, "NM-2"
        while self.placed:
            self.memory.free(self.placed.pop()[1])
        self.turn()
        used = sum(a.used_bytes for a in self.arenas.values()) + self.node_arena.used_bytes
        assert used == 0
        # What dead clients left is gone; what the node keeps is its own warm few.
        kept = self.memory.budget.segments_of(NODE)
        assert {s.segment_id for s in kept} <= set(self.memory.node_segments)


TestMemory = MemoryMachine.TestCase
