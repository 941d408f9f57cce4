"""Calls in the air, of actors with `max_pending_calls`: this process counts its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpcray import exceptions
from hpcray.client.references import READY, ObjectRef
from hpcray.client.streams import ObjectRefGenerator
from hpcray.protocol.messages import Watch

if TYPE_CHECKING:
    from hpcray.client.client import Client


class PendingCalls:
    def __init__(self, client: Client) -> None:
        self._client = client
        # By actor: the results of calls that may not be over.
        self._pending: dict[bytes, list[ObjectRef[Any]]] = {}

    def check(self, actor_id: bytes, limit: int, name: str) -> None:
        """Whether this process may call the actor once more.

        Raises:
          PendingCallsLimitExceeded: no.
        """
        client = self._client
        with client._lock:
            pending = self._pending.get(actor_id)
            if pending is None or len(pending) < limit:
                return
            if not client._reading:
                client._read_available()
            pending = self._pending[actor_id] = [ref for ref in pending if not ref._ready]
            if len(pending) >= limit:
                raise exceptions.PendingCallsLimitExceeded(
                    f"{name}: {len(pending)} calls of this process are pending, and its actor has "
                    f"max_pending_calls={limit}; wait for some of them first")

    def note(self, actor_id: bytes, result: Any) -> None:
        """A call with this (first) return is in the air; the node says when it is over."""
        client = self._client
        ref = result.completed() if type(result) is ObjectRefGenerator else result
        with client._lock:
            self._pending.setdefault(actor_id, []).append(ref)
            if client._watched.setdefault(ref._id, READY) == READY:
                client._ask(Watch, [ref._id], False)
                client._helper.arm()
