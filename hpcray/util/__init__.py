"""Ray-compatible helpers beside the core, each imported on first use."""

from typing import TYPE_CHECKING

from hpcray.absent import attributes

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
    from hpcray.experimental.locations import get_object_locations
    from hpcray.util.actor_pool import ActorPool
    from hpcray.util.address import get_node_ip_address
    from hpcray.util.check_serialize import inspect_serializability
    from hpcray.util.debug import disable_log_once_globally, enable_periodic_logging, log_once
    from hpcray.util.helpers import as_completed, map_unordered

# Names that live in modules of another name.
_NAMES = {
    "ActorPool": "hpcray.util.actor_pool",
    "as_completed": "hpcray.util.helpers",
    "deregister_serializer": "hpcray.client.serialization",
    "disable_log_once_globally": "hpcray.util.debug",
    "enable_periodic_logging": "hpcray.util.debug",
    "get_node_ip_address": "hpcray.util.address",
    "get_object_locations": "hpcray.experimental.locations",
    "inspect_serializability": "hpcray.util.check_serialize",
    "list_named_actors": "hpcray.actor",
    "log_once": "hpcray.util.debug",
    "map_unordered": "hpcray.util.helpers",
    "register_serializer": "hpcray.client.serialization",
}

__getattr__ = attributes(__name__, _NAMES, (
    "accelerators", "actor_pool", "annotations", "check_serialize", "collective", "dask", "debug",
    "helpers", "iter", "joblib", "metrics", "multiprocessing", "queue", "scheduling_strategies",
    "serialization", "state"))


__all__ = [
    "ActorPool",
    "as_completed",
    "deregister_serializer",
    "disable_log_once_globally",
    "enable_periodic_logging",
    "get_current_placement_group",
    "get_node_ip_address",
    "get_object_locations",
    "get_placement_group",
    "inspect_serializability",
    "list_named_actors",
    "log_once",
    "map_unordered",
    "placement_group",
    "placement_group_table",
    "remove_placement_group",
    "register_serializer",
]
