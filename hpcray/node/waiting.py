"""What has waited for long, said once in one sentence: for what, and what holds it. Pure.

    once a second: queues, actors to be placed, groups, running workers, silent ranks
        --the same thing waits for 2 s---> is it stuck? Then all processes collect their garbage
        --and for 10 s-------------------> can it still begin by itself?
              yes: look again in 10 s          no: one notice per cause, until the cause is gone

What waits its turn behind tasks that run is not stuck: they end. It is stuck if no node could
start it even when all running tasks had ended, because actors and placement groups hold what it
needs. The other nodes are asked for that. A process that is stopped and a rank that is silent are
told as such.

Costs nothing per task: the records are read on the slow tick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from hpcray.node.cluster import Cluster
from hpcray.node.dispatch import Dispatcher, ShapeQueue
from hpcray.node.explain import Explain, name_of
from hpcray.node.ledger import Shape, is_group_shape
from hpcray.node.memory import NodeMemory
from hpcray.node.outbox import Outbox
from hpcray.node.placement import Group, Groups, Room, choose
from hpcray.node.records import DRIVER, TaskRecord, Worker
from hpcray.node.tables import Forward, Tables, unwired
from hpcray.node.task_states import QUEUED
from hpcray.protocol import ids, labels, words
from hpcray.protocol.messages import CollectGarbage

PATIENCE_S = 10.0
# What is stuck for so long may be kept by refs or handles in cycles, which nobody uses any more.
_COLLECT_S = 2.0
_LOOK_S = 1.0
# Looks further apart than this: this node itself was stopped, and nothing can be said of others.
_PAUSE_S = 5.0
# Tasks of a queue looked at for one that a holder of its resources waits for.
_LOOKED_AT = 1000

Key = tuple[Any, ...]
# Kinds of waits, by their key, that refs and handles may be the cause of.
_KEPT = ("queue", "actors", "group", "store")


class Wait:
    """Something that waits: since when the same has been first in line, and whether it was told."""

    __slots__ = ("collected", "due_s", "said", "sign", "since_s")

    def __init__(self, sign: Any, since_s: float, kept: bool) -> None:
        """`kept`: perhaps by garbage."""
        self.sign = sign
        self.since_s = since_s
        self.due_s = since_s + (_COLLECT_S if kept else PATIENCE_S)  # the next look
        self.said = False
        self.collected = not kept


class Candidate(NamedTuple):
    key: Key
    sign: Any  # changes when it gets on
    look: Callable[[Wait], None]  # whether it is stuck; then `_say`


class Waiting:
    def __init__(
        self, tables: Tables, outbox: Outbox, memory: NodeMemory, dispatcher: Dispatcher,
        cluster: Cluster, groups: Groups, explain: Explain,
    ) -> None:
        self._tables = tables
        self._workers = tables.workers
        self._hosted = tables.hosted
        self._outbox = outbox
        self._memory = memory
        self._dispatcher = dispatcher
        self._cluster = cluster
        self._groups = groups
        self._explain = explain
        self._rank = tables.rank
        # Ports: ask another node (rank, request, arguments, who hears the answer); have the
        # processes here look for garbage.
        self.forward: Forward = unwired
        self.collect_garbage: Callable[[], None] = unwired
        self._waits: dict[Key, Wait] = {}
        self._last_s = 0.0
        # What each worker ran at the last look.
        self._ran: dict[int, bytes] = {}
        # Grows with everything that node 0 says; only rank 1 has it, to speak for all.
        self.heard_of_node0: Callable[[], int] | None = None

    def tick(self, now_s: float) -> None:
        """Look, if it is time."""
        elapsed_s = now_s - self._last_s
        if elapsed_s < _LOOK_S:
            return
        if elapsed_s > _PAUSE_S:
            self._waits.clear()
        self._last_s = now_s
        waits: dict[Key, Wait] = {}
        due = []
        for key, sign, look in self._candidates():
            wait = self._waits.get(key)
            if wait is None or (wait.sign != sign and not wait.said):
                wait = Wait(sign, now_s, key[0] in _KEPT)
            waits[key] = wait
            if not wait.said and now_s >= wait.due_s:
                patient_s = wait.since_s + PATIENCE_S
                wait.due_s = patient_s if now_s < patient_s else now_s + PATIENCE_S
                due.append((wait, look))
        self._waits = waits
        for wait, look in due:
            look(wait)

    def _say(self, wait: Wait, text: str, *, alone: bool = False) -> None:
        """But first see whether it goes on without garbage. `alone`: not through node 0 and the
        driver, which are what is waited for."""
        if not wait.collected:
            wait.collected = True
            wait.due_s = max(wait.since_s + PATIENCE_S, self._last_s + _COLLECT_S)
            for rank in range(self._tables.size):
                if rank != self._rank:
                    self._outbox.peers[rank].append(CollectGarbage())
            self.collect_garbage()
            return
        if not wait.said and any(other is wait for other in self._waits.values()):
            wait.said = True
            box = self._outbox
            (box.own_notices if alone else box.notices).append(f"Warning: {text}")

    def _candidates(self) -> Iterator[Candidate]:
        for (shape, creation), queue in self._dispatcher.queues.items():
            task = self._first(queue.tasks)
            if task is not None and not queue.starved:
                yield Candidate(("queue", shape, creation), task.task_id,
                                partial(self._look_at_queue, queue))
        for shape, tasks in self._cluster.actors_to_place():
            task = self._first(tasks)
            if task is not None:
                yield Candidate(("actors", shape), task.task_id,
                                partial(self._look_at, shape, tasks))
        alike: dict[Key, list[Group]] = {}
        for group in self._groups.to_place():
            alike.setdefault(("group", tuple(group.bundles), group.strategy), []).append(group)
        for key, groups in alike.items():
            yield Candidate(key, groups[0].group, partial(self._look_at_groups, groups))
        if self._memory.waiting:
            yield Candidate(("store",), self._memory.answered, self._say_full)
        yield from self._stopped()
        yield from self._silent()

    @staticmethod
    def _first(tasks: Iterable[TaskRecord]) -> TaskRecord | None:
        return next((t for t in tasks if t.state is QUEUED and not t.cancelled), None)

    # --- tasks and actors -------------------------------------------------------------------------

    def _look_at_queue(self, queue: ShapeQueue, wait: Wait) -> None:
        dispatcher = self._dispatcher
        task = self._first(queue.tasks)
        if task is None or (task.home != self._rank and task.template.rank < 0):
            return  # others' tasks go back to their home
        if dispatcher.ledger.fits(queue.shape):
            if dispatcher.starting:
                self._say(wait, f"{_who(task, queue.tasks)} waited for {PATIENCE_S:g} s for a "
                          f"worker process, which has not started on rank {self._rank}.")
            return
        self._look_at(queue.shape, queue.tasks, wait, bound=task.template.rank >= 0)

    def _look_at(
        self, shape: Shape, tasks: Iterable[TaskRecord], wait: Wait, *, bound: bool = False
    ) -> None:
        """Whether any node could start the first of `tasks` once its running tasks have ended."""
        needed = tuple(pair for pair in shape if not labels.is_condition(pair[0]))
        awaited = self._waited_for(tasks)

        def heard(found: dict[int, tuple[dict[str, int], list[str]]]) -> None:
            able = [rank for rank in found if rank in eligible]
            if not able or any(_covers(found[rank][0], needed) for rank in able):
                return  # reported as impossible, or a matter of time
            if is_group_shape(shape) and not any(keepers for _, keepers in found.values()):
                return  # its placement group is not placed, which is said of the group
            task = self._first(tasks)
            if task is not None:
                lacking = tuple(pair for pair in needed
                                if all(found[rank][0].get(pair[0], 0) < pair[1] for rank in able))
                self._say(wait, f"{_who(task, tasks)} waited for {PATIENCE_S:g} s for "
                          f"{words.amounts(lacking or needed)}{self._held(found, able)}")

        eligible = {rank for rank, total in self._cluster.totals().items()
                    if (rank == self._rank or not bound)
                    and (is_group_shape(shape) or _covers(total, shape))}
        own = self.holdings([name for name, _ in needed], awaited)
        if self._rank in eligible and _covers(own[0], needed):
            return
        self._ask(own, eligible, [name for name, _ in needed], heard)

    def _waited_for(self, tasks: Iterable[TaskRecord]) -> set[int]:
        """Clients that wait in `get` for one of these tasks."""
        records = self._tables.objects
        found: set[int] = set()
        for task in islice(tasks, _LOOKED_AT):
            record = records.get(task.task_id + ids.FIRST_RETURN)
            waiters = None if record is None else record.waiters
            if waiters is not None:
                found.update(code >> 2 for code in (
                    waiters if type(waiters) is list else (waiters,)))
        return found

    def holdings(
        self, names: list[str], awaited: set[int] | None = None
    ) -> tuple[dict[str, int], list[str]]:
        """Of these resources: what this node has when its running tasks have ended, and who keeps
        the rest. A task that waits for one of those in question (`awaited`) does not end."""
        have = {name: self._dispatcher.ledger.free.get(name, 0) for name in names}
        keepers = []
        for worker in self._workers.values():
            held = [(name, value) for name, value in worker.shape
                    if name in have and not (worker.blocked and name.startswith("CPU"))]
            if not held:
                continue
            hosted = self._hosted.get(worker.actor_id)
            if hosted is not None and hosted.alive:
                keepers.append(self._explain.who(worker))
            elif awaited and worker.blocked and worker.number in awaited:
                keepers.append(f"{self._explain.who(worker)}, which waits for it")
            else:
                for name, value in held:
                    have[name] += value
        keepers += self._explain.groups_with(set(names))
        return have, keepers

    def _ask(
        self, own: tuple[dict[str, int], list[str]], eligible: set[int], names: list[str],
        heard: Callable[[dict[int, tuple[dict[str, int], list[str]]]], None],
    ) -> None:
        found = {self._rank: own}
        missing = eligible - {self._rank}
        if not missing:
            heard(found)
        for rank in sorted(missing):
            def answered(reply: Any, rank: int = rank) -> None:
                missing.discard(rank)
                if reply.result is not None:
                    found[rank] = (reply.result[0], reply.result[1])
                if not missing:
                    heard(found)

            self.forward(rank, "holdings", {"names": names}, answered)

    def _held(
        self, found: dict[int, tuple[dict[str, int], list[str]]], able: list[int]
    ) -> str:
        parts = []
        for rank in able:
            if found[rank][1]:
                where = f" on rank {rank}" if self._tables.size > 1 else ""
                parts.append(f"{words.counted(found[rank][1], 3)}{where}")
        if not parts:
            return "."
        text = f", held by {words.listed(parts, 3)}."
        if "actor " in text:
            text += (" An actor keeps its resources until it ends: start with more of them, or "
                     "give actors less (num_cpus=0).")
        return text

    # --- placement groups -------------------------------------------------------------------------

    def _look_at_groups(self, groups: list[Group], wait: Wait) -> None:
        """The first of some with the same bundles."""
        group = groups[0]
        count = f"{len(group.bundles)} bundle{'s' if len(group.bundles) > 1 else ''}"
        more = f" and {len(groups) - 1} more have" if len(groups) > 1 else " has"
        names = sorted({name for bundle in group.bundles for name, _ in bundle
                        if not labels.is_condition(name)})

        def heard(found: dict[int, tuple[dict[str, int], list[str]]]) -> None:
            bundles = [tuple(pair for pair in bundle if not labels.is_condition(pair[0]))
                       for bundle in group.bundles]
            room = Room({rank: have for rank, (have, _) in found.items()})
            if choose(bundles, group.strategy, room) is None:
                self._say(wait, f"placement group {group.name or group.group.hex()} "
                          f"({count}, {group.strategy}){more} waited for "
                          f"{PATIENCE_S:g} s for {_names(bundles)}{self._held(found, list(found))}")

        self._ask(self.holdings(names), set(self._cluster.totals()), names, heard)

    def _say_full(self, wait: Wait) -> None:
        memory = self._memory
        waits = memory.waits_for()
        if waits:
            capacity = words.size(memory.budget.capacity_bytes)
            self._say(wait, f"{waits.format(f'{PATIENCE_S:g} s')} in the object store of rank "
                      f"{self._rank} ({capacity}), which is full: {memory.contents()}.")

    # --- processes and ranks ----------------------------------------------------------------------

    def _stopped(self) -> Iterator[Candidate]:
        """Workers that run the same as at the last look, and are stopped."""
        before, self._ran = self._ran, {}
        for number, worker in self._workers.items():
            hosted = self._hosted.get(worker.actor_id)
            task = (worker.datagrams[0][0] if worker.datagrams else
                    None if hosted is None else next(iter(hosted.in_flight.values()), None))
            if task is None:
                continue
            self._ran[number] = task.task_id
            if (before.get(number) == task.task_id
                    and self._explain.process_state(worker.pid) == "T"):
                yield Candidate(
                    ("stopped", number), task.task_id,
                    partial(self._say_stopped, task, worker))

    def _say_stopped(self, task: TaskRecord, worker: Worker, wait: Wait) -> None:
        self._say(wait, f"{name_of(task.template)} has not gone on for {PATIENCE_S:g} s: its "
                  f"process (pid {worker.pid} on rank {self._rank}) was stopped by a signal, and "
                  f"goes on after `kill -CONT {worker.pid}`.")

    def _silent(self) -> Iterator[Candidate]:
        """On the scheduler's rank, which hears of every node once a second, and acknowledges it."""
        if self.heard_of_node0 is not None:
            yield Candidate(("silent", 0), self.heard_of_node0(), partial(self._say_silent, 0))
        scheduler = self._cluster.scheduler
        if scheduler is None:
            return
        driver = self._tables.clients.get(DRIVER)
        if driver is not None and self._tables.size > 1:
            state = self._explain.process_state(driver.pid)
            if state == "T":
                yield Candidate(
                    ("stopped", DRIVER), None, partial(self._say_driver_stopped, driver.pid))
        for rank, view in scheduler.views.items():
            if rank != self._rank:
                yield Candidate(("silent", rank), view.heard_s,
                                partial(self._say_silent, rank))

    def _say_driver_stopped(self, pid: int, wait: Wait) -> None:
        self._say(wait, f"the driver (pid {pid} on rank 0) was stopped by a signal "
                  f"{PATIENCE_S:g} s ago, and goes on after `kill -CONT {pid}`.", alone=True)

    def _say_silent(self, rank: int, wait: Wait) -> None:
        node = self._tables.nodes[rank]
        self._say(wait, f"nothing has been heard of rank {rank} ({node.host}, pid {node.pid}) for "
                  f"{PATIENCE_S:g} s: its process is stopped or its host is overloaded, and what "
                  "runs there is waited for.", alone=rank == 0)


def _who(task: TaskRecord, tasks: Iterable[TaskRecord]) -> str:
    more = sum(1 for other in tasks if not other.cancelled) - 1
    return f"{name_of(task.template)} and {more} more have" if more > 0 else (
        f"{name_of(task.template)} has")


def _names(bundles: list[Shape]) -> str:
    return words.counted([words.amounts(bundle) for bundle in bundles])


def _covers(have: dict[str, int], shape: Shape) -> bool:
    return all(have.get(name, 0) >= amount for name, amount in shape)
