"""GlobalScheduler: grants fit, spread, and serve every home; the cluster's books end empty."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcray.node.placement import choose
from hpcray.node.scheduler import ACTOR, BUNDLE, TASK, GlobalScheduler, Nodes
from hpcray.protocol.messages import UNIT, Demand, GrantUnused, Joined, Load

CPU = (("CPU", UNIT),)


def scheduler(*cpus: int) -> GlobalScheduler:
    found = GlobalScheduler()
    for rank, count in enumerate(cpus):
        found.joined(Joined(rank, f"host{rank}", "", 0, (("CPU", count * UNIT),)))
    return found


demands = st.lists(st.tuples(
    st.integers(0, 3), st.sampled_from((CPU, (("CPU", UNIT // 2),), (("CPU", 3 * UNIT),), ())),
    st.integers(1, 40), st.booleans(), st.booleans()), max_size=12)


@given(cpus=st.lists(st.integers(1, 5), min_size=4, max_size=4), asked=demands)
def test_grants_fit_and_stay_within_demand(
    cpus: list[int], asked: list[tuple[int, tuple[tuple[str, int], ...], int, bool, bool]]
) -> None:
    s = scheduler(*cpus)
    free = {rank: count * UNIT for rank, count in enumerate(cpus)}
    demanded: dict[tuple[int, tuple[tuple[str, int], ...], bool], int] = {}
    for home, shape, count, actor, spread in asked:
        s.demand(home, Demand(shape, count, actor, spread))
        demanded[(home, shape, actor)] = count
    for home, grant in s.match():
        demanded[(home, grant.shape, grant.actor)] -= grant.slots
        free[grant.rank] -= dict(grant.shape).get("CPU", 0) * grant.slots
        assert grant.actor or grant.rank != home, "a home needs no grant of itself for tasks"
    assert all(left >= 0 for left in demanded.values())
    assert all(amount >= 0 for amount in free.values()), "more granted than there was"
    # What is left over has no room anywhere (for a task: anywhere else).
    for (home, shape, actor), left in demanded.items():
        if left and shape:
            need = dict(shape)["CPU"]
            assert all(amount < need for rank, amount in free.items() if actor or rank != home)


def test_actors_spread() -> None:
    s = scheduler(4, 4, 4, 4)
    s.demand(0, Demand((), 8, actor=True))
    placed = [grant.rank for _, grant in s.match() for _ in range(grant.slots)]
    assert sorted(placed) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_tasks_go_where_the_queue_is_shortest() -> None:
    s = scheduler(2, 2, 2)
    s.load(1, Load(CPU, 50, 0))
    s.load(2, Load(CPU, 0, 0))
    s.demand(0, Demand(CPU, 1))
    assert [grant.rank for _, grant in s.match()] == [2]


def test_every_home_gets_its_turn() -> None:
    """Room comes one slot at a time: nobody may be starved by who asked first."""
    s = scheduler(1, 1, 1)
    for home in (0, 1):
        s.demand(home, Demand(CPU, 1000))
    served = set()
    for _ in range(6):
        s.load(2, Load(CPU, 0, 0))
        for rank in (0, 1):
            s.load(rank, Load((("CPU", 0),), 1000, 0))
        served |= {home for home, _ in s.match()}
    assert served == {0, 1}


def test_impossible_demands_are_reported_once() -> None:
    s = scheduler(2, 2)
    for _ in range(3):
        s.demand(1, Demand((("GPU", UNIT),), 1))
        assert s.match() == []
    assert len(s.impossible) == 1


def test_a_grant_that_nobody_used_is_free_again() -> None:
    s = scheduler(1, 2)
    s.demand(0, Demand(CPU, 5))
    [(home, grant)] = s.match()
    assert (grant.rank, grant.slots, s.views[1].free["CPU"]) == (1, 2, 0)
    s.unused(home, GrantUnused(1, CPU, 2, False))
    assert s.views[1].free["CPU"] == 2 * UNIT
    assert s.match() == [], "the home asks again if it needs anything"
    s.load(1, Load((("CPU", UNIT),), 0, 0))
    s.unused(home, GrantUnused(1, CPU, 2, False))
    assert s.views[1].free["CPU"] == UNIT, "more than the node has told"


steps = st.lists(st.tuples(
    st.integers(0, 3), st.integers(0, 3), st.integers(0, 5), st.integers(0, 5),
    st.sampled_from(["load", "take", "give", "ask"])), max_size=60)


@given(steps=steps, kind=st.sampled_from([TASK, ACTOR, BUNDLE]))
def test_the_order_is_that_of_a_look_at_all(
    steps: list[tuple[int, int, int, int, str]], kind: int
) -> None:
    """Whatever was forgotten of the changes in between."""
    nodes = Nodes()
    for rank in range(4):
        nodes.joined(Joined(rank, "h", "", 0, (("CPU", 3 * UNIT),)))
    ranking = nodes.ranking(CPU, kind)
    for rank, cpus, queued, actors, step in steps:
        view = nodes.views[rank]
        if step == "load":
            nodes.tell(rank, Load((("CPU", cpus * UNIT),), queued, actors))
        elif step == "take":
            for _ in range(100):  # more than are remembered
                view.granted += 1
                nodes.take(rank, CPU, 1)
        elif step == "give":
            nodes.give(rank, CPU, 1)
        else:
            fitting = [(
                (other.queued + other.granted if kind == TASK else other.actors if kind == ACTOR
                 else -other.free["CPU"]), number)
                for number, other in nodes.views.items()
                if other.free["CPU"] >= UNIT and number != rank]
            assert ranking.best((rank,)) == (min(fitting)[1] if fitting else None)


NODES = 1000


def full(s: GlobalScheduler) -> None:
    for rank in range(NODES):
        s.load(rank, Load((("CPU", 0),), 10, 0))


def test_a_thousand_actors_on_a_thousand_nodes() -> None:
    """One by one, each home asking for itself; every node gets one."""
    s = scheduler(*[2] * NODES)
    placed = []
    for home in range(NODES):
        s.demand(home, Demand(CPU, 1, actor=True))
        placed += [grant.rank for _, grant in s.match()]
        if home == 0:
            s.nodes.looks = 0  # the first look is at all nodes
    assert sorted(placed) == list(range(NODES))
    assert s.nodes.looks < 8 * NODES


def test_ten_thousand_tasks_that_spread() -> None:
    s = scheduler(*[10] * NODES)
    s.demand(0, Demand(CPU, 10_000, spread=True))
    given = {grant.rank: grant.slots for _, grant in s.match()}
    assert given == dict.fromkeys(range(1, NODES), 10)
    assert s.nodes.looks < NODES + 8 * 10_000


@pytest.mark.parametrize("strategy", ["PACK", "SPREAD", "STRICT_SPREAD", "STRICT_PACK"])
def test_two_hundred_groups_on_a_thousand_nodes(strategy: str) -> None:
    s = scheduler(*[8 if strategy == "STRICT_PACK" else 2] * NODES)
    for _ in range(200):
        chosen = choose([CPU] * 8, strategy, s)
        assert chosen is not None
        for rank in chosen:
            s.take(rank, CPU)
    assert s.nodes.looks < 5 * NODES + 200 * 8 * 20


@pytest.mark.parametrize("homes", [1, NODES])
def test_a_load_costs_what_it_brings(homes: int) -> None:
    """All nodes are full and everybody asks: what a load takes does not grow with the nodes."""
    s = scheduler(*[1] * NODES)
    full(s)
    for home in range(homes):
        s.demand(home, Demand(CPU, 1000))
    assert s.match() == []
    s.nodes.looks = 0
    for _ in range(10):
        full(s)
        assert s.match() == []
    assert s.nodes.looks == 0, "nothing has changed"
    for rank in range(NODES):
        s.load(rank, Load((("CPU", 0),), 9, 0))
        assert s.match() == []
    assert s.nodes.looks == 0, "nobody has more room"
    granted = []
    for rank in range(NODES):
        s.load(rank, Load(CPU, 0, 0))
        granted += s.match()
    assert len(granted) >= NODES - 1  # not to itself, if nobody else asks
    assert s.nodes.looks < 8 * NODES * math.log2(NODES)


def test_what_waits_for_something_else_is_not_looked_at() -> None:
    """Demands for parts of groups are found by their names."""
    s = scheduler(*[1] * 10)
    for number in range(10_000):
        s.demand(0, Demand(((f"CPU@{number}", UNIT), (f"CPU@{number}:0", UNIT)), 1))
    assert s.match() == []
    s.nodes.looks = 0
    group = (("CPU@7", UNIT), ("CPU@7:0", UNIT))
    s.load(3, Load((("CPU", 0), *group), 0, 0))
    assert [(grant.rank, grant.shape) for _, grant in s.match()] == [(3, group)]
    assert s.nodes.looks < 10


def test_actors_on_their_way_count_until_their_node_tells() -> None:
    """However late the loads: what a load knows of is counted in it."""
    s = scheduler(4, 4)
    s.demand(1, Demand((), 2, actor=True))
    assert sorted(grant.rank for _, grant in s.match()) == [0, 1]
    s.load(0, Load((("CPU", 4 * UNIT),), 0, 0))  # from before it came
    s.load(1, Load((("CPU", 4 * UNIT),), 0, 1, placed=1))
    s.demand(1, Demand((), 2, actor=True))
    assert sorted(grant.rank for _, grant in s.match()) == [0, 1]
    s.load(0, Load((("CPU", 4 * UNIT),), 0, 0, placed=2))  # both have ended
    s.demand(1, Demand((), 2, actor=True))
    assert [(grant.rank, grant.slots) for _, grant in s.match()] == [(0, 2)]


def test_a_lost_node_gets_nothing_and_asks_for_nothing() -> None:
    s = scheduler(1, 1, 1)
    s.demand(2, Demand(CPU, 5))
    s.demand(0, Demand(CPU, 5))
    s.nodes.ranking(CPU, TASK).best()
    s.lost(2)
    s.lost(2)
    assert [(home, grant.rank) for home, grant in s.match()] == [(0, 1)]
    s.load(2, Load(CPU, 0, 0))
    s.unused(0, GrantUnused(2, CPU, 1, False))
    s.give(2, CPU)
    assert s.match() == []
