"""A large error lies in shared memory as a large result does, and goes when nobody wants it."""

from __future__ import annotations

from typing import Any

import pytest

from hpcray.node import outbox as out
from hpcray.node.machine import Machine
from hpcray.protocol import ids
from hpcray.protocol import messages as m

JOB = ids.job_id(1)
CPU = (("CPU", m.UNIT),)
NBYTES = 200_000


class Cluster:
    """Two nodes with a driver each; a worker runs what it is given when `run` says how it ends."""

    def __init__(self) -> None:
        self.machines = [
            Machine(rank, 2, {"CPU": m.UNIT}, 1 << 24, JOB, {"node_ids": ["a", "b"]})
            for rank in range(2)]
        self.running: list[tuple[int, int, m.Run]] = []  # (rank, worker, run)
        self.segments: dict[tuple[int, int], int] = {}  # (rank, client) -> its segment
        for machine in self.machines:
            for rank in range(2):
                machine.cluster.joined(m.Joined(rank, "h", "h", rank, tuple(CPU)))
            machine.connect(0)
        self.driver = 0

    def tell(self, rank: int, client: int, *batch: Any) -> None:
        self.machines[rank].client_messages(client, list(batch))

    def settle(self) -> None:
        moved = True
        while moved:
            moved = False
            for rank, machine in enumerate(self.machines):
                machine.end_turn(0.0)
                box = machine.outbox
                for to, batch in list(box.peers.items()):
                    del box.peers[to]
                    moved = moved or bool(batch)
                    self.machines[to].peer_messages(
                        rank, m.decode_to_peer(m.encode(batch)))
                for number, batch in box.tasks:
                    moved = True
                    self.running += [
                        (rank, number, run) for run in batch if type(run) is m.Run]
                box.tasks = []
                actions, box.actions = box.actions, []
                for action in actions:
                    moved = True
                    if type(action) is out.StartWorker:
                        machine.connect(action.number)
                        self.tell(rank, action.number, m.Hello(1000 + action.number))
                    elif type(action) is out.GrantSegment:
                        self.segments[(rank, action.client)] = action.segment

    def submit(self, **options: Any) -> bytes:
        template = m.Template(b"t" * 16, b"f" * 16, m.TASK, "f", resources=CPU, **options)
        task = ids.task_id(
            ids.task_prefix(ids.driver_task_id(0, JOB), 0), 1, ids.id_tail(0, JOB))
        self.tell(0, 0, m.DefineTemplate(template), m.SubmitTask(task, b"t" * 16, b"\0"))
        self.settle()
        return task + ids.FIRST_RETURN

    def fail(self, *, retry: bool = False) -> None:
        """What runs raises, largely."""
        rank, worker, run = self.running.pop(0)
        self.tell(rank, worker, m.SegmentRequest(NBYTES))
        self.settle()
        place = m.Located(self.segments[(rank, worker)], 0, NBYTES)
        self.tell(rank, worker, m.Failed(run.task_id, run.attempt, 10, place, retry))
        self.settle()

    def object_bytes(self) -> list[int]:
        return [machine.memory.object_bytes for machine in self.machines]

    def validate(self) -> None:
        for machine in self.machines:
            machine.validate()


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.mark.parametrize("rank", [0, 1])
def test_it_is_the_value_and_is_freed_with_its_ref(cluster: Cluster, rank: int) -> None:
    object_id = cluster.submit(rank=rank)
    cluster.fail()
    home = cluster.machines[0]
    record = home.directory.records[object_id]
    assert record.nbytes == NBYTES and record.value is None
    assert record.extra is not None and record.extra.copies == [rank]
    assert cluster.object_bytes() == [NBYTES if r == rank else 0 for r in range(2)]
    assert home.inventory.object_status(record) == "FAILED"
    assert home.tasks.records == {}
    cluster.validate()
    cluster.tell(0, 0, m.Drop(object_id))
    cluster.settle()
    assert cluster.object_bytes() == [0, 0]
    cluster.validate()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_retry_frees_it(cluster: Cluster, rank: int) -> None:
    object_id = cluster.submit(rank=rank, max_retries=1, retry_exceptions=True)
    cluster.fail(retry=True)
    assert cluster.object_bytes() == [0, 0]
    cluster.fail(retry=True)
    assert cluster.object_bytes()[rank] == NBYTES
    assert cluster.machines[0].directory.records[object_id].nbytes == NBYTES
    cluster.validate()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_cancelled_task_s_is_freed(cluster: Cluster, rank: int) -> None:
    object_id = cluster.submit(rank=rank)
    cluster.machines[0].tasks.cancel(object_id[:24], force=False, recursive=False)
    cluster.settle()
    cluster.fail()
    assert cluster.object_bytes() == [0, 0]
    value = cluster.machines[0].directory.records[object_id].value
    assert value is not None and b"TaskCancelledError" in value
    cluster.validate()


@pytest.mark.parametrize("rank", [0, 1])
def test_nobody_waits_any_more(cluster: Cluster, rank: int) -> None:
    object_id = cluster.submit(rank=rank)
    cluster.tell(0, 0, m.Drop(object_id))
    cluster.settle()
    cluster.fail()
    assert cluster.object_bytes() == [0, 0]
    cluster.validate()


def test_of_several_returns_it_must_be_inline(cluster: Cluster) -> None:
    cluster.submit(return_count=2)
    with pytest.raises(ValueError, match="has to be inline"):
        cluster.fail()
