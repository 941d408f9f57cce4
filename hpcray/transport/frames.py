"""Control frames: how coalesced payloads look between two nodes.

    0        8              16      20      24           24+4n
    +--------+--------------+-------+-------+------------+----------+-----+----------+
    | number | acknowledged | flags | n     | n lengths  | payload  | ... | payload  |
    | u64    | u64          | u32   | u32   | u32 each   |          |     |          |
    +--------+--------------+-------+-------+------------+----------+-----+----------+

number        position of this frame among those to this peer, from 1; 0 is a bare
              acknowledgement, which carries nothing and takes no place in the order.
acknowledged  every frame up to this one, in the other direction, has been handled.
flags         FLAG_LAST: the sender is closing; no numbered frame follows.

Payload bytes are opaque here. Little-endian, because every machine we meet is.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec

FLAG_LAST = 1

# A frame stays far below the 2 GiB at which counts of some MPI libraries overflow; anything
# near this size belongs into the object store and not into a control payload.
MAX_PAYLOAD_BYTES = 1 << 30

_HEADER = struct.Struct("<QQII")
HEADER_BYTES = _HEADER.size
# A node that is not flooded sends mostly frames of one payload: one pack instead of three steps.
_HEADER_AND_ONE_LENGTH = struct.Struct("<QQIII")

# Up to here slicing one bytes copy of the frame is cheaper than going through a memoryview
# (50 against 150 ns a payload); above, the second copy costs more than it saves.
_COPY_WHOLE_BYTES = 1 << 16


class FrameError(Exception):
    """A frame no correct peer sends: a bug in hpcray, or nodes of different versions."""


class Frame(msgspec.Struct, frozen=True, gc=False):
    number: int
    acknowledged: int
    flags: int
    payloads: list[bytes]


def encode(
    number: int, acknowledged: int, payloads: Sequence[bytes], flags: int = 0
) -> bytes:
    n = len(payloads)
    if n == 1:
        payload = payloads[0]
        return _HEADER_AND_ONE_LENGTH.pack(
            number, acknowledged, flags, 1, len(payload)
        ) + payload
    header = _HEADER.pack(number, acknowledged, flags, n)
    if n == 0:
        return header
    lengths = struct.pack(f"<{n}I", *map(len, payloads))
    return b"".join((header, lengths, *payloads))


def decode(data: bytes | bytearray | memoryview) -> Frame:
    """The inverse of `encode`. The payloads are copies: `data` may be reused at once."""
    nbytes = len(data)
    if nbytes < HEADER_BYTES:
        raise FrameError(f"a frame of {nbytes} B is shorter than its {HEADER_BYTES} B header")
    number, acknowledged, flags, n = _HEADER.unpack_from(data)
    if n == 0:
        return Frame(number, acknowledged, flags, [])
    start = HEADER_BYTES + 4 * n
    body: bytes | memoryview
    if n == 1 and start <= nbytes:
        body = memoryview(data)
        if _HEADER_AND_ONE_LENGTH.unpack_from(data)[4] == nbytes - start:
            return Frame(number, acknowledged, flags, [bytes(body[start:])])
    if start > nbytes:
        raise FrameError(f"a frame of {nbytes} B cannot hold the lengths of {n} payloads")
    lengths = struct.unpack_from(f"<{n}I", data, HEADER_BYTES)
    if start + sum(lengths) != nbytes:
        raise FrameError(f"frame {number} of {nbytes} B names {sum(lengths)} B of payload")
    body = bytes(data) if nbytes <= _COPY_WHOLE_BYTES else memoryview(data)
    payloads = []
    for length in lengths:
        end = start + length
        payloads.append(bytes(body[start:end]))
        start = end
    return Frame(number, acknowledged, flags, payloads)
