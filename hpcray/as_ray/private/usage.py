"""`ray._common.usage.usage_lib`: nothing is collected, and nobody is told."""

from __future__ import annotations

from typing import Any


class _Tags(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name

    def Value(cls, name: str) -> str:
        return name


class TagKey(metaclass=_Tags):
    """Any name is a key."""


def record_library_usage(library_usage: str) -> None:
    """Recorded nowhere."""


def record_extra_usage_tag(key: Any, value: str, gcs_client: Any = None) -> None:
    """Recorded nowhere."""


def usage_stats_enabled() -> bool:
    return False
