"""Marks in a worker's output: whose it is.

    0x1e 0x00 "hpcray:" NAME 0x00 0x1e        up to the next mark on the same stream

In the stream itself, since the node reads it at its own time: only the place of a mark among the
bytes says what was printed by which task. Bytes that look alike by chance pass as they are.
"""

from __future__ import annotations

import re

# A name in a mark is at most this long: a mark is written at once, and pipes keep 4 KiB whole.
NAME_LIMIT_BYTES = 256
_MARK = b"\x1e\0hpcray:"
_MARK_END = b"\0\x1e"
_LIMIT_BYTES = len(_MARK) + NAME_LIMIT_BYTES + len(_MARK_END)
_WHOLE = re.compile(
    re.escape(_MARK) + b"([^\0]{0,%d})" % NAME_LIMIT_BYTES + re.escape(_MARK_END))


def mark(name: str) -> bytes:
    """What a worker writes in front of its output to say whose it is, until the next mark."""
    printable = "".join(c if c.isprintable() else " " for c in name[:NAME_LIMIT_BYTES])
    return _MARK + printable.encode()[:NAME_LIMIT_BYTES] + _MARK_END


class Marks:
    """Takes the marks out of one stream, whose chunks may end anywhere."""

    def __init__(self) -> None:
        self._tail = b""  # of the last chunk: perhaps the beginning of a mark
        self._name: str | None = None
        self._mid_line = False

    def split(self, chunk: bytes) -> list[tuple[str | None, bytes]]:
        """Pieces, and the name each stands under (None: there was no mark so far).

        An empty piece says that the line before it is over: another task goes on.
        """
        data = self._tail + chunk
        pieces: list[tuple[str | None, bytes]] = []
        at = 0
        for found in _WHOLE.finditer(data):
            self._take(data[at : found.start()], pieces)
            self._name = found[1].decode(errors="replace")
            at = found.end()
            if self._mid_line:
                pieces.append((self._name, b""))
                self._mid_line = False
        start = data.rfind(_MARK[:1], max(at, len(data) - _LIMIT_BYTES))
        if start < 0 or not _MARK.startswith(data[start : start + len(_MARK)]):
            start = len(data)
        self._take(data[at:start], pieces)
        self._tail = data[start:]
        return pieces

    def _take(self, piece: bytes, pieces: list[tuple[str | None, bytes]]) -> None:
        if piece:
            pieces.append((self._name, piece))
            self._mid_line = piece[-1:] != b"\n"

    def rest(self) -> bytes:
        """What was held back, once nothing more comes."""
        tail, self._tail = self._tail, b""
        return tail
