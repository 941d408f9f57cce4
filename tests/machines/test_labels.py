"""Conditions on labels: what they mean, their names, and what cannot be written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcray.node.scheduler import GlobalScheduler
from hpcray.protocol import labels
from hpcray.protocol.messages import UNIT, Demand, Joined, Load

KEYS = st.sampled_from(["a", "b", "x.y/a"])
VALUES = st.sampled_from(["", "1", "a", "v.1"])
CONDITIONS = st.one_of(
    st.tuples(KEYS, st.sampled_from(["=", "!="]), st.lists(VALUES, min_size=1).map(tuple)),
    st.tuples(KEYS, st.sampled_from(["", "!"]), st.just(())))


def holds(node: dict[str, str], condition: labels.Condition) -> bool:
    """What the words say."""
    key, operator, values = condition
    return {"=": node.get(key) in values, "!=": node.get(key) not in values,
            "": key in node, "!": key not in node}[operator]


@given(node=st.dictionaries(KEYS, VALUES), conditions=st.lists(CONDITIONS, min_size=1, max_size=4))
def test_a_name_means_its_conditions(
    node: dict[str, str], conditions: list[labels.Condition]
) -> None:
    name = labels.name(labels.HARD, conditions)
    assert labels.is_condition(name)
    assert labels.meets(node, name) == all(holds(node, one) for one in conditions)
    assert labels.name(labels.HARD, reversed(conditions)) == name


@given(node=st.dictionaries(KEYS, VALUES),
       alternatives=st.lists(st.lists(CONDITIONS, max_size=3), min_size=1, max_size=3))
def test_alternatives_in_their_order(
    node: dict[str, str], alternatives: list[list[labels.Condition]]
) -> None:
    name = labels.name(labels.HARD, *alternatives)
    met = [all(holds(node, one) for one in conditions) for conditions in alternatives]
    assert labels.meets(node, name) == any(met)
    assert labels.rating(node, name) == (met.index(True) if any(met) else len(met))
    assert labels.prefers(name) == (len(alternatives) > 1)


@pytest.mark.parametrize(("text", "condition"), [
    ("v", ("k", "=", ("v",))), ("!v", ("k", "!=", ("v",))), ("", ("k", "=", ("",))),
    ("in(a, b)", ("k", "=", ("a", "b"))), ("!in(a)", ("k", "!=", ("a",))),
    ("in", ("k", "=", ("in",))),
])
def test_selectors(text: str, condition: labels.Condition) -> None:
    assert labels.parse_selector({"k": text}) == [condition]


@pytest.mark.parametrize(("text", "found"), [
    ("", {}), ("zone=a, tier=fast,", {"zone": "a", "tier": "fast"}), ("a=", {"a": ""}),
    ('{"zone": "a"}', {"zone": "a"}),
])
def test_labels_of_the_environment(text: str, found: dict[str, str]) -> None:
    assert labels.parse_labels(text) == found


@pytest.mark.parametrize("text", ["a", "a=b c", "=b", "{", '{"a": 1}', '{"a": "b c"}',
                                  "ray.io/node-id=0"])
def test_what_is_no_label(text: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        labels.parse_labels(text)


def test_grants_go_where_the_conditions_hold() -> None:
    s = GlobalScheduler()
    for rank, zone in enumerate("aabb"):
        s.joined(Joined(rank, "h", "", 0, (("CPU", UNIT),), (("zone", zone),)))
    hard = (("?zone=b", labels.TAKEN), ("CPU", UNIT))
    s.demand(0, Demand(hard, 5))
    assert sorted(grant.rank for _, grant in s.match()) == [2, 3]
    s.demand(0, Demand((("?zone=c", labels.TAKEN), ("CPU", UNIT)), 1))
    assert s.match() == []
    assert len(s.impossible) == 1


def test_actors_go_where_soft_conditions_hold_then_elsewhere() -> None:
    s = GlobalScheduler()
    for rank, zone in enumerate("aab"):
        s.joined(Joined(rank, "h", "", 0, (("CPU", UNIT),), (("zone", zone),)))
        s.load(rank, Load((("CPU", UNIT),), 0, 0))  # it has not met the condition yet
    placed = []
    for _ in range(3):
        s.demand(1, Demand((("CPU", UNIT), ("~zone=b", labels.TAKEN)), 1, actor=True))
        placed += [grant.rank for _, grant in s.match()]
    assert placed[0] == 2
    assert set(placed[1:]) == {0, 1}
