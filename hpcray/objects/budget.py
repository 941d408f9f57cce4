"""The segment budget: the node's ledger of who holds which shared-memory segment.

Pure bookkeeping. It creates no segment and moves no descriptor: the node's loop asks `grant`,
makes the memfd, hands it to its owner, and closes it after `release`. It knows nothing of
objects either: the object table tells it which segments have become empty.

                        grant                          mark_empty
    (absent) ----------------------------> IN USE  <--------------->  EMPTY
       ^                                      |         mark_used        |
       |             release (either)         |                          |
       +--------------------------------------+--------------------------+
    disown(owner): IN USE goes on under the node (owner None), EMPTY is released.

The segment is the unit of the budget because memory is: a process sub-allocates its segments
without asking, so the node cannot and need not know how full one is.

A fresh grant counts as IN USE: it answers an object that does not fit anywhere else.

Invariants, checked by `SegmentBudget.validate`:

SB-1  used_bytes == the sum of nbytes over all segments.
SB-2  used_bytes <= capacity_bytes.
SB-3  every segment is listed under exactly one owner, and no owner is listed with none.
SB-4  the empty segments are segments; empty_bytes is their sum.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

MIB = 1 << 20
MINIMUM_SEGMENT_BYTES = 64 * MIB
PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 * MIB

# A process, by whatever name the node's loop uses for it. None is the node itself.
Owner = Hashable
NODE: None = None

# A small budget is still divided among several processes: none gets more than this part of it
# for small objects.
_LARGEST_SHARE = 8


@dataclass(frozen=True, slots=True)
class SegmentGrant:
    """A segment and whose it is; what `grant` returns and what listings are made of."""

    segment_id: int
    owner: Owner
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoreFull:
    """The grant does not fit now; the numbers that the user's error needs.

    A result and not an exception: the node may spill or ask segments back, then try again.
    `ask_back` holds empty segments, longest empty first, just enough to cover the shortfall
    (or all there are).
    """

    need_bytes: int
    capacity_bytes: int
    used_bytes: int
    empty_bytes: int
    ask_back: tuple[SegmentGrant, ...]

    @property
    def free_bytes(self) -> int:
        return self.capacity_bytes - self.used_bytes

    @property
    def never_fits(self) -> bool:
        """True if no amount of spilling helps: the object is larger than the whole store."""
        return self.need_bytes > self.capacity_bytes

    def __str__(self) -> str:
        if self.never_fits:
            return (
                f"needs {self.need_bytes} B, more than this node's whole object store "
                f"({self.capacity_bytes} B); raise object_store_memory or split the object"
            )
        return (
            f"needs {self.need_bytes} B, but {self.used_bytes} B of {self.capacity_bytes} B are "
            f"granted and only {self.empty_bytes} B of those are empty; release some refs or "
            "raise object_store_memory"
        )


@dataclass(frozen=True, slots=True)
class Disowned:
    """What became of a dead owner's segments: `released` are gone from the ledger."""

    kept: tuple[int, ...]
    released: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SegmentBudgetStatistics:
    capacity_bytes: int
    used_bytes: int
    empty_bytes: int
    segments: int
    owners: int


