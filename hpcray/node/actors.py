"""Actors on one node: the three parts, and how they speak to each other. Pure.

Three roles, often on three nodes:

    caller's node   node/actor_routes.py   keeps calls in order until they can be sent
    home            node/actor_homes.py    creates, restarts, tells where it is, and that it ended
    host            node/actor_hosts.py    its worker; answers every call it was given

    route --ActorWhere--> home --ActorStop--> host --ActorAt, ActorDown--> home --ActorIs--> route
    route --a call------> host --its outcome, a crash, a return---------------------------> route

Where two roles are on one node they say the same, through the same port: `Mail`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from hpcray.node.actor_homes import ActorHomes
from hpcray.node.actor_hosts import ActorHosts
from hpcray.node.actor_routes import ActorRoutes
from hpcray.node.directory import Directory
from hpcray.node.dispatch import Dispatcher
from hpcray.node.executor import Executor
from hpcray.node.holders import Holders
from hpcray.node.membership import Membership
from hpcray.node.outbox import Outbox
from hpcray.node.records import TaskRecord
from hpcray.node.tables import Tables
from hpcray.node.tasks import Tasks
from hpcray.protocol.messages import (
    ACTOR_CREATION,
    METHOD,
    ActorAt,
    ActorDown,
    ActorIs,
    ActorStop,
    ActorWhere,
)


class Mail:
    """Messages from one role to another, on whichever node that is.

    On this node they are heard at once, but one after the other: what a message leads to is said
    when it has been dealt with. So no part is entered again from within what it has said.
    """

    def __init__(self, rank: int, outbox: Outbox, holders: Holders) -> None:
        self._rank = rank
        self._outbox = outbox
        self._holders = holders
        self.handlers: dict[type, Callable[[int, Any], None]] = {}
        self._own: deque[Any] = deque()
        self._delivering = False

    def say(self, rank: int, message: Any) -> None:
        if rank != self._rank:
            self._outbox.peers[rank].append(message)
            return
        self._own.append(message)
        if self._delivering:
            return
        self._delivering = True
        try:
            while self._own:
                message = self._own.popleft()
                self.handlers[type(message)](rank, message)
        finally:
            self._delivering = False

    def say_last(self, rank: int, message: Any) -> None:
        """Behind whatever has been said to that rank of a process that is dead."""
        if rank == self._rank:
            self.say(rank, message)
        else:
            self._holders.release_last(rank, message)


class Actors:
    def __init__(
        self, tables: Tables, outbox: Outbox, membership: Membership, directory: Directory,
        tasks: Tasks, executor: Executor, dispatcher: Dispatcher,
    ) -> None:
        routes = self.routes = ActorRoutes(tables, outbox, membership, directory, tasks)
        homes = self.homes = ActorHomes(tables, directory, tasks)
        hosts = self.hosts = ActorHosts(
            tables, outbox, directory, tasks, executor, dispatcher)
        mail = Mail(tables.rank, outbox, directory.holders)
        # What they hear of each other, from this node or another.
        self.handlers = mail.handlers = {
            ActorWhere: homes.where,
            ActorIs: routes.actor_is,
            ActorStop: hosts.stop,
            ActorAt: homes.actor_at,
            ActorDown: homes.actor_down,
        }
        routes.say = homes.say = hosts.say = mail.say
        hosts.say_last = mail.say_last
        # Calls between a caller and a host on this node are handed over as they are.
        routes.accept = hosts.accept
        routes.accept_called = hosts.accept_called
        hosts.call_returned = routes.came_back
        # Who binds their tasks, and has them run.
        tasks.binders[METHOD] = routes.binder(cancelled=self._call_cancelled)
        tasks.binders[ACTOR_CREATION] = homes.binder()
        executor.runners[METHOD] = hosts.runner()
        executor.runners[ACTOR_CREATION] = hosts.creation_runner()

    def _call_cancelled(self, task: TaskRecord) -> None:
        """Those behind it must not wait for its dependencies."""
        self.routes.call_ready(task)
        self.hosts.go_on(task)

    def validate(self) -> None:
        self.routes.validate()
        self.homes.validate()
        self.hosts.validate()
