"""The transport contract as programs: one generator per rank, one `yield` per loop turn.

The same scenarios run over loopback (all ranks interleaved in one process, test_loopback.py)
and over real MPI (one rank per process, mpi_ranks.py). A scenario must not wait for anything
but events, so that either driver can run it.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator

from hpcray.transport.base import (
    DataCancelled,
    DataReceived,
    DataSent,
    PeerLost,
    Received,
    Transport,
)

MIB = 1 << 20


class Node:
    """A transport plus what has come out of it so far."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.rank = transport.rank
        self.size = transport.size
        self.others = [r for r in range(self.size) if r != self.rank]
        self.received: dict[int, list[bytes]] = defaultdict(list)
        self.filled: list[tuple[int, int]] = []
        self.sent: list[tuple[int, int]] = []
        self.cancelled: list[tuple[int, int]] = []
        self.lost: list[int] = []

    def turn(self) -> None:
        for event in self.transport.poll():
            match event:
                case Received(rank, payload):
                    assert type(payload) is bytes
                    assert rank not in self.lost, "nothing comes from the lost"
                    self.received[rank].append(payload)
                case DataReceived(rank, transfer):
                    self.filled.append((rank, transfer))
                case DataSent(rank, transfer):
                    self.sent.append((rank, transfer))
                case DataCancelled(rank, transfer):
                    self.cancelled.append((rank, transfer))
                case PeerLost(rank):
                    assert rank not in self.lost, "at most once"
                    self.lost.append(rank)
        self.transport.flush()

    def take(self, rank: int) -> bytes:
        return self.received[rank].pop(0)


Program = Iterator[None]
Scenario = Callable[[Node], Program]


def until(condition: Callable[[], object]) -> Program:
    while not condition():
        yield


