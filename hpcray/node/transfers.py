"""Moving objects between nodes, straight from and into shared memory. Thin.

    StartPull   find a range in the node's own segments and post the receives
    ServePull   send from the holder's segment
    refused     cancel the receives; the range is free once DataCancelled says so

Between ranks of one host a large object is copied by its reader, from the holder's segment mapped
by way of /proc (the same right that MPI libraries need to copy between processes): one copy by the
processor, where MPI's path through the kernel pays for every 4 KiB page.

    PullRequest(mapped) --> PullMapped(pid, descriptor) --> copy, a step a turn --> PullEnded
                            cannot be opened: the same pull again, over MPI

Decides nothing: what an outcome means is said by `node/pulls.py`, which hears of each.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Protocol

from hpcray.node.outbox import Outbox, ServePull, StartPull
from hpcray.node.pulls import Pulls
from hpcray.objects.segments import Mapping, SegmentArena, create_segment, prefault_steps
from hpcray.protocol.messages import Joined, Located, PullMapped
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


class Places(Protocol):
    """What a mover needs of `Segments`."""

    @property
    def arena(self) -> SegmentArena: ...
    def create_own(self, segment: int, nbytes: int) -> None: ...
    def descriptor(self, segment: int) -> tuple[int, int]: ...
    def view(self, location: Located) -> memoryview: ...


def ranks_to_map(nodes: dict[int, Joined], rank: int) -> set[int]:
    """The ranks of this one's host: their segments can be mapped, if that is allowed."""
    if os.environ.get("HPCRAY_MAP_PEERS") == "0":
        return set()
    return {other for other, node in nodes.items()
            if other != rank and node.host == nodes[rank].host}


class Transfers:
    def __init__(
        self, pulls: Pulls, outbox: Outbox, segments: Places, transport: Transport,
        same_host: set[int],
    ) -> None:
        self._hear = pulls
        self._outbox = outbox
        self._segments = segments
        self._transport = transport
        self._same_host = same_host  # ranks whose segments can be mapped
        # transfer -> (rank, where to write)
        self._pulls: dict[int, tuple[int, memoryview]] = {}
        # Those with receives posted; the others wait for PullMapped or are being copied.
        self._posted: set[int] = set()
        self._peer_mappings: OrderedDict[tuple[int, int], Mapping] = OrderedDict()
        self._mapped_s = 0.0
        # (transfer, source, position): copies under way, one after the other.
        self._copies: deque[tuple[int, memoryview, int]] = deque()
        # (rank, transfer) -> (object, view): sends posted.
        self._serves: dict[tuple[int, int], tuple[bytes, memoryview]] = {}

    def start(self, action: StartPull) -> None:
        arena = self._segments.arena
        found = arena.allocate(action.nbytes)
        if found is None:
            granted = self._hear.no_range(action)
            if granted is None:
                return
            try:
                self._segments.create_own(granted.segment_id, granted.nbytes)
            except OSError as error:
                self._hear.no_segment(action, granted, error.strerror or str(error))
                return
            found = arena.allocate(action.nbytes)
            assert found is not None, "a segment that was granted for it holds it"
        segment, offset, view = found
        transfer = self._hear.next_transfer()
        self._pulls[transfer] = (action.rank, view)
        mapped = action.rank in self._same_host and action.nbytes >= _MAPPED_BYTES
        if not mapped:
            self._post(transfer)
        self._hear.begun(
            action, transfer, Located(segment, offset, action.nbytes), mapped=mapped)

    def _post(self, transfer: int) -> None:
        rank, view = self._pulls[transfer]
        self._posted.add(transfer)
        self._transport.post_receive(rank, transfer, view)

    def mapped(self, rank: int, message: PullMapped) -> None:
        """The holder of this host says where the object lies."""
        try:
            source = self._peer_view(rank, message)
        except OSError:
            # No right to look into its descriptors (a container, a hardened kernel): MPI it is.
            self._same_host.discard(rank)
            self._post(message.transfer)
            self._hear.not_mapped(message.transfer)
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
        view = self._pulls[transfer][1]
        end = min(position + _COPY_BYTES, source.nbytes)
        view[position:end] = source[position:end]
        self._mapped_s = now_s
        if end < source.nbytes:
            self._copies[0] = (transfer, source, end)
            return
        self._copies.popleft()
        del self._pulls[transfer]
        self._hear.copied(transfer, mapped=True)

    @property
    def copying(self) -> bool:
        return bool(self._copies)

    def tick(self, now_s: float) -> None:
        if self._peer_mappings and now_s - self._mapped_s > _PEER_MAPPING_S and not self._copies:
            self._peer_mappings.clear()

    def received(self, transfer: int) -> None:
        del self._pulls[transfer]
        self._posted.discard(transfer)
        self._hear.copied(transfer)

    def refused(self, transfer: int) -> None:
        """The holder has no copy (any more)."""
        pull = self._pulls.get(transfer)
        if pull is None:
            return
        if transfer in self._posted:
            self._transport.cancel_receive(pull[0], transfer)
        else:
            self.cancelled(transfer)

    def cancelled(self, transfer: int) -> None:
        del self._pulls[transfer]
        self._posted.discard(transfer)
        self._hear.cancelled(transfer)

    def serve(self, action: ServePull) -> None:
        if action.mapped:
            fd, nbytes = self._segments.descriptor(action.location.segment)
            status = os.fstat(fd)
            self._outbox.peers[action.rank].append(PullMapped(
                action.object_id, action.transfer, os.getpid(), fd, nbytes, action.location,
                status.st_dev, status.st_ino))
            return
        view = self._segments.view(action.location)
        self._serves[(action.rank, action.transfer)] = (action.object_id, view)
        self._transport.post_send(action.rank, action.transfer, view)

    def sent(self, rank: int, transfer: int) -> None:
        object_id, _ = self._serves.pop((rank, transfer))
        self._hear.sent(object_id)

    @property
    def active(self) -> bool:
        return bool(self._pulls or self._serves)
