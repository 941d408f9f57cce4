"""The same `start` as tests/process has; every test of this folder runs a real mpirun."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..process.conftest import start as start
from ..process.jobs import MPIRUN


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.mpirun)
            if not MPIRUN.exists():
                item.add_marker(pytest.mark.skip(reason=f"no mpirun at {MPIRUN}"))
