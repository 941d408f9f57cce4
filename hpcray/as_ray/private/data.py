"""`ray.data`: what Tune and RLlib ask about it. There are no datasets here.

`Dataset` and `DataIterator` are classes that nothing is an instance of, so the libraries take every
other kind of data as it is.
"""

from __future__ import annotations

import importlib
from typing import Any

from hpcray.as_ray import stubs, table

__path__: list[str] = []  # a package: ray.data.block, ...

Dataset = stubs.stub("ray.data", "Dataset")
DataIterator = stubs.stub("ray.data", "DataIterator")
NodeIdStr = str


class DataContext:
    """Settings of Ray Data: kept, and read by nobody."""

    _current: DataContext | None = None

    @classmethod
    def get_current(cls) -> DataContext:
        if cls._current is None:
            cls._current = cls()
        return cls._current

    @classmethod
    def _set_current(cls, context: DataContext) -> None:
        cls._current = context


def __getattr__(name: str) -> Any:
    if name in table.DATA_STUBS:
        return stubs.stub("ray.data", name)
    if f"ray.data.{name}" in table.STUBS:
        return importlib.import_module(f"ray.data.{name}")
    raise AttributeError(
        f"ray.data.{name} is not part of hpcray: Ray Data needs Ray's own core; read files in "
        "tasks, and pass arrays, pandas or Arrow tables")
