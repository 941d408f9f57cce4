"""A network in memory: every rank in one process, deterministic, from a seed.

Tests and the simulated cluster run the real control machine (`peers`) over it. The same
sequence of calls with the same seed gives the same events, whatever the hash seed.

Plain mode: frames arrive at the receiver's next poll, in the order they were sent.
Reorder mode: each frame is late by up to MAX_DELAY_POLLS polls of its receiver, and frames of
one pair complete out of order, as MPI permits and shared memory never shows; data arrives in
two pieces, so that a reader who looks too early is caught.

Nothing here blocks, `close` included: a closed rank goes on draining inside the polls of the
others. There is no clock; a virtual one belongs to the simulated cluster.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from hpcray.transport.base import (
    DataCancelled,
    DataReceived,
    DataSent,
    TransportError,
    TransportEvent,
)
from hpcray.transport.peers import Outgoing, Peers
from hpcray.transport.transfers import byte_view, check_transfer

MAX_DELAY_POLLS = 3


@dataclass(slots=True)
class _Frame:
    due_poll: int
    source: int
    data: bytes


@dataclass(slots=True)
class _Copy:
    """A send that met its receive."""

    due_poll: int
    source: int
    transfer: int
    destination_buffer: memoryview
    source_buffer: memoryview
    copied_bytes: int = 0


class LoopbackNetwork:
    """The wires between `size` ranks of one process."""

    def __init__(self, size: int, *, seed: int = 0, reorder: bool = False) -> None:
        self.size = size
        self.reorder = reorder
        self._random = random.Random(seed)
        self._transports = [LoopbackTransport(self, rank) for rank in range(size)]
        self._closing: dict[int, None] = {}

    def transport(self, rank: int) -> LoopbackTransport:
        return self._transports[rank]

    def kill(self, rank: int, reason: str = "killed by the test") -> None:
        """End `rank` at once, as SIGKILL would: its calls do nothing from now on.

        In reorder mode a part of what it had sent is lost with it.
        """
        victim = self._transports[rank]
        if not victim.alive:
            return
        victim.alive = False
        self._closing.pop(rank, None)
        for other in self._transports:
            if other is not victim and other.alive:
                if self.reorder:
                    other.inbox = [f for f in other.inbox
                                   if f.source != rank or self._random.random() < 0.5]
                other.doomed.append((rank, reason))

    @property
    def quiet(self) -> bool:
        """Nothing is under way: polling everyone would change nothing."""
        return all(t.idle for t in self._transports if t.alive)

    def delay_polls(self) -> int:
        return self._random.randint(0, MAX_DELAY_POLLS) if self.reorder else 0

    def shuffle(self, frames: list[_Frame]) -> None:
        if self.reorder and len(frames) > 1:
            self._random.shuffle(frames)

    def start_closing(self, rank: int) -> None:
        self._closing[rank] = None

    def drain_closed(self) -> None:
        """Move closed ranks on; what they receive is discarded."""
        for rank in list(self._closing):
            transport = self._transports[rank]
            transport.progress()
            if transport.drained:
                del self._closing[rank]


class LoopbackTransport:
    """One rank's end; made by `LoopbackNetwork`."""

    def __init__(self, network: LoopbackNetwork, rank: int) -> None:
        self.rank = rank
        self.size = network.size
        self.alive = True
        self.closed = False
        self.inbox: list[_Frame] = []
        self.doomed: list[tuple[int, str]] = []
        self._network = network
        self._peers = Peers(rank, network.size)
        self._poll_number = 0
        # Events that calls of this or another rank caused, for the next poll.
        self._pending: list[TransportEvent] = []
        self._receives: dict[tuple[int, int], memoryview] = {}
        self._sends: dict[tuple[int, int], memoryview] = {}
        self._copies: list[_Copy] = []  # into this rank

    def send(self, rank: int, payload: bytes) -> None:
        if self.alive and not self.closed:
            self._peers.send(rank, payload)

    def flush(self) -> None:
        if self.alive:
            self._carry(self._peers.flush())

    def queued_bytes(self, rank: int) -> int:
        return self._peers.queued_bytes(rank)

    def poll(self) -> list[TransportEvent]:
        self._network.drain_closed()
        if not self.alive or self.closed:
            return []
        return self.progress()

    def progress(self) -> list[TransportEvent]:
        """A poll proper; also what the network calls for a closed rank that still drains."""
        self._poll_number += 1
        events, self._pending = self._pending, []
        now = self._poll_number
        due = [frame for frame in self.inbox if frame.due_poll <= now]
        if due:
            self.inbox = [frame for frame in self.inbox if frame.due_poll > now]
            self._network.shuffle(due)
            for frame in due:
                self._peers.arrived(frame.source, frame.data, events)
        if self._copies:
            self._copies = [copy for copy in self._copies if not self._advance(copy, events)]
        while self.doomed:
            self._lose(*self.doomed.pop(0), events)
        self._carry(self._peers.end_poll(events))
        return events

    def post_receive(self, rank: int, transfer: int, buffer: memoryview) -> None:
        check_transfer(self.size, rank, transfer, self._receives, "receive")
        view = byte_view(buffer, writable=True)
        if not self.alive or self.closed:
            return
        if rank in self._peers.lost:
            self._pending.append(DataCancelled(rank, transfer))
            return
        self._receives[rank, transfer] = view
        self._match(self._network.transport(rank), self, transfer)

    def post_send(self, rank: int, transfer: int, buffer: memoryview) -> None:
        check_transfer(self.size, rank, transfer, self._sends, "send")
        view = byte_view(buffer, writable=False)
        if not self.alive or self.closed:
            return
        if rank in self._peers.lost:
            self._pending.append(DataSent(rank, transfer))
            return
        self._sends[rank, transfer] = view
        self._match(self, self._network.transport(rank), transfer)

    def cancel_receive(self, rank: int, transfer: int) -> None:
        begun = any(c.source == rank and c.transfer == transfer for c in self._copies)
        if not begun and self._receives.pop((rank, transfer), None) is not None:
            self._pending.append(DataCancelled(rank, transfer))

    def declare_lost(self, rank: int, reason: str) -> None:
        if rank != self.rank and rank not in self._peers.lost:
            self.doomed.append((rank, reason))

    def heard(self, rank: int) -> int:
        return self._peers.heard(rank)

    def busy(self) -> bool:
        return bool(self._receives or self._sends)

    def close(self, limit_s: float) -> None:
        """Never waits, whatever `limit_s`: the others' polls drain this rank."""
        if self.closed or not self.alive:
            return
        for rank, transfer in list(self._receives):
            self.cancel_receive(rank, transfer)
        self._carry(self._peers.close())
        self.closed = True
        self._network.start_closing(self.rank)

    @property
    def drained(self) -> bool:
        return not self._peers.undrained() and not self.inbox

    @property
    def idle(self) -> bool:
        return not (self.inbox or self.doomed or self._pending or self._copies) and (
            self._peers.idle
        )

    def validate(self) -> None:
        self._peers.validate()

    def _carry(self, frames: list[Outgoing]) -> None:
        for rank, data in frames:
            target = self._network.transport(rank)
            if target.alive:
                due_poll = target._poll_number + 1 + self._network.delay_polls()
                target.inbox.append(_Frame(due_poll, self.rank, data))

    def _match(
        self, sender: LoopbackTransport, receiver: LoopbackTransport, transfer: int
    ) -> None:
        source = sender._sends.get((receiver.rank, transfer))
        destination = receiver._receives.get((sender.rank, transfer))
        if source is None or destination is None:
            return
        if len(source) != len(destination):
            raise TransportError(
                f"transfer {transfer}: rank {sender.rank} sends {len(source)} B where rank "
                f"{receiver.rank} expects {len(destination)} B"
            )
        due_poll = receiver._poll_number + 1 + self._network.delay_polls()
        receiver._copies.append(_Copy(due_poll, sender.rank, transfer, destination, source))

    def _advance(self, copy: _Copy, events: list[TransportEvent]) -> bool:
        if copy.due_poll > self._poll_number:
            return False
        nbytes = len(copy.source_buffer)
        half = self._network.reorder and copy.copied_bytes == 0 and nbytes > 1
        end = nbytes // 2 if half else nbytes
        start = copy.copied_bytes
        copy.destination_buffer[start:end] = copy.source_buffer[start:end]
        copy.copied_bytes = end
        if half:
            copy.due_poll = self._poll_number + 1 + self._network.delay_polls()
            return False
        del self._receives[copy.source, copy.transfer]
        events.append(DataReceived(copy.source, copy.transfer))
        sender = self._network.transport(copy.source)
        if sender._sends.pop((self.rank, copy.transfer), None) is not None:
            sender._pending.append(DataSent(self.rank, copy.transfer))
        return True

    def _lose(self, rank: int, reason: str, events: list[TransportEvent]) -> None:
        lost = self._peers.lose(rank, reason)
        if lost is None:
            return
        events.append(lost)
        self._copies = [copy for copy in self._copies if copy.source != rank]
        # A declared-dead peer may still poll; it must not write from or into our buffers.
        other = self._network.transport(rank)
        other._copies = [copy for copy in other._copies if copy.source != self.rank]
        for key in [key for key in self._receives if key[0] == rank]:
            del self._receives[key]
            events.append(DataCancelled(*key))
        for key in [key for key in self._sends if key[0] == rank]:
            del self._sends[key]
            events.append(DataSent(*key))
