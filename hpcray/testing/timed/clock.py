"""Virtual time, and processes that are busy or asleep in it."""

from __future__ import annotations

import heapq
import math
import random
from array import array
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from hpcray.protocol import ids
from hpcray.testing.timed.costs import OTHER, Costs
from hpcray.testing.timed.workload import Runs


class NeverEnds(AssertionError):
    """The simulated program goes on, or waits, beyond any time that it could take."""


class Clock:
    """What happens when."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, when_s: float, call: Callable[..., None], *args: Any) -> None:
        """What is for the same moment happens in the order in which it was asked for."""
        self._count += 1
        heapq.heappush(self._events, (when_s, self._count, call, args))

    def run(self, over: Callable[[], bool], limit_s: float) -> None:
        """Until it is over.

        Raises:
          NeverEnds: beyond `limit_s`, or when nothing can happen any more.
        """
        events = self._events
        while not over():
            if not events:
                raise NeverEnds("nothing can happen any more")
            self.now_s, _, call, args = heapq.heappop(events)
            if self.now_s > limit_s:
                raise NeverEnds(f"it is not over after {self.now_s:g} s of virtual time")
            call(*args)


class Usage:
    """What a process has done since its accounts were opened."""

    __slots__ = ("busy_s", "clocked_s", "counted_s", "datagrams_received", "datagrams_sent",
                 "decided", "frame_bytes", "frames_received", "frames_sent", "received", "sent",
                 "spans", "turns")

    def __init__(self, recording: bool) -> None:
        self.busy_s = 0.0
        # Of a node. By class of message; those that cost by object (`costs.PER_OBJECT`) in objects.
        self.received: dict[type, int] = defaultdict(int)
        self.sent: dict[type, int] = defaultdict(int)
        self.turns = 0
        self.decided = 0
        self.datagrams_received = self.datagrams_sent = 0
        self.frames_received = self.frames_sent = self.frame_bytes = 0
        # What its machine's own code costs, and what it took here, where that is looked at.
        self.counted_s = 0.0
        self.clocked_s = 0.0
        # Begin and length of all it did.
        self.spans: array[float] | None = array("d") if recording else None

    def spent(self, began_s: float, seconds: float) -> None:
        self.busy_s += seconds
        if self.spans is not None and seconds:
            self.spans.extend((began_s, seconds))


class Prices(dict[type, float]):
    """By class of message, from costs by name; `unknown`: kinds that cost as `other` does."""

    def __init__(self, costs: dict[str, float], unknown: set[str]) -> None:
        self._costs = costs
        self._unknown = unknown

    def __missing__(self, kind: type) -> float:
        found = self._costs.get(kind.__name__)
        if found is None:
            self._unknown.add(kind.__name__)
            found = self._costs[OTHER]
        self[kind] = found
        return found


class World:
    """What all processes of a simulated cluster share."""

    def __init__(self, costs: Costs, runs: Runs, size: int, seed: int, recording: bool) -> None:
        self.clock = Clock()
        self.costs = costs
        self.runs = runs
        self.size = size
        self.rng = random.Random(f"{seed} order")
        self.recording = recording
        self.job_id = ids.job_id(1)
        self.session = {"job_key": "00"}
        self.unknown_kinds: set[str] = set()
        self.received_prices = Prices(costs.node.received_s, self.unknown_kinds)
        self.sent_prices = Prices(costs.node.sent_s, self.unknown_kinds)
        self.notices: list[str] = []
        # By rank: where its frames go.
        self.to_node: list[Callable[[int, bytes], None]] = []


class Running:
    """A process with a core to itself: busy until `free_s`, then asleep until it is due."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.usage = Usage(world.recording)
        self.free_s = 0.0
        self._wake_s = math.inf

    def wake(self, at_s: float) -> None:
        """Be due then, or when it is free, unless it is due before."""
        if at_s < self.free_s:
            at_s = self.free_s
        if at_s < self._wake_s:
            self._wake_s = at_s
            self.world.clock.at(at_s, self._woken, at_s)

    def _woken(self, at_s: float) -> None:
        if at_s == self._wake_s:  # else something earlier has taken its place
            self._wake_s = math.inf
            self.step(at_s)

    def step(self, now_s: float) -> None:
        """Do what there is, and say when it is due again for what there will be."""
        raise NotImplementedError
