"""The mutable records of a node: one per object it knows, one per task it is responsible for.

Hot: there may be millions. They are structs outside garbage collection (`gc=False`): they hold
bytes, ints, and lists of other records, never a cycle. What few records need lives in an
`ObjectExtra` that exists only then. The states of a task: `node/task_states.py`.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import Any

import msgspec

from hpcray.node.ledger import Shape
from hpcray.node.states import Edge, State, Story, Table
from hpcray.node.task_states import SUBMITTED, WAITING, TaskState
from hpcray.protocol.messages import Located, Template

DRIVER = 0  # its number among the clients of its node

# --- objects ----------------------------------------------------------------------------------


class ObjectState(State):
    PENDING = 0, "nobody has made it yet"
    READY = 1, "its value, or where it is, is known"
    FREED = 2, "no ref is left; the record stays while a view or a pull uses its memory"


PENDING, READY, FREED = ObjectState

OBJECT_MADE = Edge("a value is made, put, or told by its home", (PENDING, READY), READY)
OBJECT_PULLED = Edge("a copy has come here", (PENDING, READY), READY)
OBJECT_FREED = Edge("the last ref is gone", ObjectState, FREED)
OBJECTS = Table("an object", ObjectState, (OBJECT_MADE, OBJECT_PULLED, OBJECT_FREED))
_NEW_OBJECT = OBJECTS.story(PENDING)
# Its home has no record of it: it was freed.
UNKNOWN_OBJECT = OBJECTS.story(READY)


class Where(enum.Enum):
    """Where a node finds the value of an object it knows."""

    NOWHERE = "nobody has made it, or its home has not said where it is"
    INLINE = "in the record"
    LOCAL = "in this host's shared memory"
    REMOTE = "in the shared memory of other nodes"


# How a client waits, in the low bits of a waiter code (client number * 4 + how).
WAIT_VALUE = 0
WAIT_READY = 1
WAIT_LOCAL = 2


class ObjectExtra(msgspec.Struct, gc=False):
    """What only few objects need."""

    # Home only: ranks that hold refs, and ranks that have a copy in shared memory.
    holders: list[int] | None = None
    copies: list[int] | None = None
    # Joined ids of the refs inside the value; their counts include this object (home only).
    contained: bytes = b""
    # Tasks of this node that wait for it.
    dependents: list[Any] | None = None
    # Ranks that asked to be told when it is ready (home only).
    wanters: list[int] | None = None
    # Not home: the home counts us as a holder; we asked the home for it.
    added: bool = False
    wanted: bool = False
    # The value is an error, and in shared memory (home only).
    failed: bool = False
    # A copy is on its way here.
    pulling: bool = False
    # Not home: where copies are.
    sources: tuple[int, ...] = ()


class ObjectRecord(msgspec.Struct, gc=False):
    object_id: bytes
    # Local uses: processes that hold refs, tasks that take it, objects that contain it.
    count: int = 0
    state: ObjectState = PENDING
    story: Story = _NEW_OBJECT
    value: bytes | None = None  # inline
    nbytes: int = 0
    location: Located | None = None  # in this host's shared memory
    pins: int = 0  # views and transfers of `location`
    waiters: Any = None  # None, a waiter code, or a list of them
    extra: ObjectExtra | None = None

    def more(self) -> ObjectExtra:
        extra = self.extra
        if extra is None:
            extra = self.extra = ObjectExtra()
        return extra


def whereabouts(record: ObjectRecord) -> Where:
    if record.value is not None:
        return Where.INLINE
    if record.location is not None:
        return Where.LOCAL
    return Where.REMOTE if record.state is READY else Where.NOWHERE


def is_here(record: ObjectRecord) -> bool:
    """Whether this node can give its value at once."""
    return record.value is not None or record.location is not None


def in_store(record: ObjectRecord) -> bool:
    """Whether it takes memory of this node's store."""
    return record.location is not None


# --- tasks ------------------------------------------------------------------------------------


class TaskRecord(msgspec.Struct, gc=False):
    task_id: bytes
    template: Template
    args: bytes
    refs: bytes
    dep_count: int
    home: int  # the rank that owns the record; others execute for it
    client: int  # who submitted it there
    state: TaskState = WAITING
    story: Story = SUBMITTED  # how it came to be in this state
    attempt: int = 0
    missing: int = 0  # dependencies not ready (home), or not here yet (executor)
    retries_left: int = 0
    rank: int = -1  # ASSIGNED: where
    worker: int = -1  # RUNNING: who
    actor_id: bytes = b""
    # Executor, foreign task: inline values of dependencies, in order (None: in shared memory).
    values: tuple[bytes | None, ...] | None = None
    cancelled: bool = False
    incarnation: int = 0


