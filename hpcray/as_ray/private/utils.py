"""`ray._private.utils`."""

from __future__ import annotations

import os
import sys
from typing import Any

from hpcray.as_ray import table


def get_ray_doc_version() -> str:
    return table.RECOMMENDED


def get_system_memory() -> int:
    """Bytes of this host, or of this process's cgroup."""
    from hpcray.launch.resources import detect_resources

    return int(detect_resources(os.environ).memory_bytes)


def compute_version_info() -> tuple[str, str, str]:
    """(ray, hpcray's commit, Python)"""
    import ray

    python = ".".join(map(str, sys.version_info[:3]))
    return ray.__version__, ray.__commit__, python


def check_oversized_function(*args: Any, **kwargs: Any) -> None:
    """hpcray checks a definition where it is made."""
