"""Values in shared memory, written and read by threads that may have to wait for the node.

    write   allocate (or ask for a segment and wait) --> one copy --> Located
    pinned  a place the node has pinned for us --> map its segment once (or wait) --> array;
            its last view dies --> Unpin

What is granted and mapped is in `store.py`.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any

from hpcray import exceptions
from hpcray.client.link import Link
from hpcray.client.objects import Objects
from hpcray.client.references import ObjectRef
from hpcray.client.serialization import Serialized
from hpcray.client.store import Store
from hpcray.objects.segments import pinned_view
from hpcray.protocol import values
from hpcray.protocol.messages import Located, SegmentDenied


class Memory:
    def __init__(self, link: Link, store: Store, objects: Objects) -> None:
        self._link = link
        self._store = store
        self._objects = objects
        self._unpins: deque[bytes] = objects.unpins
        # One request for memory at a time: others would all be granted a segment each. (Only a
        # finaliser that puts makes a second one, of the same thread.)
        self._requesting = threading.RLock()

    # --- writing ----------------------------------------------------------------------------------

    def write(self, serialized: Serialized) -> Located:
        """Copy a value into shared memory.

        Raises:
          ObjectStoreFullError: no room, and none to be expected.
        """
        nbytes = serialized.nbytes
        segment, offset, view = self._allocate(nbytes)
        location = Located(segment, offset, nbytes)
        try:
            if serialized.buffers:
                values.pack_into(view[:nbytes], serialized.pickled, serialized.buffers)
            else:
                view[0:1] = b"\0"
                view[1:nbytes] = serialized.pickled
        except BaseException:  # interrupted: nobody will hear of the range
            self.discard(location)
            raise
        return location

    def write_packed(self, packed: bytes) -> Located:
        """As `write`, of what is packed already."""
        segment, offset, view = self._allocate(len(packed))
        view[: len(packed)] = packed
        return Located(segment, offset, len(packed))

    def discard(self, location: Located) -> None:
        """What was written will not be told to anybody."""
        with self._link:
            self._store.release(location)

    def _allocate(self, nbytes: int) -> tuple[int, int, memoryview]:
        store = self._store
        with self._link:
            found = store.allocate(nbytes)
        if found is not None:
            return found
        with self._requesting:
            while True:
                with self._link as link:
                    link.check()
                    # Freed ranges may have come back while we waited for our turn, or lie unread.
                    link.read(all=True)
                    found = store.allocate(nbytes)
                    if found is not None:
                        return found
                    waiter = store.request(nbytes)
                    link.flush(drain=True)
                    link.wait(waiter, None, giving_back=False)
                answer = waiter.result
                if isinstance(answer, SegmentDenied) and not answer.retry:
                    raise exceptions.ObjectStoreFullError(
                        answer.need_bytes, answer.used_bytes, answer.capacity_bytes,
                        answer.reason or answer.contents)

    # --- reading ----------------------------------------------------------------------------------

    def open_arrived(self, ref: ObjectRef[Any]) -> Any:
        """The pinned array of an object that has arrived; None if another thread took it first."""
        objects = self._objects
        with self._link:
            view = objects.find(ref)
            if view is not None:
                return view
            location = objects.take_arrival(ref._id)
        if location is None:
            return None
        array = self.pinned(ref._id, location)
        ref._view = weakref.ref(array)
        return array

    def pinned(self, object_id: bytes, location: Located) -> Any:
        """An array over a location the node has pinned for us; its death sends the Unpin."""
        store = self._store
        with self._link as link:
            while not store.is_open(location.segment):
                waiter = store.open(location.segment)
                link.flush(drain=True)
                link.wait(waiter, None, giving_back=False)
            view = store.view(location)
        unpins = self._unpins

        def release(object_id: bytes = object_id) -> None:
            unpins.append(object_id)

        return pinned_view(view, release)
