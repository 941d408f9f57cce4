"""The driver's standard streams: what they really lead to, and what workers print there.

Open MPI gives rank 0 a pseudo-terminal for its stdout, wherever `mpirun` itself writes to: progress
bars and colours would fill a file with escape codes.

    script --> pty --> mpirun --> file          `hide_false_terminals` looks where mpirun writes
"""

from __future__ import annotations

import fcntl
import io
import os
import struct
import sys
import termios
from typing import Any

from hpcray.protocol.messages import Output

_RESET = "\x1b[0m"
_CYAN = "\x1b[36m"
# Told apart by pid, if asked for: magenta, cyan, green, and bright black, blue and magenta.
_BY_PID = ("\x1b[35m", _CYAN, "\x1b[32m", "\x1b[90m", "\x1b[94m", "\x1b[95m")


def print_output(color: str, output: Output) -> None:
    """Show lines of workers; `color` is HPCRAY_COLOR_PREFIX.

    Called by whichever thread has read the news: never raises.
    """
    try:
        stream = sys.stderr if output.error else sys.stdout
        prefix = output.prefix
        if prefix and stream.isatty():
            prefix = _colored(prefix, color)
        stream.write("".join([f"{prefix}{line}\n" for line in output.lines]))
        stream.flush()
    except Exception:  # a closed or replaced stream; the output is lost, the program is not
        pass


def _colored(prefix: str, wanted: str) -> str:
    if wanted == "0" or os.environ.get("NO_COLOR"):
        return prefix
    color = _CYAN
    if wanted == "1":
        pid = prefix.rpartition(" pid=")[2].rstrip(") ").partition(",")[0]
        color = _BY_PID[int(pid) % len(_BY_PID)]
    return f"{color}{prefix[:-1]}{_RESET} "


def hide_false_terminals() -> None:
    """In rank 0 of an MPI launch: a stream that a terminal does not show says that it is none.

    `sys.stdout.isatty()` is False then, and TERM is "dumb" for what asks the descriptor itself.
    """
    for fd, name in ((1, "stdout"), (2, "stderr")):
        if os.isatty(fd) and not _is_shown(fd):
            os.environ["TERM"] = "dumb"
            stream: Any = getattr(sys, name)
            if isinstance(stream, io.TextIOWrapper) and stream.isatty():
                stream.flush()
                plain = io.TextIOWrapper(
                    io.BufferedWriter(_NoTerminal(fd, "wb", closefd=False)),
                    encoding=stream.encoding, errors=stream.errors, line_buffering=True)
                setattr(sys, name, plain)
                setattr(sys, f"__{name}__", plain)


class _NoTerminal(io.FileIO):
    def isatty(self) -> bool:
        return False


def _is_shown(fd: int) -> bool:
    """Whether anybody sees this terminal: it has a size, or whoever made it has a terminal."""
    rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))
    if rows or columns:
        return True
    mine = os.ttyname(fd)
    pid = os.getppid()
    while pid > 1:
        try:
            theirs = os.readlink(f"/proc/{pid}/fd/{fd}")
            with open(f"/proc/{pid}/stat") as stat:
                parent = int(stat.read().rpartition(")")[2].split()[1])
        except OSError:  # another user's
            return False
        if theirs != mine:  # the launcher's
            return theirs.startswith(("/dev/pts/", "/dev/tty", "/dev/console"))
        pid = parent
    return False
