"""What is too large for one message between two nodes: errors, and the arguments of a task.

A large error lies in shared memory as a large result does, and goes when nobody wants it.
Arguments that are too many together are asked for by id.
"""

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
            Machine(rank, 2, {"CPU": m.UNIT}, 1 << 24, JOB, {"job_key": "00"})
            for rank in range(2)]
        self.running: list[tuple[int, int, m.Run]] = []  # (rank, worker, run)
        self.segments: dict[tuple[int, int], int] = {}  # (rank, client) -> its segment
        for machine in self.machines:
            for rank in range(2):
                machine.joined(m.Joined(rank, "h", "h", rank, tuple(CPU)))
            machine.connect(0)
        self.largest = 0  # message between them

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
                    self.largest = max(self.largest, *(len(m.encode(one)) for one in batch), 0)
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

    def put(self, values: list[bytes]) -> list[bytes]:
        """Objects of the driver of rank 0."""
        prefix = ids.task_prefix(ids.driver_task_id(0, JOB), 0)
        found = [ids.return_id(ids.task_id(prefix, number, ids.id_tail(0, JOB)), 0)
                 for number, _ in enumerate(values, 1000)]
        self.tell(0, 0, *(m.PutInline(i, value)
                          for i, value in zip(found, values, strict=True)))
        return found

    def submit(self, deps: list[bytes] | None = None, **options: Any) -> bytes:
        template = m.Template(b"t" * 16, b"f" * 16, m.TASK, "f", resources=CPU, **options)
        task = ids.task_id(
            ids.task_prefix(ids.driver_task_id(0, JOB), 0), 1, ids.id_tail(0, JOB))
        self.tell(0, 0, m.DefineTemplate(template), m.SubmitTask(
            task, b"t" * 16, b"\0", b"".join(deps or ()), len(deps or ())))
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


def test_it_must_be_inline_of_several_returns_or_before_a_retry(cluster: Cluster) -> None:
    """Before a retry: whoever waits on the node that ran it would take it for the outcome."""
    cluster.submit(return_count=2)
    with pytest.raises(ValueError, match="has to be inline"):
        cluster.fail()
    cluster.submit(rank=1, max_retries=1, retry_exceptions=True)
    with pytest.raises(ValueError, match="has to be inline"):
        cluster.fail(retry=True)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("count", "nbytes"), [(40, 60_000), (3000, 400), (2, 100_000)])
def test_arguments_that_are_too_many_for_a_message(
    cluster: Cluster, rank: int, count: int, nbytes: int
) -> None:
    values = [number.to_bytes(4, "big") * (nbytes // 4) for number in range(count)]
    deps = cluster.put([b"\0" + value for value in values])
    cluster.largest = 0
    cluster.submit(deps, rank=rank)
    assert len(cluster.running) == 1
    ran, worker, run = cluster.running[0]
    assert ran == rank
    assert run.ids == b"".join(deps)
    if nbytes > 512:
        assert cluster.largest < 300_000, "no message holds them all"
        assert len(m.encode(run)) < 200_000 + 30 * count
    # What the worker was not given it asks for.
    missing = [i for i, dep in zip(deps, run.deps, strict=True) if dep == b""]
    assert bool(missing) == (count > 2 and nbytes > 512 or nbytes == 100_000)
    cluster.machines[rank].outbox.clients.clear()
    cluster.tell(rank, worker, m.Get(b"".join(missing)))
    cluster.settle()
    answers = {message.object_id: message.value
               for message in cluster.machines[rank].outbox.clients[worker]
               if type(message) is m.Value}
    got = [answers.get(i, dep) for i, dep in zip(deps, run.deps, strict=True)]
    assert got == [b"\0" + value for value in values]
    cluster.tell(rank, worker, m.Done(run.task_id, run.attempt, 10, b"\0"))
    cluster.tell(0, 0, *(m.Drop(i) for i in deps))
    cluster.settle()
    assert all(i not in machine.directory.records
               for machine in cluster.machines for i in deps), "nothing is left"
    cluster.validate()
