"""Simulated shared memory: byte arrays, with ranges in them, and views that see every misuse.

A freed range is painted, and a view compares the bytes at its death: so a reader that was not
counted is found out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from hpcray.objects.allocator import RangeAllocator
from hpcray.testing.world import short

# A freed range is painted with this.
_POISON = 0xDD


class Arena:
    """Segments of simulated shared memory owned by one process (or by the node itself)."""

    def __init__(self) -> None:
        self._segments: dict[int, tuple[RangeAllocator, memoryview]] = {}

    def add(self, segment: int, memory: memoryview, nbytes: int) -> None:
        self._segments[segment] = (RangeAllocator(nbytes), memory)

    def has(self, segment: int) -> bool:
        return segment in self._segments

    def allocate(self, nbytes: int) -> tuple[int, int, memoryview] | None:
        for segment, (allocator, memory) in self._segments.items():
            offset = allocator.allocate(nbytes)
            if offset is not None:
                return segment, offset, memory[offset : offset + nbytes]
        return None

    def release(self, segment: int, offset: int) -> None:
        allocator, memory = self._segments[segment]
        size = allocator.size_of(offset)
        memory[offset : offset + size] = bytes((_POISON,)) * size
        allocator.release(offset)

    def remove(self, segment: int) -> None:
        del self._segments[segment]

    def empty_segments(self) -> list[int]:
        return [s for s, (allocator, _) in self._segments.items() if allocator.empty]

    @property
    def used_bytes(self) -> int:
        return sum(allocator.used_bytes for allocator, _ in self._segments.values())


class Readers:
    """Segments that a process has opened for reading."""

    def __init__(self) -> None:
        self._open: dict[int, memoryview] = {}

    def has(self, segment: int) -> bool:
        return segment in self._open

    def add(self, segment: int, memory: memoryview, nbytes: int) -> None:
        self._open[segment] = memory

    def view(self, segment: int, offset: int, nbytes: int) -> memoryview:
        return self._open[segment][offset : offset + nbytes]

    def forget(self, segment: int) -> None:
        self._open.pop(segment, None)


class View:
    """A pinned range of shared memory; unpins at its death, and compares the bytes then."""

    __slots__ = ("__weakref__", "_bytes", "_copy", "_fault", "_id", "_unpins")

    def __init__(
        self, object_id: bytes, view: memoryview, unpins: deque[bytes],
        fault: Callable[[str], None],
    ) -> None:
        self._id = object_id
        self._bytes = view
        self._copy = bytes(view)
        self._unpins = unpins
        self._fault = fault

    def packed(self) -> bytes:
        return self._copy

    def __del__(self) -> None:
        if self._bytes != self._copy:
            self._fault(f"the memory of {short(self._id)} was reused under a pinned view")
        self._unpins.append(self._id)
