"""The range allocator: which bytes of one segment are taken.

Pure bookkeeping over the numbers 0..nbytes. It never sees memory, files or ids of objects:
`objects.segments` owns the bytes, and one allocator serves one segment.

    offset 0                                                        nbytes
    |#### used ####|.... free ....|## used ##|........ free ........|
                   `- never two free ranges side by side (RA-2) -'

Two orders over the same free ranges:

- recency: a few ranges freed last, tried first. Their pages are faulted in and warm in the
  cache; a first touch runs ten times slower than a warm one.
- size: one sorted list of integers `size << 48 | offset`. The smallest sufficient range is one
  bisection away and the largest is the last entry. A balanced tree would be the textbook answer;
  shared-memory objects are large, so a segment has hundreds of ranges, and inserting into a
  Python list of that length is one short memmove.

A range is cut at its low end: the high end of a segment is what nobody has touched yet.

Invariants, checked by `RangeAllocator.validate`:

RA-1  used and free ranges do not overlap and together cover the segment exactly.
RA-2  no two free ranges touch: everything is coalesced.
RA-3  used_bytes == the sum of the sizes of the used ranges.
RA-4  both orders describe the free ranges; every offset and size is a multiple of 64.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

from hpcray.protocol.values import PAGE_BYTES, PAGED_BYTES

# One cache line, and what out-of-band pickle buffers are aligned to (AVX-512 loads want it).
ALIGNMENT_BYTES = 64

# Room for the offset in a key of the size order: segments below 256 TiB.
_OFFSET_BITS = 48
_OFFSET_MASK = (1 << _OFFSET_BITS) - 1

# How many recently freed ranges are tried before the best fit. Arbitrary; each costs one lookup.
_RECENT_RANGES = 4


def aligned_size(nbytes: int) -> int:
    """The bytes a range of `nbytes` really takes; an empty object takes one cache line."""
    return (nbytes + (ALIGNMENT_BYTES - 1)) & -ALIGNMENT_BYTES or ALIGNMENT_BYTES


def range_bytes(nbytes: int) -> int:
    """The range an object takes: with room to start on a page if it is large.

    A copy runs at a third of its speed when its target lies a few hundred bytes behind its source
    within the page: the processor mistakes the loads that follow for what it has just stored.
    Large arrays start right behind a page's beginning, so large objects start on one.
    """
    return nbytes + PAGE_BYTES if nbytes >= PAGED_BYTES else nbytes


class RangeAllocator:
    """Hands out and takes back ranges of `nbytes` bytes (rounded down to 64)."""

    __slots__ = ("_by_size", "_free", "_free_end", "_recent", "_used", "nbytes", "used_bytes")

    def __init__(self, nbytes: int) -> None:
        nbytes &= -ALIGNMENT_BYTES
        if not 0 < nbytes < 1 << _OFFSET_BITS:
            raise ValueError(f"a segment has between 64 B and 256 TiB, not {nbytes} B")
        self.nbytes = nbytes
        self.used_bytes = 0
        self._used: dict[int, int] = {}  # offset -> size
        self._free: dict[int, int] = {0: nbytes}  # offset -> size
        self._free_end: dict[int, int] = {nbytes: 0}  # end -> offset
        self._by_size: list[int] = [nbytes << _OFFSET_BITS]
        # Offsets of ranges freed last, newest at the right. Entries go stale when a range is
        # cut or coalesced; they are then not in `_free`, or name a range that is free anyway.
        self._recent: deque[int] = deque(maxlen=_RECENT_RANGES)

    @property
    def empty(self) -> bool:
        return not self._used

    @property
    def largest_free_bytes(self) -> int:
        """The largest single range that `allocate` could hand out now."""
        return self._by_size[-1] >> _OFFSET_BITS if self._by_size else 0

    @property
    def used_ranges(self) -> int:
        return len(self._used)

    def size_of(self, offset: int) -> int:
        """The size of the used range at `offset`, rounding included."""
        return self._used[offset]

    def allocate(self, nbytes: int) -> int | None:
        """The offset of `nbytes` fresh bytes, or None if no single free range is long enough."""
        need = (nbytes + 63) & -64 or 64  # aligned_size, without the call: the hot path
        by_size = self._by_size
        free = self._free
        for offset in reversed(self._recent):
            size = free.get(offset, 0)
            if size >= need:
                index = bisect_left(by_size, size << _OFFSET_BITS | offset)
                break
        else:
            index = bisect_left(by_size, need << _OFFSET_BITS)
            if index == len(by_size):
                return None
            key = by_size[index]
            offset = key & _OFFSET_MASK
            size = key >> _OFFSET_BITS
        del by_size[index]
        del free[offset]
        rest = size - need
        if rest:
            start = offset + need
            free[start] = rest
            self._free_end[offset + size] = start
            insort(by_size, rest << _OFFSET_BITS | start)
            # The rest of a recently freed range is as warm as the part just handed out.
            if self._recent and self._recent[-1] == offset:
                self._recent[-1] = start
        else:
            del self._free_end[offset + size]
        self._used[offset] = need
        self.used_bytes += need
        return offset

    def release(self, offset: int) -> None:
        """Give back the range at `offset`; it may be handed out again at once.

        Raises:
          ValueError: nothing is allocated there (released twice, or another segment's offset).
        """
        size = self._used.pop(offset, 0)
        if not size:
            raise ValueError(f"no range is allocated at offset {offset}: released twice?")
        self.used_bytes -= size
        by_size = self._by_size
        free = self._free
        end = offset + size
        following = free.pop(end, 0)
        if following:
            del by_size[bisect_left(by_size, following << _OFFSET_BITS | end)]
            end += following
        previous = self._free_end.pop(offset, -1)
        if previous >= 0:
            before = free[previous]
            del by_size[bisect_left(by_size, before << _OFFSET_BITS | previous)]
            offset = previous
        size = end - offset
        free[offset] = size
        self._free_end[end] = offset
        insort(by_size, size << _OFFSET_BITS | offset)
        recent = self._recent
        if not recent or recent[-1] != offset:
            recent.append(offset)

    def validate(self) -> None:
        """Check RA-1 to RA-4. Slow: for tests."""
        position = 0
        previous_free = False
        for offset, size, is_free in sorted(
            [(o, s, False) for o, s in self._used.items()]
            + [(o, s, True) for o, s in self._free.items()]
        ):
            assert offset == position, f"RA-1: hole or overlap at {position}"
            assert not (is_free and previous_free), f"RA-2: free ranges touch at {offset}"
            assert size > 0, f"RA-4: empty range at {offset}"
            assert (offset | size) % ALIGNMENT_BYTES == 0, f"RA-4: unaligned at {offset}"
            position = offset + size
            previous_free = is_free
        assert position == self.nbytes, "RA-1: the end of the segment is not covered"
        assert self.used_bytes == sum(self._used.values()), "RA-3"
        by_size = sorted(size << _OFFSET_BITS | offset for offset, size in self._free.items())
        assert by_size == self._by_size, "RA-4: size order"
        assert {o + s: o for o, s in self._free.items()} == self._free_end, "RA-4: ends"
