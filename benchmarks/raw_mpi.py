"""The floor for `transport.py`: the same bytes and round trips in bare mpi4py.

    mpirun -n 2 python benchmarks/raw_mpi.py

    rank 0: send 1 byte -----> rank 1      the request of a pull
    rank 0: Recv nbytes <----- Send        timed on rank 0 from request to last byte

Prints one line of JSON on rank 0. What must not go in: hpcray. This is the number
that the transport is held against, so it uses blocking calls and nothing else.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

TAG = 7
PING_BYTES = 64
Bytes = NDArray[np.uint8]


def pull_s(comm: MPI.Intracomm, nbytes: int, repeat: int, cold: bool) -> list[float]:
    """Seconds per pull on rank 0; `cold` receives into memory never touched before."""
    request = np.zeros(1, np.uint8)
    payload = np.full(nbytes, 1, np.uint8)
    warm = np.full(nbytes, 2, np.uint8)
    kept: list[Bytes] = []  # freed memory would come back warm
    times: list[float] = []
    for _ in range(repeat):
        comm.Barrier()
        if comm.rank == 0:
            start = time.perf_counter()
            target = np.empty(nbytes, np.uint8) if cold else warm
            comm.Send(request, 1, TAG)
            comm.Recv(target, 1, TAG)
            times.append(time.perf_counter() - start)
            if target[0] != 1 or target[-1] != 1:
                raise RuntimeError("rank 0 received other bytes than rank 1 sent")
            if cold:
                kept.append(target)
        else:
            comm.Recv(request, 0, TAG)
            comm.Send(payload, 0, TAG)
    return times


def ping_s(comm: MPI.Intracomm, repeat: int, batch: int = 1000) -> list[float]:
    """Seconds per blocking round trip of 64 bytes, one sample per batch."""
    message = np.zeros(PING_BYTES, np.uint8)
    times: list[float] = []
    for _ in range(repeat):
        comm.Barrier()
        start = time.perf_counter()
        for _ in range(batch):
            if comm.rank == 0:
                comm.Send(message, 1, TAG)
                comm.Recv(message, 1, TAG)
            else:
                comm.Recv(message, 0, TAG)
                comm.Send(message, 0, TAG)
        times.append((time.perf_counter() - start) / batch)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="Bare MPI pull and ping-pong of two ranks.")
    parser.add_argument("--nbytes", type=int, default=64 << 20)
    parser.add_argument("--repeat", type=int, default=10)
    options = parser.parse_args()
    comm = MPI.COMM_WORLD
    if comm.size != 2:
        raise SystemExit("run this on exactly two ranks: mpirun -n 2 python benchmarks/raw_mpi.py")
    pull_s(comm, options.nbytes, 2, cold=False)  # connections, registration caches
    found = {
        "pull_warm_s": pull_s(comm, options.nbytes, options.repeat, cold=False),
        "pull_cold_s": pull_s(comm, options.nbytes, options.repeat, cold=True),
        "ping_s": ping_s(comm, options.repeat),
        "mpi": " ".join(MPI.Get_library_version().split(",")[0].splitlines()[0].split()),
    }
    if comm.rank == 0:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
