"""Where a task or actor may run: the values of the option `scheduling_strategy`.

Plain descriptions; `hpcray.options` turns them into ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from hpcray.bundles import Bundles, check_group
from hpcray.protocol import ids, labels
from hpcray.protocol.labels import Condition


class NodeAffinitySchedulingStrategy:
    """Run on one node: `node_id` is hexadecimal, from `nodes()` or `get_node_id()`.

    With `soft`, somewhere else if that node does not exist or can never hold the task; without,
    such a task fails with `TaskUnschedulableError` (an actor with `ActorUnschedulableError`). Both
    wait for the node if it is only busy, unless `_spill_on_unavailable` (with `soft`: go somewhere
    else) or `_fail_on_unavailable` (without: fail).

    Raises:
      ValueError: `node_id` is not a node id, or a flag without its `soft`.
    """

    __slots__ = ("_fail_on_unavailable", "_spill_on_unavailable", "node_id", "soft")

    def __init__(self, node_id: str, soft: bool, _spill_on_unavailable: bool = False,
                 _fail_on_unavailable: bool = False) -> None:
        if not isinstance(node_id, str):
            raise TypeError(f"node_id must be a hexadecimal string, not {node_id!r}")
        if not isinstance(soft, bool):
            raise TypeError(f"soft must be a bool, not {soft!r}")
        if _spill_on_unavailable and not soft:
            raise ValueError("_spill_on_unavailable is for soft=True; with soft=False the task may "
                             "run on that node only")
        if _fail_on_unavailable and soft:
            raise ValueError("_fail_on_unavailable is for soft=False; with soft=True there is "
                             "_spill_on_unavailable")
        rank_of(node_id)
        self.node_id = node_id
        self.soft = soft
        self._spill_on_unavailable = bool(_spill_on_unavailable)
        self._fail_on_unavailable = bool(_fail_on_unavailable)

    def _values(self) -> tuple[object, ...]:
        return (self.node_id, self.soft, self._spill_on_unavailable, self._fail_on_unavailable)

    def __repr__(self) -> str:
        return f"NodeAffinitySchedulingStrategy(node_id={self.node_id!r}, soft={self.soft})"

    def __eq__(self, other: object) -> bool:
        return (isinstance(other, NodeAffinitySchedulingStrategy)
                and other._values() == self._values())

    def __hash__(self) -> int:
        return hash(self._values())


class PlacementGroupSchedulingStrategy:
    """Run in a placement group: in bundle `placement_group_bundle_index`, or (-1) in any. Without
    a group (None): outside of all, that of the parent too. "default": in the group of the task or
    actor that asks, if that captures children, and else outside of all.

    With `placement_group_capture_child_tasks`, tasks and actors started from there run in the
    group too, unless they say otherwise. None: if what asks captures its children.

    Raises:
      TypeError: `placement_group` is none of these.
      ValueError: the group has no such bundle.
    """

    __slots__ = ("placement_group", "placement_group_bundle_index",
                 "placement_group_capture_child_tasks")

    def __init__(
        self, placement_group: Bundles | Literal["default"] | None,
        placement_group_bundle_index: int = -1,
        placement_group_capture_child_tasks: bool | None = None,
    ) -> None:
        index = placement_group_bundle_index
        if isinstance(index, bool) or not isinstance(index, int) or index < -1:
            raise ValueError(f"placement group bundle index {index!r} is invalid: it must be an "
                             "int from 0 on, or -1 for any")
        if placement_group != "default":  # of which group is known later
            if placement_group is not None:
                check_group(placement_group)
            count = 0 if placement_group is None else placement_group.bundle_count
            if index >= count:
                raise ValueError(f"placement group bundle index {index!r} is invalid: there are "
                                 f"{count} bundles, from 0 on, and -1 for any")
        self.placement_group = placement_group
        self.placement_group_bundle_index = index
        self.placement_group_capture_child_tasks = placement_group_capture_child_tasks

    def __repr__(self) -> str:
        return (f"PlacementGroupSchedulingStrategy({self.placement_group!r}, "
                f"{self.placement_group_bundle_index})")


class _Operator:
    """What is asked of one label."""

    __slots__ = ("values",)
    _text = ""

    def __init__(self) -> None:
        self.values: list[str] = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.values))})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and set(other.values) == set(self.values)

    def __hash__(self) -> int:
        return hash((type(self), frozenset(self.values)))


class _OfValues(_Operator):
    __slots__ = ()

    def __init__(self, *values: str) -> None:
        kind = type(self).__name__
        if not values:
            raise ValueError(f'{kind}() needs values, such as {kind}("a", "b")')
        for value in values:
            if not isinstance(value, str):
                raise ValueError(f"{kind}() takes strings, not {value!r}")
            labels.check_value(value)
        self.values = list(values)


class In(_OfValues):
    """The label has one of the values."""

    __slots__ = ()
    _text = "="


class NotIn(_OfValues):
    """The label has none of the values, or is not there."""

    __slots__ = ()
    _text = "!="


class Exists(_Operator):
    """The label is there, with any value."""

    __slots__ = ()


class DoesNotExist(_Operator):
    """The label is not there."""

    __slots__ = ()
    _text = "!"


class NodeLabelSchedulingStrategy:
    """Run where the labels of the node are as `hard` says, if possible also as `soft` says.

    Both map labels to `In(...)`, `NotIn(...)`, `Exists()` or `DoesNotExist()`, all of which must
    hold. A task whose `hard` conditions no node meets waits, with a notice; one whose `soft`
    conditions no node meets (or none that has room) runs on another node.

    Raises:
      ValueError: both are empty, or hold something else.
    """

    __slots__ = ("hard", "soft")

    def __init__(
        self, hard: Mapping[str, _Operator] | None, *, soft: Mapping[str, _Operator] | None = None
    ) -> None:
        self.hard = _checked("hard", hard)
        self.soft = _checked("soft", soft)
        if not self.hard and not self.soft:
            raise ValueError("NodeLabelSchedulingStrategy: hard and soft cannot both be empty")

    def __repr__(self) -> str:
        return f"NodeLabelSchedulingStrategy({self.hard!r}, soft={self.soft!r})"

    def __eq__(self, other: object) -> bool:
        return (isinstance(other, NodeLabelSchedulingStrategy)
                and (other.hard, other.soft) == (self.hard, self.soft))

    def __hash__(self) -> int:
        return hash((frozenset(self.hard.items()), frozenset(self.soft.items())))


def _checked(which: str, given: Mapping[str, _Operator] | None) -> dict[str, _Operator]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{which} must be a dict of labels and conditions, not {given!r}")
    for key, operator in given.items():
        if not isinstance(key, str):
            raise ValueError(f"{which}: a label is named by a string, not {key!r}")
        labels.check_key(key)
        if not isinstance(operator, _Operator) or type(operator) is _Operator:
            raise ValueError(f"{which}[{key!r}] must be In(...), NotIn(...), Exists() or "
                             f"DoesNotExist(), not {operator!r}")
    return dict(given)


def conditions(wanted: Mapping[str, _Operator]) -> list[Condition]:
    """As the nodes understand them."""
    return [(key, operator._text, tuple(operator.values)) for key, operator in wanted.items()]


def rank_of(node_id: str) -> int:
    try:
        return ids.rank_of_node_id(node_id)
    except ValueError:
        raise ValueError(
            f"{node_id!r} is not a node id; take one from nodes() (its 'NodeID')") from None


__all__ = [
    "DoesNotExist", "Exists", "In", "NodeAffinitySchedulingStrategy",
    "NodeLabelSchedulingStrategy", "NotIn", "PlacementGroupSchedulingStrategy",
]
