"""The segment budget: the size policy, then a state machine that checks SB-1 to SB-4."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hpcray.objects.budget import (
    MIB,
    Disowned,
    SegmentBudget,
    SegmentGrant,
    StoreFull,
    segment_size,
)


def granted(budget: SegmentBudget, owner: object, nbytes: int) -> SegmentGrant:
    grant = budget.grant(owner, nbytes)
    assert isinstance(grant, SegmentGrant), grant
    return grant


@pytest.mark.parametrize(
    ("nbytes", "capacity_bytes", "expected_bytes"),
    [
        (100_000, 8192 * MIB, 64 * MIB),  # the minimum
        (100_000, 256 * MIB, 32 * MIB),  # an eighth of a small store
        (1000, 20_000, 4096),  # never less than a page
        (10_000, 20_000, 12288),  # one large object of a tiny store: whole pages
        (64 * MIB + 1, 8192 * MIB, 66 * MIB),  # one large object: whole huge pages
        (1000 * MIB, 8192 * MIB, 1000 * MIB),
    ],
)
def test_segment_size(nbytes: int, capacity_bytes: int, expected_bytes: int) -> None:
    assert segment_size(nbytes, capacity_bytes) == expected_bytes


def test_the_last_bytes_are_usable() -> None:
    budget = SegmentBudget(100 * MIB + 3 * 4096 + 5, minimum_segment_bytes=64 * MIB)
    for _ in range(8):
        assert granted(budget, "w1", 1).nbytes == 100 * MIB // 8 // 4096 * 4096
    assert granted(budget, "w1", 4000).nbytes == 3 * 4096
    assert isinstance(budget.grant("w1", 1), StoreFull)


def test_refusal_names_the_numbers_and_whom_to_ask() -> None:
    budget = SegmentBudget(1024 * MIB, minimum_segment_bytes=64 * MIB)
    first = granted(budget, "w1", 512 * MIB)
    second = granted(budget, "w2", 448 * MIB)
    budget.mark_empty(second.segment_id)
    budget.mark_empty(first.segment_id)
    full = budget.grant("w3", 100 * MIB)
    assert isinstance(full, StoreFull)
    assert full.ask_back == (second,)  # empty the longest, and enough
    assert (full.need_bytes, full.free_bytes, full.empty_bytes) == (
        100 * MIB,
        64 * MIB,
        960 * MIB,
    )
    assert not full.never_fits
    assert "release some refs" in str(full)
    full = budget.grant("w3", 1000 * MIB)
    assert isinstance(full, StoreFull)
    assert full.ask_back == (second, first)
    full = budget.grant("w3", 1025 * MIB)
    assert isinstance(full, StoreFull)
    assert full.never_fits
    assert "whole object store" in str(full)


def test_dead_owner_leaves_used_segments_to_the_node() -> None:
    budget = SegmentBudget(1024 * MIB)
    used = granted(budget, "w1", 1).segment_id
    spare = granted(budget, "w1", 1).segment_id
    other = granted(budget, "w2", 1).segment_id
    budget.mark_empty(spare)
    assert budget.disown("w1") == Disowned(kept=(used,), released=(spare,))
    assert budget.segment(used).owner is None
    assert budget.owners() == ["w2", None]
    assert budget.disown("w1") == Disowned((), ())
    assert budget.mark_empty(used), "the node itself can release it"
    assert not budget.mark_empty(other), "its owner has to be asked"
    budget.release(used)
    with pytest.raises(KeyError):
        budget.release(used)
    budget.validate()


def test_absurd_capacities_are_refused() -> None:
    with pytest.raises(ValueError, match="one page"):
        SegmentBudget(100)
    with pytest.raises(ValueError, match="one page"):
        SegmentBudget(1 << 30, minimum_segment_bytes=1)


class BudgetMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.budget = SegmentBudget(1000 * 4096 + 17, minimum_segment_bytes=64 * 4096)
        self.model: dict[int, tuple[object, int, bool]] = {}  # id -> owner, nbytes, empty

    owners = st.sampled_from(["a", "b", "c"])

    def pick(self, index: int) -> int | None:
        ids = sorted(self.model)
        return ids[index % len(ids)] if ids else None

    @rule(owner=owners, nbytes=st.integers(0, 1200 * 4096))
    def grant(self, owner: str, nbytes: int) -> None:
        free = 1000 - sum(size for _, size, _ in self.model.values()) // 4096
        result = self.budget.grant(owner, nbytes)
        if isinstance(result, StoreFull):
            need = max(nbytes, 1)
            assert need > free * 4096
            assert result.never_fits == (nbytes > 1000 * 4096)
            asked = sum(s.nbytes for s in result.ask_back)
            empty = sum(size for _, size, is_empty in self.model.values() if is_empty)
            assert asked >= min(need - free * 4096, empty)
            return
        assert result.nbytes >= nbytes
        assert result.segment_id not in self.model
        self.model[result.segment_id] = (owner, result.nbytes, False)

    @rule(index=st.integers(0, 1000))
    def release(self, index: int) -> None:
        if (segment_id := self.pick(index)) is not None:
            del self.model[segment_id]
            self.budget.release(segment_id)

    @rule(index=st.integers(0, 1000), empty=st.booleans())
    def mark(self, index: int, empty: bool) -> None:
        if (segment_id := self.pick(index)) is None:
            return
        owner, nbytes, _ = self.model[segment_id]
        self.model[segment_id] = (owner, nbytes, empty)
        if empty:
            assert self.budget.mark_empty(segment_id) == (owner is None)
        else:
            self.budget.mark_used(segment_id)

    @rule(owner=owners)
    def disown(self, owner: str) -> None:
        result = self.budget.disown(owner)
        mine = {i: m for i, m in self.model.items() if m[0] == owner}
        assert sorted(result.released) == sorted(i for i, m in mine.items() if m[2])
        assert sorted(result.kept) == sorted(i for i, m in mine.items() if not m[2])
        for segment_id in result.released:
            del self.model[segment_id]
        for segment_id in result.kept:
            self.model[segment_id] = (None, self.model[segment_id][1], False)

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.budget.validate()
        statistics = self.budget.statistics()
        assert statistics.used_bytes == sum(m[1] for m in self.model.values())
        assert statistics.empty_bytes == sum(m[1] for m in self.model.values() if m[2])
        for owner in ("a", "b", "c", None):
            mine = sorted(i for i, m in self.model.items() if m[0] == owner)
            assert sorted(s.segment_id for s in self.budget.segments_of(owner)) == mine


BudgetMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestBudgetMachine = BudgetMachine.TestCase
