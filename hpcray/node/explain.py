"""Why an object is not there yet: its task, where that is, and what it waits for. Pure.

    client --Request "explain" {"ids": joined ids}--> its node --> home of each --> executor
           <--Reply: one sentence per object, in order------------------------------+

    task sleepy: RUNNING on rank 0 (pid 123)
    task f: QUEUED on rank 0, waits for 1 CPU (held by actor Counter x2)
    task g: WAITING for task f (RUNNING on rank 1)

Everything is read from the records when somebody asks. A node that does not answer in time is
named, and the answer goes out without it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

from hpcray.node.actor_records import Hosted, class_name, turn_of
from hpcray.node.actor_states import UNKNOWN
from hpcray.node.dispatch import Dispatcher
from hpcray.node.ledger import Shape
from hpcray.node.membership import Membership
from hpcray.node.memory import NodeMemory
from hpcray.node.placement import Bundles
from hpcray.node.records import PENDING, ObjectRecord, TaskRecord, Worker, is_here
from hpcray.node.tables import Forward, Tables, unwired
from hpcray.node.task_states import ASSIGNED, FETCHING, QUEUED, RUNNING, WAITING
from hpcray.protocol import ids, labels, words
from hpcray.protocol.messages import ACTOR_CREATION, METHOD, Template

# Objects explained for one request; a client asks about the first few.
IDS_MAX = 16
# How long other nodes have. A client waits for 1 s in all, and a home asks the executor.
_HOME_S = 0.7
_EXECUTOR_S = 0.4

_STATES = {WAITING: "WAITING", QUEUED: "QUEUED", FETCHING: "FETCHING", ASSIGNED: "ASSIGNED",
           RUNNING: "RUNNING"}


class Asked:
    """One request, while other nodes answer."""

    __slots__ = ("answer", "deadline_s", "missing", "sentences")

    def __init__(
        self, count: int, deadline_s: float, answer: Callable[[list[str]], None]
    ) -> None:
        self.sentences = [""] * count
        self.missing: dict[int, str] = {}  # place -> what is said if nobody answers
        self.deadline_s = deadline_s
        self.answer = answer


class Explain:
    def __init__(
        self, tables: Tables, membership: Membership, memory: NodeMemory, dispatcher: Dispatcher,
        bundles: Bundles,
    ) -> None:
        self._tables = tables
        self._tasks = tables.tasks
        self._objects = tables.objects
        self._home_of = membership.home_of
        self._memory = memory
        self._dispatcher = dispatcher
        self._bundles = bundles
        self._rank = tables.rank
        # Port: ask another node (rank, request, arguments, who hears the answer).
        self.forward: Forward = unwired
        self.open: list[Asked] = []
        # The state of a process by its pid, as /proc names it ("T": stopped). The loop sets it.
        self.process_state: Callable[[int], str] = lambda pid: ""

    # --- asking and answering ---------------------------------------------------------------------

    def asked(
        self, arguments: dict[str, Any], answer: Callable[[list[str]], None], *, peer: bool
    ) -> None:
        """`answer` is called with a sentence per object: now, or when other nodes have spoken."""
        object_ids = ids.split_ids(arguments["ids"])[:IDS_MAX]
        at_executor = bool(arguments.get("executor"))
        now_s = self._tables.now_s
        asked = Asked(len(object_ids), now_s + (_EXECUTOR_S if peer else _HOME_S), answer)
        for place, object_id in enumerate(object_ids):
            task = self._tasks.get(ids.task_of_object(object_id))
            home = self._home_of(object_id)
            if task is None and home != self._rank and not at_executor:
                self._ask(asked, place, home, object_id, self._foreign(object_id))
            elif task is not None and not at_executor and self._executor(task) != self._rank:
                rank = self._executor(task)
                self._ask(asked, place, rank, object_id,
                          f"{name_of(task.template)}: ASSIGNED to rank {rank}")
            elif task is not None:
                asked.sentences[place] = self.task(task)
            elif not at_executor:
                asked.sentences[place] = self._object(object_id)
        if asked.missing:
            self.open.append(asked)
        else:
            answer(asked.sentences)

    def _ask(self, asked: Asked, place: int, rank: int, object_id: bytes, otherwise: str) -> None:
        asked.missing[place] = f"{otherwise} (rank {rank} does not answer)"

        def heard(result: Any) -> None:
            if asked.missing.pop(place, None) is not None:
                asked.sentences[place] = (result and result[0]) or otherwise
                if not asked.missing and asked in self.open:
                    self.open.remove(asked)
                    asked.answer(asked.sentences)

        at_home = rank == self._home_of(object_id)
        self.forward(
            rank, "explain", {"ids": object_id, "executor": not at_home},
            lambda reply: heard(reply.result))

    def tick(self, now_s: float) -> None:
        """Answer without those who have not spoken in time."""
        for asked in [a for a in self.open if now_s >= a.deadline_s]:
            self.open.remove(asked)
            for place, sentence in asked.missing.items():
                asked.sentences[place] = sentence
            asked.missing.clear()
            asked.answer(asked.sentences)

    def _executor(self, task: TaskRecord) -> int:
        return task.rank if task.state is ASSIGNED and task.rank >= 0 else self._rank

    # --- objects ----------------------------------------------------------------------------------

    def _foreign(self, object_id: bytes) -> str:
        return f"an object of rank {self._home_of(object_id)}"

    def _object(self, object_id: bytes) -> str:
        """One whose task is over, or that was put."""
        record = self._objects.get(object_id)
        what = ("object made by put()" if object_id[24:] == ids.PUT_INDEX
                else "object whose task is over")
        if record is None:
            return f"{what}: freed"
        if record.state is PENDING:
            return f"{what}: not announced yet"
        extra = record.extra
        if extra is not None and not is_here(record):
            copies = sorted(extra.copies or extra.sources)
            where = words.listed([f"rank {rank}" for rank in copies])
            return f"{what}: {words.size(record.nbytes)} on {where}"
        return f"{what}: ready on rank {self._rank}"

    def _missing(self, record: ObjectRecord) -> str:
        """An object that a task waits for."""
        task = self._tasks.get(ids.task_of_object(record.object_id))
        if task is None:
            home = self._home_of(record.object_id)
            return f"an object of rank {home}" if home != self._rank else "an object"
        rank = self._executor(task)
        where = "to" if task.state is ASSIGNED and rank != self._rank else "on"
        state = "RUNNING" if task.state is ASSIGNED and where == "on" else _STATES[task.state]
        return f"{name_of(task.template)} ({state} {where} rank {rank})"

    # --- tasks ------------------------------------------------------------------------------------

    def task(self, task: TaskRecord) -> str:
        """A task that this node is responsible for, or runs."""
        return f"{name_of(task.template)}: {self._state(task)}"

    def _state(self, task: TaskRecord) -> str:
        here = f"on rank {self._rank}"
        if task.state is WAITING or (task.missing and task.state is QUEUED):
            return f"WAITING for {self._dependencies(task)}"
        if task.state is FETCHING:
            return f"FETCHING {self._inputs(task)} to rank {self._rank}"
        if task.template.kind == METHOD:
            return self._call(task)
        if task.state is RUNNING:
            worker = self._tables.workers.get(task.worker)
            if worker is None:
                return f"RUNNING {here}"
            first = worker.datagrams[0][0] if worker.datagrams else task
            if first is not task:
                return (f"QUEUED {here} behind {name_of(first.template)} "
                        f"({self._process(worker)})")
            return f"RUNNING {here} ({self._process(worker)})"
        return f"QUEUED {here}{self._why_queued(task)}"

    def _dependencies(self, task: TaskRecord) -> str:
        records = self._objects
        missing = [records[object_id]
                   for object_id in ids.split_ids(task.refs[: task.dep_count * 28])
                   if object_id in records and records[object_id].state is PENDING]
        return words.listed([self._missing(record) for record in missing], 2) or "its arguments"

    def _inputs(self, task: TaskRecord) -> str:
        records = self._objects
        absent = [records[i] for i in ids.split_ids(task.refs[: task.dep_count * 28])
                  if i in records and not is_here(records[i])]
        nbytes = sum(record.nbytes for record in absent)
        ranks = {rank for record in absent if record.extra is not None
                 for rank in record.extra.copies or record.extra.sources}
        where = words.listed([f"rank {rank}" for rank in sorted(ranks)])
        full = self._memory.awaits([record.object_id for record in absent])
        return (f"{words.size(nbytes)} of arguments"
                + (f" from {where}" if where else "")
                + (" (the object store is full)" if full else ""))

    def _why_queued(self, task: TaskRecord) -> str:
        template = task.template
        shape = template.resources
        if template.group_id and not any(name in self._dispatcher.ledger.total
                                         for name, _ in shape):
            return ", waits for a slot of its placement group"
        lacking = self.lacking(shape)
        if not lacking:
            queue = self._dispatcher.queues.get((shape, template.kind == ACTOR_CREATION))
            behind = 0 if queue is None else next(
                (n for n, other in enumerate(islice(queue.tasks, 1000)) if other is task), 0)
            others = f"{behind} other{'s'[:behind > 1]}"
            return f", behind {others}" if behind else ", waits for a worker process"
        return f", waits for {words.amounts(lacking)}{self.held_by(lacking)}"

    def _call(self, task: TaskRecord) -> str:
        """A call of an actor."""
        hosted = self._tables.hosted.get(task.actor_id)
        if task.state in (ASSIGNED, RUNNING) and hosted is not None:
            return self._hosted_call(hosted, task)
        route = self._tables.routes.get(task.actor_id)
        if route is None:
            return f"{_STATES[task.state]} on rank {self._rank}"
        if turn_of(task) in route.blocked:
            return "QUEUED behind a call whose arguments are not ready"
        creation = self._tasks.get(ids.creation_task_id(task.actor_id))
        if creation is not None:
            return f"waits for its actor ({self.task(creation)})"
        state = "not known yet" if route.state is UNKNOWN else route.state.name
        return f"waits for its actor ({state})"

    def _hosted_call(self, hosted: Hosted, task: TaskRecord) -> str:
        here = f"on rank {self._rank}"
        worker = self._tables.workers.get(hosted.worker)
        process = "" if worker is None else f" ({self._process(worker)})"
        if not hosted.alive:
            return f"waits for its actor's constructor, which runs {here}{process}"
        for place, task_id in enumerate(hosted.in_flight):
            if task_id == task.task_id:
                ahead = place - hosted.template.max_concurrency + 1
                if ahead <= 0 or hosted.template.is_async or hosted.template.groups:
                    return f"RUNNING {here}{process}"
                return f"QUEUED {here} behind {ahead} other call{'s'[:ahead > 1]}{process}"
        ahead = len(hosted.in_flight) + next(
            (n for n, other in enumerate(islice(hosted.calls, 1000)) if other is task), 0)
        return f"QUEUED {here} behind {ahead} other call{'s'[:ahead != 1]}{process}"

    def _process(self, worker: Worker) -> str:
        text = f"pid {worker.pid}"
        if worker.pid and self.process_state(worker.pid) == "T":
            text += ", which is stopped by a signal"
        elif worker.blocked:
            text += ", which waits in get()"
        return text

    # --- resources --------------------------------------------------------------------------------

    def lacking(self, shape: Shape) -> Shape:
        """What of a shape is not free here now."""
        free = self._dispatcher.ledger.free
        return tuple((name, value) for name, value in shape
                     if not labels.is_condition(name) and free.get(name, 0) < value)

    def held_by(self, shape: Shape) -> str:
        """` (held by actor A x2 and task f)`: who has what of these resources here."""
        holders = self.holders({name for name, _ in shape})
        return f" (held by {words.counted(holders)})" if holders else ""

    def holders(self, names: set[str]) -> list[str]:
        found = []
        for worker in self._tables.workers.values():
            if any(name in names and not (worker.blocked and name.startswith("CPU"))
                   for name, _ in worker.shape):
                found.append(self.who(worker))
        return found + self.groups_with(names)

    def groups_with(self, names: set[str]) -> list[str]:
        """Placement groups that hold some of these resources here."""
        return ["a placement group" for bundles in self._bundles.held.values()
                if any(name in names for _, shape, _ in bundles for name, _ in shape)]

    def who(self, worker: Worker) -> str:
        """What a worker is for."""
        hosted = self._tables.hosted.get(worker.actor_id)
        if hosted is not None:
            return f"actor {plain(class_name(hosted.template))}"
        if worker.datagrams:
            return name_of(worker.datagrams[0][0].template)
        return "a worker that ends"


def name_of(template: Template) -> str:
    """A task, call or actor as its user knows it."""
    if template.kind == ACTOR_CREATION:
        return f"actor {plain(class_name(template))}"
    return f"{'call' if template.kind == METHOD else 'task'} {plain(template.name)}"


def plain(name: str) -> str:
    return name.removeprefix("__main__.")
