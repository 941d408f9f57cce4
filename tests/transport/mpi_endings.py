"""Ranks that do not play along: `mpirun -n 2 python mpi_endings.py absent|silent`.

absent  rank 1 never calls MPI_Init; rank 0 must give up with one clear line.
silent  rank 1 never closes; rank 0 must name it, and leave MPI_Finalize unentered.

Started by test_mpi_launch.py, which ends rank 1 with the job.
"""

from __future__ import annotations

import os
import signal
import sys

from hpcray.transport.base import CloseTimeout

# MPI by way of our module, which decides how it is initialised.
from hpcray.transport.mpi import MPI, MpiTransport, start_mpi

mode = sys.argv[1]
launched_rank = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"])

if mode == "absent" and launched_rank == 1:
    signal.pause()  # until mpirun ends the job
comm = start_mpi(2.0 if mode == "absent" else 60.0)
transport = MpiTransport(comm)
if transport.rank == 1:
    signal.pause()
try:
    transport.close(0.2, finalize=False)
except CloseTimeout as error:
    print(error, flush=True)
# A transport made anew would wait for rank 1, so the same one is closed again, as a node does
# at its end; now the watchdog has to end this process.
transport._closed = False
transport.close(1.0)
MPI.COMM_WORLD.Abort(4)