def _round_up(nbytes: int, unit_bytes: int) -> int:
    return -(-nbytes // unit_bytes) * unit_bytes


def segment_size(
    nbytes: int, capacity_bytes: int, minimum_segment_bytes: int = MINIMUM_SEGMENT_BYTES
) -> int:
    """How large a segment for an object of `nbytes` is, if the budget has room for it.

    Small objects share a segment of the minimum, or of an eighth of a small budget. A large
    object gets its own, in whole huge pages so that the kernel can back it with them.
    """
    share = capacity_bytes // _LARGEST_SHARE // PAGE_BYTES * PAGE_BYTES
    shared_bytes = max(min(minimum_segment_bytes, share), PAGE_BYTES)
    if nbytes <= shared_bytes:
        return shared_bytes
    if nbytes < HUGE_PAGE_BYTES:
        return _round_up(nbytes, PAGE_BYTES)
    return _round_up(nbytes, HUGE_PAGE_BYTES)


class SegmentBudget:
    """Every segment this node has granted and not yet taken back."""

    def __init__(
        self, capacity_bytes: int, minimum_segment_bytes: int = MINIMUM_SEGMENT_BYTES
    ) -> None:
        if capacity_bytes < PAGE_BYTES:
            raise ValueError(
                f"an object store of {capacity_bytes} B cannot hold one page ({PAGE_BYTES} B)"
            )
        if minimum_segment_bytes < PAGE_BYTES:
            raise ValueError(f"a segment has at least one page, not {minimum_segment_bytes} B")
        self.capacity_bytes = capacity_bytes
        self.minimum_segment_bytes = minimum_segment_bytes
        self.used_bytes = 0
        self.empty_bytes = 0
        self._next_id = 1
        self._segments: dict[int, SegmentGrant] = {}
        # Insertion order is grant order; dicts and not sets, so that replays are exact.
        self._by_owner: dict[Owner, dict[int, None]] = {}
        # Insertion order is the order in which they became empty.
        self._empty: dict[int, None] = {}

    @property
    def free_bytes(self) -> int:
        return self.capacity_bytes - self.used_bytes

    def grant(self, owner: Owner, nbytes: int) -> SegmentGrant | StoreFull:
        """A segment with room for at least one object of `nbytes`, or the numbers why not.

        When the usual size does not fit but the object does, the segment is as large as the
        rest of the budget: the last bytes are usable too.
        """
        need_bytes = _round_up(max(nbytes, 1), PAGE_BYTES)
        free_bytes = self.free_bytes // PAGE_BYTES * PAGE_BYTES
        if need_bytes > free_bytes:
            return StoreFull(
                need_bytes,
                self.capacity_bytes,
                self.used_bytes,
                self.empty_bytes,
                tuple(self.reclaimable(need_bytes - free_bytes)),
            )
        size = segment_size(nbytes, self.capacity_bytes, self.minimum_segment_bytes)
        segment = SegmentGrant(self._next_id, owner, min(size, free_bytes))
        self._next_id += 1
        self._segments[segment.segment_id] = segment
        self._by_owner.setdefault(owner, {})[segment.segment_id] = None
        self.used_bytes += segment.nbytes
        return segment

    def release(self, segment_id: int) -> SegmentGrant:
        """The segment is unmapped by its owner and its descriptor may be closed.

        Raises:
          KeyError: the segment is not in the ledger (released twice).
        """
        segment = self._segments.pop(segment_id)
        self._unmark(segment)
        self._unlist(segment)
        self.used_bytes -= segment.nbytes
        return segment

    def disown(self, owner: Owner) -> Disowned:
        """The owner died: its empty segments are released, the others are the node's now."""
        kept: list[int] = []
        released: list[int] = []
        for segment_id in list(self._by_owner.get(owner, ())):
            if segment_id in self._empty:
                self.release(segment_id)
                released.append(segment_id)
                continue
            segment = self._segments[segment_id]
            self._unlist(segment)
            self._segments[segment_id] = SegmentGrant(segment_id, NODE, segment.nbytes)
            self._by_owner.setdefault(NODE, {})[segment_id] = None
            kept.append(segment_id)
        return Disowned(tuple(kept), tuple(released))

    def mark_empty(self, segment_id: int) -> bool:
        """No object lives in the segment any more. True: nobody owns it, so release it now."""
        segment = self._segments[segment_id]
        if segment_id not in self._empty:
            self._empty[segment_id] = None
            self.empty_bytes += segment.nbytes
        return segment.owner is NODE

    def mark_used(self, segment_id: int) -> None:
        """An object lives in the segment (again)."""
        self._unmark(self._segments[segment_id])

    def reclaimable(self, nbytes: int) -> list[SegmentGrant]:
        """Empty segments to ask back from their owners, longest empty first, until `nbytes`
        are covered. Fewer bytes than asked for if there are no more."""
        chosen: list[SegmentGrant] = []
        for segment_id in self._empty:
            if nbytes <= 0:
                break
            segment = self._segments[segment_id]
            chosen.append(segment)
            nbytes -= segment.nbytes
        return chosen

    def segment(self, segment_id: int) -> SegmentGrant:
        return self._segments[segment_id]

    def segments_of(self, owner: Owner) -> list[SegmentGrant]:
        """In the order of their grants."""
        return [self._segments[segment_id] for segment_id in self._by_owner.get(owner, ())]

    def bytes_of(self, owner: Owner) -> int:
        return sum(segment.nbytes for segment in self.segments_of(owner))

    def owners(self) -> list[Owner]:
        """Everyone who holds a segment, the node (None) included."""
        return list(self._by_owner)

    def statistics(self) -> SegmentBudgetStatistics:
        return SegmentBudgetStatistics(
            self.capacity_bytes,
            self.used_bytes,
            self.empty_bytes,
            len(self._segments),
            len(self._by_owner),
        )

    def validate(self) -> None:
        """Check SB-1 to SB-4. Slow: for tests."""
        segments = self._segments
        assert self.used_bytes == sum(s.nbytes for s in segments.values()), "SB-1"
        assert self.used_bytes <= self.capacity_bytes, "SB-2"
        listed = [(owner, i) for owner, ids in self._by_owner.items() for i in ids]
        assert sorted(i for _, i in listed) == sorted(segments), "SB-3"
        assert all(segments[i].owner == owner for owner, i in listed), "SB-3: owner"
        assert all(self._by_owner.values()), "SB-3: an owner of nothing is listed"
        assert all(i in segments for i in self._empty), "SB-4"
        assert self.empty_bytes == sum(segments[i].nbytes for i in self._empty), "SB-4: bytes"

    def _unmark(self, segment: SegmentGrant) -> None:
        if segment.segment_id in self._empty:
            del self._empty[segment.segment_id]
            self.empty_bytes -= segment.nbytes

    def _unlist(self, segment: SegmentGrant) -> None:
        ids = self._by_owner[segment.owner]
        del ids[segment.segment_id]
        if not ids:
            del self._by_owner[segment.owner]
