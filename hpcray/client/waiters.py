"""What somebody waits for: a count that reaches zero. Pure; guarded by the client's lock.

A table maps the id of what is awaited to its waiter, or to a list of them. Whoever learns that it
has come takes the entry out and tells them (`tell`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpcray.protocol import values

Table = dict[bytes, Any]


class Waiter:
    """A thread that waits for `remaining` things: of these objects, if it is for some."""

    __slots__ = ("ids", "remaining", "result")

    def __init__(self, remaining: int, ids: Sequence[bytes] = ()) -> None:
        self.ids = ids
        self.remaining = remaining
        self.result: Any = None

    def arrived(self, object_id: bytes, value: bytes | None) -> None:
        """One thing has come; `value`: the packed one, if it came in a message."""
        self.remaining -= 1


class FailFast(Waiter):
    """Over at the first error, too."""

    __slots__ = ()

    def arrived(self, object_id: bytes, value: bytes | None) -> None:
        self.remaining -= 1
        if value is not None and value[0] >= values.ERROR and self.result is None:
            self.result = value
            self.remaining = 0


def add(table: Table, object_id: bytes, waiter: Any) -> None:
    other = table.get(object_id)
    if other is None:
        table[object_id] = waiter
    elif type(other) is list:
        other.append(waiter)
    else:
        table[object_id] = [other, waiter]


def remove(table: Table, object_id: bytes, waiter: Any) -> None:
    """It waits no more, if it did."""
    other = table.get(object_id)
    if other is waiter:
        del table[object_id]
    elif type(other) is list and waiter in other:
        other.remove(waiter)
        if not other:
            del table[object_id]


def tell(table: Table, object_id: bytes, value: bytes | None = None) -> None:
    """What they waited for has come."""
    waiter = table.pop(object_id, None)
    if type(waiter) is Waiter:
        waiter.remaining -= 1
    elif type(waiter) is list:
        for one in waiter:
            one.arrived(object_id, value)
    elif waiter is not None:
        waiter.arrived(object_id, value)
