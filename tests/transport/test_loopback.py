"""The contract over the in-memory network, and what only that network promises."""

from __future__ import annotations

import random

import pytest

from hpcray.transport.base import PeerLost, Received, TransportError, TransportEvent
from hpcray.transport.loopback import LoopbackNetwork

from .contract import SCENARIOS, Node, Scenario

# No scenario comes near; a stuck one ends here and not at the timeout of the whole test.
MAX_TURNS = 20_000


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("reorder", [False, True], ids=["plain", "reorder"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_contract(scenario: Scenario, reorder: bool, size: int) -> None:
    network = LoopbackNetwork(size, seed=7, reorder=reorder)
    nodes = [Node(network.transport(rank)) for rank in range(size)]
    programs = {node.rank: scenario(node) for node in nodes}
    order = random.Random(11)
    for _ in range(MAX_TURNS):
        for node in order.sample(nodes, size):
            node.turn()
            network.transport(node.rank).validate()
            if node.rank in programs:
                try:
                    next(programs[node.rank])
                except StopIteration:
                    del programs[node.rank]
        if not programs:
            break
    assert not programs, f"ranks {sorted(programs)} are stuck"


def drive(seed: int) -> list[tuple[int, list[TransportEvent]]]:
    network = LoopbackNetwork(3, seed=seed, reorder=True)
    log = []
    for i in range(60):
        for rank in range(3):
            transport = network.transport(rank)
            transport.send((rank + 1) % 3, b"%d" % i)
            transport.send((rank + 2) % 3, b"%d" % i)
            transport.flush()
            log.append((rank, transport.poll()))
    return log


def test_same_seed_same_events() -> None:
    assert drive(1) == drive(1)
    assert drive(1) != drive(2)


def test_quiet_when_nothing_is_under_way() -> None:
    network = LoopbackNetwork(2, reorder=True)
    assert network.quiet
    network.transport(0).send(1, b"x")
    network.transport(0).flush()
    assert not network.quiet
    for _ in range(20):
        network.transport(1).poll()
        network.transport(0).poll()
    assert network.quiet


@pytest.mark.parametrize("reorder", [False, True])
def test_killed_rank_is_lost_to_all_and_the_rest_goes_on(reorder: bool) -> None:
    network = LoopbackNetwork(3, seed=3, reorder=reorder)
    nodes = [Node(network.transport(rank)) for rank in range(3)]
    nodes[0].transport.post_receive(2, 5, memoryview(bytearray(100)))
    nodes[0].transport.post_send(2, 6, memoryview(bytes(100)))
    for i in range(30):
        nodes[2].transport.send(0, b"%d" % i)
        nodes[2].transport.send(1, b"%d" % i)
        nodes[2].turn()
    network.kill(2)
    network.kill(2)
    nodes[0].transport.send(1, b"go on")
    for _ in range(30):
        for node in nodes[:2]:
            node.turn()
    for node in nodes[:2]:
        assert node.lost == [2]
        got = node.received[2]
        assert got == [b"%d" % i for i in range(len(got))], "a prefix, in order"
    assert nodes[0].cancelled == [(2, 5)]
    assert nodes[0].sent == [(2, 6)]
    assert nodes[1].received[0] == [b"go on"]
    assert nodes[2].transport.poll() == []


def test_what_a_closed_rank_queued_still_arrives() -> None:
    network = LoopbackNetwork(2, reorder=True)
    left, right = network.transport(0), network.transport(1)
    for i in range(3000):
        left.send(1, b"%d" % i + bytes(2000))
    left.close(1.0)
    left.close(1.0)
    received: list[TransportEvent] = []
    for _ in range(200):
        received += right.poll()
    assert len(received) == 3000
    right.close(1.0)
    assert left.poll() == right.poll() == []


def test_own_rank_only_after_flush() -> None:
    transport = LoopbackNetwork(1).transport(0)
    transport.send(0, b"x")
    assert transport.poll() == []
    transport.flush()
    assert transport.poll() == [Received(0, b"x")]


def test_length_mismatch_is_named() -> None:
    network = LoopbackNetwork(2)
    network.transport(1).post_receive(0, 1, memoryview(bytearray(4)))
    with pytest.raises(TransportError, match="sends 5 B where rank 1 expects 4 B"):
        network.transport(0).post_send(1, 1, memoryview(bytes(5)))


def test_a_thousand_ranks_are_cheap_to_make() -> None:
    network = LoopbackNetwork(1000)
    network.transport(0).send(999, b"far")
    network.transport(0).flush()
    assert network.transport(999).poll() == [Received(0, b"far")]
    network.kill(999)
    assert network.transport(5).poll() == [PeerLost(999, "killed by the test")]
