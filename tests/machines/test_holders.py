"""Holders: HO-1, whatever order the acknowledgements of several homes come in."""

from __future__ import annotations

from collections import deque
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpcray.node.holders import Holders
from hpcray.node.outbox import Outbox
from hpcray.protocol import ids
from hpcray.protocol.messages import HolderAdd, HolderDrop

JOB = ids.job_id(1)
ranks = st.integers(1, 3)


def object_id(home: int, number: int) -> bytes:
    return ids.task_id(b"p" * 12, number, ids.id_tail(home, JOB)) + ids.PUT_INDEX


class HoldersMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.outbox = Outbox()
        self.holders = Holders(self.outbox, ids.home_of_object)
        self.count = 0
        self.added: list[bytes] = []  # announced, not dropped
        self.known: set[bytes] = set()  # what homes have acknowledged
        self.in_flight: dict[int, deque[HolderAdd]] = {rank: deque() for rank in (1, 2, 3)}
        self.lost: set[int] = set()
        self.to: dict[int, int] = {}  # message number -> its receiver
        # message number -> ids that must be known when it leaves
        self.relies_on: dict[int, set[bytes]] = {}
        self.all_adds: set[bytes] = set()
        self.dropping: dict[bytes, set[bytes]] = {}

    @rule(home=ranks)
    def add(self, home: int) -> None:
        self.count += 1
        object_ = object_id(home, self.count)
        self.barrier = self.holders.add(object_)
        self.added.append(object_)
        self.all_adds.add(object_)
        if home in self.lost:
            self.known.add(object_)  # nobody counts it there

    @precondition(lambda self: self.added)
    @rule(to=ranks)
    def report(self, to: int) -> None:
        """A message that relies on every add so far."""
        self.count += 1
        if to not in self.lost:
            self.relies_on[self.count] = set(self.all_adds)
            self.to[self.count] = to
        self.holders.release(self.barrier, to, self.count)
        self.take()

    @precondition(lambda self: self.added)
    @rule()
    def drop(self) -> None:
        object_ = self.added.pop(0)
        self.holders.drop(object_)
        if ids.home_of_object(object_) not in self.lost:
            self.dropping[object_] = set(self.all_adds)

    @rule()
    def end_turn(self) -> None:
        self.holders.end_turn()
        self.take()

    @precondition(lambda self: any(self.in_flight.values()))
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from([r for r, q in self.in_flight.items() if q]))
        self.answer(rank)

    def answer(self, rank: int) -> None:
        add = self.in_flight[rank].popleft()
        self.known |= set(ids.split_ids(add.ids))
        self.holders.acknowledged(rank, add.turn)
        self.take()

    @precondition(lambda self: len(self.lost) < 2)
    @rule(rank=ranks)
    def lose(self, rank: int) -> None:
        """What it would have acknowledged nobody waits for, whatever it says still."""
        if rank in self.lost:
            return
        self.lost.add(rank)
        self.relies_on = {n: need for n, need in self.relies_on.items() if self.to[n] != rank}
        self.known |= {o for o in self.all_adds if ids.home_of_object(o) == rank}
        late = self.in_flight[rank].popleft() if self.in_flight[rank] else None
        self.in_flight[rank].clear()
        self.holders.node_lost(rank)
        self.dropping = {
            o: need for o, need in self.dropping.items() if ids.home_of_object(o) != rank}
        if late is not None:
            self.holders.acknowledged(rank, late.turn)
        self.take()

    def take(self) -> None:
        for rank, batch in list(self.outbox.peers.items()):
            for message in batch:
                self.sent(rank, message)
        self.outbox.peers.clear()

    def sent(self, rank: int, message: Any) -> None:
        if type(message) is HolderAdd:
            assert rank not in self.lost
            self.in_flight[rank].append(message)
        elif type(message) is HolderDrop:
            for object_ in ids.split_ids(message.ids):
                assert ids.home_of_object(object_) == rank
                assert self.dropping.pop(object_) <= self.known, "HO-1: a drop overtook an add"
        else:
            assert rank not in self.lost
            assert self.relies_on.pop(message) <= self.known, "HO-1: a report overtook an add"

    @invariant()
    def idle_means_nothing_is_owed(self) -> None:
        if self.holders.idle:
            assert not (self.relies_on or self.dropping or any(self.in_flight.values()))

    def teardown(self) -> None:
        """Once all is acknowledged, everything has left."""
        self.end_turn()
        while any(self.in_flight.values()):
            for rank, queue in self.in_flight.items():
                while queue:
                    self.answer(rank)
        assert self.holders.idle
        assert not self.relies_on
        assert not self.dropping


TestHolders = HoldersMachine.TestCase
