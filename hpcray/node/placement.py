"""Placement groups: bundles of resources reserved on nodes, all or none. Pure.

    create --> PENDING --PrepareBundles--> every chosen node --BundlesPrepared(ok)--> CREATED
                  ^---------- somebody has no room: ReleaseBundles to the others ---+   |
    remove --> REMOVED: GroupRemoved to those nodes: its work ends, then the room is free <+
                        and to every node that asks for room in it (Demand)

Node 0 decides (`Groups`); each node holds its bundles (`Bundles`). A bundle is a piece of the
node's ledger under names of its own: `CPU@<group>` for the group's share of this node,
`CPU@<group>:<index>` for one bundle's. A task of the group asks for those names, so the queues,
grants and leases that move every other task move it too. Until the bundles of all nodes are
committed nobody has these names, and its tasks wait.

Invariants, checked by `validate`:

PG-1  what bundles hold is held in the ledger; a prepared bundle offers nothing yet.
PG-2  the names of a group that is not here are not in the ledger.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from hpcray.node.cluster import Cluster
from hpcray.node.dispatch import Dispatcher
from hpcray.node.executor import Executor
from hpcray.node.ledger import Shape
from hpcray.node.names import RequestError
from hpcray.node.outbox import Outbox
from hpcray.node.records import TaskRecord
from hpcray.node.scheduler import GlobalScheduler, covers
from hpcray.node.tables import Tables
from hpcray.node.tasks import Tasks
from hpcray.protocol import labels, values
from hpcray.protocol.messages import (
    ACTOR_CREATION,
    UNIT,
    BundlesPrepared,
    CommitBundles,
    GroupRemoved,
    PrepareBundles,
    ReleaseBundles,
    Template,
)

GROUPS_RANK = 0
# What a task without any resources takes of its bundle, so that it runs there.
MEMBER = "bundle"
_MEMBERS = 1000 * UNIT

# Removed groups that are still told of.
_REMOVED_KEPT = 1000

PENDING = "PENDING"
PREPARING = "PREPARING"
CREATED = "CREATED"
REMOVED = "REMOVED"


def group_name(resource: str, group: bytes, index: int = -1) -> str:
    name = f"{resource}@{group.hex()}"
    return name if index < 0 else f"{name}:{index}"


def group_of(name: str) -> bytes:
    """The group that a resource is a part of; empty: of none."""
    _, found, group = name.partition("@")
    return bytes.fromhex(group.partition(":")[0]) if found else b""


class Bundles:
    """This node's part."""

    def __init__(
        self, tables: Tables, outbox: Outbox, tasks: Tasks, executor: Executor,
        dispatcher: Dispatcher, cluster: Cluster,
    ) -> None:
        self._rank = tables.rank
        self._outbox = outbox
        self._tasks = tasks
        self._executor = executor
        self._dispatcher = dispatcher
        self._cluster = cluster
        self._ledger = dispatcher.ledger
        # group -> [(index, shape, devices)]: held, offered once committed.
        self.held: dict[bytes, list[tuple[int, Shape, tuple[int, ...]]]] = {}
        self._committed: set[bytes] = set()
        # Removed, but its workers are not dead yet.
        self.ending: set[bytes] = set()
        # Those this node has heard of lately.
        self._removed: dict[bytes, None] = {}
        # Port: whether node 0, if this is it, knows that there is no such group.
        self.gone: Callable[[bytes], bool] = lambda group: False

    def prepare(self, message: PrepareBundles) -> bool:
        """Hold the bundles if there is room for all of them."""
        ledger = self._ledger
        self._cluster.bundles_came()
        for _, shape in message.bundles:
            self._cluster.learn(shape)
        taken: list[tuple[int, Shape, tuple[int, ...]]] = []
        for index, shape in message.bundles:
            if message.group in self._removed or not ledger.fits(shape):
                for _, other, devices in taken:
                    ledger.release(other, devices)
                return False
            taken.append((index, shape, ledger.acquire(shape)))
        self.held[message.group] = taken
        return True

    def commit(self, message: CommitBundles) -> None:
        """Offer them to tasks of the group."""
        group = message.group
        if group in self.held and group not in self._committed:
            self._committed.add(group)
            for index, shape, devices in self.held[group]:
                offered = tuple(pair for pair in shape if not labels.is_condition(pair[0]))
                self._ledger.offer(group_name("", group), index, (*offered, (MEMBER, _MEMBERS)),
                                   devices)
            self._dispatcher.resources_changed()

    def release(self, group: bytes) -> None:
        """Prepared in vain."""
        if group in self._committed:
            return
        for _, shape, devices in self.held.pop(group, ()):
            self._ledger.release(shape, devices)
        self._dispatcher.resources_changed()

    def removed(self, group: bytes) -> None:
        """End what runs in the group and fail what waits for it."""
        self._removed[group] = None
        if len(self._removed) > _REMOVED_KEPT:
            del self._removed[next(iter(self._removed))]
        if group in self._committed:
            self._ledger.withdraw(group_name("", group))
            self.ending.add(group)
        else:
            self.release(group)
        self._dispatcher.end_group(group_name("", group))
        self._cluster.end_group(group_name("", group))

    def reason(self, template: Template) -> values.Failure | None:
        """Why what ran in a removed group has died."""
        group = template.group_id
        if not group or (group not in self._removed and not self.gone(group)):
            return None
        kind = "ActorPlacementGroupRemoved" if template.kind == ACTOR_CREATION else (
            "TaskPlacementGroupRemoved")
        return values.Failure(kind, f"the placement group of {template.name} was removed")

    def refuse(self, task: TaskRecord) -> bool:
        """Whether the task's group is gone; then it has failed."""
        failure = self.reason(task.template)
        if failure is None:
            return False
        if task.home != self._rank:
            self._executor.give_back(task)  # its home knows, or will
        else:
            self._tasks.refuse(task, values.pack_failure(failure))
        return True

    def end_turn(self) -> None:
        for group in list(self.ending):
            if self._ledger.forget(group_name("", group)):
                self.ending.remove(group)
                self._committed.remove(group)
                for _, shape, devices in self.held.pop(group):
                    self._ledger.release(shape, devices)
                self._dispatcher.resources_changed()

    def held_shapes(self) -> list[Shape]:
        return [shape for bundles in self.held.values() for _, shape, _ in bundles]

    def validate(self) -> None:
        offered = {name.split("@")[1].split(":")[0] for name in self._ledger.total if "@" in name}
        assert offered == {group.hex() for group in self._committed}, "PG-2"
        assert self.ending <= self._committed <= set(self.held), "PG-1"


