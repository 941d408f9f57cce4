"""Shared-memory segments: memfds, their mappings, and the views that readers get.

The thin half of `objects/`: it makes system calls and decides nothing. How large a segment is
and who may have one is `objects.budget`'s business; which objects are where is the table's.

    node                        owner (a worker or driver)            reader
    create_segment -> fd
      |--- SCM_RIGHTS ------->  SegmentArena.add(fd)
      |                           allocate -> (segment, offset, view)
      |                           one memcpy into the view
      |--- SCM_RIGHTS ---------------------------------------->  ReaderMappings.add(fd)
                                                                   view(...) read-only
                                                                   pinned_view(...) -> unpin

A segment has no name in any file system: nothing to protect, unlink or run out of, and it is
gone with its last descriptor and mapping. Descriptors are closed once mapped, so a process with
a thousand segments needs no thousand descriptors.

Why not the standard library: `multiprocessing.shared_memory` is named files and a resource
tracker, and `mmap.mmap` keeps a duplicate of the descriptor (until Python 3.13) and refuses to
close while a view is exported. Here the mapping *is* owned by its views: `munmap` runs when the
last one dies, whoever holds it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from hpcray.objects.allocator import RangeAllocator, range_bytes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    ByteArray = npt.NDArray[np.uint8]

PAGE_BYTES = mmap.PAGESIZE

# 4 MiB of first touches take about 3 ms: short enough to look at the socket in between.
PREFAULT_STEP_BYTES = 4 << 20

# Not in the mmap module of Python 3.11; the value is part of the Linux ABI (5.14 and later).
_MADV_POPULATE_WRITE = 23

_libc: Any = None
_MAP_FAILED = ctypes.c_void_p(-1).value


def _load_libc() -> Any:
    global _libc
    if _libc is None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_long,
        ]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        _libc = libc
    return _libc


def create_segment(nbytes: int, name: str) -> int:
    """A new memfd of exactly `nbytes`, sealed so that nobody can shrink or grow it.

    The seal is a promise to every process that maps it: no SIGBUS from a later truncation.
    `name` is for /proc only. The caller closes the descriptor. Memory is taken at first touch.

    Raises:
      OSError: out of descriptors, or memfds are forbidden here.
    """
    if nbytes <= 0:
        raise ValueError(f"a segment has at least one byte, not {nbytes}")
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Mapping:
    """One segment in this process's address space; `view` covers all of it.

    The memory stays mapped until this object and the last view derived from `view` are gone.
    There is no close: dropping the references is the only way, so nothing can be unmapped under
    a reader.
    """

    __slots__ = ("__weakref__", "_address", "nbytes", "view", "writable")

    def __init__(
        self,
        fd: int,
        nbytes: int,
        *,
        writable: bool,
        keep_fd: bool = False,
        huge_pages: bool = False,
    ) -> None:
        """Map `fd`; it is closed, also when mapping fails, unless `keep_fd`.

        `huge_pages` is a hint that the kernel may ignore.

        Raises:
          OSError: the descriptor cannot be mapped, or is shorter than `nbytes` (reading beyond
            its end would be a SIGBUS).
        """
        try:
            self._address = _map(fd, nbytes, writable)
        finally:
            if not keep_fd:
                os.close(fd)
        self.nbytes = nbytes
        self.writable = writable
        # The exporter of every view. It is what the views keep alive, and its end unmaps.
        exporter = (ctypes.c_ubyte * nbytes).from_address(self._address)
        finalizer = weakref.finalize(exporter, _load_libc().munmap, self._address, nbytes)
        # At interpreter exit views may still be in use by other finalisers; the kernel unmaps.
        finalizer.atexit = False
        view = memoryview(exporter).cast("B")
        self.view: memoryview = view if writable else view.toreadonly()
        if huge_pages:
            _load_libc().madvise(self._address, nbytes, mmap.MADV_HUGEPAGE)

    def range(self, offset: int, nbytes: int) -> memoryview:
        """The bytes [offset, offset + nbytes); a slice alone would silently be shorter."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(
                f"range [{offset}, {offset + nbytes}) is outside the segment of {self.nbytes} B"
            )
        return self.view[offset : offset + nbytes]

    def populate(self, offset: int, nbytes: int) -> bool:
        """Fault whole pages in for writing; False if this kernel has no such advice."""
        first = offset & -PAGE_BYTES
        address = self._address + first
        if _load_libc().madvise(address, offset + nbytes - first, _MADV_POPULATE_WRITE) == 0:
            return True
        code = ctypes.get_errno()
        if code == errno.EINVAL:
            return False
        raise OSError(code, f"cannot fault in {nbytes} B of shared memory: {os.strerror(code)}")


