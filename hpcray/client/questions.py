"""What a thread asks the node rarely, by name, and waits for; and what it tells it at once.

The table of what was asked is in `requests.py`.
"""

from __future__ import annotations

import time
from typing import Any

from hpcray import exceptions
from hpcray.client import serialization
from hpcray.client.link import Link
from hpcray.client.references import ObjectRef, ReferenceTable
from hpcray.client.requests import Requests
from hpcray.protocol import messages
from hpcray.protocol.messages import Reply, TemplateIs
from hpcray.protocol.sizes import check_request

# Of the objects that a timed-out get has waited for, so many are explained.
EXPLAINED = 5
# A node that is not stopped answers within a turn; it asks others for up to 0.7 s.
_EXPLAIN_S = 1.0


class Questions:
    def __init__(
        self, link: Link, outbox: list[Any], refs: ReferenceTable, requests: Requests
    ) -> None:
        self._link = link
        self._outbox = outbox
        self._refs = refs
        self._requests = requests

    def request(
        self, name: str, arguments: Any = None, timeout_s: float | None = None,
        rows: list[Any] | None = None,
    ) -> Any:
        """Ask the node something rare: the reply or its error. `rows` takes what comes in parts."""
        found: list[Any] = [] if rows is None else rows
        reply, _ = self._ask(name, arguments, timeout_s, found)
        return found + reply.result if rows is None and found else reply.result

    def look_up(self, name: str, arguments: Any) -> tuple[Any, ObjectRef[Any] | None]:
        """Ask the node for a name of an actor; the answer, and the ref that makes the actor's
        handle count. Dropped refs are told first: the last handle may be among them."""
        with self._link as link:
            link.flush(drain=True)
        reply, ref = self._ask(name, arguments, None, [])
        return reply.result, ref

    def explain(self, absent: list[bytes]) -> list[str]:
        """What the first of these objects wait for, in sentences. Behind it has come whatever the
        node had for us."""
        try:
            found = self.request("explain", {"ids": b"".join(absent[:EXPLAINED])}, _EXPLAIN_S)
        except exceptions.RayError:
            return []  # the node is stopped, or gone
        return [sentence for sentence in found if sentence]

    def _ask(
        self, name: str, arguments: Any, timeout_s: float | None, found: list[Any]
    ) -> tuple[Reply, ObjectRef[Any] | None]:
        check_request(len(messages.encode(arguments)), name)
        with self._link as link:
            link.check()
            self._refs.tell_holds(self._outbox)
            number, waiter = self._requests.ask(name, arguments, found)
            try:
                link.flush()
                deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
                if not link.wait(waiter, deadline_s):
                    raise exceptions.GetTimeoutError(f"no answer to {name!r} in {timeout_s} s")
            finally:
                self._requests.forget(number)
        reply, ref = waiter.result
        if reply.error is not None:
            raise serialization.failure_to_exception(reply.error)
        return reply, ref

    def fetch_template(self, template_id: bytes, home: int) -> TemplateIs:
        """What a template id stands for (a worker meets it for the first time)."""
        with self._link as link:
            waiter = self._requests.fetch_template(template_id, home)
            link.flush(drain=True)
            link.wait(waiter, None, giving_back=False)
            answer: TemplateIs = waiter.result
            return answer

    def notify(self, message: Any) -> None:
        """Send a one-way message now."""
        with self._link as link:
            link.check()
            self._refs.tell_holds(self._outbox)
            self._outbox.append(message)
            link.flush()
