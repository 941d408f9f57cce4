"""Tasks at their home: TK-1 and TK-2, one outcome each, and nothing from another attempt counts.

Executors are played: what is assigned to a rank is answered once, in any order; and what has been
answered is, at times, spoken of again.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpcray.node.records import READY, TaskRecord
from hpcray.node.states import move
from hpcray.node.tables import unwired
from hpcray.node.task_states import QUEUED, RUN, SEND
from hpcray.node.tasks import Binder
from hpcray.protocol import ids, values
from hpcray.protocol import messages as m

from .lower import Lower

DIED = values.Failure("WorkerCrashedError", "the worker died")
ERROR = bytes((values.ERROR,)) + b"error"
VALUE = bytes((values.PLAIN,)) + b"value"
WORKER = 2
LARGE = 1 << 20
HOW = ("value", "value", "large", "raised", "large error", "retry", "crashed", "unstarted",
       "returned")
# name: options; each may crash so often
TEMPLATES: dict[bytes, dict[str, Any]] = {
    b"0": {}, b"1": {"max_retries": 1}, b"9": {"max_retries": -1},
    b"e": {"max_retries": 2, "retry_exceptions": True}, b"2": {"return_count": 2}}


def answer(assign: m.Assign, how: str, count: int) -> Any:
    """What an executor says of it."""
    task_id, attempt = assign.task_id, assign.attempt
    if how == "value" and count == 1:
        return m.TaskDone(task_id, attempt, 7, VALUE)
    if how in ("value", "large"):
        small, large = m.PeerReturn(VALUE), m.PeerReturn(b"", LARGE)
        return m.TaskDoneMany(task_id, attempt, 7, (large if how == "large" else small,) * count)
    if how == "large error" and count == 1:
        return m.TaskFailed(task_id, attempt, 7, b"", False, LARGE)
    if how in ("raised", "large error", "retry"):
        return m.TaskFailed(task_id, attempt, 7, ERROR, how == "retry")
    if how == "returned":
        return m.TaskReturned(task_id, attempt)
    return m.TaskCrashed(task_id, attempt, DIED, how == "crashed")


class HomeMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.lower = lower = Lower()
        self.over: Counter[bytes] = Counter()  # outcomes delivered
        for name, options in TEMPLATES.items():
            lower.template(name, m.TASK, **options)
        self.submitted: dict[bytes, m.Template] = {}
        self.runs: Counter[bytes] = Counter()  # that began, and failed by no fault of the task
        self.objects: list[bytes] = []  # that tasks wait for
        self.there: list[tuple[int, m.Assign]] = []
        self.past: list[tuple[int, m.Assign]] = []  # answered
        self.recalled: set[bytes] = set()
        self.copies: set[tuple[int, bytes]] = set()  # that executors keep, one of each object

    @property
    def records(self) -> dict[bytes, TaskRecord]:
        return self.lower.tables.tasks

    def take(self) -> None:
        for rank in range(1, 4):
            for message in self.lower.said_to(rank):
                if type(message) is m.Assign:
                    seen = {(a.task_id, a.attempt) for _, a in (*self.there, *self.past)}
                    assert (message.task_id, message.attempt) not in seen, "numbers are used once"
                    self.there.append((rank, message))
                elif type(message) is m.RecallTask:
                    self.recalled.add(message.task_id)
                elif type(message) is m.FreeCopies:
                    for object_id in ids.split_ids(message.ids):
                        self.copies.remove((rank, object_id))

    # --- submission ----------------------------------------

    @rule(name=st.sampled_from(sorted(TEMPLATES)), waits=st.integers(0, 2), takes=st.integers(0, 1))
    def submit(self, name: bytes, waits: int, takes: int) -> None:
        refs = b"".join(self.lower.pending_object() for _ in range(waits + takes))
        made = ids.split_ids(refs)
        self.objects += made[:waits]
        client = self.lower.tables.clients[0]
        task_id = self.lower.task_id()
        self.submitted[task_id] = self.lower.tables.templates[name * 16]
        self.lower.tasks.submit(client, m.SubmitTask(task_id, name * 16, b"", refs, waits))
        for object_id in made:
            self.lower.directory.release(object_id)  # the task holds them

    @precondition(lambda self: self.objects)
    @rule(data=st.data())
    def make(self, data: st.DataObject) -> None:
        object_id = data.draw(st.sampled_from(self.objects))
        self.objects.remove(object_id)
        self.lower.directory.resolve_inline(object_id, VALUE)
        self.take()

    @precondition(lambda self: self.lower.queued)
    @rule(rank=st.integers(0, 3))
    def bind(self, rank: int) -> None:
        task = self.lower.queued.pop(0)
        if task.cancelled:
            return  # the dispatcher skips them
        assert self.records[task.task_id] is task and task.state is QUEUED and not task.missing
        if rank:
            self.lower.tasks.assign(task, rank)
            self.take()
        else:
            move(task, RUN)
            task.worker = WORKER

    # --- outcomes ----------------------------------------

    @precondition(lambda self: self.there)
    @rule(how=st.sampled_from(HOW), data=st.data())
    def executor_answers(self, how: str, data: st.DataObject) -> None:
        rank, assign = data.draw(st.sampled_from(self.there))
        self.there.remove((rank, assign))
        self.past.append((rank, assign))
        self.hear(rank, assign, how)

    @precondition(lambda self: self.past)
    @rule(how=st.sampled_from(HOW), rank=st.integers(0, 3), data=st.data())
    def something_else_is_said(self, how: str, rank: int, data: st.DataObject) -> None:
        """Of an attempt that is over, or by another rank: nothing comes of it, and of a large value
        its executor is told to free it."""
        said_by, assign = data.draw(st.sampled_from(self.past + self.there))
        current = (said_by, assign) in self.there
        rank = rank or said_by
        if current and rank == said_by:
            return
        before = {task_id: (task.attempt, task.state, task.rank)
                  for task_id, task in self.records.items()}
        was = [record and record.state for record in self.returns(assign.task_id)]
        self.hear(rank, assign, how)
        assert before == {task_id: (task.attempt, task.state, task.rank)
                          for task_id, task in self.records.items()}
        assert was == [record and record.state for record in self.returns(assign.task_id)]

    def hear(self, rank: int, assign: m.Assign, how: str) -> None:
        template = self.submitted[assign.task_id]
        message = answer(assign, how, template.return_count)
        large = [index for index, one in enumerate(getattr(message, "returns", ())) if one.nbytes]
        if getattr(message, "nbytes", 0):
            large = [0]
        for index in large:
            self.copies.add((rank, ids.return_id(assign.task_id, index)))
        if type(message) is m.TaskCrashed and message.started:
            task = self.records.get(assign.task_id)
            if task is not None and task.attempt == assign.attempt and task.rank == rank:
                self.runs[assign.task_id] += 1
        tasks = self.lower.tasks
        {m.TaskDone: tasks.peer_done, m.TaskDoneMany: tasks.peer_done_many,
         m.TaskFailed: tasks.peer_failed, m.TaskCrashed: tasks.peer_crashed,
         m.TaskReturned: tasks.peer_returned}[type(message)](rank, message)
        self.take()

    def here(self) -> list[TaskRecord]:
        return [task for task in self.records.values() if task.worker == WORKER]

    @precondition(lambda self: self.here())
    @rule(how=st.sampled_from(("value", "raised", "retry", "crashed", "unstarted")))
    def it_ends_here(self, how: str) -> None:
        task = self.here()[0]
        task.worker = -1
        tasks = self.lower.tasks
        if how == "value":
            tasks.complete_many(task, (m.Return(VALUE),) * task.template.return_count)
        elif how in ("raised", "retry"):
            tasks.raised(task, ERROR, how == "retry")
        else:
            self.runs[task.task_id] += how == "crashed"
            tasks.crashed(task, DIED, started=how == "crashed")
        self.take()

    @precondition(lambda self: self.records)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        task = self.records[data.draw(st.sampled_from(sorted(self.records)))]
        if task.worker == WORKER:
            return  # of what runs here: test_executor.py
        how = self.lower.tasks.cancel(task.task_id, force=False, recursive=False)
        self.take()
        assert how in ("queued", "elsewhere")
        assert (task.task_id in self.records) == (how == "elsewhere")
        assert how == "queued" or task.task_id in self.recalled

    # --- what holds ----------------------------------------

    def returns(self, task_id: bytes) -> list[Any]:
        count = self.submitted[task_id].return_count
        return [self.lower.tables.objects.get(ids.return_id(task_id, i)) for i in range(count)]

    @invariant()
    def holds(self) -> None:
        self.lower.tasks.validate()
        for task_id, template in self.submitted.items():
            for record in self.returns(task_id):
                assert (record.state is READY) == (task_id not in self.records), "one outcome"
            if template.max_retries >= 0 and not template.retry_exceptions:
                assert self.runs[task_id] <= template.max_retries + 1
            if task_id in self.records:
                where = [rank for rank, a in self.there if a.task_id == task_id]
                assert len(where) <= 1 and self.records[task_id].rank == (where or [-1])[0]

    def teardown(self) -> None:
        """In the end every task gets its value, and all that is left are the values; and when they
        are dropped, nothing."""
        while self.objects:
            self.lower.directory.resolve_inline(self.objects.pop(), VALUE)
        while self.records:
            self.take()
            while self.lower.queued:
                self.bind(1)
            for rank, assign in self.there:
                self.hear(rank, assign, "value")
            self.past, self.there = self.past + self.there, []
            while self.here():
                self.it_ends_here("value")
        self.holds()
        self.lower.directory.forget_client(self.lower.tables.clients[0])
        self.take()
        assert not self.lower.tables.objects
        assert not self.copies, "what executors keep is freed, once"


TestHome = HomeMachine.TestCase


def running_elsewhere() -> tuple[HomeMachine, m.Assign]:
    play = HomeMachine()
    play.submit(b"9", 0, 0)
    play.bind(1)
    return play, play.there[0][1]


def test_a_large_value_of_another_attempt_is_freed_and_not_used() -> None:
    play, first = running_elsewhere()
    play.there.clear()
    play.hear(1, first, "crashed")
    play.bind(2)
    play.hear(1, first, "large")
    assert first.task_id in play.records
    assert not play.copies
    play.hear(2, play.there[0][1], "large")
    assert first.task_id not in play.records
    assert play.copies == {(2, first.task_id + ids.FIRST_RETURN)}


def test_only_a_plain_task_that_is_over_elsewhere_gives_a_slot_back() -> None:
    """Calls and actors that are created there hold no slot of a lease."""
    lower = Lower()
    told: list[bytes] = []
    lower.tasks.over_elsewhere = lambda rank, task: told.append(task.task_id)
    lower.tasks.binders[m.METHOD] = Binder(
        ready=unwired, resend=unwired, again=unwired, returned=unwired, crashed=unwired,
        refused=lower.tasks.fail)
    client = lower.tables.clients[0]
    lower.template(b"f", m.TASK)
    call, actor_id, task_id = lower.task_id(), lower.actor_id(), lower.task_id()
    task = lower.tasks.register_call(
        client, m.SubmitCall(call, b"m" * 16, actor_id, b""), lower.template(b"m", m.METHOD))
    move(task, SEND)
    task.rank = 1
    lower.tasks.submit(client, m.SubmitTask(task_id, b"f" * 16, b""))
    lower.tasks.assign(lower.queued.pop(), 1)
    for one in (call, task_id):
        lower.tasks.peer_done(1, m.TaskDone(one, 0, 5, VALUE))
    assert told == [task_id]
    assert not lower.tables.tasks
