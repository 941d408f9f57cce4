"""Sizes: how large what may travel, and who sees to it. Pure.

Every limit of the package on something that travels between processes is here, with its owner: the
place that splits, stores or refuses what is larger.

    what                              limit                owner
    datagram on a host's socket       DATAGRAM_MAX_BYTES   `parts`; a single message above it
                                                           travels in memory of its own
                                                           (transport/datagrams.py)
    payload between nodes             PAYLOAD_BYTES        `parts`; a single message may be larger
    one message                       MESSAGE_MAX_BYTES    refused where it is made, see below
    refs in one call, value or yield  REFS_MAX             `check_refs`, at the call
    returns of one task               RETURNS_MAX          options, at the declaration
    definition of a task or actor     TEMPLATE_MAX_BYTES   `check_template`, at the declaration
    a question to the node            REQUEST_MAX_BYTES    `check_request`, at the call
    inline values in one message      GATHERED_BYTES       who gathers them: the rest goes through
                                                           shared memory, or is asked for by id
    ids in one message                IDS_PER_MESSAGE      who sends lists of ids cuts them
    rows of an answer                 ROWS_BYTES           node/inventory.py

The largest message that passes these checks holds REFS_MAX ids and their inline values; it stays
below MESSAGE_MAX_BYTES, which is checked once more where messages are encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

# A datagram stays below what a default socket buffer takes (212,992 B), with room to spare.
DATAGRAM_MAX_BYTES = 160 * 1024
# A receiver's buffer: no sender makes a longer datagram.
RECEIVE_BYTES = DATAGRAM_MAX_BYTES + 4096
# Small payloads are decoded while the next ones travel, and fit into caches: twice the rate of
# megabytes for objects of 10-50 kB.
PAYLOAD_BYTES = 256 * 1024
MESSAGE_MAX_BYTES = 256 * 1024 * 1024
REFS_MAX = 1_000_000
RETURNS_MAX = 1_000_000
TEMPLATE_MAX_BYTES = 1024 * 1024
REQUEST_MAX_BYTES = 1024 * 1024
# Inline values that one message of several values gathers (arguments of a task, its returns).
GATHERED_BYTES = 100 * 1024
# Up to this size a value is inline however many there are: it costs as little as its record.
SMALL_BYTES = 512
# But not beyond this for all of one message.
_SMALL_TOGETHER_BYTES = 16 * 1024 * 1024
IDS_PER_MESSAGE = 4000
ROWS_BYTES = 64 * 1024

_ID_BYTES = 28


# Messages encoded at once: their array header is one byte, so that a slice is joined to others by
# cutting that off.
_SLICE = 15


def array_header(count: int) -> bytes:
    """What a msgpack array of `count` items begins with."""
    if count < 16:
        return bytes((0x90 | count,))
    if count < 65_536:
        return b"\xdc" + count.to_bytes(2, "big")
    return b"\xdd" + count.to_bytes(4, "big")


def parts(
    batch: list[Any], encode: Callable[[Any], bytes], limit: int = DATAGRAM_MAX_BYTES
) -> Iterator[bytes]:
    """The batch as encoded batches of at most `limit` bytes; one of a single message may be longer.

    They are made when they are asked for: until then messages share their values with whoever has
    them. So the batch must stay as it is.

    Raises:
      ValueError: a message is longer than MESSAGE_MAX_BYTES. That is a bug: it should have been
        refused where it was made.
    """
    group: list[bytes] = []
    count = 0
    nbytes = 0
    for number, body in _bodies(batch, encode, limit):
        if group and nbytes + len(body) > limit - 5:  # 5: the longest array header
            yield b"".join((array_header(count), *group))
            group = []
            count = nbytes = 0
        group.append(body)
        count += number
        nbytes += len(body)
    if group:
        yield b"".join((array_header(count), *group))


def _bodies(
    batch: list[Any], encode: Callable[[Any], bytes], limit: int
) -> Iterator[tuple[int, bytes]]:
    """A few messages at a time, encoded and without an array header; each alone if it is large."""
    for start in range(0, len(batch), _SLICE):
        some = batch[start : start + _SLICE]
        encoded = encode(some)
        if len(encoded) <= limit - 4:
            yield len(some), encoded[1:]
            continue
        del encoded
        for message in some:
            one = encode(message)
            if len(one) > MESSAGE_MAX_BYTES:
                raise ValueError(
                    f"a {type(message).__name__} message of {len(one):,} B exceeds "
                    f"{MESSAGE_MAX_BYTES:,} B")
            yield 1, one


def gathers(gathered_bytes: int, nbytes: int) -> bool:
    """Whether a value of `nbytes` travels inline, with which the message gathers so many bytes."""
    return gathered_bytes <= GATHERED_BYTES or (
        nbytes <= SMALL_BYTES and gathered_bytes <= _SMALL_TOGETHER_BYTES)


def check_refs(nbytes: int, what: str) -> None:
    """Of joined ids: whether one message may carry them.

    Raises:
      ValueError: no.
    """
    if nbytes > REFS_MAX * _ID_BYTES:
        raise ValueError(
            f"{what} {nbytes // _ID_BYTES:,} ObjectRefs, and at most {REFS_MAX:,} can travel "
            "together; put them into several lists, and pass the refs of those")


def check_template(nbytes: int, name: str) -> None:
    """Of an encoded definition: whether it may travel.

    Raises:
      ValueError: no.
    """
    if nbytes > TEMPLATE_MAX_BYTES:
        raise ValueError(
            f"the definition of {name[:80]} takes {nbytes:,} B, and at most "
            f"{TEMPLATE_MAX_BYTES:,} B can travel: its name, resources and runtime_env are too "
            "long; pass large data as arguments")


def check_request(nbytes: int, name: str) -> None:
    """Of the encoded arguments of a question to the node: whether they may travel.

    Raises:
      ValueError: no.
    """
    if nbytes > REQUEST_MAX_BYTES:
        raise ValueError(
            f"{name.replace('_', ' ')}: its names and lists take {nbytes:,} B, and at most "
            f"{REQUEST_MAX_BYTES:,} B can be asked at once; use shorter names, or several calls")
