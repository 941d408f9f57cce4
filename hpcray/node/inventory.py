"""What there is, told to people: this node's tasks, objects, actors and workers as rows. Pure.

    client --Request "state"--> its node --PeerRequest "state"--> every other node
           <--Rows*, Reply------         <--PeerRows*, PeerReply--

A question names columns, filters and a limit, or asks to count rows by their columns. Every node
answers from the records it works with, `SLICE` records a turn, so that a question about a million
tasks delays nobody; it ends early when the limit is reached. Whoever asks pays: nothing is kept
for the sake of questions but a few thousand last things that are over, gathered off the hot path:

    tasks      the last failed ones, and of the others a sample: those the journal was given as
               lineage (every one up to 2,560 a second). Counts by function are exact.
    actors     the last dead ones            workers    the last that ended, and why

A task bound to another node is known at both: its home says SUBMITTED_TO_WORKER, and the executor
what it knows better. Rows carry the id first, so the asker makes one of two (`util/state`). In a
count the executor takes back one of the home's. A filter on where a task is or in which state is
the executor's to answer: a task on its way there is missed for that moment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, NamedTuple

from hpcray.node.actor_records import ActorHome, class_name
from hpcray.node.actor_states import ActorState
from hpcray.node.directory import Directory
from hpcray.node.outbox import Outbox
from hpcray.node.placement import MEMBER
from hpcray.node.records import (
    DRIVER,
    ClientRecord,
    ObjectRecord,
    TaskRecord,
    Worker,
    WorkerState,
    in_store,
)
from hpcray.node.states import move
from hpcray.node.tables import Forward, Tables, unwired
from hpcray.node.task_states import (
    ASSIGNED,
    FAILED,
    FETCHING,
    FINISHED,
    QUEUED,
    RUNNING,
    TOLD,
    WAITING,
)
from hpcray.node.tasks import Tasks
from hpcray.protocol import ids, labels, values
from hpcray.protocol.messages import (
    ACTOR_CREATION,
    METHOD,
    TASK,
    UNIT,
    PeerReply,
    PeerRows,
    Reply,
    Request,
    Rows,
    Template,
)
from hpcray.protocol.sizes import ROWS_BYTES

# Records looked at per turn: under 1 ms. What runs meanwhile takes a few turns for a round trip.
SLICE = 500
# Things that are over and still told of, of each kind.
KEPT = 1000
# An error larger than this is not kept: its ref has it.
_ERROR_BYTES = 8 * 1024

Row = list[Any]
Sources = list[Iterable[Any]]
Column = Callable[[Any, Any], Any]

_TYPES = {TASK: "NORMAL_TASK", ACTOR_CREATION: "ACTOR_CREATION_TASK", METHOD: "ACTOR_TASK"}
_ERROR_TYPES = {
    "ActorDiedError": "ACTOR_DIED", "ActorUnavailableError": "ACTOR_UNAVAILABLE",
    "TaskCancelledError": "TASK_CANCELLED", "WorkerCrashedError": "WORKER_DIED",
    "TaskUnschedulableError": "TASK_UNSCHEDULABLE_ERROR", "OutOfMemoryError": "OUT_OF_MEMORY",
    "ObjectLostError": "OBJECT_LOST",
}
# What only the executor of a task knows.
_OF_EXECUTOR = {"state", "node_id", "worker_id", "worker_pid", "start_time_ms"}


class WorkerFacts(NamedTuple):
    """A process of this node, alive or not."""

    number: int
    pid: int
    exit_type: str | None = None
    exit_detail: str | None = None


class Question:
    """One question, while this node looks for the answer."""

    def __init__(
        self, query: dict[str, Any], sources: Sources,
        send: Callable[[list[Row]], None], end: Callable[[], None],
    ) -> None:
        self.what: str = query["what"]
        columns = COLUMNS[self.what]
        names = query["columns"]
        self.columns = [columns.get(name, _unknown) for name in names]
        self.filters = [
            (columns.get(name, _unknown), predicate == "=", text)
            for name, predicate, text in query["filters"]
        ]
        self.asks_executor = any(name in _OF_EXECUTOR for name, _, _ in query["filters"])
        self.counting: bool = query.get("count", False)
        self.state_at = names.index("state") if "state" in names else -1
        self.sum = columns.get(query.get("sum", ""))
        self.counts: dict[tuple[Any, ...], list[int]] = {}
        self.left: int = query["limit"]
        self.sources = [iter(source) for source in sources]
        self.rows: list[Row] = []
        self.nbytes = 0
        self.send = send
        self.end = end


class Gather:
    """A client's question, while nodes answer."""

    def __init__(self, client: int, request: int, limit: int, waiting: int) -> None:
        self.client = client
        self.request = request
        self.limit = limit
        self.waiting = waiting
        self.seen: set[Any] = set()


