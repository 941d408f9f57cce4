"""`wait` on the same refs again and again: what is left of a list, and what is ready. Pure.

    pending = [...]
    while pending:
        done, pending = wait(pending, num_returns=1)

Each turn of this loop looks at a list that differs from the last one by what was taken out. A
`Group` is told as refs become ready and keeps them in the order of the list, so a turn costs a few
copies of the list (at the speed of memory) and not a look at every ref.

    new list -> add: each ref is looked at once -> waiting (in a table) -arrived-> ready (heap)
    take(count) -> the first ready ones, and the list without them: `rest`
    match(list): it is `rest`, perhaps with refs added behind it; else the group is of no use

It holds its refs until the next call or until the user has dropped the list (`abandoned`).
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Any

from hpcray.client import waiters
from hpcray.client.references import ObjectRef
from hpcray.client.waiters import Table, Waiter

Refs = list[ObjectRef[Any]]


class Group(Waiter):
    """One at a time is kept, of the latest `wait`."""

    __slots__ = ("_given", "_positions", "_ready", "_refs", "_where", "busy", "level", "rest")

    def __init__(self, level: int) -> None:
        super().__init__(0)
        self.level = level  # what counts as ready
        self.busy = False  # some thread waits on it
        self.rest: Refs = []  # what the user was given
        self._given: Refs = []  # the same, as it was: the user may change his list
        # Every ref has a number that rises along the list, and keeps it.
        self._positions: list[int] = []  # of `_given`
        self._where: dict[bytes, int] = {}
        self._refs: dict[int, ObjectRef[Any]] = {}
        self._ready: list[int] = []  # a heap of numbers

    def match(self, refs: Sequence[Any], level: int) -> bool:
        """Whether the list begins with what is left of this group."""
        given = self._given
        return (not self.busy and level == self.level and len(refs) >= len(given) > 0
                and (refs == given if len(refs) == len(given) else refs[: len(given)] == given))

    @property
    def known(self) -> int:
        """How many refs of a list that matches it has looked at."""
        return len(self._given)

    def has(self, ref: ObjectRef[Any]) -> bool:
        return ref._id in self._where

    def add(self, refs: Refs, table: Table) -> list[ObjectRef[Any]]:
        """Further refs, behind the others; those of them that are not ready."""
        number = self._positions[-1] + 1 if self._positions else 0
        where = self._where
        absent = []
        for ref in refs:
            object_id = ref._id
            where[object_id] = number
            self._positions.append(number)
            self._refs[number] = ref
            if ref._ready >= self.level:
                heappush(self._ready, number)
            else:
                absent.append(ref)
                waiters.add(table, object_id, self)
            number += 1
        self._given += refs
        return absent

    def need(self, count: int) -> int:
        """Wait for so many; how many are missing."""
        self.remaining = count - len(self._ready)
        return self.remaining

    def arrived(self, object_id: bytes, value: bytes | None) -> None:
        number = self._where.get(object_id)
        if number is not None:
            heappush(self._ready, number)
            self.remaining -= 1

    def take(self, count: int) -> tuple[Refs, Refs]:
        """At most `count` ready ones, in order, and the rest."""
        numbers = [heappop(self._ready) for _ in range(min(count, len(self._ready)))]
        taken = [self._refs.pop(number) for number in numbers]
        given = self._given
        positions = self._positions
        if len(numbers) <= 8:
            for number in reversed(numbers):
                index = bisect_left(positions, number)
                del positions[index]
                del given[index]
        else:
            chosen = set(numbers)
            kept = [i for i, number in enumerate(positions) if number not in chosen]
            self._given = given = [given[i] for i in kept]
            self._positions = [positions[i] for i in kept]
        for ref in taken:
            del self._where[ref._id]
        self.rest = given[:]
        return taken, self.rest

    def leave(self, table: Table) -> None:
        """Nobody waits on it again."""
        for object_id in self._where:
            waiters.remove(table, object_id, self)
        self._where.clear()

    def abandoned(self) -> bool:
        """The user has dropped the list (or there is nothing left in it)."""
        # 2: the attribute, and the argument of the call.
        return not self.busy and (not self._given or sys.getrefcount(self.rest) <= 2)
