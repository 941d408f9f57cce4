"""References between nodes: handed on, kept late, dropped early; named scenarios.

Each runs under many orders: reordered frames, lazy schedules, drops as early as possible.
"""

from __future__ import annotations

from typing import Any

import pytest

from hpcray.protocol.messages import UNIT
from hpcray.testing.clients import Ref, Script
from hpcray.testing.cluster import SimulatedCluster, Stuck
from hpcray.testing.processes import Process
from hpcray.testing.values import Large
from hpcray.testing.world import Fault

SEEDS = range(12)


def make(p: Process, large: bool) -> Script:
    """A value that holds the only refs to two puts."""
    first = yield from p.put([1, []])
    second = yield from p.put(Large([2, []]))
    value = [0, [first, second]]
    return Large(value) if large else value


def look(p: Process, value: Any) -> Script:
    """Open the dependency, follow its refs late."""
    refs = value[1]
    del value
    yield from p.sleep(0.01)
    found = []
    for ref in refs:
        found.append((yield from p.get(ref))[0])
    return found


def pass_on(p: Process, refs: list[Ref], ranks: list[int]) -> Script:
    """Hand nested refs to the next rank, and return what comes back without looking."""
    if ranks:
        result = p.submit("pass_on", [refs, ranks[1:]], rank=ranks[0])[0]
        return [result]
    values = []
    for ref in refs:
        values.append((yield from p.get(ref))[0])
    return values


def box(p: Process) -> None:
    assert p.actor is not None
    p.actor["refs"] = []


def store(p: Process, refs: list[Ref]) -> None:
    assert p.actor is not None
    p.actor["refs"] += refs


def take(p: Process) -> list[Ref]:
    assert p.actor is not None
    refs: list[Ref] = p.actor["refs"]
    p.actor["refs"] = []
    return refs


BODIES = {"make": make, "look": look, "pass_on": pass_on, "box": box, "store": store, "take": take}


def cluster(seed: int, nodes: int = 3) -> SimulatedCluster:
    return SimulatedCluster(
        nodes, BODIES, seed=seed, lazy=0.4, resources={f"r{n}": 10 * UNIT for n in range(nodes)})


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("large", [False, True])
def test_refs_inside_a_result_made_elsewhere(seed: int, large: bool) -> None:
    """made on 1, homed on 0, read on 2; the container dropped at once."""
    def program(p: Process) -> Script:
        results = []
        for _ in range(5):
            made = p.submit("make", [large], rank=1)[0]
            results.append(p.submit("look", [made], rank=2)[0])
            del made
        for result in results:
            assert (yield from p.get(result)) == [1, 2]

    c = cluster(seed)
    c.run(program(c.driver))
    c.check_nothing_is_left()
    c.history.check_each_ran_once()


@pytest.mark.parametrize("seed", SEEDS)
def test_an_argument_homed_at_the_executor_overtakes_its_result(seed: int) -> None:
    """The result's report waits for holder acknowledgements; a task that names it does not."""
    def outer(p: Process) -> Script:
        made = p.submit("make", [True], rank=1)[0]  # homed here, made on 1
        mine = p.submit("relay", [[made]], rank=1)[0]  # on 1, whose task names it back to us
        return (yield from p.get(mine))

    def relay(p: Process, refs: list[Ref]) -> Script:
        result = p.submit("look", [refs[0]], rank=0)[0]
        return (yield from p.get(result))

    def program(p: Process) -> Script:
        assert (yield from p.get(p.submit("outer", rank=0)[0])) == [1, 2]

    c = SimulatedCluster(2, {**BODIES, "outer": outer, "relay": relay}, seed=seed, lazy=0.4)
    c.run(program(c.driver))
    c.check_nothing_is_left()


@pytest.mark.parametrize("seed", SEEDS)
def test_refs_passed_on_and_on(seed: int) -> None:
    def program(p: Process) -> Script:
        ref = yield from p.put(Large([5, []]))
        result = p.submit("pass_on", [[ref], [1, 2, 0, 2, 1]], rank=2)[0]
        del ref
        while True:
            value = yield from p.get(result)
            if value[0] == 5:
                return
            result = value[0]
            del value

    c = cluster(seed)
    c.run(program(c.driver))
    c.check_nothing_is_left()


@pytest.mark.parametrize("seed", SEEDS)
def test_refs_in_actor_state(seed: int) -> None:
    """Kept by an actor on another node after everybody else has dropped them."""
    def program(p: Process) -> Script:
        actor = p.create_actor("box", rank=2)
        for number in range(4):
            ref = yield from p.put(Large([number, []]) if number % 2 else [number, []])
            p.call(actor, "store", [[ref]])
            del ref
        yield from p.sleep(0.05)
        refs = yield from p.get(p.call(actor, "take")[0])
        del actor
        found = []
        for ref in list(refs):
            found.append((yield from p.get(ref))[0])
        assert found == [0, 1, 2, 3]

    c = cluster(seed)
    c.run(program(c.driver))
    c.check_nothing_is_left()


def test_a_hang_is_reported() -> None:
    """The kit's own promise: somebody who waits for ever is found, and the seed named."""
    def program(p: Process) -> Script:
        yield from p.get(p.submit("look", [[0, []]], resources=(("unobtainium", UNIT),))[0])

    c = cluster(3)
    with pytest.raises(Stuck, match="seed 3"):
        c.run(program(c.driver))


def test_a_leak_is_reported() -> None:
    kept = []

    def program(p: Process) -> Script:
        kept.append((yield from p.put([1, []])))

    c = cluster(4)
    c.run(program(c.driver))
    with pytest.raises(Fault, match="held by client 0"):
        c.check_nothing_is_left()
