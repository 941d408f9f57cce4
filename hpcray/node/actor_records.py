"""The mutable records of actors: at a caller's node, at the home, at the host.

Their states and what leads from one to another: `node/actor_states.py`.
"""

from __future__ import annotations

from collections import deque

from hpcray.node.actor_states import NEW_ACTOR, NEW_ROUTE, ActorState, RouteState
from hpcray.node.records import TaskRecord
from hpcray.node.states import Story
from hpcray.protocol import values
from hpcray.protocol.messages import CreateActor, Template

# Calls of one turn wait for each other: those of a caller, or each for itself.
Turn = tuple[int, int] | bytes


def turn_of(task: TaskRecord) -> Turn:
    return task.task_id if task.template.unordered else (task.home, task.client)


class Route:
    """An actor that somebody here calls."""

    __slots__ = ("actor_id", "blocked", "called", "failure", "incarnation", "rank", "resend",
                 "sent", "state", "story", "waiting")

    def __init__(self, actor_id: bytes) -> None:
        self.actor_id = actor_id
        self.state: RouteState = NEW_ROUTE.state
        self.story: Story = NEW_ROUTE
        # What the home said last.
        self.rank = -1
        self.incarnation = 0
        self.failure: values.Failure | None = None
        # Calls that are at the host (or on their way), all at this incarnation of it.
        self.sent = 0
        self.called = 0
        # Calls whose turn it is, but the actor is not there (yet); those it gave back go first.
        self.resend: deque[TaskRecord] = deque()
        self.waiting: deque[TaskRecord] = deque()
        # Per caller: calls behind one whose dependencies are not ready.
        self.blocked: dict[Turn, deque[TaskRecord]] = {}


class ActorHome:
    """An actor whose home is here: what was asked for, and what has become of it."""

    __slots__ = ("actor_id", "args", "client", "dep_count", "detached", "ending", "failure",
                 "handle", "incarnation", "name", "namespace", "pid", "rank", "refs",
                 "restarts_left", "state", "story", "subscribers", "template")

    def __init__(self, message: CreateActor, template: Template, client: int) -> None:
        self.actor_id = message.actor_id
        self.template = template
        self.client = client
        self.args = message.args
        self.refs = message.refs
        self.dep_count = message.dep_count
        self.handle = message.handle
        self.detached = message.detached
        self.pid = 0  # of its worker
        self.name = message.name
        self.namespace = message.namespace
        self.state: ActorState = NEW_ACTOR.state
        self.story: Story = NEW_ACTOR
        self.rank = -1  # ALIVE: of its host
        self.incarnation = 0
        self.restarts_left = template.max_restarts
        # Ranks that are told of every change, from the first time they asked.
        self.subscribers: list[int] = []
        self.failure: values.Failure | None = None
        # ALIVE, but its host has been told to end it for good.
        self.ending = False


class Hosted:
    """An actor that lives in a worker of this node."""

    __slots__ = ("actor_id", "alive", "blocked", "calls", "devices", "home", "in_flight",
                 "incarnation", "intended", "template", "worker")

    def __init__(self, task: TaskRecord, worker: int, devices: tuple[int, ...]) -> None:
        self.actor_id = task.actor_id
        self.template = task.template
        self.home = task.home
        self.incarnation = task.attempt
        self.worker = worker
        self.devices = devices
        self.alive = False  # its constructor has returned
        # Its end is wanted (exit_actor, last handle gone, kill): the reason, or None.
        self.intended: str | None = None
        # Calls on their way to the worker: whose dependencies come, whose turn it is, sent.
        self.blocked: dict[Turn, deque[TaskRecord]] = {}
        self.calls: deque[TaskRecord] = deque()
        self.in_flight: dict[bytes, TaskRecord] = {}


def class_name(template: Template) -> str:
    """The class an actor creation's template speaks of."""
    return template.name.removesuffix(".__init__")


def killed_failure(actor_id: bytes) -> values.Failure:
    return values.Failure(
        "ActorDiedError", "The actor is dead because it was killed by `hpcray.kill`.",
        actor_id.hex())


def gone_failure(actor_id: bytes) -> values.Failure:
    return values.Failure(
        "ActorDiedError",
        "The actor is dead: all handles to it went out of scope, or its job ended.",
        actor_id.hex())
