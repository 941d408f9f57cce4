"""Tasks where they run: TK-3 and TK-4, and that the home of each is told one outcome of it.

Homes, copies and workers are played. What holds a report back (the homes of refs that a worker
kept) is answered when it likes.
"""

from __future__ import annotations

from collections import deque

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpcray.node.executor import Runner
from hpcray.node.outbox import KillWorker, StartPull
from hpcray.node.records import ClientRecord, TaskRecord, is_here
from hpcray.node.states import move
from hpcray.node.task_states import FETCHED, FETCHING, QUEUED, READY, RUNNING
from hpcray.protocol import ids, values
from hpcray.protocol import messages as m

from .lower import Lower

DIED = values.Failure("WorkerCrashedError", "the worker died")
NO_ROOM = values.Failure("OutOfMemoryError", "no room for it")
VALUE = bytes((values.PLAIN,)) + b"value"
ERROR = bytes((values.ERROR,)) + b"error"
LARGE = 1 << 12
OUTCOMES = (m.TaskDone, m.TaskDoneMany, m.TaskFailed, m.TaskCrashed, m.TaskReturned)


class ExecutorMachine(RuleBasedStateMachine):
    """Rank 0 runs tasks of ranks 1 and 2; what they take lives on rank 3."""

    def __init__(self) -> None:
        super().__init__()
        self.lower = lower = Lower()
        self.executor = lower.executor
        self.executor.runners[m.TASK] = Runner(
            fetched=self.fetched, over=self.is_over, raised=self.is_over)
        self.executor.has_room = lambda template: False
        for name, options in ((b"1", {}), (b"2", {"return_count": 2}),
                              (b"n", {"rank": 0, "unavailable": m.SPILL})):
            lower.template(name, m.TASK, **options)
        self.attempts: dict[bytes, int] = {}  # assigned and not reported
        self.objects: list[bytes] = []
        self.pulls: list[bytes] = []
        self.running: dict[int, TaskRecord] = {}  # by worker
        self.unacknowledged: deque[tuple[int, int]] = deque()
        self.worker = 2
        self.place = 0
        # Where copies are put.
        memory = lower.memory
        memory.budget.grant(None, LARGE * 64)
        memory.node_segments[1] = None
        self.segment_nbytes = memory.budget.segment(1).nbytes

    # --- what the parts around it do ----------------------------------------

    def fetched(self, task: TaskRecord) -> None:
        move(task, FETCHED)
        self.lower.queued.append(task)

    def is_over(self, task: TaskRecord) -> None:
        assert self.running.pop(task.worker) is task

    def take(self) -> None:
        for rank in range(1, 4):
            self.lower.directory.end_turn()
            for message in self.lower.outbox.peers.pop(rank, []):
                if type(message) is m.HolderAdd:
                    self.unacknowledged.append((rank, message.turn))
                elif isinstance(message, OUTCOMES):
                    assert ids.home_of_object(message.task_id + ids.FIRST_RETURN) == rank
                    attempt = self.attempts.pop(message.task_id)
                    assert message.attempt == attempt, "one outcome of each attempt"
                    assert message.task_id not in self.lower.tables.tasks
        for action in self.lower.outbox.actions:
            if type(action) is StartPull:
                self.pulls.append(action.object_id)
        self.lower.outbox.actions.clear()

    # --- assignments ----------------------------------------

    @rule(home=st.integers(1, 2), name=st.sampled_from((b"1", b"1", b"2", b"n")),
          takes=st.lists(st.sampled_from(("inline", "copy", "copy", "asked", "same")), max_size=3))
    def is_assigned(self, home: int, name: bytes, takes: list[str]) -> None:
        task_id = self.lower.task_id(home=home)
        self.assign(home, task_id, 0, name, takes)

    def assign(
        self, home: int, task_id: bytes, attempt: int, name: bytes, takes: list[str]
    ) -> None:
        deps: list[bytes | m.Remote] = []
        dep_ids = b""
        for how in takes:
            if how == "same" and not self.objects:
                continue
            object_id = (self.objects[-1] if how == "same"
                         else self.lower.task_id(home=3) + ids.FIRST_RETURN)
            if how != "inline":
                self.objects.append(object_id)
            dep_ids += object_id
            deps.append({"inline": VALUE, "asked": b""}.get(how, m.Remote(LARGE, (3,))))
        self.attempts[task_id] = attempt
        self.executor.assigned(home, m.Assign(
            task_id, name * 16, attempt, b"", tuple(deps), dep_ids))
        self.take()

    @precondition(lambda self: self.pulls)
    @rule(data=st.data())
    def copy_arrives(self, data: st.DataObject) -> None:
        object_id = data.draw(st.sampled_from(self.pulls))
        self.pulls.remove(object_id)
        where = m.Located(1, self.place % self.segment_nbytes, LARGE)
        self.place += LARGE
        self.lower.memory.used(where)
        self.lower.directory.pulled(object_id, where)
        self.take()

    @precondition(lambda self: self.pulls)
    @rule(data=st.data())
    def there_is_no_room(self, data: st.DataObject) -> None:
        object_id = data.draw(st.sampled_from(self.pulls))
        self.pulls.remove(object_id)
        self.lower.directory.pull_failed(object_id, NO_ROOM)
        self.take()

    @precondition(lambda self: self.objects)
    @rule(data=st.data(), inline=st.booleans())
    def home_tells(self, data: st.DataObject, inline: bool) -> None:
        """Of what was asked for: its value, or where it is."""
        object_id = data.draw(st.sampled_from(self.objects))
        self.lower.directory.object_ready(object_id, VALUE if inline else m.Remote(LARGE, (3,)))
        self.take()

    # --- running ----------------------------------------

    @precondition(lambda self: self.lower.queued)
    @rule()
    def is_started(self) -> None:
        task = self.lower.queued.pop(0)
        if self.lower.tables.tasks.get(task.task_id) is not task:
            return  # cancelled
        if task.dep_count and not self.executor.fetch(task):
            assert task.state is FETCHING
            self.take()
            return
        self.worker += 1
        self.lower.tables.clients[self.worker] = ClientRecord(self.worker)
        run = self.executor.run_message(task, self.worker, (), False)
        assert len(run.deps) == task.dep_count and run.attempt == task.attempt
        for dep in run.deps:
            assert type(dep) is m.Located or dep in (VALUE, values.pack_failure(NO_ROOM))
        self.running[self.worker] = task
        self.take()

    def a_worker(self) -> tuple[ClientRecord, TaskRecord]:
        number, task = next(iter(self.running.items()))
        return self.lower.tables.clients[number], task

    @precondition(lambda self: self.running)
    @rule(how=st.sampled_from(("value", "value", "raised", "retry")), keeps=st.booleans())
    def it_ends(self, how: str, keeps: bool) -> None:
        """Its worker may have kept a ref: the home of that is told before the task's."""
        client, task = self.a_worker()
        if keeps:
            record = self.lower.directory.hold(self.lower.task_id(home=3) + ids.FIRST_RETURN)
            client.held.add(record.object_id)
            client.add_barrier = self.lower.directory.announce(record)
        if how != "value":
            self.executor.failed(client, m.Failed(
                task.task_id, task.attempt, 5, ERROR, how == "retry"))
        elif task.template.return_count == 1:
            self.executor.done(client, m.Done(task.task_id, task.attempt, 5, VALUE))
        else:
            self.executor.done_many(client, m.DoneMany(
                task.task_id, task.attempt, 5, (m.Return(VALUE),) * 2))
        self.take()
        before = dict(self.attempts)
        self.executor.done(client, m.Done(task.task_id, task.attempt, 5, VALUE))
        self.take()
        assert self.attempts == before, "a worker speaks of what it runs, or is not heard"
        self.forget(client)

    def forget(self, client: ClientRecord) -> None:
        del self.lower.tables.clients[client.number]
        self.lower.directory.forget_client(client)
        self.take()

    @precondition(lambda self: self.running)
    @rule(started=st.booleans())
    def its_worker_dies(self, started: bool) -> None:
        client, task = self.a_worker()
        del self.running[client.number]
        self.executor.worker_died(task, DIED, started=started)
        self.forget(client)

    @precondition(lambda self: self.running)
    @rule()
    def it_is_taken_back(self) -> None:
        client, task = self.a_worker()
        del self.running[client.number]
        self.executor.unrun(task)
        assert not client.pins, "pins of what was not read"
        if task.cancelled:
            self.executor.drop_cancelled(task)
        else:
            self.lower.queued.insert(0, task)
        self.forget(client)

    # --- those that never run ----------------------------------------

    def waiting(self) -> list[TaskRecord]:
        return [task for task in self.lower.queued
                if self.lower.tables.tasks.get(task.task_id) is task]

    @precondition(lambda self: self.waiting())
    @rule(refused=st.booleans())
    def goes_back(self, refused: bool) -> None:
        task = self.waiting()[-1]
        self.lower.queued.remove(task)
        if refused:
            self.executor.refuse(task, "no worker could be started")
        else:
            self.executor.give_back(task)
        self.take()

    @precondition(lambda self: self.lower.tables.tasks)
    @rule(force=st.booleans(), data=st.data())
    def is_recalled(self, force: bool, data: st.DataObject) -> None:
        tasks = self.lower.tables.tasks
        task = tasks[data.draw(st.sampled_from(sorted(tasks)))]
        self.executor.recalled(m.RecallTask(task.task_id, force, False))
        killed = KillWorker(task.worker) in self.lower.outbox.actions
        assert (task.task_id in tasks) == (task.state is RUNNING)
        assert killed == (force and task.state is RUNNING)
        self.take()

    @precondition(lambda self: self.unacknowledged)
    @rule()
    def holder_is_known(self) -> None:
        self.lower.directory.holders.acknowledged(*self.unacknowledged.popleft())
        self.take()

    # --- what holds ----------------------------------------

    def absent(self, task: TaskRecord) -> list[bytes]:
        """What it takes and is not here."""
        return [object_id for object_id, value in zip(
            ids.split_ids(task.refs), task.values, strict=True)
            if value is None and not is_here(self.lower.tables.objects[object_id])]

    @invariant()
    def holds(self) -> None:
        self.executor.validate()
        self.lower.directory.validate()
        for task_id, task in self.lower.tables.tasks.items():
            assert self.attempts[task_id] == task.attempt
            if task.state is FETCHING:
                assert task.missing == len(self.absent(task)) > 0
            else:
                assert not task.missing and task.state in (QUEUED, RUNNING)

    def teardown(self) -> None:
        """In the end all is run, and nothing is held here for it."""
        while self.lower.tables.tasks:
            while self.pulls:
                object_id = self.pulls.pop()
                self.lower.directory.pull_failed(object_id, NO_ROOM)
                self.take()
            for task in self.lower.tables.tasks.values():
                if task.state is FETCHING:
                    self.lower.directory.object_ready(self.absent(task)[0], VALUE)
                    break
            self.take()
            while self.waiting():
                self.is_started()
            while self.running:
                self.it_ends("value", keeps=False)
        while self.unacknowledged:
            self.holder_is_known()
        self.holds()
        assert not self.attempts
        held = [record for record in self.lower.tables.objects.values() if record.count]
        assert not held


TestExecutor = ExecutorMachine.TestCase


def test_what_leaves_while_it_fetches_is_not_counted_down_by_what_comes() -> None:
    """A call whose host has died is fetched anew where it goes."""
    lower = Lower()
    template = lower.template(b"m", m.METHOD)
    absent = lower.task_id(home=3) + ids.FIRST_RETURN
    record = lower.directory.hold(absent)
    lower.directory.object_ready(absent, m.Remote(LARGE, (3,)))
    message = m.SubmitCall(lower.task_id(), b"m" * 16, lower.actor_id(), b"", absent, 1)
    call = lower.tasks.register_call(lower.tables.clients[0], message, template)
    move(call, READY)
    assert not lower.executor.fetch(call)
    lower.executor.stop_fetching(call)
    lower.directory.object_ready(absent, VALUE)
    assert is_here(record) and call.missing == 0
