"""Questions to the node, and their answers. Pure; guarded by the client's lock."""

from __future__ import annotations

from typing import Any

from hpcray.client.references import ObjectRef
from hpcray.client.waiters import Waiter
from hpcray.protocol.messages import FetchTemplate, Reply, Request, Rows, TemplateIs


class Requests:
    def __init__(self, outbox: list[Any]) -> None:
        self._outbox = outbox
        self._count = 0
        self._waiting: dict[int, tuple[Waiter, list[Any]]] = {}
        self._templates: dict[bytes, Waiter] = {}

    def ask(self, name: str, arguments: Any, rows: list[Any]) -> tuple[int, Waiter]:
        """Its number, and who is told of the Reply, with the ref of what the node holds for it;
        parts of the answer are appended to `rows`."""
        self._count += 1
        waiter = Waiter(1)
        self._waiting[self._count] = (waiter, rows)
        self._outbox.append(Request(self._count, name, arguments))
        return self._count, waiter

    def forget(self, number: int) -> None:
        self._waiting.pop(number, None)

    def on_reply(self, message: Reply, held: ObjectRef[Any] | None) -> bool:
        """Whether somebody waits for it."""
        found = self._waiting.pop(message.request, None)
        if found is None:
            return False
        found[0].result = (message, held)
        found[0].remaining = 0
        return True

    def on_rows(self, message: Rows) -> None:
        found = self._waiting.get(message.request)
        if found is not None:
            found[1].extend(message.rows)

    def fetch_template(self, template_id: bytes, home: int) -> Waiter:
        """What a template id stands for; threads that ask together share the answer."""
        waiter = self._templates.get(template_id)
        if waiter is None:
            waiter = self._templates[template_id] = Waiter(1)
            self._outbox.append(FetchTemplate(template_id, home))
        return waiter

    def on_template(self, message: TemplateIs) -> None:
        if message.template is not None:
            waiter = self._templates.pop(message.template.template_id, None)
            if waiter is not None:
                waiter.result = message
                waiter.remaining = 0
