"""Futures over refs: completed by the helper thread, or by the loop of an async actor.

    Futures.of(ref) --value comes--> due --complete()--> result or exception set, callbacks run
                    --connection lost--> due, with the error of a get
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from hpcray.client.references import ObjectRef
from hpcray.client.streams import ObjectRefGenerator
from hpcray.protocol.messages import Get

if TYPE_CHECKING:
    from hpcray.client.client import Client

# What a future stands for: a ref's value, or that a stream has its next item.
Awaited = ObjectRef[Any] | ObjectRefGenerator[Any]


class Futures:
    """Guarded by the client's lock, but for `complete`."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.waiting: dict[bytes, list[tuple[Awaited, Future[Any]]]] = {}
        self._due: deque[tuple[Awaited, Future[Any]]] = deque()

    def of(self, ref: ObjectRef[Any]) -> Future[Any]:
        """A future of the ref's value. To cancel it ends the wait, and not the task."""
        client = self._client
        future: Future[Any] = Future()
        with client._lock:
            client._check()
            client._helper.start()
            if ref._value is not None:
                self._due.append((ref, future))
            else:
                self.waiting.setdefault(ref._id, []).append((ref, future))
                if ref._id not in client._asked:
                    client._asked.add(ref._id)
                    client._ask(Get, [ref._id])
                client._flush()
        client._helper.wake()
        return future

    def of_item(self, generator: ObjectRefGenerator[Any]) -> Future[None]:
        """Completed when the stream has another item or its end."""
        client = self._client
        future: Future[None] = Future()
        with client._lock:
            client._check()
            client._helper.start()
            if generator._ready:
                future.set_result(None)
                return future
            self.waiting.setdefault(generator._id, []).append((generator, future))
            client._flush()
        client._helper.wake()
        return future

    def arrived(self, object_id: bytes) -> None:
        found = self.waiting.pop(object_id, None)
        if found is not None:
            self._due.extend(found)
            self._client._helper.wake()

    def lost(self) -> None:
        """Nothing more will come: `complete` ends them with the error of a wait."""
        for found in self.waiting.values():
            self._due.extend(found)
        self.waiting.clear()

    def complete(self) -> None:
        """Without the lock: user callbacks run here."""
        while self._due:
            awaited, future = self._due.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            if type(awaited) is ObjectRefGenerator:
                future.set_result(None)
                continue
            assert type(awaited) is ObjectRef
            try:
                future.set_result(self._client.get([awaited], None)[0])
            except BaseException as error:
                future.set_exception(error)
