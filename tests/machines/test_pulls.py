"""Pulls: PU-1 and PU-2, where segments lack, holders refuse and the store is full."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpcray.node import outbox as out
from hpcray.node.memory import NodeMemory
from hpcray.node.outbox import Outbox
from hpcray.node.pulls import Pulls
from hpcray.node.tables import Tables
from hpcray.protocol import ids, values
from hpcray.protocol import messages as m
from hpcray.testing.memory import Arena

CAPACITY_BYTES = 64 * 1024


class PullsMachine(RuleBasedStateMachine):
    """The mover is played here: an arena, and transfers under way."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = Tables(0, 3, ids.job_id(1), {})
        self.outbox = Outbox()
        self.memory = NodeMemory(self.tables, self.outbox, CAPACITY_BYTES)
        self.memory.set_tight = lambda tight: None
        self.pulls = Pulls(self.tables, self.outbox, self.memory)
        self.pulls.arrived = self.arrived
        self.pulls.failed = self.failed
        self.arena = Arena()
        self.short = False  # of descriptors
        self.count = 0
        self.open: set[bytes] = set()
        self.here: dict[bytes, m.Located] = {}
        self.transfers: dict[int, tuple[out.StartPull, bool]] = {}

    def arrived(self, object_id: bytes, location: m.Located) -> None:
        self.open.remove(object_id)  # PU-1: once
        self.here[object_id] = location

    def failed(self, object_id: bytes, failure: values.Failure | None, _source: int) -> None:
        self.open.remove(object_id)
        if failure is not None:
            assert "does not fit" in failure.message
            assert ("too many" in failure.message) <= self.short_lately

    def act(self) -> None:
        while self.outbox.actions:
            actions, self.outbox.actions = self.outbox.actions, []
            for action in actions:
                if type(action) is out.StartPull:
                    self.start(action)
                elif type(action) is out.CloseSegment and self.arena.has(action.segment):
                    self.arena.remove(action.segment)
                elif type(action) is out.FreeNodeRange and self.arena.has(action.segment):
                    self.arena.release(action.segment, action.offset)

    short_lately = False

    def start(self, pull: out.StartPull) -> None:
        found = self.arena.allocate(pull.nbytes)
        if found is None:
            granted = self.pulls.no_range(pull)
            if granted is None:
                return
            if self.short:
                self.short_lately = True
                self.pulls.no_segment(pull, granted, "too many open files")
                return
            self.arena.add(
                granted.segment_id, memoryview(bytearray(granted.nbytes)), granted.nbytes)
            found = self.arena.allocate(pull.nbytes)
            assert found is not None
        transfer = self.pulls.next_transfer()
        assert transfer not in self.transfers
        mapped = pull.rank == 1
        self.transfers[transfer] = (pull, mapped)
        self.pulls.begun(pull, transfer, m.Located(found[0], found[1], pull.nbytes), mapped=mapped)
        asked = self.outbox.peers[pull.rank][-1]
        assert asked == m.PullRequest(pull.object_id, transfer, mapped)

    @rule(nbytes=st.sampled_from((1, 3000, 20_000, CAPACITY_BYTES, 10 * CAPACITY_BYTES)),
          rank=st.integers(1, 2))
    def pull(self, nbytes: int, rank: int) -> None:
        self.count += 1
        object_id = self.count.to_bytes(28, "little")
        self.open.add(object_id)
        self.outbox.actions.append(out.StartPull(object_id, rank, nbytes))
        self.act()

    def some(self, data: st.DataObject) -> tuple[int, out.StartPull, bool]:
        transfer = data.draw(st.sampled_from(sorted(self.transfers)))
        return (transfer, *self.transfers.pop(transfer))

    @precondition(lambda self: self.transfers)
    @rule(data=st.data())
    def arrives(self, data: st.DataObject) -> None:
        transfer, pull, mapped = self.some(data)
        self.outbox.peers.clear()
        self.pulls.copied(transfer, mapped=mapped)
        ended = self.outbox.peers[pull.rank][-1:] == [m.PullEnded(pull.object_id)]
        assert ended == mapped, "a holder whose memory was looked into is told"
        self.act()

    @precondition(lambda self: self.transfers)
    @rule(data=st.data())
    def is_refused(self, data: st.DataObject) -> None:
        self.pulls.cancelled(self.some(data)[0])
        self.act()

    @precondition(lambda self: any(mapped for _, mapped in self.transfers.values()))
    @rule()
    def cannot_be_mapped(self) -> None:
        transfer = next(t for t, (_, mapped) in self.transfers.items() if mapped)
        pull, _ = self.transfers[transfer]
        self.transfers[transfer] = (pull, False)
        self.pulls.not_mapped(transfer)
        assert self.outbox.peers[1][-2:] == [
            m.PullRequest(pull.object_id, transfer), m.PullEnded(pull.object_id)]

    @precondition(lambda self: self.here)
    @rule()
    def is_freed(self) -> None:
        self.memory.free(self.here.pop(next(iter(self.here))))
        self.act()

    @rule(short=st.booleans())
    def descriptors(self, short: bool) -> None:
        self.short = short

    @rule(seconds=st.sampled_from((0.01, 3.0)))
    def time_passes(self, seconds: float) -> None:
        self.tables.now_s += seconds
        self.memory.tick(self.tables.now_s)
        self.act()

    @invariant()
    def books_balance(self) -> None:
        self.pulls.validate()
        self.memory.budget.validate()
        under_way = sum(pull.nbytes for pull, _ in self.transfers.values())
        assert self.memory.object_bytes == under_way + sum(x.nbytes for x in self.here.values())

    def teardown(self) -> None:
        while self.transfers:
            self.pulls.copied(self.transfers.popitem()[0])
            self.act()
        for _ in range(4):
            self.time_passes(3.0)  # type: ignore[call-arg]
            while self.transfers:
                self.pulls.copied(self.transfers.popitem()[0])
        assert not self.open, "PU-1"
        assert not self.pulls.active


TestPulls = PullsMachine.TestCase
