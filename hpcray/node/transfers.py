"""Moving objects between nodes, straight from and into shared memory. Thin.

    StartPull   allocate in the node's own segments, post the receives, then ask the holder
    ServePull   send from the holder's segment; DataSent unpins
    refused     cancel the receives; the range is reused once DataCancelled says so

Between ranks of one host a large object is copied by its reader, from the holder's segment mapped
by way of /proc (the same right that MPI libraries need to copy between processes): one copy by the
processor, where MPI's path through the kernel pays for every 4 KiB page.

    PullRequest(mapped) --> PullMapped(pid, descriptor) --> copy, a step a turn --> PullEnded
                            cannot be opened: the same pull again, over MPI

Decides nothing: which copy, and what a failure means, is the directory's business.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hpcray.node.outbox import ServePull, StartPull
from hpcray.objects.segments import Mapping, SegmentArena, create_segment, prefault_steps
from hpcray.protocol import values, words
from hpcray.protocol.messages import Located, PullEnded, PullMapped, PullRequest

if TYPE_CHECKING:
    from hpcray.node.machine import Machine
    from hpcray.transport.base import Transport

# First touches run at about 1.3 GB/s: a step takes less than a millisecond.
_TOUCH_BYTES = 1024 * 1024
# Below this a pull over MPI is over before a second message would have been answered.
_MAPPED_BYTES = 1024 * 1024
# About a millisecond of copying per turn of the loop.
_COPY_BYTES = 8 * 1024 * 1024
# Mappings of peers' segments kept for the next pull, and for how long: they hold memory that the
# peer may have given up.
_PEER_MAPPINGS = 4
_PEER_MAPPING_S = 1.0


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
        try:
            fd = create_segment(nbytes, "hpcray-spare")
        except OSError:
            return  # it was to make things faster only
        try:
            mapping = Mapping(fd, nbytes, writable=True, keep_fd=True)
        except OSError:
            os.close(fd)
            return
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

    def has(self, segment: int) -> bool:
        return segment in self._descriptors

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
        # transfer -> (object, rank, location, view).
        self._pulls: dict[int, tuple[bytes, int, Located, memoryview]] = {}
        # Those with receives posted; the others wait for PullMapped or are being copied.
        self._posted: set[int] = set()
        # Ranks of this host whose segments can be mapped.
        nodes = machine.membership.living
        mapping_off = os.environ.get("HPCRAY_MAP_PEERS") == "0"
        self._neighbours = {
            rank for rank, node in nodes.items()
            if rank != machine.rank and not mapping_off and node.host == nodes[machine.rank].host
        }
        self._peer_mappings: OrderedDict[tuple[int, int], Mapping] = OrderedDict()
        self._mapped_s = 0.0
        # (transfer, source, position): copies under way, one after the other.
        self._copies: deque[tuple[int, memoryview, int]] = deque()
        # (rank, transfer) -> (object, view): sends posted.
        self._serves: dict[tuple[int, int], tuple[bytes, memoryview]] = {}

    def start(self, action: StartPull) -> None:
        short = ""  # what else is missing
        found = self._segments.arena.allocate(action.nbytes)
        if found is None:
            granted = self._machine.memory.grant_node(action.nbytes)
            if granted is not None:
                try:
                    self._segments.create_own(granted.segment_id, granted.nbytes)
                except OSError as error:
                    short = f"; {error.strerror}"
                    self._machine.memory.close(granted.segment_id)
                else:
                    found = self._segments.arena.allocate(action.nbytes)
        if found is None:
            if self._machine.memory.await_room(
                    action, self._machine.now_s, in_any_case=bool(short)):
                return
            budget = self._machine.memory.budget
            self._machine.directory.pull_failed(action.object_id, values.Failure(
                "ObjectStoreFullError",
                f"an object of {words.size(action.nbytes)} from rank {action.rank} does not fit: "
                f"{words.size(self._machine.memory.object_bytes)} of this node's object store of "
                f"{words.size(budget.capacity_bytes)} are in use "
                f"({self._machine.memory.contents()}){short}"))
            return
        self._machine.memory.has_room(action)
        segment, offset, view = found
        location = Located(segment, offset, action.nbytes)
        self._machine.memory.used(location)
        self._count += 1
        self._pulls[self._count] = (action.object_id, action.rank, location, view)
        mapped = action.rank in self._neighbours and action.nbytes >= _MAPPED_BYTES
        if not mapped:
            self._post(self._count)
        self._machine.outbox.peers[action.rank].append(
            PullRequest(action.object_id, self._count, mapped))

    def _post(self, transfer: int) -> None:
        _, rank, _, view = self._pulls[transfer]
        self._posted.add(transfer)
        self._transport.post_receive(rank, transfer, view)

    def mapped(self, rank: int, message: PullMapped) -> None:
        """The holder of this host says where the object lies."""
        try:
            source = self._peer_view(rank, message)
        except OSError:
            # No right to look into its descriptors (a container, a hardened kernel): MPI it is.
            self._neighbours.discard(rank)
            self._post(message.transfer)
            peer = self._machine.outbox.peers[rank]
            peer.append(PullRequest(message.object_id, message.transfer))
            peer.append(PullEnded(message.object_id))
            return
        self._copies.append((message.transfer, source, 0))

    def _peer_view(self, rank: int, message: PullMapped) -> memoryview:
        key = (rank, message.location.segment)
        mapping = self._peer_mappings.get(key)
        if mapping is None:
            fd = os.open(f"/proc/{message.pid}/fd/{message.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) != (message.device, message.inode):
                os.close(fd)
                raise OSError(errno.ESTALE, "this is not the peer's segment")
            mapping = Mapping(fd, message.segment_nbytes, writable=False)
            self._peer_mappings[key] = mapping
            if len(self._peer_mappings) > _PEER_MAPPINGS:
                self._peer_mappings.popitem(last=False)
        self._peer_mappings.move_to_end(key)
        return mapping.range(message.location.offset, message.location.nbytes)

    def copy_some(self, now_s: float) -> None:
        """One step of the oldest copy."""
        transfer, source, position = self._copies[0]
        object_id, rank, _, view = self._pulls[transfer]
        end = min(position + _COPY_BYTES, source.nbytes)
        view[position:end] = source[position:end]
        self._mapped_s = now_s
        if end < source.nbytes:
            self._copies[0] = (transfer, source, end)
            return
        self._copies.popleft()
        self._machine.outbox.peers[rank].append(PullEnded(object_id))
        self.received(transfer)

    @property
    def copying(self) -> bool:
        return bool(self._copies)

    def tick(self, now_s: float) -> None:
        if self._peer_mappings and now_s - self._mapped_s > _PEER_MAPPING_S and not self._copies:
            self._peer_mappings.clear()

    def received(self, transfer: int) -> None:
        object_id, _, location, _ = self._pulls.pop(transfer)
        self._posted.discard(transfer)
        self._machine.directory.pulled(object_id, location)

    def refused(self, transfer: int) -> None:
        """The holder has no copy (any more)."""
        pull = self._pulls.get(transfer)
        if pull is None:
            return
        if transfer in self._posted:
            self._transport.cancel_receive(pull[1], transfer)
        else:
            self.cancelled(transfer)

    def cancelled(self, transfer: int) -> None:
        object_id, rank, location, _ = self._pulls.pop(transfer)
        self._posted.discard(transfer)
        self._machine.memory.free(location)
        self._machine.directory.pull_failed(object_id, None, rank)

    def serve(self, action: ServePull) -> None:
        if action.mapped:
            fd, nbytes = self._segments.descriptor(action.location.segment)
            status = os.fstat(fd)
            self._machine.outbox.peers[action.rank].append(PullMapped(
                action.object_id, action.transfer, os.getpid(), fd, nbytes, action.location,
                status.st_dev, status.st_ino))
            return
        view = self._segments.view(action.location)
        self._serves[(action.rank, action.transfer)] = (action.object_id, view)
        self._transport.post_send(action.rank, action.transfer, view)

    def sent(self, rank: int, transfer: int) -> None:
        object_id, _ = self._serves.pop((rank, transfer))
        self._machine.directory.unpin(object_id)

    @property
    def active(self) -> bool:
        return bool(self._pulls or self._serves)