def _map(fd: int, nbytes: int, writable: bool) -> int:
    actual_bytes = os.fstat(fd).st_size
    if nbytes <= 0 or nbytes > actual_bytes:
        raise OSError(errno.EINVAL, f"cannot map {nbytes} B of a segment of {actual_bytes} B")
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    address: int = _load_libc().mmap(None, nbytes, protection, mmap.MAP_SHARED, fd, 0)
    if address == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot map a segment of {nbytes} B: {os.strerror(code)}")
    return address


def prefault_steps(
    mapping: Mapping, offset: int, nbytes: int, step_bytes: int = PREFAULT_STEP_BYTES
) -> Iterator[int]:
    """Touch the range step by step; yields the bytes done so far after each step.

    For idle time: the caller stops between two steps as soon as there is work. Contents are
    kept, but a concurrent writer's bytes may be lost on kernels before 5.14, so only ranges that
    nobody writes are to be prefaulted.
    """
    mapping.range(offset, nbytes)  # Refuse before the first step, not after some of them.
    done = 0
    while done < nbytes:
        step = min(step_bytes, nbytes - done)
        if not mapping.populate(offset + done, step):
            touch = mapping.view[offset + done : offset + done + step : PAGE_BYTES]
            touch[:] = bytes(touch)
        done += step
        yield done


def prefault(mapping: Mapping, offset: int, nbytes: int) -> None:
    """Make the range's pages present and writable: later writes run at memory speed."""
    for _ in prefault_steps(mapping, offset, nbytes):
        pass


class _OwnedSegment:
    __slots__ = ("allocator", "mapping")

    def __init__(self, mapping: Mapping) -> None:
        self.mapping = mapping
        self.allocator = RangeAllocator(mapping.nbytes)


