"""Where a task or actor may run: the values of the option `scheduling_strategy`.

Plain descriptions; `hpcray.options` turns them into ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcray.protocol import ids

if TYPE_CHECKING:
    from hpcray.util.placement_group import PlacementGroup


class NodeAffinitySchedulingStrategy:
    """Run on one node: `node_id` is hexadecimal, from `nodes()` or `get_node_id()`.

    With `soft`, somewhere else if that node is dead or can never hold the task; without, such a
    task fails.

    Raises:
      ValueError: `node_id` is not a node id.
    """

    __slots__ = ("node_id", "soft")

    def __init__(self, node_id: str, soft: bool, _spill_on_unavailable: bool = False,
                 _fail_on_unavailable: bool = False) -> None:
        if _spill_on_unavailable or _fail_on_unavailable:
            raise NotImplementedError(
                "_spill_on_unavailable and _fail_on_unavailable are not supported")
        if not isinstance(node_id, str):
            raise TypeError(f"node_id must be a hexadecimal string, not {node_id!r}")
        if not isinstance(soft, bool):
            raise TypeError(f"soft must be a bool, not {soft!r}")
        rank_of(node_id)
        self.node_id = node_id
        self.soft = soft

    def __repr__(self) -> str:
        return f"NodeAffinitySchedulingStrategy(node_id={self.node_id!r}, soft={self.soft})"

    def __eq__(self, other: object) -> bool:
        return (isinstance(other, NodeAffinitySchedulingStrategy)
                and (other.node_id, other.soft) == (self.node_id, self.soft))

    def __hash__(self) -> int:
        return hash((self.node_id, self.soft))


class PlacementGroupSchedulingStrategy:
    """Run in a placement group: in bundle `placement_group_bundle_index`, or (-1) in any.

    With `placement_group_capture_child_tasks`, tasks and actors started from there run in the
    group too, unless they say otherwise.
    """

    __slots__ = ("placement_group", "placement_group_bundle_index",
                 "placement_group_capture_child_tasks")

    def __init__(
        self, placement_group: PlacementGroup, placement_group_bundle_index: int = -1,
        placement_group_capture_child_tasks: bool | None = None,
    ) -> None:
        from hpcray.util.placement_group import _check_group

        _check_group(placement_group)
        index, count = placement_group_bundle_index, placement_group.bundle_count
        if isinstance(index, bool) or not isinstance(index, int) or not -1 <= index < count:
            raise ValueError(f"placement group bundle index {index!r} is invalid: there are 0 to "
                             f"{count - 1}, and -1 for any")
        self.placement_group = placement_group
        self.placement_group_bundle_index = index
        self.placement_group_capture_child_tasks = placement_group_capture_child_tasks

    def __repr__(self) -> str:
        return (f"PlacementGroupSchedulingStrategy({self.placement_group!r}, "
                f"{self.placement_group_bundle_index})")


def rank_of(node_id: str) -> int:
    try:
        return ids.rank_of_node_id(node_id)
    except ValueError:
        raise ValueError(
            f"{node_id!r} is not a node id; take one from nodes() (its 'NodeID')") from None


__all__ = ["NodeAffinitySchedulingStrategy", "PlacementGroupSchedulingStrategy"]