class Inventory:
    def __init__(
        self, tables: Tables, outbox: Outbox, directory: Directory, tasks: Tasks
    ) -> None:
        self._tables = tables
        self._outbox = outbox
        self._directory = directory
        self._home_tasks = tasks
        self._rank = tables.rank
        # Port: ask another node (rank, request, arguments, who hears the answer).
        self.forward: Forward = unwired
        self.questions: deque[Question] = deque()
        self._gathers: dict[int, Gather] = {}
        # Tasks this home was given lately, and those of its tasks that failed: oldest first.
        self._remembered: dict[bytes, bytes] = {}
        self._failed: dict[bytes, tuple[TaskRecord, bytes]] = {}
        self._failed_since: set[bytes] = set()
        self.failed_counts: dict[bytes, int] = {}
        # Of templates that are forgotten, by function: one of them, runs that ended well, failures.
        self._forgotten: dict[bytes, tuple[Template, int, int]] = {}
        self.dead_actors: deque[ActorHome] = deque(maxlen=KEPT)
        self.gone_workers: deque[WorkerFacts] = deque(maxlen=KEPT)
        # Of one turn: calls that run, by actor; running tasks, by the prefix of their children.
        self._running_calls: dict[bytes, set[bytes]] = {}
        self._parents: dict[bytes, bytes] | None = None

    # --- what is over -----------------------------------------------------------------------------

    def remember(self, lineage: list[tuple[bytes, bytes, bytes]]) -> None:
        """Tasks submitted since the last time, as the journal takes them."""
        remembered = self._remembered
        if len(self._failed_since) < KEPT:  # else some of these may have failed and be forgotten
            for task_id, template_id, _ in lineage:
                if task_id not in self._failed_since:
                    remembered[task_id] = template_id
        self._failed_since.clear()
        for task_id in list(islice(remembered, max(len(remembered) - KEPT, 0))):
            del remembered[task_id]

    def failed(self, task: TaskRecord, error: bytes) -> None:
        """A task of this home has failed for good."""
        template_id = task.template.template_id
        self.failed_counts[template_id] = self.failed_counts.get(template_id, 0) + 1
        task.args = b""
        task.values = None
        if len(error) > _ERROR_BYTES:
            error = error[:1]
        self._failed[task.task_id] = (task, error)
        self._remembered.pop(task.task_id, None)
        if len(self._failed_since) < KEPT:
            self._failed_since.add(task.task_id)
        if len(self._failed) > KEPT:
            del self._failed[next(iter(self._failed))]

    def actor_forgotten(self, home: ActorHome) -> None:
        home.args = home.refs = home.handle = b""
        self.dead_actors.append(home)

    def worker_gone(self, worker: Worker, failure: values.Failure) -> None:
        hosted = self._tables.hosted.get(worker.actor_id)
        intended = worker.state is WorkerState.STOPPING or (
            hosted is not None and hosted.intended is not None)
        exit_type = "INTENDED_SYSTEM_EXIT" if intended else "SYSTEM_ERROR"
        self.gone_workers.append(
            WorkerFacts(worker.number, worker.pid, exit_type, failure.message))

    # --- asking everybody -------------------------------------------------------------------------

    def asked(self, client: int, message: Request) -> None:
        """A client's question: ask every node, this one too."""
        query = message.arguments
        error = _check(query)
        if error is not None:
            self._outbox.clients[client].append(Reply(message.request, None, error))
            return
        gather = Gather(client, message.request, query["limit"], self._tables.size)
        for rank in range(self._tables.size):
            if rank != self._rank:
                number = self.forward(
                    rank, "state", query, lambda _: self._answered(gather))
                self._gathers[number] = gather
        self._begin(query, lambda rows: self._pass_on(gather, rows),
                    lambda: self._answered(gather))

    def _pass_on(self, gather: Gather, rows: list[Row]) -> None:
        if gather.client not in self._tables.clients:
            return
        seen = gather.seen
        if len(seen) + len(rows) > gather.limit:
            kept = []
            for row in rows:
                if row[0] in seen or len(seen) < gather.limit:
                    seen.add(row[0])
                    kept.append(row)
            rows = kept
        else:
            seen.update([row[0] for row in rows])
        if rows:
            self._outbox.clients[gather.client].append(Rows(gather.request, rows))

    def _answered(self, gather: Gather) -> None:
        gather.waiting -= 1
        if gather.waiting == 0:
            for number in [n for n, g in self._gathers.items() if g is gather]:
                del self._gathers[number]
            if gather.client in self._tables.clients:
                self._outbox.clients[gather.client].append(Reply(gather.request))

    def peer_asked(self, rank: int, number: int, query: dict[str, Any]) -> None:
        error = _check(query)
        if error is not None:
            self._outbox.peers[rank].append(PeerReply(number, None, error))
            return
        peers = self._outbox.peers
        self._begin(query, lambda rows: peers[rank].append(PeerRows(number, rows)),
                    lambda: peers[rank].append(PeerReply(number)))

    def peer_rows(self, message: PeerRows) -> None:
        gather = self._gathers.get(message.request)
        if gather is not None:
            self._pass_on(gather, message.rows)

    # --- answering --------------------------------------------------------------------------------

    def _begin(
        self, query: dict[str, Any], send: Callable[[list[Row]], None], end: Callable[[], None],
    ) -> None:
        question = Question(query, _SOURCES[query["what"]](self, query), send, end)
        if question.counting and question.what == "tasks":
            self._count_finished(question, query["columns"])
        self.questions.append(question)

    def end_turn(self) -> None:
        """Look at one slice of what is asked for; the loop comes back while there is more."""
        if not self.questions:
            return
        question = self.questions.popleft()
        self._running_calls.clear()
        self._parents = None
        if self._look(question):
            self.questions.append(question)  # behind the others: all get on
        else:
            self._finish(question)

    def _look(self, question: Question) -> bool:
        """One slice; whether there may be more."""
        room = SLICE
        while question.sources and question.left > 0:
            source = question.sources[0]
            count = 0
            for record in islice(source, room):
                count += 1
                if record is not None and self._matches(question, record):
                    self._take(question, record)
                    if question.left <= 0:
                        return False
            room -= count
            if room <= 0:
                return True
            question.sources.pop(0)
        return False

    def _matches(self, question: Question, record: Any) -> bool:
        if question.asks_executor and question.what == "tasks" and self._is_elsewhere(record):
            return False
        if question.what == "tasks" and not record.template.events:
            return False
        return all((_text(column(self, record)) == text) is equal
                   for column, equal, text in question.filters)

    def _take(self, question: Question, record: Any) -> None:
        row = [column(self, record) for column in question.columns]
        if question.counting:
            nbytes = 0 if question.sum is None else max(question.sum(self, record), 0)
            _count(question, row, 1, nbytes)
            if question.what == "tasks" and record.home != self._rank:
                row[question.state_at] = "SUBMITTED_TO_WORKER"
                _count(question, row, -1, 0)
            return
        question.left -= 1
        self._give(question, row)

    def _give(self, question: Question, row: Row) -> None:
        question.rows.append(row)
        question.nbytes += 16 * len(row) + sum(
            len(value) for value in row if type(value) is str or type(value) is bytes)
        if question.nbytes > ROWS_BYTES:
            self._send(question)

    @staticmethod
    def _send(question: Question) -> None:
        if question.rows:
            question.send(question.rows)
            question.rows = []
            question.nbytes = 0

    def _finish(self, question: Question) -> None:
        for group, (count, nbytes) in question.counts.items():
            # Counts are told apart by who counted: every node's row is one of its own.
            self._give(question, [f"{self._rank} {group}", *group, count, nbytes])
        self._send(question)
        question.end()

    def _count_finished(self, question: Question, names: list[str]) -> None:
        """Successful runs here, and failures of this home's tasks, by function."""
        counted = [self._counted(template) for template in self._tables.templates.values()]
        for template, finished, failed in (*counted, *self._forgotten.values()):
            if not template.events:
                continue
            for state, number in (("FINISHED", finished), ("FAILED", failed)):
                if number > 0:
                    record = _ended(template.template_id, template, self._rank)
                    row = [column(self, record) for column in question.columns]
                    row[names.index("state")] = state
                    _count(question, row, number, 0)

    def _counted(self, template: Template) -> tuple[Template, int, int]:
        """Runs here that ended well, and failures of this home's tasks."""
        known = self._tables.statistics[template.template_id]
        return (template, known.count - known.told - known.raised,
                self.failed_counts.get(template.template_id, 0))

    def template_gone(self, template: Template) -> None:
        """It is forgotten here, but what was counted of it is not."""
        _, finished, failed = self._counted(template)
        self.failed_counts.pop(template.template_id, None)
        shown, finished_before, failed_before = self._forgotten.get(
            template.function_id, (template, 0, 0))
        self._forgotten[template.function_id] = (
            shown, finished_before + finished, failed_before + failed)

    def asked_for(self) -> list[bytes]:
        """Templates of tasks that are over and can be listed."""
        return [*self._remembered.values(),
                *(task.template.template_id for task, _ in self._failed.values()),
                *(template_id for _, template_id, _ in self._home_tasks.lineage)]

    # --- sources: where records come from ---------------------------------------------------------

    def _tasks(self, query: dict[str, Any]) -> Sources:
        live = self._live(self._tables.tasks, query, "task_id")
        if query.get("count"):
            return [live]  # what is over is counted by function
        return [live, self._over()]

    def _over(self) -> Iterable[TaskRecord]:
        yield from [task for task, _ in self._failed.values()]
        lately = dict(self._remembered)
        if len(self._failed_since) < KEPT:
            lately.update((t, template) for t, template, _ in self._home_tasks.lineage)
        for task_id, template_id in lately.items():
            if task_id not in self._tables.tasks and task_id not in self._failed:
                yield _ended(task_id, self._tables.templates[template_id], self._rank)

    def _objects(self, query: dict[str, Any]) -> Sources:
        live = self._live(self._tables.objects, query, "object_id")
        return [_homed(live, self._directory.is_home)]

    def _actors(self, query: dict[str, Any]) -> Sources:
        live = self._live(self._tables.homes, query, "actor_id")
        return [live, list(self.dead_actors)]

    def _workers(self, _: dict[str, Any]) -> Sources:
        found = [WorkerFacts(worker.number, worker.pid)
                 for worker in self._tables.workers.values() if worker.pid]
        if DRIVER in self._tables.clients:
            found.append(WorkerFacts(DRIVER, self._tables.clients[DRIVER].pid))
        return [found, list(self.gone_workers)]

    @staticmethod
    def _live(
        records: dict[bytes, Any], query: dict[str, Any], key: str
    ) -> Iterable[Any]:
        """Records, looked up when their turn comes: one that is gone by then is None."""
        for name, predicate, text in query["filters"]:
            if name == key and predicate == "=":
                try:
                    yield records.get(bytes.fromhex(text))
                except ValueError:
                    pass
                return
        if key == "task_id" and not query["filters"] and not query.get("count"):
            yield from list(islice(records.values(), query["limit"]))  # every record is a row
            return
        # 15 ns each: the one thing here that grows with the number of records.
        rest = list(records)
        while rest:
            yield records.get(rest.pop())

    # --- columns: tasks ---------------------------------------------------------------------------

    def _is_elsewhere(self, task: TaskRecord) -> bool:
        return task.state is ASSIGNED and task.rank not in (-1, self._rank)

    def task_state(self, task: TaskRecord) -> str:
        state = task.state
        if state == RUNNING and self._is_running(task):
            return "RUNNING"
        if task.template.kind == METHOD and (
            state == RUNNING or (state == ASSIGNED and task.rank == self._rank)
            or (state == WAITING and task.home != self._rank)
        ):
            return "PENDING_ACTOR_TASK_ORDERING_OR_CONCURRENCY"  # in its actor's queue
        return "SUBMITTED_TO_WORKER" if state == RUNNING else _STATES[state]

    def _is_running(self, task: TaskRecord) -> bool:
        """Whether it runs, and does not lie unread at its worker."""
        if task.template.kind != METHOD:
            worker = self._tables.workers.get(task.worker)
            datagrams = None if worker is None else worker.datagrams
            return bool(datagrams and datagrams[0][0] is task)
        running = self._running_calls.get(task.actor_id)
        if running is None:
            hosted = self._tables.hosted.get(task.actor_id)
            running = set() if hosted is None else set(
                islice(hosted.in_flight, hosted.template.max_concurrency))
            self._running_calls[task.actor_id] = running
        return task.task_id in running

    def task_rank(self, task: TaskRecord) -> int | None:
        if task.state in (RUNNING, FETCHING) or task.home != self._rank:
            return self._rank
        if task.rank >= 0 and task.state in (ASSIGNED, FAILED):
            return task.rank
        return self._rank if task.worker >= 0 else None

    def task_parent(self, task: TaskRecord) -> str | None:
        if task.home != self._rank or task.client < 0:
            return None
        if task.client == 0:
            return ids.driver_task_id(self._rank, self._tables.job_id).hex()
        if self._parents is None:
            running = [worker.datagrams[0][0]
                       for worker in self._tables.workers.values()
                       if worker.datagrams]
            for hosted in self._tables.hosted.values():
                running += hosted.in_flight.values()
            self._parents = {ids.task_prefix(t.task_id, t.attempt): t.task_id for t in running}
        parent = self._parents.get(task.task_id[:12])
        return None if parent is None else parent.hex()

    def task_error(self, task: TaskRecord) -> tuple[str | None, Any]:
        """(Ray's name for it, the message or the pickled exception)."""
        if task.state is not FAILED:
            return None, None
        _, error = self._failed.get(task.task_id, (task, b""))
        if not error or error[0] != values.FAILURE:
            return "TASK_EXECUTION_EXCEPTION", error if len(error) > 1 else None
        if len(error) == 1:
            return None, None
        failure = values.unpack_failure(error)
        return _ERROR_TYPES.get(failure.kind, failure.kind), failure.message

    def task_age_ms(self, task: TaskRecord) -> float | None:
        """How long it has been running; a datagram's first task is known to the millisecond."""
        if task.state is not RUNNING or task.template.kind == METHOD or not self._is_running(task):
            return None
        worker = self._tables.workers[task.worker]
        return (self._tables.now_s - worker.sent_s) * 1000

    # --- columns: the others ----------------------------------------------------------------------

    def node_id(self, rank: int | None) -> str | None:
        key = self._tables.session.get("job_key")
        return None if rank is None or rank < 0 or not key else ids.node_id_hex(rank, key)

    def address(self) -> str | None:
        node = self._tables.nodes.get(self._rank)
        return None if node is None else node.address

    def worker_id(self, number: int) -> str | None:
        return None if number < 0 else ids.worker_id_hex(self._tables.job_id, self._rank, number)

    def worker_pid(self, number: int) -> int | None:
        worker = self._tables.workers.get(number)
        return None if worker is None else worker.pid

    def actor_state(self, home: ActorHome) -> str:
        if home.state is not ActorState.PENDING:
            return home.state.name
        task = self._tables.tasks.get(ids.creation_task_id(home.actor_id))
        return ("DEPENDENCIES_UNREADY" if task is not None and task.state is WAITING
                else "PENDING_CREATION")

    def actor_pid(self, home: ActorHome) -> int | None:
        return home.pid or None if home.state is ActorState.ALIVE else None

    def object_holder(self, record: ObjectRecord) -> ClientRecord | None:
        """A process here that holds a ref to it."""
        return next((client for client in self._tables.clients.values()
                     if record.object_id in client.held), None)

    def object_status(self, record: ObjectRecord) -> str:
        task = self._tables.tasks.get(ids.task_of_object(record.object_id))
        if task is not None:
            return self.task_state(task)
        if ids.is_creation_object(record.object_id):
            return "NIL"
        if record.value is not None:
            return "FAILED" if values.is_error(record.value) else "FINISHED"
        # Of what lies in shared memory nobody here has read the first byte.
        failed = ids.task_of_object(record.object_id) in self._failed
        return "FAILED" if failed else "FINISHED"

    def object_attempt(self, record: ObjectRecord) -> int:
        task = self._tables.tasks.get(ids.task_of_object(record.object_id))
        return 1 if task is None else task.attempt + 1

    def object_reference(self, record: ObjectRecord) -> str:
        if ids.is_creation_object(record.object_id):
            return "ACTOR_HANDLE"
        if record.pins:
            return "PINNED_IN_MEMORY"
        extra = record.extra
        if extra is not None and extra.dependents:
            return "USED_BY_PENDING_TASK"
        if self.object_holder(record) is not None or (extra is not None and extra.holders):
            return "LOCAL_REFERENCE"
        return "USED_BY_PENDING_TASK"

    # --- objects: where they are ------------------------------------------------------------------

    def locations(self, arguments: dict[str, Any]) -> list[tuple[list[int], int | None] | None]:
        """For each object: (ranks that have it in shared memory, bytes); None: it is gone.

        Of an object of another home this node knows what it was told.
        """
        found: list[tuple[list[int], int | None] | None] = []
        for object_id in ids.split_ids(arguments["ids"]):
            record = self._tables.objects.get(object_id)
            if record is None:
                found.append(None)
                continue
            extra = record.extra
            copies = set() if extra is None else {*(extra.copies or extra.sources)}
            if in_store(record):
                copies.add(self._rank)
            nbytes = object_bytes(record)
            found.append((sorted(copies), None if nbytes < 0 else nbytes))
        return found


