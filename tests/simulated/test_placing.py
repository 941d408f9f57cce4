"""Where tasks and actors run: labels, preferences, spreading, affinities, priorities; named cases.

Each under several orders of messages. Random programs with all of it: test_programs.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from hpcray.node.scheduler import GlobalScheduler
from hpcray.protocol.labels import TAKEN
from hpcray.protocol.messages import FAIL, SPILL, UNIT
from hpcray.testing.clients import Script
from hpcray.testing.cluster import SimulatedCluster
from hpcray.testing.processes import Process
from hpcray.testing.values import SystemFailed

CPU = ("CPU", UNIT)
SEEDS = range(4)
LABELS = {0: {"zone": "a"}, 1: {"zone": "b", "gpu": "yes"}, 2: {"zone": "b"}}


def where(p: Process, seconds: float = 0.0) -> Script:
    yield from p.sleep(seconds)
    return p.rank


def actor(p: Process) -> None:
    pass


def ask(p: Process) -> int:
    return p.rank


def bodies(order: list[int] | None) -> dict[str, Any]:
    """`order` takes the numbers of the tasks "note", as they start."""
    def note(p: Process, number: int, seconds: float = 0.001) -> Script:
        assert order is not None
        order.append(number)
        yield from p.sleep(seconds)
        return number

    return {"where": where, "actor": actor, "ask": ask, "note": note}


def cluster(
    seed: int, nodes: int = 3, cpus: int = 2, order: list[int] | None = None
) -> SimulatedCluster:
    return SimulatedCluster(
        nodes, bodies(order), seed=seed, cpus=cpus, lazy=0.3,
        labels={rank: LABELS[rank] for rank in range(nodes)})


def with_labels(*names: str) -> dict[str, Any]:
    return {"resources": (CPU, *((name, TAKEN) for name in names)),
            "spread": any(name[0] == "~" for name in names)}


def ran_on(c: SimulatedCluster, script: Any) -> list[int]:
    """The driver's program, run to its end; the ranks it returns."""
    found: list[int] = []

    def program(p: Process) -> Script:
        found.extend((yield from script(p)))

    c.run(program(c.driver))
    c.check_nothing_is_left()
    return found


def gather(p: Process, refs: list[Any]) -> Script:
    ranks = []
    for ref in refs:
        ranks.append((yield from p.get(ref)))
    return ranks


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("condition", "allowed"), [
    ("?zone=b", {1, 2}), ("?gpu", {1}), ("?!gpu", {0, 2}), ("?zone!=a", {1, 2}),
    ("?!gpu;zone=b", {2}), ("?zone=a,c", {0}), ("?none!=x", {0, 1, 2})])
def test_hard_conditions(seed: int, condition: str, allowed: set[int]) -> None:
    """Tasks and actors, more of them than there is room for."""
    def program(p: Process) -> Script:
        options = with_labels(condition)
        refs = [p.submit("where", [0.002], **options)[0] for _ in range(12)]
        actors = [p.create_actor("actor", **options, held_resources=()) for _ in range(3)]
        refs += [p.call(handle, "ask")[0] for handle in actors]
        return (yield from gather(p, refs))

    ranks = ran_on(cluster(seed), program)
    assert len(ranks) == 15
    assert set(ranks) <= allowed


@pytest.mark.parametrize("seed", SEEDS)
def test_a_soft_condition_is_preferred_while_there_is_room(seed: int) -> None:
    def program(p: Process) -> Script:
        few = [p.submit("where", [0.05], **with_labels("~gpu"))[0] for _ in range(2)]
        found = yield from gather(p, few)
        yield from p.sleep(0.1)  # node 0 has heard that they are over
        actors = [p.create_actor("actor", **with_labels("~gpu"), held_resources=())
                  for _ in range(2)]
        found += yield from gather(p, [p.call(handle, "ask")[0] for handle in actors])
        nowhere = p.submit("where", [0.0], **with_labels("~zone=x"))
        found += yield from gather(p, nowhere)
        many = [p.submit("where", [0.05], **with_labels("~gpu"))[0] for _ in range(8)]
        return found + (yield from gather(p, many))

    ranks = ran_on(cluster(seed), program)
    assert ranks[:4] == [1] * 4
    assert len(set(ranks[5:])) > 1, "what did not fit there waited for it"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_spread_takes_turns(seed: int, seconds: float) -> None:
    """Even a single node that could run them all shares them."""
    def program(p: Process) -> Script:
        refs = [p.submit("where", [0.05], spread=True)[0] for _ in range(6)]
        together = yield from gather(p, refs)
        one_by_one = []
        for _ in range(6):
            one_by_one += yield from gather(p, p.submit("where", [seconds], spread=True))
        return together + one_by_one

    ranks = ran_on(cluster(seed, cpus=6), program)
    assert [ranks[:6].count(rank) for rank in range(3)] == [2, 2, 2]
    assert [ranks[6:].count(rank) for rank in range(3)] == [2, 2, 2]


@pytest.mark.parametrize("seed", SEEDS)
def test_spread_goes_round_a_node_that_is_full(seed: int) -> None:
    def program(p: Process) -> Script:
        held = [p.submit("where", [3.0], rank=1)[0] for _ in range(2)]
        yield from p.sleep(0.05)
        refs = [p.submit("where", [0.01], spread=True)[0] for _ in range(12)]
        found = yield from gather(p, refs)
        assert p.world.now_s < 2.0, "they waited for the full node"
        yield from gather(p, held)
        return found

    ranks = ran_on(cluster(seed), program)
    assert set(ranks) == {0, 2}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rank", [0, 1])  # the home, and another
