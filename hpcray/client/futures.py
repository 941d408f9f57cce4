"""Futures over refs: completed by the helper thread, or by the loop of an async actor.

    of(ref) --value comes--> due --complete()--> result or exception set, callbacks run
            --connection lost--> due, with the error of a get
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from hpcray.client import waiters
from hpcray.client.objects import Objects
from hpcray.client.references import ObjectRef
from hpcray.client.streams import ObjectRefGenerator

# What a future stands for: a ref's value, or that a stream has its next item.
Awaited = ObjectRef[Any] | ObjectRefGenerator[Any]


class RefFuture(Future[Any]):
    """What `ObjectRef.future` returns: executors over Ray pass its `object_ref` on."""

    object_ref: ObjectRef[Any]


class _Due:
    """Waits in a table of waiters for the value of `awaited`."""

    __slots__ = ("_futures", "awaited", "future")

    def __init__(self, futures: Futures, awaited: Awaited, future: Future[Any]) -> None:
        self._futures = futures
        self.awaited = awaited
        self.future = future

    def arrived(self, object_id: bytes, value: bytes | None) -> None:
        self._futures.arrived(self)


class Futures:
    """Guarded by the client's lock, but for `complete`."""

    def __init__(
        self, objects: Objects, get: Callable[[ObjectRef[Any]], Any], wake: Callable[[], None]
    ) -> None:
        """`wake`: something is due; safe with the lock held."""
        self._objects = objects
        self._get = get
        self._wake = wake
        self._waiting: set[_Due] = set()
        self._due: deque[_Due] = deque()

    @property
    def waiting(self) -> bool:
        return bool(self._waiting)

    def of(self, ref: ObjectRef[Any]) -> Future[Any]:
        """A future of the ref's value. To cancel it ends the wait, and not the task."""
        future = RefFuture()
        future.object_ref = ref
        due = _Due(self, ref, future)
        if ref._value is not None:
            self._due.append(due)
            self._wake()
        else:
            self._waiting.add(due)
            waiters.add(self._objects.value_waiters, ref._id, due)
            self._objects.want((ref._id,))
        return future

    def of_item(self, generator: ObjectRefGenerator[Any]) -> Future[None]:
        """Completed when the stream has another item or its end."""
        future: Future[None] = Future()
        if generator._ready:
            future.set_result(None)
        else:
            due = _Due(self, generator, future)
            self._waiting.add(due)
            waiters.add(self._objects.ready_waiters, generator._id, due)
        return future

    def arrived(self, due: _Due) -> None:
        self._waiting.discard(due)
        self._due.append(due)
        self._wake()

    def lost(self) -> None:
        """Nothing more will come: `complete` ends them with the error of a wait."""
        self._due.extend(self._waiting)
        self._waiting.clear()

    def complete(self) -> None:
        """Without the lock: user callbacks run here."""
        while self._due:
            try:
                due = self._due.popleft()
            except IndexError:
                return  # another thread was quicker
            if not due.future.set_running_or_notify_cancel():
                continue
            if type(due.awaited) is ObjectRefGenerator:
                due.future.set_result(None)
                continue
            assert type(due.awaited) is ObjectRef
            try:
                due.future.set_result(self._get(due.awaited))
            except BaseException as error:
                due.future.set_exception(error)
