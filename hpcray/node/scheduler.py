"""The global scheduler: matches what homes want run with room on nodes. Pure; knows no machine.

    home      --Demand(shape, count)-->  GlobalScheduler  <--Load-- every node
    home      <--Grant(rank, slots)----

Soft state: whatever is lost of it comes again with loads and with repeated demands. A grant is
advice, and the executor's own ledger decides (node/cluster.py).
"""

from __future__ import annotations

from collections import deque

from hpcray.node.ledger import Shape, is_group_shape
from hpcray.protocol import labels
from hpcray.protocol.messages import Demand, Grant, GrantUnused, Joined, Load

# When actors were granted to a node so long ago, its loads know of them.
_RECENT_S = 0.1


class NodeView:
    __slots__ = ("actors", "free", "heard_s", "labels", "met", "queued", "recent", "reported",
                 "total")

    def __init__(self, node: Joined) -> None:
        self.heard_s = 0.0  # when it last told its load
        self.total = dict(node.resources)
        self.reported = dict(self.total)  # free, as it last said
        self.free = dict(self.total)  # less what was granted since
        self.labels = dict(node.labels)
        # Conditions on labels it meets. It says so itself once it has met a task with them.
        self.met: dict[str, int] = {}
        self.queued = 0
        self.actors = 0
        # When actors were granted here lately: loads that know nothing of them are on their way.
        self.recent: deque[float] = deque()


class GlobalScheduler:
    """Matches demands of homes with room on nodes. Soft state: all of it comes again with loads."""

    def __init__(self) -> None:
        self.views: dict[int, NodeView] = {}
        self._demands: dict[tuple[int, Shape, bool], Demand] = {}
        self._changed = False
        # Demands no node can ever meet, to be reported once each.
        self.impossible: list[tuple[int, Demand]] = []
        self._reported: set[tuple[int, Shape, bool]] = set()
        self._learned: set[str] = set()

    def joined(self, node: Joined) -> None:
        self.views[node.rank] = NodeView(node)

    def lost(self, rank: int) -> None:
        """A node is gone: it offers nothing, and asks for nothing."""
        self.views.pop(rank, None)
        for key in [key for key in self._demands if key[0] == rank]:
            del self._demands[key]

    def learn(self, shape: Shape) -> None:
        for name, _ in shape:
            if labels.is_condition(name) and name not in self._learned:
                self._learned.add(name)
                for view in self.views.values():
                    if may_run(view.labels, name):
                        view.met[name] = view.total[name] = view.free[name] = labels.OFFERED

    def load(self, rank: int, message: Load, now_s: float = 0.0) -> None:
        view = self.views.get(rank)
        if view is not None:
            view.heard_s = now_s
            view.reported = dict(message.free)
            view.free = {**view.reported, **view.met}
            view.queued = message.queued
            view.actors = message.actors
            self._changed = True

    def demand(self, home: int, message: Demand) -> None:
        key = (home, message.shape, message.actor)
        if message.count:
            self.learn(message.shape)
            self._demands[key] = message
            self._changed = True
            if key not in self._reported and not is_group_shape(message.shape) and not any(
                covers(view.total, message.shape) for view in self.views.values()
            ):
                self._reported.add(key)
                self.impossible.append((home, message))
        else:
            self._demands.pop(key, None)

    def unused(self, home: int, message: GrantUnused) -> None:
        """Add back what was granted for nothing; a load that came meanwhile has done so. The home
        asks again if it needs anything."""
        self._demands.pop((home, message.shape, message.actor), None)
        view = self.views.get(message.rank)
        if view is None:
            return
        for name, amount in message.shape:
            have = view.met.get(name, view.reported.get(name, 0))
            view.free[name] = min(view.free.get(name, 0) + amount * message.slots, have)
        if message.actor and view.recent:
            view.recent.pop()
        self._changed = True

    def match(self, now_s: float) -> list[tuple[int, Grant]]:
        """(home, grant) for demands that some node has room for."""
        if not self._changed or not self._demands:
            return []
        self._changed = False
        grants: list[tuple[int, Grant]] = []
        for key, demand in list(self._demands.items()):
            home, shape, actor = key
            left = demand.count
            given: dict[int, int] = {}
            soft = [name for name, _ in shape if labels.prefers(name)]
            while left > 0:
                rank = self._choose(home, shape, actor, soft, now_s)
                if rank is None:
                    break
                view = self.views[rank]
                # Actors one by one, so that they spread; tasks take all the room there is.
                slots = 1 if actor or demand.spread else min(left, slots_of(view.free, shape))
                for name, amount in shape:
                    view.free[name] -= amount * slots
                if actor:
                    view.recent.append(now_s)
                given[rank] = given.get(rank, 0) + slots
                left -= slots
                if not actor and _without_limit(shape):
                    break
            for rank, slots in given.items():
                grants.append((home, Grant(rank, shape, slots, actor)))
            if given or not left:
                del self._demands[key]
            if given and left:  # it goes behind the others: whoever asked first starves nobody
                self._demands[key] = Demand(shape, left, actor, demand.spread)
        return grants

    def _choose(
        self, home: int, shape: Shape, actor: bool, soft: list[str], now_s: float
    ) -> int | None:
        """The node with room: preferred by soft conditions; fewest actors per CPU for an actor,
        shortest queue for a task."""
        best: tuple[int, float, int, int] | None = None
        for rank, view in self.views.items():
            if rank == home and not actor:
                continue  # what fits there has started already
            if not covers(view.free, shape):
                continue
            cpus = max(view.total.get("CPU", 0), 10_000)
            while view.recent and now_s - view.recent[0] > _RECENT_S:
                view.recent.popleft()
            busy = (view.actors + len(view.recent)) / cpus if actor else view.queued / cpus
            candidate = (rating(view.labels, soft), busy, 0 if rank == home else 1, rank)
            if best is None or candidate < best:
                best = candidate
        return None if best is None else best[3]


def rating(node_labels: dict[str, str], conditions: list[str]) -> int:
    """How well a node meets conditions that prefer some: 0 is best."""
    return sum(labels.rating(node_labels, name) for name in conditions)


def may_run(node_labels: dict[str, str], condition: str) -> bool:
    """Whether a node offers a condition: a hard one if it meets it, a soft one in any case."""
    return condition[0] == labels.SOFT or labels.meets(node_labels, condition)


def covers(have: dict[str, int], shape: Shape) -> bool:
    return all(have.get(name, 0) >= amount for name, amount in shape)


def slots_of(free: dict[str, int], shape: Shape) -> int:
    return min((free.get(name, 0) // amount for name, amount in shape
                if not labels.is_condition(name)), default=64)


def _without_limit(shape: Shape) -> bool:
    return all(labels.is_condition(name) for name, _ in shape)
