"""Faults by rule: a transport around a transport that loses, delays and kills on demand.

    node loop --send--> FaultyTransport --(rules)--> inner transport --> network

Rules see payloads, not frames: a lost frame would stop its peer for ever, which no real
network between living ranks does. Dropping a payload therefore breaks the contract on purpose
(it stands for the sender's death before it was sent); delaying keeps it, because what follows
to the same peer waits behind. Time is counted in polls, so runs repeat exactly.

Only tests and the simulated cluster use this.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hpcray.transport.base import Received, Transport, TransportEvent

Matches = Callable[[bytes], bool]


def every_payload(payload: bytes) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Drop:
    """Lose the first `count` payloads to `rank` (None: to any) that match, or all of them."""

    rank: int | None = None
    matches: Matches = every_payload
    count: int | None = None


@dataclass(frozen=True, slots=True)
class Delay:
    """Hold matching payloads to `rank`, and all behind them, for `polls` polls."""

    polls: int
    rank: int | None = None
    matches: Matches = every_payload
    count: int | None = None


@dataclass(frozen=True, slots=True)
class Kill:
    """Lose `rank` as seen from here, at the first payload to it that matches.

    That payload is lost too. `matches` may count, to strike at the n-th.
    """

    rank: int
    matches: Matches = every_payload
    reason: str = "killed by a fault rule"


Rule = Drop | Delay | Kill


class FaultyTransport:
    """`inner`, with faults. The first rule that matches a payload decides its fate."""

    def __init__(self, inner: Transport, rules: Iterable[Rule] = ()) -> None:
        self.inner = inner
        self.rules: list[Rule] = list(rules)
        self.dropped = 0
        self._hits: dict[int, int] = {}  # id(rule) -> times applied; rules live in self.rules
        self._polls = 0
        # rank -> payloads waiting with the poll at which each may leave, in order.
        self._delayed: dict[int, deque[tuple[int, bytes]]] = {}
        self._killed: set[int] = set()

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def size(self) -> int:
        return self.inner.size

    def kill(self, rank: int, reason: str = "killed by the test") -> None:
        """From here on `rank` is dead to this node, though not to others."""
        self._killed.add(rank)
        self._delayed.pop(rank, None)
        self.inner.declare_lost(rank, reason)

    def send(self, rank: int, payload: bytes) -> None:
        if rank in self._killed:
            return
        rule = self._rule_for(rank, payload)
        if isinstance(rule, Kill):
            self.kill(rank, rule.reason)
        elif isinstance(rule, Drop):
            self.dropped += 1
        elif isinstance(rule, Delay):
            self._hold(rank, self._polls + rule.polls, payload)
        elif rank in self._delayed:
            self._hold(rank, self._polls, payload)
        else:
            self.inner.send(rank, payload)

    def flush(self) -> None:
        self.inner.flush()

    def queued_bytes(self, rank: int) -> int:
        return self.inner.queued_bytes(rank)

    def poll(self) -> list[TransportEvent]:
        self._polls += 1
        if self._delayed:
            self._release()
        events = self.inner.poll()
        if not self._killed:
            return events
        # The inner transport may have had words of the dead under way already.
        return [event for event in events
                if not (isinstance(event, Received) and event.rank in self._killed)]

    def post_receive(self, rank: int, transfer: int, buffer: memoryview) -> None:
        self.inner.post_receive(rank, transfer, buffer)

    def post_send(self, rank: int, transfer: int, buffer: memoryview) -> None:
        self.inner.post_send(rank, transfer, buffer)

    def cancel_receive(self, rank: int, transfer: int) -> None:
        self.inner.cancel_receive(rank, transfer)

    def declare_lost(self, rank: int, reason: str) -> None:
        self.inner.declare_lost(rank, reason)

    def heard(self, rank: int) -> int:
        return self.inner.heard(rank)

    def busy(self) -> bool:
        return bool(self._delayed) or self.inner.busy()

    def close(self, limit_s: float) -> None:
        for rank, waiting in self._delayed.items():
            for _, payload in waiting:
                self.inner.send(rank, payload)
        self._delayed.clear()
        self.inner.close(limit_s)

    def _rule_for(self, rank: int, payload: bytes) -> Rule | None:
        for rule in self.rules:
            if rule.rank is not None and rule.rank != rank:
                continue
            hits = self._hits.get(id(rule), 0)
            if not isinstance(rule, Kill) and rule.count is not None and hits >= rule.count:
                continue
            if rule.matches(payload):
                self._hits[id(rule)] = hits + 1
                return rule
        return None

    def _hold(self, rank: int, due_poll: int, payload: bytes) -> None:
        self._delayed.setdefault(rank, deque()).append((due_poll, payload))

    def _release(self) -> None:
        for rank in list(self._delayed):
            waiting = self._delayed[rank]
            while waiting and waiting[0][0] <= self._polls:
                self.inner.send(rank, waiting.popleft()[1])
            if not waiting:
                del self._delayed[rank]
        self.inner.flush()
