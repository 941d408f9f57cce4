"""What Ray keeps under `ray.experimental` and programs use: names only, the code is elsewhere."""

from __future__ import annotations

from hpcray.util.object_locations import get_local_object_locations, get_object_locations

__all__ = ["get_local_object_locations", "get_object_locations"]