def test_affinity_to_a_node_that_is_full(seed: int, rank: int) -> None:
    """Waited for by default; SPILL goes elsewhere, FAIL fails."""
    def program(p: Process) -> Script:
        held = [p.submit("where", [1.0], rank=rank)[0] for _ in range(2)]
        yield from p.sleep(0.05)
        waits = p.submit("where", rank=rank)[0]
        spills = p.submit("where", rank=rank, soft=True, unavailable=SPILL)[0]
        fails = p.submit("where", rank=rank, unavailable=FAIL)[0]
        no_actor = p.create_actor("actor", rank=rank, unavailable=FAIL, resources=(CPU,))
        for ref in (fails, p.call(no_actor, "ask")[0]):
            try:
                yield from p.get(ref)
                p.world.fault("it did not fail")
            except SystemFailed as error:
                assert "UnschedulableError" in str(error), error
        found = yield from gather(p, [spills])
        assert p.world.now_s < 0.9, "it waited"
        return found + (yield from gather(p, [waits, *held]))

    ranks = ran_on(cluster(seed), program)
    assert ranks[0] != rank
    assert ranks[1:] == [rank] * 3


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("options", [
    {"rank": 7}, {"rank": 1, "resources": (("CPU", 9 * UNIT),)},
    {"rank": 0, "resources": (("CPU", 9 * UNIT),)},
    {"rank": 0, "resources": (CPU, ("?gpu", TAKEN))}])
def test_affinity_that_can_never_be(seed: int, options: dict[str, Any]) -> None:
    """Hard: an error at once. Soft: anywhere else."""
    def program(p: Process) -> Script:
        actors = [p.create_actor("actor", **{"resources": (CPU,), **options})]
        for ref in (p.submit("where", **options)[0], p.call(actors[0], "ask")[0]):
            try:
                yield from p.get(ref)
                p.world.fault("it did not fail")
            except SystemFailed as error:
                assert "UnschedulableError" in str(error), error
        if options.get("resources", ((),))[0] == ("CPU", 9 * UNIT):
            return []
        soft = {**options, "soft": True}
        handle = p.create_actor("actor", **{"resources": (CPU,), **soft})
        return (yield from gather(p, [p.submit("where", **soft)[0], p.call(handle, "ask")[0]]))

    for rank in ran_on(cluster(seed), program):
        assert "resources" not in options or rank == 1


PRIORITIES = [0, 3, -1, 0, 7, 3, 0, -1, 7, 1, 0, 3]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rank", [0, 1])  # queued at the home, and where they are bound
def test_priorities(seed: int, rank: int) -> None:
    """Of what waits the highest goes first, equals in the order they came; shapes are one."""
    def program(p: Process) -> Script:
        bound = {"rank": rank, "max_retries": 0}
        refs = [p.submit("where", [0.05], **bound)[0]]
        yield from p.sleep(0.02)
        for number, priority in enumerate(PRIORITIES):
            shape = (CPU, ("tool", UNIT)) if number % 3 == 0 else (CPU,)
            refs += p.submit("note", [number], priority=priority, resources=shape, **bound)
        yield from gather(p, refs)
        return []

    order: list[int] = []
    c = SimulatedCluster(
        rank + 1, bodies(order), seed=seed, cpus=1, lazy=0.3, resources={"tool": UNIT})
    ran_on(c, program)
    assert [PRIORITIES[n] for n in order] == sorted(PRIORITIES, reverse=True)
    for shape in (0, 1):
        mine = [n for n in order if (n % 3 == 0) == (shape == 0)]
        assert mine == sorted(mine, key=lambda n: (-PRIORITIES[n], n))


@pytest.mark.parametrize("seed", SEEDS)
def test_priorities_of_what_is_not_bound_yet(seed: int) -> None:
    """Whichever node has room takes the most urgent of the home's queue (and one ahead)."""
    def program(p: Process) -> Script:
        refs = [p.submit("where", [0.05], rank=rank, max_retries=0)[0] for rank in (0, 1)]
        yield from p.sleep(0.02)
        refs += [p.submit("note", [number, 0.02], priority=number // 4)[0] for number in range(12)]
        yield from gather(p, refs)
        return []

    noted: list[int] = []
    ran_on(cluster(seed, nodes=2, cpus=1, order=noted), program)
    order = [n // 4 for n in noted]
    last_urgent = max(i for i, priority in enumerate(order) if priority == 2)
    assert last_urgent < order.index(0), order


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_free_is_known_when_a_burst_is_over(seed: int) -> None:
    """An executor asks for no room for others' tasks: nobody would use it, and it looked taken."""
    def program(p: Process) -> Script:
        for _ in range(5):
            refs = [p.submit("where", [0.002], spread=True)[0] for _ in range(60)]
            yield from gather(p, refs)
            scheduler = c.nodes[0].machine.cluster.scheduler
            assert scheduler is not None

            def known(scheduler: GlobalScheduler = scheduler) -> bool:
                return all(
                    view.free["CPU"] == c.nodes[rank].machine.dispatcher.ledger.free["CPU"]
                    for rank, view in scheduler.views.items())

            for _ in range(30):  # 0.3 s: no heartbeat comes so soon
                if not known():
                    yield from p.sleep(0.01)
            assert known(), p.world.now_s
        return []

    c = cluster(seed)
    ran_on(c, program)