class Group:
    __slots__ = ("asked", "bundles", "creator", "group", "name", "namespace", "ranks", "reported",
                 "state", "strategy", "waits_for")

    def __init__(self, group: bytes, arguments: Any) -> None:
        self.group = group
        self.name: str = arguments.get("name") or ""
        self.namespace: str = arguments.get("namespace") or ""
        self.strategy: str = arguments["strategy"]
        self.bundles: list[Shape] = [
            tuple(sorted((name, amount) for name, amount in bundle.items()))
            for bundle in arguments["bundles"]]
        self.state = PENDING
        self.ranks: list[int] = []  # of each bundle, once chosen
        self.asked: set[int] = set()  # nodes that were asked to prepare
        self.waits_for: set[int] = set()  # those that have not answered
        self.reported = False


class Kind:
    """Groups that ask for the same and have no room, in the order of their creation: if the first
    finds none, none does."""

    __slots__ = ("again", "bundles", "groups", "names", "possible", "strategy")

    def __init__(self, bundles: list[Shape], strategy: str) -> None:
        self.bundles = bundles
        self.strategy = strategy
        self.groups: dict[bytes, Group] = {}
        self.names = frozenset(name for bundle in bundles for name, _ in bundle)
        self.again = True  # to be tried, whether or not anybody has more room
        self.possible: bool | None = None  # on the nodes of this job; None: not looked yet


