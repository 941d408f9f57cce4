"""Control frames per peer: numbered, windowed, acknowledged. Pure; no network, no clock.

    send() -> queue --next_frame()--> at most WINDOW frames unacknowledged --> network
                                                  ^                              |
    poll() <- in order <-- held until the gap <---+------ acknowledged ----------+
                           before it is closed

MPI keeps the order in which messages are matched, not the one in which they complete: a small
frame overtakes a large one on some networks. So frames carry numbers and are handled in that
order. The window bounds send buffers, what the receiver must hold, and the work of a turn;
what it keeps back coalesces, which makes frames larger exactly when a peer is slow.

Acknowledgements ride on frames. A bare one leaves only when nothing went the other way: at
once when the peer may be waiting for it (WINDOW frames owed), else one poll later. It is not
subject to the window, so two full windows never wait for each other.

Invariants, checked by `Peer.validate`:

PC-1  sent - acknowledged_by_peer is between 0 and WINDOW.
PC-2  every held frame lies after `handled` and within WINDOW of it; `handled + 1` is never held.
PC-3  queued_bytes == the sum of the lengths in the queue.

`Peers` is the same for all peers of a rank, and decides which frames leave when. It keeps
sets of rank numbers, whose iteration order does not depend on hash seeds.

The end (`close`) must not leave a message under way when MPI is finalised, and a rank cannot know
who is still sending to it. So everybody reports to the *hub*, the lowest living rank:

    each rank   everything I have sent to anybody was handled  --LAST-->  hub
    hub         all have said so, and so can I                 --LAST-->  everybody

That is 2 (n - 1) frames for n ranks. Rejected: a last frame from everybody to everybody, which is
a million of them for 1,000 ranks.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from hpcray.protocol.sizes import PAYLOAD_BYTES
from hpcray.transport.base import PeerLost, Received, TransportEvent
from hpcray.transport.frames import (
    FLAG_LAST,
    MAX_PAYLOAD_BYTES,
    Frame,
    FrameError,
    decode,
    encode,
)

# Two: one frame travels while the next one fills; a third would only hide a slow peer.
WINDOW = 2

# Coalescing stops here: a frame is decoded while the next one travels, and fits into caches.
COALESCE_BYTES = PAYLOAD_BYTES

Outgoing = tuple[int, bytes]  # rank, frame


@dataclass(frozen=True, slots=True)
class PeerStatistics:
    queued_payloads: int
    queued_bytes: int
    unacknowledged_frames: int
    held_frames: int


class Peer:
    """Both directions of the conversation with one other rank."""

    __slots__ = (
        "acknowledged_by_peer", "closed_by_peer", "handled", "held", "last_sent", "owed",
        "queue", "queued_bytes", "sent", "wants_last",
    )

    def __init__(self) -> None:
        self.queue: deque[bytes] = deque()
        self.queued_bytes = 0
        self.sent = 0  # number of the last frame sent
        self.acknowledged_by_peer = 0
        self.handled = 0  # number of the last frame whose payloads were given out
        self.held: dict[int, Frame] = {}
        self.owed = 0  # frames handled since the peer was last told
        self.wants_last = False
        self.last_sent = False
        self.closed_by_peer = False

    def push(self, payload: bytes) -> None:
        self.queue.append(payload)
        self.queued_bytes += len(payload)

    def close(self) -> None:
        """Send what is queued, then the mark that nothing follows."""
        self.wants_last = True

    @property
    def has_frame(self) -> bool:
        """Whether a numbered frame waits, be it for the window or for a flush."""
        return bool(self.queue) or (self.wants_last and not self.last_sent)

    @property
    def settled(self) -> bool:
        """The peer has handled everything it was sent."""
        return self.sent == self.acknowledged_by_peer and not self.has_frame

    def next_frame(self) -> bytes | None:
        """The next numbered frame, or None if there is nothing or the window is full."""
        queue = self.queue
        if not queue and not self.has_frame:
            return None
        if self.sent - self.acknowledged_by_peer >= WINDOW:
            return None
        if self.queued_bytes <= COALESCE_BYTES:
            payloads = list(queue)
            queue.clear()
            self.queued_bytes = 0
        else:
            payloads = self._take()
        self.sent += 1
        flags = 0
        if self.wants_last and not queue:
            self.last_sent = True
            flags = FLAG_LAST
        self.owed = 0
        return encode(self.sent, self.handled, payloads, flags)

    def bare_acknowledgement(self) -> bytes:
        self.owed = 0
        return encode(0, self.handled, ())

    def handle(self, data: bytes | bytearray | memoryview) -> list[bytes]:
        """Take one frame in whatever order it completed; return the payloads now in order.

        Raises FrameError for a frame that no correct peer sends: outside the window, twice,
        after its last, or acknowledging what was never sent.
        """
        frame = decode(data)
        if frame.acknowledged > self.sent:
            raise FrameError(f"acknowledges frame {frame.acknowledged}, sent were {self.sent}")
        # An old acknowledgement may complete after a newer one; only the newest counts.
        if frame.acknowledged > self.acknowledged_by_peer:
            self.acknowledged_by_peer = frame.acknowledged
        number = frame.number
        if number == 0:
            return []
        if not self.handled < number <= self.handled + WINDOW or number in self.held:
            raise FrameError(f"frame {number} came while {self.handled + 1} was expected")
        if self.closed_by_peer:
            raise FrameError(f"frame {number} came after the last one, {self.handled}")
        if number != self.handled + 1:
            self.held[number] = frame
            return []
        payloads = self._accept(frame)
        if not self.held:
            return payloads
        while (follower := self.held.pop(self.handled + 1, None)) is not None:
            payloads += self._accept(follower)
        return payloads

    def statistics(self) -> PeerStatistics:
        return PeerStatistics(
            queued_payloads=len(self.queue),
            queued_bytes=self.queued_bytes,
            unacknowledged_frames=self.sent - self.acknowledged_by_peer,
            held_frames=len(self.held),
        )

    def validate(self) -> None:
        """Check PC-1 to PC-3. Slow: for tests."""
        assert 0 <= self.sent - self.acknowledged_by_peer <= WINDOW, "PC-1"
        assert all(self.handled + 1 < n <= self.handled + WINDOW for n in self.held), "PC-2"
        assert self.queued_bytes == sum(map(len, self.queue)), "PC-3"

    def _accept(self, frame: Frame) -> list[bytes]:
        self.handled = frame.number
        self.owed += 1
        if frame.flags & FLAG_LAST:
            self.closed_by_peer = True
        return frame.payloads

    def _take(self) -> list[bytes]:
        """The head of the queue up to COALESCE_BYTES, at least one payload."""
        payloads: list[bytes] = []
        nbytes = 0
        while self.queue and (
            not payloads or nbytes + len(self.queue[0]) <= COALESCE_BYTES
        ):
            payload = self.queue.popleft()
            payloads.append(payload)
            nbytes += len(payload)
        self.queued_bytes -= nbytes
        return payloads


class Peers:
    """Every peer of one rank. A peer exists from the first word to or from it.

    `flush` and `end_poll` return frames for the caller to send, in order per peer.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.lost: dict[int, str] = {}
        self._peers: dict[int, Peer] = {}
        self._unflushed: set[int] = set()  # something was pushed since the last flush
        self._stalled: set[int] = set()  # flushed, but the window was full
        self._owing: set[int] = set()  # handled frames the peer has not been told of
        self._owing_since_last_poll: set[int] = set()
        self._to_self: list[bytes] = []
        self._to_self_flushed: list[bytes] = []
        self._closing = False
        self._released = False  # a hub that is lost by now had said that all is over

    def send(self, rank: int, payload: bytes) -> None:
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise ValueError(
                f"a control payload of {len(payload)} B exceeds {MAX_PAYLOAD_BYTES} B; "
                "values of this size travel through the object store"
            )
        if rank == self.rank:
            self._to_self.append(payload)
        elif rank not in self.lost:
            peer = self._peers.get(rank) or self._peer(rank)
            peer.push(payload)
            self._unflushed.add(rank)

    def queued_bytes(self, rank: int) -> int:
        peer = self._peers.get(rank)
        return 0 if peer is None else peer.queued_bytes

    def flush(self) -> list[Outgoing]:
        """What leaves now: queued payloads, and acknowledgements a peer may be waiting for."""
        if self._to_self:
            self._to_self_flushed += self._to_self
            self._to_self.clear()
        frames: list[Outgoing] = []
        if self._unflushed:
            ready, self._unflushed = self._unflushed, set()
            for rank in ready:
                self._send_window(rank, frames)
        if self._owing:
            urgent = [r for r in self._owing if self._peers[r].owed >= WINDOW]
            self._acknowledge(urgent, frames)
        return frames

    def arrived(
        self, rank: int, data: bytes | bytearray | memoryview, events: list[TransportEvent]
    ) -> None:
        """Take a frame from the network and append what it makes deliverable."""
        if rank in self.lost:
            return
        peer = self._peers.get(rank) or self._peer(rank)
        try:
            payloads = peer.handle(data)
        except FrameError as error:
            raise FrameError(f"from rank {rank}: {error}") from None
        if peer.owed:
            self._owing.add(rank)
            events += [Received(rank, payload) for payload in payloads]

    def end_poll(self, events: list[TransportEvent]) -> list[Outgoing]:
        """Close a poll: own payloads, frames a window held back, debts older than one poll."""
        if self._to_self_flushed:
            own = self._to_self_flushed
            self._to_self_flushed = []
            events += [Received(self.rank, payload) for payload in own]
        settling = self._settle() if self._closing else []
        if not self._stalled and not self._owing:
            if self._owing_since_last_poll:
                self._owing_since_last_poll = set()
            return settling
        frames = settling
        if self._stalled:
            for rank in list(self._stalled):
                self._send_window(rank, frames)
        if self._owing:
            overdue = [r for r in self._owing if r in self._owing_since_last_poll]
            self._acknowledge(overdue, frames)
        self._owing_since_last_poll = self._owing.copy()
        return frames

    def lose(self, rank: int, reason: str) -> PeerLost | None:
        """Forget everything about a peer; None if it was lost before."""
        if rank in self.lost or rank == self.rank:
            return None
        self.lost[rank] = reason
        peer = self._peers.pop(rank, None)
        # A last word from a lower rank came from a hub.
        if peer is not None and peer.closed_by_peer and rank < self.rank:
            self._released = True
        for ranks in (
            self._unflushed, self._stalled, self._owing, self._owing_since_last_poll
        ):
            ranks.discard(rank)
        return PeerLost(rank, reason)

    def close(self) -> list[Outgoing]:
        """Begin the end: what is queued leaves, and from here on polls settle it with the hub."""
        self._closing = True
        return [*self.flush(), *self._settle()]

    def undrained(self) -> list[int]:
        """After `close`: the living peers we wait for; none once nothing is under way any more."""
        waiting = [rank for rank, peer in self._peers.items() if not peer.settled or peer.owed]
        if not waiting and not self._released:
            hub = self._hub()
            waiting = [rank for rank in (self._others() if hub == self.rank else [hub])
                       if not self._peer(rank).closed_by_peer]
        if not waiting and self._hub() == self.rank:
            waiting = [rank for rank in self._others() if not self._peer(rank).last_sent]
        return sorted(waiting)

    def _settle(self) -> list[Outgoing]:
        """Say LAST to the hub, or as the hub to everybody, once it is true."""
        if not all(peer.settled for peer in self._peers.values()):
            return []
        hub = self._hub()
        others = self._others() if hub == self.rank else [hub]
        if hub == self.rank and not self._released and not all(
                self._peer(rank).closed_by_peer for rank in others):
            return []
        frames: list[Outgoing] = []
        for rank in others:
            peer = self._peer(rank)
            if not peer.wants_last:
                peer.close()
                self._send_window(rank, frames)
        return frames

    def _hub(self) -> int:
        return next(rank for rank in range(self.size) if rank not in self.lost)

    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank and rank not in self.lost]

    def heard(self, rank: int) -> int:
        """A number that grows with everything the peer sends or acknowledges."""
        peer = self._peers.get(rank)
        return 0 if peer is None else peer.handled + peer.acknowledged_by_peer

    def heard_from_all(self) -> int:
        return sum(peer.handled + peer.acknowledged_by_peer for peer in self._peers.values())

    @property
    def idle(self) -> bool:
        """Nothing is queued, unacknowledged or owed, with anyone."""
        return (
            not self._to_self
            and not self._to_self_flushed
            and not self._owing
            and all(not p.has_frame and p.sent == p.acknowledged_by_peer and not p.held
                    for p in self._peers.values())
        )

    @property
    def restless(self) -> bool:
        """A poll would send something or give something out, even if nothing comes."""
        return bool(self._owing or self._to_self_flushed)

    def statistics(self) -> dict[int, PeerStatistics]:
        return {rank: peer.statistics() for rank, peer in self._peers.items()}

    def validate(self) -> None:
        """Check every peer's invariants. Slow: for tests."""
        for rank, peer in self._peers.items():
            peer.validate()
            assert (peer.owed > 0) == (rank in self._owing), "a debt is on the list"
            assert not peer.has_frame or rank in self._unflushed | self._stalled
        assert not self.lost.keys() & self._peers.keys()

    def _peer(self, rank: int) -> Peer:
        peer = self._peers.get(rank)
        if peer is None:
            if not 0 <= rank < self.size:
                raise ValueError(f"no rank {rank} in a job of {self.size} ranks")
            peer = self._peers[rank] = Peer()
        return peer

    def _send_window(self, rank: int, frames: list[Outgoing]) -> None:
        """Take what the window of `rank` permits, and remember whether something is left."""
        peer = self._peers[rank]
        while (frame := peer.next_frame()) is not None:
            frames.append((rank, frame))
            self._owing.discard(rank)
            if not peer.queue:
                break
        if peer.has_frame:
            self._stalled.add(rank)
        else:
            self._stalled.discard(rank)

    def _acknowledge(self, ranks: list[int], frames: list[Outgoing]) -> None:
        for rank in ranks:
            frames.append((rank, self._peers[rank].bare_acknowledgement()))
            self._owing.discard(rank)
