"""Tasks at their home, from submission to outcome. Pure.

The home keeps a task's record until its outcome, and only the home assigns it. It is bound as
late as possible: to this node by the dispatcher, to another by a grant of the global scheduler
(`node/cluster.py`), to an actor by its route (`node/actor_routes.py`). Who binds it is a matter of
its kind: each has a `Binder`. Every assignment has its own attempt number, and its executor gives
it one outcome; what is said of another attempt is dropped.

    submit --> its dependencies exist --> bound --> its executor (node/executor.py)
                                            ^          | value, error, crash, return
                                            +--again---+--> delivered: the record goes

Invariants, checked by `validate`:

TK-1  a task of this home is in `records` exactly until its outcome is delivered.
TK-2  its record counts once for every ref it names, for as long as it is in `records`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from hpcray.node.directory import Directory
from hpcray.node.memory import NodeMemory
from hpcray.node.outbox import Outbox
from hpcray.node.records import (
    PENDING,
    ClientRecord,
    ObjectRecord,
    TaskRecord,
)
from hpcray.node.states import move
from hpcray.node.streams import Streams
from hpcray.node.tables import Tables, unwired
from hpcray.node.task_states import (
    ASSIGN,
    ASSIGNED,
    FAIL,
    FETCHING,
    QUEUED,
    READY,
    RETRY,
    RETURNED,
    WAITING,
)
from hpcray.protocol import ids, values
from hpcray.protocol.messages import (
    ACTOR_CREATION,
    STREAM,
    TASK,
    WAIT,
    Assign,
    HandedOver,
    Located,
    PeerReturn,
    RecallTask,
    Remote,
    Return,
    SubmitTask,
    TaskCrashed,
    TaskDone,
    TaskDoneMany,
    TaskFailed,
    TaskReturned,
    Template,
)
from hpcray.protocol.sizes import gathers

# Lineage kept per flush: at more than this the control store gets a sample.
_LINEAGE_PER_FLUSH = 256


class ErrorAt(NamedTuple):
    """A large error in the shared memory of another node."""

    rank: int
    nbytes: int


def nothing(*_: Any) -> None:
    """For who need not hear of it."""


@dataclass(slots=True, kw_only=True)
class Binder:
    """Who binds the tasks of one kind, and what their outcomes mean: ports."""

    # All it depends on exists, for the first time.
    ready: Callable[[TaskRecord], None]
    # It is to run again, unbound now: its run crashed, or never began.
    resend: Callable[[TaskRecord], None]
    # It is to run again because it raised.
    again: Callable[[TaskRecord], None]
    # The rank it was bound to gave it back unstarted.
    returned: Callable[[int, TaskRecord], None]
    # It has failed for good, or will never run: deliver this error.
    refused: Callable[[TaskRecord, Any], None]
    # A system failure took it down (task, why, whether it may have been running).
    crashed: Callable[[TaskRecord, values.Failure, bool], None]
    # It was cancelled before it began, and has its outcome.
    cancelled: Callable[[TaskRecord], None] = nothing
    # Of an actor: it has an outcome.
    over: Callable[[TaskRecord], None] = nothing


class Tasks:
    def __init__(
        self, tables: Tables, outbox: Outbox, memory: NodeMemory, directory: Directory,
        streams: Streams,
    ) -> None:
        self._outbox = outbox
        self._rank = tables.rank
        self._several = tables.size > 1
        self._objects = tables.objects
        self.records = tables.tasks
        self.templates = tables.templates
        self.statistics = tables.statistics
        self._memory = memory
        self._directory = directory
        self._streams = streams
        # By kind; the part that has to do with actors binds theirs.
        self.binders: dict[int, Binder] = {TASK: Binder(
            ready=self.ready, resend=self._resend, again=self.requeue, returned=self._returned,
            refused=self.fail, crashed=self.run_crashed)}
        # Ports. A task for the queue of this node (with `front`, before those like it).
        self.enqueue: Callable[..., None] = unwired
        # Bind a task to another node if it should run there (or fail it): whether that is done.
        self.place: Callable[[TaskRecord], bool] = unwired
        # A task bound to another node is over there; has come back from there; cannot be run soon
        # on the only node that it may run on.
        self.over_elsewhere: Callable[[int, TaskRecord], None] = unwired
        self.back_from: Callable[[int, TaskRecord], None] = unwired
        self.unavailable: Callable[[TaskRecord], bool] = unwired
        # Fail a task if its placement group is removed: whether it was.
        self.refuse_of_group: Callable[[TaskRecord], bool] = unwired
        # Of the executor on this node: an object that a task there waits for is here, or cannot be
        # brought here (task, object, error); cancel a task there (force, recursive).
        self.arrived: Callable[[TaskRecord, ObjectRecord], None] = unwired
        self.refused_to_arrive: Callable[[TaskRecord, ObjectRecord, bytes], None] = unwired
        self.cancel_here: Callable[..., str] = unwired
        # A task of this home has failed for good.
        self.failed_for_good: Callable[[TaskRecord, bytes], None] = unwired
        # Make another node know a template before the first task of it (`Templates.tell`).
        self.tell_template: Callable[[int, Template], None] = unwired
        # (task, template, refs) of new tasks, for the control store.
        self.lineage: list[tuple[bytes, bytes, bytes]] = []
        self.submitted = 0
        self.finished = 0

    # --- submission -------------------------------------------------------------------------------

    def submit(self, client: ClientRecord, message: SubmitTask) -> None:
        template = self.templates[message.template_id]
        task = TaskRecord(
            message.task_id, template, message.args, message.refs, message.dep_count,
            self._rank, client.number,
        )
        task.retries_left = template.max_retries
        self.register(client, task)
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
        self.register(client, task)
        return task

    def register(self, client: ClientRecord, task: TaskRecord) -> None:
        """A new task of this home; `client` holds what it will return."""
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
            self._hold_arguments(task)
        lineage = self.lineage
        if len(lineage) < _LINEAGE_PER_FLUSH:
            lineage.append((task_id, template.template_id, task.refs))

    def _hold_arguments(self, task: TaskRecord) -> None:
        directory = self._directory
        dep_count = task.dep_count
        for index, object_id in enumerate(ids.split_ids(task.refs)):
            record = directory.hold(object_id)
            if index < dep_count and record.state is PENDING:
                task.missing += 1
                depend(task, record)
                directory.want(record)

    def restart(self, task: TaskRecord) -> None:
        """An actor's constructor runs again: nobody submits it, and nobody holds its return."""
        self.records[task.task_id] = task
        if task.refs:
            self._hold_arguments(task)
        if task.missing == 0:
            self.ready(task)

    def drop(self, task: TaskRecord) -> None:
        """Forget it without an outcome: another record takes its place."""
        del self.records[task.task_id]
        if task.refs:
            self._directory.release_all(task.refs)

    def dependency_ready(self, task: TaskRecord, record: ObjectRecord) -> None:
        """An object the task waits for is ready (somewhere), or has arrived here."""
        if task.state is WAITING:
            task.missing -= 1
            if task.missing == 0:
                self.binders[task.template.kind].ready(task)
        elif task.state is FETCHING and not task.cancelled:
            self.arrived(task, record)
        # Else it is over: it was cancelled, or its actor is dead.

    def dependency_refused(self, task: TaskRecord, record: ObjectRecord, error: bytes) -> None:
        """There is no room here now for an object that the task waits for."""
        if task.state is not FETCHING:
            self.dependency_ready(task, record)
        elif not task.cancelled:
            self.refused_to_arrive(task, record, error)

    def ready(self, task: TaskRecord) -> None:
        """Every dependency exists somewhere: bind the task, or queue it for that."""
        story = task.story = task.story[READY]  # move
        task.state = story.state
        if (self._several or task.template.rank >= 0) and self.place(task):
            return
        self.enqueue(task)

    def bind(self, task: TaskRecord) -> None:
        """The same for one that has been ready before."""
        if (self._several or task.template.rank >= 0) and self.place(task):
            return
        self.enqueue(task)

    # --- binding to another rank ------------------------------------------------------------------

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

    # --- outcomes ---------------------------------------------------------------------------------

    def complete_many(self, task: TaskRecord, returns: tuple[Return, ...]) -> None:
        """Values made by a worker of this node."""
        for index, returned in enumerate(returns):
            self._directory.resolve_return(ids.return_id(task.task_id, index), returned)
        self.finish(task)
        if task.template.stream == STREAM:
            self._streams.ended(task)

    def peer_done(self, rank: int, message: TaskDone) -> None:
        task = self._current(rank, message)
        if task is None:
            return
        statistics = self.statistics[task.template.template_id]
        statistics.add(message.run_us)
        statistics.told += 1
        self._directory.resolve_inline(task.task_id + ids.FIRST_RETURN, message.value)
        self.finish(task)
        if not task.actor_id:
            self.over_elsewhere(rank, task)

    def peer_done_many(self, rank: int, message: TaskDoneMany) -> None:
        directory = self._directory
        task = self._current(rank, message)
        barrier = 0
        for index, returned in enumerate(message.returns):
            object_id = ids.return_id(message.task_id, index)
            if task is not None:
                barrier = max(barrier, directory.resolve_peer_return(object_id, returned, rank))
            elif returned.nbytes:
                # Its value is dropped like any of another attempt. But that node keeps the copy
                # until it hears from us.
                directory.spare_copy(object_id, rank)
        if message.handover:  # it holds the refs inside until we hold them, or have no use for them
            directory.holders.release(barrier, rank, HandedOver(message.handover))
        if task is None:
            return
        statistics = self.statistics[task.template.template_id]
        statistics.add(message.run_us)
        statistics.told += 1
        self.finish(task)
        if task.template.stream == STREAM:
            self._streams.ended(task)
        if not task.actor_id:
            self.over_elsewhere(rank, task)

    def peer_failed(self, rank: int, message: TaskFailed) -> None:
        task = self._current(rank, message)
        error: bytes | ErrorAt = message.error
        if message.nbytes:
            error = ErrorAt(rank, message.nbytes)
        if task is None:
            self.forget_error(message.task_id, error)
            return
        if not task.actor_id:
            self.over_elsewhere(rank, task)
        self.raised(task, error, message.retry)

    def peer_crashed(self, rank: int, message: TaskCrashed) -> None:
        task = self._current(rank, message)
        if task is None:
            return
        if not task.actor_id:
            self.over_elsewhere(rank, task)
        self.crashed(task, message.failure, started=message.started)

    def peer_returned(self, rank: int, message: TaskReturned) -> None:
        task = self._current(rank, message)
        if task is None:
            return
        if task.cancelled:  # unstarted: the RecallTask behind it will find nothing
            if not task.actor_id:
                self.back_from(rank, task)
            self.fail(task, cancelled_error(task))
            return
        move(task, RETURNED)
        self.binders[task.template.kind].returned(rank, task)

    def _returned(self, rank: int, task: TaskRecord) -> None:
        """A plain task."""
        task.attempt += 1
        self.back_from(rank, task)
        self.rebind(rank, task)

    def rebind(self, _: int, task: TaskRecord) -> None:
        """To another node than the one that has given it back.

        An actor's attempt is its incarnation, and none has come to be: the executor has answered
        this assignment for good, so its number may serve again.
        """
        if task.template.unavailable != WAIT:
            task.rank = -1
            self.unavailable(task)
        else:
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
            self.binders[task.template.kind].again(task)
        elif task.cancelled and not task.actor_id:
            self.forget_error(task.task_id, error)
            self.fail(task, cancelled_error(task))
        else:
            self.binders[task.template.kind].refused(task, error)

    def forget_error(self, task_id: bytes, error: bytes | Located | ErrorAt) -> None:
        """Nobody will see it."""
        if type(error) is Located:
            self._memory.used(error)
            self._memory.free(error)
        elif type(error) is ErrorAt:
            self._directory.spare_copy(task_id + ids.FIRST_RETURN, error.rank)

    def crashed(self, task: TaskRecord, failure: values.Failure, *, started: bool) -> None:
        """A system failure took the task down; `started`: it may have been running."""
        if task.template.group_id and self.refuse_of_group(task):
            return
        self.binders[task.template.kind].crashed(task, failure, started)

    def run_crashed(self, task: TaskRecord, failure: values.Failure, started: bool) -> None:
        """A task or a call: it is retried if it has not run, or has retries left."""
        if task.cancelled:
            self.fail(task, cancelled_error(task))
        elif started and task.retries_left == 0:
            self.fail(task, values.pack_failure(failure))
        else:
            if started:
                self._count_retry(task)
            else:
                task.attempt += 1
            move(task, RETRY)
            self.requeue(task)

    @staticmethod
    def _count_retry(task: TaskRecord) -> None:
        if task.retries_left > 0:
            task.retries_left -= 1
        task.attempt += 1

    def requeue(self, task: TaskRecord) -> None:
        """It is to run again: back to who binds it."""
        task.rank = -1
        task.values = None
        self.binders[task.template.kind].resend(task)

    def _resend(self, task: TaskRecord) -> None:
        """A plain task."""
        if task.template.rank >= 0:
            self.bind(task)
        else:
            self.enqueue(task, front=True)

    def refuse(self, task: TaskRecord, error: bytes) -> None:
        """It is not going to run."""
        self.binders[task.template.kind].refused(task, error)

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
            move(task, FAIL)
            self.failed_for_good(task, error)
        self.finish(task)
        if task.template.stream == STREAM:
            self._streams.ended(task)

    def finish(self, task: TaskRecord) -> None:
        """Its outcome is delivered."""
        if self.records.pop(task.task_id, None) is None:
            return
        self.finished += 1
        if task.actor_id:
            self.binders[task.template.kind].over(task)
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
        if task.state is ASSIGNED and task.rank not in (-1, self._rank):
            self._outbox.peers[task.rank].append(RecallTask(task.task_id, force, recursive))
            return "elsewhere"
        return self.cancel_here(task, force=force, recursive=recursive)

    def drop_cancelled(self, task: TaskRecord) -> None:
        """It has not started (or came back unread) and never will: this is its outcome."""
        self.fail(task, cancelled_error(task))
        self.binders[task.template.kind].cancelled(task)

    # --- invariants -------------------------------------------------------------------------------

    def validate(self) -> None:
        """TK-1 and TK-2 of the tasks of this home, as far as objects tell."""
        named: Counter[bytes] = Counter()
        for task_id, task in self.records.items():
            assert task.task_id == task_id
            assert task.missing >= 0, task
            if task.home != self._rank:
                continue
            named.update(ids.split_ids(task.refs))
            assert not task.missing or task.state in (WAITING, FETCHING), ("TK-1", task)
            first = self._objects.get(task_id + ids.FIRST_RETURN)
            assert first is None or first.state is PENDING or not task.template.return_count or (
                task.template.kind == ACTOR_CREATION), ("TK-1", task, first)  # of a restart
        for object_id, count in named.items():
            record = self._objects.get(object_id)
            assert record is not None and record.count >= count, ("TK-2", object_id.hex(), record)


def unschedulable(template: Template, why: str) -> bytes:
    """The error of a task, or an actor, that no node will run."""
    kind = ("ActorUnschedulableError" if template.kind == ACTOR_CREATION
            else "TaskUnschedulableError")
    return values.pack_failure(values.Failure(kind, f"{template.name}{why}"))


def cancelled_error(task: TaskRecord) -> bytes:
    return values.pack_failure(values.Failure(
        "TaskCancelledError", f"({task.template.name}, cancelled by cancel())",
        task.task_id.hex()))


def depend(task: TaskRecord, record: ObjectRecord) -> None:
    """Tell the task when the object is ready, or here."""
    extra = record.more()
    if extra.dependents is None:
        extra.dependents = []
    extra.dependents.append(task)
