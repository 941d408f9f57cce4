"""Actors: where they are (home), how calls reach them (route), and how they run (host). Pure.

Three roles, often on three nodes:

    caller's node: Route      knows the actor's rank and incarnation; keeps calls in order per
                              caller until they can be sent
    home:          ActorHome  creates it, restarts it, tells routes where it is
    host:          Hosted     its worker; hands calls over in order, in batches

    ActorHome   PENDING --created--> ALIVE <--created-- RESTARTING
                   |                  | |                 ^  |
                   |                  | +--worker gone----+  |
                   |                  |    (restarts left)   |
                   +--constructor raised, gone for good, ----+--> DEAD
                      killed, no handle left

A call is a task whose outcome always comes from where it was sent: a host answers every call it
was given, run or not, so a route needs no timeouts.

Invariants, checked by `validate`:

AC-1  calls of one caller are sent in the order submitted (resends of a restart first).
AC-2  a hosted actor's calls in flight are RUNNING on its worker.
AC-3  every call holds the actor's creation object: it cannot end while a call is on its way.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from hpcray.node.actor_records import (
    ActorHome,
    ActorState,
    Hosted,
    Route,
    class_name,
    turn_of,
)
from hpcray.node.outbox import Outbox
from hpcray.node.records import (
    ASSIGNED,
    FETCHING,
    QUEUED,
    RUNNING,
    WAIT_VALUE,
    WAITING,
    ClientRecord,
    TaskRecord,
)
from hpcray.protocol import ids, values
from hpcray.protocol.messages import (
    METHOD,
    ActorAt,
    ActorDown,
    ActorIs,
    ActorStop,
    ActorWhere,
    AssignCall,
    CreateActor,
    SubmitCall,
    TaskCrashed,
    TaskFailed,
    TaskReturned,
)

if TYPE_CHECKING:
    from hpcray.node.machine import Machine

# Calls in a datagram, if they are short. More gains nothing.
_BATCH_MAX = 16
_BATCH_BYTES = 96 * 1024
# Calls given to a sequential actor's worker ahead of their turn: enough to keep it busy.
_AHEAD_SHORT = 64
_AHEAD_LONG = 4


class Actors:
    def __init__(self, machine: Machine, outbox: Outbox) -> None:
        self._machine = machine
        self._outbox = outbox
        self._rank = machine.rank
        self.routes = machine.tables.routes
        self.homes = machine.tables.homes
        self.hosted = machine.tables.hosted
        # Hosted actors that can be given calls at the end of the turn.
        self.pump: dict[bytes, Hosted] = {}
        # Changes for the control store: (actor, facts).
        self.changes: list[tuple[bytes, dict[str, Any]]] = []

    # --- home: creation ---------------------------------------------------------------------------

    def create(self, client: ClientRecord, message: CreateActor) -> None:
        tasks = self._machine.tasks
        template = tasks.templates[message.template_id]
        home = self.homes[message.actor_id] = ActorHome(message, template, client.number)
        task = self._creation_task(home)
        tasks._register(client, task)
        directory = self._machine.directory
        if template.max_restarts and home.refs:
            directory.hold_all(home.refs)  # a restart runs the constructor again
        if message.detached:
            directory.hold(ids.creation_object_id(message.actor_id))
        self._note(home)
        self._machine.requests.actor_created(home.actor_id, home.namespace, home.name)
        if task.missing == 0:
            tasks.ready(task)

    def _creation_task(self, home: ActorHome) -> TaskRecord:
        task = TaskRecord(
            ids.creation_task_id(home.actor_id), home.template, home.args, home.refs,
            home.dep_count, self._rank, home.client,
        )
        task.attempt = home.incarnation
        task.actor_id = home.actor_id
        return task

    def _created(self, home: ActorHome, rank: int) -> None:
        home.rank = rank
        home.state = ActorState.ALIVE
        self._publish(home)
        if ids.creation_object_id(home.actor_id) not in self._machine.directory.records:
            self.last_handle_gone(ids.creation_object_id(home.actor_id))

    def creation_failed_at_home(self, task: TaskRecord, error: bytes) -> None:
        """The constructor raised: never retried, as in Ray."""
        home = self.homes.get(task.actor_id)
        if home is None:  # killed while it was being created, and forgotten since
            self._machine.tasks.fail(task, error)
            return
        failure = (values.unpack_failure(error) if error[0] == values.FAILURE
                   else values.Failure("ActorDiedError", "its constructor raised",
                                       task.actor_id.hex(), in_constructor=True))
        self._die(home, failure)
        self._machine.tasks.fail(task, error)

    def creation_crashed(
        self, task: TaskRecord, failure: values.Failure, *, started: bool
    ) -> None:
        home = self.homes.get(task.actor_id)
        tasks = self._machine.tasks
        if home is None:  # killed while it was being created, and forgotten since
            tasks.fail(task, values.pack_failure(failure))
            return
        if not started and home.state is not ActorState.DEAD:
            tasks._requeue(task)
            return
        tasks.records.pop(task.task_id, None)
        if task.refs:
            self._machine.directory.release_all(task.refs)
        self.went_down(home, failure, intended=home.state is ActorState.DEAD)
        if home.state is ActorState.DEAD:
            self._machine.directory.resolve_inline(
                ids.creation_object_id(home.actor_id),
                values.pack_failure(home.failure or failure))

    # --- home: life and death ---------------------------------------------------------------------

    def went_down(self, home: ActorHome, failure: values.Failure, *, intended: bool) -> None:
        """The worker is gone."""
        if home.state is ActorState.DEAD:
            return
        if failure.kind not in ("ActorDiedError", "ActorUnavailableError"):
            failure = values.Failure(
                "ActorDiedError", f"The actor {class_name(home.template)} died: {failure.message}",
                home.actor_id.hex())
        wanted = ids.creation_object_id(home.actor_id) in self._machine.directory.records
        if intended or home.restarts_left == 0 or not wanted:
            self._die(home, failure)
            return
        if home.restarts_left > 0:
            home.restarts_left -= 1
        home.incarnation += 1
        home.state = ActorState.RESTARTING
        home.rank = -1
        self._publish(home)
        task = self._creation_task(home)
        tasks = self._machine.tasks
        tasks.records[task.task_id] = task
        if task.refs:
            tasks.hold_arguments(task)
        if task.missing == 0:
            tasks.ready(task)

    def _die(self, home: ActorHome, failure: values.Failure) -> None:
        home.state = ActorState.DEAD
        home.failure = failure
        home.rank = -1
        if home.template.max_restarts and home.refs:
            self._machine.directory.release_all(home.refs)
        self._machine.requests.actor_died(home.actor_id, home.namespace, home.name)
        self._publish(home)
        if ids.creation_object_id(home.actor_id) not in self._machine.directory.records:
            self._forget(home)

    def _forget(self, home: ActorHome) -> None:
        if self.homes.pop(home.actor_id, None) is not None:
            self._machine.inventory.actor_forgotten(home)

    def actor_down(self, message: ActorDown) -> None:
        home = self.homes.get(message.actor_id)
        if home is not None and message.incarnation == home.incarnation:
            self.went_down(home, message.failure, intended=message.intended)

    def actor_at(self, message: ActorAt) -> None:
        home = self.homes.get(message.actor_id)
        if home is not None and message.incarnation == home.incarnation:
            home.pid = message.pid

    def last_handle_gone(self, object_id: bytes) -> None:
        """The creation object is freed: the actor ends when its queue has drained."""
        home = self.homes.get(ids.actor_of_object(object_id))
        if home is None:
            return
        if home.state is ActorState.ALIVE:
            home.restarts_left = 0
            home.ending = True
            self._stop(home, kill=False)
        elif home.state is ActorState.DEAD:
            self._forget(home)
        # PENDING or RESTARTING: `_created` looks again.

    def hold_for(self, actor_id: bytes, rank: int) -> bool:
        """Count a handle that `rank` is about to give out; False: the actor is dead or ending."""
        home = self.homes.get(actor_id)
        if home is None or home.ending or home.state is ActorState.DEAD:
            return False
        self._machine.directory.hold_for(ids.creation_object_id(actor_id), rank)
        return True

    def kill(self, actor_id: bytes, *, no_restart: bool) -> None:
        """`kill(handle)`: at once; what is queued fails."""
        home = self.homes.get(actor_id)
        if home is None or home.state is ActorState.DEAD:
            return
        if no_restart:
            home.restarts_left = 0
        if home.state is ActorState.ALIVE:
            home.ending = home.restarts_left == 0
            self._stop(home, kill=True)
            return
        task = self._machine.tasks.records.get(ids.creation_task_id(actor_id))
        if not no_restart or task is None:
            return
        failure = killed_failure(actor_id)
        self._die(home, failure)
        if task.state in (WAITING, QUEUED, FETCHING):
            task.cancelled = True
            self._machine.tasks.fail(task, values.pack_failure(failure))
        else:  # being created: its host is told when it reports
            host = self._rank if task.rank < 0 else task.rank
            self._stop_at(host, actor_id, task.attempt, kill=True)

    def _stop(self, home: ActorHome, *, kill: bool) -> None:
        self._stop_at(home.rank, home.actor_id, home.incarnation, kill=kill,
                      restarts=home.restarts_left != 0)

    def _stop_at(
        self, rank: int, actor_id: bytes, incarnation: int, *, kill: bool, restarts: bool = False
    ) -> None:
        message = ActorStop(actor_id, incarnation, kill, restarts)
        if rank == self._rank:
            self.stop_hosted(message)
        else:
            self._outbox.peers[rank].append(message)

    def _publish(self, home: ActorHome) -> None:
        message = ActorIs(home.actor_id, int(home.state), home.rank, home.incarnation, home.failure)
        for rank in home.subscribers:
            self._outbox.peers[rank].append(message)
        route = self.routes.get(home.actor_id)
        if route is not None:
            self._update(route, message)
        self._note(home)

    def _note(self, home: ActorHome) -> None:
        self.changes.append((home.actor_id, {
            "state": home.state.name, "class": class_name(home.template), "name": home.name,
            "namespace": home.namespace, "rank": home.rank, "incarnation": home.incarnation,
        }))

    def where(self, rank: int, actor_id: bytes) -> None:
        """A route elsewhere asks."""
        home = self.homes.get(actor_id)
        if home is None:
            self._outbox.peers[rank].append(ActorIs(
                actor_id, int(ActorState.DEAD), -1, 0, gone_failure(actor_id)))
            return
        if rank not in home.subscribers:
            home.subscribers.append(rank)
        self._outbox.peers[rank].append(ActorIs(
            actor_id, int(home.state), home.rank, home.incarnation, home.failure))

    # --- caller: routes ---------------------------------------------------------------------------

    def call(self, client: ClientRecord, message: SubmitCall) -> None:
        tasks = self._machine.tasks
        actor_id = message.actor_id
        task = tasks.register_call(client, message, tasks.templates[message.template_id])
        route = self.routes.get(actor_id)
        if route is None:
            route = self._new_route(actor_id)
        route.open_calls += 1
        directory = self._machine.directory
        directory.hold(ids.creation_object_id(actor_id))  # AC-3
        if message.worker >= 0:
            directory.get(client.number, task.task_id + ids.FIRST_RETURN, WAIT_VALUE)
            if self._sent_by_caller(route, task, message.worker):
                client.called = task.task_id
                return
        if task.missing or (route.blocked and turn_of(task) in route.blocked):
            route.blocked.setdefault(turn_of(task), deque()).append(task)
        else:
            self._send_or_wait(route, task)

    def _sent_by_caller(self, route: Route, task: TaskRecord, worker: int) -> bool:
        """A call that its caller sends to the worker itself, which it believes to host the actor.

        False: it does not, or not any more. Then it had died before the call was sent: what callers
        had said before is heard before a worker's death is (`NodeServer._bury`).
        """
        hosted = self.hosted.get(route.actor_id)
        if hosted is None or hosted.worker != worker:
            return False
        task.state = RUNNING
        task.worker = worker
        task.rank = self._rank
        task.incarnation = hosted.incarnation
        hosted.in_flight[task.task_id] = task
        return True

    def call_unsent(self, task_id: bytes) -> None:
        """The caller could not send it: we do."""
        task = self._machine.tasks.records.get(task_id)
        hosted = None if task is None else self.hosted.get(task.actor_id)
        if task is not None and hosted is not None and task_id in hosted.in_flight:
            del hosted.in_flight[task_id]
            task.worker = -1
            task.state = ASSIGNED
            self._accept(hosted, task)

    def caller_died(self, called: bytes) -> None:
        """It may not have sent this call, and nobody else can know of it: it is over. If the worker
        did get it, its outcome finds nobody."""
        task = self._machine.tasks.records.get(called)
        if task is not None and task.state == RUNNING:
            self.call_finished(task)
            self._machine.tasks.fail(task, values.pack_failure(values.Failure(
                "WorkerCrashedError", "its caller died as it called", called.hex())))

    def _new_route(self, actor_id: bytes) -> Route:
        route = self.routes[actor_id] = Route(actor_id)
        home_rank = ids.home_of_actor(actor_id)
        if home_rank != self._rank:
            self._outbox.peers[home_rank].append(ActorWhere(actor_id))
            return route
        home = self.homes.get(actor_id)
        if home is None:
            route.state = ActorState.DEAD
            route.failure = gone_failure(actor_id)
        else:
            route.state, route.rank = home.state, home.rank
            route.incarnation, route.failure = home.incarnation, home.failure
        return route

    def actor_is(self, message: ActorIs) -> None:
        route = self.routes.get(message.actor_id)
        if route is not None:
            self._update(route, message)

    def _update(self, route: Route, message: ActorIs) -> None:
        if (message.state == ActorState.RESTARTING
                and route.state in (ActorState.UNKNOWN, ActorState.ALIVE)):
            self._fail_impatient(route)
        route.state = ActorState(message.state)
        route.rank = message.rank
        route.incarnation = message.incarnation
        route.failure = message.failure
        self._flush_route(route)
        if route.state is ActorState.DEAD and route.open_calls == 0:
            self.routes.pop(route.actor_id, None)  # a later call asks the home again

    def _fail_impatient(self, route: Route) -> None:
        """The actor was there, and is being restarted: calls without retries do not wait for that.

        Those that have waited since before it was first there still do: they met no actor at all.
        """
        for calls in (route.resend, route.waiting):
            for task in [task for task in calls if not task.template.max_retries]:
                calls.remove(task)
                self._fail_unavailable(task)

    def _fail_unavailable(self, task: TaskRecord) -> None:
        self._machine.tasks.fail(task, values.pack_failure(values.Failure(
            "ActorUnavailableError",
            f"The actor is being restarted; {task.template.name} was not run. Call it again later, "
            "or with max_task_retries: then it waits.", task.actor_id.hex())))

    def _flush_route(self, route: Route) -> None:
        if route.state not in (ActorState.ALIVE, ActorState.DEAD):
            return
        # Sending may return calls to `resend` (a stale route): one pass over what was there.
        calls = [*route.resend, *route.waiting]
        route.resend.clear()
        route.waiting.clear()
        for task in calls:
            if task.task_id in self._machine.tasks.records:
                self._send_or_wait(route, task)

    def _send_or_wait(self, route: Route, task: TaskRecord) -> None:
        if route.state is ActorState.ALIVE:
            self._send(route, task)
        elif route.state is ActorState.DEAD:
            failure = route.failure or gone_failure(route.actor_id)
            self._machine.tasks.fail(task, values.pack_failure(failure))
        elif route.state is ActorState.RESTARTING and not task.template.max_retries:
            self._fail_unavailable(task)
        else:
            task.state = QUEUED
            route.waiting.append(task)

    def _send(self, route: Route, task: TaskRecord) -> None:
        task.state = ASSIGNED
        task.rank = route.rank
        task.incarnation = route.incarnation
        if route.rank == self._rank:
            hosted = self.hosted.get(route.actor_id)
            if hosted is None or hosted.incarnation != route.incarnation:
                route.waiting.append(task)  # its end is on the way to the home
                route.state = ActorState.UNKNOWN
                self._ask_again(route)
            else:
                self._accept(hosted, task)
            return
        tasks = self._machine.tasks
        tasks.tell_template(route.rank, task.template)
        self._outbox.peers[route.rank].append(AssignCall(
            task.task_id, task.template.template_id, task.attempt, route.actor_id,
            route.incarnation, task.client, task.args, tasks.remote_deps(task),
            task.refs[: task.dep_count * 28],
        ))

    def _ask_again(self, route: Route) -> None:
        home_rank = ids.home_of_actor(route.actor_id)
        if home_rank != self._rank:
            self._outbox.peers[home_rank].append(ActorWhere(route.actor_id))

    def call_ready(self, task: TaskRecord) -> None:
        """Its dependencies exist: it and those behind it may go."""
        route = self.routes.get(task.actor_id)
        if route is None:
            return
        queue = route.blocked.get(turn_of(task))
        while queue and (queue[0].missing == 0 or queue[0].cancelled):
            head = queue.popleft()
            if not head.cancelled:
                self._send_or_wait(route, head)
        if not queue:
            route.blocked.pop(turn_of(task), None)

    def call_cancelled(self, task: TaskRecord) -> None:
        """Unstarted, and it has its outcome: those behind it must not wait for its dependencies."""
        if task.home == self._rank:
            self.call_ready(task)
        self.call_fetched(task)

    def call_returned(self, task: TaskRecord) -> None:
        """The host does not have this incarnation (any more): resolve again."""
        route = self.routes[task.actor_id]
        task.rank = -1
        if route.state is ActorState.RESTARTING and not task.template.max_retries:
            self._fail_unavailable(task)
            return
        route.resend.append(task)
        if route.state is ActorState.ALIVE and route.incarnation == task.incarnation:
            route.state = ActorState.UNKNOWN
            self._ask_again(route)
        else:
            self._flush_route(route)

    def call_again(self, task: TaskRecord) -> None:
        """A call that raised and is retried for it: the actor is there, and others may go first."""
        task.rank = task.worker = -1
        self._send_or_wait(self.routes[task.actor_id], task)

    def resend(self, task: TaskRecord) -> None:
        """A crashed call with retries left goes first, in the order the crashes are told (AC-1)."""
        route = self.routes[task.actor_id]
        route.resend.append(task)
        if route.state is ActorState.ALIVE and route.incarnation == task.incarnation:
            # We still believe in the incarnation that has just failed us.
            route.state = ActorState.UNKNOWN
            self._ask_again(route)
        else:
            self._flush_route(route)

    def home_call_finished(self, task: TaskRecord) -> None:
        """The outcome of a call of ours, or of a creation, has been delivered."""
        actor_id = task.actor_id
        if task.template.kind != METHOD:
            home = self.homes.get(actor_id)
            rank = self._rank if task.rank < 0 else task.rank
            if home is not None and home.state in (ActorState.PENDING, ActorState.RESTARTING):
                self._created(home, rank)
            else:  # killed while it was being created
                self._stop_at(rank, actor_id, task.attempt, kill=True)
            return
        route = self.routes.get(actor_id)
        if route is not None:
            route.open_calls -= 1
            if route.open_calls == 0 and route.state is ActorState.DEAD:
                del self.routes[actor_id]
        self._machine.directory.release(ids.creation_object_id(actor_id))

    # --- host -------------------------------------------------------------------------------------

    def creating(self, task: TaskRecord, worker: int, devices: tuple[int, ...]) -> None:
        """The dispatcher has given the creation task to a worker: the actor's from now on."""
        self.hosted[task.actor_id] = Hosted(task, worker, devices)

    def creation_failed(self, task: TaskRecord, error: bytes) -> None:
        """The constructor raised in our worker (which exits by itself)."""
        hosted = self.hosted.pop(task.actor_id, None)
        if hosted is not None:
            worker = self._machine.dispatcher.workers.get(hosted.worker)
            if worker is not None:
                worker.datagrams.clear()
                worker.actor_id = b""
        if task.home == self._rank:
            self.creation_failed_at_home(task, error)
        else:
            self._machine.directory.holders.release_last(
                task.home, TaskFailed(task.task_id, task.attempt, 0, error, False))
            self._machine.tasks.forget_foreign(task)

    def call_finished(self, task: TaskRecord) -> None:
        """A call (or the creation) of a hosted actor has an outcome."""
        hosted = self.hosted.get(task.actor_id)
        if hosted is None:
            return
        if task.template.kind != METHOD:
            hosted.alive = True
            held = hosted.template.held_resources
            self._machine.dispatcher.actor_holds(
                hosted.worker, hosted.template.resources if held is None else held)
            if hosted.home != self._rank:
                self._outbox.peers[hosted.home].append(ActorAt(
                    hosted.actor_id, hosted.incarnation,
                    self._machine.dispatcher.workers[hosted.worker].pid))
        hosted.in_flight.pop(task.task_id, None)
        if hosted.calls:
            self.pump[task.actor_id] = hosted

    def call_assigned(self, rank: int, message: AssignCall) -> None:
        hosted = self.hosted.get(message.actor_id)
        if hosted is None or hosted.incarnation != message.incarnation:
            self._outbox.peers[rank].append(TaskReturned(message.task_id, message.attempt))
            return
        tasks = self._machine.tasks
        task = tasks.foreign(rank, message, tasks.templates[message.template_id])
        task.actor_id = message.actor_id
        task.client = message.caller
        self._accept(hosted, task)

    def _accept(self, hosted: Hosted, task: TaskRecord) -> None:
        if hosted.blocked and turn_of(task) in hosted.blocked:
            hosted.blocked[turn_of(task)].append(task)
            if task.dep_count:
                self._machine.tasks.fetch(task)
            return
        if task.dep_count and not self._machine.tasks.fetch(task):
            hosted.blocked[turn_of(task)] = deque((task,))
            return
        hosted.calls.append(task)
        self.pump[hosted.actor_id] = hosted

    def call_fetched(self, task: TaskRecord) -> None:
        hosted = self.hosted.get(task.actor_id)
        if hosted is None:
            return
        queue = hosted.blocked.get(turn_of(task))
        while queue and (queue[0].missing == 0 or queue[0].cancelled):
            hosted.calls.append(queue.popleft())  # cancelled ones are skipped there
        if not queue:
            hosted.blocked.pop(turn_of(task), None)
        self.pump[hosted.actor_id] = hosted

    def end_turn(self) -> None:
        """Hand calls over to the workers."""
        pump, self.pump = self.pump, {}
        for hosted in pump.values():
            if hosted.alive:
                self._hand_over(hosted)

    def _hand_over(self, hosted: Hosted) -> None:
        tasks = self._machine.tasks
        calls = hosted.calls
        in_flight = hosted.in_flight
        template = hosted.template
        concurrent = bool(template.is_async or template.max_concurrency > 1 or template.groups)
        while calls:
            statistics = tasks.statistics[calls[0].template.template_id]
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
                run.append(tasks.run_message(task, hosted.worker, hosted.devices, alone))
            if run:
                self._outbox.tasks.append((hosted.worker, run))

    def stop_hosted(self, message: ActorStop) -> None:
        hosted = self.hosted.get(message.actor_id)
        if hosted is None or hosted.incarnation != message.incarnation:
            return
        if message.kill:
            hosted.intended = "restart" if message.restarts else "kill"
            self._machine.dispatcher.stop_worker(hosted.worker, kill=True)
        else:
            hosted.intended = "its last handle went out of scope"
            self._machine.dispatcher.stop_worker(hosted.worker, kill=False)

    def exiting(self, actor_id: bytes) -> None:
        """Its user wants it to end. It does so by itself, once its call is over; an idle one (some
        thread of it has called `exit_actor`) reads only what we send."""
        hosted = self.hosted.get(actor_id)
        if hosted is not None:
            hosted.intended = "it called exit_actor()"
            self._machine.dispatcher.stop_worker(hosted.worker, kill=False)

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
        template = hosted.template
        if hosted.intended in ("kill", "restart"):
            # Whether it restarts is the home's decision: it has set restarts_left.
            down = killed_failure(actor_id)
            intended = False
        elif hosted.intended is not None:
            down = values.Failure(
                "ActorDiedError", f"The actor {class_name(template)} is dead: {hosted.intended}.",
                actor_id.hex())
            intended = True
        else:
            text = f"The actor {class_name(template)} died: {failure.message}"
            if 0 < template.max_restarts <= hosted.incarnation:
                text = f"{text.rstrip('.')}. max_restarts={template.max_restarts} is used up."
            down = values.Failure("ActorDiedError", text, actor_id.hex())
            intended = False
        restarts = template.max_restarts == -1 or hosted.incarnation < template.max_restarts
        if restarts and not intended and hosted.intended != "kill":
            lost = values.Failure(
                "ActorUnavailableError",
                f"{down.message.rstrip('.')}. It is restarted; this call may or may not have run "
                "(max_task_retries=0).", actor_id.hex())
        else:
            lost = down
        # The home first: calls of this very node that go back find it changed already.
        self._report_down(hosted, down, intended)
        for task in list(hosted.in_flight.values()):
            self._crash(task, lost)
        # Those never started go back to their routes, in order.
        waiting = list(hosted.calls)
        for queue in hosted.blocked.values():
            waiting.extend(queue)
        for task in waiting:
            self._return(task)

    def _report_down(self, hosted: Hosted, failure: values.Failure, intended: bool) -> None:
        message = ActorDown(hosted.actor_id, hosted.incarnation, failure, intended)
        if hosted.home == self._rank:
            self.actor_down(message)
        else:
            self._outbox.peers[hosted.home].append(message)

    def _crash(self, task: TaskRecord, failure: values.Failure) -> None:
        if task.home == self._rank:
            task.worker = -1
            self._machine.tasks.crashed(task, failure, started=True)
        else:
            self._machine.directory.holders.release_last(
                task.home, TaskCrashed(task.task_id, task.attempt, failure, True))
            self._machine.tasks.forget_foreign(task)

    def _return(self, task: TaskRecord) -> None:
        task.missing = 0
        if task.home == self._rank:
            task.attempt += 1
            self.call_returned(task)
        else:
            # Behind the crashes: who is told that a call was returned sends it again.
            self._machine.directory.holders.release_last(
                task.home, TaskReturned(task.task_id, task.attempt))
            self._machine.tasks.forget_foreign(task)

    def validate(self) -> None:
        for hosted in self.hosted.values():
            for task in hosted.in_flight.values():
                assert task.worker == hosted.worker, task


def killed_failure(actor_id: bytes) -> values.Failure:
    return values.Failure(
        "ActorDiedError", "The actor is dead because it was killed by `hpcray.kill`.",
        actor_id.hex())


def gone_failure(actor_id: bytes) -> values.Failure:
    return values.Failure(
        "ActorDiedError",
        "The actor is dead: all handles to it went out of scope, or its job ended.",
        actor_id.hex())
