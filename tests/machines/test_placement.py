"""Where bundles go, and what a reserved bundle is in the ledger."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcray.node.ledger import ResourceLedger, Shape
from hpcray.node.machine import Machine
from hpcray.node.placement import Room, choose
from hpcray.protocol import ids, values
from hpcray.protocol import messages as m
from hpcray.protocol.messages import UNIT

ONE: Shape = (("CPU", UNIT),)
TWO: Shape = (("CPU", 2 * UNIT),)


def nodes(*cpus: int) -> Room:
    return Room({rank: {"CPU": count * UNIT} for rank, count in enumerate(cpus)})


@pytest.mark.parametrize(("strategy", "bundles", "cpus", "expected"), [
    ("PACK", [ONE, ONE], (1, 2), [1, 1]),  # all on one node if one can
    ("PACK", [ONE, ONE, ONE], (2, 1), [0, 0, 1]),  # else on few
    ("PACK", [ONE, TWO], (1, 2), [0, 1]),  # the large one has no other place
    ("PACK", [TWO], (1, 1), None),
    ("STRICT_PACK", [ONE, ONE], (1, 2), [1, 1]),
    ("STRICT_PACK", [ONE, ONE], (1, 1), None),
    ("SPREAD", [ONE, ONE], (4, 1), [0, 1]),
    ("SPREAD", [ONE, ONE, ONE], (4, 1), [0, 1, 0]),  # two must share
    ("STRICT_SPREAD", [ONE, ONE], (4, 1), [0, 1]),
    ("STRICT_SPREAD", [ONE, ONE, ONE], (4, 1), None),
])
def test_choice(strategy: str, bundles: list[Shape], cpus: tuple[int, ...],
                expected: list[int] | None) -> None:
    assert choose(bundles, strategy, nodes(*cpus)) == expected


@given(strategy=st.sampled_from(["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]),
       sizes=st.lists(st.integers(1, 3), min_size=1, max_size=5),
       cpus=st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_a_choice_fits(strategy: str, sizes: list[int], cpus: list[int]) -> None:
    bundles: list[Shape] = [(("CPU", size * UNIT),) for size in sizes]
    chosen = choose(bundles, strategy, nodes(*cpus))
    if chosen is None:
        return
    for rank, count in enumerate(cpus):
        assert sum(size for size, where in zip(sizes, chosen, strict=True)
                   if where == rank) <= count
    if strategy == "STRICT_PACK":
        assert len(set(chosen)) == 1
    if strategy == "STRICT_SPREAD":
        assert len(set(chosen)) == len(chosen)


def test_a_bundle_is_offered_under_its_own_names() -> None:
    ledger = ResourceLedger({"CPU": 4 * UNIT})
    assert ledger.acquire(TWO) == ()
    ledger.offer("@g", 0, TWO, ())
    own = (("CPU@g", UNIT), ("CPU@g:0", UNIT))
    assert ledger.fits(TWO)  # what is left of the node
    assert ledger.fits(own)
    ledger.acquire(own)
    ledger.acquire((("CPU@g", UNIT),))
    assert not ledger.fits((("CPU@g", UNIT),))
    assert not ledger.fits((("CPU@g", UNIT), ("CPU@g:0", UNIT)))
    ledger.validate([TWO, own, (("CPU@g", UNIT),)])


def test_gpus_of_a_bundle_are_its_own() -> None:
    ledger = ResourceLedger({"GPU": 4 * UNIT})
    pair: Shape = (("GPU", 2 * UNIT),)
    ledger.acquire((("GPU", UNIT),))
    first, second = ledger.acquire(pair), ledger.acquire((("GPU", UNIT),))
    ledger.offer("@g", 0, pair, first)
    ledger.offer("@g", 1, (("GPU", UNIT),), second)
    in_second = (("GPU@g", UNIT), ("GPU@g:1", UNIT))
    assert ledger.acquire(in_second) == second
    assert ledger.acquire((("GPU@g", UNIT // 2),)) == first[:1]
    assert ledger.acquire((("GPU@g", UNIT // 2),)) == first[:1]  # packed
    assert not ledger.fits(in_second)
    assert not ledger.fits((("GPU@g", 2 * UNIT),))
    assert ledger.acquire((("GPU@g", UNIT), ("GPU@g:0", UNIT))) == first[1:]
    ledger.release(in_second, second)
    assert ledger.fits(in_second)


def test_a_withdrawn_group_goes_when_nobody_holds_any() -> None:
    ledger = ResourceLedger({"CPU": 2 * UNIT, "GPU": UNIT})
    shape: Shape = (("CPU", UNIT), ("GPU", UNIT))
    devices = ledger.acquire(shape)
    ledger.offer("@g", 0, shape, devices)
    held = (("CPU@g", UNIT), ("GPU@g", UNIT))
    taken = ledger.acquire(held)
    ledger.withdraw("@g")
    assert not ledger.forget("@g")
    ledger.validate([shape, held])
    ledger.release(held, taken)
    assert ledger.forget("@g")
    ledger.release(shape, devices)
    assert ledger.free == ledger.total == {"CPU": 2 * UNIT, "GPU": UNIT}


class Job:
    """Machines that talk, without workers; node 0 has all groups."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.now_s = 0.0
        self.machines = [Machine(rank, size, {"CPU": 2 * UNIT}, 1 << 20, ids.job_id(1), {})
                         for rank in range(size)]
        for machine in self.machines:
            for rank in range(size):
                machine.joined(m.Joined(rank, "h", "", 0, (("CPU", 2 * UNIT),)))
            machine.connect(0)
        self.sent: Counter[tuple[str, int]] = Counter()
        self.answers: list[m.Reply] = []
        self._count = 0

    def turn(self) -> None:
        self.now_s += 0.1
        for _ in range(6):
            for machine in self.machines:
                machine.end_turn(self.now_s)
                machine.outbox.actions.clear()
                self.answers += [one for batch in machine.outbox.clients.values()
                                 for one in batch if type(one) in (m.Reply, m.Value)]
                machine.outbox.clients.clear()
                for rank, batch in list(machine.outbox.peers.items()):
                    for message in batch:
                        self.sent[type(message).__name__, rank] += 1
                    self.machines[rank].peer_messages(machine.rank, list(batch))
                machine.outbox.peers.clear()

    def ask(self, rank: int, what: str, **arguments: Any) -> None:
        self._count += 1
        self.machines[rank].client_messages(0, [m.Request(self._count, what, arguments)])

    def submit(self, rank: int, group: bytes) -> bytes:
        """A task in the group."""
        shape = ((f"CPU@{group.hex()}", UNIT),)
        template = m.Template(group[:16], b"f" * 16, m.TASK, "f", resources=shape, group_id=group)
        self._count += 1
        task_id = ids.task_id(ids.task_prefix(ids.driver_task_id(rank, ids.job_id(1)), 0),
                              self._count, ids.id_tail(rank, ids.job_id(1)))
        self.machines[rank].client_messages(0, [
            m.DefineTemplate(template), m.SubmitTask(task_id, template.template_id, b"")])
        return task_id + ids.FIRST_RETURN


