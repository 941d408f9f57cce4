"""What nodes tell the global scheduler is enough: nobody is idle while there is work."""

from __future__ import annotations

import pytest

from hpcray.protocol import messages as m
from hpcray.testing.timed import costs
from hpcray.testing.timed.cluster import TimedCluster
from hpcray.testing.timed.report import Report
from hpcray.testing.timed.workload import Workload


@pytest.mark.parametrize("work", [
    Workload(nodes=4, tasks=2000, task_s=0.001), Workload(nodes=4, tasks=400, task_s=0.01),
    Workload(nodes=2, tasks=1000, task_s=0.001)])
def test_few_nodes_are_full_until_the_end(work: Workload) -> None:
    """A load that is told 0.2 ms later costs a tenth of the makespan here."""
    cluster = TimedCluster(work, costs.load())
    cluster.run()
    report = Report(cluster)
    assert report.makespan_s < 1.05 * report.ideal_s


def test_loads_are_few() -> None:
    work = Workload(nodes=4, tasks=2000, task_s=0.001)
    cluster = TimedCluster(work, costs.load())
    loads = 0
    scheduler = cluster.nodes[0].machine.cluster.scheduler
    assert scheduler is not None
    hear = scheduler.load

    def count(rank: int, message: m.Load, now_s: float = 0.0) -> None:
        nonlocal loads
        loads += rank != 0
        hear(rank, message, now_s)

    scheduler.load = count  # type: ignore[method-assign]
    cluster.run()
    assert loads < 2000 / 10
