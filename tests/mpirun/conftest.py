"""The same `start` as tests/process has; every test of this folder runs a real mpirun."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..process.conftest import start as start
from ..process.jobs import MPIRUN

# What these show are hpcray's own rules over ranks, whichever MPI carries its messages.
ANY_MPI = {"test_waiting", "test_preload", "test_state", "test_util_between_ranks", "test_placing",
           "test_groups_over_ranks", "test_generators_between_ranks", "test_environments"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.mpirun)
            if item.path.stem in ANY_MPI:
                item.add_marker(pytest.mark.any_mpi)
            if not MPIRUN.exists():
                item.add_marker(pytest.mark.skip(reason=f"no mpirun at {MPIRUN}"))