class SegmentArena:
    """The segments this process was granted, and its objects inside them.

    Not thread-safe: the client calls it under its own lock.
    """

    def __init__(self) -> None:
        self._segments: dict[int, _OwnedSegment] = {}
        # Where a range was released or a segment added last: warm memory, tried first.
        self._current = 0
        # Insertion order: longest empty first.
        self._empty: dict[int, None] = {}
        # Page-aligned objects: (segment, where the object starts) -> where its range does.
        self._range_of: dict[tuple[int, int], int] = {}

    def add(self, segment_id: int, fd: int, nbytes: int, *, huge_pages: bool = False) -> None:
        """Map a granted segment; takes over the descriptor (closed, whatever happens)."""
        if segment_id in self._segments:
            os.close(fd)
            raise ValueError(f"segment {segment_id} is in the arena already")
        mapping = Mapping(fd, nbytes, writable=True, huge_pages=huge_pages)
        self._segments[segment_id] = _OwnedSegment(mapping)
        self._empty[segment_id] = None
        self._current = segment_id

    def allocate(self, nbytes: int) -> tuple[int, int, memoryview] | None:
        """(segment, offset, writable view of exactly `nbytes`), or None: ask for a segment."""
        segment_id = self._current
        segment = self._segments.get(segment_id)
        needed = range_bytes(nbytes)
        offset = None if segment is None else segment.allocator.allocate(needed)
        if segment is None or offset is None:
            found = self._allocate_elsewhere(needed)
            if found is None:
                return None
            segment_id, segment, offset = found
        if needed != nbytes:
            start = -(-offset // PAGE_BYTES) * PAGE_BYTES
            self._range_of[(segment_id, start)] = offset
            offset = start
        self._empty.pop(segment_id, None)
        return segment_id, offset, segment.mapping.view[offset : offset + nbytes]

    def release(self, segment_id: int, offset: int) -> bool:
        """The object is freed and nobody pins it. True: the segment has become empty.

        Raises:
          KeyError, ValueError: no such segment, or nothing allocated there.
        """
        allocator = self._segments[segment_id].allocator
        allocator.release(self._range_of.pop((segment_id, offset), offset))
        self._current = segment_id
        if allocator.empty:
            self._empty[segment_id] = None
            return True
        return False

    def empty_segments(self) -> list[int]:
        """Segments without a single object, longest empty first: spare, or to be given back."""
        return list(self._empty)

    def remove(self, segment_id: int) -> None:
        """Give an empty segment up; views of it that still live keep the memory mapped.

        Raises:
          ValueError: there are objects in it.
        """
        segment = self._segments[segment_id]
        if not segment.allocator.empty:
            raise ValueError(
                f"segment {segment_id} still holds {segment.allocator.used_ranges} objects"
            )
        del self._segments[segment_id]
        del self._empty[segment_id]

    def has(self, segment_id: int) -> bool:
        return segment_id in self._segments

    def mapping(self, segment_id: int) -> Mapping:
        """For `prefault`, while the segment is spare."""
        return self._segments[segment_id].mapping

    def view(self, segment_id: int, offset: int, nbytes: int) -> memoryview:
        """A read-only view, for the owner reading back its own object."""
        return self._segments[segment_id].mapping.range(offset, nbytes).toreadonly()

    @property
    def used_bytes(self) -> int:
        return sum(segment.allocator.used_bytes for segment in self._segments.values())

    @property
    def capacity_bytes(self) -> int:
        return sum(segment.mapping.nbytes for segment in self._segments.values())

    def validate(self) -> None:
        """The empty list is exact, and every allocator is sound. Slow."""
        empty = [i for i, segment in self._segments.items() if segment.allocator.empty]
        assert sorted(empty) == sorted(self._empty)
        for segment in self._segments.values():
            segment.allocator.validate()

    def _allocate_elsewhere(self, nbytes: int) -> tuple[int, _OwnedSegment, int] | None:
        # Newest first: old segments tend to be full of long-lived objects. A scan of all of
        # them ends in a request to the node, which costs far more than the scan.
        for segment_id in reversed(self._segments):
            segment = self._segments[segment_id]
            offset = segment.allocator.allocate(nbytes)
            if offset is not None:
                self._current = segment_id
                return segment_id, segment, offset
        return None


class ReaderMappings:
    """Other processes' segments, mapped read-only in this one: a stray write is a SIGSEGV here
    and not a changed value everywhere. Not thread-safe."""

    def __init__(self) -> None:
        self._mappings: dict[int, Mapping] = {}

    def __len__(self) -> int:
        return len(self._mappings)

    def has(self, segment_id: int) -> bool:
        return segment_id in self._mappings

    def add(self, segment_id: int, fd: int, nbytes: int) -> None:
        """Map a segment; takes over the descriptor. One that is mapped already is only closed:
        two answers that name the same new segment may cross."""
        if segment_id in self._mappings:
            os.close(fd)
            return
        self._mappings[segment_id] = Mapping(fd, nbytes, writable=False)

    def view(self, segment_id: int, offset: int, nbytes: int) -> memoryview:
        """A read-only view of one object.

        Raises:
          KeyError: the segment was never added. ValueError: the range is outside of it.
        """
        return self._mappings[segment_id].range(offset, nbytes)

    def forget(self, segment_id: int) -> None:
        """Drop the mapping; the memory lives on until the last view of it dies. Forgetting an
        unknown segment is no error: the node tells every process that may have mapped it."""
        self._mappings.pop(segment_id, None)


class _Pin(weakref.ref["ByteArray"]):
    """The weak reference that notices the end of a pinned array."""

    __slots__ = ("on_release",)

    on_release: Callable[[], None]


# The pins whose arrays live, by id: a weak reference that dies first calls nobody. Keyed by int
# because hashing and comparing ints runs no Python code: a collection that fires inside of a
# dict operation must find the dict whole.
_live_pins: dict[int, _Pin] = {}


def _released(pin: weakref.ref[ByteArray]) -> None:
    assert isinstance(pin, _Pin)
    del _live_pins[id(pin)]
    pin.on_release()


_frombuffer: Any = None
_empty_array: Any = None


def pinned_view(view: memoryview, on_release: Callable[[], None]) -> ByteArray:
    """`view` as a read-only uint8 array that reports its end.

    Everything made from the array without copying (slices, other dtypes, memoryviews, buffers
    given to `pickle.loads`) keeps it alive. When the last of these is gone `on_release` is
    called, exactly once. It runs inside a garbage collection, on any thread, between any two
    byte codes: it may append to a deque, and must not take a lock. It is not called for arrays
    that live until the process ends.
    """
    global _frombuffer, _empty_array
    if _frombuffer is None:
        # Late: a process that never touches an array must not pay for numpy.
        import numpy as np

        def empty_array() -> ByteArray:
            array = np.empty(0, np.uint8)
            array.flags.writeable = False
            return array

        _frombuffer, _empty_array = np.frombuffer, empty_array
    # Since its dtype is uint8 and its base is no array, numpy makes this array (and nothing
    # below it) the base of whatever is derived from it. frombuffer refuses empty buffers.
    array: ByteArray = _frombuffer(view.toreadonly(), "u1") if view.nbytes else _empty_array()
    pin = _Pin(array, _released)
    pin.on_release = on_release
    _live_pins[id(pin)] = pin
    return array