def object_bytes(record: ObjectRecord) -> int:
    """-1 if it is not known (yet)."""
    if record.value is not None:
        return len(record.value)
    return record.nbytes or -1


def _ended(task_id: bytes, template: Template, rank: int) -> TaskRecord:
    task = TaskRecord(task_id, template, b"", b"", 0, rank, -1)
    move(task, TOLD)
    if template.kind != TASK and len(task_id) == ids.TASK_ID_BYTES:
        task.actor_id = ids.actor_of_task(task_id) if template.kind == ACTOR_CREATION else b""
    return task


def _homed(records: Iterable[Any], is_home: Callable[[bytes], bool]) -> Iterable[Any]:
    for record in records:
        yield record if record is not None and is_home(record.object_id) else None


def _count(question: Question, row: Row, count: int, nbytes: int) -> None:
    entry = question.counts.setdefault(tuple(row), [0, 0])
    entry[0] += count
    entry[1] += nbytes


def _text(value: Any) -> str:
    return str(value).lower()


def _unknown(_inventory: Any, _record: Any) -> Any:
    return None


def _check(query: dict[str, Any]) -> values.Failure | None:
    if query["what"] in COLUMNS:
        return None
    return values.Failure("ValueError", f"a node keeps no list of {query['what']!r}")


_STATES = {
    WAITING: "PENDING_ARGS_AVAIL", QUEUED: "PENDING_NODE_ASSIGNMENT",
    FETCHING: "PENDING_ARGS_FETCH", ASSIGNED: "SUBMITTED_TO_WORKER", FINISHED: "FINISHED",
    FAILED: "FAILED",
}

