"""Hosts: AC-2, and that every call is answered once, in order, before the end of the actor is told.

Callers, homes and the worker are played. The acknowledgements of holders come when they like: what
waits for them must not be overtaken.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpcray.node.actor_hosts import ActorHosts
from hpcray.node.dispatch import Dispatcher
from hpcray.node.ledger import ResourceLedger
from hpcray.node.outbox import KillWorker
from hpcray.node.records import TaskRecord, Worker
from hpcray.node.states import move
from hpcray.node.tables import unwired
from hpcray.node.task_states import RUN, SEND
from hpcray.node.tasks import Binder
from hpcray.protocol import ids, values
from hpcray.protocol import messages as m

from .lower import Lower

HOME = 1
DIED = values.Failure("WorkerCrashedError", "the worker died")


class HostsMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.lower = lower = Lower()
        self.dispatcher = Dispatcher(
            lower.tables, lower.outbox, ResourceLedger({"CPU": 4 * m.UNIT}), lower.executor, set())
        self.hosts = ActorHosts(
            lower.tables, lower.outbox, lower.directory, lower.tasks, lower.executor,
            self.dispatcher)
        self.hosts.say = lambda rank, message: lower.outbox.peers[rank].append(message)
        self.hosts.say_last = lower.directory.holders.release_last
        self.hosts.call_returned = lambda task: self.came_back(task, "TaskReturned")
        tasks = lower.tasks
        tasks.binders[m.METHOD] = Binder(
            ready=unwired, again=unwired, returned=unwired, refused=tasks.fail,
            crashed=tasks.run_crashed, cancelled=self.hosts.go_on, over=self.is_over,
            resend=lambda task: self.came_back(task, "TaskCrashed"))
        lower.executor.runners[m.METHOD] = self.hosts.runner()
        lower.executor.runners[m.ACTOR_CREATION] = self.hosts.creation_runner()
        lower.template(b"c", m.ACTOR_CREATION, resources=(("CPU", m.UNIT),), max_restarts=-1)
        lower.template(b"m", m.METHOD, max_retries=-1)
        lower.template(b"u", m.METHOD, unordered=True)
        self.actor_id = lower.actor_id(HOME)
        self.incarnation = -1
        self.worker = 2  # the number of the last one
        self.reset()

    def reset(self) -> None:
        """Of an incarnation."""
        self.calls: list[bytes] = []  # in the order they came
        self.caller: dict[bytes, tuple[int, int]] = {}
        self.unordered: set[bytes] = set()
        self.has: deque[bytes] = deque()  # the worker, oldest first
        self.given: set[bytes] = set()  # it had them
        self.crashed: set[bytes] = set()
        self.late: set[bytes] = set()  # they came when it was dead
        self.answered: dict[bytes, str] = {}
        self.told_down = False
        self.unacknowledged: deque[Any] = deque()
        self.absent: list[bytes] = []  # objects that calls fetch

    # --- what leaves ----------------------------------------

    def take(self) -> None:
        self.hosts.end_turn()
        outbox = self.lower.outbox
        for worker, run in outbox.tasks:
            assert worker == self.worker
            for message in run:
                if type(message) is m.Run:
                    self.handed_over(message.task_id)
        outbox.tasks.clear()
        outbox.actions.clear()
        self.lower.directory.end_turn()
        for rank in (1, 2, 3):
            for message in outbox.peers.pop(rank, []):
                self.left(rank, message)
        assert not self.told_down or set(self.answered) >= set(self.calls) - self.late, (
            "the end comes last")

    def left(self, rank: int, message: Any) -> None:
        kind = type(message)
        if kind is m.HolderAdd:
            self.unacknowledged.append((rank, message.turn))
        elif kind in (m.TaskDone, m.TaskCrashed, m.TaskReturned, m.TaskFailed):
            self.answer(message.task_id, kind.__name__, rank)
        elif kind is m.ActorDown:
            assert rank == HOME and message.incarnation == self.incarnation
            assert all(task_id in self.answered for task_id, (home, _) in self.caller.items()
                       if home in (0, HOME)), "the end comes last"
            self.told_down = True

    def answer(self, task_id: bytes, how: str, rank: int) -> None:
        if task_id not in self.caller:
            return  # the creation
        assert self.caller[task_id][0] == rank
        assert task_id not in self.answered, "once"
        self.answered[task_id] = how
        if not self.lives and task_id not in self.unordered:
            mine = self.caller[task_id]
            assert all(c in self.answered for c in self.calls[: self.calls.index(task_id)]
                       if self.caller[c] == mine and c not in self.unordered), "in order"
        assert task_id not in self.crashed or how in ("TaskCrashed", "over")

    def handed_over(self, task_id: bytes) -> None:
        mine = self.caller[task_id]
        before = [c for c in self.calls[: self.calls.index(task_id)]
                  if self.caller[c] == mine and c not in self.unordered]
        assert task_id in self.unordered or all(c in self.given for c in before), "in order"
        self.has.append(task_id)
        self.given.add(task_id)

    def came_back(self, task: TaskRecord, how: str) -> None:
        """A call of this node."""
        del self.lower.tables.tasks[task.task_id]
        self.answer(task.task_id, how, 0)

    def is_over(self, task: TaskRecord) -> None:
        self.answer(task.task_id, "over", 0)

    # --- the actor ----------------------------------------

    @property
    def lives(self) -> bool:
        return self.actor_id in self.hosts.hosted

    @property
    def takes_calls(self) -> bool:
        """Its home knows that it is there."""
        return self.lives and self.hosts.hosted[self.actor_id].alive

    @precondition(lambda self: not self.lives and (self.incarnation < 0 or self.told_down))
    @rule()
    def is_being_created(self) -> None:
        self.reset()
        self.incarnation += 1
        self.worker += 1
        self.lower.tables.workers[self.worker] = Worker(self.worker, False)
        self.lower.tables.clients[self.worker] = self.lower.tables.clients[0].__class__(self.worker)
        self.lower.executor.assigned(HOME, m.Assign(
            ids.creation_task_id(self.actor_id), b"c" * 16, self.incarnation, b""))
        self.creation = self.lower.queued.pop()
        move(self.creation, RUN)
        self.creation.worker = self.worker
        self.dispatcher.ledger.acquire((("CPU", m.UNIT),))
        self.lower.tables.workers[self.worker].shape = (("CPU", m.UNIT),)
        self.hosts.creating(self.creation, self.worker, ())

    @precondition(lambda self: self.lives and self.creation.task_id in self.lower.tables.tasks)
    @rule()
    def is_created(self) -> None:
        self.lower.executor.done(self.lower.tables.clients[self.worker], m.Done(
            self.creation.task_id, self.incarnation, 5, b"\0none"))
        self.take()

    @precondition(lambda self: self.takes_calls)
    @rule(caller=st.integers(0, 3), number=st.integers(0, 1), unordered=st.booleans(),
          fetches=st.sampled_from((False, False, True)))
    def call(self, caller: int, number: int, unordered: bool, fetches: bool) -> None:
        name = b"u" if unordered else b"m"
        task_id = self.lower.task_id(number, caller)
        if unordered:
            self.unordered.add(task_id)
        self.calls.append(task_id)
        self.caller[task_id] = (caller, number)
        if caller:
            object_id = self.lower.task_id(0, 3) + ids.FIRST_RETURN
            self.hosts.call_assigned(caller, m.AssignCall(
                task_id, name * 16, 0, self.actor_id, self.incarnation, number, b"",
                (b"",) if fetches else (), object_id if fetches else b""))
            if fetches:
                self.absent.append(object_id)
        else:
            self.call_from_here(task_id, number, name)
        self.take()

    def call_from_here(self, task_id: bytes, number: int, name: bytes) -> None:
        task = self.lower.tasks.register_call(
            self.lower.tables.clients[number],
            m.SubmitCall(task_id, name * 16, self.actor_id, b""),
            self.lower.tables.templates[name * 16])
        move(task, SEND)
        task.rank = 0
        task.incarnation = self.incarnation
        assert self.hosts.accept(task)

    @precondition(lambda self: self.absent)
    @rule()
    def arrives(self) -> None:
        """The object that was asked for last."""
        object_id = self.absent.pop()
        self.lower.directory.object_ready(object_id, b"\0value")
        self.take()

    @precondition(lambda self: self.has and self.lives)
    @rule(holds=st.booleans(), run_us=st.sampled_from((5, 5000)))
    def finishes(self, holds: bool, run_us: int) -> None:
        """The oldest call. Its worker may have kept a ref: its home is told first."""
        task_id = self.has.popleft()
        client = self.lower.tables.clients[self.worker]
        if holds:
            object_id = self.lower.task_id(0, 2) + ids.FIRST_RETURN
            record = self.lower.directory.hold(object_id)
            client.add_barrier = self.lower.directory.announce(record)
        self.lower.executor.done(client, m.Done(task_id, 0, run_us, b"\0value"))
        self.take()

    @precondition(lambda self: self.unacknowledged)
    @rule()
    def acknowledged(self) -> None:
        self.lower.directory.holders.acknowledged(*self.unacknowledged.popleft())
        self.take()

    @precondition(lambda self: self.lives)
    @rule(kill=st.booleans(), restarts=st.booleans())
    def is_stopped(self, kill: bool, restarts: bool) -> None:
        self.hosts.stop(HOME, m.ActorStop(self.actor_id, self.incarnation, kill, restarts))
        assert not kill or KillWorker(self.worker) in self.lower.outbox.actions
        self.take()

    @precondition(lambda self: self.lives)
    @rule()
    def worker_dies(self) -> None:
        alive = self.hosts.hosted[self.actor_id].alive
        self.crashed.update(self.has)
        self.has.clear()
        self.hosts.worker_gone(self.actor_id, self.worker, DIED)
        del self.lower.tables.workers[self.worker]
        del self.lower.tables.clients[self.worker]
        if not alive:
            # As the dispatcher does, which knows the creation task. Its calls are told by nobody.
            self.lower.executor.worker_died(self.creation, DIED, started=True)
            self.told_down = True
        self.take()

    @precondition(lambda self: not self.lives and self.incarnation >= 0)
    @rule(caller=st.integers(1, 3))
    def call_comes_late(self, caller: int) -> None:
        """It goes back as well, behind what has crashed."""
        task_id = self.lower.task_id(0, caller)
        self.calls.append(task_id)
        self.caller[task_id] = (caller, 0)
        self.late.add(task_id)
        self.hosts.call_assigned(caller, m.AssignCall(
            task_id, b"m" * 16, 0, self.actor_id, self.incarnation, 0, b""))
        self.take()

    @invariant()
    def holds(self) -> None:
        self.hosts.validate()
        self.lower.tasks.validate()
        self.lower.executor.validate()

    def teardown(self) -> None:
        if self.lives:
            self.worker_dies()
        while self.unacknowledged:
            self.acknowledged()
        assert set(self.answered) == set(self.calls)
        assert self.told_down or self.incarnation < 0
        self.holds()
        assert not self.lower.tables.tasks
        assert not self.hosts.hosted


TestHosts = HostsMachine.TestCase


def dead_with_a_ref_in_doubt() -> HostsMachine:
    """The worker had just kept a ref whose home does not know yet, and more calls than it could
    begin."""
    play = HostsMachine()
    play.is_being_created()
    play.is_created()
    play.call(1, 0, unordered=False, fetches=False)
    for _ in range(6):
        play.call(2, 0, unordered=False, fetches=False)
    play.finishes(holds=True, run_us=5000)
    play.worker_dies()
    assert 0 < len(play.crashed) < 6 and not play.answered and not play.told_down
    return play


def test_calls_that_had_not_begun_go_back_behind_those_that_crashed() -> None:
    play = dead_with_a_ref_in_doubt()
    play.acknowledged()
    assert [play.answered[task_id] for task_id in play.calls] == [
        "TaskDone", *["TaskCrashed"] * len(play.crashed),
        *["TaskReturned"] * (6 - len(play.crashed))]
    assert play.told_down
    play.teardown()


def test_a_call_that_comes_too_late_goes_back_behind_them_too() -> None:
    play = dead_with_a_ref_in_doubt()
    play.call_comes_late(2)
    assert not play.answered
    play.teardown()


def test_a_cancelled_call_that_its_caller_could_not_send_has_an_outcome() -> None:
    """The caller handed it to the worker itself, or so it said."""
    play = HostsMachine()
    play.is_being_created()
    play.is_created()
    lower, task_id = play.lower, play.lower.task_id()
    play.calls.append(task_id)
    play.caller[task_id] = (0, 0)
    task = lower.tasks.register_call(
        lower.tables.clients[0], m.SubmitCall(task_id, b"m" * 16, play.actor_id, b""),
        lower.tables.templates[b"m" * 16])
    assert not play.hosts.accept_called(task, play.worker + 1), "another worker"
    assert play.hosts.accept_called(task, play.worker)
    task.rank = 0
    assert lower.tasks.cancel(task_id, force=False, recursive=False) == "interrupted"
    play.hosts.call_unsent(task_id)
    assert play.answered == {task_id: "over"}
    play.holds()
    play.teardown()
