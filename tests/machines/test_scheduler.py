"""GlobalScheduler: grants fit, spread, and serve every home; the cluster's books end empty."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hpcray.node.scheduler import GlobalScheduler
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
    for home, grant in s.match(0.0):
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
    placed = [grant.rank for _, grant in s.match(0.0) for _ in range(grant.slots)]
    assert sorted(placed) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_tasks_go_where_the_queue_is_shortest() -> None:
    s = scheduler(2, 2, 2)
    s.load(1, Load(CPU, 50, 0))
    s.load(2, Load(CPU, 0, 0))
    s.demand(0, Demand(CPU, 1))
    assert [grant.rank for _, grant in s.match(0.0)] == [2]


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
        served |= {home for home, _ in s.match(0.0)}
    assert served == {0, 1}


def test_impossible_demands_are_reported_once() -> None:
    s = scheduler(2, 2)
    for _ in range(3):
        s.demand(1, Demand((("GPU", UNIT),), 1))
    assert len(s.impossible) == 1


def test_a_grant_that_nobody_used_is_free_again() -> None:
    s = scheduler(1, 2)
    s.demand(0, Demand(CPU, 5))
    [(home, grant)] = s.match(0.0)
    assert (grant.rank, grant.slots, s.views[1].free["CPU"]) == (1, 2, 0)
    s.unused(home, GrantUnused(1, CPU, 2, False))
    assert s.views[1].free["CPU"] == 2 * UNIT
    assert s.match(0.0) == [], "the home asks again if it needs anything"
    s.load(1, Load((("CPU", UNIT),), 0, 0))
    s.unused(home, GrantUnused(1, CPU, 2, False))
    assert s.views[1].free["CPU"] == UNIT, "more than the node has told"
