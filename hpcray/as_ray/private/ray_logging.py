"""`ray._private.ray_logging`."""

from __future__ import annotations

import re

NUMBERS = re.compile(r"(\d+|0x[0-9a-fA-F]+)")
