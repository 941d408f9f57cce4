"""The range allocator: named cases, then a state machine that checks RA-1 to RA-4."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from hpcray.objects.allocator import ALIGNMENT_BYTES, RangeAllocator, aligned_size


def allocated(allocator: RangeAllocator, nbytes: int) -> int:
    offset = allocator.allocate(nbytes)
    assert offset is not None
    return offset


def test_sizes_and_offsets_are_multiples_of_a_cache_line() -> None:
    assert [aligned_size(n) for n in (0, 1, 64, 65)] == [64, 64, 64, 128]
    allocator = RangeAllocator(1000)
    assert allocator.nbytes == 960
    assert [allocated(allocator, n) for n in (0, 1, 65)] == [0, 64, 128]
    assert allocator.used_bytes == 64 + 64 + 128


def test_range_freed_last_is_reused_first() -> None:
    allocator = RangeAllocator(64 * 100)
    offsets = [allocated(allocator, 640) for _ in range(9)]
    for index in (1, 5, 3):
        allocator.release(offsets[index])
    assert allocated(allocator, 600) == offsets[3]
    assert allocated(allocator, 600) == offsets[5]


def test_best_fit_when_nothing_recent_fits() -> None:
    allocator = RangeAllocator(64 * 1000)
    large = allocated(allocator, 64 * 200)
    allocated(allocator, 64)
    middle = allocated(allocator, 64 * 50)
    allocated(allocator, 64)
    small = [allocated(allocator, 64) for _ in range(12)]
    allocator.release(large)
    allocator.release(middle)
    for offset in small[::2]:  # Push both out of the recent ranges.
        allocator.release(offset)
    assert allocated(allocator, 64 * 40) == middle


def test_none_only_when_no_single_range_is_long_enough() -> None:
    allocator = RangeAllocator(64 * 4)
    offsets = [allocated(allocator, 64) for _ in range(4)]
    assert allocator.allocate(1) is None
    assert allocator.largest_free_bytes == 0
    allocator.release(offsets[0])
    allocator.release(offsets[2])
    assert allocator.largest_free_bytes == 64
    assert allocator.allocate(128) is None
    allocator.release(offsets[1])
    assert allocator.largest_free_bytes == 192
    assert allocated(allocator, 192) == 0


def test_double_release_is_refused() -> None:
    allocator = RangeAllocator(640)
    offset = allocated(allocator, 64)
    allocator.release(offset)
    with pytest.raises(ValueError, match="released twice"):
        allocator.release(offset)
    allocator.validate()


@pytest.mark.parametrize("nbytes", [0, -64, 63, 1 << 48])
def test_impossible_sizes_are_refused(nbytes: int) -> None:
    with pytest.raises(ValueError, match="64 B and 256 TiB"):
        RangeAllocator(nbytes)


class AllocatorMachine(RuleBasedStateMachine):
    """Against the obvious model: a dict of ranges and a byte map in units of 64."""

    ranges = Bundle("ranges")
    UNITS = 64

    def __init__(self) -> None:
        super().__init__()
        self.allocator = RangeAllocator(self.UNITS * ALIGNMENT_BYTES)
        self.taken = [False] * self.UNITS
        self.sizes: dict[int, int] = {}

    def longest_free_run(self) -> int:
        longest = run = 0
        for taken in self.taken:
            run = 0 if taken else run + 1
            longest = max(longest, run)
        return longest

    @rule(target=ranges, nbytes=st.integers(0, UNITS * ALIGNMENT_BYTES // 3))
    def allocate(self, nbytes: int):  # type: ignore[no-untyped-def]
        units = aligned_size(nbytes) // ALIGNMENT_BYTES
        offset = self.allocator.allocate(nbytes)
        if offset is None:
            assert self.longest_free_run() < units
            return multiple()
        first = offset // ALIGNMENT_BYTES
        assert not any(self.taken[first : first + units])
        assert first + units <= self.UNITS
        self.taken[first : first + units] = [True] * units
        self.sizes[offset] = units
        return offset

    @rule(offset=consumes(ranges))
    def release(self, offset: int) -> None:
        self.allocator.release(offset)
        first, units = offset // ALIGNMENT_BYTES, self.sizes.pop(offset)
        self.taken[first : first + units] = [False] * units

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.allocator.validate()
        assert self.allocator.used_bytes == sum(self.taken) * ALIGNMENT_BYTES
        assert self.allocator.largest_free_bytes == self.longest_free_run() * ALIGNMENT_BYTES
        assert self.allocator.empty == (not self.sizes)


AllocatorMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None
)
TestAllocatorMachine = AllocatorMachine.TestCase