class TemplateStatistics:
    """How long the tasks of a template take; drives batching and placement."""

    __slots__ = ("count", "mean_us", "raised", "singly", "slow_us", "told")

    def __init__(self) -> None:
        self.count = 0
        self.told = 0  # of these, runs elsewhere
        self.raised = 0  # of those here, runs that raised
        self.mean_us = 0.0
        self.slow_us = 0  # the slowest recent run
        # A worker died under one: batches would blur which, so go one by one from now on.
        self.singly = False

    def add(self, run_us: int) -> None:
        self.count += 1
        if self.count == 1:
            self.mean_us = run_us
            self.slow_us = run_us
            return
        self.mean_us += (run_us - self.mean_us) * 0.1
        if run_us >= self.slow_us:
            self.slow_us = run_us
        else:
            self.slow_us -= (self.slow_us - run_us + 15) >> 4

    def batch(self, limit: int) -> int:
        """How many fit into 1 ms, by the slowest: one slow task must not hold others for longer."""
        if self.count == 0 or self.singly:
            return 1
        return max(1, min(limit, 1000 // (self.slow_us + 1)))


class ClientRecord:
    """A process connected to this node: the driver (number 0) or a worker."""

    __slots__ = ("actors", "add_barrier", "called", "connected", "eligible", "held", "number",
                 "pid", "pins", "released_bytes", "sent_values", "templates", "welcomed")

    def __init__(self, number: int) -> None:
        self.number = number
        self.pid = 0
        self.held: set[bytes] = set()
        # Views of shared memory that live in it: object id -> how many.
        self.pins: dict[bytes, int] = {}
        self.templates: set[bytes] = set()  # that it has defined and not let go
        # Bytes of its own segments given back since it last asked for memory.
        self.released_bytes = 0
        # The last HolderAdd that its refs caused (see node/holders.py); 0: none.
        self.add_barrier = 0
        self.welcomed = False
        # Workers that it has waited for, those that may answer it themselves (ChannelOf), and those
        # whose actors it may call itself (ActorChannel). In this order: once is no conversation.
        self.eligible: set[int] = set()
        self.connected: set[int] = set()
        self.actors: set[int] = set()
        # (client, object) of values (Done.sent_to), and the call (SubmitCall.worker), that it may
        # not have sent yet.
        self.sent_values: list[tuple[int, bytes]] = []
        self.called = b""


# --- workers ----------------------------------------------------------------------------------


class WorkerState(State):
    STARTING = 0, "forked, has not said hello"
    IDLE = 1, "waits for a lease"
    LEASED = 2, "runs tasks"
    ACTOR = 3, "hosts an actor until it exits"
    STOPPING = 4, "told to exit"


_STARTING, _IDLE, _LEASED, _ACTOR, _STOPPING = WorkerState

WORKER_HELLO = Edge("it has said hello", (_STARTING,), _IDLE)
WORKER_LEASED = Edge("a queue leases it for its shape", (_IDLE,), _LEASED)
WORKER_FREE = Edge("its lease has ended", (_LEASED,), _IDLE)
WORKER_HOSTS = Edge("it is given an actor's creation", (_LEASED,), _ACTOR)
WORKER_RETIRES = Edge("it has run max_calls of a function", (_LEASED,), _STOPPING)
WORKER_SPARE = Edge("there are more idle ones than needed", (_IDLE,), _STOPPING)
WORKERS = Table("a worker", WorkerState, (
    WORKER_HELLO, WORKER_LEASED, WORKER_FREE, WORKER_HOSTS, WORKER_RETIRES, WORKER_SPARE))
_NEW_WORKER = WORKERS.story(_STARTING)


class Worker:
    __slots__ = (
        "actor_id", "blocked", "bound_devices", "calls", "datagrams", "devices", "environment",
        "for_tasks", "idle_since_s", "number", "pid", "retiring", "sent_s", "shape", "slow",
        "state", "story",
    )

    def __init__(self, number: int, for_tasks: bool) -> None:
        self.number = number
        self.for_tasks = for_tasks  # what it was started for; it runs what comes
        self.pid = 0
        self.state = WorkerState.STARTING
        self.story = _NEW_WORKER
        self.shape: Shape = ()
        self.devices: tuple[int, ...] = ()
        # Outstanding datagrams, oldest first, none empty; the head of the first is running.
        self.datagrams: deque[deque[TaskRecord]] = deque()
        self.blocked = False
        self.slow = False
        # The runtime environment and the GPUs of its first task: it runs tasks of the same only,
        # since libraries look once per process. None: it has run nothing yet.
        self.environment: bytes | None = None
        self.bound_devices: tuple[int, ...] = ()
        self.actor_id = b""
        self.sent_s = 0.0  # when its oldest datagram began
        self.idle_since_s = 0.0
        self.calls: dict[bytes, int] | None = None  # template -> runs, of those with max_calls
        self.retiring = False  # it has reached one of them: no new work, and then it ends
