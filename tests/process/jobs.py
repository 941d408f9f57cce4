"""A whole job under test: a script, the launcher it runs under, and every process of it.

    Job(source)                      python script.py
    Job(source, ranks=2)             mpirun -n 2 hpcray run script.py
    Job(source, ranks=2, bare=True)  mpirun -n 2 python script.py

Processes of a job are found by a mark in their environment, and by the job's own temporary
directory (the sidecar keeps neither the environment nor the parent). `gone` is the promise of
every test here: within `GONE_S` of the end, whatever ended it, no process of the job is left, none
of the files that its MPI library had in /dev/shm, and nothing of ours in its temporary directory.

A script tells the test where it is by printing, and the test `expect`s that: nothing sleeps to be
in time.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MPIRUN = Path(sys.executable).parent / "mpirun"
# What the brief of the runtime promises, and what a loaded machine needs to start anything.
GONE_S = 5.0
WAIT_S = 30.0
POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Member:
    """One process of the job."""

    pid: int
    role: str  # launcher, driver, keeper, node, watchdog, zygote, worker, server, ...
    rank: int  # of a node or a keeper
    command: str


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read().decode(errors="replace")
    except OSError:
        return ""


class Job:
    """Started by the constructor, ended by `finish` or, at the latest, by `close`."""

    def __init__(
        self, source: str, *args: str, ranks: int = 0, bare: bool = False, pty: bool = False,
        program: tuple[str, ...] = (), own_mpirun: bool = False, stdin: str | None = None,
        wrapper: tuple[str, ...] = (), **environ: str,
    ) -> None:
        """`wrapper` is a command in front of each rank's."""
        self._prepare(source, environ)
        python = [*wrapper, sys.executable, *program]
        if ranks and own_mpirun:
            command = [*python, "-m", "hpcray", "run", "-n", str(ranks), str(self.script), *args]
        elif ranks:
            run = [] if bare else ["-m", "hpcray", "run"]
            command = [str(MPIRUN), "-n", str(ranks), *python, *run, str(self.script), *args]
        else:
            command = [*python, str(self.script), *args]
        self.ranks = ranks
        self._terminal = pty
        if pty:
            self._output_fd, theirs = os.openpty()
            self.process = subprocess.Popen(
                command, env=self.environ, stdin=theirs, stdout=theirs, stderr=theirs,
                preexec_fn=_take_terminal)  # nothing else makes it controlling
            os.close(theirs)
        else:
            self._output_fd, theirs = os.pipe()
            self.process = subprocess.Popen(
                command, env=self.environ, stdout=theirs, stderr=theirs, start_new_session=True,
                stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE)
            os.close(theirs)
            if stdin is not None:
                assert self.process.stdin is not None
                self.process.stdin.write(stdin.encode())
                self.process.stdin.close()

    def _prepare(self, source: str, environ: dict[str, str]) -> None:
        """The script, a directory and an environment to know its processes by."""
        # Short: a socket path has 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="job-", dir="/tmp"))
        self.script = self.directory / "script.py"
        self.script.write_text(textwrap.dedent(source))
        self.mark = f"HPCRAY_TEST_JOB={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        self.environ = {
            **os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.directory), name: value,
            "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            # More ranks than cores, with the default binding.
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", **environ,
        }
        self.environ = {k: v for k, v in self.environ.items() if k != "HPCRAY_REDIS_URL"}
        self.output = ""
        self._seen = 0
        self._shared: set[str] = set()

    # --- what it says --------------------------------------------------------------------------

    def _read_some(self, timeout_s: float) -> bool:
        """Append what it has printed; False at the end."""
        if not select.select([self._output_fd], [], [], max(timeout_s, 0))[0]:
            return True
        try:
            data = os.read(self._output_fd, 65536)
        except OSError:  # a terminal whose other end is closed
            data = b""
        self.output += data.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)

    def expect(self, pattern: str, timeout_s: float = WAIT_S) -> re.Match[str]:
        """Wait until it prints this, after what was expected before."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            match = re.compile(pattern, re.M).search(self.output, self._seen)
            if match is not None:
                self._seen = match.end()
                self.members()  # notes the shared files
                return match
            if time.monotonic() > deadline_s:
                self.fail(f"did not print {pattern!r} within {timeout_s:g} s")
            if not self._read_some(0.2):
                self.fail(f"ended without printing {pattern!r}")

    def say(self, text: str) -> None:
        """Type on its terminal."""
        os.write(self._output_fd, text.encode())

    def finish(self, timeout_s: float = WAIT_S, status: int | None = 0) -> str:
        """Wait for its end and for everything of it to be gone; its whole output.

        `status` None: any but 0.
        """
        deadline_s = time.monotonic() + timeout_s
        while self.process.poll() is None:
            if time.monotonic() > deadline_s:
                self.fail(f"did not end within {timeout_s:g} s")
            if not self._read_some(0.02):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(0.1)
        self.gone()
        code = self.process.returncode
        if (code == 0) if status is None else (code != status):
            wanted = "any failure" if status is None else status
            self.fail(f"ended with status {code}, expected {wanted}")
        return self.output

    def gone(self, timeout_s: float = GONE_S) -> None:
        """Nothing of the job is left, in time."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            self._read_some(0)
            left = [m for m in self.left() if not isinstance(m, Member)
                    or m.pid != self.process.pid or self.process.poll() is None]
            if not left:
                break
            if time.monotonic() > deadline_s:
                self.fail(f"left behind, {timeout_s:g} s after its end: {left}")
            time.sleep(POLL_S)
        while select.select([self._output_fd], [], [], 0)[0] and self._read_some(0):
            pass

    def left(self) -> list[object]:
        """What there still is of it: processes, files in /dev/shm and of our own."""
        return [*self.members(), *(path for path in sorted(self._shared) if os.path.exists(path)),
                *(str(path) for path in self.directory.glob("hpcray-*"))]

    def fail(self, what: str) -> None:
        members = "\n".join(f"    {m}" for m in self.members())
        raise AssertionError(f"the job {what}\n  alive:\n{members}\n  output:\n{self.output}")

    # --- its processes ---------------------------------------------------------------------------

    def members(self) -> list[Member]:
        found = []
        directory = str(self.directory)
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            command = _read(f"/proc/{name}/cmdline").replace("\0", " ").strip()
            if not command:
                continue  # a zombie, or the kernel's
            try:
                cwd = os.readlink(f"/proc/{name}/cwd")
            except OSError:
                cwd = ""
            environ = _read(f"/proc/{name}/environ")
            if self.mark not in environ and not cwd.startswith(directory + "/"):
                if "hpcray-control-guard" not in command or directory not in command:
                    continue
            member = _describe(int(name), command, environ)
            if member.role == "node":
                self._note_shared(int(name))
            found.append(member)
        return found

    def _note_shared(self, pid: int) -> None:
        for line in _read(f"/proc/{pid}/maps").splitlines():
            if "/dev/shm/" in line and not line.endswith(" (deleted)"):
                self._shared.add(line.split(None, 5)[5])

    def pid(self, role: str, rank: int | None = None) -> int:
        """The one process of that role; of a zygote or worker, `rank` is its node's."""
        for member in self.members():
            if member.role == role and (rank is None or self.rank_of(member) == rank):
                return member.pid
        self.fail(f"has no {role} (rank {rank})")
        raise AssertionError

    def rank_of(self, member: Member) -> int:
        if member.role in ("node", "keeper"):
            return member.rank
        nodes = {m.pid: m.rank for m in self.members() if m.role == "node"}
        pid = member.pid
        while pid > 1 and pid not in nodes:
            stat = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
            pid = int(stat[1]) if stat else 0
        return nodes.get(pid, -1)

    def kill(self, role: str, rank: int | None = None, number: int = signal.SIGKILL) -> int:
        pid = self.process.pid if role == "launcher" else self.pid(role, rank)
        os.kill(pid, number)
        return pid

    def kill_all(self) -> None:
        """SIGKILL to every process of it, of which none acts on the end of another."""
        stopped: set[int] = set()
        while new := {member.pid for member in self.members()} - stopped:
            for pid in new:
                os.kill(pid, signal.SIGSTOP)
            stopped |= new
        self._kill_members()
        self.process.wait()

    def close(self) -> None:
        """For the fixture: whatever the test did, nothing stays."""
        self._kill_members()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._output_fd)
        self._remove_files()

    def _kill_members(self) -> None:
        for _ in range(50):
            members = self.members()
            for member in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, signal.SIGKILL)
            if not members:
                break
            time.sleep(POLL_S)

    def _remove_files(self) -> None:
        for path in self._shared:
            with contextlib.suppress(OSError):
                os.unlink(path)
        shutil.rmtree(self.directory, ignore_errors=True)


def _take_terminal() -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _describe(pid: int, command: str, environ: str) -> Member:
    name = _read(f"/proc/{pid}/comm").strip()
    rank = -1
    if command.startswith("ray::") or re.fullmatch(r"hpcray:w\d+", name):
        role = "worker"
    elif name == "hpcray:zygote" or "hpcray.worker.zygote" in command:
        role = "zygote"
    elif "-m hpcray.node" in command or "launch/keeper.py" in command:
        role = "node" if "-m hpcray.node" in command else "keeper"
        match = re.search(r"(?:OMPI_COMM_WORLD_RANK|PMIX?_RANK)=(\d+)", environ)
        rank = int(match[1]) if match else 0
    elif "launch/watchdog.py" in command:
        role = "watchdog"
    elif "hpcray-control-guard" in command:
        role = "guard"
    elif re.search(r"(redis|valkey)-server", command):
        role = "server"
    elif "script.py" in command and "python" in os.path.basename(command.split(" ")[0]):
        role = "driver"
    else:
        role = "other"
    return Member(pid, role, rank, command[:100])


Start = Callable[..., Job]
