"""The lower parts of a node, real and connected, for tests of the parts above them."""

from __future__ import annotations

from typing import Any

from hpcray.node.directory import Directory
from hpcray.node.executor import Executor
from hpcray.node.membership import Membership
from hpcray.node.memory import NodeMemory
from hpcray.node.outbox import Outbox
from hpcray.node.records import ClientRecord, TaskRecord
from hpcray.node.streams import Streams
from hpcray.node.tables import Tables
from hpcray.node.tasks import Tasks
from hpcray.node.templates import Templates
from hpcray.protocol import ids
from hpcray.protocol import messages as m

JOB = ids.job_id(1)


class Lower:
    """Of rank 0. Nothing is bound to anybody: `queued` has what would be."""

    def __init__(self, size: int = 4, clients: int = 3) -> None:
        self.tables = Tables(0, size, JOB, {})
        self.outbox = Outbox()
        self.membership = Membership(self.tables)
        for rank in range(size):
            self.membership.joined(m.Joined(rank, "host", "host", 1, ()))
        memory = self.memory = NodeMemory(self.tables, self.outbox, 1 << 26)
        self.directory = Directory(self.tables, self.outbox, self.membership, memory)
        streams = Streams(self.tables, self.outbox, memory, self.directory)
        self.tasks = Tasks(self.tables, self.outbox, memory, self.directory, streams)
        self.executor = Executor(self.tables, self.outbox, memory, self.directory, self.tasks)
        self.queued: list[TaskRecord] = []
        tasks, directory, executor = self.tasks, self.directory, self.executor
        directory.dependency_ready = tasks.dependency_ready
        directory.dependency_refused = tasks.dependency_refused
        directory.creation_freed = lambda object_id: None
        self.templates = Templates(self.tables, self.outbox)
        self.templates.learn = lambda shape: None
        tasks.tell_template = self.templates.tell
        tasks.enqueue = lambda task, front=False: self.queued.append(task)
        tasks.place = self.stays_here
        tasks.over_elsewhere = tasks.back_from = lambda rank, task: None
        tasks.failed_for_good = lambda task, error: None
        tasks.arrived = executor.arrived
        tasks.refused_to_arrive = executor.refused_to_arrive
        tasks.cancel_here = executor.cancel_here
        executor.enqueue = self.queued.append
        executor.work_came = lambda template: None
        executor.reason_of_group = lambda template: None
        for number in range(clients):
            self.tables.clients[number] = ClientRecord(number)
        self._count = 0

    def stays_here(self, task: TaskRecord) -> bool:
        """Actors wait for a place that the global scheduler finds."""
        if task.template.kind == m.ACTOR_CREATION:
            self.queued.append(task)
        return task.template.kind == m.ACTOR_CREATION

    def template(self, name: bytes, kind: int, **options: Any) -> m.Template:
        template = m.Template(name * 16, b"f" * 16, kind, name.decode(), **options)
        self.templates.define(template)
        return template

    def task_id(self, client: int = 0, home: int = 0) -> bytes:
        self._count += 1
        return ids.task_id(bytes((client,)) * 12, self._count, ids.id_tail(home, JOB))

    def actor_id(self, home: int = 0) -> bytes:
        self._count += 1
        return ids.actor_id(b"a" * 12, self._count, ids.id_tail(home, JOB))

    def pending_object(self) -> bytes:
        """Of this home, which client 0 holds."""
        object_id = self.task_id() + ids.FIRST_RETURN
        self.directory.created(object_id)
        return object_id

    def said_to(self, rank: int) -> list[Any]:
        """What has left for `rank`, less what every peer is told of templates and refs."""
        self.directory.end_turn()
        dull = (m.TemplateDef, m.HolderAdd, m.HolderDrop, m.Want)
        return [message for message in self.outbox.peers.pop(rank, [])
                if not isinstance(message, dull)]
