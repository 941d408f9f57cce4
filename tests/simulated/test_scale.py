"""Many nodes, many tasks: everybody works, and a node's pace does not depend on its backlog."""

from __future__ import annotations

import gc
import time
import tracemalloc
from typing import Any

from hpcray.node.machine import Machine
from hpcray.protocol import ids
from hpcray.protocol import messages as m
from hpcray.testing.clients import Script
from hpcray.testing.cluster import SimulatedCluster
from hpcray.testing.processes import Process
from hpcray.testing.programs import Mix

BACKLOG = 300_000


def test_200_nodes_share_5000_tasks() -> None:
    def work(p: Process, number: int) -> Script:
        yield from p.sleep(0.005)
        return [number, []]

    def program(p: Process) -> Script:
        refs = [p.submit("work", [number])[0] for number in range(5000)]
        found = yield from p.get_packed(refs)
        assert [p.open(item)[0] for item in found] == list(range(5000))

    c = SimulatedCluster(200, {"work": work}, seed=1, cpus=1, reorder=False, validating=False,
                         lazy=0.0)
    c.run(program(c.driver))
    c.check_nothing_is_left()
    c.history.check_each_ran_once()
    ranks = list(c.history.ran_on.values())
    counts = [ranks.count(rank) for rank in range(200)]
    assert min(counts) > 0
    assert max(counts) < 2 * 5000 / 200, "one node got more than twice its share"


class Submitter:
    """A machine alone, and tasks for it that nobody runs."""

    def __init__(self, size: int = 1) -> None:
        job = ids.job_id(1)
        self.machine = Machine(0, size, {"CPU": 2 * m.UNIT}, 1 << 30, job, {})
        for rank in range(size):
            self.machine.cluster.joined(m.Joined(rank, "", "", 0, (("CPU", 2 * m.UNIT),)))
        self.machine.connect(0)
        template = m.Template(b"t" * 16, b"f" * 16, m.TASK, "f", resources=(("CPU", m.UNIT),))
        self.machine.client_messages(0, [m.DefineTemplate(template)])
        self._prefix = ids.task_prefix(ids.driver_task_id(0, job), 0)
        self._tail = ids.id_tail(0, job)
        self.count = 0

    def submit(self, count: int) -> float:
        """Seconds of the node's CPU."""
        datagrams = []
        for _ in range(count // 50):
            batch: list[Any] = []
            for _ in range(50):
                self.count += 1
                task = ids.task_id(self._prefix, self.count, self._tail)
                batch.append(m.SubmitTask(task, b"t" * 16, b"\0" + b"x" * 20))
            datagrams.append(m.encode(batch))
        machine = self.machine
        began_s = time.process_time()
        for datagram in datagrams:
            machine.client_messages(0, m.decode_to_node(datagram))
            machine.end_turn(0.0)
            machine.outbox.actions.clear()
        return time.process_time() - began_s


def test_memory_of_a_queued_task() -> None:
    """At most 1,000 B each: record, object, ids, the driver's hold, the queue."""
    submitter = Submitter()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        submitter.submit(30_000)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert submitter.machine.dispatcher.queued() == 30_000
    assert (after - before) / 30_000 <= 1000


def test_pace_does_not_depend_on_the_backlog() -> None:
    """Looking at the backlog would cost hundreds of times more; cold caches cost two or three."""
    submitter = Submitter()
    gc.collect()
    gc.freeze()  # as the node does: what is measured is the machine, not the collector
    try:
        first_s = min(submitter.submit(5_000) for _ in range(4))
        submitter.submit(BACKLOG - 40_000)
        last_s = min(submitter.submit(5_000) for _ in range(4))
    finally:
        gc.unfreeze()
    assert submitter.machine.dispatcher.queued() == BACKLOG
    assert last_s < 10 * first_s, (first_s, last_s)


def test_a_tick_does_not_depend_on_the_backlog() -> None:
    """Of a node among several: it looks for others' tasks that wait here, and has none."""
    submitter = Submitter(size=2)

    def tick_s() -> float:
        began_s = time.process_time()
        for _ in range(20):
            submitter.machine.tick(0.0)
        return time.process_time() - began_s

    submitter.submit(1_000)
    first_s = min(tick_s() for _ in range(5))
    submitter.submit(100_000)
    assert min(tick_s() for _ in range(5)) < 10 * first_s


def test_machines_build_no_cycles() -> None:
    """A full collection after a whole program finds nothing of the machines'."""
    mix = Mix(steps=20)
    cluster = SimulatedCluster(3, mix.bodies(), seed=5)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        cluster.run(mix.driver(cluster.driver, 5))
        gc.collect()
        ours = [thing for thing in gc.garbage
                if type(thing).__module__.startswith(("hpcray.node", "hpcray.protocol"))]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not ours
    cluster.check_nothing_is_left()
