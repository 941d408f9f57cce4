"""Calls in the air, of actors with `max_pending_calls`: this process counts its own. Pure."""

from __future__ import annotations

from typing import Any

from hpcray import exceptions
from hpcray.client import waiters
from hpcray.client.objects import Objects
from hpcray.client.references import READY, ObjectRef
from hpcray.client.streams import ObjectRefGenerator


class _Calls:
    """Of one actor: the results of calls that are not over. Waits for each of them."""

    __slots__ = ("refs",)

    def __init__(self) -> None:
        # Held until then: the node says of held ones only when they are ready.
        self.refs: dict[bytes, ObjectRef[Any]] = {}

    def arrived(self, object_id: bytes, value: bytes | None) -> None:
        self.refs.pop(object_id, None)


class PendingCalls:
    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._calls: dict[bytes, _Calls] = {}

    def count(self, actor_id: bytes) -> int:
        calls = self._calls.get(actor_id)
        return 0 if calls is None else len(calls.refs)

    def note(self, actor_id: bytes, result: Any) -> None:
        """A call with this (first) return is in the air; the node says when it is over."""
        ref = result.completed() if type(result) is ObjectRefGenerator else result
        calls = self._calls.setdefault(actor_id, _Calls())
        calls.refs[ref._id] = ref
        waiters.add(self._objects.ready_waiters, ref._id, calls)
        self._objects.watch((ref._id,), READY)


def exceeded(name: str, count: int, limit: int) -> exceptions.PendingCallsLimitExceeded:
    return exceptions.PendingCallsLimitExceeded(
        f"{name}: {count} calls of this process are pending, and its actor has "
        f"max_pending_calls={limit}; wait for some of them first")
