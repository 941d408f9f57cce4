"""An actor whose place has been taken meanwhile asks for another one."""

from __future__ import annotations

from hpcray.node.machine import Machine
from hpcray.node.records import TaskRecord
from hpcray.node.states import move
from hpcray.node.task_states import READY
from hpcray.protocol import ids
from hpcray.protocol import messages as m

JOB = ids.job_id(1)
CPU = (("CPU", m.UNIT),)


def node_zero() -> Machine:
    resources = {"CPU": m.UNIT}
    machine = Machine(0, 2, resources, 1 << 26, JOB, {"job_key": "00"})
    for rank in range(2):
        machine.joined(
            m.Joined(rank, "host", "127.0.0.1", 1, tuple(resources.items())))
    return machine


def creation(rank: int = -1) -> TaskRecord:
    actor_id = ids.actor_id(b"p" * 12, 1, ids.id_tail(0, JOB))
    template = m.Template(b"t" * 16, b"f" * 16, m.ACTOR_CREATION, "A", resources=CPU, rank=rank)
    task = TaskRecord(ids.creation_task_id(actor_id), template, b"", b"", 0, 0, 0)
    task.actor_id = actor_id
    move(task, READY)
    return task


def place(machine: Machine, task: TaskRecord) -> bool:
    """Grant it a place here, where somebody else was quicker; whether it gets one elsewhere."""
    machine.dispatcher.ledger.acquire(CPU)
    machine.dispatcher.enqueue(task)
    for now_s in (0.0, 0.01, 0.05, 0.2, 0.3):
        machine.end_turn(now_s)
        machine.tick(now_s)
        if any(type(message) is m.Assign for message in machine.outbox.peers[1]):
            return True
        assert machine.wants_ticks, "somebody has to look again"
    return False


def test_it_gets_another_one():
    assert place(node_zero(), creation())


def test_one_that_must_be_here_waits_here():
    assert not place(node_zero(), creation(rank=0))
