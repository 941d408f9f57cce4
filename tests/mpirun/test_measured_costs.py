"""The simulator's costs, measured with real processes: sockets, two ranks, and a job."""

from __future__ import annotations

import math

from hpcray.testing.timed import costs, measure, node
from hpcray.testing.timed.cluster import TimedCluster
from hpcray.testing.timed.workload import Workload
from hpcray.transport import mpi


def test_what_is_measured_can_be_simulated_with() -> None:
    told: list[str] = []
    found = measure.measure(tasks=300, say=told.append)
    assert len(told) == 4
    assert "MPI" in found.measured["mpi"]
    for part in (found.node, found.client, found.wire):
        for name in part.__struct_fields__:
            value = getattr(part, name)
            for seconds in value.values() if isinstance(value, dict) else [value]:
                assert seconds >= 0, name
                assert math.isfinite(seconds), name
    shipped = costs.load()
    assert set(found.node.received_s) >= {"SubmitTask", "Done", "TaskDone", "Load", costs.OTHER}
    assert set(found.measured) == set(shipped.measured)
    cluster = TimedCluster(Workload(nodes=3, tasks=100, task_s=0.001), found)
    cluster.run()
    assert cluster.runs.each_once


def test_a_simulated_node_takes_as_many_frames_at_once() -> None:
    assert node.FRAMES_PER_POLL == mpi.FRAMES_PER_POLL
