"""Both ends of streams, for threads that wait: a consumer for the next item, a task for room.

What is known of them is in `streams.py`.
"""

from __future__ import annotations

from typing import Any

from hpcray.client import waiters
from hpcray.client.link import Link
from hpcray.client.references import ObjectRef
from hpcray.client.streams import ObjectRefGenerator, Room, Rooms, Streams
from hpcray.client.waiters import Table, Waiter


class Streaming:
    def __init__(
        self, link: Link, outbox: list[Any], streams: Streams, rooms: Rooms, ready_waiters: Table
    ) -> None:
        self._link = link
        self._outbox = outbox
        self._streams = streams
        self._rooms = rooms
        self._ready_waiters = ready_waiters

    def next_item(self, generator: ObjectRefGenerator[Any]) -> ObjectRef[Any] | None:
        """The ref of the stream's next item, waited for; None at the end."""
        stream = generator._stream
        link = self._link
        link.enter()
        try:
            while stream.known == stream.taken and not stream.ended:
                if link.lost is not None:
                    link.check()
                waiter = Waiter(1)
                object_id = stream.next_id
                table = self._ready_waiters
                waiters.add(table, object_id, waiter)
                try:
                    link.flush()
                    link.wait(waiter, None)
                finally:
                    if waiter.remaining > 0:
                        waiters.remove(table, object_id, waiter)
            ref = self._streams.take_item(stream)
            if stream.windowed and self._outbox:
                link.flush()  # the task may wait for that
            return ref
        finally:
            link.leave()

    # --- of a generator task with a window --------------------------------------------------------

    def open_room(self, task_id: bytes) -> Room:
        with self._link:
            return self._rooms.open(task_id)

    def close_room(self, task_id: bytes) -> None:
        with self._link:
            self._rooms.close(task_id)

    def await_room(self, room: Room, needed: int) -> None:
        """Wait until the consumer of a stream made here has taken `needed` items."""
        with self._link as link:
            if not room.need(needed):
                link.flush()
                link.wait(room, None)

    def has_room(self, room: Room, needed: int) -> bool:
        """As `await_room`, but `room.wake` is called instead."""
        with self._link as link:
            link.flush()
            return room.need(needed)
