"""A node is lost in mid-program: every other one hears of it, through one door, and says the same.

The job cannot go on without a node yet; but nobody waits for one that is gone, and what each node
knows stays consistent.
"""

from __future__ import annotations

from typing import Any

import pytest

from hpcray.protocol.messages import UNIT
from hpcray.testing.clients import Script
from hpcray.testing.cluster import SimulatedCluster
from hpcray.testing.processes import Process
from hpcray.testing.values import Large


def make(p: Process, n: int) -> Script:
    ref = yield from p.put([n])
    return Large([n, ref]) if n % 3 == 0 else [n, ref]


def look(p: Process, value: Any) -> Script:
    yield from p.sleep(0.002)
    return (yield from p.get(value[1]))


def program(p: Process) -> Script:
    for n in range(60):
        made = p.submit("make", [n], rank=n % 4)[0]
        p.submit("look", [made], rank=(n + 1) % 4)
        if n % 5 == 0:
            yield from p.sleep(0.001)
    yield from p.sleep(10)


@pytest.mark.parametrize("seed", range(12))
def test_everybody_hears_of_a_node_that_is_lost(seed: int) -> None:
    cluster = SimulatedCluster(
        4, {"make": make, "look": look}, seed=seed, lazy=0.4,
        resources={f"r{n}": 10 * UNIT for n in range(4)})
    cluster.driver.start(program(cluster.driver))
    for _ in range(40 + 60 * seed):
        cluster.round()
    victim = 1 + seed % 3
    cluster.lose_node(victim)
    for _ in range(4000):
        cluster.round()
        if all(node.failed for node in cluster.nodes):
            break
    assert len(cluster.nodes) == 3
    for node in cluster.nodes:
        assert node.failed == (f"rank {victim} is gone (killed by the test), and it cannot yet go "
                               "on without a rank")
        membership = node.machine.membership
        assert set(membership.living) == {0, 1, 2, 3} - {victim}
        assert node.machine.directory.holders.idle or not any(
            rank == victim for rank in node.machine.directory.holders.adds)
        node.machine.validate()
