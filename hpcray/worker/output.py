"""What user code prints, on its way out of the worker, with marks that say whose it is.

    print() --> sys.stdout --> _MarkedPipe --mark, bytes--> pipe --> node --> LogFolder

The node reads the pipe after the task may be over, and knows only roughly what the worker runs:
so the stream itself says it. Nothing is written for tasks that print nothing, and a name is said
again only when another function or an actor's own name has taken its place.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any

from hpcray.protocol.marks import mark


class _MarkedPipe(io.RawIOBase):
    """Descriptor 1 or 2, unbuffered."""

    mode = "wb"

    def __init__(self, fd: int, name: str) -> None:
        self.name = name
        self._fd = fd
        self._pipe: tuple[int, int] | None = None
        self._said = ""
        self._due = b""

    def open(self) -> None:
        """What the descriptor is now are the worker's pipes."""
        self._pipe = self._where()

    def close(self) -> None:
        """It stays open: whoever closes sys.stdout does not close it for the tasks to come."""

    def call(self, name: str) -> None:
        """Whose output it is from now on."""
        self._due = mark(name) if name != self._said else b""
        if self._said:
            self._say()  # what C code or a child process prints is then right as well

    def write(self, data: Any) -> int:
        if self._due:
            self._say()
        rest = memoryview(data)
        while len(rest):
            rest = rest[os.write(self._fd, rest):]
        return len(data)

    def _say(self) -> None:
        # User code may have put a file of its own in our descriptor's place.
        if self._due and self._where() == self._pipe:
            due, self._due = self._due, b""
            self._said = _name
            os.write(self._fd, due)

    def _where(self) -> tuple[int, int] | None:
        try:
            status = os.fstat(self._fd)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def fileno(self) -> int:
        return self._fd

    def writable(self) -> bool:
        return True


class _Buffer(io.BufferedWriter):
    def write(self, data: Any) -> int:
        touched.add(self)
        return super().write(data)


class _Stream(io.TextIOWrapper):
    def write(self, text: str) -> int:
        touched.add(self)
        return super().write(text)

    def close(self) -> None:
        touched.add(self)
        super().close()

    def detach(self) -> Any:
        touched.add(self)
        return super().detach()


# What may hold something back, or was closed: each task looks, and most print nothing.
touched: set[Any] = set()
_name = ""
_pipes = (_MarkedPipe(1, "<stdout>"), _MarkedPipe(2, "<stderr>"))
streams: dict[str, io.TextIOWrapper] = {}  # ours: what sys.stdout and sys.stderr are to be


def make_streams() -> None:
    """Make sys.stdout and sys.stderr the marked ones; once, by the zygote."""
    for name in ("stdout", "stderr"):
        _open_stream(name)


def open_streams() -> None:
    """By a worker: the descriptors are its pipes."""
    for pipe in _pipes:
        pipe.open()
    restore()  # an import may have put others in their place


def _open_stream(name: str) -> None:
    before = getattr(sys, f"__{name}__")
    pipe = _pipes[name == "stderr"]
    at_once = before.write_through  # PYTHONUNBUFFERED
    stream = streams[name] = _Stream(
        pipe if at_once else _Buffer(pipe), encoding=before.encoding,
        errors=before.errors, line_buffering=True, write_through=at_once)
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)


def restore() -> None:
    """A task may have put others in their place."""
    for name, stream in streams.items():
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def call(name: str) -> None:
    """Whose output it is from now on: a task's or an actor's name, for people."""
    global _name
    if name != _name:
        flush()
        _name = name
        for pipe in _pipes:
            with contextlib.suppress(OSError):
                pipe.call(name)


def flush() -> None:
    """Let out what was printed without a newline."""
    if not touched:
        return
    touched.clear()
    for name, stream in streams.items():
        try:
            stream.flush()
        except ValueError:  # a task has closed it: the next one shall not miss it
            _open_stream(name)
        except OSError:  # its reader is gone
            pass
