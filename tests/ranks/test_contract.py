"""The transport contract, run by the ranks themselves.

    mpirun -n 2 python -m pytest --with-mpi tests/ranks

Every rank runs this file under pytest-mpi; without `--with-mpi` its tests are skipped, and
tests/transport/test_mpi_launch.py starts them. A scenario is one program that all ranks run
together, so a rank that fails aborts the job (conftest.py): the others would wait for it.
"""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from tests.transport.contract import SCENARIOS, Node, Scenario

SCENARIO_TIMEOUT_S = 60.0


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_contract(world: Any, scenario: Scenario) -> None:
    from hpcray.transport.mpi import MpiTransport

    transport = MpiTransport(world)
    node = Node(transport)
    program = scenario(node)
    deadline_s = time.monotonic() + SCENARIO_TIMEOUT_S
    while True:
        node.turn()
        transport.validate()
        try:
            next(program)
        except StopIteration:
            break
        assert time.monotonic() < deadline_s, f"{scenario.__name__} is stuck: {vars(node)}"
        os.sched_yield()
    transport.close(SCENARIO_TIMEOUT_S, finalize=False)
    world.Barrier()
