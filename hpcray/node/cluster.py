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

from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from hpcray.node.dispatch import Dispatcher, ShapeQueue
from hpcray.node.ledger import Shape, is_group_shape
from hpcray.node.memory import NodeMemory
from hpcray.node.outbox import Outbox
from hpcray.node.records import QUEUED, TaskRecord, is_here
from hpcray.node.scheduler import GlobalScheduler, covers, may_run, rating, slots_of
from hpcray.node.tables import Tables, unwired
from hpcray.node.tasks import Tasks
from hpcray.protocol import ids, labels, values, words
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
_LOAD_INTERVAL_S = 0.002
# How often one node is asked to give back.
_ASK_BACK_S = 0.005
_HEARTBEAT_S = 1.0
# A node that had no room for what was dealt to it is left out for this long.
_REST_S = 0.1
# Below this many bytes an absent input does not decide where a task runs.
_LOCALITY_BYTES = 4 * 1024 * 1024


class Lease:
    """Slots granted on another rank for one shape."""

    __slots__ = ("asked_s", "open", "slots")

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.asked_s = 0.0  # when it was last asked to give something back
        self.open = 0  # assigned, no outcome yet


class Turns:
    """Whose turn it is to get the next task of a shape that is dealt out."""

    __slots__ = ("next", "ranks", "rests", "slots")

    def __init__(self, slots: dict[int, int]) -> None:
        self.ranks = list(slots)
        self.slots = slots  # how many each could run at once if it had nothing else to do
        self.next = 0
        self.rests: dict[int, float] = {}  # until when


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
        self.creation_failed: Callable[[TaskRecord, bytes], None] = unwired
        # What each node has in all, conditions on labels that it meets among it.
        self._totals: dict[int, dict[str, int]] = {}
        self._turns: dict[Shape, Turns] = {}
        self._movable: dict[bytes, Template] = {}
        self._leases: dict[tuple[int, Shape], Lease] = {}
        self._demanded: dict[tuple[Shape, bool], tuple[int, float]] = {}
        # Actors to be created, by what they need: placed one by one, where few actors are.
        self._actors_waiting: dict[Shape, deque[TaskRecord]] = {}
        self._last_load: Any = None
        self._last_load_s = 0.0
        self.scheduler = GlobalScheduler() if self._rank == SCHEDULER_RANK else None

    def joined(self, node: Joined) -> None:
        """A node of the job, this one too."""
        self._totals[node.rank] = dict(node.resources)
        if self.scheduler is not None:
            self.scheduler.joined(node)

    def node_lost(self, rank: int, _reason: str) -> None:
        """Nothing is placed there any more."""
        self._totals.pop(rank, None)
        for key in [key for key in self._leases if key[0] == rank]:
            del self._leases[key]
        self._turns.clear()  # dealt out anew, among those that are left
        if self.scheduler is not None:
            self.scheduler.lost(rank)

    def learn(self, shape: Shape) -> None:
        """Conditions on labels in a shape: who meets them; if this node does, it says so."""
        for name, _ in shape:
            if not labels.is_condition(name):
                continue
            for rank, total in self._totals.items():
                if may_run(dict(self._nodes[rank].labels), name):
                    total[name] = labels.OFFERED
                    if rank == self._rank:
                        self._dispatcher.ledger.offer_without_limit(name)

    def totals(self) -> dict[int, dict[str, int]]:
        """What each node has in all. To be copied before it is changed."""
        return self._totals

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
            tasks.ready(task)
            return True
        creation = template.kind == ACTOR_CREATION
        known = template.rank in self._totals
        node = f"the node of rank {template.rank}" if known else "a node by its id"
        error = values.pack_failure(values.Failure(
            "ActorUnschedulableError" if creation else "TaskUnschedulableError",
            f"{template.name} asks for {node} and no other "
            f"(soft=False), but {why}"))
        if creation:
            self.creation_failed(task, error)
        else:
            tasks.fail(task, error)
        return True

    def _without_affinity(self, template: Template) -> Template:
        """The same for any node. Named by what it comes from: every node makes the same of it."""
        other = self._movable.get(template.template_id)
        if other is None:
            name = bytes(255 - byte for byte in template.template_id)
            other = msgspec.structs.replace(
                template, template_id=name, rank=-1, soft=False, unavailable=WAIT)
            self._movable[template.template_id] = other
            self._tasks.define(other)
        return other

    # --- dealing out ------------------------------------------------------------------------------

    def deal(self, task: TaskRecord) -> bool:
        """Bind a task to the node whose turn it is, if that has room; False: queue it here."""
        shape = task.template.resources
        turns = self._turns.get(shape)
        if turns is None:
            turns = self._turns[shape] = Turns(self._candidates(shape))
        ranks = turns.ranks
        for step in range(len(ranks)):
            rank = ranks[(turns.next + step) % len(ranks)]
            if not self._deals_to(rank, shape, turns):
                continue
            turns.next = (turns.next + step + 1) % len(ranks)
            if rank == self._rank:
                return False
            lease = self._leases.get((rank, shape))
            if lease is None:
                lease = self._leases[(rank, shape)] = Lease(0)
            lease.open += 1
            lease.slots = max(lease.slots, min(lease.open, turns.slots[rank]))
            self._tasks.assign(task, rank)
            return True
        return False

    def _deals_to(self, rank: int, shape: Shape, turns: Turns) -> bool:
        if rank == self._rank:
            return self._dispatcher.has_room_for(shape)
        if rank in turns.rests:
            if self._tables.now_s < turns.rests[rank]:
                return False
            del turns.rests[rank]
        lease = self._leases.get((rank, shape))
        return lease is None or lease.open < turns.slots[rank]

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

    def _actors_granted(self, message: Grant) -> bool:
        waiting = self._actors_waiting.get(message.shape)
        slots = message.slots
        while waiting and slots:
            task = waiting.popleft()
            if task.cancelled:
                continue
            slots -= 1
            if message.rank == self._rank:
                self._dispatcher.enqueue(task)
            else:
                self._tasks.assign(task, message.rank)
        if not waiting:
            self._actors_waiting.pop(message.shape, None)
        return slots < message.slots

    def end_group(self, group: str) -> None:
        """A placement group is gone: refuse the actors that wait for it."""
        for shape in [s for s in self._actors_waiting if any(group in name for name, _ in s)]:
            for task in self._actors_waiting.pop(shape):
                if not task.cancelled:
                    self.refuse_of_group(task)

    def granted(self, message: Grant, now_s: float) -> None:
        if self._actors_granted(message) if message.actor else self._tasks_granted(message):
            self._demanded.pop((message.shape, message.actor), None)
        else:
            # Of what is used the node tells. Nobody would of this: it would look taken.
            self._to_scheduler(
                GrantUnused(message.rank, message.shape, message.slots, message.actor))

    def _tasks_granted(self, message: Grant) -> bool:
        """Bind tasks to the granted node; whether there were any."""
        queue = self._dispatcher.queues.get((message.shape, False))
        if queue is None or not queue.tasks:
            return False
        if message.rank == self._rank:
            return True  # the dispatcher takes it from here
        key = (message.rank, message.shape)
        lease = self._leases.get(key)
        if lease is None:
            lease = self._leases[key] = Lease(0)
        lease.slots += message.slots
        before = lease.open
        self._refill(message.rank, queue, lease)
        used = lease.open > before
        if not used:
            lease.slots -= message.slots
        if lease.open <= 0:  # nothing here could be bound to it after all
            del self._leases[key]
        return used

    def _refill(self, rank: int, queue: ShapeQueue, lease: Lease) -> None:
        room = lease.slots
        for task in queue.tasks:
            if task.state == QUEUED:
                known = self._statistics[task.template.template_id]
                if known.count and not known.singly:
                    room *= max(1, min(_AHEAD_US // (known.slow_us + 1), _AHEAD_MAX))
                    # A little more than runs: its next task is there when one ends. It comes
                    # back (GiveBack) if somebody else is idle first.
                    room += max(1, lease.slots // 4)
                break
        # Leave this node's own CPUs their next tasks: binding the last ones away gains nothing.
        self._bind(rank, queue, room - lease.open, lease)

    def _bind(self, rank: int, queue: ShapeQueue, count: int, lease: Lease) -> None:
        tasks = self._tasks
        skipped = []
        while count > 0 and queue.tasks:
            task = queue.tasks.popleft()
            if task.state != QUEUED or task.cancelled:
                continue
            if task.home != self._rank or task.template.rank >= 0:
                skipped.append(task)
                continue
            tasks.assign(task, rank)
            lease.open += 1
            count -= 1
        queue.tasks.extendleft(reversed(skipped))

    def finished(self, rank: int, task: TaskRecord) -> None:
        """A task bound elsewhere has an outcome: its slot takes the next one."""
        key = (rank, task.template.resources)
        lease = self._leases.get(key)
        if lease is None:
            return
        lease.open -= 1
        queue = self._dispatcher.queues.get((task.template.resources, False))
        if queue is not None and queue.tasks:
            self._refill(rank, queue, lease)
        elif lease.open < lease.slots:
            self._ask_back(task.template.resources, rank)
        if lease.open <= 0:
            del self._leases[key]

    def _ask_back(self, shape: Shape, idle_rank: int) -> None:
        """A slot is idle and nothing waits here: take back what waits elsewhere unstarted."""
        now_s = self._tables.now_s
        turns = self._turns.get(shape)
        for (rank, leased), lease in self._leases.items():
            # What was dealt to a node within its means runs there: nothing to take back.
            enough = 1 if turns is None else turns.slots.get(rank, 1)
            if (rank != idle_rank and leased == shape and lease.open > enough
                    and now_s - lease.asked_s > _ASK_BACK_S):
                lease.asked_s = now_s
                self._outbox.peers[rank].append(GiveBack(shape, 1))
                return

    def returned(self, rank: int, task: TaskRecord) -> None:
        """The executor has no room after all."""
        key = (rank, task.template.resources)
        lease = self._leases.get(key)
        if lease is not None:
            lease.open -= 1
            lease.slots = max(lease.slots - 1, 0)
            if lease.open <= 0:
                del self._leases[key]
        turns = self._turns.get(task.template.resources)
        if turns is not None:
            turns.rests[rank] = self._tables.now_s + _REST_S

    # --- end of turn and time ---------------------------------------------------------------------

    def end_turn(self, now_s: float) -> None:
        """Of several nodes."""
        self._send_demands(now_s)
        self._send_load(now_s)
        if self._leases:
            self._use_idle_cpus()
        if self.scheduler is not None:
            for home, grant in self.scheduler.match(now_s):
                if home == self._rank:
                    self.granted(grant, now_s)
                else:
                    self._outbox.peers[home].append(grant)

    def _use_idle_cpus(self) -> None:
        """This node could start more than waits here: its own tasks may wait elsewhere."""
        dispatcher = self._dispatcher
        for _, shape in list(self._leases):
            queue = dispatcher.queues.get((shape, False))
            if (queue is None or not queue.tasks) and dispatcher.ledger.fits(shape):
                self._ask_back(shape, self._rank)
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
        if last is None or count > 2 * last[0] or now_s - last[1] > _REPEAT_S:
            self._demanded[(shape, actor)] = (count, now_s)
            # Other homes' tasks are not ours to bind, and some are bound to this node: a grant for
            # them would help nobody. (The first is mostly one that counts.)
            if any(actor or (task.home == self._rank and task.template.rank < 0)
                   for task in waiting):
                self._to_scheduler(Demand(shape, count, actor, spread))

    def _send_load(self, now_s: float) -> None:
        dispatcher = self._dispatcher
        facts = (dispatcher.ledger.free, dispatcher.queued(), len(self._tables.hosted))
        same = self._last_load is not None and facts == self._last_load
        since_s = now_s - self._last_load_s
        if (same and since_s < _HEARTBEAT_S) or since_s < _LOAD_INTERVAL_S:
            return
        self._last_load = (dict(facts[0]), facts[1], facts[2])
        self._last_load_s = now_s
        # The store's room changes with every object: it is told along, and no reason to tell.
        free = {**facts[0], STORE: self._memory.free_units}
        self._to_scheduler(Load(tuple(sorted(free.items())), facts[1], facts[2]))

    def load_changed(self) -> None:
        """Work came by a grant: the scheduler has counted it, and must hear how it turned out."""
        self._last_load = None

    @property
    def actors_waiting(self) -> bool:
        return bool(self._actors_waiting)

    @property
    def load_is_stale(self) -> bool:
        """A load worth telling waits for its interval: the loop should come round soon."""
        if self._tables.size == 1:
            return False
        return bool(self._last_load is None
                    or self._last_load[0] != self._dispatcher.ledger.free)

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
