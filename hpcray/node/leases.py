"""Slots of other nodes that a home binds its tasks to, and whose turn it is. Pure books.

No step looks at all nodes: who has more than runs there at once, and who has room when tasks are
dealt out, is kept in order as it changes.
"""

from __future__ import annotations

from itertools import islice

# How often one node is asked to give back.
_ASK_BACK_S = 0.005
# A node that had no room for what was dealt to it is left out for this long.
_REST_S = 0.1


class Lease:
    """Slots on another rank for one shape."""

    __slots__ = ("asked_s", "enough", "open", "slots")

    def __init__(self, enough: int) -> None:
        self.slots = 0
        self.open = 0  # assigned, no outcome yet
        self.enough = enough  # so many run there at once, or will
        self.asked_s = 0.0  # when it was last asked to give something back


class Leases:
    """Of one shape, by rank."""

    __slots__ = ("_piled", "by_rank")

    def __init__(self) -> None:
        self.by_rank: dict[int, Lease] = {}
        # Those with more than enough; who was asked to give back comes last.
        self._piled: dict[int, Lease] = {}

    def of(self, rank: int, enough: int = 1) -> Lease:
        """The lease on a rank, a new one if there is none."""
        lease = self.by_rank.get(rank)
        if lease is None:
            lease = self.by_rank[rank] = Lease(enough)
        return lease

    def bound(self, rank: int, lease: Lease) -> None:
        """A task was assigned."""
        lease.open += 1
        if lease.open > lease.enough:
            self._piled[rank] = lease

    def ended(self, rank: int, lease: Lease) -> None:
        """A task has an outcome, or came back."""
        lease.open -= 1
        if lease.open <= lease.enough:
            self._piled.pop(rank, None)

    def lost(self, rank: int) -> None:
        self.by_rank.pop(rank, None)
        self._piled.pop(rank, None)

    def to_ask(self, idle_rank: int, now_s: float) -> int | None:
        """A node that can give back what it has not started, for one that is idle."""
        for rank, lease in self._piled.items():
            if now_s - lease.asked_s <= _ASK_BACK_S:
                return None  # the others were asked later still
            if rank != idle_rank:
                lease.asked_s = now_s
                del self._piled[rank]
                self._piled[rank] = lease
                return rank
        return None


class Turns:
    """Of a shape that is dealt out: whose turn it is among the nodes with room."""

    __slots__ = ("_resting", "_waiting", "slots")

    def __init__(self, slots: dict[int, int]) -> None:
        self.slots = slots  # how many each could run at once if it had nothing else to do
        self._waiting = dict.fromkeys(slots)  # for their turn
        self._resting: dict[int, float] = {}  # until when; the next to come back first

    def next(self, now_s: float) -> int | None:
        """The one whose turn it is. It is out, then, until it comes `back`."""
        for rank, until_s in list(islice(self._resting.items(), 2)):
            if until_s <= now_s:
                del self._resting[rank]
                self.back(rank)
        for rank in self._waiting:
            del self._waiting[rank]
            return rank
        return None

    def back(self, rank: int) -> None:
        """It may have room again, and goes behind the others."""
        if rank in self.slots and rank not in self._resting:
            self._waiting.setdefault(rank)

    def rest(self, rank: int, now_s: float) -> None:
        """It had no room, against expectation."""
        if rank in self.slots:
            self._waiting.pop(rank, None)
            self._resting.pop(rank, None)
            self._resting[rank] = now_s + _REST_S
