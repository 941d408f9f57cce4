"""This process's side of the object store: where large values are written and read.

    write   arena has room --------------------------------> one memcpy, one one-way message
            arena is full  -> SegmentRequest -> Grant ------> (the node may wait for memory)
    read    ValueAt (pinned by the node) -> map the segment once -> pinned array
            its last view dies -> `_unpins` deque -> Unpin with the next flush

The client's lock guards all of it, except the copy itself.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from hpcray import exceptions
from hpcray.client.waiters import Waiter
from hpcray.objects.segments import ReaderMappings, SegmentArena, pinned_view
from hpcray.protocol import messages, values
from hpcray.protocol.messages import Located, SegmentOpen, SegmentRequest, SegmentReturn, Unpin

if TYPE_CHECKING:
    from hpcray.client.client import Client
    from hpcray.client.references import ObjectRef
    from hpcray.client.serialization import Serialized

# Empty segments this process keeps for its next puts: the one in use and a warm one beside it.
_SPARE_SEGMENTS = 1


class ClientMemory:
    def __init__(self, client: Client) -> None:
        self._client = client
        self._lock = client._lock
        self._arena = SegmentArena()
        self._readers = ReaderMappings()
        # One request for memory at a time: others would all be granted a segment each.
        self._requesting = threading.Lock()
        self._answer: Waiter | None = None
        self._opening: dict[int, Waiter] = {}
        # Values that came while somebody waits for them: pinned, not mapped yet.
        self._arrivals: dict[bytes, Located] = {}
        self._unpins: deque[bytes] = deque()

    # --- writing ----------------------------------------------------------------------------------

    def write(self, serialized: Serialized) -> Located:
        """Copy a value into shared memory.

        Raises:
          ObjectStoreFullError: no room, and none to be expected.
        """
        nbytes = serialized.nbytes
        segment, offset, view = self._allocate(nbytes)
        if serialized.buffers:
            values.pack_into(view[:nbytes], serialized.pickled, serialized.buffers)
        else:
            view[0:1] = b"\0"
            view[1:nbytes] = serialized.pickled
        return Located(segment, offset, nbytes)

    def _allocate(self, nbytes: int) -> tuple[int, int, memoryview]:
        with self._lock:
            found = self._arena.allocate(nbytes)
        if found is not None:
            return found
        with self._requesting:
            while True:
                with self._lock:
                    # Freed ranges may have come back while we waited for our turn, or lie unread.
                    if not self._client._reading:
                        self._client._read_available()
                    found = self._arena.allocate(nbytes)
                    if found is not None:
                        return found
                    self._answer = Waiter(1)
                answer = self._client.exchange(SegmentRequest(nbytes), self._answer)
                if isinstance(answer, messages.SegmentDenied) and not answer.retry:
                    raise exceptions.ObjectStoreFullError(
                        answer.need_bytes, answer.used_bytes, answer.capacity_bytes
                    )

    def granted(self, segment: int, nbytes: int, descriptor: int) -> None:
        self._arena.add(segment, descriptor, nbytes)
        self._set_answer(None)

    def denied(self, message: messages.SegmentDenied) -> None:
        self._set_answer(message)

    def _set_answer(self, answer: messages.SegmentDenied | None) -> None:
        if self._answer is not None:
            self._answer.result = answer
            self._answer.remaining = 0

    def released(self, segment: int, offsets: tuple[int, ...]) -> None:
        for offset in offsets:
            self._arena.release(segment, offset)
        # Those that have been empty longest go; the one just emptied is warm.
        for extra in self._arena.empty_segments()[:-_SPARE_SEGMENTS]:
            self._return(extra, self._client._channel.outbox)

    def give_back(self, outbox: list[Any]) -> None:
        """Return every empty segment: the node needs the memory."""
        for segment in self._arena.empty_segments():
            self._return(segment, outbox)

    def _return(self, segment: int, outbox: list[Any]) -> None:
        self._arena.remove(segment)
        outbox.append(SegmentReturn(segment))

    # --- reading ----------------------------------------------------------------------------------

    def arrived(self, object_id: bytes, location: Located, *, wanted: bool) -> None:
        """The node has pinned the object for us."""
        if not wanted or object_id in self._arrivals:
            self._unpins.append(object_id)
        else:
            self._arrivals[object_id] = location

    def forget_arrivals(self, dropped: list[bytes]) -> None:
        """What arrived for a get that had given up, when its ref goes too: nobody will map it."""
        if self._arrivals:
            for object_id in dropped:
                if self._arrivals.pop(object_id, None) is not None:
                    self._unpins.append(object_id)

    def has_arrived(self, object_id: bytes) -> bool:
        return object_id in self._arrivals

    def live_view(self, ref: ObjectRef[Any]) -> Any:
        """The array over the object that some earlier get still keeps alive, or None."""
        return None if ref._view is None else ref._view()

    def open_arrived(self, ref: ObjectRef[Any]) -> Any:
        """The pinned array of an object that has arrived; None if another thread took it first."""
        with self._lock:
            view = self.live_view(ref)
            if view is not None:
                return view
            location = self._arrivals.pop(ref._id, None)
        if location is None:
            return None
        array = self.pinned(ref._id, location)
        with self._lock:
            ref._view = weakref.ref(array)
        return array

    def pinned(self, object_id: bytes, location: Located) -> Any:
        """An array over a location the node has pinned for us; its death sends the Unpin."""
        self.ensure_open(location.segment)
        with self._lock:
            view = self._readers.view(location.segment, location.offset, location.nbytes)
        unpins = self._unpins

        def release(object_id: bytes = object_id) -> None:
            unpins.append(object_id)

        return pinned_view(view, release)

    def unpin(self, object_id: bytes) -> None:
        """Of what the node has pinned for us and nobody will open."""
        self._unpins.append(object_id)

    def ensure_open(self, segment: int) -> None:
        """Map the segment for reading; asks the node for its descriptor the first time."""
        while not self._readers.has(segment):
            with self._lock:
                waiter = self._opening.get(segment)
                first = waiter is None
                if waiter is None:
                    waiter = self._opening[segment] = Waiter(1)
            if first:
                self._client.exchange(SegmentOpen(segment), waiter)
            else:
                with self._lock:
                    self._client._wait(waiter, None, giving_back=False)

    def opened(self, segment: int, nbytes: int, descriptor: int) -> None:
        self._readers.add(segment, descriptor, nbytes)
        waiter = self._opening.pop(segment, None)
        if waiter is not None:
            waiter.remaining = 0

    def closed(self, segment: int) -> None:
        self._readers.forget(segment)

    def pending_unpins(self) -> bool:
        return bool(self._unpins)

    def collect_unpins(self, outbox: list[Any]) -> None:
        unpins = self._unpins
        while unpins:
            outbox.append(Unpin(unpins.popleft()))

    def close(self) -> None:
        self._arrivals.clear()