def test_groups_that_were_removed_leave_nothing() -> None:
    """10,000 of them, on one of four nodes. Who has no part in them hears nothing, and whoever
    uses one of them later is told."""
    job = Job(4)
    first = b""
    for number in range(10_000):
        group = number.to_bytes(2, "big") * 8
        first = first or group
        job.ask(0, "create_placement_group", group=group, strategy="STRICT_PACK",
                bundles=[{"CPU": UNIT}, {"CPU": UNIT}], name=f"g{number}")
        job.turn()
        assert job.machines[0].groups.groups[group].state == "CREATED"
        job.ask(0, "remove_placement_group", group=group)
        job.turn()
    head = job.machines[0]
    assert not head.groups.pending and not head.groups._kinds and not head.groups._named
    assert len(head.groups.groups) <= 1000
    for machine in job.machines:
        assert len(machine.bundles._removed) <= 1000
        assert not machine.bundles.held and not machine.bundles.ending
        assert set(machine.dispatcher.ledger.total) == {"CPU"}
    scheduler = head.cluster.scheduler
    assert scheduler is not None
    assert not scheduler.nodes.offering and not scheduler._demands and not scheduler._asking
    told = sum(count for (name, _), count in job.sent.items() if name == "GroupRemoved")
    assert told <= 10_000, "only those that held bundles"
    for rank in (0, 3):
        task = job.submit(rank, first)
        job.turn()
        job.turn()
        record = job.machines[rank].directory.records[task]
        assert record.value is not None and values.is_error(record.value)
    job.turn()
    assert not scheduler._demands and not scheduler._asking


def test_what_waits_for_a_group_elsewhere_fails_when_it_is_removed() -> None:
    job = Job(3)
    job.ask(0, "create_placement_group", group=b"g" * 16, strategy="PACK",
            bundles=[{"CPU": 50 * UNIT}])
    job.turn()
    task = job.submit(2, b"g" * 16)
    job.turn()
    record = job.machines[2].directory.records[task]
    assert record.value is None
    job.ask(1, "remove_placement_group", group=b"g" * 16)
    for _ in range(3):
        job.turn()
    assert record.value is not None and values.is_error(record.value)
