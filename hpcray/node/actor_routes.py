"""Actors at their callers' node: calls are kept in order until they can be sent. Pure.

A call is a task that its route binds: to the host of its actor, as soon as the home has said where
that is. A host answers every call it was given, run or not, so a route needs no timeouts.

    call --> blocked (its dependencies, or those of a call before it, are not ready)
         --> waiting (the actor is not there) --> sent --> over
                                                    `--> came back: resend, before those that wait

A route asks the home once, and is told of every change from then on. If a call comes back, the
actor's end is on its way to the home: the route waits to be told.

    UNKNOWN     the home is to tell; calls wait
                  told: not there yet --> PENDING
                  told: there --> ALIVE
                  told: it restarts --> RESTARTING
                  told: dead --> DEAD
    PENDING     it is not there yet; calls wait
                  told: there --> ALIVE
                  told: it restarts --> RESTARTING
                  told: dead --> DEAD
    ALIVE       calls go to its host
                  told: it restarts --> RESTARTING
                  told: dead --> DEAD
                  a call came back --> UNKNOWN
    RESTARTING  calls with retries wait, others fail
                  told: there --> ALIVE
                  told: there, and calls are open at another incarnation --> SETTLING
                  told: it restarts --> RESTARTING
                  told: dead --> DEAD
    DEAD        calls fail
    SETTLING    it is there again; calls wait until its last incarnation has answered
                  all calls of before are answered --> ALIVE
                  told: it restarts --> RESTARTING
                  told: dead --> DEAD

Invariants, checked by `validate`:

AC-1  calls of one caller are sent in the order submitted, those of a restart first: all that are
      open at a host are at one incarnation of it, so what that gave back is here, in its order,
      before anything is sent to the next.
AC-3  every call holds the actor's creation object: it cannot end while a call is on its way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import chain
from typing import Any

from hpcray.node.actor_records import Route, gone_failure, turn_of
from hpcray.node.actor_states import (
    ALIVE,
    DEAD,
    DOUBTED,
    PENDING,
    RESTARTING,
    SETTLED,
    SETTLING,
    TOLD_AGAIN,
    TOLD_ALIVE,
    TOLD_DEAD,
    TOLD_PENDING,
    TOLD_RESTARTING,
    UNKNOWN,
)
from hpcray.node.directory import Directory
from hpcray.node.membership import Membership
from hpcray.node.outbox import Outbox
from hpcray.node.records import WAIT_VALUE, ClientRecord, TaskRecord
from hpcray.node.states import Edge, move
from hpcray.node.tables import Tables, unwired
from hpcray.node.task_states import READY, RETURNED, RUNNING, SEND, WAITING
from hpcray.node.tasks import Binder, Tasks
from hpcray.protocol import ids, values
from hpcray.protocol.messages import METHOD, ActorIs, ActorWhere, AssignCall, SubmitCall

_TOLD: dict[int, Edge] = {
    PENDING: TOLD_PENDING, ALIVE: TOLD_ALIVE, RESTARTING: TOLD_RESTARTING, DEAD: TOLD_DEAD}


class ActorRoutes:
    def __init__(
        self, tables: Tables, outbox: Outbox, membership: Membership, directory: Directory,
        tasks: Tasks,
    ) -> None:
        self._outbox = outbox
        self._membership = membership
        self._directory = directory
        self._tasks = tasks
        self._rank = tables.rank
        self._records = tables.tasks
        self._templates = tables.templates
        self.routes = tables.routes
        # A message for the node of an actor's home, which may be this one.
        self.say: Callable[[int, Any], None] = unwired
        # A call for the host on this node; False: it does not have this incarnation (any more).
        self.accept: Callable[[TaskRecord], bool] = unwired
        # A call that its caller hands to this worker itself; False: the actor is not there.
        self.accept_called: Callable[[TaskRecord, int], bool] = unwired

    def binder(self, cancelled: Callable[[TaskRecord], None]) -> Binder:
        """Of calls. `cancelled`: one is, which may be on its way through a host of this node."""
        tasks = self._tasks
        return Binder(
            ready=self.call_ready, resend=self.came_back, again=self.call_again,
            returned=self.returned, refused=tasks.fail, crashed=tasks.run_crashed,
            cancelled=cancelled, over=self.call_over)

    # --- submission -------------------------------------------------------------------------------

    def call(self, client: ClientRecord, message: SubmitCall) -> None:
        actor_id = message.actor_id
        task = self._tasks.register_call(client, message, self._templates[message.template_id])
        route = self.routes.get(actor_id)
        if route is None:
            route = self._new_route(actor_id)
        self._directory.hold(ids.creation_object_id(actor_id))  # AC-3
        if message.worker >= 0:
            self._directory.get(client.number, task.task_id + ids.FIRST_RETURN, WAIT_VALUE)
            if self.accept_called(task, message.worker):
                client.called = task.task_id
                task.rank = self._rank
                route.sent += 1
                return
            # It had died before the call was sent: see `Machine.may_have_called`.
        if task.missing or (route.blocked and turn_of(task) in route.blocked):
            self._block(route, task)
        else:
            self._send_or_wait(route, task)

    def _new_route(self, actor_id: bytes) -> Route:
        route = self.routes[actor_id] = Route(actor_id)
        self.say(self._membership.home_of_actor(actor_id), ActorWhere(actor_id))
        return route

    def _block(self, route: Route, task: TaskRecord) -> None:
        if route.state is DEAD:  # whatever it waits for
            self._send_or_wait(route, task)
        else:
            route.blocked.setdefault(turn_of(task), deque()).append(task)

    def call_ready(self, task: TaskRecord) -> None:
        """Its dependencies exist, or it is cancelled: it and those behind it may go."""
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

    # --- sending ----------------------------------------------------------------------------------

    def _send_or_wait(self, route: Route, task: TaskRecord) -> None:
        state = route.state
        if state is ALIVE:
            self._send(route, task)
        elif state is DEAD:
            self._tasks.fail(
                task, values.pack_failure(route.failure or gone_failure(route.actor_id)))
        elif state is RESTARTING and not task.template.max_retries:
            self._fail_unavailable(task)
        else:
            if task.state is WAITING:
                move(task, READY)
            route.waiting.append(task)

    def _send(self, route: Route, task: TaskRecord) -> None:
        move(task, SEND)
        task.rank = route.rank
        task.incarnation = route.incarnation
        route.sent += 1
        if route.rank == self._rank:
            if not self.accept(task):
                move(task, RETURNED)
                self.came_back(task)
            return
        tasks = self._tasks
        tasks.tell_template(route.rank, task.template)
        self._outbox.peers[route.rank].append(AssignCall(
            task.task_id, task.template.template_id, task.attempt, route.actor_id,
            route.incarnation, task.client, task.args, tasks.remote_deps(task),
            task.refs[: task.dep_count * 28],
        ))

    def _flush(self, route: Route) -> None:
        """Send, or fail, what waits; what comes back at once waits anew, in its order."""
        calls = [*route.resend, *route.waiting]
        route.resend.clear()
        route.waiting.clear()
        for task in calls:
            if task.task_id in self._records:  # not cancelled since
                self._send_or_wait(route, task)

    def _fail_unavailable(self, task: TaskRecord) -> None:
        self._tasks.fail(task, values.pack_failure(values.Failure(
            "ActorUnavailableError",
            f"The actor is being restarted; {task.template.name} was not run. Call it again later, "
            "or with max_task_retries: then it waits.", task.actor_id.hex())))

    # --- what the home says -----------------------------------------------------------------------

    def actor_is(self, _: int, message: ActorIs) -> None:
        route = self.routes.get(message.actor_id)
        if route is None:
            return
        edge = _TOLD[message.state]
        state = edge.target
        if state is RESTARTING and route.state in (UNKNOWN, ALIVE, SETTLING):
            self._fail_impatient(route)
        route.rank = message.rank
        route.incarnation = message.incarnation
        route.failure = message.failure
        if state is ALIVE and route.sent and route.called != message.incarnation:
            move(route, TOLD_AGAIN)
            return
        move(route, edge)
        if state is ALIVE:
            self._open(route)
        elif state is DEAD:
            self._close(route)

    def _open(self, route: Route) -> None:
        route.called = route.incarnation
        self._flush(route)

    def _close(self, route: Route) -> None:
        self._flush(route)
        blocked, route.blocked = route.blocked, {}
        for task in chain.from_iterable(blocked.values()):
            if task.task_id in self._records:
                self._send_or_wait(route, task)
        if not route.sent:
            self.routes.pop(route.actor_id, None)  # a later call asks the home again

    def _fail_impatient(self, route: Route) -> None:
        """The actor was there, and is being restarted: calls without retries do not wait for that.

        Those that have waited since before it was first there still do: they met no actor at all.
        """
        calls = [*route.resend, *route.waiting]
        route.resend = deque(task for task in route.resend if task.template.max_retries)
        route.waiting = deque(task for task in route.waiting if task.template.max_retries)
        for task in calls:
            if not task.template.max_retries and task.task_id in self._records:
                self._fail_unavailable(task)

    # --- what becomes of calls that were sent -----------------------------------------------------

    def came_back(self, task: TaskRecord) -> None:
        """Its host does not have this incarnation (any more), or it crashed and has retries left.

        A host says so in the order in which it was given them, those that crashed first.
        """
        route = self.routes[task.actor_id]
        task.rank = -1
        route.sent -= 1
        if route.state is RESTARTING and not task.template.max_retries:
            self._fail_unavailable(task)
            return
        route.resend.append(task)
        if route.state is ALIVE:
            move(route, DOUBTED)
        elif route.state is DEAD:
            self._close(route)
        elif not route.sent:
            self._last_answered(route)

    def returned(self, _: int, task: TaskRecord) -> None:
        """A host elsewhere gave it back."""
        task.attempt += 1
        self.came_back(task)

    def call_again(self, task: TaskRecord) -> None:
        """A call that raised and is retried for it: the actor is there, and others may go first."""
        route = self.routes[task.actor_id]
        task.rank = task.worker = -1
        route.sent -= 1
        self._send_or_wait(route, task)
        if not route.sent:
            self._last_answered(route)

    def call_over(self, task: TaskRecord) -> None:
        """A call of ours has an outcome."""
        if task.rank >= 0:
            route = self.routes[task.actor_id]
            route.sent -= 1
            if not route.sent and route.state is not ALIVE:
                self._last_answered(route)
        self._directory.release(ids.creation_object_id(task.actor_id))

    def _last_answered(self, route: Route) -> None:
        if route.state is SETTLING:
            self._settle(route)
        elif route.state is DEAD:
            self.routes.pop(route.actor_id, None)

    def _settle(self, route: Route) -> None:
        move(route, SETTLED)
        self._open(route)

    # --- invariants -------------------------------------------------------------------------------

    def validate(self) -> None:
        places: dict[bytes, int] = {}  # in the order submitted
        calls: dict[bytes, list[TaskRecord]] = {}
        for place, task in enumerate(self._records.values()):
            if task.home == self._rank and task.template.kind == METHOD:
                places[task.task_id] = place
                calls.setdefault(task.actor_id, []).append(task)
        for actor_id, open_calls in calls.items():
            held = self._directory.records.get(ids.creation_object_id(actor_id))
            assert held is not None and held.count >= len(open_calls), ("AC-3", actor_id.hex())
            assert actor_id in self.routes, actor_id.hex()
        for route in self.routes.values():
            self._validate(route, calls.get(route.actor_id, []), places)

    def _validate(
        self, route: Route, calls: list[TaskRecord], places: dict[bytes, int]
    ) -> None:
        sent = [task for task in calls if task.rank >= 0]
        assert len(sent) == route.sent, (route.sent, sent)
        assert all(task.incarnation == route.called for task in sent), ("AC-1", route.story, sent)
        queued = [*route.resend, *route.waiting, *chain.from_iterable(route.blocked.values())]
        queued = [task for task in queued if task.task_id in places]
        assert len(sent) + len(queued) == len(calls), (sent, queued, calls)
        if route.state is ALIVE:
            assert not route.resend and not route.waiting, route.story
            assert route.called == route.incarnation, route.story
        assert route.state is not SETTLING or route.sent, route.story
        assert route.state is not DEAD or route.sent and not queued, route.story
        last: dict[Any, int] = {}
        for task in queued:
            assert task.state is not RUNNING and task.rank == -1, task
            if not (task.attempt and task.template.retry_exceptions):  # else it may have raised
                place = places[task.task_id]
                assert last.get(turn_of(task), -1) < place, ("AC-1", task, queued)
                last[turn_of(task)] = place
