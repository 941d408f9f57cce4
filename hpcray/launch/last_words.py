"""Where the last sentence of a job is read, and who may have ended the job.

Open MPI's mpirun ends its ranks on Ctrl-C and on a SIGTERM, and drops what they print from then
on: the job would end without a word. So node 0 writes to the stderr of mpirun itself, if that runs
on its host. Every other launcher passes on what a rank says last.

    mpirun ---- its stderr: terminal, pipe or file
      | pipe        ^
    driver          |
      '- node 0 ----'
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import socket
import stat
import sys
import time
from collections.abc import Mapping

from hpcray.launch.identity import Launch

_MPIRUN_NAMES = frozenset(("mpirun", "mpiexec", "orterun", "prterun"))
_PIDFD_GETFD = 438  # the number of the system call, the same on every architecture
# A terminal or pipe that nobody reads is not waited for.
_WRITE_MS = 1000
# Slurm sends its SIGTERM this long before or after what it has announced as the end.
_LIMIT_S = 60.0


class LastWords:
    """Writes a sentence where it is read. Made while the launcher lives."""

    def __init__(self, launch: Launch, environ: Mapping[str, str]) -> None:
        self._launch = launch
        self._environ = environ
        self._fd = -1
        if launch.library == "openmpi" and launch.rank == 0:
            pid = _mpirun(environ.get("PMIX_NAMESPACE", ""))
            if pid:
                self._fd = _stderr_of(pid)

    def say(self, sentence: str) -> None:
        data = f"hpcray: {sentence}\n".encode()
        fd = self._fd if self._fd >= 0 else sys.stderr.fileno()
        with contextlib.suppress(OSError):
            poller = select.poll()
            poller.register(fd, select.POLLOUT)
            if poller.poll(_WRITE_MS):
                os.write(fd, data)

    def who(self) -> str:
        """Who ends jobs here."""
        job = self._environ.get("SLURM_JOB_ID")
        if job:
            end = self._environ.get("SLURM_JOB_END_TIME", "")  # from Slurm 23.02 on
            if end.isdigit() and abs(time.time() - int(end)) < _LIMIT_S:
                return f"Slurm, as job {job} has reached its time limit"
            return f"Slurm (scancel, the time limit or preemption of job {job}) or a person"
        if self._launch.mode == "mpi":
            return "the launcher (Ctrl-C or a SIGTERM to it), a batch system or a person"
        return "a batch system or a person"


def _mpirun(namespace: str) -> int:
    """The mpirun of this process; 0 if it is not on this host.

    Open MPI 5 names its launches by it ("prterun-HOST-PID@1"); of an older one we may descend,
    unless a daemon is between us.
    """
    named = re.fullmatch(r"prterun-(.+)-(\d+)@\d+", namespace)
    if named is not None and named[1] == socket.gethostname() and _stat(int(named[2])):
        return int(named[2])
    pid = os.getppid()
    while pid > 1:
        name, parent = _stat(pid) or ("", 0)
        if name in _MPIRUN_NAMES:
            return pid
        pid = parent
    return 0


def _stat(pid: int) -> tuple[str, int] | None:
    """Name and parent of a process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            head, _, tail = file.read().rpartition(")")
    except OSError:
        return None
    return head.partition("(")[2], int(tail.split()[1])


def _stderr_of(pid: int) -> int:
    """A descriptor of that process's stderr; -1 if the system does not give one."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return -1
    try:
        # The same open file, so the same place in it. Allowed to root, and to whoever may trace it.
        fd = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, pidfd, 2, 0)
    finally:
        os.close(pidfd)
    return fd if fd >= 0 else _open_again(f"/proc/{pid}/fd/2", f"/proc/{pid}/fdinfo/2")


def _open_again(path: str, info: str) -> int:
    """Open a terminal, a pipe, or a file that is appended to. In any other file there would be two
    places to write at, and one text over the other."""
    try:
        mode = os.stat(path).st_mode
        with open(info) as file:
            flags = int(next(line.split()[1] for line in file if line.startswith("flags:")), 8)
        if stat.S_ISREG(mode) and not flags & os.O_APPEND:
            return -1
        wanted = os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY | (flags & os.O_APPEND)
        return os.open(path, wanted | (os.O_NONBLOCK if stat.S_ISFIFO(mode) else 0))
    except (OSError, StopIteration, ValueError):
        return -1
