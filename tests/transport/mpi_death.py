"""A rank dies by SIGKILL under traffic: `mpirun --with-ft ulfm -n 4 python mpi_death.py`.

The survivors must learn of it once, get their buffers back, go on talking over the same
communicators, and end MPI cleanly. Started by test_mpi_launch.py.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from contract import MIB, Node

# MPI by way of our module, which decides how it is initialised.
from hpcray.transport.mpi import MPI, MpiTransport, start_mpi

VICTIM = 2
WAIT_S = 30.0


def wait(node: Node, condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        node.turn()
        assert time.monotonic() < deadline_s, f"rank {node.rank} waits for {what}: {vars(node)}"
        os.sched_yield()


def main() -> None:
    transport = MpiTransport(start_mpi(60.0))
    node = Node(transport)
    survivors = [rank for rank in node.others if rank != VICTIM]

    # Everyone has heard of everyone, so that the death strikes connected peers.
    for rank in node.others:
        transport.send(rank, b"hello")
    wait(node, lambda: all(node.received[r] for r in node.others), "hello")

    if node.rank == VICTIM:
        # Half-way through a transfer to rank 0 and with a large frame under way to rank 1.
        transport.post_send(0, 1, memoryview(bytes(64 * MIB)))
        transport.send(1, bytes(8 * MIB))
        transport.flush()
        transport.poll()
        os.kill(os.getpid(), signal.SIGKILL)

    # A receive that begins, one that never does, and a send that is never received.
    transport.post_receive(VICTIM, 1, memoryview(bytearray(64 * MIB)))
    transport.post_receive(VICTIM, 2, memoryview(bytearray(MIB)))
    transport.post_send(VICTIM, 3, memoryview(bytes(8 * MIB)))
    for rank in node.others:
        transport.send(rank, b"before")
    started_s = time.monotonic()
    wait(node, lambda: node.lost == [VICTIM], "the loss")
    detected_s = time.monotonic() - started_s
    wait(node, lambda: len(node.cancelled) + len(node.filled) == 2, "the receives to end")
    wait(node, lambda: node.sent, "the send to end")
    assert not transport.busy()

    transport.send(VICTIM, b"nobody hears this")
    for i in range(500):
        for rank in survivors:
            transport.send(rank, b"%d" % i)
        node.turn()
    expected = [b"hello", b"before", *(b"%d" % i for i in range(500))]
    wait(node, lambda: all(len(node.received[r]) == len(expected) for r in survivors), "talk")
    assert all(node.received[r] == expected for r in survivors)

    # Data among survivors goes on too.
    right, left = survivors[0], survivors[-1]
    buffers = {r: bytearray(9 * MIB) for r in {left, right}}
    before = len(node.filled), len(node.sent)
    for rank, buffer in buffers.items():
        transport.post_receive(rank, 7, memoryview(buffer))
        transport.post_send(rank, 7, memoryview(bytes([node.rank]) * (9 * MIB)))
    wait(node, lambda: len(node.filled) - before[0] == len(buffers), "data")
    wait(node, lambda: len(node.sent) - before[1] == len(buffers), "sends")
    assert all(buffer == bytes([rank]) * (9 * MIB) for rank, buffer in buffers.items())
    transport.validate()

    print(f"survived {node.rank} detected_s={detected_s:.3f}", flush=True)
    transport.close(WAIT_S)
    assert MPI.Is_finalized()


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(3)
