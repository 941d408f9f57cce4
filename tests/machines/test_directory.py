"""Directory: a shortage of memory that passes harms nobody but those who waited then."""

from __future__ import annotations

from typing import Any

from hpcray.node import outbox as out
from hpcray.node.machine import Machine
from hpcray.node.records import READY
from hpcray.protocol import ids, values
from hpcray.protocol import messages as m

JOB = ids.job_id(1)
FULL = values.Failure("ObjectStoreFullError", "no room")


def object_of(rank: int, number: int = 1) -> bytes:
    prefix = ids.task_prefix(ids.driver_task_id(rank, JOB), 0)
    return ids.task_id(prefix, number, ids.id_tail(rank, JOB)) + ids.PUT_INDEX


class Node:
    def __init__(self, rank: int) -> None:
        self.machine = Machine(rank, 3, {"CPU": m.UNIT}, 1 << 20, JOB, {})
        self.machine.connect(0)
        self.machine.connect(1)

    def get(self, client: int, object_id: bytes) -> None:
        self.machine.client_messages(client, [m.Get(object_id)])
        self.machine.end_turn(0.0)

    def pulls(self) -> list[int]:
        actions, self.machine.outbox.actions = self.machine.outbox.actions, []
        return [a.rank for a in actions if type(a) is out.StartPull]

    def heard(self, client: int) -> list[Any]:
        return [x for x in self.machine.outbox.clients.pop(client, [])
                if type(x) in (m.Value, m.ValueAt)]


def at_home() -> tuple[Node, bytes]:
    """The home of an object that rank 1 and rank 2 have in memory."""
    node = Node(0)
    object_id = object_of(0)
    record = node.machine.directory.created(object_id)
    record.state, record.nbytes = READY, 5000
    record.more().copies = [1, 2]
    return node, object_id


def elsewhere() -> tuple[Node, bytes]:
    node = Node(1)
    object_id = object_of(0)
    node.machine.client_messages(0, [m.Hold(object_id)])
    node.machine.directory.record(object_id).more().sources = (0,)
    node.machine.directory.object_ready(object_id, m.Remote(5000, (0, 2)))
    return node, object_id


def test_a_passing_shortage_is_not_the_object_s_value() -> None:
    for node, object_id in (at_home(), elsewhere()):
        node.get(0, object_id)
        assert len(node.pulls()) == 1
        node.machine.directory.pull_failed(object_id, FULL)
        [told] = node.heard(0)
        assert values.unpack_failure(told.value) == FULL
        record = node.machine.directory.records[object_id]
        assert record.value is None and record.state == READY
        node.get(1, object_id)  # somebody else, a moment later
        assert len(node.pulls()) == 1
        where = m.Located(1, 0, 5000)
        node.machine.memory.budget.grant(None, 5000)
        node.machine.memory.node_segments[1] = None
        node.machine.memory.used(where)
        node.machine.directory.pulled(object_id, where)
        assert node.heard(1) == [m.ValueAt(object_id, where)] and not node.heard(0)


def test_another_rank_s_question_is_answered_with_the_copies() -> None:
    node, object_id = at_home()
    node.get(0, object_id)
    node.machine.directory.pull_failed(object_id, FULL)
    node.machine.peer_messages(2, [m.Want(object_id)])
    node.machine.end_turn(0.0)
    assert m.ObjectReady(object_id, m.Remote(5000, (1, 2))) in node.machine.outbox.peers[2]


def test_a_copy_that_is_gone_leaves_the_others() -> None:
    node, object_id = at_home()
    node.get(0, object_id)
    [first] = node.pulls()
    node.machine.directory.pull_failed(object_id, None, first)
    assert node.pulls() == [3 - first]
    node.machine.directory.pull_failed(object_id, None, 3 - first)
    [told] = node.heard(0)
    assert values.unpack_failure(told.value).kind == "ObjectLostError"


def test_a_task_whose_argument_finds_no_room_has_the_error_and_the_next_one_tries_again() -> None:
    node, object_id = elsewhere()
    machine = node.machine
    template = m.Template(b"t" * 16, b"f" * 16, m.TASK, "f", resources=(("CPU", m.UNIT),))
    machine.templates.define(template)
    machine.dispatcher.start_workers(1)
    machine.connect(2)
    machine.dispatcher.workers[1].number = 1
    machine.client_messages(1, [m.Hello(1)])
    for number in (7, 8):
        task_id = ids.task_of_object(object_of(0, number))
        machine.peer_messages(0, [m.Assign(
            task_id, b"t" * 16, 0, b"", (m.Remote(5000, (0, 2)),), object_id)])
        machine.end_turn(0.0)
        assert len(node.pulls()) == 1
        machine.directory.pull_failed(object_id, FULL)
        machine.end_turn(0.0)
        [(worker, [run])] = machine.outbox.tasks
        machine.outbox.tasks = []
        assert values.unpack_failure(run.deps[0]) == FULL
        machine.client_messages(worker, [m.Failed(task_id, 0, 1, b"\1")])
        machine.end_turn(0.0)
    assert not machine.tasks.records
    assert machine.directory.records[object_id].count == 1  # client 0's
