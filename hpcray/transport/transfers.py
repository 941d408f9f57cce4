"""What every transport checks before it takes a data buffer, and how buffers are cut. Pure.

A transfer is named by (peer, number); the number is the receiver's choice. Both ends cut the
same length into the same chunks, so the chunks of one transfer need no header: they match in
the order they were posted.
"""

from __future__ import annotations

from collections.abc import Container

TransferKey = tuple[int, int]  # peer rank, transfer


def check_transfer(
    size: int, rank: int, transfer: int, live: Container[TransferKey], kind: str
) -> None:
    """Refuse a misuse where it is made. Raises ValueError."""
    if not 0 <= rank < size:
        raise ValueError(f"no rank {rank} in a job of {size} ranks")
    if transfer < 0:
        raise ValueError(f"transfer {transfer} is negative")
    if (rank, transfer) in live:
        raise ValueError(
            f"{kind} {transfer} with rank {rank} is under way; the receiver chooses numbers "
            "that are unique among its live transfers"
        )


def byte_view(buffer: memoryview, *, writable: bool) -> memoryview:
    """`buffer` as flat bytes, without a copy. Raises ValueError if that is impossible."""
    if writable and buffer.readonly:
        raise ValueError("a receive needs a writable buffer")
    if not buffer.c_contiguous:
        raise ValueError("a transfer needs a contiguous buffer")
    if buffer.nbytes == 0:
        # A zero in the shape makes `cast` refuse some formats; no byte of it is ever touched.
        return memoryview(bytearray())
    return buffer.cast("B")


class ChunkCursor:
    """The next range to post: [offset, offset + chunk_bytes), and one empty range for 0 B.

    An empty buffer still sends one message: the receiver must learn that the holder agreed.
    """

    __slots__ = ("_chunk_bytes", "_nbytes", "_offset", "_started")

    def __init__(self, nbytes: int, chunk_bytes: int) -> None:
        self._nbytes = nbytes
        self._chunk_bytes = chunk_bytes
        self._offset = 0
        self._started = False

    @property
    def exhausted(self) -> bool:
        return self._started and self._offset >= self._nbytes

    @property
    def offset(self) -> int:
        return self._offset

    def take(self) -> tuple[int, int]:
        start = self._offset
        self._offset = min(start + self._chunk_bytes, self._nbytes)
        self._started = True
        return start, self._offset
