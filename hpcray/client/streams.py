"""The consumer's end of a generator task: `ObjectRefGenerator`, and what the client knows of it.

    Yielded --> Stream.known        the node says which items are there; it holds them for us
    take    --> Stream.taken        `next` makes the ref of the next one
    the generator dies --> StreamDropped(taken): the node lets go of the rest

The generator and its stream are two things: when the generator is dead, its stream still says how
much it took. The protocol between nodes is in `node/streams.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Self, TypeVar

from hpcray.client.references import LOCAL, NOT_READY, ObjectRef, _drop
from hpcray.protocol import ids

if TYPE_CHECKING:
    from hpcray.client.client import Client

T_co = TypeVar("T_co", covariant=True)


class Stream:
    """What the client knows of a stream; guarded by its lock."""

    __slots__ = ("ended", "known", "taken", "task_id", "values", "windowed")

    def __init__(self, task_id: bytes, windowed: bool) -> None:
        self.task_id = task_id
        self.windowed = windowed  # the task waits for us: tell what was taken
        self.known = 0
        self.taken = 0
        self.ended = False
        self.values: dict[int, bytes] = {}  # small ones not taken yet

    @property
    def next_id(self) -> bytes:
        return ids.return_id(self.task_id, self.taken + 1)


class ObjectRefGenerator(Generic[T_co]):
    """The refs of what a generator task yields, each as soon as it is there.

    `for ref in generator` (or `async for`) waits for the next item; the task goes on meanwhile. An
    exception of the task is its last item. Made by calling a generator with `.remote()`; it stays
    in the process that made the call. Dropping it lets go of the items not taken; the task goes on.
    """

    __slots__ = ("__weakref__", "_client", "_ref", "_stream")

    _client: Client
    _ref: ObjectRef[None]
    _stream: Stream

    def __new__(cls, *_: object) -> Self:
        raise TypeError(
            "an ObjectRefGenerator cannot be built directly; calling a generator returns one")

    def __iter__(self) -> Iterator[ObjectRef[T_co]]:
        return self

    def __next__(self) -> ObjectRef[T_co]:
        client = self._client
        client.await_item(self)
        ref = client.take_item(self._stream)
        if ref is None:
            raise StopIteration
        return ref

    def __aiter__(self) -> AsyncIterator[ObjectRef[T_co]]:
        return self

    async def __anext__(self) -> ObjectRef[T_co]:
        import asyncio

        while self._ready == NOT_READY:
            await asyncio.wrap_future(self._client.item_future(self))
        ref = self._client.take_item(self._stream)
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

    def __del__(self, _drop: Callable[[bytes], None] = _drop) -> None:
        # As for refs, only this: `ReferenceTable.drain` tells it from an object by its length.
        _drop(self._stream.task_id)

    def __repr__(self) -> str:
        return f"ObjectRefGenerator({self._ref.hex()})"


def new_generator(client: Client, stream: Stream, ref: ObjectRef[None]) -> ObjectRefGenerator[Any]:
    generator: ObjectRefGenerator[Any] = object.__new__(ObjectRefGenerator)
    generator._client = client
    generator._stream = stream
    generator._ref = ref
    return generator


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
