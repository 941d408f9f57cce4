"""What Ray keeps under `ray.experimental` and programs use."""

from hpcray.absent import attributes
from hpcray.experimental.locations import get_local_object_locations, get_object_locations

__getattr__ = attributes(
    __name__, submodules=("internal_kv", "locations", "queue", "state", "tqdm_ray"))

__all__ = ["get_local_object_locations", "get_object_locations"]
