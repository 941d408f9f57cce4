"""`Queue`: a first-in first-out queue that tasks, actors and drivers share. It is an actor.

    Queue (a handle, pickled freely) --calls--> _QueueActor: one asyncio.Queue, one event loop

Blocking is done by the actor: a `put` or `get` that must wait is a coroutine parked there, so a
waiter costs a call that has not returned, and a timeout needs no second message. The actor answers
"full" and "empty" as values and the errors are raised here: they carry no remote traceback.

What must not go in: anything behind the public API.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

import hpcray as ray

T = TypeVar("T")

# A call that is parked takes one of the actor's places; if waiting `get`s took all of them, the
# `put` they wait for could not come in. As good as unlimited: a place costs nothing until used.
_MAX_CONCURRENCY = 1_000_000


class Empty(queue.Empty):
    """There was no item (in time)."""


class Full(queue.Full):
    """There was no room (in time)."""


class Queue(Generic[T]):
    """Like `asyncio.Queue`, across processes.

    Args:
      maxsize: most items it holds; 0 or less: no limit.
      actor_options: of the actor that is the queue, as for `@remote`. Unless they say otherwise it
        takes no CPU.

    Items are copied into the actor and out of it: put refs to large objects instead of the objects.
    Calls of one process are served in their order, but for those that have to wait. A coroutine
    that is cancelled while it waits (`asyncio.wait_for`) takes nothing. An item that was on its way
    to one, or to a process that has died meanwhile, is lost.

    Every method raises `ActorDiedError` if the queue's process is gone, and RuntimeError after
    `shutdown`.
    """

    def __init__(self, maxsize: int = 0, actor_options: Mapping[str, Any] | None = None) -> None:
        options = {"num_cpus": 0, "max_concurrency": _MAX_CONCURRENCY, **(actor_options or {})}
        self.maxsize = maxsize
        self.actor: Any = ray.remote(**options)(_QueueActor).remote(maxsize)

    def _actor(self) -> Any:
        if self.actor is None:
            raise RuntimeError("this queue was shut down")
        return self.actor

    # --- how many ---------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.size()

    def size(self) -> int:
        """How many items there are; others may change it at any moment."""
        size: int = ray.get(self._actor().size.remote())
        return size

    def qsize(self) -> int:
        return self.size()

    def empty(self) -> bool:
        return self.size() == 0

    def full(self) -> bool:
        return 0 < self.maxsize <= self.size()

    # --- one item ---------------------------------------------------------------------------------

    def put(self, item: T, block: bool = True, timeout: float | None = None) -> None:
        """Add an item; wait for room, at most `timeout` seconds, if `block`.

        Raises:
          Full: there was none.
          ValueError: `timeout` is negative.
        """
        _check_put(ray.get(self._actor().put.remote(item, _limit_s(block, timeout))))

    async def put_async(self, item: T, block: bool = True, timeout: float | None = None) -> None:
        """`put` for coroutines."""
        _check_put(await _answer(self._actor().put.remote(item, _limit_s(block, timeout))))

    def get(self, block: bool = True, timeout: float | None = None) -> T:
        """Take the oldest item; wait for one, at most `timeout` seconds, if `block`.

        Raises:
          Empty: there was none.
          ValueError: `timeout` is negative.
        """
        found: tuple[T, ...] = ray.get(self._actor().get.remote(_limit_s(block, timeout)))
        return _item(found)

    async def get_async(self, block: bool = True, timeout: float | None = None) -> T:
        """`get` for coroutines."""
        found: tuple[T, ...] = await _answer(self._actor().get.remote(_limit_s(block, timeout)))
        return _item(found)

    def put_nowait(self, item: T) -> None:
        """`put(item, block=False)`."""
        self.put(item, block=False)

    def get_nowait(self) -> T:
        """`get(block=False)`."""
        return self.get(block=False)

    # --- many items -------------------------------------------------------------------------------

    def put_nowait_batch(self, items: Iterable[T]) -> None:
        """Add all items in their order, or none.

        Raises:
          Full: there is no room for all of them.
        """
        if not isinstance(items, Iterable):
            raise TypeError("Argument 'items' must be an Iterable")
        batch = list(items)
        size = ray.get(self._actor().put_batch.remote(batch))
        if size is not None:
            raise Full(f"Cannot add {len(batch)} items to queue of size {size} and maxsize "
                       f"{self.maxsize}.")

    def get_nowait_batch(self, num_items: int) -> list[T]:
        """Take so many items, the oldest first, or none.

        Raises:
          Empty: there are fewer.
        """
        if isinstance(num_items, bool) or not isinstance(num_items, int):
            raise TypeError("Argument 'num_items' must be an int")
        if num_items < 0:
            raise ValueError("'num_items' must be nonnegative")
        found: list[T] | int = ray.get(self._actor().get_batch.remote(num_items))
        if isinstance(found, int):
            raise Empty(f"Cannot get {num_items} items from queue of size {found}.")
        return found

    # --- the end ----------------------------------------------------------------------------------

    def shutdown(self, force: bool = False, grace_period_s: float = 5) -> None:
        """End the queue's process; the items in it are lost, and who waits gets `ActorDiedError`.

        Args:
          force: at once. Otherwise earlier calls, those that do not wait, are served first, for at
            most `grace_period_s`.
        """
        actor, self.actor = self.actor, None
        if actor is None:
            return
        if not force:
            done, _ = ray.wait([actor.__ray_terminate__.remote()], timeout=grace_period_s)
            if done:
                return
        ray.kill(actor)


def _limit_s(block: bool, timeout: float | None) -> float | None:
    """How long the actor may wait: None is for ever, 0 not at all."""
    if not block:
        return 0.0
    if timeout is not None and timeout < 0:
        raise ValueError("'timeout' must be a non-negative number")
    return timeout


def _check_put(done: bool) -> None:
    if not done:
        raise Full


def _item(found: tuple[T, ...]) -> T:
    if not found:
        raise Empty
    return found[0]


async def _answer(ref: Any) -> Any:
    try:
        return await ref
    except asyncio.CancelledError:
        ray.cancel(ref)  # or it would wait there still, and take the next item for nobody
        raise


class _QueueActor:
    """Says no by a value: False, or an empty tuple; or the size, where many items are concerned."""

    def __init__(self, maxsize: int) -> None:
        self._queue: asyncio.Queue[Any] = asyncio.Queue(maxsize)

    async def size(self) -> int:
        return self._queue.qsize()

    async def put(self, item: Any, limit_s: float | None) -> bool:
        try:
            if limit_s == 0:
                self._queue.put_nowait(item)
            else:
                await asyncio.wait_for(self._queue.put(item), limit_s)
        except (asyncio.QueueFull, TimeoutError):
            return False
        return True

    async def get(self, limit_s: float | None) -> tuple[Any, ...]:
        try:
            if limit_s == 0:
                return (self._queue.get_nowait(),)
            return (await asyncio.wait_for(self._queue.get(), limit_s),)
        except (asyncio.QueueEmpty, TimeoutError):
            return ()

    async def put_batch(self, items: list[Any]) -> int | None:
        size = self._queue.qsize()
        if 0 < self._queue.maxsize < size + len(items):
            return size
        for item in items:
            self._queue.put_nowait(item)
        return None

    async def get_batch(self, count: int) -> list[Any] | int:
        size = self._queue.qsize()
        if size < count:
            return size
        return [self._queue.get_nowait() for _ in range(count)]


__all__ = ["Empty", "Full", "Queue"]
