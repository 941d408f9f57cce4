"""The other nodes: who they are, and which of them should run what waits here. Pure.

Bottom-up (paper, section 4.2.2): a task stays with its local scheduler while that can start it
soon. What waits longer is announced to the global scheduler, which knows every node's load and
answers with grants; the home then binds tasks to the granted node itself, and goes on filling
it directly as results come back, until nothing waits.

    home      --Demand(shape, count)-->  global scheduler  <--Load-- every node
    home      <--Grant(rank, slots)----
    home      --Assign------------------------------------> executor --TaskDone--> home (refills)

A grant is advice: the executor's own ledger decides, and what cannot start there soon comes
back (`TaskReturned`).

Where a task may run is decided by what never changes in a job: every node's resources and labels,
known everywhere. A condition on labels is a name in the task's shape (protocol/labels.py), offered
by the nodes that meet it. Tasks with an affinity go to their node (`place_at`); tasks that are to
be spread, or prefer some nodes, are dealt out by their home in turn (`deal`) while there is room,
and wait for grants like all others when there is none.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from hpcray.node.dispatch import Dispatcher, ShapeQueue
from hpcray.node.leases import Lease, Leases, Turns
from hpcray.node.ledger import Shape, is_group_shape
from hpcray.node.memory import NodeMemory
from hpcray.node.outbox import Outbox
from hpcray.node.records import TaskRecord, is_here
from hpcray.node.scheduler import GlobalScheduler, covers, may_run, rating, slots_of
from hpcray.node.tables import Tables, unwired
from hpcray.node.task_states import QUEUED
from hpcray.node.tasks import Tasks, unschedulable
from hpcray.protocol import ids, labels, words
from hpcray.protocol.messages import (
    ACTOR_CREATION,
    SPILL,
    STORE,
    UNIT,
    WAIT,
    Demand,
    GiveBack,
    Grant,
    GrantUnused,
    Joined,
    Load,
    Template,
)

SCHEDULER_RANK = 0

# A local wait this short is not worth a message to another node.
_PATIENCE_US = 2_000
# Work bound ahead to a remote slot: covers a few round trips of short tasks.
_AHEAD_US = 5_000
_AHEAD_MAX = 256
# A demand is repeated if nothing came of it (its grants may have been given away).
_REPEAT_S = 0.05
_REPEAT_PER_NODE_S = 0.002
# A load is told when it has stayed the same for so long: what comes and goes with each task that
# ends says nothing.
_SETTLED_S = 0.0001
# Or when it has been another one than was told for so long.
_UNSETTLED_S = 0.05
# And not more often than this. All nodes together tell the scheduler's at most 1,300 loads and 500
# demands a second.
_LOAD_INTERVAL_S = 0.002
_LOAD_PER_NODE_S = 0.00075
_QUEUE_TOLD = 10  # so many times as long for the queue alone
# But at least so often, whatever happens: it shows that the node is there (node/waiting.py).
_HEARTBEAT_S = 1.0
_HEARTBEAT_PER_NODE_S = 0.005
_HEARTBEAT_MAX_S = 4.0
# Shapes that are dealt out, and whose turn is remembered.
_TURNS_KEPT = 64
# Below this many bytes an absent input does not decide where a task runs.
_LOCALITY_BYTES = 4 * 1024 * 1024


class Facts(NamedTuple):
    """A load, as far as it is compared."""

    free: dict[str, int]
    queued: int
    actors: int
    placed: int


class Cluster:
    """This node's dealings with the rest. The global scheduler itself is `GlobalScheduler`."""

    def __init__(
        self, tables: Tables, outbox: Outbox, memory: NodeMemory, tasks: Tasks,
        dispatcher: Dispatcher,
    ) -> None:
        self._tables = tables
        self._objects = tables.objects
        self._statistics = tables.statistics
        self._outbox = outbox
        self._memory = memory
        self._tasks = tasks
        self._dispatcher = dispatcher
        self._rank = tables.rank
        self._nodes = tables.nodes
        # Ports: fail a task whose placement group was removed (and whether it was); an actor of
        # this home can be created nowhere, by this error.
        self.refuse_of_group: Callable[[TaskRecord], bool] = unwired
        # Of `Templates`: one more is known here; nothing needs a derived one by its origin.
        self.define: Callable[[Template], None] = unwired
        self.derived_gone: Callable[[Template], None] = unwired
        # What each node has in all, conditions on labels that it meets among it.
        self._totals: dict[int, dict[str, int]] = {}
        self._turns: dict[Shape, Turns] = {}
        self._movable: dict[bytes, Template] = {}
        self._leases: dict[Shape, Leases] = {}
        self._demanded: dict[tuple[Shape, bool], tuple[int, float]] = {}
        # Actors to be created, by what they need: placed one by one, where few actors are.
        self._actors_waiting: dict[Shape, deque[TaskRecord]] = {}
        self._learned: set[str] = set()
        size = tables.size
        self._load_interval_s = max(_LOAD_INTERVAL_S, size * _LOAD_PER_NODE_S)
        self._heartbeat_s = min(max(_HEARTBEAT_S, size * _HEARTBEAT_PER_NODE_S), _HEARTBEAT_MAX_S)
        self._repeat_s = max(_REPEAT_S, size * _REPEAT_PER_NODE_S)
        self._told: Facts | None = None  # the last load
        self._told_s = -math.inf
        self._seen: Facts | None = None  # what there is, if that is another one, since
        self._seen_s = 0.0
        self._changed_s = 0.0  # since when it is another one
        self._counted = False  # the scheduler may have granted something since
        # When a load is to be told, if nothing happens.
        self.due_s = math.inf
        self._placed = 0  # actors that came here by grants
        self.scheduler = GlobalScheduler() if self._rank == SCHEDULER_RANK else None

    def joined(self, node: Joined) -> None:
        """A node of the job, this one too."""
        self._totals[node.rank] = dict(node.resources)
        if self.scheduler is not None:
            self.scheduler.joined(node)

    def node_lost(self, rank: int, _reason: str) -> None:
        """Nothing is placed there any more."""
        self._totals.pop(rank, None)
        for shape, leases in list(self._leases.items()):
            leases.lost(rank)
            if not leases.by_rank:
                del self._leases[shape]
        self._turns.clear()  # dealt out anew, among those that are left
        if self.scheduler is not None:
            self.scheduler.lost(rank)

    def learn(self, shape: Shape) -> None:
        """Conditions on labels in a shape: who meets them; if this node does, it says so."""
        for name, _ in shape:
            if not labels.is_condition(name) or name in self._learned:
                continue
            self._learned.add(name)
            for rank, total in self._totals.items():
                if may_run(dict(self._nodes[rank].labels), name):
                    total[name] = labels.OFFERED
                    if rank == self._rank:
                        self._dispatcher.ledger.offer_without_limit(name)

    def totals(self) -> dict[int, dict[str, int]]:
        """What each node has in all. To be copied before it is changed."""
        return self._totals

    # --- binding a task when it is ready ----------------------------------------------------------

    def place(self, task: TaskRecord) -> bool:
        """Bind it to the node it asks for, or that is better or as good; False: it stays here."""
        template = task.template
        if template.rank >= 0:
            return self.place_at(task)
        if template.kind == ACTOR_CREATION:
            self.place_actor(task)
            return True
        return self.deal(task) if template.spread else self.place_elsewhere(task)

    # --- an affinity ------------------------------------------------------------------------------

    def place_at(self, task: TaskRecord) -> bool:
        """Bind a task to the node it asks for, or fail it; False if it is for this node's queue."""
        template = task.template
        total = self._totals.get(template.rank)
        if total is None or not covers(total, template.resources):
            why = ("there is no such node in this job (an id of another job?)" if total is None
                   else f"it can never hold {describe(template.resources)}")
            return self._place_elsewhere_or_fail(task, template.soft, why)
        if template.rank != self._rank:
            self._tasks.assign(task, template.rank)
            return True
        if template.unavailable != WAIT and not self._dispatcher.has_room(template):
            return self.unavailable(task)
        return False

    def unavailable(self, task: TaskRecord) -> bool:
        """The node it asks for has no room now, and it would not wait."""
        return self._place_elsewhere_or_fail(
            task, task.template.unavailable == SPILL, "it has no room for it now")

    def _place_elsewhere_or_fail(self, task: TaskRecord, elsewhere: bool, why: str) -> bool:
        template = task.template
        tasks = self._tasks
        if elsewhere:
            task.template = self._without_affinity(template)
            tasks.bind(task)
            return True
        known = template.rank in self._totals
        node = f"the node of rank {template.rank}" if known else "a node by its id"
        tasks.refuse(task, unschedulable(
            template, f" asks for {node} and no other (soft=False), but {why}"))
        return True

    def _without_affinity(self, template: Template) -> Template:
        """The same for any node. Named by what it comes from: every node makes the same of it."""
        other = self._movable.get(template.template_id)
        if other is None:
            name = bytes(255 - byte for byte in template.template_id)
            other = msgspec.structs.replace(
                template, template_id=name, rank=-1, soft=False, unavailable=WAIT)
            self._movable[template.template_id] = other
            self.define(other)
        return other

    def template_gone(self, template: Template) -> None:
        """It is forgotten here, and so is what was made of it."""
        other = self._movable.pop(template.template_id, None)
        if other is not None:
            self.derived_gone(other)

    # --- dealing out ------------------------------------------------------------------------------

    def deal(self, task: TaskRecord) -> bool:
        """Bind a task to the node whose turn it is, if that has room; False: queue it here."""
        shape = task.template.resources
        turns = self._turns.get(shape)
        if turns is None:
            if len(self._turns) >= _TURNS_KEPT:
                del self._turns[next(iter(self._turns))]
            turns = self._turns[shape] = Turns(self._candidates(shape))
        now_s = self._tables.now_s
        here = False
        while (rank := turns.next(now_s)) is not None:
            if rank == self._rank:
                if self._dispatcher.has_room_for(shape):
                    turns.back(rank)
                    return False
                here = True
                continue
            leases = self._leases_of(shape)
            lease = leases.of(rank, turns.slots[rank])
            if lease.open >= turns.slots[rank]:
                continue  # it is back when something there has ended
            leases.bound(rank, lease)
            lease.slots = max(lease.slots, min(lease.open, turns.slots[rank]))
            if lease.open < turns.slots[rank]:
                turns.back(rank)
            self._tasks.assign(task, rank)
            break
        if here:
            turns.back(self._rank)
        return rank is not None

    def _leases_of(self, shape: Shape) -> Leases:
        leases = self._leases.get(shape)
        if leases is None:
            leases = self._leases[shape] = Leases()
        return leases

    def _candidates(self, shape: Shape) -> dict[int, int]:
        """The nodes that could run it, this one first, and how many each; of those the preferred
        ones, if there are any."""
        able = {rank: slots_of(total, shape) for rank, total in self._totals.items()
                if covers(total, shape)}
        soft = [name for name, _ in shape if labels.prefers(name)]
        if soft and able:
            rated = {rank: rating(dict(self._nodes[rank].labels), soft) for rank in able}
            best = min(rated.values())
            able = {rank: slots for rank, slots in able.items() if rated[rank] == best}
        size = self._tables.size
        return dict(sorted(able.items(), key=lambda pair: (pair[0] - self._rank) % size))

    # --- binding what waits here ------------------------------------------------------------------

    def place_elsewhere(self, task: TaskRecord) -> bool:
        """Whether the task was bound to the node that has most of its input."""
        if not task.dep_count or task.template.kind == ACTOR_CREATION:
            return False
        records = self._objects
        absent: dict[int, int] = {}
        for object_id in ids.split_ids(task.refs[: task.dep_count * 28]):
            record = records[object_id]
            if record.extra is not None and not is_here(record):
                for rank in record.extra.copies or record.extra.sources:
                    absent[rank] = absent.get(rank, 0) + record.nbytes
        if not absent:
            return False
        best = max(absent, key=lambda rank: (absent[rank], -rank))
        if absent[best] < _LOCALITY_BYTES or best == self._rank:
            return False
        shape = task.template.resources
        if not is_group_shape(shape) and not covers(self._totals[best], shape):
            return False
        self._tasks.assign(task, best)
        return True

    def place_actor(self, task: TaskRecord) -> None:
        """Ask the global scheduler where the actor should live."""
        if task.template.group_id and self.refuse_of_group(task):
            return
        waiting = self._actors_waiting.get(task.template.resources)
        if waiting is None:
            waiting = self._actors_waiting[task.template.resources] = deque()
        waiting.append(task)

    def demanded_shapes(self) -> set[Shape]:
        """Shapes of tasks that the scheduler was told of: it must hear when none is left."""
        return {shape for shape, _ in self._demanded}

    def actors_to_place(self) -> list[tuple[Shape, deque[TaskRecord]]]:
        """Actors that no node has had room for, by what they need."""
        return list(self._actors_waiting.items())

    def _actors_granted(self, message: Grant) -> int:
        """Create actors on the granted node; for how many there was room and no actor."""
        waiting = self._actors_waiting.get(message.shape)
        slots = message.slots
        while waiting and slots:
            task = waiting.popleft()
            if task.cancelled:
                continue
            slots -= 1
            if message.rank == self._rank:
                self.work_came(task.template)
                self._dispatcher.enqueue(task)
            else:
                self._tasks.assign(task, message.rank)
        if not waiting:
            self._actors_waiting.pop(message.shape, None)
        return slots

    def end_group(self, group: str) -> None:
        """A placement group is gone: refuse the actors that wait for it."""
        for shape in [s for s in self._actors_waiting if any(group in name for name, _ in s)]:
            for task in self._actors_waiting.pop(shape):
                if not task.cancelled:
                    self.refuse_of_group(task)
            if self._demanded.pop((shape, True), None) is not None:
                self._to_scheduler(Demand(shape, 0, True))

    def granted(self, message: Grant, now_s: float) -> None:
        unused = (self._actors_granted if message.actor else self._tasks_granted)(message)
        if unused < message.slots:
            self._demanded.pop((message.shape, message.actor), None)
        if unused:
            # Of what is used the node tells. Nobody would of this: it would look taken.
            self._to_scheduler(GrantUnused(message.rank, message.shape, unused, message.actor))

    def _tasks_granted(self, message: Grant) -> int:
        """Bind tasks to the granted node; all slots if there were none."""
        queue = self._dispatcher.queues.get((message.shape, False))
        if queue is None or not queue.tasks:
            return message.slots
        if message.rank == self._rank:
            return 0  # the dispatcher takes it from here
        leases = self._leases_of(message.shape)
        lease = leases.of(message.rank)
        lease.slots += message.slots
        before = lease.open
        self._refill(message.rank, queue, leases, lease)
        used = lease.open > before
        if not used:
            lease.slots -= message.slots
        self._close_if_empty(message.shape, message.rank, leases, lease)
        return 0 if used else message.slots

    def _close_if_empty(self, shape: Shape, rank: int, leases: Leases, lease: Lease) -> None:
        if lease.open <= 0:
            del leases.by_rank[rank]
            if not leases.by_rank:
                del self._leases[shape]

    def _refill(self, rank: int, queue: ShapeQueue, leases: Leases, lease: Lease) -> None:
        room = lease.slots
        for task in queue.tasks:
            if task.state is QUEUED:
                known = self._statistics[task.template.template_id]
                if known.count and not known.singly:
                    room *= max(1, min(_AHEAD_US // (known.slow_us + 1), _AHEAD_MAX))
                    # A little more than runs: its next task is there when one ends. It comes
                    # back (GiveBack) if somebody else is idle first.
                    room += max(1, lease.slots // 4)
                break
        # Leave this node's own CPUs their next tasks: binding the last ones away gains nothing.
        self._bind(rank, queue, room - lease.open, leases, lease)

    def _bind(
        self, rank: int, queue: ShapeQueue, count: int, leases: Leases, lease: Lease
    ) -> None:
        tasks = self._tasks
        skipped = []
        while count > 0 and queue.tasks:
            task = queue.tasks.popleft()
            if task.state is not QUEUED or task.cancelled:
                continue
            if task.home != self._rank or task.template.rank >= 0:
                skipped.append(task)
                continue
            tasks.assign(task, rank)
            leases.bound(rank, lease)
            count -= 1
        queue.tasks.extendleft(reversed(skipped))

    def finished(self, rank: int, task: TaskRecord) -> None:
        """A task bound elsewhere has an outcome: its slot takes the next one."""
        shape = task.template.resources
        leases = self._leases.get(shape)
        lease = None if leases is None else leases.by_rank.get(rank)
        if leases is None or lease is None:
            return
        leases.ended(rank, lease)
        if self._turns:
            turns = self._turns.get(shape)
            if turns is not None:
                turns.back(rank)
        queue = self._dispatcher.queues.get((shape, False))
        if queue is not None and queue.tasks:
            self._refill(rank, queue, leases, lease)
        elif lease.open < lease.slots:
            self._ask_back(shape, leases, rank)
        self._close_if_empty(shape, rank, leases, lease)

    def _ask_back(self, shape: Shape, leases: Leases, idle_rank: int) -> None:
        """A slot is idle and nothing waits here: take back what waits elsewhere unstarted."""
        rank = leases.to_ask(idle_rank, self._tables.now_s)
        if rank is not None:
            self._outbox.peers[rank].append(GiveBack(shape, 1))

    def returned(self, rank: int, task: TaskRecord) -> None:
        """The executor has no room after all."""
        shape = task.template.resources
        leases = self._leases.get(shape)
        lease = None if leases is None else leases.by_rank.get(rank)
        if leases is not None and lease is not None:
            leases.ended(rank, lease)
            lease.slots = max(lease.slots - 1, 0)
            self._close_if_empty(shape, rank, leases, lease)
        turns = self._turns.get(shape)
        if turns is not None:
            turns.rest(rank, self._tables.now_s)

    # --- end of turn and time ---------------------------------------------------------------------

    def end_turn(self, now_s: float) -> None:
        """Of several nodes."""
        self._send_demands(now_s)
        self._send_load(now_s)
        if self._leases:
            self._use_idle_cpus()
        if self.scheduler is not None:
            for home, grant in self.scheduler.match():
                if home == self._rank:
                    self.granted(grant, now_s)
                else:
                    self._outbox.peers[home].append(grant)

    def _use_idle_cpus(self) -> None:
        """This node could start more than waits here: its own tasks may wait elsewhere."""
        dispatcher = self._dispatcher
        for shape, leases in self._leases.items():
            queue = dispatcher.queues.get((shape, False))
            if (queue is None or not queue.tasks) and dispatcher.ledger.fits(shape):
                self._ask_back(shape, leases, self._rank)
                return

    def _send_demands(self, now_s: float) -> None:
        dispatcher = self._dispatcher
        statistics = self._statistics
        cpus = max(dispatcher.ledger.total.get("CPU", 0) // 10_000, 1)
        for (shape, creation), queue in dispatcher.queues.items():
            if creation:
                continue  # placed before they are queued
            count = len(queue.tasks)
            if not count:
                if (shape, False) in self._demanded:
                    del self._demanded[(shape, False)]
                    self._to_scheduler(Demand(shape, 0))
                continue
            known = statistics[queue.tasks[0].template.template_id]
            wait_us = count * (known.mean_us if known.count else 10_000) / cpus
            if wait_us < _PATIENCE_US and dispatcher.ledger.could_ever_fit(shape):
                continue
            spread = queue.tasks[0].template.spread
            ledger = dispatcher.ledger
            if spread and ledger.fits(shape) and count <= ledger.slots(shape):
                continue  # it was this node's turn: they wait for workers only
            self._demand(shape, queue.tasks, False, spread, now_s)
        for shape, waiting in self._actors_waiting.items():
            self._demand(shape, waiting, True, False, now_s)

    def _demand(
        self, shape: Shape, waiting: deque[TaskRecord], actor: bool, spread: bool, now_s: float
    ) -> None:
        count = len(waiting)
        last = self._demanded.get((shape, actor))
        if last is None or count > 2 * last[0] or now_s - last[1] > self._repeat_s:
            self._demanded[(shape, actor)] = (count, now_s)
            # Other homes' tasks are not ours to bind, and some are bound to this node: a grant for
            # them would help nobody. (The first is mostly one that counts.)
            if any(actor or (task.home == self._rank and task.template.rank < 0)
                   for task in waiting):
                self._to_scheduler(Demand(shape, count, actor, spread))

    def _send_load(self, now_s: float) -> None:
        dispatcher = self._dispatcher
        ledger = dispatcher.ledger
        told = self._told
        queued = dispatcher.queued()
        actors = len(self._tables.hosted) + dispatcher.creations()
        if not (self._counted or told is None or ledger.free != told.free
                or actors != told.actors or self._placed != told.placed):
            self._seen = None
            # A queue much longer or shorter matters less than room, and must not delay that.
            longer = queued.bit_length() != told.queued.bit_length()
            self.due_s = self._told_s + (
                _QUEUE_TOLD * self._load_interval_s if longer else self._heartbeat_s)
        else:
            seen = self._seen
            if seen is None:
                self._changed_s = now_s
            if seen is None or ledger.free != seen.free or actors != seen.actors:
                self._seen = Facts(dict(ledger.free), queued, actors, self._placed)
                self._seen_s = now_s
            self.due_s = max(
                min(self._seen_s + _SETTLED_S, self._changed_s + _UNSETTLED_S),
                self._told_s + self._load_interval_s)
        if now_s >= self.due_s:
            self._tell_load(now_s, queued, actors)

    def _tell_load(self, now_s: float, queued: int, actors: int) -> None:
        free = self._dispatcher.ledger.free
        self._told = Facts(dict(free), queued, actors, self._placed)
        self._told_s = now_s
        self._seen = None
        self._counted = False
        self.due_s = now_s + self._heartbeat_s
        # The store's room changes with every object: it is told along, and no reason to tell.
        self._to_scheduler(Load(
            tuple(sorted(pair for pair in free.items()
                         if pair[0] != STORE and not labels.is_condition(pair[0]))),
            queued, actors, self._placed, self._memory.free_units))

    def tell_own(self) -> None:
        """On the scheduler's rank, before groups are placed: what is free here now."""
        if (self._told is None or self._counted
                or self._told.free != self._dispatcher.ledger.free):
            self._tell_load(
                self._tables.now_s, self._dispatcher.queued(),
                len(self._tables.hosted) + self._dispatcher.creations())

    def bundles_came(self) -> None:
        """Node 0 has counted them."""
        self._counted = True

    def work_came(self, template: Template) -> None:
        """Perhaps by a grant: the scheduler has counted it, and must hear how it turned out. Not if
        this node has told that it has no room: then there was no grant."""
        if template.kind == ACTOR_CREATION and template.rank < 0:
            self._placed += 1
        elif not self._counted and self._told is not None:
            self._counted = covers(self._told.free, template.resources)

    @property
    def actors_waiting(self) -> bool:
        return bool(self._actors_waiting)

    def _to_scheduler(self, message: Any) -> None:
        if self.scheduler is None:
            self._outbox.peers[SCHEDULER_RANK].append(message)
        elif type(message) is Load:
            self.scheduler.load(self._rank, message, self._tables.now_s)
        elif type(message) is GrantUnused:
            self.scheduler.unused(self._rank, message)
        else:
            self.scheduler.demand(self._rank, message)


def describe(shape: Shape) -> str:
    """A shape for people."""
    amounts = [f"{name}: {words.size(amount / UNIT)}" if "memory" in name
               else f"{name}: {amount / UNIT:g}" for name, amount in shape
               if not labels.is_condition(name) and not name.startswith("node:__")]
    hard = [f"labels {name[1:].replace('|', ' or ')}" for name, _ in shape
            if name[0] == labels.HARD]
    return ", ".join([f"{{{', '.join(amounts)}}}", *hard])
