"""In which order the node hears its clients: cause before effect. Pure.

Clients also speak to each other (client/direct_calls.py), and their channels to the node are
independent. So a batch may begin with whom its sender had heard meanwhile, and how many datagrams
each of those had sent to the node before (`CausalHeader.heard`): that many are handled first,
however they arrive here.

Causes have no cycles: what a batch waits for never waits for that batch. So this recursion ends,
and as deep as it goes, each client's own batches stay in their order.

NB-1  a batch is handled after everything that its sender had heard of when it was sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from hpcray.protocol.messages import CausalHeader

Batch = list[Any]


class Inbox:
    """What one client says."""

    __slots__ = ("batches", "handled")

    def __init__(self) -> None:
        self.handled = 0  # batches (datagrams) since it introduced itself
        self.batches: deque[Batch] = deque()  # read, and not handled yet


class Inboxes:
    """`read` puts what lies in a client's channel into its inbox; False if there is nothing."""

    def __init__(
        self, read: Callable[[int], bool], handle: Callable[[int, Batch], None]
    ) -> None:
        self._read = read
        self._handle = handle
        self.of: dict[int, Inbox] = {}
        self._caught_up: dict[int, None] = {}  # what was read of them may be more than was needed

    def add(self, number: int) -> Inbox:
        inbox = self.of[number] = Inbox()
        return inbox

    def handle_all(self, number: int) -> None:
        """Handle what has been read of this client, and what that follows from: all that was read,
        as nobody will say again that there is something."""
        while True:
            inbox = self.of[number]
            while inbox.batches:
                self._handle_next(number, inbox)
            if not self._caught_up:
                return
            number = next(iter(self._caught_up))
            del self._caught_up[number]

    def _handle_next(self, number: int, inbox: Inbox) -> None:
        batch = inbox.batches.popleft()
        first = batch[0]
        if type(first) is CausalHeader:
            for other, sent in first.heard:
                self._catch_up(other, sent)
        self._handle(number, batch)
        inbox.handled += 1

    def _catch_up(self, number: int, sent: int) -> None:
        inbox = self.of.get(number)
        if inbox is None:
            return  # it has ended; all it said was heard before that
        while inbox.handled < sent and (inbox.batches or self._read(number)):
            self._handle_next(number, inbox)
        if inbox.batches:
            self._caught_up[number] = None
