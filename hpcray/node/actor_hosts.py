"""Actors at their host: calls go to the worker in order, in batches, and each is answered. Pure.

    creating --> [constructor runs] --> alive --worker gone--> every call told, then the home
    a call --> blocked (what it needs, or a call before it, is on its way) --> calls
           --end of turn--> in flight (the worker has it) --> outcome

When the worker is gone, the calls in flight have crashed, and the others go back, in the order in
which they came; the home hears of the end after all of them. So a restart meets no call of ours.

Invariants, checked by `validate`:

AC-2  a hosted actor's calls in flight are RUNNING on its worker, the others are not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import chain
from typing import Any

from hpcray.node.actor_records import Hosted, class_name, killed_failure, turn_of
from hpcray.node.directory import Directory
from hpcray.node.dispatch import Dispatcher
from hpcray.node.executor import Executor, Runner
from hpcray.node.outbox import Outbox
from hpcray.node.records import TaskRecord
from hpcray.node.states import move
from hpcray.node.tables import Tables, unwired
from hpcray.node.task_states import CALL_FETCHED, CALLED, FETCHING, RETURNED, RUNNING, UNSENT
from hpcray.node.tasks import Tasks
from hpcray.protocol import values
from hpcray.protocol.messages import (
    ActorAt,
    ActorDown,
    ActorStop,
    AssignCall,
    TaskCrashed,
    TaskReturned,
)

# Calls in a datagram, if they are short. More gains nothing.
_BATCH_MAX = 16
_BATCH_BYTES = 96 * 1024
# Calls given to a sequential actor's worker ahead of their turn: enough to keep it busy.
_AHEAD_SHORT = 64
_AHEAD_LONG = 4


class ActorHosts:
    def __init__(
        self, tables: Tables, outbox: Outbox, directory: Directory, tasks: Tasks,
        executor: Executor, dispatcher: Dispatcher,
    ) -> None:
        self._outbox = outbox
        self._holders = directory.holders
        self._tasks = tasks
        self._executor = executor
        self._dispatcher = dispatcher
        self._rank = tables.rank
        self._records = tables.tasks
        self._workers = tables.workers
        self._templates = tables.templates
        self._statistics = tables.statistics
        self.hosted = tables.hosted
        # Those that can be given calls at the end of the turn.
        self.pump: dict[bytes, Hosted] = {}
        # A message for the node of an actor's home, which may be this one.
        self.say: Callable[[int, Any], None] = unwired
        # The same, behind what has been told of a worker that is dead.
        self.say_last: Callable[[int, Any], None] = unwired
        # A call of this node was not started, and has to be sent again.
        self.call_returned: Callable[[TaskRecord], None] = unwired

    def runner(self) -> Runner:
        """Of calls."""
        return Runner(
            fetched=self.call_fetched, over=self.call_over, raised=self.call_over,
            cancelled=self.go_on)

    def creation_runner(self) -> Runner:
        return Runner(
            fetched=self._dispatcher.fetched, over=self.created, raised=self.constructor_raised)

    # --- creation ---------------------------------------------------------------------------------

    def creating(self, task: TaskRecord, worker: int, devices: tuple[int, ...]) -> None:
        """The dispatcher has given the creation task to a worker: the actor's from now on."""
        self.hosted[task.actor_id] = Hosted(task, worker, devices)

    def constructor_raised(self, task: TaskRecord) -> None:
        """In our worker, which exits by itself."""
        hosted = self.hosted.pop(task.actor_id, None)
        if hosted is not None:
            self._dispatcher.actor_failed(hosted.worker)

    def created(self, task: TaskRecord) -> None:
        """The constructor has returned."""
        hosted = self.hosted.get(task.actor_id)
        if hosted is None:
            return
        hosted.alive = True
        held = hosted.template.held_resources
        self._dispatcher.actor_holds(
            hosted.worker, hosted.template.resources if held is None else held)
        self.say(hosted.home, ActorAt(
            hosted.actor_id, hosted.incarnation, self._workers[hosted.worker].pid))
        if hosted.calls:
            self.pump[task.actor_id] = hosted

    # --- calls that come --------------------------------------------------------------------------

    def call_assigned(self, rank: int, message: AssignCall) -> None:
        """From a route elsewhere."""
        hosted = self.hosted.get(message.actor_id)
        if hosted is None or hosted.incarnation != message.incarnation:
            # Behind the crashes of that incarnation: who is told of a return sends it again.
            self._holders.release_last(rank, TaskReturned(message.task_id, message.attempt))
            return
        task = self._executor.foreign(rank, message, self._templates[message.template_id])
        task.actor_id = message.actor_id
        task.client = message.caller
        task.incarnation = message.incarnation
        self._accept(hosted, task)

    def accept(self, task: TaskRecord) -> bool:
        """From a route here. False: this incarnation is not here (any more)."""
        hosted = self.hosted.get(task.actor_id)
        if hosted is None or hosted.incarnation != task.incarnation:
            return False
        if task.dep_count or hosted.blocked:
            self._accept(hosted, task)
        else:
            hosted.calls.append(task)
            self.pump[hosted.actor_id] = hosted
        return True

    def _accept(self, hosted: Hosted, task: TaskRecord) -> None:
        if hosted.blocked and turn_of(task) in hosted.blocked:
            hosted.blocked[turn_of(task)].append(task)
            if task.dep_count:
                self._executor.fetch(task)
            return
        if task.dep_count and not self._executor.fetch(task):
            hosted.blocked[turn_of(task)] = deque((task,))
            return
        hosted.calls.append(task)
        self.pump[hosted.actor_id] = hosted

    def call_fetched(self, task: TaskRecord) -> None:
        """All that it needs is here."""
        move(task, CALL_FETCHED)
        self.go_on(task)

    def go_on(self, task: TaskRecord) -> None:
        """What it needs is here, or it is cancelled: it and those behind it may go."""
        hosted = self.hosted.get(task.actor_id)
        if hosted is None:
            return
        queue = hosted.blocked.get(turn_of(task))
        while queue and (queue[0].missing == 0 or queue[0].cancelled):
            hosted.calls.append(queue.popleft())  # cancelled ones are skipped there
        if not queue:
            hosted.blocked.pop(turn_of(task), None)
        self.pump[hosted.actor_id] = hosted

    # --- calls that their caller sends to the worker itself ---------------------------------------

    def accept_called(self, task: TaskRecord, worker: int) -> bool:
        """`worker` has it, or will: its caller believes that the actor lives there. False: it does
        not, or not any more."""
        hosted = self.hosted.get(task.actor_id)
        if hosted is None or hosted.worker != worker:
            return False
        move(task, CALLED)
        task.worker = worker
        task.incarnation = hosted.incarnation
        hosted.in_flight[task.task_id] = task
        return True

    def call_unsent(self, task_id: bytes) -> None:
        """The caller could not send it: we do."""
        task = self._records.get(task_id)
        hosted = None if task is None else self.hosted.get(task.actor_id)
        if task is not None and hosted is not None and task_id in hosted.in_flight:
            del hosted.in_flight[task_id]
            task.worker = -1
            move(task, UNSENT)
            if task.cancelled:
                self._executor.drop_cancelled(task)
            else:
                self._accept(hosted, task)

    def caller_died(self, called: bytes) -> None:
        """It may not have sent this call, and nobody else can know of it: it is over. If the worker
        did get it, its outcome finds nobody."""
        task = self._records.get(called)
        if task is not None and task.state is RUNNING:
            self.call_over(task)
            self._tasks.fail(task, values.pack_failure(values.Failure(
                "WorkerCrashedError", "its caller died as it called", called.hex())))

    # --- handing over -----------------------------------------------------------------------------

    def end_turn(self) -> None:
        """Hand calls over to the workers."""
        pump, self.pump = self.pump, {}
        for hosted in pump.values():
            if hosted.alive:
                self._hand_over(hosted)

    def _hand_over(self, hosted: Hosted) -> None:
        executor = self._executor
        calls = hosted.calls
        in_flight = hosted.in_flight
        template = hosted.template
        concurrent = bool(template.is_async or template.max_concurrency > 1 or template.groups)
        while calls:
            statistics = self._statistics[calls[0].template.template_id]
            if concurrent:
                # The calls of a full group must not keep those of others back.
                ahead = (max(template.max_concurrency, _AHEAD_SHORT) if not template.groups
                         else len(in_flight) + _BATCH_MAX)
                batch = _BATCH_MAX
            else:
                batch = statistics.batch(_BATCH_MAX)
                ahead = _AHEAD_SHORT if batch > 1 else _AHEAD_LONG
            room = min(batch, ahead - len(in_flight))
            if room <= 0:
                return
            run: list[Any] = []
            room_bytes = _BATCH_BYTES
            while calls and len(run) < room and (not run or len(calls[0].args) < room_bytes):
                task = calls.popleft()
                if task.cancelled:
                    continue
                room_bytes -= len(task.args)
                if task.dep_count:
                    room_bytes = 0
                in_flight[task.task_id] = task
                alone = not (calls or run) and (concurrent or len(in_flight) == 1)
                run.append(executor.run_message(task, hosted.worker, hosted.devices, alone))
            if run:
                self._outbox.tasks.append((hosted.worker, run))

    def call_over(self, task: TaskRecord) -> None:
        """The run of a call is over."""
        hosted = self.hosted.get(task.actor_id)
        if hosted is not None:
            hosted.in_flight.pop(task.task_id, None)
            if hosted.calls:
                self.pump[task.actor_id] = hosted

    # --- its end ----------------------------------------------------------------------------------

    def stop(self, _: int, message: ActorStop) -> None:
        """The home wants it to end."""
        hosted = self.hosted.get(message.actor_id)
        if hosted is None or hosted.incarnation != message.incarnation:
            return
        if message.kill:
            hosted.intended = "restart" if message.restarts else "kill"
        else:
            hosted.intended = "its last handle went out of scope"
        self._dispatcher.stop_worker(hosted.worker, kill=message.kill)

    def exiting(self, actor_id: bytes) -> None:
        """Its user wants it to end. It does so by itself, once its call is over; an idle one (some
        thread of it has called `exit_actor`) reads only what we send."""
        hosted = self.hosted.get(actor_id)
        if hosted is not None:
            hosted.intended = "it called exit_actor()"
            self._dispatcher.stop_worker(hosted.worker, kill=False)

    def group_removed(self, actor_id: bytes) -> None:
        """Its worker is being killed with its placement group."""
        hosted = self.hosted.get(actor_id)
        if hosted is not None:
            hosted.intended = "its placement group was removed"

    def worker_gone(self, actor_id: bytes, worker: int, failure: values.Failure) -> None:
        hosted = self.hosted.get(actor_id)
        if hosted is None or hosted.worker != worker:
            return
        del self.hosted[actor_id]
        self.pump.pop(actor_id, None)
        if not hosted.alive:
            return  # the creation task is in the worker's datagram: the dispatcher reports it
        down, lost = _why(hosted, failure)
        for task in list(hosted.in_flight.values()):
            self._crash(task, lost)
        for task in chain(hosted.calls, *hosted.blocked.values()):
            if not task.cancelled:  # those have their outcome
                self._return(task)
        # Whether it restarts is the home's decision: at a kill it has set restarts_left.
        intended = hosted.intended not in (None, "kill", "restart")
        self.say_last(hosted.home, ActorDown(actor_id, hosted.incarnation, down, intended))

    def _crash(self, task: TaskRecord, failure: values.Failure) -> None:
        if task.home == self._rank:
            task.worker = -1
            self._tasks.crashed(task, failure, started=True)
        else:
            self._holders.release_last(
                task.home, TaskCrashed(task.task_id, task.attempt, failure, True))
            self._executor.forget(task)

    def _return(self, task: TaskRecord) -> None:
        if task.state is FETCHING:
            self._executor.stop_fetching(task)
        if task.home == self._rank:
            move(task, RETURNED)
            task.attempt += 1
            self.call_returned(task)
        else:
            self._holders.release_last(task.home, TaskReturned(task.task_id, task.attempt))
            self._executor.forget(task)

    # --- invariants -------------------------------------------------------------------------------

    def validate(self) -> None:
        for actor_id, hosted in self.hosted.items():
            assert hosted.actor_id == actor_id
            for task in hosted.in_flight.values():
                assert self._records.get(task.task_id) is task, ("AC-2", task)
                assert task.state is RUNNING and task.worker == hosted.worker, ("AC-2", task)
            assert hosted.alive or not hosted.in_flight, ("AC-2", hosted.in_flight)
            for task in chain(hosted.calls, *hosted.blocked.values()):
                assert task.cancelled or task.state is not RUNNING, ("AC-2", task)
                assert task.cancelled or self._records.get(task.task_id) is task, task
            for turn, queue in hosted.blocked.items():
                assert queue and all(turn_of(task) == turn for task in queue), turn


def _why(hosted: Hosted, failure: values.Failure) -> tuple[values.Failure, values.Failure]:
    """What the end of its worker is to the actor, and to calls that it may have been running."""
    template = hosted.template
    name = class_name(template)
    by_itself = hosted.intended is None
    if hosted.intended in ("kill", "restart"):
        down = killed_failure(hosted.actor_id)
    elif by_itself:
        text = f"The actor {name} died: {failure.message}"
        if 0 < template.max_restarts <= hosted.incarnation:
            text = f"{text.rstrip('.')}. max_restarts={template.max_restarts} is used up."
        down = values.Failure("ActorDiedError", text, hosted.actor_id.hex())
    else:
        down = values.Failure(
            "ActorDiedError", f"The actor {name} is dead: {hosted.intended}.",
            hosted.actor_id.hex())
    restarts = template.max_restarts == -1 or hosted.incarnation < template.max_restarts
    if not restarts or hosted.intended not in (None, "restart"):
        return down, down
    return down, values.Failure(
        "ActorUnavailableError",
        f"{down.message.rstrip('.')}. It is restarted; this call may or may not have run "
        "(max_task_retries=0).", hosted.actor_id.hex())
