"""For tests whose every rank is a pytest of its own."""

from __future__ import annotations

import sys
from typing import Any

import pytest


@pytest.fixture(scope="session")
def world() -> Any:
    """MPI_COMM_WORLD, initialised our way: under the watchdog, finalised by us."""
    from hpcray.transport.mpi import MPI, start_mpi

    return MPI.COMM_WORLD if MPI.Is_initialized() else start_mpi(60.0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """One rank's failure is the job's: the others are inside a program they cannot finish alone."""
    report = yield
    mpi = sys.modules.get("mpi4py.MPI")
    if report.failed and mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        print(f"rank {mpi.COMM_WORLD.rank}: {item.nodeid} failed\n{report.longreprtext}",
              file=sys.stderr, flush=True)
        mpi.COMM_WORLD.Abort(3)
    return report
