"""The byte layout of a value, inline in a message or in shared memory.

The first byte is a tag:

    PLAIN     [0][pickle]
    BUFFERS   [1][pad 3][count u32][pickle_nbytes u64][nbytes u64] * count
              [pickle] then every buffer, each starting on a 64-byte boundary of the value, or
              on a page boundary if it has PAGED_BYTES or more (objects/segments says why)
    ERROR     [2][pickle of an exception]               made by a worker: the task raised
    FAILURE   [3][msgpack of a Failure]                 made by a node: the system failed

Nodes read no more than the tag and, of a FAILURE, the fields: they never unpickle.
Values start on a 64-byte boundary in shared memory, so buffers are aligned there.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec

PLAIN = 0
BUFFERS = 1
ERROR = 2
FAILURE = 3

# Up to this size a value travels inside messages; above, it lives in shared memory.
# Ray uses the same 100 KiB; anything between 50 and 200 KiB measures alike.
INLINE_MAX_BYTES = 100 * 1024

_HEAD = struct.Struct("<B3xIQ")
ALIGN = 64
PAGE_BYTES = 4096
PAGED_BYTES = 1 << 20


def _start(position: int, nbytes: int) -> int:
    """Where the next buffer starts."""
    align = PAGE_BYTES if nbytes >= PAGED_BYTES else ALIGN
    return -(-position // align) * align


class Failure(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A system failure as data. `kind` is the name of a class in `hpcray.exceptions`."""

    kind: str
    message: str
    subject: str = ""  # hexadecimal task, actor or object id, whatever `kind` takes
    in_constructor: bool = False  # ActorDiedError: that is where it died


_failure_encoder = msgspec.msgpack.Encoder()
_failure_decoder = msgspec.msgpack.Decoder(Failure)


def pack_failure(failure: Failure) -> bytes:
    return bytes((FAILURE,)) + _failure_encoder.encode(failure)


def unpack_failure(data: bytes | memoryview) -> Failure:
    return _failure_decoder.decode(memoryview(data)[1:])


def is_error(data: bytes) -> bool:
    return data[0] >= ERROR


def packed_size(pickled: bytes, buffers: Sequence[memoryview]) -> int:
    """The number of bytes `pack_into` will write for a BUFFERS value."""
    position = _HEAD.size + 8 * len(buffers) + len(pickled)
    for buffer in buffers:
        position = _start(position, buffer.nbytes) + buffer.nbytes
    return position


def pack_plain(pickled: bytes) -> bytes:
    return b"\0" + pickled


def pack_into(target: memoryview, pickled: bytes, buffers: Sequence[memoryview]) -> None:
    """Write a BUFFERS value. `buffers`: contiguous byte views; `target`: packed_size bytes."""
    count = len(buffers)
    _HEAD.pack_into(target, 0, BUFFERS, count, len(pickled))
    position = _HEAD.size
    for buffer in buffers:
        target[position : position + 8] = buffer.nbytes.to_bytes(8, "little")
        position += 8
    target[position : position + len(pickled)] = pickled
    position += len(pickled)
    for buffer in buffers:
        position = _start(position, buffer.nbytes)
        target[position : position + buffer.nbytes] = buffer
        position += buffer.nbytes


def pack(pickled: bytes, buffers: Sequence[memoryview]) -> bytes:
    """An inline value: PLAIN without buffers, else BUFFERS."""
    if not buffers:
        return b"\0" + pickled
    target = bytearray(packed_size(pickled, buffers))
    pack_into(memoryview(target), pickled, buffers)
    return bytes(target)


def unpack(view: memoryview) -> tuple[memoryview, list[memoryview]]:
    """(pickle stream, buffers) of a PLAIN, BUFFERS or ERROR value.

    Every buffer is a slice of `view` and keeps its owner alive: that is how a pin
    outlives the ref (`objects.segments.pinned_view`).
    """
    if view[0] != BUFFERS:
        return view[1:], []
    _, count, pickle_nbytes = _HEAD.unpack_from(view, 0)
    sizes_end = _HEAD.size + 8 * count
    sizes = struct.unpack_from(f"<{count}Q", view, _HEAD.size)
    position = sizes_end + pickle_nbytes
    pickled = view[sizes_end:position]
    buffers = []
    for nbytes in sizes:
        position = _start(position, nbytes)
        buffers.append(view[position : position + nbytes])
        position += nbytes
    return pickled, buffers
