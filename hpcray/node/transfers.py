"""Moving objects between nodes, straight from and into shared memory. Thin.

    StartPull   allocate in the node's own segments, post the receives, then ask the holder
    ServePull   send from the holder's segment; DataSent unpins
    refused     cancel the receives; the range is reused once DataCancelled says so

Decides nothing: which copy, and what a failure means, is the directory's business.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hpcray.node.outbox import ServePull, StartPull
from hpcray.objects.segments import Mapping, SegmentArena, create_segment, prefault_steps
from hpcray.protocol import values
from hpcray.protocol.messages import Located, PullRequest

if TYPE_CHECKING:
    from hpcray.node.machine import Machine
    from hpcray.transport.base import Transport

# First touches run at about 1.3 GB/s: a step takes less than a millisecond.
_TOUCH_BYTES = 1024 * 1024


class Segments:
    """Every segment of this node: its descriptor, and a mapping where the node itself needs one."""

    def __init__(self) -> None:
        self._descriptors: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._mappings: dict[int, Mapping] = {}
        self.arena = SegmentArena()
        # One segment ahead, touched while the node idles: the first touch of memory runs at a
        # ninth of the speed of the second. (descriptor, bytes), and the touching still to do.
        self._spare: tuple[int, int] | None = None
        self._touching: Iterator[int] | None = None

    def prepare_spare(self, nbytes: int) -> None:
        """Have a segment of this size ready for the next grant."""
        if self._spare is not None:
            return
        fd = create_segment(nbytes, "hpcray-spare")
        mapping = Mapping(os.dup(fd), nbytes, writable=True)
        self._spare = (fd, nbytes)
        self._touching = prefault_steps(mapping, 0, nbytes, step_bytes=_TOUCH_BYTES)

    def touch_some(self) -> bool:
        """About a millisecond of touching; False when there is nothing (more) to do."""
        if self._touching is None:
            return False
        if next(self._touching, None) is None:
            self._touching = None
        return self._touching is not None

    @property
    def touching(self) -> bool:
        return self._touching is not None

    def drop_spare(self) -> None:
        if self._spare is not None:
            os.close(self._spare[0])
        self._spare = self._touching = None

    def create(self, segment: int, nbytes: int) -> int:
        spare = self._spare
        if spare is not None and spare[1] == nbytes:
            fd = spare[0]
            self._spare = self._touching = None
        else:
            fd = create_segment(nbytes, f"hpcray-{segment}")
        self._descriptors[segment] = fd
        self._sizes[segment] = nbytes
        return fd

    def create_own(self, segment: int, nbytes: int) -> None:
        self.arena.add(segment, os.dup(self.create(segment, nbytes)), nbytes)

    def descriptor(self, segment: int) -> tuple[int, int]:
        return self._descriptors[segment], self._sizes[segment]

    def view(self, location: Located) -> memoryview:
        """The bytes of an object, for sending."""
        if self.arena.has(location.segment):
            return self.arena.view(location.segment, location.offset, location.nbytes)
        mapping = self._mappings.get(location.segment)
        if mapping is None:
            fd, nbytes = self.descriptor(location.segment)
            mapping = Mapping(os.dup(fd), nbytes, writable=False)
            self._mappings[location.segment] = mapping
        return mapping.range(location.offset, location.nbytes)

    def close(self, segment: int) -> None:
        if self.arena.has(segment):
            self.arena.remove(segment)
        self._mappings.pop(segment, None)
        fd = self._descriptors.pop(segment, None)
        if fd is not None:
            os.close(fd)
            del self._sizes[segment]

    def close_all(self) -> None:
        self.drop_spare()
        self._mappings.clear()
        for fd in self._descriptors.values():
            os.close(fd)
        self._descriptors.clear()
        self._sizes.clear()
        self.arena = SegmentArena()


class Transfers:
    def __init__(self, machine: Machine, segments: Segments, transport: Transport) -> None:
        self._machine = machine
        self._segments = segments
        self._transport = transport
        self._count = 0
        # transfer -> (object, rank, location, view): receives posted.
        self._pulls: dict[int, tuple[bytes, int, Located, memoryview]] = {}
        # (rank, transfer) -> (object, view): sends posted.
        self._serves: dict[tuple[int, int], tuple[bytes, memoryview]] = {}

    def start(self, action: StartPull) -> None:
        found = self._segments.arena.allocate(action.nbytes)
        if found is None:
            granted = self._machine.memory.grant_node(action.nbytes)
            if granted is not None:
                self._segments.create_own(granted.segment_id, granted.nbytes)
                found = self._segments.arena.allocate(action.nbytes)
        if found is None:
            budget = self._machine.memory.budget
            self._machine.directory.pull_failed(action.object_id, values.Failure(
                "ObjectStoreFullError",
                f"an object of {action.nbytes:,} B from rank {action.rank} does not fit: "
                f"{budget.used_bytes:,} B of this node's object store of "
                f"{budget.capacity_bytes:,} B are in use"))
            return
        segment, offset, view = found
        location = Located(segment, offset, action.nbytes)
        self._machine.memory.used(location)
        self._count += 1
        self._pulls[self._count] = (action.object_id, action.rank, location, view)
        self._transport.post_receive(action.rank, self._count, view)
        self._machine.outbox.peers[action.rank].append(
            PullRequest(action.object_id, self._count))

    def received(self, transfer: int) -> None:
        object_id, _, location, _ = self._pulls.pop(transfer)
        self._machine.directory.pulled(object_id, location)

    def refused(self, transfer: int) -> None:
        """The holder has no copy (any more)."""
        pull = self._pulls.get(transfer)
        if pull is not None:
            self._transport.cancel_receive(pull[1], transfer)

    def cancelled(self, transfer: int) -> None:
        object_id, _, location, _ = self._pulls.pop(transfer)
        self._machine.memory.free(location)
        self._machine.directory.pull_failed(object_id, None)

    def serve(self, action: ServePull) -> None:
        view = self._segments.view(action.location)
        self._serves[(action.rank, action.transfer)] = (action.object_id, view)
        self._transport.post_send(action.rank, action.transfer, view)

    def sent(self, rank: int, transfer: int) -> None:
        object_id, _ = self._serves.pop((rank, transfer))
        self._machine.directory.unpin(object_id)

    @property
    def active(self) -> bool:
        return bool(self._pulls or self._serves)
