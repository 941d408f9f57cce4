"""This process's part of the object store: its segments, and what it has mapped of others'. Pure,
but for the mappings themselves.

    write   arena has room --------------------------------> one memcpy, one one-way message
            arena is full  -> SegmentRequest -> Grant ------> (the node may wait for memory)
    read    ValueAt (pinned by the node) -> map the segment once (SegmentOpen) -> pinned array
            its last view dies -> Unpin with the next batch

Guarded by the client's lock; who waits for a grant does so in `memory.py`.
"""

from __future__ import annotations

from typing import Any

from hpcray.client.waiters import Waiter
from hpcray.objects.segments import ReaderMappings, SegmentArena
from hpcray.protocol.messages import (
    Located,
    Released,
    SegmentClosed,
    SegmentDenied,
    SegmentGrant,
    SegmentOpen,
    SegmentOpened,
    SegmentRequest,
    SegmentReturn,
)

# Empty segments this process keeps for its next puts: the one in use and a warm one beside it.
_SPARE_SEGMENTS = 1


class Store:
    def __init__(
        self, outbox: list[Any], arena: Any = None, readers: Any = None
    ) -> None:
        """`arena` and `readers`: others only where memory is simulated."""
        self._outbox = outbox
        self._arena = SegmentArena() if arena is None else arena
        self._readers = ReaderMappings() if readers is None else readers
        # Requests that are not answered, the oldest first, by what they need.
        self._requests: list[tuple[int, Waiter]] = []
        self._opening: dict[int, Waiter] = {}

    # --- writing ----------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> tuple[int, int, memoryview] | None:
        """(segment, offset, view) for a value, if there is room."""
        found: tuple[int, int, memoryview] | None = self._arena.allocate(nbytes)
        return found

    def release(self, location: Located) -> None:
        """What was allocated will not be told to anybody."""
        self._arena.release(location.segment, location.offset)

    def request(self, nbytes: int) -> Waiter:
        """Ask for more. Its result: None, or SegmentDenied."""
        waiter = Waiter(1)
        self._requests.append((nbytes, waiter))
        self._outbox.append(SegmentRequest(nbytes))
        return waiter

    def on_grant(self, message: SegmentGrant, descriptor: Any) -> None:
        self._arena.add(message.segment, descriptor, message.nbytes)
        self._answered(message.nbytes, None)

    def on_denied(self, message: SegmentDenied) -> None:
        self._answered(message.need_bytes, message)

    def _answered(self, nbytes: int, answer: SegmentDenied | None) -> None:
        """Of several, the first that it can be the answer to."""
        for index, (needed, waiter) in enumerate(self._requests):
            if needed <= nbytes:
                del self._requests[index]
                waiter.result = answer
                waiter.remaining = 0
                return

    def on_released(self, message: Released) -> None:
        for offset in message.offsets:
            self._arena.release(message.segment, offset)
        # Those that have been empty longest go; the one just emptied is warm.
        for extra in self._arena.empty_segments()[:-_SPARE_SEGMENTS]:
            self._give_back(extra)

    def give_back_all(self) -> None:
        """Return every empty segment: the node needs the memory."""
        for segment in self._arena.empty_segments():
            self._give_back(segment)

    def _give_back(self, segment: int) -> None:
        self._arena.remove(segment)
        self._outbox.append(SegmentReturn(segment))

    # --- reading ----------------------------------------------------------------------------------

    def is_open(self, segment: int) -> bool:
        return bool(self._readers.has(segment))

    def open(self, segment: int) -> Waiter:
        """Ask for the segment's descriptor, unless somebody has; over when it is mapped."""
        waiter = self._opening.get(segment)
        if waiter is None:
            waiter = self._opening[segment] = Waiter(1)
            self._outbox.append(SegmentOpen(segment))
        return waiter

    def view(self, location: Located) -> memoryview:
        found: memoryview = self._readers.view(
            location.segment, location.offset, location.nbytes)
        return found

    def on_opened(self, message: SegmentOpened, descriptor: Any) -> None:
        self._readers.add(message.segment, descriptor, message.nbytes)
        waiter = self._opening.pop(message.segment, None)
        if waiter is not None:
            waiter.remaining = 0

    def on_closed(self, message: SegmentClosed) -> None:
        self._readers.forget(message.segment)
