"""The process beside a node that kills it when it hangs and everybody who could end it is gone.

    launcher --> driver of rank 0, or keeper --> node ---- pipe ---> watchdog
       ^                                          ^                     |
       '------------- still its parent? ----------'---------------------'  looks every few seconds

Why it exists: a node ends by itself when its driver does, but not out of every place. An MPI
library that loses a peer aborts from inside any call, and its abort may wait for ever for a process
manager that is dead; a write to a terminal that nobody reads does not return; a process may be
stopped. No code of the node runs then, and no handler or thread of it. Those who would kill it are
its driver and its launcher, and they are gone.

It lives as long as its node, so it is also the one that removes what the node's MPI library would
leave in /dev/shm: the node writes the names into the pipe, and the end of the pipe is its own end.
The zygote cannot be either: it ends with each job, and it imports what users name.

Run as a file and not as a module, for the reasons of `launch/keeper.py`:

    python -I -S .../watchdog.py RANK LIMIT_S PARENT [LAUNCHER]
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping

# An end that goes well takes moments, and seconds on a loaded machine. After this long it does not
# come. Arbitrary.
LIMIT_S = 60.0

# So many looks are a limit. Time counts by looks, so it does not while this process is kept from
# running.
_LOOKS = 10
# A terminal or pipe that nobody reads is not waited for.
_WRITE_MS = 1000


class Watchdog:
    """The node's side. To be started before MPI_Init."""

    def __init__(
        self, rank: int, generations: int, limit_s: float, environ: Mapping[str, str]
    ) -> None:
        """`generations`: whose end is to be the node's. 1: its driver's; 2: also the launcher's."""
        theirs, self._pipe = os.pipe()  # never closed: its end is that of this process
        told = map(str, (rank, limit_s, *_ancestors(os.getpid(), generations)))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", os.path.abspath(__file__), *told], env=environ,
                stdin=theirs, stdout=subprocess.DEVNULL, start_new_session=True)
        finally:
            os.close(theirs)

    def unlink_at_end(self, paths: Iterable[str]) -> None:
        """Files that are to go with this process, however it ends."""
        with contextlib.suppress(OSError):  # somebody has killed it
            os.write(self._pipe, b"".join(os.fsencode(path) + b"\0" for path in paths))


def main() -> None:
    rank, limit_s, line = int(sys.argv[1]), float(sys.argv[2]), [int(pid) for pid in sys.argv[3:]]
    # A batch system that ends a job sends them to everybody, and that is when it is needed.
    for number in (
            signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    node = os.getppid()
    pipe = select.poll()
    pipe.register(0, select.POLLIN)
    paths = b""
    looks = 0
    while True:
        if pipe.poll(limit_s / _LOOKS * 1000):
            data = os.read(0, 65536)
            if not data:
                break
            paths += data
            continue
        now = _ancestors(node, len(line))
        looks = 0 if now == line else looks + 1
        # Its pid is nobody else's: a moment ago it was alive, and pids come round late.
        if looks > _LOOKS and os.getppid() == node:
            os.kill(node, signal.SIGKILL)
            who = "driver" if rank == 0 and now[0] != line[0] else "launcher"
            _say(f"hpcray: the node of rank {rank} (pid {node} on {socket.gethostname()}) hangs: "
                 f"it has not ended {limit_s:g} s after its {who} has. It was killed\n")
            looks = 0
    for path in paths.split(b"\0")[:-1]:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _ancestors(pid: int, generations: int) -> list[int]:
    """Parent, parent's parent, ...; 0 for one that cannot be known. Whoever loses its parent gets
    another one."""
    found = []
    for _ in range(generations):
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                pid = int(file.read().rpartition(b")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            pid = 0
        found.append(pid)
    return found


def _say(sentence: str) -> None:
    with contextlib.suppress(OSError):
        poller = select.poll()
        poller.register(2, select.POLLOUT)
        if poller.poll(_WRITE_MS):
            os.write(2, sentence.encode())


if __name__ == "__main__":
    main()
