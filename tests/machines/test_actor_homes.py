"""Homes: an actor's life, whatever its hosts say and when; who is told, and what is held for it.

Routes and hosts are played. What routes are told must be a way through their own table, and hosts
that are not the actor's (any more) may say what they like.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpcray.node.actor_homes import ActorHomes
from hpcray.node.actor_records import ActorHome, Route
from hpcray.node.actor_states import (
    TOLD_ALIVE,
    TOLD_DEAD,
    TOLD_PENDING,
    TOLD_RESTARTING,
    ActorState,
)
from hpcray.node.records import TaskRecord
from hpcray.node.states import move
from hpcray.node.task_states import ASSIGNED, QUEUED, RUN, RUNNING
from hpcray.protocol import ids, values
from hpcray.protocol import messages as m

from .lower import Lower

DIED = values.Failure("WorkerCrashedError", "the worker died")
RAISED = b"\1error"
TOLD = {ActorState.PENDING: TOLD_PENDING, ActorState.ALIVE: TOLD_ALIVE,
        ActorState.RESTARTING: TOLD_RESTARTING, ActorState.DEAD: TOLD_DEAD}
LOCAL_WORKER = 2


class HomesMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.lower = lower = Lower()
        self.homes = ActorHomes(lower.tables, lower.directory, lower.tasks)
        self.homes.say = self.said
        self.created: list[bytes] = []
        self.died: list[bytes] = []
        self.forgotten: list[bytes] = []
        self.homes.actor_created = lambda actor_id, *_: self.created.append(actor_id)
        self.homes.actor_died = lambda actor_id, *_: self.died.append(actor_id)
        self.homes.actor_forgotten = lambda home: self.forgotten.append(home.actor_id)
        lower.directory.creation_freed = self.homes.last_handle_gone
        lower.tasks.binders[m.ACTOR_CREATION] = self.homes.binder()
        for name, restarts in ((b"0", 0), (b"1", 1), (b"9", -1)):
            lower.template(name, m.ACTOR_CREATION, max_restarts=restarts)
        self.handles: list[bytes] = []  # actors that client 0 has a handle of
        self.arguments: dict[bytes, bytes] = {}
        self.hosts: set[tuple[int, bytes, int]] = set()  # (rank, actor, incarnation) alive
        self.routes: dict[tuple[int, bytes], Route] = {}

    # --- what is said ----------------------------------------

    def said(self, rank: int, message: Any) -> None:
        if type(message) is m.ActorIs:
            route = self.routes[rank, message.actor_id]
            move(route, TOLD[ActorState(message.state)])
            if len(route.story.moves) > 1:  # the first may be any
                again = message.state == ActorState.RESTARTING
                assert message.incarnation == route.incarnation + again
            assert (message.rank >= 0) == (message.state == ActorState.ALIVE)
            assert (message.failure is not None) == (message.state == ActorState.DEAD)
            route.incarnation = message.incarnation
        else:
            assert type(message) is m.ActorStop

    @rule(rank=st.integers(0, 3))
    def route_asks(self, rank: int) -> None:
        """Of the actor that was created last; there may be none, or none any more."""
        unknown = ids.actor_id(b"u" * 12, 1, ids.id_tail(0, ids.job_id(1)))
        actor_id = self.created[-1] if self.created else unknown
        if (rank, actor_id) not in self.routes:
            self.routes[rank, actor_id] = Route(actor_id)
            self.homes.where(rank, m.ActorWhere(actor_id))
            assert self.routes[rank, actor_id].story.moves, "it is answered"

    # --- what users do ----------------------------------------

    @precondition(lambda self: len(self.lower.tables.homes) < 2)
    @rule(name=st.sampled_from((b"9", b"1", b"0")), argument=st.sampled_from((None, True, False)))
    def create(self, name: bytes, argument: bool | None) -> None:
        actor_id = self.lower.actor_id()
        refs = b""
        if argument is not None:
            refs = self.arguments[actor_id] = self.lower.pending_object()
            if argument:
                self.lower.directory.resolve_inline(refs, b"\0value")
        self.homes.create(self.lower.tables.clients[0], m.CreateActor(
            actor_id, name * 16, b"", refs, len(refs) // 28))
        self.handles.append(actor_id)
        assert self.created[-1] == actor_id

    @precondition(lambda self: self.handles)
    @rule()
    def drop_handle(self) -> None:
        self.lower.directory.release(ids.creation_object_id(self.handles.pop(0)))

    @precondition(lambda self: self.created)
    @rule(no_restart=st.booleans())
    def kill(self, no_restart: bool) -> None:
        self.homes.kill(self.created[-1], no_restart=no_restart)

    @precondition(lambda self: self.arguments)
    @rule()
    def argument_is_made(self) -> None:
        for object_id in self.arguments.values():
            self.lower.directory.resolve_inline(object_id, b"\0value")

    # --- creation ----------------------------------------

    def creations(self) -> list[TaskRecord]:
        """Those that are bound to a rank."""
        return [task for task in self.lower.tables.tasks.values()
                if task.state in (ASSIGNED, RUNNING)]

    @precondition(lambda self: self.lower.queued)
    @rule(rank=st.integers(0, 3))
    def bind(self, rank: int) -> None:
        task = self.lower.queued.pop()
        if self.lower.tables.tasks.get(task.task_id) is not task or task.state is not QUEUED:
            return  # killed meanwhile
        if rank:
            self.lower.tasks.assign(task, rank)
        else:
            move(task, RUN)
            task.worker = LOCAL_WORKER

    @precondition(lambda self: self.creations())
    @rule(how=st.sampled_from(("created",) * 5 + ("crashed", "crashed", "unstarted", "raised")))
    def constructor_ends(self, how: str) -> None:
        task = self.creations()[0]
        rank = max(task.rank, 0)
        tasks = self.lower.tasks
        if how == "created":
            self.hosts.add((rank, task.actor_id, task.attempt))
        if rank == 0:
            if how == "created":
                tasks.complete_many(task, (m.Return(b"\0none"),))
            elif how == "raised":
                self.homes.creation_failed(task, RAISED)
            else:
                self.lower.executor.worker_died(task, DIED, started=how == "crashed")
        elif how == "created":
            tasks.peer_done(rank, m.TaskDone(task.task_id, task.attempt, 1, b"\0none"))
        elif how == "raised":
            tasks.peer_failed(rank, m.TaskFailed(task.task_id, task.attempt, 1, RAISED, False))
        else:
            tasks.peer_crashed(rank, m.TaskCrashed(
                task.task_id, task.attempt, DIED, how == "crashed"))

    # --- hosts ----------------------------------------

    @precondition(lambda self: self.hosts)
    @rule(intended=st.booleans())
    def worker_dies(self, intended: bool) -> None:
        host = min(self.hosts)
        self.hosts.remove(host)
        rank, actor_id, incarnation = host
        home = self.lower.tables.homes.get(actor_id)
        mine = home is not None and home.state is ActorState.ALIVE and (
            (home.rank, home.incarnation) == (rank, incarnation))
        self.homes.actor_down(rank, m.ActorDown(actor_id, incarnation, DIED, intended))
        assert not mine or home is not None and home.state is not ActorState.ALIVE

    @precondition(lambda self: any(home.state is ActorState.ALIVE
                                   for home in self.lower.tables.homes.values()))
    @rule(earlier=st.booleans())
    def somebody_else_says_it_died(self, earlier: bool) -> None:
        """Another rank of this incarnation, or its host of an earlier one."""
        home = next(home for home in self.lower.tables.homes.values()
                    if home.state is ActorState.ALIVE)
        before = (home.story, home.incarnation, home.pid)
        rank = home.rank if earlier else home.rank + 1
        incarnation = home.incarnation - earlier
        self.homes.actor_at(rank, m.ActorAt(home.actor_id, incarnation, 77))
        self.homes.actor_down(rank, m.ActorDown(home.actor_id, incarnation, DIED, True))
        assert (home.story, home.incarnation, home.pid) == before

    # --- what holds ----------------------------------------

    def holds_of(self, actor_id: bytes) -> int:
        """Of the argument: client 0's, the creation task's, and one for a restart."""
        home: ActorHome | None = self.lower.tables.homes.get(actor_id)
        again = (home is not None and home.state is not ActorState.DEAD
                 and home.template.max_restarts != 0)
        return 1 + (ids.creation_task_id(actor_id) in self.lower.tables.tasks) + again

    @invariant()
    def holds(self) -> None:
        self.homes.validate()
        self.lower.tasks.validate()
        for actor_id, object_id in self.arguments.items():
            assert self.lower.tables.objects[object_id].count == self.holds_of(actor_id)
        for (_, actor_id), route in self.routes.items():
            home = self.lower.tables.homes.get(actor_id)
            assert route.state == (ActorState.DEAD if home is None else home.state), "all are told"
        assert len(set(self.died)) == len(self.died), "once"
        assert len(set(self.forgotten)) == len(self.forgotten), "once"
        assert not set(self.forgotten) - set(self.died)

    def teardown(self) -> None:
        """All handles go, all workers end: nothing is left but the arguments."""
        while self.handles:
            self.drop_handle()
        self.argument_is_made()
        while self.lower.queued or self.creations() or self.hosts:
            while self.lower.queued:
                self.bind(1)
            while self.creations():
                self.constructor_ends("created")
            while self.hosts:
                self.worker_dies(False)
            self.holds()
        assert not self.lower.tables.homes and not self.lower.tables.tasks
        assert sorted(self.forgotten) == sorted(self.created)
        assert set(self.lower.tables.objects) == set(self.arguments.values())


TestHomes = HomesMachine.TestCase


@pytest.mark.parametrize("how", ["created", "raised", "crashed", "unstarted"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_killed_as_it_is_created_dies_once(how: str, rank: int) -> None:
    """It holds its argument for a restart, and lets go of it once."""
    play = HomesMachine()
    play.create(b"9", True)
    play.bind(rank)
    play.kill(no_restart=True)
    play.constructor_ends(how)
    play.holds()
    assert play.died == play.created
    play.teardown()


@pytest.mark.parametrize("rank", [0, 1])
def test_one_whose_constructor_crashes_is_created_again(rank: int) -> None:
    play = HomesMachine()
    play.create(b"1", True)
    play.route_asks(2)
    for _ in range(2):
        play.bind(rank)
        play.constructor_ends("crashed")
        play.holds()
    assert play.died == play.created, "its one restart is used up"
    play.teardown()
