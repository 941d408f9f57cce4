"""The global scheduler: matches what homes want run with room on nodes. Pure; knows no machine.

    home      --Demand(shape, count)-->  GlobalScheduler  <--Load-- every node
    home      <--Grant(rank, slots)----

Soft state: whatever is lost of it comes again with loads and with repeated demands. A grant is
advice, and the executor's own ledger decides (node/cluster.py).

Nothing here looks at all nodes twice. Who has room for a shape is kept in order (`Ranking`), and
brought up to date, when the order is asked for, with the nodes that have changed since. So a grant
takes O(log nodes) steps, a load that changes nothing takes none, and one that changes something is
noted in a list. Demands that found no room wait by the names of what they ask for: a load looks at
those that ask for something of which its node has more than before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from heapq import heapify, heappop, heappush

from hpcray.node.ledger import Shape, is_group_shape
from hpcray.protocol import labels
from hpcray.protocol.messages import STORE, Demand, Grant, GrantUnused, Joined, Load

# Orders kept, those that were used last; another one looks at every node once. A few shapes are in
# use at a time.
_RANKINGS_KEPT = 64
# What a ranking is for.
TASK, ACTOR, BUNDLE = range(3)

Key = tuple[Shape, bool]  # a shape, and whether actors ask for it


class NodeView:
    """What is known here of a node."""

    __slots__ = ("actors", "cpus", "free", "granted", "granted_actors", "heard_s", "labels",
                 "placed", "queued", "reported", "store", "total")

    def __init__(self, node: Joined) -> None:
        self.heard_s = 0.0  # when it last told its load
        self.total = dict(node.resources)
        self.cpus = max(self.total.get("CPU", 0), 10_000)
        self.reported = tuple(pair for pair in node.resources if pair[0] != STORE)  # free, as told
        self.free = dict(self.total)  # less what was granted since
        self.store = self.total.get(STORE, 0)
        self.labels = dict(node.labels)
        self.queued = 0
        self.granted = 0  # slots for tasks, since it last told its load
        self.actors = 0
        # Actors that came to it by grants, as it last said, and those that were granted: the rest
        # is on its way there.
        self.placed = 0
        self.granted_actors = 0


class Ranking:
    """The nodes with room for a shape, the best first. Nodes that do not meet its conditions on
    labels are not among them.

    A heap of entries (rating, how busy, rank), of which `_entries` has the valid one per node:
    what has changed is pushed again, and old entries are dropped when they come first.
    """

    __slots__ = ("_entries", "_heap", "_kind", "_nodes", "_ratings", "_seen", "amounts")

    def __init__(self, nodes: Nodes, shape: Shape, kind: int) -> None:
        self._nodes = nodes
        self._kind = kind
        self.amounts = amounts_of(shape)
        self._ratings: dict[int, int] | None = None
        conditions = [name for name, _ in shape if labels.is_condition(name)]
        if conditions:
            soft = [name for name in conditions if labels.prefers(name)]
            self._ratings = {
                rank: rating(view.labels, soft) for rank, view in nodes.views.items()
                if all(may_run(view.labels, name) for name in conditions)}
        self._entries: dict[int, tuple[int, float, int]] = {}
        self._heap: list[tuple[int, float, int]] = []
        self._seen = 0
        self._rebuild()

    @property
    def possible(self) -> bool:
        """Whether some node could run it if it had nothing else to do."""
        views = self._nodes.views
        return any(covers(views[rank].total, self.amounts) for rank in self._candidates())

    def best(self, skipped: Collection[int] = ()) -> int | None:
        """The first node that is not skipped."""
        self._update()
        heap = self._heap
        entries = self._entries
        aside = []
        found = None
        while heap:
            self._nodes.looks += 1
            entry = heap[0]
            rank = entry[2]
            if entries.get(rank) != entry:
                heappop(heap)
            elif rank in skipped:
                aside.append(heappop(heap))
            else:
                found = rank
                break
        for entry in aside:
            heappush(heap, entry)
        return found

    def meets(self, rank: int) -> bool:
        """Whether a node meets the conditions on labels."""
        return self._ratings is None or rank in self._ratings

    def prefers(self, home: int, other: int) -> bool:
        """Whether a node has room and is as good as the best one."""
        entry = self._entries.get(home)
        return entry is not None and entry[:2] <= self._entries[other][:2]

    def _update(self) -> None:
        nodes = self._nodes
        if self._seen < nodes.first_change:
            self._rebuild()
            return
        changes = nodes.changes
        for index in range(self._seen - nodes.first_change, len(changes)):
            rank = changes[index]
            old = self._entries.get(rank)
            new = self._entry(rank)
            if new is None:
                self._entries.pop(rank, None)
            elif new != old:
                self._entries[rank] = new
                heappush(self._heap, new)
        self._seen = nodes.first_change + len(changes)
        if len(self._heap) > 64 + 4 * len(self._entries):
            self._heap = list(self._entries.values())
            heapify(self._heap)

    def _rebuild(self) -> None:
        self._entries = {}
        for rank in self._candidates():
            entry = self._entry(rank)
            if entry is not None:
                self._entries[rank] = entry
        self._heap = list(self._entries.values())
        heapify(self._heap)
        self._seen = self._nodes.first_change + len(self._nodes.changes)

    def _candidates(self) -> Iterable[int]:
        for name, _ in self.amounts:
            if "@" in name:  # of a placement group: few nodes have it
                return self._nodes.offering.get(name, ())
        return self._nodes.views if self._ratings is None else self._ratings

    def _entry(self, rank: int) -> tuple[int, float, int] | None:
        self._nodes.looks += 1
        view = self._nodes.views[rank]
        if not covers(view.free, self.amounts):
            return None
        rated = 0
        if self._ratings is not None:
            if rank not in self._ratings:
                return None
            rated = self._ratings[rank]
        if self._kind == TASK:  # the shortest queue
            return rated, (view.queued + view.granted) / view.cpus, rank
        if self._kind == ACTOR:  # the fewest actors per CPU
            on_the_way = view.granted_actors - view.placed
            return rated, (view.actors + on_the_way) / view.cpus, rank
        return rated, -view.free.get("CPU", 0), rank


class Nodes:
    """What is known of all nodes, and the orders of those with room for a shape."""

    def __init__(self) -> None:
        self.views: dict[int, NodeView] = {}
        # Ranks of nodes in the order in which they changed; old ones are forgotten.
        self.changes: list[int] = []
        self.first_change = 0
        # Names of bundles: who has any.
        self.offering: dict[str, dict[int, None]] = {}
        self.looks = 0  # at nodes and entries, for tests
        self._rankings: dict[tuple[Shape, int], Ranking] = {}

    def joined(self, node: Joined) -> None:
        self.views[node.rank] = NodeView(node)
        self._rankings.clear()

    def lost(self, rank: int) -> None:
        self._offers(rank, ())
        del self.views[rank]
        self._rankings.clear()

    def ranking(self, shape: Shape, kind: int) -> Ranking:
        key = (shape, kind)
        found = self._rankings.pop(key, None)
        if found is None:
            if len(self._rankings) >= _RANKINGS_KEPT:
                del self._rankings[next(iter(self._rankings))]
            found = Ranking(self, shape, kind)
        self._rankings[key] = found  # the last used comes last
        return found

    def tell(self, rank: int, message: Load) -> list[str]:
        """A node has told its load: the names of what it has more of than was known."""
        view = self.views[rank]
        free = view.free
        if message.free != view.reported:
            self._offers(rank, message.free)
            view.reported = message.free
        more = [name for name, amount in message.free if amount > free.get(name, 0)]
        same = (not more and len(free) == len(message.free)
                and all(free.get(name) == amount for name, amount in message.free))
        if same and (view.queued, view.actors, view.placed, view.granted) == (
                message.queued, message.actors, message.placed, 0):
            return more
        view.free = dict(message.free)
        view.queued = message.queued
        view.actors = message.actors
        view.placed = message.placed
        view.granted = 0
        self.changed(rank)
        return more

    def take(self, rank: int, shape: Shape, slots: int) -> None:
        free = self.views[rank].free
        for name, amount in shape:
            if not labels.is_condition(name):
                free[name] = free.get(name, 0) - amount * slots
        self.changed(rank)

    def give(self, rank: int, shape: Shape, slots: int) -> None:
        """What was taken for nothing; not more than the node has told, which may know already."""
        view = self.views[rank]
        reported = dict(view.reported)
        for name, amount in shape:
            if not labels.is_condition(name):
                view.free[name] = min(
                    view.free.get(name, 0) + amount * slots, reported.get(name, 0))
        self.changed(rank)

    def changed(self, rank: int) -> None:
        self.changes.append(rank)
        if len(self.changes) > 64 + 4 * len(self.views):
            forgotten = len(self.changes) // 2
            del self.changes[:forgotten]
            self.first_change += forgotten

    def _offers(self, rank: int, free: tuple[tuple[str, int], ...]) -> None:
        old = {name for name, _ in self.views[rank].reported if "@" in name}
        new = {name for name, _ in free if "@" in name}
        for name in old - new:
            ranks = self.offering[name]
            ranks.pop(rank, None)
            if not ranks:
                del self.offering[name]
        for name in new - old:
            self.offering.setdefault(name, {})[rank] = None


class GlobalScheduler:
    """Matches demands of homes with room on nodes."""

    def __init__(self) -> None:
        self.nodes = Nodes()
        self.views = self.nodes.views
        # By what is asked for, the homes that ask, in turn.
        self._demands: dict[Key, dict[int, Demand]] = {}
        # Those of them that ask for something, by its name.
        self._asking: dict[str, dict[Key, None]] = {}
        # What may find room now.
        self._ready: dict[Key, None] = {}
        # What no node can ever meet, to be reported once each.
        self.impossible: list[tuple[int, Demand]] = []
        self._reported: set[Key] = set()
        # What some node has more of than before, since it was last taken out (`Groups`).
        self.grown: set[str] = set()

    def joined(self, node: Joined) -> None:
        self.nodes.joined(node)

    def lost(self, rank: int) -> None:
        """A node is gone: it offers nothing, and asks for nothing."""
        if rank in self.views:
            self.nodes.lost(rank)
            for key in [key for key, homes in self._demands.items() if rank in homes]:
                self._forget(rank, key)

    def load(self, rank: int, message: Load, now_s: float = 0.0) -> None:
        view = self.views.get(rank)
        if view is not None:
            view.heard_s = now_s
            view.store = message.store
            self._grew(rank, self.nodes.tell(rank, message))

    def demand(self, home: int, message: Demand) -> None:
        key = (message.shape, message.actor)
        if not message.count:
            self._forget(home, key)
            return
        homes = self._demands.get(key)
        if homes is None:
            homes = self._demands[key] = {}
            for name, _ in amounts_of(message.shape):
                self._asking.setdefault(name, {})[key] = None
        homes[home] = message
        self._ready[key] = None

    def _forget(self, home: int, key: Key) -> None:
        homes = self._demands.get(key)
        if homes is None or homes.pop(home, None) is None or homes:
            return
        del self._demands[key]
        self._reported.discard(key)
        for name, _ in amounts_of(key[0]):
            asking = self._asking[name]
            del asking[key]
            if not asking:
                del self._asking[name]

    def unused(self, home: int, message: GrantUnused) -> None:
        """Add back what was granted for nothing; a load that came meanwhile has done so. The home
        asks again if it needs anything."""
        self._forget(home, (message.shape, message.actor))
        if message.rank not in self.views:
            return
        if message.actor:
            self.views[message.rank].granted_actors -= message.slots
        self.nodes.give(message.rank, message.shape, message.slots)
        self._grew(message.rank, [name for name, _ in amounts_of(message.shape)])

    def _grew(self, rank: int, names: list[str]) -> None:
        """The node has more of these: demands that ask for them are looked at again."""
        free = self.views[rank].free
        for name in names:
            if "@" not in name:
                self.grown.add(name)
            for key in self._asking.get(name, ()):
                self.nodes.looks += 1
                if key not in self._ready and covers(free, amounts_of(key[0])):
                    self._ready[key] = None

    def match(self) -> list[tuple[int, Grant]]:
        """(home, grant) for demands that some node has room for."""
        if not self._ready:
            return []
        ready, self._ready = self._ready, {}
        grants: list[tuple[int, Grant]] = []
        for key in ready:
            if key in self._demands:
                self._serve(key, grants)
        return grants

    def _serve(self, key: Key, grants: list[tuple[int, Grant]]) -> None:
        """The homes that ask for a shape, in turn, each with all it asks for."""
        shape, actor = key
        ranking = self.nodes.ranking(shape, ACTOR if actor else TASK)
        homes = self._demands[key]
        served: list[tuple[int, Demand | None]] = []
        for home, demand in homes.items():
            given: dict[int, int] = {}
            left = self._give(home, demand, ranking, given)
            for rank, slots in given.items():
                grants.append((home, Grant(rank, shape, slots, actor)))
            if given:
                served.append((home, None if not left else Demand(
                    shape, left, actor, demand.spread)))
            elif ranking.best() is None:
                if (not served and key not in self._reported and not is_group_shape(shape)
                        and not ranking.possible):
                    self._reported.add(key)
                    self.impossible.append((home, demand))
                break
            # Else there is room at this home only, where what fits has started already.
        for home, rest in served:
            if rest is None:
                self._forget(home, key)
            else:  # it goes behind the others: whoever asked first starves nobody
                del homes[home]
                homes[home] = rest

    def _give(self, home: int, demand: Demand, ranking: Ranking, given: dict[int, int]) -> int:
        """Choose nodes for what a home asks for; how much of it finds no room."""
        left = demand.count
        actor = demand.actor
        skipped = () if actor else (home,)  # what fits there has started already
        while left > 0:
            rank = ranking.best(skipped)
            if rank is None:
                break
            if actor and ranking.prefers(home, rank):
                rank = home
            view = self.views[rank]
            # Actors one by one, so that they spread; tasks take all the room there is.
            slots = 1
            if actor:
                view.granted_actors += 1
            else:
                if not demand.spread:
                    slots = min(left, slots_of(view.free, ranking.amounts))
                view.granted += slots
            self.nodes.take(rank, demand.shape, slots)
            given[rank] = given.get(rank, 0) + slots
            left -= slots
            if not actor and not ranking.amounts:
                break
        return left

    # --- room for bundles (`placement.choose`) ----------------------------------------------------

    def free(self, rank: int) -> dict[str, int]:
        return self.views[rank].free

    def best(self, shape: Shape, skipped: Collection[int]) -> int | None:
        """Of the nodes with room that are not skipped, the one with most CPU free."""
        return self.nodes.ranking(shape, BUNDLE).best(skipped)

    def fits(self, rank: int, shape: Shape, have: dict[str, int]) -> bool:
        """Whether a node that has only so much left has room."""
        return covers(have, amounts_of(shape)) and self.nodes.ranking(shape, BUNDLE).meets(rank)

    def take(self, rank: int, shape: Shape) -> None:
        """It is asked to hold a bundle."""
        self.nodes.take(rank, shape, 1)

    def give(self, rank: int, shape: Shape) -> None:
        """It need not hold the bundle."""
        if rank in self.views:
            self.nodes.give(rank, shape, 1)
            self._grew(rank, [name for name, _ in amounts_of(shape)])


def amounts_of(shape: Shape) -> Shape:
    """Without conditions on labels."""
    for name, _ in shape:
        if labels.is_condition(name):
            return tuple(pair for pair in shape if not labels.is_condition(pair[0]))
    return shape


def rating(node_labels: dict[str, str], conditions: list[str]) -> int:
    """How well a node meets conditions that prefer some: 0 is best."""
    return sum(labels.rating(node_labels, name) for name in conditions)


def may_run(node_labels: dict[str, str], condition: str) -> bool:
    """Whether a node offers a condition: a hard one if it meets it, a soft one in any case."""
    return condition[0] == labels.SOFT or labels.meets(node_labels, condition)


def covers(have: dict[str, int], shape: Shape) -> bool:
    for name, amount in shape:
        if have.get(name, 0) < amount:
            return False
    return True


def slots_of(free: dict[str, int], shape: Shape) -> int:
    return min((free.get(name, 0) // amount for name, amount in shape
                if not labels.is_condition(name)), default=64)
