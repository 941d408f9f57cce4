"""Ray-compatible helpers beside the core, each imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Not on first use: `placement_group` is a module too, and whoever imports that would hide the
# function by it.
from hpcray.util.placement_group import (
    get_current_placement_group,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

if TYPE_CHECKING:
    from hpcray.actor import list_named_actors
    from hpcray.client.serialization import deregister_serializer, register_serializer
    from hpcray.util.actor_pool import ActorPool
    from hpcray.util.address import get_node_ip_address
    from hpcray.util.check_serialize import inspect_serializability
    from hpcray.util.completion import as_completed, map_unordered
    from hpcray.util.object_locations import get_object_locations

# Names that live in modules of another name; everything else is a submodule of this package.
_NAMES = {
    "ActorPool": "hpcray.util.actor_pool",
    "as_completed": "hpcray.util.completion",
    "deregister_serializer": "hpcray.client.serialization",
    "get_node_ip_address": "hpcray.util.address",
    "get_object_locations": "hpcray.util.object_locations",
    "inspect_serializability": "hpcray.util.check_serialize",
    "list_named_actors": "hpcray.actor",
    "map_unordered": "hpcray.util.completion",
    "register_serializer": "hpcray.client.serialization",
}


def __getattr__(name: str) -> Any:
    module = _NAMES.get(name)
    if module is not None:
        return getattr(importlib.import_module(module), name)
    if not name.startswith("_"):
        full_name = f"{__name__}.{name}"
        try:
            return importlib.import_module(full_name)
        except ModuleNotFoundError as error:
            if error.name != full_name:
                raise  # the module is there; something it needs is not
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ActorPool",
    "as_completed",
    "deregister_serializer",
    "get_current_placement_group",
    "get_node_ip_address",
    "get_object_locations",
    "get_placement_group",
    "inspect_serializability",
    "list_named_actors",
    "map_unordered",
    "placement_group",
    "placement_group_table",
    "remove_placement_group",
    "register_serializer",
]
