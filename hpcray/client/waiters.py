"""What a thread waits for: a count that reaches zero. Guarded by the client's lock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Waiter:
    """A thread (or future) waiting for `remaining` things: of these objects, if it is for some."""

    __slots__ = ("ids", "remaining", "result")

    def __init__(self, remaining: int) -> None:
        self.ids: Sequence[bytes] = ()
        self.remaining = remaining
        self.result: Any = None


def count_down(waiter: Any) -> None:
    """One thing has come; `waiter` is a Waiter or a list of them."""
    if type(waiter) is list:
        for one in waiter:
            one.remaining -= 1
    else:
        waiter.remaining -= 1
