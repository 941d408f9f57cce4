"""`ray._private`: what Ray's libraries need of it."""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    try:
        return importlib.import_module(f"ray._private.{name}")
    except ModuleNotFoundError as error:
        raise AttributeError(str(error)) from error
