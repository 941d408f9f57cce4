"""The mutable records of actors: at a caller's node, at the home, at the host."""

from __future__ import annotations

import enum
from collections import deque

from hpcray.node.records import TaskRecord
from hpcray.protocol import values
from hpcray.protocol.messages import CreateActor, Template

# Calls of one turn wait for each other: those of a caller, or each for itself.
Turn = tuple[int, int] | bytes


def turn_of(task: TaskRecord) -> Turn:
    return task.task_id if task.template.unordered else (task.home, task.client)


class ActorState(enum.IntEnum):
    """Travels in `ActorIs.state`; the order means nothing."""

    UNKNOWN = 0  # a route that has not heard from the home
    PENDING = 1
    ALIVE = 2
    RESTARTING = 3
    DEAD = 4


class Route:
    __slots__ = ("actor_id", "blocked", "failure", "incarnation", "open_calls", "rank", "resend",
                 "state", "waiting")

    def __init__(self, actor_id: bytes) -> None:
        self.actor_id = actor_id
        self.state = ActorState.UNKNOWN
        self.rank = -1
        self.incarnation = 0
        self.failure: values.Failure | None = None
        # Calls whose turn it is, but the actor is not there (yet).
        self.resend: deque[TaskRecord] = deque()
        self.waiting: deque[TaskRecord] = deque()
        # Per caller: calls behind one whose dependencies are not ready.
        self.blocked: dict[Turn, deque[TaskRecord]] = {}
        self.open_calls = 0


class ActorHome:
    __slots__ = ("actor_id", "args", "client", "dep_count", "detached", "ending", "failure",
                 "handle", "incarnation", "name", "namespace", "pid", "rank", "refs",
                 "restarts_left", "state", "subscribers", "template")

    def __init__(self, message: CreateActor, template: Template, client: int) -> None:
        self.actor_id = message.actor_id
        self.template = template
        self.client = client
        self.args = message.args
        self.refs = message.refs
        self.dep_count = message.dep_count
        self.handle = message.handle
        self.detached = message.detached
        self.pid = 0  # of its worker, if that is on another node
        self.name = message.name
        self.namespace = message.namespace
        self.state = ActorState.PENDING
        self.rank = -1
        self.incarnation = 0
        self.restarts_left = template.max_restarts
        self.subscribers: list[int] = []
        self.failure: values.Failure | None = None
        # ALIVE, but its host has been told to end it for good.
        self.ending = False


class Hosted:
    __slots__ = ("actor_id", "alive", "blocked", "calls", "devices", "home", "in_flight",
                 "incarnation", "intended", "template", "worker")

    def __init__(self, task: TaskRecord, worker: int, devices: tuple[int, ...]) -> None:
        self.actor_id = task.actor_id
        self.template = task.template
        self.home = task.home
        self.incarnation = task.attempt
        self.worker = worker
        self.devices = devices
        self.alive = False
        # Its end is wanted (exit_actor, last handle gone, kill): the reason, or None.
        self.intended: str | None = None
        self.calls: deque[TaskRecord] = deque()
        self.blocked: dict[Turn, deque[TaskRecord]] = {}
        self.in_flight: dict[bytes, TaskRecord] = {}


def class_name(template: Template) -> str:
    """The class an actor creation's template speaks of."""
    return template.name.removesuffix(".__init__")
