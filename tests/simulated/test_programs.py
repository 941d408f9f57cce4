"""Random programs on simulated clusters: right values, nothing lost, nothing left (tier 2).

A failure names its seed; `HPCRAY_SEED=1000 pytest tests/simulated` runs other programs.
"""

from __future__ import annotations

import pytest

from hpcray.protocol.labels import meets
from hpcray.testing.cluster import SimulatedCluster
from hpcray.testing.programs import Mix


def run(
    seed: int, *, nodes: int, mix: Mix, death_rate: float = 0.0, time_scale: float = 1.0,
    capacity_bytes: int = 8 << 20, labels: dict[int, dict[str, str]] | None = None,
) -> SimulatedCluster:
    cluster = SimulatedCluster(
        nodes, mix.bodies(), seed=seed, time_scale=time_scale, capacity_bytes=capacity_bytes,
        labels=labels)
    cluster.death_rate = death_rate
    cluster.run(mix.driver(cluster.driver, seed))
    cluster.check_nothing_is_left()
    return cluster


@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
@pytest.mark.parametrize("block", range(3))
def test_programs_without_failures(nodes: int, block: int, seed_shift: int) -> None:
    """Every task runs exactly once, every get finds its value, every record goes."""
    for seed in range(seed_shift + 8 * block, seed_shift + 8 * block + 8):
        # Long tasks go one by one; short ones share datagrams and are prefetched.
        cluster = run(seed, nodes=nodes, mix=Mix(steps=14), time_scale=(1.0, 0.02)[seed % 2])
        cluster.history.check_each_ran_once()
        cluster.history.check_calls_in_order()


@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize("block", range(3))
def test_programs_with_deaths_of_workers(nodes: int, block: int, seed_shift: int) -> None:
    """Never more attempts than retries allow, failures only where they may be, nothing left."""
    deaths = 0
    for seed in range(seed_shift + 8 * block, seed_shift + 8 * block + 8):
        cluster = run(
            seed, nodes=nodes, mix=Mix(steps=12, deaths=True, restarts=True), death_rate=0.03,
            time_scale=(1.0, 0.02)[seed % 2])
        deaths += cluster.deaths
    assert deaths > 5


@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize("deaths", [False, True])
def test_wild_programs(nodes: int, deaths: bool, seed_shift: int) -> None:
    """Programs that cancel, kill actors, raise, retire workers and give up waiting."""
    for seed in range(seed_shift + 100, seed_shift + 112):
        mix = Mix(steps=16, wild=True, deaths=deaths, restarts=True)
        run(seed, nodes=nodes, mix=mix, death_rate=0.03 if deaths else 0.0,
            time_scale=(1.0, 0.02)[seed % 2])


@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize("deaths", [False, True])
def test_programs_with_placement_groups(nodes: int, deaths: bool, seed_shift: int) -> None:
    """What is in a group that is removed fails for that reason, and all its room comes back."""
    for seed in range(seed_shift + 200, seed_shift + 210):
        mix = Mix(steps=24, groups=True, deaths=deaths, wild=deaths, restarts=True)
        run(seed, nodes=nodes, mix=mix, death_rate=0.02 if deaths else 0.0)


@pytest.mark.parametrize("nodes", [2, 3])
@pytest.mark.parametrize("deaths", [False, True])
def test_programs_that_say_where(nodes: int, deaths: bool, seed_shift: int) -> None:
    """Labels, priorities, spreading, affinities: nothing is lost, and nobody is where it may not
    be."""
    labels = {0: {"zone": "a"}, nodes - 1: {"zone": "b"}}
    for seed in range(seed_shift + 300, seed_shift + 305):
        mix = Mix(steps=20, placing=True, deaths=deaths, wild=deaths, restarts=True)
        cluster = run(seed, nodes=nodes, mix=mix, death_rate=0.02 if deaths else 0.0,
                      labels=labels)
        for task_id, rank in cluster.history.ran_on.items():
            template = cluster.history.templates.get(task_id)
            for name, _ in template.resources if template is not None else ():
                if name[0] == "?":
                    assert meets(labels.get(rank, {}), name), (name, rank)


def test_the_same_seed_gives_the_same_run() -> None:
    runs = []
    for _ in range(2):
        cluster = run(7, nodes=3, mix=Mix(steps=12, deaths=True), death_rate=0.02)
        runs.append((cluster.now_s, cluster.history.starts, cluster.history.ran_on, cluster.deaths))
    assert runs[0] == runs[1]
