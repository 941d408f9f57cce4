"""What the machines tell the loop to do: messages per destination, and actions. Pure data.

The machines append; the loop carries out and clears once per turn. Messages to one destination
leave in the order they were appended.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import msgspec

from hpcray.protocol.messages import Located


class StartWorker(msgspec.Struct, frozen=True):
    """Answer with the worker's Hello, or with `Dispatcher.worker_refused`."""

    number: int
    for_tasks: bool = True  # and not for an actor, which keeps it


class KillWorker(msgspec.Struct, frozen=True):
    number: int


class TakeBack(msgspec.Struct, frozen=True):
    """Read the worker's unread datagrams back; answer with `Dispatcher.taken_back`."""

    number: int


class GrantSegment(msgspec.Struct, frozen=True):
    """Create the segment and send it to the client; or answer with `NodeMemory.refused`."""

    client: int
    segment: int
    nbytes: int


class OpenSegment(msgspec.Struct, frozen=True):
    client: int
    segment: int


class CloseSegment(msgspec.Struct, frozen=True):
    segment: int


class Introduce(msgspec.Struct, frozen=True):
    """Send the worker a descriptor by which it can answer the client."""

    worker: int
    client: int


class IntroduceActor(msgspec.Struct, frozen=True):
    """Send the client a descriptor by which it can call the actor."""

    client: int
    actor_id: bytes
    worker: int


class StartPull(msgspec.Struct, frozen=True):
    """Find a range and post the receives; `Pulls` hears what came of it."""

    object_id: bytes
    rank: int
    nbytes: int


class ServePull(msgspec.Struct, frozen=True):
    """Send from shared memory, pinned until DataSent; or, `mapped`, say where, until PullEnded."""

    object_id: bytes
    rank: int
    transfer: int
    location: Located
    mapped: bool


class FreeNodeRange(msgspec.Struct, frozen=True):
    """A range of the node's own segments (pulled copies) is free."""

    segment: int
    offset: int


class Preload(msgspec.Struct, frozen=True):
    """Workers to come find these modules imported."""

    modules: tuple[str, ...]


class StopJob(msgspec.Struct, frozen=True):
    park: bool
    status: int = 0


class FailJob(msgspec.Struct, frozen=True):
    """The job cannot go on: end it, and tell why."""

    why: str


Action = (
    StartWorker | KillWorker | TakeBack | GrantSegment | OpenSegment | Introduce
    | IntroduceActor | CloseSegment | StartPull | ServePull | FreeNodeRange | Preload | StopJob
    | FailJob
)


class Outbox:
    def __init__(self) -> None:
        self.clients: defaultdict[int, list[Any]] = defaultdict(list)
        self.peers: defaultdict[int, list[Any]] = defaultdict(list)
        # Datagrams for workers' task channels: (worker, messages of one datagram).
        self.tasks: list[tuple[int, list[Any]]] = []
        self.actions: list[Action] = []
        # Workers that must look at their messages now, whatever they run: these leave first, so
        # who asked for it is not answered before.
        self.interrupts: list[int] = []
        # Warnings for the driver's terminal.
        self.notices: list[str] = []
        # Those that would not get there: for this node's own stderr.
        self.own_notices: list[str] = []