class Groups:
    """Node 0's part: every group of the job, and where its bundles go."""

    def __init__(
        self, tables: Tables, outbox: Outbox, cluster: Cluster, bundles: Bundles,
    ) -> None:
        self._rank = tables.rank
        self._outbox = outbox
        self._cluster = cluster
        self._bundles = bundles
        self.groups: dict[bytes, Group] = {}
        self._named: dict[tuple[str, str], Group] = {}  # by name and namespace
        self.pending: dict[bytes, Group] = {}
        self._kinds: dict[tuple[tuple[Shape, ...], str], Kind] = {}  # those that wait for room
        self._over: deque[bytes] = deque()  # removed ones, oldest first

    # --- asked by clients -------------------------------------------------------------------------

    def create(self, arguments: Any) -> None:
        name, namespace = arguments.get("name") or "", arguments.get("namespace") or ""
        if name and (name, namespace) in self._named:
            raise RequestError("ValueError", f"there is a placement group named {name!r} already")
        group = Group(arguments["group"], arguments)
        for bundle in group.bundles:
            self._cluster.learn(bundle)
        if name:
            self._named[name, namespace] = group
        self.groups[group.group] = self.pending[group.group] = group
        self._wait(group)

    def remove(self, arguments: Any) -> None:
        group = self.groups.get(arguments["group"])
        if group is None or group.state == REMOVED:
            return
        group.state = REMOVED
        if group.name:
            del self._named[group.name, group.namespace]
        self._over.append(group.group)
        if len(self._over) > _REMOVED_KEPT:
            del self.groups[self._over.popleft()]
        if self.pending.pop(group.group, None) is not None:
            self._wait_no_more(group)
        for rank in sorted({self._rank, *group.asked}):
            self._send(rank, GroupRemoved(group.group))

    def is_gone(self, group: bytes) -> bool:
        """Whether it was removed. So long ago that it is not known: too, since a program has a
        group only when it is known here."""
        found = self.groups.get(group)
        return found is None or found.state == REMOVED

    def demanded(self, rank: int, shape: Shape) -> None:
        """A node asks for room: it is told if the group is gone."""
        for name, _ in shape:
            group = group_of(name)
            if group:
                if self.is_gone(group):
                    self._send(rank, GroupRemoved(group))
                return

    def table(self, arguments: Any) -> list[dict[str, Any]]:
        """Of one group (by id, or by name), or of all."""
        if arguments.get("name"):
            found = self._named.get((arguments["name"], arguments.get("namespace") or ""))
            if found is None:
                raise RequestError(
                    "ValueError", f"there is no placement group named {arguments['name']!r}")
            return [self._facts(found)]
        if arguments.get("group"):
            one = self.groups.get(arguments["group"])
            return [] if one is None else [self._facts(one)]
        return [self._facts(group) for group in self.groups.values()]

    @staticmethod
    def _facts(group: Group) -> dict[str, Any]:
        return {
            "group": group.group, "name": group.name, "strategy": group.strategy,
            "state": PENDING if group.state == PREPARING else group.state,
            "bundles": [{name: amount for name, amount in bundle
                         if not labels.is_condition(name)} for bundle in group.bundles],
            "ranks": group.ranks if group.state == CREATED else [],
        }

    # --- reserving --------------------------------------------------------------------------------

    def to_place(self) -> list[Group]:
        """Groups that wait for room, though some day there may be enough."""
        return [group for group in self.pending.values() if not group.reported]

    def _wait(self, group: Group, *, first: bool = False) -> None:
        key = (tuple(group.bundles), group.strategy)
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = Kind(group.bundles, group.strategy)
        if kind.possible is False:
            kind.again = True  # to be reported
        kind.groups[group.group] = group
        if first:
            kind.again = True
            kind.groups = {group.group: group, **kind.groups}

    def _wait_no_more(self, group: Group) -> None:
        key = (tuple(group.bundles), group.strategy)
        kind = self._kinds.get(key)
        if kind is not None:
            kind.groups.pop(group.group, None)
            if not kind.groups:
                del self._kinds[key]

    def end_turn(self) -> None:
        """Try those that are new, and those that ask for what some node has more of."""
        scheduler = self._cluster.scheduler
        if scheduler is None:
            return
        self._cluster.tell_own()
        grown, scheduler.grown = scheduler.grown, set()
        for kind in list(self._kinds.values()):
            if kind.again or not grown.isdisjoint(kind.names):
                self._place(kind, scheduler)

    def _place(self, kind: Kind, scheduler: GlobalScheduler) -> None:
        kind.again = False
        while kind.groups and kind.possible is not False:
            chosen = choose(kind.bundles, kind.strategy, scheduler)
            if chosen is None:
                break
            group = next(iter(kind.groups.values()))
            self._wait_no_more(group)
            group.state = PREPARING
            group.ranks = chosen
            group.asked = set(chosen)
            group.waits_for = set(chosen)
            for bundle, rank in zip(group.bundles, chosen, strict=True):
                scheduler.take(rank, bundle)
            for rank in sorted(group.asked):
                self._send(rank, PrepareBundles(group.group, tuple(
                    (index, bundle) for index, bundle in enumerate(group.bundles)
                    if chosen[index] == rank)))
        if kind.groups and kind.possible is None:
            kind.possible = choose(
                kind.bundles, kind.strategy, Room(self._cluster.totals())) is not None
        if kind.possible is False:
            for group in kind.groups.values():
                if not group.reported:
                    group.reported = True
                    self._outbox.notices.append(
                        f"Warning: placement group {group.name or group.group.hex()} asks for "
                        f"{len(group.bundles)} bundles with {group.strategy}, which the nodes of "
                        "this job can never hold. It stays pending; remove it, or start a larger "
                        "job.")

    def prepared(self, rank: int, message: BundlesPrepared) -> None:
        group = self.groups.get(message.group)
        if group is None or group.state != PREPARING or rank not in group.waits_for:
            return  # it was removed meanwhile: GroupRemoved is on its way
        group.waits_for.remove(rank)
        if not message.ok:
            group.asked.discard(rank)
        if group.waits_for:
            return
        if all(rank in group.asked for rank in group.ranks):
            group.state = CREATED
            del self.pending[group.group]
            for other in sorted(group.asked):
                self._send(other, CommitBundles(group.group))
            return
        group.state = PENDING
        scheduler = self._cluster.scheduler
        assert scheduler is not None
        for bundle, other in zip(group.bundles, group.ranks, strict=True):
            if other in group.asked:  # who has refused looks full until its next load
                scheduler.give(other, bundle)
        for other in sorted(group.asked):
            self._send(other, ReleaseBundles(group.group))
        group.ranks = []
        self._wait(group, first=True)

    def _send(self, rank: int, message: Any) -> None:
        if rank != self._rank:
            self._outbox.peers[rank].append(message)
            return
        bundles = self._bundles
        if type(message) is PrepareBundles:
            self.prepared(rank, BundlesPrepared(message.group, bundles.prepare(message)))
        elif type(message) is CommitBundles:
            bundles.commit(message)
        elif type(message) is ReleaseBundles:
            bundles.release(message.group)
        else:
            bundles.removed(message.group)


