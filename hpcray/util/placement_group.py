"""Placement groups: resources reserved together, on one node or on several, for tasks and actors.

    pg = placement_group([{"CPU": 1}, {"CPU": 1, "GPU": 1}], strategy="PACK")
    ray.get(pg.ready())
    f.options(scheduling_strategy=PlacementGroupSchedulingStrategy(pg)).remote()

The names, arguments and errors are Ray's. A group lives until it is removed or the job ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcray.bundles import Bundles, check_group, from_facts
from hpcray.client import context, process
from hpcray.client.identifiers import PlacementGroupID
from hpcray.client.references import ObjectRef
from hpcray.config import check_resource_name
from hpcray.options import amount
from hpcray.protocol import labels
from hpcray.protocol.messages import UNIT

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


class PlacementGroup(Bundles):
    """A handle of a group; may be passed to tasks and actors. Made by `placement_group`."""

    __slots__ = ()

    @staticmethod
    def empty() -> PlacementGroup:
        return PlacementGroup(PlacementGroupID.nil(), [])

    def ready(self) -> ObjectRef[PlacementGroup]:
        """A ref that is ready when all bundles are reserved; its value is this group."""
        from hpcray.api import remote

        global _ready
        if _ready is None:
            _ready = remote(num_cpus=0)(_same)
        ref: ObjectRef[PlacementGroup] = _ready.options(
            name="PlacementGroup.ready", placement_group=self,
        ).remote(self)
        return ref

    def wait(self, timeout_seconds: float = 30) -> bool:
        """Whether all bundles are reserved within so many seconds.

        Raises:
          TypeError: not a number of seconds.
          ValueError: the group was removed.
        """
        if not isinstance(timeout_seconds, (int, float)):
            raise TypeError(f"timeout_seconds must be a number, not {timeout_seconds!r}")
        from hpcray.api import get, wait
        from hpcray.exceptions import TaskPlacementGroupRemoved

        if placement_group_table(self).get("state") == "CREATED":
            return True  # `timeout_seconds=0` looks; the task of `ready` takes its moment
        found, _ = wait([self.ready()], timeout=timeout_seconds)
        if found:
            try:
                get(found[0])
            except TaskPlacementGroupRemoved:
                raise ValueError(f"placement group {self.id.hex()} was removed") from None
        return bool(found)

    def __reduce__(self) -> tuple[Any, ...]:
        return (PlacementGroup, (self.id, self._bundles))

    def __repr__(self) -> str:
        return f"PlacementGroup({self.id.hex()})"


_ready: Any = None


def _same(group: PlacementGroup) -> PlacementGroup:
    return group


def placement_group(
    bundles: list[dict[str, float]],
    strategy: str | None = None,
    name: str = "",
    lifetime: str | None = None,
    _soft_target_node_id: str | None = None,
    bundle_label_selector: list[dict[str, str]] | None = None,
) -> PlacementGroup:
    """Ask for a group; returns at once, and `ready()` tells when all of it is reserved.

    Args:
      bundles: resources of each bundle; a bundle lies on one node.
      strategy: "PACK" (the default) as few nodes as possible, "SPREAD" as many; the "STRICT_"
        forms insist.
      name: for `get_placement_group`, within the namespace.
      lifetime: "detached" or None; either way it lives until removed or the job ends.
      bundle_label_selector: of each bundle, the labels of nodes it may lie on, as in the option
        `label_selector`.

    Raises:
      ValueError: no bundles, empty ones, an unknown strategy, or the name is taken.
    """
    units = _check_bundles(bundles)
    strategy = STRATEGIES[0] if strategy is None else strategy
    if strategy not in STRATEGIES:
        raise ValueError(f"Invalid placement group strategy {strategy!r}: use one of "
                         f"{', '.join(STRATEGIES)}")
    if lifetime not in (None, "detached"):
        raise ValueError(
            f"a placement group's lifetime is None or 'detached', not {lifetime!r}")
    if not isinstance(name, str):
        raise TypeError(f"a placement group's name is a string, not {name!r}")
    if _soft_target_node_id is not None:
        raise NotImplementedError("placement_group() does not support _soft_target_node_id")
    _add_selectors(units, bundle_label_selector)
    group = PlacementGroupID.from_random()
    process.current_client().request("create_placement_group", {
        "group": group.binary(), "bundles": units, "strategy": strategy, "name": name,
        "namespace": context.current().namespace,
    })
    return PlacementGroup(group, [{key: float(amount) for key, amount in bundle.items()}
                                  for bundle in bundles])


def _check_bundles(bundles: Any) -> list[dict[str, int]]:
    if not isinstance(bundles, list):
        raise ValueError(
            f"placement group bundles must be a list of dicts, not {type(bundles).__name__}")
    if not bundles:
        raise ValueError('a placement group needs a bundle, such as [{"CPU": 1}]')
    checked = []
    for bundle in bundles:
        if not isinstance(bundle, Mapping) or not all(
                isinstance(key, str) and key for key in bundle):
            raise ValueError(f"a bundle is a dict of resources and amounts, not {bundle!r}")
        try:
            for key in bundle:
                check_resource_name(key)
            units = {key: amount(f"bundle[{key!r}]", value, key) for key, value in bundle.items()}
        except TypeError as error:
            raise ValueError(str(error)) from None
        if not any(units.values()):
            raise ValueError(f"a bundle must hold something; this one is {dict(bundle)!r}")
        checked.append({key: value for key, value in units.items() if value})
    return checked


def _add_selectors(units: list[dict[str, int]], selectors: Any) -> None:
    """A bundle's label selector becomes part of what it needs: see protocol/labels.py."""
    if selectors is None:
        return
    if not isinstance(selectors, list) or len(selectors) != len(units):
        raise ValueError(f"bundle_label_selector must be a list of {len(units)} dicts, one for "
                         f"each bundle, not {selectors!r}")
    for bundle, selector in zip(units, selectors, strict=True):
        if not isinstance(selector, Mapping):
            raise TypeError(f"a label selector must be a dict, not {selector!r}")
        if selector:
            bundle[labels.name(labels.HARD, labels.parse_selector(selector))] = labels.TAKEN


