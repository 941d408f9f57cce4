"""One rank of a contract run: `mpirun -n N python mpi_ranks.py [scenario ...]`.

Started by test_mpi_launch.py. A rank that fails prints why and aborts the job, so that the
others do not wait for it. Rank 0 prints a line per scenario that all ranks have passed.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from contract import SCENARIOS, Node, Scenario

# MPI by way of our module, which decides how it is initialised.
from hpcray.transport.mpi import MPI, MpiTransport, start_mpi

SCENARIO_TIMEOUT_S = 60.0


def run(scenario: Scenario) -> None:
    transport = MpiTransport(MPI.COMM_WORLD)
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
    MPI.COMM_WORLD.Barrier()
    if transport.rank == 0:
        print(f"passed {scenario.__name__}", flush=True)


def main() -> None:
    start_mpi(60.0)
    wanted = set(sys.argv[1:])
    try:
        for scenario in SCENARIOS:
            if not wanted or scenario.__name__ in wanted:
                run(scenario)
        # The last one goes through the whole ending, MPI_Finalize included.
        last = MpiTransport(MPI.COMM_WORLD)
        last.send((last.rank + 1) % last.size, b"goodbye")
        last.close(60.0)
        assert MPI.Is_finalized()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(3)


if __name__ == "__main__":
    main()
