"""Futures over refs: completed by the helper thread, or by the loop of an async actor.

    future(ref) --value comes--> due --complete()--> result or exception set, callbacks run
                --connection lost--> due, with the error of a get
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from hpcray.client import waiters
from hpcray.client.helper import Helper
from hpcray.client.link import Link
from hpcray.client.objects import Objects
from hpcray.client.references import ObjectRef, ReferenceTable
from hpcray.client.streams import ObjectRefGenerator

# What a future stands for: a ref's value, or that a stream has its next item.
Awaited = ObjectRef[Any] | ObjectRefGenerator[Any]


class RefFuture(Future[Any]):
    """What `ObjectRef.future` returns: executors over Ray pass its `object_ref` on."""

    object_ref: ObjectRef[Any]


class _Due:
    """Waits in a table of waiters for the value of `awaited`."""

    __slots__ = ("_tell", "awaited", "future")

    def __init__(self, tell: Callable[[_Due], None], awaited: Awaited, future: Future[Any]) -> None:
        self._tell = tell
        self.awaited = awaited
        self.future = future

    def arrived(self, object_id: bytes, value: bytes | None) -> None:
        self._tell(self)


class Futures:
    """Its tables are guarded by the client's lock."""

    def __init__(
        self, link: Link, refs: ReferenceTable, objects: Objects, helper: Helper,
        get: Callable[[tuple[ObjectRef[Any]], None], list[Any]],
    ) -> None:
        self._link = link
        self._refs = refs
        self._objects = objects
        self._helper = helper
        self._get = get
        self._waiting: set[_Due] = set()
        self._due: deque[_Due] = deque()

    def is_waiting(self) -> bool:
        """Whether some future waits for what the node sends."""
        return bool(self._waiting)

    def future(self, ref: ObjectRef[Any]) -> Future[Any]:
        """A future of the ref's value. To cancel it ends the wait, and not the task."""
        future = RefFuture()
        future.object_ref = ref
        with self._link as link:
            link.check()
            if ref._id[20:24] != self._refs.job_id and ref._value is None:
                self._refs.check_session((ref._id,))
            self._helper.start()
            due = _Due(self._arrived, ref, future)
            if ref._value is not None:
                self._due.append(due)
            else:
                self._waiting.add(due)
                waiters.add(self._objects.value_waiters, ref._id, due)
                self._objects.want((ref._id,))
            link.flush()
        self._helper.wake()
        return future

    def item_future(self, generator: ObjectRefGenerator[Any]) -> Future[None]:
        """Completed when the stream has another item or its end."""
        future: Future[None] = Future()
        with self._link as link:
            link.check()
            self._helper.start()
            if generator._ready:
                future.set_result(None)
            else:
                due = _Due(self._arrived, generator, future)
                self._waiting.add(due)
                waiters.add(self._objects.ready_waiters, generator._id, due)
            link.flush()
        self._helper.wake()
        return future

    def _arrived(self, due: _Due) -> None:
        self._waiting.discard(due)
        self._due.append(due)
        self._helper.wake()

    def lost(self) -> None:
        """Nothing more will come: `complete` ends them with the error of a wait."""
        with self._link:
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
                due.future.set_result(self._get((due.awaited,), None)[0])
            except BaseException as error:
                due.future.set_exception(error)
