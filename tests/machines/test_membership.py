"""Membership: ME-1 and ME-2 as nodes join and are lost, and who is home to what."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hpcray.node.membership import Membership
from hpcray.node.tables import Tables
from hpcray.protocol import ids
from hpcray.protocol.messages import Joined

JOB = ids.job_id(1)
ranks = st.integers(0, 5)


def object_of(rank: int) -> bytes:
    return ids.task_id(b"p" * 12, 1, ids.id_tail(rank, JOB)) + ids.FIRST_RETURN


class MembershipMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.membership = Membership(Tables(2, 6, JOB, {}))
        self.heard: list[tuple[int, str]] = []
        self.membership.on_lost.append(lambda rank, why: self.heard.append((rank, why)))
        self.living: set[int] = set()
        self.lost: set[int] = set()

    @rule(rank=ranks)
    def joins(self, rank: int) -> None:
        before = self.membership.epoch
        self.membership.joined(Joined(rank, "h", "h", rank, ()))
        assert self.membership.epoch > before
        self.living.add(rank)
        self.lost.discard(rank)

    @rule(rank=ranks)
    def is_lost(self, rank: int) -> None:
        before, heard = self.membership.epoch, len(self.heard)
        self.membership.lose(rank, "killed")
        if rank == 2 or rank in self.lost:
            assert len(self.heard) == heard, "once, and nobody outlives itself"
            return
        assert self.heard[heard:] == [(rank, "killed")]
        assert self.membership.epoch > before
        self.living.discard(rank)
        self.lost.add(rank)

    @invariant()
    def homes(self) -> None:
        self.membership.validate()
        assert set(self.membership.living) == self.living
        for rank in range(6):
            object_id = object_of(rank)
            assert self.membership.is_home(object_id) == (rank == 2)
            assert self.membership.home_of(object_id) == rank
            assert self.membership.home_of_actor(ids.actor_id(b"p", 1, ids.id_tail(rank, JOB))) == (
                rank)


TestMembership = MembershipMachine.TestCase
