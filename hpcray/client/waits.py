"""`wait`: which of many refs are ready, for threads that wait until enough are.

What is left of the latest one is remembered (`groups.py`), for the loop that waits on it again.
"""

from __future__ import annotations

import time
from typing import Any

from hpcray.client import waiters
from hpcray.client.groups import Group
from hpcray.client.link import Link
from hpcray.client.objects import Objects
from hpcray.client.references import LOCAL, READY, ObjectRef, ReferenceTable
from hpcray.client.waiters import Waiter

# A list this long may be one that a loop waits on.
_LOOPED = 64


class Waits:
    def __init__(self, link: Link, refs: ReferenceTable, objects: Objects) -> None:
        self._link = link
        self._refs = refs
        self._objects = objects
        self.group: Group | None = None  # of the latest `wait`

    def known_part(self, refs: list[Any], *, fetch: bool) -> int:
        """How many of the refs, from the first one on, are what the latest `wait` left."""
        group = self.group
        if group is not None and group.match(refs, LOCAL if fetch else READY):
            return group.known
        return 0

    def is_known(self, ref: Any) -> bool:
        """Whether the latest `wait` left it among others."""
        group = self.group
        return group is not None and group.has(ref)

    def wait(
        self, refs: list[Any], count: int, timeout_s: float | None, fetch: bool
    ) -> tuple[list[Any], list[Any]]:
        """Split `refs` into at most `count` ready ones and the rest, both in the given order.

        An ObjectRefGenerator stands for its next item.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        level = LOCAL if fetch else READY
        # A few of many refs are what a loop waits for, which comes again with the others.
        known = self.known_part(refs, fetch=fetch)
        looped = len(refs) >= _LOOPED and count * 4 <= len(refs)
        if not (looped or known) or set(map(type, refs[known:])) - {ObjectRef}:
            return self._wait_once(refs, count, deadline_s, level)
        objects = self._objects
        with self._link as link:
            group = self.group
            if group is None or not group.match(refs, level):
                if group is not None and not group.busy:
                    group.leave(objects.ready_waiters)
                group = Group(level)
            known = group.known
            if known < len(refs):
                absent = group.add(refs[known:], objects.ready_waiters)
                asked = [ref._id for ref in absent]
                self._refs.check_session(asked)
                objects.watch(asked, level)
            group.busy = True
            self.group = group
            try:
                if group.need(count) > 0:
                    link.flush()
                    link.wait(group, deadline_s)
                    # Those not needed stay watched: the next wait finds them ready for free.
                return group.take(count)
            finally:
                group.busy = False
                if self.group is not group:  # another thread has waited meanwhile
                    group.leave(objects.ready_waiters)

    def _wait_once(
        self, refs: list[Any], count: int, deadline_s: float | None, level: int
    ) -> tuple[list[Any], list[Any]]:
        """Streams may be among them, whose ids change."""
        objects = self._objects
        with self._link as link:
            absent = [ref for ref in refs if ref._ready < level]
            waiter = Waiter(count - (len(refs) - len(absent)))
            if waiter.remaining > 0:
                awaited = waiter.ids = [ref._id for ref in absent]
                self._refs.check_session(awaited)
                # A stream tells by itself.
                objects.watch([r._id for r in absent if type(r) is ObjectRef], level)
                for object_id in awaited:
                    waiters.add(objects.ready_waiters, object_id, waiter)
                try:
                    link.flush()
                    link.wait(waiter, deadline_s)
                finally:
                    if waiter.remaining > 0 or count < len(refs):
                        objects.forget(objects.ready_waiters, awaited, waiter)
        ready: list[Any] = []
        rest: list[Any] = []
        for ref in refs:
            (ready if len(ready) < count and ref._ready >= level else rest).append(ref)
        return ready, rest

    def let_go(self) -> None:
        """Of the refs of a `wait` whose list the user has dropped."""
        group = self.group
        if group is not None and group.abandoned():
            with self._link:
                if self.group is group and group.abandoned():
                    group.leave(self._objects.ready_waiters)
                    self.group = None

    def close(self) -> None:
        self.group = None
