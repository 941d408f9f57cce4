"""The consumer's end of a generator task: `ObjectRefGenerator`, and what the client knows of it.

    Yielded --> Stream.known        the node says which items are there; it holds them for us
    take    --> Stream.taken        `next` makes the ref of the next one
    the generator dies --> StreamDropped(taken): the node lets go of the rest

The generator and its stream are two things: when the generator is dead, its stream still says how
much it took. The protocol between nodes is in `node/streams.py`.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from typing import Any, Generic, NoReturn, Self, TypeVar

from hpcray.client import waiters
from hpcray.client.references import (
    LOCAL,
    NOT_READY,
    READY,
    ObjectRef,
    ReferenceTable,
    drop,
)
from hpcray.client.waiters import Table, Waiter
from hpcray.protocol import ids
from hpcray.protocol.messages import (
    StreamDropped,
    StreamEnded,
    StreamRoom,
    StreamTaken,
    Yielded,
)

# Instead of a number of returns: a stream, without and with a window.
STREAMED = -1
WINDOWED = -2

T_co = TypeVar("T_co", covariant=True)


class Stream:
    """What the client knows of a stream; guarded by its lock."""

    __slots__ = ("ended", "known", "next_id", "taken", "task_id", "values", "windowed")

    def __init__(self, task_id: bytes, windowed: bool) -> None:
        self.task_id = task_id
        self.windowed = windowed  # the task waits for us: tell what was taken
        self.known = 0
        self.taken = 0
        self.next_id = ids.return_id(task_id, 1)  # of the item to be taken next
        self.ended = False
        self.values: dict[int, bytes] = {}  # small ones not taken yet


class ObjectRefGenerator(Generic[T_co]):
    """The refs of what a generator task yields, each as soon as it is there.

    `for ref in generator` (or `async for`) waits for the next item; the task goes on meanwhile. An
    exception of the task is its last item. Made by calling a generator with `.remote()`; it stays
    in the process that made the call. Dropping it lets go of the items not taken; the task goes on.
    """

    __slots__ = ("__weakref__", "_ref", "_stream", "_streams")

    _streams: Streams
    _ref: ObjectRef[None]
    _stream: Stream

    def __new__(cls, *_: object) -> Self:
        raise TypeError(
            "an ObjectRefGenerator cannot be built directly; calling a generator returns one")

    def __iter__(self) -> Iterator[ObjectRef[T_co]]:
        return self

    def __next__(self) -> ObjectRef[T_co]:
        ref = self._streams.next_item(self)
        if ref is None:
            raise StopIteration
        return ref

    def __aiter__(self) -> AsyncIterator[ObjectRef[T_co]]:
        return self

    async def __anext__(self) -> ObjectRef[T_co]:
        import asyncio

        while self._ready == NOT_READY:
            await asyncio.wrap_future(self._streams.item_future(self))
        ref = self._streams.next_item(self)
        if ref is None:
            raise StopAsyncIteration
        return ref

    def completed(self) -> ObjectRef[None]:
        """The ref of the task's end: None, or the exception that ended it."""
        return self._ref

    def next_ready(self) -> bool:
        """Whether `next` would return an item without waiting."""
        return self._stream.known > self._stream.taken

    def is_finished(self) -> bool:
        """Whether the task is over and every item taken."""
        stream = self._stream
        return stream.ended and stream.known == stream.taken

    # To `wait`, a generator is the ref of its next item.
    @property
    def _id(self) -> bytes:
        return self._stream.next_id

    @property
    def _ready(self) -> int:
        stream = self._stream
        return LOCAL if stream.known > stream.taken or stream.ended else NOT_READY

    def send(self, value: Any) -> NoReturn:
        raise NotImplementedError("nothing can be sent to a remote generator")

    def throw(self, *_: Any) -> NoReturn:
        raise NotImplementedError("nothing can be thrown into a remote generator; see cancel()")

    def close(self) -> NoReturn:
        raise NotImplementedError("a remote generator cannot be closed; see cancel()")

    asend = send
    athrow = throw
    aclose = close

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an ObjectRefGenerator stays in the process that made the call: pass the refs it "
            "gives, or list(generator)")

    def __del__(self, _drop: Callable[[bytes], None] = drop) -> None:
        # As for refs, only this: `ReferenceTable.drain` tells it from an object by its length.
        _drop(self._stream.task_id)

    def __repr__(self) -> str:
        return f"ObjectRefGenerator({self._ref.hex()})"


