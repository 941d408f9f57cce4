"""The control machine alone: frames, windows, acknowledgements, under any completion order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hpcray.transport.base import PeerLost, Received, TransportEvent
from hpcray.transport.frames import MAX_PAYLOAD_BYTES, Frame, FrameError, decode, encode
from hpcray.transport.peers import COALESCE_BYTES, WINDOW, Outgoing, Peer, Peers

A, B = 0, 1


@given(
    number=st.integers(0, 2**64 - 1), ack=st.integers(0, 2**64 - 1),
    payloads=st.lists(st.binary(max_size=40)), flags=st.integers(0, 1),
)
def test_frames_come_back_as_they_went(
    number: int, ack: int, payloads: list[bytes], flags: int
) -> None:
    frame = encode(number, ack, payloads, flags)
    for data in (frame, bytearray(frame), memoryview(frame)):
        assert decode(data) == Frame(number, ack, flags, payloads)


def test_large_frames_come_back_too() -> None:
    payloads = [bytes(100_000), b"", b"x" * 70_000]
    assert decode(bytearray(encode(1, 2, payloads))).payloads == payloads


@given(st.binary(max_size=60))
def test_garbage_is_refused_or_decodes(data: bytes) -> None:
    try:
        frame = decode(data)
    except FrameError:
        return
    assert all(type(p) is bytes for p in frame.payloads)


def test_truncated_frames_are_refused() -> None:
    frame = encode(1, 0, [b"abc", b"de"])
    for n in range(len(frame)):
        with pytest.raises(FrameError):
            decode(frame[:n])


class TwoPeers(RuleBasedStateMachine):
    """Two ranks and the frames between them, which complete in any order.

    The network never loses nor repeats: MPI does not either. Liveness is checked at the end:
    delivering what is under way and polling must bring everything over, whatever came before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ends = [Peers(A, 2), Peers(B, 2)]
        self.wires: list[list[bytes]] = [[], []]  # frames on the way to each
        self.sent: list[list[bytes]] = [[], []]
        self.got: list[list[bytes]] = [[], []]
        self.counter = 0

    @rule(end=st.sampled_from([A, B]), count=st.integers(1, 5),
          nbytes=st.sampled_from([0, 1, 30, COALESCE_BYTES // 2, COALESCE_BYTES + 1]))
    def send(self, end: int, count: int, nbytes: int) -> None:
        for _ in range(count):
            self.counter += 1
            payload = self.counter.to_bytes(4, "big") + bytes(nbytes)
            self.ends[end].send(1 - end, payload)
            self.sent[end].append(payload)

    @rule(end=st.sampled_from([A, B]))
    def flush(self, end: int) -> None:
        self.wires[1 - end] += [frame for _, frame in self.ends[end].flush()]

    @rule(end=st.sampled_from([A, B]), data=st.data(), count=st.integers(0, 4))
    def poll(self, end: int, data: st.DataObject, count: int) -> None:
        wire = self.wires[end]
        chosen = [wire.pop(data.draw(st.integers(0, len(wire) - 1)))
                  for _ in range(min(count, len(wire)))]
        self._poll(end, chosen)

    def _poll(self, end: int, frames: list[bytes]) -> None:
        events: list[TransportEvent] = []
        for frame in frames:
            self.ends[end].arrived(1 - end, frame, events)
        self.wires[1 - end] += [frame for _, frame in self.ends[end].end_poll(events)]
        for event in events:
            assert isinstance(event, Received)
            assert event.rank == 1 - end
            self.got[end].append(event.payload)

    @invariant()
    def in_order_exactly_once(self) -> None:
        for end in (A, B):
            sent, got = self.sent[end], self.got[1 - end]
            assert got == sent[: len(got)]

    @invariant()
    def at_most_a_window_on_the_wire(self) -> None:
        for wire in self.wires:
            assert sum(decode(frame).number > 0 for frame in wire) <= WINDOW
        for peers in self.ends:
            peers.validate()

    def teardown(self) -> None:
        for end in (A, B):
            self.flush(end)
        rounds = 0
        while not all(peers.idle for peers in self.ends) or any(self.wires):
            for end in (A, B):  # the latest first, the worst legal order
                wire, self.wires[end] = self.wires[end], []
                self._poll(end, wire[::-1])
            rounds += 1
            assert rounds < 10 + 4 * self.counter, "deadlock"
        assert self.got == [self.sent[B], self.sent[A]]


TestTwoPeers = TwoPeers.TestCase
TestTwoPeers.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def frames_of(peers: Peers) -> list[bytes]:
    return [frame for _, frame in peers.flush()]


def test_a_full_window_coalesces() -> None:
    a = Peers(A, 2)
    frames = []
    for i in range(10):
        a.send(B, b"%d" % i)
        frames += frames_of(a)
    assert [decode(f).payloads for f in frames] == [[b"0"], [b"1"]]
    events: list[TransportEvent] = []
    a.arrived(B, encode(0, 1, ()), events)
    [(_, frame)] = a.end_poll(events)
    assert decode(frame).payloads == [b"%d" % i for i in range(2, 10)]


def test_replies_carry_the_acknowledgement() -> None:
    a = Peers(A, 2)
    events: list[TransportEvent] = []
    a.arrived(B, encode(1, 0, [b"ping"]), events)
    assert a.end_poll(events) == [], "one frame owed can wait for a reply"
    a.send(B, b"pong")
    [frame] = frames_of(a)
    assert decode(frame).acknowledged == 1
    assert a.end_poll(events) == []


def test_without_reverse_traffic_the_debt_is_paid_a_poll_later() -> None:
    a = Peers(A, 2)
    events: list[TransportEvent] = []
    a.arrived(B, encode(1, 0, [b"x"]), events)
    assert a.end_poll(events) == []
    assert frames_of(a) == []
    assert a.end_poll(events) == [(B, encode(0, 1, ()))]
    assert a.end_poll(events) == []


def test_who_owes_or_speaks_to_itself_is_restless() -> None:
    """It has to be polled again, though nothing comes."""
    a, b = Peers(A, 2), Peers(B, 2)
    events: list[TransportEvent] = []
    assert not b.restless
    a.send(B, b"x")
    [(_, frame)] = a.flush()
    b.arrived(A, frame, events)
    b.end_poll(events)
    assert b.restless
    b.end_poll(events)
    assert not b.restless
    b.send(B, b"y")
    b.flush()
    assert b.restless
    b.end_poll(events)
    assert not b.restless


def test_a_full_window_is_acknowledged_at_once() -> None:
    a = Peers(A, 2)
    events: list[TransportEvent] = []
    a.arrived(B, encode(2, 0, [b"y"]), events)
    assert events == []
    a.arrived(B, encode(1, 0, [b"x"]), events)
    assert events == [Received(B, b"x"), Received(B, b"y")]
    assert frames_of(a) == [encode(0, 2, ())]


def test_coalescing_stops_at_its_bound() -> None:
    peer = Peer()
    for _ in range(5):
        peer.push(bytes(COALESCE_BYTES // 2))
    peer.push(bytes(3 * COALESCE_BYTES))
    first = peer.next_frame()
    assert first is not None and len(decode(first).payloads) == 2
    second = peer.next_frame()
    assert second is not None and len(decode(second).payloads) == 2
    assert peer.next_frame() is None, "the window is full"


@pytest.mark.parametrize("number", [3, 4, 100])
def test_frames_outside_the_window_are_a_bug(number: int) -> None:
    with pytest.raises(FrameError, match="was expected"):
        Peer().handle(encode(number, 0, [b"x"]))


def test_repeated_and_overacknowledging_frames_are_a_bug() -> None:
    peer = Peer()
    peer.handle(encode(2, 0, [b"x"]))
    with pytest.raises(FrameError, match="was expected"):
        peer.handle(encode(2, 0, [b"x"]))
    with pytest.raises(FrameError, match="sent were 0"):
        peer.handle(encode(1, 1, [b"x"]))
    peers = Peers(A, 3)
    with pytest.raises(FrameError, match="from rank 2"):
        peers.arrived(2, b"short", [])


def test_a_lost_peer_is_forgotten_once() -> None:
    a = Peers(A, 2)
    a.send(B, b"x")
    assert a.lose(B, "gone") == PeerLost(B, "gone")
    assert a.lose(B, "again") is None
    assert a.lose(A, "myself") is None
    a.send(B, b"y")
    events: list[TransportEvent] = []
    a.arrived(B, encode(1, 0, [b"z"]), events)
    assert events == [] and frames_of(a) == [] and a.idle and a.close() == []
    a.validate()


def test_close_drains_both_ways() -> None:
    ends = [Peers(A, 2), Peers(B, 2)]
    for i in range(5):
        ends[A].send(B, bytes(COALESCE_BYTES) + b"%d" % i)
    wires: list[list[bytes]] = [[], []]
    for end in (A, B):
        wires[1 - end] += [frame for _, frame in ends[end].close()]
    assert ends[A].undrained() == [B]
    got = 0
    for _ in range(40):
        for end in (A, B):
            events: list[TransportEvent] = []
            wire, wires[end] = wires[end], []
            for frame in wire:
                ends[end].arrived(1 - end, frame, events)
            wires[1 - end] += [frame for _, frame in ends[end].end_poll(events)]
            got += len(events)
    assert got == 5
    assert ends[A].undrained() == ends[B].undrained() == []


def test_too_large_a_payload_is_refused() -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return MAX_PAYLOAD_BYTES + 1

    with pytest.raises(ValueError, match="object store"):
        Peers(A, 2).send(B, Huge())


class Ranks:
    """Several `Peers` and the wires between them; frames may be dropped with a dead rank."""

    def __init__(self, size: int) -> None:
        self.ends = {rank: Peers(rank, size) for rank in range(size)}
        self.wires: list[tuple[int, int, bytes]] = []
        self.received: list[tuple[int, bytes]] = []
        self.frames = 0

    def put(self, source: int, frames: list[Outgoing]) -> None:
        self.frames += sum(1 for _, frame in frames if decode(frame).number)
        self.wires += [(source, rank, frame) for rank, frame in frames]

    def close(self, rank: int) -> None:
        self.put(rank, self.ends[rank].close())

    def lose(self, rank: int) -> None:
        del self.ends[rank]
        self.wires = [wire for wire in self.wires if rank not in wire[:2]]
        for end in self.ends.values():
            end.lose(rank, "killed")

    def run(self, turns: int = 40) -> list[int]:
        """-> the ranks that are not done afterwards."""
        for _ in range(turns):
            wires, self.wires = self.wires, []
            for rank, end in self.ends.items():
                events: list[TransportEvent] = []
                for source, target, frame in wires:
                    if target == rank:
                        end.arrived(source, frame, events)
                self.received += [(rank, e.payload) for e in events if isinstance(e, Received)]
                self.put(rank, end.end_poll(events))
                end.validate()
        return [rank for rank, end in self.ends.items() if end.undrained()]


def test_the_end_of_many_ranks_takes_two_frames_each() -> None:
    ranks = Ranks(50)
    for rank in range(50):
        ranks.close(rank)
    assert ranks.run() == []
    assert ranks.frames == 2 * 49


def test_nobody_is_done_while_something_is_under_way() -> None:
    """Rank 1 closes without knowing that rank 2 is about to send to it."""
    ranks = Ranks(3)
    ranks.close(0)
    ranks.close(1)
    assert ranks.run() == [0, 1, 2]
    ranks.ends[2].send(1, b"late")
    ranks.put(2, ranks.ends[2].flush())
    assert ranks.run() == [0, 1, 2]
    assert ranks.ends[0].undrained() == [2], "it names whom it waits for"
    ranks.close(2)
    assert ranks.run() == []
    assert ranks.received == [(1, b"late")]


@pytest.mark.parametrize("turns", range(6))
def test_the_end_without_a_hub(turns: int) -> None:
    """Rank 0 is lost at some moment of the end: rank 1 does its work."""
    ranks = Ranks(4)
    for rank in range(4):
        ranks.close(rank)
    ranks.run(turns)
    ranks.lose(0)
    assert ranks.run() == []