# What a column of a row is, from the record. Names are Ray's; the others (`None` everywhere) are
# left to the asker.
COLUMNS: dict[str, dict[str, Column]] = {
    "tasks": {
        "task_id": lambda _, t: t.task_id.hex(),
        "attempt_number": lambda _, t: t.attempt,
        "name": lambda _, t: t.template.name,
        "state": Inventory.task_state,
        "job_id": lambda i, _: i._tables.job_id.hex(),
        "actor_id": lambda _, t: t.actor_id.hex() or None,
        "type": lambda _, t: _TYPES[t.template.kind],
        "func_or_class_name": lambda _, t: t.template.function_name or t.template.name,
        "parent_task_id": Inventory.task_parent,
        "node_id": lambda i, t: i.node_id(i.task_rank(t)),
        "worker_id": lambda i, t: i.worker_id(t.worker),
        "worker_pid": lambda i, t: i.worker_pid(t.worker),
        "error_type": lambda i, t: i.task_error(t)[0],
        "language": lambda _i, _t: "PYTHON",
        "required_resources": lambda _, t: _amounts(t.template.resources),
        "placement_group_id": lambda _, t: t.template.group_id.hex() or None,
        "runtime_env_info": lambda _, t: (
            {"env_vars": dict(t.template.env_vars)} if t.template.env_vars else None),
        "start_time_ms": Inventory.task_age_ms,
        "error_message": lambda i, t: i.task_error(t)[1],
    },
    "actors": {
        "actor_id": lambda _, a: a.actor_id.hex(),
        "class_name": lambda _, a: class_name(a.template),
        "state": Inventory.actor_state,
        "job_id": lambda i, _: i._tables.job_id.hex(),
        "name": lambda _, a: a.name,
        "node_id": lambda i, a: i.node_id(a.rank),
        "pid": Inventory.actor_pid,
        "ray_namespace": lambda _, a: a.namespace,
        "required_resources": lambda _, a: _amounts(
            a.template.resources if a.template.held_resources is None
            else a.template.held_resources),
        "death_cause": lambda _, a: (
            {"actor_died_error_context": {"error_message": a.failure.message}}
            if a.failure is not None else None),
        "placement_group_id": lambda _, a: a.template.group_id.hex() or None,
        "is_detached": lambda _, a: a.detached,
        "repr_name": lambda _i, _a: "",
        "num_restarts": lambda _, a: a.incarnation,
    },
    "objects": {
        "object_id": lambda _, o: o.object_id.hex(),
        "object_size": lambda _, o: object_bytes(o),
        "task_status": Inventory.object_status,
        "attempt_number": Inventory.object_attempt,
        "reference_type": Inventory.object_reference,
        "call_site": lambda _i, _o: "disabled",
        "type": lambda i, o: (
            None if (holder := i.object_holder(o)) is None
            else "WORKER" if holder.number else "DRIVER"),
        "pid": lambda i, o: (
            None if (holder := i.object_holder(o)) is None else holder.pid),
        "ip": lambda i, _: i.address(),
        "node_id": lambda i, _: i.node_id(i._rank),
    },
    "workers": {
        "worker_id": lambda i, w: i.worker_id(w.number),
        "is_alive": lambda _, w: w.exit_type is None,
        "worker_type": lambda _, w: "WORKER" if w.number else "DRIVER",
        "exit_type": lambda _, w: w.exit_type,
        "node_id": lambda i, _: i.node_id(i._rank),
        "ip": lambda i, _: i.address(),
        "pid": lambda _, w: w.pid,
        "exit_detail": lambda _, w: w.exit_detail,
    },
}
_SOURCES: dict[str, Callable[[Inventory, dict[str, Any]], Sources]] = {
    "tasks": Inventory._tasks,
    "actors": Inventory._actors,
    "objects": Inventory._objects,
    "workers": Inventory._workers,
}


def _amounts(shape: Any) -> dict[str, float]:
    """Under the names the user gave: those of a bundle are `CPU@<group>`, `CPU@<group>:<index>`."""
    found = {name.partition("@")[0]: amount / UNIT for name, amount in shape
             if not labels.is_condition(name)}
    found.pop(MEMBER, None)
    return found