def content(nbytes: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def in_order_exactly_once(node: Node) -> Program:
    sizes = [0, 1, 7, 300, 5000, 70_000]
    expected = [i.to_bytes(4, "big") + bytes(sizes[i % 6]) for i in range(200)]
    for i, payload in enumerate(expected):
        for rank in range(node.size):
            node.transport.send(rank, payload)
        if i % 7 == 0:
            yield
    yield from until(lambda: all(len(node.received[r]) >= 200 for r in range(node.size)))
    assert all(node.received[r] == expected for r in range(node.size))


def large_payloads_both_ways(node: Node) -> Program:
    sizes = [0, 1, 100_000, MIB - 1, MIB + 1, 5 * MIB, 3, 2 * MIB, 2 * MIB, 2 * MIB]
    for n in sizes:
        for rank in node.others:
            node.transport.send(rank, content(n, node.rank))
    yield from until(lambda: all(len(node.received[r]) == len(sizes) for r in node.others))
    for r in node.others:
        assert node.received[r] == [content(n, r) for n in sizes]


def what_waits_for_a_window_is_told(node: Node) -> Program:
    """A sender that waits while much is queued has little queued at any time, and gets through."""
    limit = 4 * MIB
    if node.rank == 0:
        assert node.transport.queued_bytes(1) == 0
        for number in range(200):
            yield from until(lambda: node.transport.queued_bytes(1) < limit)
            node.transport.send(1, bytes([number]) * 200_000)
            assert node.transport.queued_bytes(1) < limit + 200_000
        yield from until(lambda: node.transport.queued_bytes(1) == 0)
    elif node.rank == 1:
        yield from until(lambda: len(node.received[0]) == 200)
        assert [payload[0] for payload in node.received[0]] == list(range(200))


def ping_pong(node: Node) -> Program:
    if node.rank > 1:
        return
    for i in range(300):
        if node.rank == 0:
            node.transport.send(1, b"%d" % i)
        yield from until(lambda: node.received[1 - node.rank])
        assert node.take(1 - node.rank) == b"%d" % i
        if node.rank == 1:
            node.transport.send(0, b"%d" % i)


def one_way_stream(node: Node) -> Program:
    """Without reverse traffic only bare acknowledgements open the window."""
    if node.rank == 0:
        for i in range(3000):
            node.transport.send(1, b"%d" % i)
            if i % 3 == 0:
                yield
    elif node.rank == 1:
        yield from until(lambda: len(node.received[0]) == 3000)
        assert node.received[0] == [b"%d" % i for i in range(3000)]


def transfer_sizes(node: Node) -> Program:
    sizes = [0, 1, 4 * MIB, 4 * MIB + 1, 64 * MIB]
    if node.rank == 0:
        sources = []
        for transfer, n in enumerate(sizes):
            yield from until(lambda: node.received[1])
            assert node.take(1) == b"%d" % transfer
            sources.append(content(n, transfer))
            node.transport.post_send(1, transfer, memoryview(sources[-1]))
            assert node.transport.busy()
        yield from until(lambda: len(node.sent) == len(sizes))
        assert sorted(node.sent) == [(1, t) for t in range(len(sizes))]
        assert not node.transport.busy()
    elif node.rank == 1:
        for transfer, n in enumerate(sizes):
            buffer = bytearray(n)
            node.transport.post_receive(0, transfer, memoryview(buffer))
            node.transport.send(0, b"%d" % transfer)
            yield from until(lambda: node.filled)
            assert node.filled.pop() == (0, transfer)
            assert buffer == content(n, transfer)
        assert not node.cancelled


def many_transfers_at_once(node: Node) -> Program:
    """Every rank pulls from every other; numbers collide between receivers, as they may."""
    nbytes = 300_001
    buffers = {(rank, transfer): bytearray(nbytes)
               for transfer in range(20) for rank in node.others}
    count = len(buffers)
    for (rank, transfer), buffer in buffers.items():
        node.transport.post_receive(rank, transfer, memoryview(buffer))
        node.transport.send(rank, transfer.to_bytes(4, "big"))
    asked = 0
    while len(node.filled) < count or len(node.sent) < count:
        for rank in node.others:
            while node.received[rank]:
                transfer = int.from_bytes(node.take(rank), "big")
                source = content(nbytes, 1000 * node.rank + transfer)
                node.transport.post_send(rank, transfer, memoryview(source))
                asked += 1
        yield
    assert asked == count
    assert sorted(node.filled) == sorted(buffers)
    for (rank, transfer), buffer in buffers.items():
        assert buffer == content(nbytes, 1000 * rank + transfer)


def refused_receives_are_cancelled(node: Node) -> Program:
    sizes = [0, 10, 9 * MIB, 64 * MIB]
    if node.rank == 1:
        for transfer, n in enumerate(sizes):
            node.transport.post_receive(0, transfer, memoryview(bytearray(n)))
        node.transport.send(0, b"please")
        yield from until(lambda: node.received[0])
        assert node.take(0) == b"no"
        for transfer in range(len(sizes)):
            node.transport.cancel_receive(0, transfer)
            node.transport.cancel_receive(0, transfer)  # twice is once
        yield from until(lambda: len(node.cancelled) == len(sizes))
        assert sorted(node.cancelled) == [(0, t) for t in range(len(sizes))]
        # The same number works again, and the data goes where it was posted last.
        buffer = bytearray(9 * MIB)
        node.transport.post_receive(0, 2, memoryview(buffer))
        node.transport.send(0, b"now")
        yield from until(lambda: node.filled)
        assert buffer == content(9 * MIB, 2)
        node.transport.cancel_receive(0, 2)  # over: no effect
        yield
        assert len(node.cancelled) == len(sizes)
    elif node.rank == 0:
        yield from until(lambda: node.received[1])
        assert node.take(1) == b"please"
        node.transport.send(1, b"no")
        yield from until(lambda: node.received[1])
        source = content(9 * MIB, 2)
        node.transport.post_send(1, 2, memoryview(source))
        yield from until(lambda: node.sent)


def cancel_under_way(node: Node) -> Program:
    """Cancelling what has begun ends in one event; if it is DataReceived, the data is whole."""
    nbytes = 30 * MIB + 5
    if node.rank == 0:
        for transfer in range(5):
            yield from until(lambda: node.received[1])
            node.take(1)
            source = content(nbytes, transfer)
            node.transport.post_send(1, transfer, memoryview(source))
            yield from until(lambda: node.sent)
            node.sent.clear()
    elif node.rank == 1:
        for transfer in range(5):
            buffer = bytearray(nbytes)
            node.transport.post_receive(0, transfer, memoryview(buffer))
            node.transport.send(0, b"go")
            for _ in range(4 * transfer):
                yield
            node.transport.cancel_receive(0, transfer)
            yield from until(lambda: node.filled or node.cancelled)
            if node.cancelled:  # the holder sends all the same, so take it
                node.cancelled.clear()
                node.transport.post_receive(0, transfer, memoryview(buffer))
                yield from until(lambda: node.filled)
            node.filled.clear()
            assert buffer == content(nbytes, transfer)


def control_beside_data(node: Node) -> Program:
    """A transfer under way does not hold up payloads."""
    if node.rank == 0:
        yield from until(lambda: node.received[1])
        source = content(48 * MIB, 5)
        node.transport.post_send(1, 9, memoryview(source))
        for i in range(200):
            node.transport.send(1, b"%d" % i)
            yield
        yield from until(lambda: node.sent)
    elif node.rank == 1:
        buffer = bytearray(48 * MIB)
        node.transport.post_receive(0, 9, memoryview(buffer))
        node.transport.send(0, b"go")
        yield from until(lambda: node.filled and len(node.received[0]) == 200)
        assert node.received[0] == [b"%d" % i for i in range(200)]
        assert buffer == content(48 * MIB, 5)


def misuse_is_refused(node: Node) -> Program:
    def refuses(call: Callable[[], None]) -> bool:
        try:
            call()
        except ValueError:
            return True
        return False

    transport = node.transport
    other = node.others[0]
    buffer = memoryview(bytearray(8))
    assert refuses(lambda: transport.send(node.size, b""))
    assert refuses(lambda: transport.send(-1, b""))
    assert refuses(lambda: transport.post_receive(other, -1, buffer))
    assert refuses(lambda: transport.post_receive(node.size, 0, buffer))
    assert refuses(lambda: transport.post_receive(other, 0, memoryview(b"read-only")))
    assert refuses(lambda: transport.post_send(other, 0, buffer[::2]))
    transport.post_receive(other, 1, buffer)
    assert refuses(lambda: transport.post_receive(other, 1, buffer))
    transport.cancel_receive(other, 1)
    yield from until(lambda: node.cancelled)


def declared_lost(node: Node) -> Program:
    """Rank 2 against the rest; each side declares the other lost, then goes on."""
    if node.size < 3:
        return
    gone = [2] if node.rank != 2 else node.others
    for rank in gone:
        node.transport.post_receive(rank, 1, memoryview(bytearray(5 * MIB)))
        node.transport.declare_lost(rank, "the test says so")
        node.transport.declare_lost(rank, "and says it again")
    yield from until(lambda: len(node.lost) == len(node.cancelled) == len(gone))
    for rank in gone:
        node.transport.send(rank, b"into the void")
        node.transport.post_receive(rank, 2, memoryview(bytearray(1)))
        node.transport.post_send(rank, 2, memoryview(b"x"))
    yield from until(lambda: len(node.cancelled) == 2 * len(gone) and node.sent)
    if node.rank < 2:
        node.transport.send(1 - node.rank, b"still here")
        yield from until(lambda: node.received[1 - node.rank])
    assert sorted(node.lost) == gone


SCENARIOS: list[Scenario] = [
    in_order_exactly_once,
    large_payloads_both_ways,
    what_waits_for_a_window_is_told,
    ping_pong,
    one_way_stream,
    transfer_sizes,
    many_transfers_at_once,
    refused_receives_are_cancelled,
    cancel_under_way,
    control_beside_data,
    misuse_is_refused,
    declared_lost,
]