def remove_placement_group(placement_group: PlacementGroup) -> None:
    """Free the group's resources: its tasks and actors are killed, what waits for it fails with
    `TaskPlacementGroupRemoved`. Once more is no error."""
    check_group(placement_group)
    process.current_client().request(
        "remove_placement_group", {"group": placement_group.id.binary()})


def get_placement_group(placement_group_name: str) -> PlacementGroup:
    """The group of that name, in this namespace.

    Raises:
      ValueError: there is none.
    """
    if not placement_group_name:
        raise ValueError("get_placement_group needs a non-empty name")
    [facts] = process.current_client().request("placement_groups", {
        "name": placement_group_name, "namespace": context.current().namespace})
    return PlacementGroup(*from_facts(facts))


def get_current_placement_group() -> PlacementGroup | None:
    """The group this task or actor runs in; None outside of any."""
    group = context.current().group_id
    if not group:
        return None
    found = process.current_client().request("placement_groups", {"group": group})
    return PlacementGroup(*from_facts(found[0])) if found else None


def placement_group_table(placement_group: PlacementGroup | None = None) -> dict[str, Any]:
    """Facts about a group: id, name, strategy, state, bundles and their nodes; without an argument
    about all groups, by their hexadecimal ids."""
    client = process.current_client()
    if placement_group is not None:
        check_group(placement_group)
        found = client.request("placement_groups", {"group": placement_group.id.binary()})
        return _row(found[0]) if found else {}
    return {facts["group"].hex(): _row(facts) for facts in client.request("placement_groups", {})}


def _row(facts: dict[str, Any]) -> dict[str, Any]:
    from hpcray.api import _node_id

    client = process.current_client()
    return {
        "placement_group_id": facts["group"].hex(),
        "name": facts["name"],
        "bundles": {index: {name: amount / UNIT for name, amount in bundle.items()}
                    for index, bundle in enumerate(facts["bundles"])},
        "bundles_to_node_id": {index: _node_id(client, rank)
                               for index, rank in enumerate(facts["ranks"])},
        "strategy": facts["strategy"],
        "state": facts["state"],
    }


__all__ = [
    "PlacementGroup", "PlacementGroupID", "get_current_placement_group", "get_placement_group",
    "placement_group", "placement_group_table", "remove_placement_group",
]