# --- where bundles go -----------------------------------------------------------------------------


class Places(Protocol):
    """What nodes have free: the global scheduler's view, or a `Room`."""

    def free(self, rank: int) -> dict[str, int]: ...

    def best(self, shape: Shape, skipped: Collection[int]) -> int | None:
        """Of the nodes with room that are not skipped, the one with most CPU free."""

    def fits(self, rank: int, shape: Shape, have: dict[str, int]) -> bool:
        """Whether a node that has only so much left has room."""


class Room:
    """Of nodes that are looked at once."""

    def __init__(self, free: Mapping[int, dict[str, int]]) -> None:
        self._free = free

    def free(self, rank: int) -> dict[str, int]:
        return self._free[rank]

    def best(self, shape: Shape, skipped: Collection[int]) -> int | None:
        return min((rank for rank, have in self._free.items()
                    if rank not in skipped and covers(have, shape)),
                   key=lambda rank: (-self._free[rank].get("CPU", 0), rank), default=None)

    def fits(self, rank: int, shape: Shape, have: dict[str, int]) -> bool:
        return covers(have, shape)


def choose(bundles: list[Shape], strategy: str, places: Places) -> list[int] | None:
    """The node of each bundle, or None if they do not fit.

    PACK takes as few nodes as it can and SPREAD as many; their STRICT forms insist.
    """
    if strategy in ("STRICT_PACK", "PACK"):
        together: dict[str, int] = {}
        for bundle in bundles:
            for name, amount in bundle:
                together[name] = together.get(name, 0) + amount
        rank = places.best(tuple(sorted(together.items())), ())
        if rank is not None or strategy == "STRICT_PACK":
            return None if rank is None else [rank] * len(bundles)
    chosen = [-1] * len(bundles)
    used: dict[int, int] = {}
    left: dict[int, dict[str, int]] = {}  # of those
    # The large ones first: they have the fewest places.
    for index in sorted(range(len(bundles)), key=lambda i: (-_size(bundles[i]), i)):
        bundle = bundles[index]
        again = [] if strategy == "STRICT_SPREAD" else [
            (-used[rank] if strategy == "PACK" else used[rank], -have.get("CPU", 0), rank)
            for rank, have in left.items() if places.fits(rank, bundle, have)]
        rank = None
        if strategy != "PACK" or not again:
            rank = places.best(bundle, used)
        if rank is None:
            if not again:
                return None
            rank = min(again)[2]
        if rank not in used:
            used[rank] = 0
            left[rank] = dict(places.free(rank))
        used[rank] += 1
        chosen[index] = rank
        for name, amount in bundle:
            left[rank][name] = left[rank].get(name, 0) - amount
    return chosen


def _size(shape: Shape) -> int:
    return sum(amount for name, amount in shape if name != "memory")
