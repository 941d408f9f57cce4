"""Tasks where they run, for this home or another: from the assignment to the report. Pure.

What one takes is brought here before a worker has it; then its `Run` says where everything is.
Its record is the home's own if that is this node. Else it begins with the assignment and ends with
the one outcome that is reported; its refs are held here as long.

    Assign --> queue or actor --> fetch --> run_message --> worker --> Done, Failed, or it dies
                  |                                                        |
                  +--give_back--> TaskReturned                             +--> home

The states of a task, at both ends (`node/task_states.py`):

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

TK-3  a task of another home is in `records` exactly until its outcome is reported.
      (But for calls of actors here, these are `guests`.)
TK-4  its record counts once for every ref whose value did not come with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpcray.node.directory import Directory
from hpcray.node.memory import NodeMemory
from hpcray.node.outbox import Introduce, IntroduceActor, KillWorker, Outbox
from hpcray.node.records import PENDING, ClientRecord, ObjectRecord, TaskRecord, is_here
from hpcray.node.states import move
from hpcray.node.tables import Tables, unwired
from hpcray.node.task_states import (
    ARRIVED,
    ASSIGNED,
    BOUND,
    FETCH,
    RUN,
    RUNNING,
    TAKEN_BACK,
    WAITING,
)
from hpcray.node.tasks import Tasks, cancelled_error, depend, nothing, unschedulable
from hpcray.protocol import ids, values
from hpcray.protocol.messages import (
    ACTOR_CREATION,
    METHOD,
    WAIT,
    Assign,
    CancelTask,
    Done,
    DoneMany,
    Failed,
    Located,
    PeerReturn,
    RecallTask,
    Remote,
    Run,
    TaskCrashed,
    TaskDone,
    TaskDoneMany,
    TaskFailed,
    TaskReturned,
    Template,
)
from hpcray.protocol.sizes import gathers


@dataclass(slots=True, kw_only=True)
class Runner:
    """Who has the tasks of one kind run on this node: ports."""

    # All that it needs is here.
    fetched: Callable[[TaskRecord], None]
    # Its run is over; it was so because it raised.
    over: Callable[[TaskRecord], None]
    raised: Callable[[TaskRecord], None]
    # It was cancelled before it began, and has its outcome.
    cancelled: Callable[[TaskRecord], None] = nothing


class Executor:
    def __init__(
        self, tables: Tables, outbox: Outbox, memory: NodeMemory, directory: Directory,
        home: Tasks,
    ) -> None:
        self._outbox = outbox
        self._rank = tables.rank
        self._clients = tables.clients
        self._objects = tables.objects
        self._records = tables.tasks
        self._templates = tables.templates
        self._statistics = tables.statistics
        self._memory = memory
        self._directory = directory
        self._holders = directory.holders
        self._home = home
        # Tasks of other homes, but for calls of actors here (TK-3).
        self.guests: dict[bytes, TaskRecord] = {}
        # By kind.
        self.runners: dict[int, Runner] = {}
        # Ports. Of the workers here: a task for their queue; is one free for such a task now?
        self.enqueue: Callable[[TaskRecord], None] = unwired
        self.has_room: Callable[[Template], bool] = unwired
        # A task of another home has come.
        self.work_came: Callable[[Template], None] = unwired
        # Why tasks of a removed placement group die; None: it is not removed.
        self.reason_of_group: Callable[[Template], values.Failure | None] = unwired

    # --- tasks of other homes ---------------------------------------------------------------------

    def assigned(self, home: int, message: Assign) -> None:
        template = self._templates[message.template_id]
        task = self.guests[message.task_id] = self.foreign(home, message, template)
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
                    if record.state is PENDING and not directory.is_home(object_id):
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
        self._records[task.task_id] = task
        return task

    # --- what it takes ----------------------------------------------------------------------------

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
                depend(task, record)
                directory.pull(record)
        return task.missing == 0

    def arrived(self, task: TaskRecord, record: ObjectRecord) -> None:
        """An object that it waits for has come, or has a value that can be brought here."""
        if not is_here(record):
            depend(task, record)
            self._directory.pull(record)
            return
        self._fetched(task)

    def _fetched(self, task: TaskRecord) -> None:
        task.missing -= 1
        if task.missing == 0:
            self.runners[task.template.kind].fetched(task)

    def refused_to_arrive(self, task: TaskRecord, record: ObjectRecord, error: bytes) -> None:
        """A dependency cannot be brought here now: for this attempt its value is the error."""
        given = list(task.values or (None,) * task.dep_count)
        dep_ids = ids.split_ids(task.refs[: task.dep_count * 28])
        given[next(index for index, value in enumerate(given)
                   if value is None and dep_ids[index] == record.object_id)] = error
        task.values = tuple(given)
        if task.home != self._rank:
            self._directory.release(record.object_id)
        self._fetched(task)

    def stop_fetching(self, task: TaskRecord) -> None:
        """It leaves this node before all its dependencies have come: they are not for it any more,
        and it will count anew where it goes."""
        for object_id in ids.split_ids(task.refs[: task.dep_count * 28]):
            record = self._objects.get(object_id)
            extra = None if record is None else record.extra
            if extra is not None and extra.dependents:
                extra.dependents = [other for other in extra.dependents if other is not task]
        task.missing = 0

    # --- running ----------------------------------------------------------------------------------

    def run_message(
        self, task: TaskRecord, worker: int, devices: tuple[int, ...], alone: bool
    ) -> Run:
        """What the worker needs to run it. Located dependencies are pinned for the worker.

        `alone`: it has nothing else to do, so its value is worth a datagram of its own.
        """
        story = task.story = task.story[RUN]  # move
        task.state = story.state
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
        if worker not in client.eligible:
            client.eligible.add(worker)
            return -1
        if worker not in client.connected:
            client.connected.add(worker)
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

    # --- outcomes ---------------------------------------------------------------------------------

    def done(self, client: ClientRecord, message: Done) -> None:
        task = self._records.get(message.task_id)
        if task is None or task.worker != client.number:
            return
        template = task.template
        self._statistics[template.template_id].add(message.run_us)
        self.runners[template.kind].over(task)
        if task.home == self._rank:
            object_id = task.task_id + ids.FIRST_RETURN
            told = message.sent_to
            if told >= 0:
                client.sent_values.append((told, object_id))
            self._directory.resolve_inline(object_id, message.value, told)
            self._home.finish(task)
        else:
            self._report(task, client, TaskDone(
                task.task_id, task.attempt, message.run_us, message.value))

    def done_many(self, client: ClientRecord, message: DoneMany) -> None:
        task = self._records.get(message.task_id)
        if task is None or task.worker != client.number:
            for returned in message.returns:
                if type(returned.value) is Located:
                    self._memory.used(returned.value)
                    self._memory.free(returned.value)
            return
        self._statistics[task.template.template_id].add(message.run_us)
        self.runners[task.template.kind].over(task)
        if task.home == self._rank:
            self._home.complete_many(task, message.returns)
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
        task = self._records.get(message.task_id)
        error = message.error
        if task is None or task.worker != client.number:
            self._home.forget_error(message.task_id, error)
            return
        template = task.template
        if type(error) is Located and (
                template.return_count != 1 or template.stream or message.retry
                or template.kind == ACTOR_CREATION):
            raise ValueError(f"the error of {template.name} has to be inline")
        statistics = self._statistics[template.template_id]
        statistics.add(message.run_us)
        statistics.raised += 1
        self.runners[template.kind].raised(task)
        if task.home == self._rank:
            self._home.raised(task, error, message.retry)
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

    def _report(self, task: TaskRecord, client: ClientRecord, message: Any) -> None:
        """Tell the home, once the homes of refs that the worker kept know of this node."""
        self._holders.release(client.add_barrier, task.home, message)
        self.forget(task)

    def worker_died(self, task: TaskRecord, failure: values.Failure, *, started: bool) -> None:
        """Its worker is gone; `started`: it may have been running."""
        task.worker = -1
        failure = self.reason_of_group(task.template) or failure
        if started:
            self._statistics[task.template.template_id].singly = True
        if task.home == self._rank:
            self._home.crashed(task, failure, started=started)
        else:
            self._holders.release_last(
                task.home, TaskCrashed(task.task_id, task.attempt, failure, started))
            self.forget(task)

    def refuse(self, task: TaskRecord, why: str) -> None:
        """It cannot be run on this node, which it is bound to, nor would waiting help."""
        error = unschedulable(task.template, f": {why}")
        if task.home == self._rank:
            self._home.refuse(task, error)
            return
        self._outbox.peers[task.home].append(
            TaskFailed(task.task_id, task.attempt, 0, error, False))
        self.forget(task)

    def give_back(self, task: TaskRecord) -> None:
        """It cannot be started soon; the home binds it again."""
        self._outbox.peers[task.home].append(TaskReturned(task.task_id, task.attempt))
        self.forget(task)

    def forget(self, task: TaskRecord) -> None:
        """A task of another home has been reported."""
        if self._records.pop(task.task_id, None) is None:
            return
        self.guests.pop(task.task_id, None)
        if task.values is not None:
            for index, object_id in enumerate(ids.split_ids(task.refs)):
                if task.values[index] is None:
                    self._directory.release(object_id)

    # --- cancellation -----------------------------------------------------------------------------

    def recalled(self, message: RecallTask) -> None:
        task = self._records.get(message.task_id)
        if task is not None and task.home != self._rank:
            self.cancel_here(task, force=message.force, recursive=message.recursive)

    def cancel_here(self, task: TaskRecord, *, force: bool, recursive: bool) -> str:
        """Cancel a task that is bound to this node."""
        task.cancelled = True
        if recursive and task.state is RUNNING:
            # Its children's ids begin with the prefix this attempt gave them.
            prefix = ids.task_prefix(task.task_id, task.attempt)
            for child in [i for i in self._records if i.startswith(prefix)]:
                self._home.cancel(child, force=force, recursive=True)
        if task.state is not RUNNING:
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
        if task.home == self._rank:
            self._home.drop_cancelled(task)
            return
        self._outbox.peers[task.home].append(
            TaskFailed(task.task_id, task.attempt, 0, cancelled_error(task), False))
        self.forget(task)
        self.runners[task.template.kind].cancelled(task)

    # --- invariants -------------------------------------------------------------------------------

    def validate(self) -> None:
        """TK-4, and what can be seen of TK-3."""
        named: Counter[bytes] = Counter()
        guests = set()
        for task in self._records.values():
            if task.home == self._rank:
                continue
            assert task.state is not WAITING, ("TK-3", task)
            assert not task.cancelled or task.state is RUNNING, ("TK-3", task)
            if task.template.kind != METHOD:
                guests.add(task.task_id)
            given = task.values or ()
            named.update(object_id for object_id, value in zip(
                ids.split_ids(task.refs), given, strict=True) if value is None)
        assert guests == set(self.guests), "TK-3"
        for object_id, count in named.items():
            record = self._objects.get(object_id)
            assert record is not None and record.count >= count, ("TK-4", object_id.hex(), record)
