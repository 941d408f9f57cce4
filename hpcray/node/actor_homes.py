"""Actors at their home: creation, restarts, names, where they are, who is told. Pure.

An actor is created by a task whose worker it keeps: its host. The home decides what becomes of it
when that is gone, and tells the routes that have asked. A handle is a ref to the creation object:
when that is freed, the actor ends once its calls are over.

    PENDING     its first constructor has not returned
                  its constructor has returned --> ALIVE
                  its worker is gone, it has restarts left --> RESTARTING
                  its constructor raised, or cannot run --> DEAD
                  it was killed before it was there --> DEAD
                  its worker is gone for good --> DEAD
    ALIVE       its host takes calls
                  its worker is gone, it has restarts left --> RESTARTING
                  its worker is gone for good --> DEAD
    RESTARTING  its worker is gone; another constructor has not returned
                  its constructor has returned --> ALIVE
                  its worker is gone, it has restarts left --> RESTARTING
                  its constructor raised, or cannot run --> DEAD
                  it was killed before it was there --> DEAD
                  its worker is gone for good --> DEAD
    DEAD        there is no worker, and there will be none

What a host says counts if it is the host of the present incarnation: outcomes are checked by
(rank, incarnation), as those of tasks are by (rank, attempt).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcray.node.actor_records import ActorHome, class_name, gone_failure, killed_failure
from hpcray.node.actor_states import CREATED, GONE, KILLED, REFUSED, RESTART, ActorState
from hpcray.node.directory import Directory
from hpcray.node.records import ClientRecord, TaskRecord
from hpcray.node.states import Edge, move
from hpcray.node.tables import Tables, unwired
from hpcray.node.task_states import FETCHING, QUEUED, RETRY, WAITING
from hpcray.node.tasks import Binder, Tasks
from hpcray.protocol import ids, values
from hpcray.protocol.messages import (
    ActorAt,
    ActorDown,
    ActorIs,
    ActorStop,
    ActorWhere,
    CreateActor,
)

_ALIVE = ActorState.ALIVE
_DEAD = ActorState.DEAD


class ActorHomes:
    def __init__(self, tables: Tables, directory: Directory, tasks: Tasks) -> None:
        self._directory = directory
        self._tasks = tasks
        self._rank = tables.rank
        self._records = tables.tasks
        self._objects = tables.objects
        self._templates = tables.templates
        self.homes = tables.homes
        # Changes for the control store: (actor, facts).
        self.changes: list[tuple[bytes, dict[str, Any]]] = []
        # A message for a route or a host, which may be on this node.
        self.say: Callable[[int, Any], None] = unwired
        # An actor of this home is asked for; it is dead (actor, namespace, name).
        self.actor_created: Callable[[bytes, str, str], None] = unwired
        self.actor_died: Callable[[bytes, str, str], None] = unwired
        # It is dead, and no handle is left.
        self.actor_forgotten: Callable[[ActorHome], None] = unwired

    def binder(self) -> Binder:
        """Of creations."""
        tasks = self._tasks
        return Binder(
            ready=tasks.ready, resend=tasks.bind, again=tasks.requeue, returned=tasks.rebind,
            refused=self.creation_failed, crashed=self.creation_crashed, over=self.creation_over)

    # --- creation ---------------------------------------------------------------------------------

    def create(self, client: ClientRecord, message: CreateActor) -> None:
        template = self._templates[message.template_id]
        home = self.homes[message.actor_id] = ActorHome(message, template, client.number)
        task = self._creation_task(home)
        self._tasks.register(client, task)
        if template.max_restarts and home.refs:
            self._directory.hold_all(home.refs)  # a restart runs the constructor again
        if message.detached:
            self._directory.hold(ids.creation_object_id(message.actor_id))
        self._note(home)
        self.actor_created(home.actor_id, home.namespace, home.name)
        if task.missing == 0:
            self._tasks.ready(task)

    def _creation_task(self, home: ActorHome) -> TaskRecord:
        """Its attempt is the actor's incarnation."""
        task = TaskRecord(
            ids.creation_task_id(home.actor_id), home.template, home.args, home.refs,
            home.dep_count, self._rank, home.client,
        )
        task.attempt = home.incarnation
        task.actor_id = home.actor_id
        return task

    def creation_over(self, task: TaskRecord) -> None:
        """The creation task has an outcome."""
        home = self.homes.get(task.actor_id)
        rank = self._rank if task.rank < 0 else task.rank
        if home is None or home.state is _DEAD:  # killed while it was being created
            self._stop_at(rank, task.actor_id, task.attempt, kill=True)
            return
        move(home, CREATED)
        home.rank = rank
        self._tell(home)
        if not self._is_wanted(home):
            self.last_handle_gone(ids.creation_object_id(home.actor_id))

    def creation_failed(self, task: TaskRecord, error: bytes) -> None:
        """The constructor raised, or cannot be run: never retried, as in Ray."""
        home = self.homes.get(task.actor_id)
        if home is not None and home.state is not _DEAD:  # else: killed as it was being created
            self._end(home, REFUSED, (
                values.unpack_failure(error) if error[0] == values.FAILURE
                else values.Failure("ActorDiedError", "its constructor raised",
                                    task.actor_id.hex(), in_constructor=True)))
        self._tasks.fail(task, error)

    def creation_crashed(self, task: TaskRecord, failure: values.Failure, started: bool) -> None:
        """The worker that was to run the constructor is gone."""
        home = self.homes.get(task.actor_id)
        if home is None or home.state is _DEAD:  # killed as it was being created
            died = failure if home is None else home.failure or failure
            self._tasks.fail(task, values.pack_failure(died))
        elif not started:
            move(task, RETRY)
            self._tasks.requeue(task)
        elif self._may_restart(home):
            self._tasks.drop(task)
            self._restart(home)
        else:
            failure = _of_actor(home, failure)
            self._end(home, GONE, failure)
            self._tasks.fail(task, values.pack_failure(failure))

    # --- life and death ---------------------------------------------------------------------------

    def _of_host(self, actor_id: bytes, rank: int, incarnation: int) -> ActorHome | None:
        """The actor, if what `rank` says of this incarnation counts: it is its host."""
        home = self.homes.get(actor_id)
        if home is None or home.incarnation != incarnation or home.state is _DEAD:
            return None
        return home if self._host_of(home) == rank else None

    def _host_of(self, home: ActorHome) -> int:
        """The rank where it is, or where a worker may run its constructor by now; -1: nowhere."""
        if home.state is _ALIVE:
            return home.rank
        task = self._records.get(ids.creation_task_id(home.actor_id))
        if task is None or task.state in (WAITING, QUEUED, FETCHING):
            return -1
        return self._rank if task.rank < 0 else task.rank

    def actor_at(self, rank: int, message: ActorAt) -> None:
        home = self._of_host(message.actor_id, rank, message.incarnation)
        if home is not None:
            home.pid = message.pid

    def actor_down(self, rank: int, message: ActorDown) -> None:
        """Its worker is gone. The host says so last: its calls are answered, or will be."""
        home = self._of_host(message.actor_id, rank, message.incarnation)
        if home is None:
            return
        if message.intended or not self._may_restart(home):
            self._end(home, GONE, _of_actor(home, message.failure))
        else:
            self._restart(home)

    def _may_restart(self, home: ActorHome) -> bool:
        return home.restarts_left != 0 and self._is_wanted(home)

    def _is_wanted(self, home: ActorHome) -> bool:
        """Whether there is a handle, or a call that holds one."""
        return ids.creation_object_id(home.actor_id) in self._objects

    def _restart(self, home: ActorHome) -> None:
        if home.restarts_left > 0:
            home.restarts_left -= 1
        move(home, RESTART)
        home.incarnation += 1
        home.rank = -1
        home.pid = 0
        self._tell(home)
        self._tasks.restart(self._creation_task(home))

    def _end(self, home: ActorHome, edge: Edge, failure: values.Failure) -> None:
        move(home, edge)
        home.failure = failure
        home.rank = -1
        if home.template.max_restarts and home.refs:
            self._directory.release_all(home.refs)
        self.actor_died(home.actor_id, home.namespace, home.name)
        self._tell(home)
        if not self._is_wanted(home):
            self._forget(home)

    def _forget(self, home: ActorHome) -> None:
        if self.homes.pop(home.actor_id, None) is not None:
            self.actor_forgotten(home)

    def last_handle_gone(self, object_id: bytes) -> None:
        """The creation object is freed: the actor ends when its queue has drained."""
        home = self.homes.get(ids.actor_of_object(object_id))
        if home is None:
            return
        if home.state is _ALIVE and not home.ending:
            home.restarts_left = 0
            home.ending = True
            self._stop(home, kill=False)
        elif home.state is _DEAD:
            self._forget(home)
        # PENDING or RESTARTING: `creation_over` looks again.

    def hold_for(self, actor_id: bytes, rank: int) -> bool:
        """Count a handle that `rank` is about to give out; False: the actor is dead or ending."""
        home = self.homes.get(actor_id)
        if home is None or home.ending or home.state is _DEAD:
            return False
        self._directory.hold_for(ids.creation_object_id(actor_id), rank)
        return True

    def kill(self, actor_id: bytes, *, no_restart: bool) -> None:
        """`kill(handle)`: at once; what is queued fails."""
        home = self.homes.get(actor_id)
        if home is None or home.state is _DEAD:
            return
        if no_restart:
            home.restarts_left = 0
        if home.state is _ALIVE:
            home.ending = home.restarts_left == 0
            self._stop(home, kill=True)
            return
        task = self._records.get(ids.creation_task_id(actor_id))
        if not no_restart or task is None:
            return
        host = self._host_of(home)
        failure = killed_failure(actor_id)
        self._end(home, KILLED, failure)
        if host < 0:
            task.cancelled = True
            self._tasks.fail(task, values.pack_failure(failure))
        else:  # being created: if it is not there yet, it is stopped when its host reports
            self._stop_at(host, actor_id, task.attempt, kill=True)

    def _stop(self, home: ActorHome, *, kill: bool) -> None:
        self._stop_at(home.rank, home.actor_id, home.incarnation, kill=kill,
                      restarts=home.restarts_left != 0)

    def _stop_at(
        self, rank: int, actor_id: bytes, incarnation: int, *, kill: bool, restarts: bool = False
    ) -> None:
        self.say(rank, ActorStop(actor_id, incarnation, kill, restarts))

    # --- who is told ------------------------------------------------------------------------------

    def where(self, rank: int, message: ActorWhere) -> None:
        """A route asks."""
        home = self.homes.get(message.actor_id)
        if home is None:
            self.say(rank, ActorIs(
                message.actor_id, int(_DEAD), -1, 0, gone_failure(message.actor_id)))
            return
        if rank not in home.subscribers:
            home.subscribers.append(rank)
        self.say(rank, _facts(home))

    def _tell(self, home: ActorHome) -> None:
        """Of its new state."""
        message = _facts(home)
        for rank in home.subscribers:
            self.say(rank, message)
        self._note(home)

    def _note(self, home: ActorHome) -> None:
        self.changes.append((home.actor_id, {
            "state": home.state.name, "class": class_name(home.template), "name": home.name,
            "namespace": home.namespace, "rank": home.rank, "incarnation": home.incarnation,
        }))

    # --- invariants -------------------------------------------------------------------------------

    def validate(self) -> None:
        for actor_id, home in self.homes.items():
            creation = self._records.get(ids.creation_task_id(actor_id))
            if home.state is _ALIVE:
                assert home.rank >= 0 and creation is None, home.story
            else:
                assert home.rank == -1, home.story
            if home.state in (ActorState.PENDING, ActorState.RESTARTING):
                assert creation is not None and creation.attempt == home.incarnation, home.story
            assert home.state is not _DEAD or home.failure is not None, home.story
            assert home.state is not _DEAD or self._is_wanted(home), home.story


def _facts(home: ActorHome) -> ActorIs:
    return ActorIs(home.actor_id, int(home.state), home.rank, home.incarnation, home.failure)


def _of_actor(home: ActorHome, failure: values.Failure) -> values.Failure:
    """Why it died, in words of the actor."""
    if failure.kind in ("ActorDiedError", "ActorUnavailableError"):
        return failure
    return values.Failure(
        "ActorDiedError", f"The actor {class_name(home.template)} died: {failure.message}",
        home.actor_id.hex())
