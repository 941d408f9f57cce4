"""Faults by rule: what is lost, what is late, and what stays in order."""

from __future__ import annotations

from hpcray.transport.base import PeerLost, Received, TransportEvent
from hpcray.transport.faults import Delay, Drop, FaultyTransport, Kill
from hpcray.transport.loopback import LoopbackNetwork, LoopbackTransport


def pair(*rules: Drop | Delay | Kill) -> tuple[FaultyTransport, LoopbackTransport]:
    network = LoopbackNetwork(3)
    return FaultyTransport(network.transport(0), rules), network.transport(1)


def run(sender: FaultyTransport, receiver: LoopbackTransport, turns: int) -> list[bytes]:
    events: list[TransportEvent] = []
    for _ in range(turns):
        sender.flush()
        sender.poll()
        events += receiver.poll()
    assert all(isinstance(event, Received) for event in events)
    return [event.payload for event in events if isinstance(event, Received)]


def test_drop_takes_what_matches_up_to_its_count() -> None:
    sender, receiver = pair(Drop(1, lambda p: p.startswith(b"a"), count=2), Drop(2))
    for payload in (b"a1", b"b", b"a2", b"a3"):
        sender.send(1, payload)
        sender.send(2, payload)
    assert run(sender, receiver, 3) == [b"b", b"a3"]
    assert sender.dropped == 6


def test_delay_holds_back_what_follows() -> None:
    sender, receiver = pair(Delay(5, matches=lambda p: p == b"slow"))
    for payload in (b"first", b"slow", b"last"):
        sender.send(1, payload)
    assert sender.busy()
    assert run(sender, receiver, 4) == [b"first"]
    assert run(sender, receiver, 4) == [b"slow", b"last"]
    assert not sender.busy()


def test_close_does_not_forget_the_delayed() -> None:
    sender, receiver = pair(Delay(1000))
    sender.send(1, b"x")
    sender.close(1.0)
    assert receiver.poll() == [Received(0, b"x")]


def test_kill_strikes_at_its_payload() -> None:
    sender, receiver = pair(Kill(1, lambda p: p == b"poison"))
    receiver.send(0, b"late words")
    sender.send(1, b"fine")
    sender.flush()
    sender.send(1, b"poison")
    receiver.flush()
    sender.send(1, b"after")
    sender.flush()
    assert sender.poll() == [PeerLost(1, "killed by a fault rule")]
    assert sender.poll() == []
    assert receiver.poll() == [Received(0, b"fine")]