class DynamicObjectRefGenerator(Generic[T_co]):
    """The value of a task with `num_returns="dynamic"`: refs to all that it has yielded."""

    __slots__ = ("_refs",)

    def __init__(self, refs: list[ObjectRef[T_co]]) -> None:
        self._refs = refs

    def __iter__(self) -> Iterator[ObjectRef[T_co]]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)

    def __reduce__(self) -> tuple[Any, ...]:
        return (DynamicObjectRefGenerator, (self._refs,))


class Streams:
    """The streams this process consumes. Guarded by the client's lock."""

    # Waiting is not this file's; the wiring sets them (client.py).
    next_item: Callable[[ObjectRefGenerator[Any]], ObjectRef[Any] | None]
    item_future: Callable[[ObjectRefGenerator[Any]], Future[None]]

    def __init__(
        self, outbox: list[Any], refs: ReferenceTable, ready_waiters: Table,
        generator: type[ObjectRefGenerator[Any]],
    ) -> None:
        self._generator = generator
        self._outbox = outbox
        self._refs = refs
        self._waiters = ready_waiters  # by the id of the next item
        self._streams: dict[bytes, Stream] = {}

    def open(self, task_id: bytes, windowed: bool, ref: ObjectRef[None]) -> Any:
        """The generator of a task being submitted; `ref` is its end."""
        stream = self._streams[task_id] = Stream(task_id, windowed)
        generator = object.__new__(self._generator)
        generator._stream = stream
        generator._ref = ref
        generator._streams = self
        return generator

    def find(self, task_id: bytes) -> Stream | None:
        return self._streams.get(task_id)

    def take_item(self, stream: Stream) -> ObjectRef[Any] | None:
        """The ref of the next item, which is there; None at the end."""
        taken = stream.taken
        if stream.known == taken:
            return None
        value = stream.values.pop(taken, None)
        ref = self._refs.fresh(stream.next_id)
        stream.taken = taken + 1
        stream.next_id = ids.return_id(stream.task_id, taken + 2)
        ref._ready = READY
        if value is not None:
            ref._value = value
            ref._ready = LOCAL
        if stream.windowed and not stream.ended:
            self._outbox.append(StreamTaken(stream.task_id, stream.taken))
        return ref

    def on_yielded(self, message: Yielded) -> None:
        stream = self._streams.get(message.task_id)
        if stream is None:  # dropped meanwhile
            self._outbox.append(StreamDropped(message.task_id, message.index))
            return
        stream.known = message.index + 1
        if message.value:
            stream.values[message.index] = message.value
        waiters.tell(self._waiters, stream.next_id)

    def on_ended(self, message: StreamEnded) -> None:
        stream = self._streams.get(message.task_id)
        if stream is not None:
            stream.ended = True
            waiters.tell(self._waiters, stream.next_id)

    def drop(self, task_ids: list[bytes]) -> None:
        """Their generators have died."""
        for task_id in task_ids:
            stream = self._streams.pop(task_id, None)
            if stream is not None:
                self._outbox.append(StreamDropped(task_id, stream.taken))
        task_ids.clear()


class Room(Waiter):
    """What a generator task of this process knows of its consumer."""

    __slots__ = ("needed", "taken", "wake")

    def __init__(self) -> None:
        super().__init__(0)
        self.taken = 0
        self.needed = 0
        self.wake: Callable[[], None] | None = None  # instead of a waiting thread

    def need(self, needed: int) -> bool:
        """Whether so many items are taken; if not, this room is told when they are."""
        self.needed = needed
        self.remaining = int(self.taken < needed)
        return not self.remaining


class Rooms:
    """The windows of generator tasks that run in this process. Guarded by the client's lock."""

    def __init__(self) -> None:
        self._rooms: dict[bytes, Room] = {}

    def open(self, task_id: bytes) -> Room:
        """Before the first item of a task with a window; `close` after its last."""
        room = self._rooms[task_id] = Room()
        return room

    def find(self, task_id: bytes) -> Room:
        return self._rooms[task_id]

    def close(self, task_id: bytes) -> None:
        self._rooms.pop(task_id, None)

    def let_go(self, task_id: bytes) -> None:
        """It is cancelled: it waits for nobody any more."""
        self._taken(task_id, sys.maxsize)

    def on_room(self, message: StreamRoom) -> None:
        self._taken(message.task_id, message.taken)

    def _taken(self, task_id: bytes, taken: int) -> None:
        room = self._rooms.get(task_id)
        if room is not None:
            room.taken = max(room.taken, taken)
            if room.taken >= room.needed and room.remaining:
                room.remaining = 0
                if room.wake is not None:
                    room.wake()
