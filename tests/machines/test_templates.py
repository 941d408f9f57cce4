"""Templates come and go with those who use them: a node keeps what somebody needs, and not more."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from hpcray.client.core import _UNUSED_MAX, Core, Use
from hpcray.client.references import ReferenceTable
from hpcray.client.store import Store
from hpcray.node import outbox as out
from hpcray.node.machine import Machine
from hpcray.node.templates import KEPT
from hpcray.protocol import ids
from hpcray.protocol import messages as m
from hpcray.protocol.values import Failure

from .test_loads import JOB


def template(number: int, **options: object) -> m.Template:
    return m.Template(number.to_bytes(16, "big"), b"f" * 16, m.TASK, f"named {number}",
                      resources=(("CPU", m.UNIT),), function_name="f", **options)


class Home:
    """Rank 0 of two, a driver, and one worker at rank 1 that runs what is bound there."""

    def __init__(self) -> None:
        self.machines = [Machine(rank, 2, {"CPU": (1 + rank) * m.UNIT}, 1 << 30, JOB,
                                 {"job_key": "00"}) for rank in range(2)]
        for machine in self.machines:
            for rank in range(2):
                machine.joined(m.Joined(rank, "h", "", 0, (("CPU", (1 + rank) * m.UNIT),)))
        self.machines[0].connect(99)
        self.now_s = 0.0
        self._prefix = ids.task_prefix(ids.driver_task_id(0, JOB), 0)
        self._count = 0
        self.runs: list[tuple[int, int, bytes]] = []  # not over yet
        self.sent: Counter[str] = Counter()

    def tell(self, *batch: object) -> None:
        self.machines[0].client_messages(99, list(batch))

    def submit(self, of: m.Template) -> bytes:
        self._count += 1
        task_id = ids.task_id(self._prefix, self._count, ids.id_tail(0, JOB))
        self.tell(m.SubmitTask(task_id, of.template_id, b""))
        return task_id

    def turn(self, seconds: float = 0.001) -> None:
        self.now_s += seconds
        for _ in range(4):
            for machine in self.machines:
                machine.tick(self.now_s)
                machine.end_turn(self.now_s)
                box = machine.outbox
                actions, box.actions = box.actions, []
                for action in actions:
                    if type(action) is out.StartWorker:
                        machine.connect(action.number)
                        machine.client_messages(action.number, [m.Hello(action.number)])
                tasks, box.tasks = box.tasks, []
                self.runs += [(machine.rank, worker, run.task_id)
                              for worker, batch in tasks for run in batch if type(run) is m.Run]
                for rank, batch in list(box.peers.items()):
                    self.sent.update(type(message).__name__ for message in batch)
                    self.machines[rank].peer_messages(machine.rank, list(batch))
                box.peers.clear()
                box.clients.clear()

    def finish(self) -> None:
        while self.runs:
            rank, worker, task_id = self.runs.pop(0)
            self.machines[rank].client_messages(worker, [m.Done(task_id, 0, 100, b"\0")])
            self.turn()


def entries(machine: Machine) -> list[int]:
    templates = machine.templates
    return [len(machine.tables.templates), len(machine.tables.statistics),
            len(machine.dispatcher._queue_of), len(templates._users), len(templates._told),
            len(templates._unused), len(machine.inventory.failed_counts)]


@pytest.mark.parametrize("options", [{}, {"rank": 1, "soft": True}])
def test_templates_of_one_task_each_leave_no_more_than_a_thousand(
    options: dict[str, object]
) -> None:
    """Named tasks, one after the other, as `f.options(name=...)` makes them. Those with an affinity
    run at the other node, which forgets them as well."""
    home = Home()
    count = 5_000 if options else 20_000
    for number in range(count):
        one = template(number, **options)
        home.tell(m.DefineTemplate(one))
        task_id = home.submit(one)
        if number % 50 == 0 or options:
            home.turn()
        else:
            home.machines[0].end_turn(home.now_s)
            tasks, home.machines[0].outbox.tasks = home.machines[0].outbox.tasks, []
            home.runs += [(0, worker, run.task_id)
                          for worker, batch in tasks for run in batch if type(run) is m.Run]
        while home.runs:
            rank, worker, done = home.runs.pop(0)
            home.machines[rank].client_messages(worker, [m.Done(done, 0, 100, b"\0")])
        home.tell(m.Drop(task_id + ids.FIRST_RETURN), m.ForgetTemplates((one.template_id,)))
        home.now_s += 0.001
    for _ in range(4):
        home.turn(3.0)
        home.finish()
    for machine in home.machines:
        assert max(entries(machine)) <= 2 * KEPT + 1100, entries(machine)  # of tasks lately
    assert not home.machines[0].cluster._movable or len(home.machines[0].cluster._movable) <= KEPT
    finished = sum(m_.inventory._forgotten.get(b"f" * 16, (None, 0, 0))[1]
                   + sum(s.count - s.told for s in m_.tables.statistics.values())
                   for m_ in home.machines)
    assert finished == count, "what has run is still counted"


def test_what_somebody_uses_stays() -> None:
    home = Home()
    queued = [template(number) for number in range(KEPT + 500)]
    home.tell(*(m.DefineTemplate(one) for one in queued))
    for one in queued:
        home.submit(one)
    kept = template(9_000_000)
    home.tell(m.DefineTemplate(kept))
    home.tell(m.ForgetTemplates(tuple(one.template_id for one in queued)))
    home.turn(3.0)
    tables = home.machines[0].tables
    alive = {task.template.template_id for task in tables.tasks.values()}
    assert len(alive) > KEPT
    assert alive | {kept.template_id} <= set(tables.templates)
    home.tell(m.DefineTemplate(queued[0]))
    home.finish()
    for _ in range(3):
        home.turn(3.0)
    assert {queued[0].template_id, kept.template_id} <= set(tables.templates)
    home.submit(queued[0])
    home.submit(kept)
    home.turn()
    home.finish()
    assert not tables.tasks


def test_a_client_that_is_gone_uses_none() -> None:
    home = Home()
    home.tell(*(m.DefineTemplate(template(number)) for number in range(KEPT + 1)))
    home.machines[0].worker_exited(99, Failure("WorkerCrashedError", "it is over"))
    home.turn(3.0)
    assert not home.machines[0].tables.templates


def test_a_process_lets_go_of_what_nothing_has_any_more() -> None:
    """And not of what was defined again meanwhile."""
    core = Core(refs=ReferenceTable(), store=Store, wire=lambda *_: None)  # type: ignore[arg-type]
    said: list[Any] = []

    def define(number: int) -> Use:
        found = core.define(template(number), None)
        said.extend(m.decode_to_node(m.encode(core.outbox)))
        core.outbox.clear()  # as what has been sent
        return found

    kept = define(1)
    assert define(1) is kept, "one of equal ones is kept by all"
    for number in range(10, 1010):
        define(number)
    again = define(1009)
    for number in range(2000, 2000 + 2 * _UNUSED_MAX):
        define(number)
    assert len(core._templates) <= _UNUSED_MAX + 2
    assert core.use_of(template(1).template_id) is kept
    assert core.use_of(template(1009).template_id) is again
    known: set[bytes] = set()  # as the node has it
    for message in said:
        if type(message) is m.DefineTemplate:
            assert message.template.template_id not in known
            known.add(message.template.template_id)
        else:
            assert known >= set(message.template_ids)
            known -= set(message.template_ids)
    assert known == set(core._templates)
