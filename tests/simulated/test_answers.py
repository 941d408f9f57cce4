"""Values that workers send to whoever waits, past their node (client/answers.py).

The channel may be full, the worker may die before it sends, the waiter may be a worker that dies,
and what the waiter says next may reach the node before the outcome does. Whoever waits gets its
value; `run` ends with an error if somebody waits for ever.
"""

from __future__ import annotations

import pytest

from hpcray.testing.cluster import SimulatedCluster
from hpcray.testing.processes import Process, Ref, Script, SystemFailed

SEEDS = range(10)


def double(p: Process, number: int) -> int:
    return 2 * number


def ask(p: Process, number: int) -> Script:
    """A worker that waits for others, one after the other."""
    total = 0
    for i in range(6):
        total += yield from p.get(p.submit("double", [number + i], max_retries=-1)[0])
    return total


def start(p: Process) -> None:
    assert p.actor is not None
    p.actor["calls"] = 0


def count(p: Process) -> int:
    assert p.actor is not None
    p.actor["calls"] += 1
    calls: int = p.actor["calls"]
    return calls


def tell(p: Process, handles: list[Ref]) -> int:
    """Speaks to an actor, and does not wait."""
    for _ in range(3):
        p.call(handles[0], "count")
    return 3


BODIES = {"double": double, "ask": ask, "start": start, "count": count, "tell": tell}


def cluster(seed: int, nodes: int) -> SimulatedCluster:
    return SimulatedCluster(nodes, BODIES, seed=seed, cpus=3)


def one_at_a_time(p: Process) -> Script:
    for i in range(60):
        assert (yield from p.get(p.submit("double", [i], max_retries=-1)[0])) == 2 * i
    for i in range(10):
        found = yield from p.get(p.submit("ask", [i], max_retries=-1)[0])
        assert found == sum(2 * (i + j) for j in range(6))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("nodes", [1, 2])
def test_one_at_a_time(seed: int, nodes: int) -> None:
    world = cluster(seed, nodes)
    world.run(one_at_a_time(world.driver))
    assert world.answers > 40  # most of them went this way
    world.check_each_ran_once()
    world.check_nothing_is_left()


@pytest.mark.parametrize("seed", SEEDS)
def test_workers_die_between_the_outcome_and_the_value(seed: int) -> None:
    world = cluster(seed, 1)
    world.death_rate = 0.1
    world.run(one_at_a_time(world.driver))
    assert world.answers > 10 and world.deaths > 10
    world.check_nothing_is_left()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("death_rate", [0.0, 0.05])
def test_calls_of_an_actor(seed: int, death_rate: float) -> None:
    def program(p: Process) -> Script:
        actor = p.create_actor("start", max_restarts=-1)
        last = 0
        for _ in range(40):
            try:
                calls = yield from p.get(p.call(actor, "count")[0])
            except SystemFailed:
                last = 0
                continue
            assert calls == last + 1 or calls <= 2, (calls, last)
            last = calls

    world = cluster(seed, 1)
    world.death_rate = death_rate
    world.run(program(world.driver))
    assert world.answers > (20 if not death_rate else 0)
    world.check_calls_in_order()
    world.check_nothing_is_left()


@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_worker_said_before_it_answered_comes_first(seed: int) -> None:
    def program(p: Process) -> Script:
        actor = p.create_actor("start")
        for turn in range(1, 21):
            yield from p.get(p.submit("tell", [[actor]])[0])
            assert (yield from p.get(p.call(actor, "count")[0])) == 4 * turn

    world = cluster(seed, 1)
    world.run(program(world.driver))
    assert world.answers > 10
    world.check_nothing_is_left()
