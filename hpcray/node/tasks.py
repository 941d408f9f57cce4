"""Tasks at their home: from submission to result, and what runs here for other homes. Pure.

The home keeps a task's record until its result, and only the home assigns it. It is bound as
late as possible: to this node by the dispatcher, to another by a grant of the global scheduler
(`node/cluster.py`), to an actor by its route (`node/actors.py`). Every assignment has its own
attempt number; outcomes of another attempt are dropped.

    WAITING   some dependency is not ready
                its dependencies exist --> QUEUED
                its outcome is an error --> FAILED
                it is sent to its actor --> ASSIGNED
                its caller hands it to the actor's worker itself --> RUNNING
                people ask for it --> FINISHED
    QUEUED    unbound in a queue of its home, or in the executor's
                it is bound to another rank --> ASSIGNED
                its outcome is an error --> FAILED
                it is sent to its actor --> ASSIGNED
                it needs what is not here --> FETCHING
                it is given to a worker --> RUNNING
    FETCHING  bound to this node; dependencies are on their way
                its executor gave it back, not started --> QUEUED
                its outcome is an error --> FAILED
                all it needs is here --> QUEUED
                all that the call needs is here --> ASSIGNED
    ASSIGNED  bound to another rank or to an actor; at the executor: it has just come
                its executor gave it back, not started --> QUEUED
                its attempt failed, and it has another --> QUEUED
                its outcome is an error --> FAILED
                its home has bound it to this node --> QUEUED
                it needs what is not here --> FETCHING
                it is given to a worker --> RUNNING
    RUNNING   sent to a worker of this node
                its attempt failed, and it has another --> QUEUED
                its outcome is an error --> FAILED
                its caller could not hand it over --> ASSIGNED
                its worker had not read it --> QUEUED
    FINISHED  it has a value, and its record is gone: this one tells of it
    FAILED    its outcome is an error; its record tells of it

Invariants, checked by `validate`:

TK-1  a task is in `records` exactly until its outcome is delivered (home) or reported (executor).
TK-2  its record's count on every ref it names is one, for as long as it is in `records`.
TK-3  `guests` are the records of other homes' tasks; calls are none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from hpcray.node.directory import Directory
from hpcray.node.memory import NodeMemory
from hpcray.node.outbox import Introduce, IntroduceActor, KillWorker, Outbox
from hpcray.node.records import (
    PENDING,
    ClientRecord,
    ObjectRecord,
    TaskRecord,
    TemplateStatistics,
    is_here,
)
from hpcray.node.states import move
from hpcray.node.streams import Streams
from hpcray.node.tables import Tables, unwired
from hpcray.node.task_states import (
    ARRIVED,
    ASSIGN,
    ASSIGNED,
    BOUND,
    FETCH,
    FETCHING,
    QUEUED,
    READY,
    RETRY,
    RETURNED,
    RUN,
    RUNNING,
    TAKEN_BACK,
    WAITING,
)
from hpcray.protocol import ids, values
from hpcray.protocol.messages import (
    ACTOR_CREATION,
    METHOD,
    STREAM,
    WAIT,
    Assign,
    CancelTask,
    Done,
    DoneMany,
    Failed,
    HandedOver,
    Located,
    PeerReturn,
    RecallTask,
    Remote,
    Return,
    Run,
    SubmitTask,
    TaskCrashed,
    TaskDone,
    TaskDoneMany,
    TaskFailed,
    TaskReturned,
    Template,
    TemplateDef,
)
from hpcray.protocol.sizes import gathers

# Lineage kept per flush: at more than this the control store gets a sample.
_LINEAGE_PER_FLUSH = 256


class ErrorAt(NamedTuple):
    """A large error in the shared memory of another node."""

    rank: int
    nbytes: int


class Tasks:
    def __init__(
        self, tables: Tables, outbox: Outbox, memory: NodeMemory, directory: Directory,
        streams: Streams,
    ) -> None:
        self._outbox = outbox
        self._rank = tables.rank
        self._several = tables.size > 1
        self._clients = tables.clients
        self._objects = tables.objects
        self.records = tables.tasks
        self.templates = tables.templates
        self.statistics = tables.statistics
        self._memory = memory
        self._directory = directory
        self._streams = streams
        # Ports. Of the workers here: queue a task for them; all that it needs has come; a run of
        # theirs is over; is there one free now?
        self.enqueue: Callable[..., None] = unwired
        self.fetched: Callable[[TaskRecord], None] = unwired
        self.run_over: Callable[[TaskRecord], None] = unwired
        self.has_room: Callable[[Template], bool] = unwired
        # Of the other nodes: resources that a template names; a task of theirs has come.
        self.learn: Callable[[Any], None] = unwired
        self.work_came: Callable[[Template], None] = unwired
        # Bind a task to the node it asks for; in turn; to where its inputs are. Whether it is.
        self.place_at: Callable[[TaskRecord], bool] = unwired
        self.deal: Callable[[TaskRecord], bool] = unwired
        self.place_elsewhere: Callable[[TaskRecord], bool] = unwired
        self.place_actor: Callable[[TaskRecord], None] = unwired
        # A task is over there; came back from there; came back from the only node it may run on.
        self.over_elsewhere: Callable[[int, TaskRecord], None] = unwired
        self.back_from: Callable[[int, TaskRecord], None] = unwired
        self.unavailable: Callable[[TaskRecord], bool] = unwired
        # Of actors, at the home of a call: it is ready; came back; is to run again after it raised,
        # after a crash; will never run; is over.
        self.call_ready: Callable[[TaskRecord], None] = unwired
        self.call_returned: Callable[[TaskRecord], None] = unwired
        self.call_again: Callable[[TaskRecord], None] = unwired
        self.resend: Callable[[TaskRecord], None] = unwired
        self.call_cancelled: Callable[[TaskRecord], None] = unwired
        self.call_over: Callable[[TaskRecord], None] = unwired
        # At the actor's host: all that a call needs has come; a call, or the creation, is over; the
        # constructor raised. At its home: it raised, or its worker is gone.
        self.call_fetched: Callable[[TaskRecord], None] = unwired
        self.call_run_over: Callable[[TaskRecord], None] = unwired
        self.creation_failed: Callable[[TaskRecord, bytes], None] = unwired
        self.creation_failed_at_home: Callable[[TaskRecord, bytes], None] = unwired
        self.creation_crashed: Callable[..., None] = unwired
        # Of placement groups: why tasks of a removed one die; fail a task if its group is removed.
        self.reason_of_group: Callable[[Template], values.Failure | None] = unwired
        self.refuse_of_group: Callable[[TaskRecord], bool] = unwired
        # A task of this home has failed for good.
        self.failed_for_good: Callable[[TaskRecord, bytes], None] = unwired
        # Templates each peer knows already.
        self._told: dict[int, set[bytes]] = {}
        # (task, template, refs) of new tasks, for the control store.
        self.lineage: list[tuple[bytes, bytes, bytes]] = []
        # Of these, what other homes have bound to this node, but for calls of its actors (TK-3).
        self.guests: dict[bytes, TaskRecord] = {}
        self.submitted = 0
        self.finished = 0

    # --- submission -------------------------------------------------------------------------------

    def define(self, template: Template) -> None:
        if template.template_id not in self.templates:
            self.learn(template.resources)
            self.templates[template.template_id] = template
            self.statistics[template.template_id] = TemplateStatistics()

    def submit(self, client: ClientRecord, message: SubmitTask) -> None:
        template = self.templates[message.template_id]
        task = TaskRecord(
            message.task_id, template, message.args, message.refs, message.dep_count,
            self._rank, client.number,
        )
        task.retries_left = template.max_retries
        self._register(client, task)
        if task.missing == 0:
            self.ready(task)

    def register_call(
        self, client: ClientRecord, message: Any, template: Template
    ) -> TaskRecord:
        """An actor call: a task whose route, not the scheduler, binds it."""
        task = TaskRecord(
            message.task_id, template, message.args, message.refs, message.dep_count,
            self._rank, client.number,
        )
        task.retries_left = template.max_retries
        task.actor_id = message.actor_id
        self._register(client, task)
        return task

    def _register(self, client: ClientRecord, task: TaskRecord) -> None:
        task_id = task.task_id
        template = task.template
        self.records[task_id] = task
        self.submitted += 1
        count = template.return_count
        directory = self._directory
        if count == 1:
            object_id = task_id + ids.FIRST_RETURN
            directory.created(object_id)
            client.held.add(object_id)
        else:
            for index in range(count):
                object_id = ids.return_id(task_id, index)
                directory.created(object_id)
                client.held.add(object_id)
        if task.refs:
            self.hold_arguments(task)
        lineage = self.lineage
        if len(lineage) < _LINEAGE_PER_FLUSH:
            lineage.append((task_id, template.template_id, task.refs))

    def hold_arguments(self, task: TaskRecord) -> None:
        directory = self._directory
        dep_count = task.dep_count
        for index, object_id in enumerate(ids.split_ids(task.refs)):
            record = directory.hold(object_id)
            if index < dep_count and record.state == PENDING:
                task.missing += 1
                self._depend(task, record)
                directory.want(record)

    @staticmethod
    def _depend(task: TaskRecord, record: ObjectRecord) -> None:
        extra = record.more()
        if extra.dependents is None:
            extra.dependents = []
        extra.dependents.append(task)

    def restart(self, task: TaskRecord) -> None:
        """An actor's constructor runs again: nobody submits it, and nobody holds its return."""
        self.records[task.task_id] = task
        if task.refs:
            self.hold_arguments(task)
        if task.missing == 0:
            self.ready(task)

    def drop(self, task: TaskRecord) -> None:
        """Forget it without an outcome: another record takes its place."""
        del self.records[task.task_id]
        if task.refs:
            self._directory.release_all(task.refs)

    def dependency_ready(self, task: TaskRecord, record: ObjectRecord) -> None:
        """An object the task waits for is ready (somewhere), or has arrived here."""
        if task.cancelled:
            return
        if task.state == FETCHING:
            if not is_here(record):
                self._depend(task, record)
                self._directory.pull(record)
                return
            self._fetched(task)
            return
        task.missing -= 1
        if task.missing == 0 and task.state == WAITING:
            if task.actor_id and task.template.kind == METHOD:
                self.call_ready(task)
            else:
                self.ready(task)

    def _fetched(self, task: TaskRecord) -> None:
        task.missing -= 1
        if task.missing == 0:
            if task.actor_id and task.template.kind == METHOD:
                self.call_fetched(task)
            else:
                self.fetched(task)

    def dependency_refused(self, task: TaskRecord, record: ObjectRecord, error: bytes) -> None:
        """A dependency cannot be brought here now: for this attempt its value is the error."""
        if task.cancelled:
            return
        if task.state != FETCHING:
            self.dependency_ready(task, record)
            return
        given = list(task.values or (None,) * task.dep_count)
        dep_ids = ids.split_ids(task.refs[: task.dep_count * 28])
        given[next(index for index, value in enumerate(given)
                   if value is None and dep_ids[index] == record.object_id)] = error
        task.values = tuple(given)
        if task.home != self._rank:
            self._directory.release(record.object_id)
        self._fetched(task)

    def ready(self, task: TaskRecord) -> None:
        """Every dependency exists somewhere: bind the task, or queue it for that."""
        move(task, READY)
        if (self._several or task.template.rank >= 0) and self._place(task):
            return
        self.enqueue(task)

    def bind(self, task: TaskRecord) -> None:
        """The same for one that has been ready before."""
        if (self._several or task.template.rank >= 0) and self._place(task):
            return
        self.enqueue(task)

    def _place(self, task: TaskRecord) -> bool:
        """To a node that it asks for, or that is better or as good; False: it stays here."""
        template = task.template
        if template.rank >= 0:
            return self.place_at(task)
        if template.kind == ACTOR_CREATION:
            self.place_actor(task)
            return True
        return self.deal(task) if template.spread else self.place_elsewhere(task)

    # --- binding to another rank ------------------------------------------------------------------

    def tell_template(self, rank: int, template: Template) -> None:
        told = self._told.setdefault(rank, set())
        if template.template_id not in told:
            told.add(template.template_id)
            self._outbox.peers[rank].append(TemplateDef(template))

    def assign(self, task: TaskRecord, rank: int) -> None:
        """Bind to another rank."""
        self.tell_template(rank, task.template)
        move(task, ASSIGN)
        task.rank = rank
        self._outbox.peers[rank].append(Assign(
            task.task_id, task.template.template_id, task.attempt, task.args,
            self.remote_deps(task), task.refs[: task.dep_count * 28],
        ))

    def remote_deps(self, task: TaskRecord) -> tuple[bytes | Remote, ...]:
        """The dependencies as another node needs them: inline, or where to pull them from; b"": it
        asks their homes for the values, which are too many for one message."""
        if not task.dep_count:
            return ()
        records = self._objects
        deps: list[bytes | Remote] = []
        inline_bytes = len(task.args)
        for object_id in ids.split_ids(task.refs[: task.dep_count * 28]):
            record = records[object_id]
            value = record.value
            if value is not None:
                inline_bytes += len(value)
                deps.append(value if gathers(inline_bytes, len(value)) else b"")
            else:
                extra = record.more()
                copies = extra.copies or extra.sources
                if record.location is not None and self._rank not in copies:
                    copies = (self._rank, *copies)
                deps.append(Remote(record.nbytes, tuple(copies)))
        return tuple(deps)

    # --- running for another home -----------------------------------------------------------------

    def assigned(self, home: int, message: Assign) -> None:
        template = self.templates[message.template_id]
        task = self.foreign(home, message, template)
        self.work_came(template)
        if template.kind == ACTOR_CREATION:
            task.actor_id = ids.actor_of_task(task.task_id)
        move(task, ARRIVED)
        if template.unavailable != WAIT and not self.has_room(template):
            self.give_back(task)
            return
        self.enqueue(task)

    def foreign(self, home: int, message: Any, template: Template) -> TaskRecord:
        """The record of a task (or call) that another home bound to this node."""
        task = TaskRecord(
            message.task_id, template, message.args, message.dep_ids, len(message.deps), home, -1,
            ASSIGNED, BOUND,
        )
        task.attempt = message.attempt
        if message.deps:
            directory = self._directory
            inline: list[bytes | None] = []
            for object_id, dep in zip(ids.split_ids(message.dep_ids), message.deps, strict=True):
                if type(dep) is Remote:
                    record = directory.hold(object_id)
                    # Our own object becomes ready by its result only, which may be behind this
                    # message (held back for its refs) and says what it contains.
                    if record.state == PENDING and not directory.is_home(object_id):
                        record.more().sources = dep.ranks
                        record.nbytes = dep.nbytes
                        directory.object_ready(object_id, dep)
                    inline.append(None)
                elif not dep:
                    directory.hold(object_id)  # `fetch` asks for it
                    inline.append(None)
                else:
                    inline.append(dep)
            task.values = tuple(inline)
        self.records[task.task_id] = task
        if template.kind != METHOD:
            self.guests[task.task_id] = task
        return task

    def stop_fetching(self, task: TaskRecord) -> None:
        """It leaves this node before all its dependencies have come: they are not for it any more,
        and it will count anew where it goes."""
        for object_id in ids.split_ids(task.refs[: task.dep_count * 28]):
            record = self._objects.get(object_id)
            extra = None if record is None else record.extra
            if extra is not None and extra.dependents:
                extra.dependents = [other for other in extra.dependents if other is not task]
        task.missing = 0

    def fetch(self, task: TaskRecord) -> bool:
        """Bring its dependencies here; True if all are."""
        directory = self._directory
        for index, object_id in enumerate(ids.split_ids(task.refs[: task.dep_count * 28])):
            if task.values is not None and task.values[index] is not None:
                continue
            record = self._objects[object_id]
            if not is_here(record):
                if not task.missing:
                    move(task, FETCH)
                task.missing += 1
                self._depend(task, record)
                directory.pull(record)
        return task.missing == 0

    def run_message(
        self, task: TaskRecord, worker: int, devices: tuple[int, ...], alone: bool
    ) -> Run:
        """What the worker needs to run it. Located dependencies are pinned for the worker.

        `alone`: it has nothing else to do, so its value is worth a datagram of its own.
        """
        move(task, RUN)
        task.worker = worker
        reply_to = self._reply_to(task, worker) if alone else -1
        if not task.dep_count:
            return Run(task.task_id, task.template.template_id, task.attempt, task.args, (),
                       task.actor_id, devices, b"", reply_to)
        directory = self._directory
        deps: list[bytes | Located] = []
        inline_bytes = len(task.args)
        dep_ids = task.refs[: task.dep_count * 28]
        for index, object_id in enumerate(ids.split_ids(dep_ids)):
            value = task.values[index] if task.values is not None else None
            if value is None:
                record = self._objects[object_id]
                value = record.value
                if value is None:
                    assert record.location is not None
                    directory.pin(record, worker)
                    deps.append(record.location)
                    continue
            inline_bytes += len(value)
            # An empty value tells the worker to get it by id.
            deps.append(value if gathers(inline_bytes, len(value)) else b"")
        return Run(task.task_id, task.template.template_id, task.attempt, task.args, tuple(deps),
                   task.actor_id, devices, dep_ids, reply_to)

    def _reply_to(self, task: TaskRecord, worker: int) -> int:
        """The client here that waits for the value: its worker may send it there itself, which
        saves who waits a turn of this node's loop."""
        if task.home != self._rank or task.template.return_count != 1:
            return -1
        number = self._directory.sole_waiter(task.task_id + ids.FIRST_RETURN)
        if number < 0 or number == worker:
            return -1
        client = self._clients.get(number)
        if client is None:
            return -1
        if worker not in client.met:
            client.met.add(worker)
            return -1
        if worker not in client.introduced:
            client.introduced.add(worker)
            self._outbox.actions.append(Introduce(worker, number))
        elif task.template.kind == METHOD and worker not in client.actors:
            client.actors.add(worker)
            self._outbox.actions.append(IntroduceActor(number, task.actor_id, worker))
        return number

    def unrun(self, task: TaskRecord) -> None:
        """The Run came back unread: undo its pins."""
        if task.dep_count:
            client = self._clients.get(task.worker)
            if client is not None:
                directory = self._directory
                for index, object_id in enumerate(ids.split_ids(task.refs[: task.dep_count * 28])):
                    if task.values is not None and task.values[index] is not None:
                        continue
                    record = self._objects[object_id]
                    if record.value is None:
                        directory.client_unpinned(client, object_id)
        move(task, TAKEN_BACK)
        task.worker = -1

    # --- outcomes, from workers of this node ------------------------------------------------------

    def done(self, client: ClientRecord, message: Done) -> None:
        task = self.records.get(message.task_id)
        if task is None or task.worker != client.number:
            return
        self._ran(task, message.run_us)
        if task.home == self._rank:
            told = message.told
            if told >= 0:
                client.told.append((told, task.task_id + ids.FIRST_RETURN))
            self.complete(task, message.value, told)
        else:
            self._report(task, client, TaskDone(
                task.task_id, task.attempt, message.run_us, message.value))

    def done_many(self, client: ClientRecord, message: DoneMany) -> None:
        task = self.records.get(message.task_id)
        if task is None or task.worker != client.number:
            for returned in message.returns:
                if type(returned.value) is Located:
                    self._memory.used(returned.value)
                    self._memory.free(returned.value)
            return
        self._ran(task, message.run_us)
        if task.home == self._rank:
            self.complete_many(task, message.returns)
            return
        directory = self._directory
        returns = []
        handed = b""
        for index, returned in enumerate(message.returns):
            if type(returned.value) is Located:
                directory.keep_foreign(ids.return_id(task.task_id, index), returned.value)
                returns.append(PeerReturn(b"", returned.value.nbytes, returned.contained))
            else:
                assert isinstance(returned.value, bytes)
                returns.append(PeerReturn(returned.value, 0, returned.contained))
            handed += returned.contained
        handover = directory.hand_over(handed, task.home) if handed else 0
        self._report(task, client, TaskDoneMany(
            task.task_id, task.attempt, message.run_us, tuple(returns), handover))

    def failed(self, client: ClientRecord, message: Failed) -> None:
        task = self.records.get(message.task_id)
        error = message.error
        if task is None or task.worker != client.number:
            self._forget_error(message.task_id, error)
            return
        template = task.template
        if type(error) is Located and (
                template.return_count != 1 or template.stream or message.retry
                or template.kind == ACTOR_CREATION):
            raise ValueError(f"the error of {template.name} has to be inline")
        self._ran(task, message.run_us)
        self.statistics[template.template_id].raised += 1
        if template.kind == ACTOR_CREATION:
            assert isinstance(error, bytes)
            self.creation_failed(task, error)
            return
        if task.home == self._rank:
            self.raised(task, error, message.retry)
            return
        nbytes = 0
        if type(error) is Located:
            nbytes = error.nbytes
            self._directory.keep_foreign(
                task.task_id + ids.FIRST_RETURN, error, failed=True)
            error = b""
        assert isinstance(error, bytes)
        self._report(task, client, TaskFailed(
            task.task_id, task.attempt, message.run_us, error, message.retry, nbytes))

    def _ran(self, task: TaskRecord, run_us: int) -> None:
        self.statistics[task.template.template_id].add(run_us)
        if task.actor_id:
            self.call_run_over(task)
        else:
            self.run_over(task)

    def _report(self, task: TaskRecord, client: ClientRecord, message: Any) -> None:
        """Tell the home, once the homes of refs that the worker kept know of this node."""
        self._directory.holders.release(client.add_barrier, task.home, message)
        self.forget_foreign(task)

    def forget_foreign(self, task: TaskRecord) -> None:
        if self.records.pop(task.task_id, None) is None:
            return
        self.guests.pop(task.task_id, None)
        if task.values is not None:
            for index, object_id in enumerate(ids.split_ids(task.refs)):
                if task.values[index] is None:
                    self._directory.release(object_id)

    def worker_died(self, task: TaskRecord, failure: values.Failure, *, started: bool) -> None:
        """Its worker is gone; `started`: it may have been running."""
        task.worker = -1
        failure = self.reason_of_group(task.template) or failure
        if started:
            self.statistics[task.template.template_id].singly = True
        if task.home == self._rank:
            self.crashed(task, failure, started=started)
        else:
            self._directory.holders.release_last(
                task.home, TaskCrashed(task.task_id, task.attempt, failure, started))
            self.forget_foreign(task)

    def refuse(self, task: TaskRecord, why: str) -> None:
        """It cannot be run on this node, which it is bound to, nor would waiting help."""
        creation = task.template.kind == ACTOR_CREATION
        error = values.pack_failure(values.Failure(
            "ActorUnschedulableError" if creation else "TaskUnschedulableError",
            f"{task.template.name}: {why}"))
        if task.home != self._rank:
            self._outbox.peers[task.home].append(
                TaskFailed(task.task_id, task.attempt, 0, error, False))
            self.forget_foreign(task)
        elif creation:
            self.creation_failed_at_home(task, error)
        else:
            self.fail(task, error)

    def give_back(self, task: TaskRecord) -> None:
        """Executor: cannot be started soon; the home binds it again."""
        self._outbox.peers[task.home].append(TaskReturned(task.task_id, task.attempt))
        self.forget_foreign(task)

    # --- outcomes, at the home --------------------------------------------------------------------

    def complete(self, task: TaskRecord, value: bytes, told: int = -1) -> None:
        self._directory.resolve_inline(task.task_id + ids.FIRST_RETURN, value, told)
        self._finish(task)

    def complete_many(self, task: TaskRecord, returns: tuple[Return, ...]) -> None:
        for index, returned in enumerate(returns):
            self._directory.resolve_return(
                ids.return_id(task.task_id, index), returned)
        self._finish(task)
        if task.template.stream == STREAM:
            self._streams.ended(task)

    def peer_done(self, rank: int, message: TaskDone) -> None:
        task = self._current(rank, message)
        if task is not None:
            statistics = self.statistics[task.template.template_id]
            statistics.add(message.run_us)
            statistics.told += 1
            self.complete(task, message.value)
            self.over_elsewhere(rank, task)

    def peer_done_many(self, rank: int, message: TaskDoneMany) -> None:
        directory = self._directory
        task = self._current(rank, message)
        barrier = 0
        for index, returned in enumerate(message.returns):
            object_id = ids.return_id(message.task_id, index)
            if task is None and returned.nbytes == 0:
                continue
            barrier = max(barrier, directory.resolve_peer_return(object_id, returned, rank))
        if message.handover:
            directory.holders.release(barrier, rank, HandedOver(message.handover))
        if task is not None:
            statistics = self.statistics[task.template.template_id]
            statistics.add(message.run_us)
            statistics.told += 1
            self._finish(task)
            if task.template.stream == STREAM:
                self._streams.ended(task)
            self.over_elsewhere(rank, task)

    def peer_failed(self, rank: int, message: TaskFailed) -> None:
        task = self._current(rank, message)
        error: bytes | ErrorAt = message.error
        if message.nbytes:
            error = ErrorAt(rank, message.nbytes)
        if task is None:
            self._forget_error(message.task_id, error)
            return
        self.over_elsewhere(rank, task)
        if task.template.kind == ACTOR_CREATION:
            self.creation_failed_at_home(task, message.error)
        else:
            self.raised(task, error, message.retry)

    def peer_crashed(self, rank: int, message: TaskCrashed) -> None:
        task = self._current(rank, message)
        if task is not None:
            self.over_elsewhere(rank, task)
            self.crashed(task, message.failure, started=message.started)

    def peer_returned(self, rank: int, message: TaskReturned) -> None:
        task = self._current(rank, message)
        if task is None:
            return
        if task.cancelled:  # unstarted: the RecallTask behind it will find nothing
            if task.template.kind != METHOD:
                self.back_from(rank, task)
            self.fail(task, values.pack_failure(cancelled_failure(task)))
            return
        move(task, RETURNED)
        if task.template.kind == METHOD:
            task.attempt += 1
            self.call_returned(task)
            return
        if task.template.kind != ACTOR_CREATION:
            # An actor's attempt is its incarnation, and none has come to be: the executor has
            # answered this assignment for good, so its number may serve again.
            task.attempt += 1
            self.back_from(rank, task)
        if task.template.unavailable != WAIT:
            task.rank = -1
            self.unavailable(task)
            return
        self.requeue(task)

    def _current(self, rank: int, message: Any) -> TaskRecord | None:
        """The task an executor speaks of, if that is its current assignment."""
        task = self.records.get(message.task_id)
        if task is None or task.rank != rank or task.attempt != message.attempt:
            return None
        return task

    def raised(self, task: TaskRecord, error: bytes | Located | ErrorAt, retry: bool) -> None:
        """The task raised; retried only if it asks for that.

        A call that was cancelled as it ran says itself what has become of it.
        """
        if retry and task.retries_left != 0 and not task.cancelled:
            self._count_retry(task)
            move(task, RETRY)
            if task.template.kind == METHOD:
                self.call_again(task)
            else:
                self.requeue(task)
        elif task.cancelled and task.template.kind != METHOD:
            self._forget_error(task.task_id, error)
            self.fail(task, values.pack_failure(cancelled_failure(task)))
        else:
            self.fail(task, error)

    def _forget_error(self, task_id: bytes, error: bytes | Located | ErrorAt) -> None:
        """Nobody will see it."""
        if type(error) is Located:
            self._memory.used(error)
            self._memory.free(error)
        elif type(error) is ErrorAt:
            self._directory.spare_copy(task_id + ids.FIRST_RETURN, error.rank)

    def crashed(self, task: TaskRecord, failure: values.Failure, *, started: bool) -> None:
        """A system failure took the task down."""
        if task.template.group_id and self.refuse_of_group(task):
            return
        if task.template.kind == ACTOR_CREATION:
            self.creation_crashed(task, failure, started=started)
            return
        if task.cancelled:
            self.fail(task, values.pack_failure(cancelled_failure(task)))
        elif not started:
            task.attempt += 1
            move(task, RETRY)
            self.requeue(task)
        elif task.retries_left != 0:
            self._count_retry(task)
            move(task, RETRY)
            self.requeue(task)
        else:
            self.fail(task, values.pack_failure(failure))

    @staticmethod
    def _count_retry(task: TaskRecord) -> None:
        if task.retries_left > 0:
            task.retries_left -= 1
        task.attempt += 1

    def requeue(self, task: TaskRecord) -> None:
        """It is to run again: back to where it is bound."""
        task.rank = -1
        task.values = None
        if task.template.kind == METHOD:
            self.resend(task)
        elif task.template.rank >= 0 or task.template.kind == ACTOR_CREATION:
            self.bind(task)
        else:
            self.enqueue(task, front=True)

    def fail(self, task: TaskRecord, error: bytes | Located | ErrorAt) -> None:
        """Deliver an error as the value of every return."""
        directory = self._directory
        if isinstance(error, bytes):
            for index in range(task.template.return_count):
                directory.resolve_inline(ids.return_id(task.task_id, index), error)
        else:  # of one return
            object_id = task.task_id + ids.FIRST_RETURN
            record = directory.records.get(object_id)
            if record is not None:
                record.more().failed = True  # who waits for several wants to hear of it at once
            if isinstance(error, Located):
                directory.resolve_located(object_id, error)
            else:
                directory.resolve_peer_return(
                    object_id, PeerReturn(b"", error.nbytes), error.rank)
            error = bytes((values.ERROR,))  # all that a node needs to know of it
        if task.template.stream == STREAM:
            self._streams.failed(task, error)
        if task.task_id in self.records:
            self.failed_for_good(task, error)
        self._finish(task)
        if task.template.stream == STREAM:
            self._streams.ended(task)

    def _finish(self, task: TaskRecord) -> None:
        if self.records.pop(task.task_id, None) is None:
            return
        self.finished += 1
        if task.actor_id:
            self.call_over(task)
        if task.refs:
            self._directory.release_all(task.refs)

    # --- cancellation -----------------------------------------------------------------------------

    def cancel(self, task_id: bytes, *, force: bool, recursive: bool) -> str:
        """Cancel a task; what was done, for the log.

        A queued task ends at once. A running one is interrupted (KeyboardInterrupt in the worker);
        with `force` its worker is killed. `recursive`: so are the tasks it has submitted.
        """
        task = self.records.get(task_id)
        if task is None or task.home != self._rank:
            return "finished"
        if task.template.kind == ACTOR_CREATION:
            return "actor"
        task.cancelled = True
        if task.state in (WAITING, QUEUED, FETCHING):
            self.drop_cancelled(task)
            return "queued"
        if task.state == ASSIGNED and task.rank not in (-1, self._rank):
            self._outbox.peers[task.rank].append(RecallTask(task.task_id, force, recursive))
            return "elsewhere"
        return self.cancel_here(task, force=force, recursive=recursive)

    def cancel_here(self, task: TaskRecord, *, force: bool, recursive: bool) -> str:
        """Cancel a task that is bound to this node."""
        task.cancelled = True
        if recursive and task.state == RUNNING:
            # Its children's ids begin with the prefix this attempt gave them.
            prefix = ids.task_prefix(task.task_id, task.attempt)
            for child in [i for i in self.records if i.startswith(prefix)]:
                self.cancel(child, force=force, recursive=True)
        if task.state != RUNNING:
            self.drop_cancelled(task)
            return "queued"
        if force and not task.actor_id:
            self._outbox.actions.append(KillWorker(task.worker))
            return "killed"
        self._outbox.clients[task.worker].append(CancelTask(task.task_id))
        self._outbox.interrupts.append(task.worker)
        return "interrupted"

    def drop_cancelled(self, task: TaskRecord) -> None:
        """It has not started (or came back unread) and never will: this is its outcome."""
        error = values.pack_failure(cancelled_failure(task))
        if task.home == self._rank:
            self.fail(task, error)
        else:
            self._outbox.peers[task.home].append(
                TaskFailed(task.task_id, task.attempt, 0, error, False))
            self.forget_foreign(task)
        if task.template.kind == METHOD:
            self.call_cancelled(task)

    def recalled(self, message: RecallTask) -> None:
        task = self.records.get(message.task_id)
        if task is not None and task.home != self._rank:
            self.cancel_here(task, force=message.force, recursive=message.recursive)

    def validate(self) -> None:
        for task_id, task in self.records.items():
            assert task.task_id == task_id
            assert task.missing >= 0
        guests = [task_id for task_id, task in self.records.items()
                  if task.home != self._rank and task.template.kind != METHOD]
        assert sorted(self.guests) == sorted(guests), "TK-3"


def cancelled_failure(task: TaskRecord) -> values.Failure:
    return values.Failure(
        "TaskCancelledError", f"({task.template.name}, cancelled by cancel())", task.task_id.hex()
    )
