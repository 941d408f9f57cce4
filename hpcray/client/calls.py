"""Tasks and calls of actors, from the face to the core: defined once, submitted, counted.

    define --> DefineFunction, DefineTemplate    the first time
    submit --> SubmitTask | SubmitCall           sent at once if the channel was quiet, else soon
    create_actor --> CreateActor
"""

from __future__ import annotations

from typing import Any

from hpcray.client.core import Core, Use
from hpcray.client.imports import Imports
from hpcray.client.link import Link
from hpcray.client.pending import PendingCalls, exceeded
from hpcray.client.references import ObjectRef
from hpcray.protocol.messages import CreateActor, DefineFunction, Preload, Template


class Calls:
    def __init__(self, link: Link, core: Core, imports: Imports | None) -> None:
        self._link = link
        self._core = core
        self._pending = PendingCalls(core.objects)
        self._imports = imports

    def define(self, template: Template, function: DefineFunction | None) -> Use:
        """Make the node know the template (and, before it, its function); see `Core.define`.

        A new function may refer to modules imported meanwhile.
        """
        news = self._imports.news() if self._imports is not None and function is not None else ()
        with self._link:
            if news:
                self._core.outbox.append(Preload(news))
            return self._core.define(template, function)

    def new_actor_id(self) -> bytes:
        with self._link:
            return self._core.new_actor_id()

    def submit(
        self, template_id: bytes, args: bytes, refs: bytes, dep_count: int, return_count: int,
        actor: bytes = b"",
    ) -> list[Any]:
        """Send a task (or, with `actor`, a method call); the refs of its returns, or its stream."""
        link = self._link
        link.enter()
        try:
            if link.lost is not None:
                link.check()
            result = self._core.submit(template_id, args, refs, dep_count, return_count, actor)
            link.linger(len(args) + len(refs))
            return result
        finally:
            link.leave()

    def create_actor(self, message: CreateActor) -> ObjectRef[Any]:
        with self._link as link:
            link.check()
            ref = self._core.create_actor(message)
            link.linger(len(message.args) + len(message.refs))
            return ref

    # --- of actors with `max_pending_calls` -------------------------------------------------------

    def check_pending(self, actor_id: bytes, limit: int, name: str) -> None:
        """Whether this process may call the actor once more.

        Raises:
          PendingCallsLimitExceeded: no.
        """
        with self._link as link:
            if self._pending.count(actor_id) >= limit:
                link.read(all=True)
            count = self._pending.count(actor_id)
        if count >= limit:
            raise exceeded(name, count, limit)

    def note_pending(self, actor_id: bytes, result: Any) -> None:
        """A call of an actor with a limit is in the air; `result`: its (first) return."""
        with self._link as link:
            self._pending.note(actor_id, result)
            link.linger(0)
