"""What a node knows, as plain tables. Each has one part of the machine that writes it; others read.

So a part that only looks something up needs the table, and not the part that keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcray.node.actor_records import ActorHome, Hosted, Route
from hpcray.node.records import ClientRecord, ObjectRecord, TaskRecord, TemplateStatistics, Worker
from hpcray.protocol.messages import Joined, PeerReply, Template

# Ask another node: (rank, request, arguments, who hears the answer) -> the question's number.
Forward = Callable[[int, str, Any, Callable[[PeerReply], None]], int]


class Tables:
    __slots__ = ("clients", "homes", "hosted", "job_id", "nodes", "now_s", "objects", "rank",
                 "routes", "session", "size", "statistics", "tasks", "templates", "workers")

    def __init__(self, rank: int, size: int, job_id: bytes, session: dict[str, Any]) -> None:
        self.rank = rank
        self.size = size
        self.job_id = job_id
        self.session = session  # the job's facts, as its driver gave them
        self.now_s = 0.0  # of this turn
        self.nodes: dict[int, Joined] = {}  # by rank (Cluster)
        self.clients: dict[int, ClientRecord] = {}  # by number (Machine)
        self.workers: dict[int, Worker] = {}  # by number (Dispatcher)
        self.objects: dict[bytes, ObjectRecord] = {}  # (Directory)
        self.tasks: dict[bytes, TaskRecord] = {}  # (Tasks, Executor)
        self.templates: dict[bytes, Template] = {}  # (Tasks)
        self.statistics: dict[bytes, TemplateStatistics] = {}  # by template (Tasks)
        self.homes: dict[bytes, ActorHome] = {}  # actors of this home (Actors)
        self.hosted: dict[bytes, Hosted] = {}  # actors that live here (Actors)
        self.routes: dict[bytes, Route] = {}  # actors that somebody here calls (Actors)


def unwired(*_: Any, **__: Any) -> Any:
    """A port that `machine.py` has not connected (yet)."""
    raise AssertionError("this port leads nowhere: machine.py connects it")
