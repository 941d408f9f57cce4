"""Segments, mappings and pinned views, with real memfds."""

from __future__ import annotations

import fcntl
import gc
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterator

import numpy as np
import pytest

from hpcray.objects import segments
from hpcray.objects.segments import (
    PAGE_BYTES,
    Mapping,
    ReaderMappings,
    SegmentArena,
    create_segment,
    pinned_view,
    prefault,
    prefault_steps,
)

MIB = 1 << 20


def mapped_segments(name: str) -> int:
    with open("/proc/self/maps") as maps:
        return sum(f"memfd:{name} " in line for line in maps)


def resident_bytes(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    descriptors = sorted(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert sorted(os.listdir("/proc/self/fd")) == descriptors
    assert mapped_segments("t") == 0
    assert not segments._live_pins


def owner_and_reader(nbytes: int) -> tuple[SegmentArena, ReaderMappings]:
    fd = create_segment(nbytes, "t")
    arena, reader = SegmentArena(), ReaderMappings()
    reader.add(7, os.dup(fd), nbytes)
    arena.add(7, fd, nbytes)
    return arena, reader


def test_segment_is_sealed_and_takes_memory_at_first_touch_only() -> None:
    fd = create_segment(64 * MIB, "t")
    try:
        for nbytes in (1, 128 * MIB):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, nbytes)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert not os.get_inheritable(fd)
        assert resident_bytes(fd) == 0
    finally:
        os.close(fd)
    with pytest.raises(ValueError, match="at least one byte"):
        create_segment(0, "t")


def test_mapping_closes_its_descriptor_even_when_it_fails() -> None:
    fd = create_segment(PAGE_BYTES, "t")
    with pytest.raises(OSError, match="cannot map"):
        Mapping(fd, 2 * PAGE_BYTES, writable=True)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
    fd = create_segment(PAGE_BYTES, "t")
    mapping = Mapping(fd, PAGE_BYTES, writable=True, keep_fd=True, huge_pages=True)
    assert len(mapping.view) == os.fstat(fd).st_size
    os.close(fd)


@pytest.mark.parametrize("kernel_has_populate", [True, False])
def test_prefault_makes_pages_present_and_keeps_contents(
    kernel_has_populate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel_has_populate:
        monkeypatch.setattr(segments, "_MADV_POPULATE_WRITE", 9999)
    fd = create_segment(8 * MIB, "t")
    mapping = Mapping(fd, 8 * MIB, writable=True, keep_fd=True)
    mapping.view[5 * MIB] = 42
    steps = list(prefault_steps(mapping, 4 * MIB, 4 * MIB, step_bytes=MIB))
    assert steps == [MIB, 2 * MIB, 3 * MIB, 4 * MIB]
    assert resident_bytes(fd) == 4 * MIB
    prefault(mapping, 100, 10)
    assert resident_bytes(fd) == 4 * MIB + PAGE_BYTES
    assert mapping.view[5 * MIB] == 42
    with pytest.raises(ValueError, match="outside the segment"):
        prefault(mapping, 0, 9 * MIB)
    os.close(fd)


def test_written_by_the_owner_read_by_the_reader() -> None:
    arena, reader = owner_and_reader(MIB)
    allocation = arena.allocate(1000)
    assert allocation is not None
    segment_id, offset, view = allocation
    view[:] = bytes(range(250)) * 4
    read = reader.view(segment_id, offset, 1000)
    assert read.readonly
    assert bytes(read) == bytes(arena.view(segment_id, offset, 1000)) == bytes(view)
    with pytest.raises(TypeError):
        read[0] = 1
    with pytest.raises(ValueError, match="outside the segment"):
        reader.view(7, MIB - 1, 2)


def test_forget_keeps_memory_until_the_last_view_dies() -> None:
    arena, reader = owner_and_reader(MIB)
    allocation = arena.allocate(100)
    assert allocation is not None
    allocation[2][:] = b"x" * 100
    array = np.frombuffer(reader.view(7, allocation[1], 100), np.uint8)[10:20]
    reader.forget(7)
    reader.forget(7)
    assert not reader.has(7)
    del arena, allocation
    assert mapped_segments("t") == 1
    assert bytes(array) == b"x" * 10
    del array
    assert mapped_segments("t") == 0


def test_segment_that_arrives_twice_is_closed_once() -> None:
    _, reader = owner_and_reader(MIB)
    reader.add(7, create_segment(MIB, "t"), MIB)
    assert len(reader) == 1
    arena, _ = owner_and_reader(MIB)
    with pytest.raises(ValueError, match="already"):
        arena.add(7, create_segment(MIB, "t"), MIB)


def test_arena_spreads_over_segments_and_reuses_warm_ranges() -> None:
    half = MIB // 2  # small enough to share pages
    arena = SegmentArena()
    assert arena.allocate(1) is None
    for segment_id in (1, 2):
        arena.add(segment_id, create_segment(half, "t"), half)
    assert arena.empty_segments() == [1, 2]
    first = arena.allocate(half)
    second = arena.allocate(half)
    assert first is not None
    assert second is not None
    assert {first[0], second[0]} == {1, 2}
    assert len(first[2]) == half
    assert arena.allocate(1) is None
    with pytest.raises(ValueError, match="still holds 1 objects"):
        arena.remove(first[0])
    assert arena.release(first[0], first[1])
    again = arena.allocate(1)
    assert again is not None
    assert again[0] == first[0]
    arena.release(again[0], again[1])
    assert arena.empty_segments() == [first[0]]
    arena.validate()
    arena.remove(first[0])
    assert arena.capacity_bytes == arena.used_bytes == half


def test_large_objects_start_on_a_page() -> None:
    arena = SegmentArena()
    arena.add(1, create_segment(8 * MIB, "t"), 8 * MIB)
    small = arena.allocate(100)
    large = arena.allocate(2 * MIB)
    assert small is not None
    assert large is not None
    assert large[1] % 4096 == 0
    assert len(large[2]) == 2 * MIB
    arena.release(large[0], large[1])
    arena.release(small[0], small[1])
    assert arena.empty_segments() == [1]
    arena.validate()


def test_pin_ends_with_the_last_derived_array() -> None:
    _, reader = owner_and_reader(MIB)
    released: deque[str] = deque()
    view = pinned_view(reader.view(7, 0, 4096), lambda: released.append("gone"))
    assert not view.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        view.flags.writeable = True
    derived = view[64:128].view(np.float64)[2:].reshape(2, 3)
    window = view[5:9].data
    del view
    assert not released
    del derived
    assert not released
    del window
    assert list(released) == ["gone"]


def test_pin_ends_with_what_was_unpickled_from_it() -> None:
    source = np.arange(1000.0)
    buffers: list[pickle.PickleBuffer] = []
    header = pickle.dumps([source, source * 2], protocol=5, buffer_callback=buffers.append)
    arena, reader = owner_and_reader(MIB)
    allocation = arena.allocate(16000)
    assert allocation is not None
    allocation[2][:8000], allocation[2][8000:] = buffers[0].raw(), buffers[1].raw()
    released: deque[str] = deque()
    view = pinned_view(reader.view(7, allocation[1], 16000), lambda: released.append("gone"))
    one, two = pickle.loads(header, buffers=[view[:8000], view[8000:]])
    reader.forget(7)
    del view, arena, allocation
    assert not one.flags.writeable
    assert (two == 2 * one).all()
    del one
    assert not released
    del two
    assert list(released) == ["gone"]


def test_pin_survives_cycles_and_empty_views() -> None:
    _, reader = owner_and_reader(MIB)
    released: deque[int] = deque()
    for index, nbytes in enumerate((100, 0)):
        cycle: list[object] = [
            pinned_view(reader.view(7, 0, nbytes), lambda index=index: released.append(index))  # type: ignore[misc]
        ]
        cycle.append(cycle)
        del cycle
    gc.collect()
    assert sorted(released) == [0, 1]


def test_numpy_is_imported_by_the_first_pin_only() -> None:
    code = "import sys, hpcray.objects.segments; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0


def test_view_alive_at_interpreter_exit_is_harmless() -> None:
    code = (
        "import atexit\n"
        "from hpcray.objects.segments import *\n"
        "m = Mapping(create_segment(4096, 't'), 4096, writable=True)\n"
        "v = m.view\n"
        "atexit.register(lambda: print(bytes(v[:3])))\n"
        "v[:3] = b'abc'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=30, check=False, capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"b'abc'\n", b"")
