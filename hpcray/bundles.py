"""The bundles of a placement group: what strategies and templates need to know of one.

The handle that users have (`util/placement_group.py`) is such a description that can also ask the
nodes. What must not go in: anything that asks them; `options.py` and the strategies build on this.
"""

from __future__ import annotations

from typing import Any

from hpcray.client.identifiers import PlacementGroupID
from hpcray.protocol.messages import UNIT


class Bundles:
    """A group's id, and the resources of each of its bundles, in order."""

    __slots__ = ("_bundles", "id")

    def __init__(self, id: PlacementGroupID, bundle_cache: list[dict[str, float]]) -> None:
        self.id = id
        self._bundles = bundle_cache

    @property
    def is_empty(self) -> bool:
        return self.id.is_nil()

    @property
    def bundle_specs(self) -> list[dict[str, float]]:
        """What each bundle holds."""
        return [dict(bundle) for bundle in self._bundles]

    @property
    def bundle_count(self) -> int:
        return len(self._bundles)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bundles) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)


def from_facts(facts: dict[str, Any]) -> tuple[PlacementGroupID, list[dict[str, float]]]:
    """The (id, bundles) of a group as node 0 tells of it."""
    return PlacementGroupID(facts["group"]), [
        {name: amount / UNIT for name, amount in bundle.items()} for bundle in facts["bundles"]]


def check_group(group: Any) -> None:
    if not isinstance(group, Bundles):
        raise TypeError(f"this takes a PlacementGroup, not {type(group).__name__}")
