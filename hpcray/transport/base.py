"""The transport contract: what a node may expect of the network, whichever it is.

    node loop                transport                      peers
    send(rank, payload) --->  queue, coalesce, number  ---> Received, in order, exactly once
    post_receive(...)   --->  chunks into the buffer   <--- post_send(...)
    poll()              <---  a list of events, never blocking

Two roads, because they want different things. *Control payloads* are small, many, ordered
per peer and coalesced into frames. *Data transfers* are large, unordered among each other and
land in a buffer that the receiver posted before it asked for them, so no byte is copied twice.

Promised: payloads from one peer arrive in the order they were sent, each exactly once, until
that peer is lost. Not promised: any order between peers, between payloads and data, or
between two transfers.

This module holds no behaviour. A transport knows nothing of tasks, objects or actors.
"""

from __future__ import annotations

from typing import Protocol

import msgspec


class Received(msgspec.Struct, frozen=True, gc=False):
    """One payload, exactly as it was given to `send` on `rank`."""

    rank: int
    payload: bytes


class DataReceived(msgspec.Struct, frozen=True, gc=False):
    """The whole buffer posted for `transfer` is filled from `rank`."""

    rank: int
    transfer: int


class DataSent(msgspec.Struct, frozen=True, gc=False):
    """The buffer posted for sending may be reused.

    It does not say that the receiver has the data: a send to a lost peer ends this way too.
    """

    rank: int
    transfer: int


class DataCancelled(msgspec.Struct, frozen=True, gc=False):
    """A receive is over without its data; its buffer, maybe partly written, may be reused."""

    rank: int
    transfer: int


class PeerLost(msgspec.Struct, frozen=True, gc=False):
    """`rank` is dead or was declared so. At most once per rank; nothing is Received after it."""

    rank: int
    reason: str


TransportEvent = Received | DataReceived | DataSent | DataCancelled | PeerLost


class TransportError(Exception):
    """The network library failed in a way that is not the death of one peer.

    Nothing can be assumed about messages under way, so the node that sees it ends.
    """


class CloseTimeout(TransportError):
    """Nothing moved at the end any more; `waiting_for` holds the ranks that did not take part."""

    def __init__(self, limit_s: float, waiting_for: tuple[int, ...]) -> None:
        super().__init__(limit_s, waiting_for)
        self.limit_s = limit_s
        self.waiting_for = waiting_for

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.waiting_for[:16])) or "none"
        return (
            f"the network did not drain: nothing moved for {self.limit_s:g} s; still waiting for "
            f"rank(s) {ranks}. Every rank must call close(); a rank that hangs must be declared "
            "lost first"
        )


class Transport(Protocol):
    """One rank's end of the network. One thread uses it; no method blocks, except `close`."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def send(self, rank: int, payload: bytes) -> None:
        """Queue a payload for `rank` (the own rank works too). To a lost peer: dropped.

        Raises ValueError for a rank outside the job or a payload over MAX_PAYLOAD_BYTES.
        """

    def flush(self) -> None:
        """Start what is queued, as far as the window of each peer permits. Once per loop turn.

        What the window holds back leaves from a later `poll`, or with what a later flush adds.
        """

    def queued_bytes(self, rank: int) -> int:
        """Payloads for `rank` that wait for its window. A sender of much waits until it is little:
        what it has not given to `send` yet takes no memory here."""

    def poll(self) -> list[TransportEvent]:
        """Make progress and return what happened. Work per call is bounded."""

    def post_receive(self, rank: int, transfer: int, buffer: memoryview) -> None:
        """Prepare to fill `buffer` from `rank`; post it before asking the holder to send.

        `transfer` is chosen by the receiver, non-negative and unique among its live transfers.
        The sender must post a buffer of the same length. The buffer must be contiguous and
        writable. Exactly one of DataReceived and DataCancelled follows.
        """

    def post_send(self, rank: int, transfer: int, buffer: memoryview) -> None:
        """Send `buffer` into what `rank` posted as `transfer`. Exactly one DataSent follows."""

    def cancel_receive(self, rank: int, transfer: int) -> None:
        """Give a receive up because its holder refused: it must not post the send later.

        A transfer that has begun to arrive runs to its end (DataReceived); otherwise
        DataCancelled follows. No effect on a transfer that is already over.
        """

    def declare_lost(self, rank: int, reason: str) -> None:
        """Treat `rank` as dead although the network may still reach it; PeerLost follows.

        Its transfers end: sends by DataSent, receives by DataCancelled, each once the library
        has let go of the buffer (one that hangs half-way through may keep it to the end).
        """

    def busy(self) -> bool:
        """Whether data is under way, so that the caller should poll again without waiting."""

    def heard(self, rank: int) -> int:
        """A number that grows with everything `rank` sends us or acknowledges."""

    def close(self, limit_s: float) -> None:
        """Deliver what is queued, take what peers still send (and discard it), let go.

        Every living rank calls it. Lost peers are not waited for. Raises CloseTimeout if nothing
        moves for `limit_s`.
        """
