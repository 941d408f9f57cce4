"""A real Slurm of our own on this host, and jobs in it.

    Slurm(directory)      a munged, a slurmctld and NODES slurmds, with ports of their own
    SlurmJob(slurm, source, ...)    sbatch slurm/multi_node.sbatch script.py

The daemons are children of this process, die with it, and know nothing of another Slurm of the
host. Several slurmds on one host need their own directories: PMIx keeps its sockets there.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from ..process.jobs import POLL_S, ROOT, WAIT_S, Job

NODES = 6
CPUS = 2
MEMORY_MB = 2000
TEMPLATES = ROOT / "slurm"
# What Slurm itself may need to clean up behind a job.
_END_S = 20.0
# A daemon may think for long about its end; what it would save is of no use.
_DAEMON_END_S = 1.0
_DAEMONS = ("munged", "slurmctld", "slurmd")
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)

# Slurm looks every second, and waits five for a job's end: the usual values are of minutes.
_CONFIG = """\
ClusterName=hpcray
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmdLogFile={directory}/slurmd.%n.log
SlurmdSpoolDir={directory}/spool/%n
TmpFS={directory}/tmp/%n
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobRequeue=0
KillWait=5
MinJobAge=300
InactiveLimit=0
DefMemPerCPU=200
GresTypes=gpu
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def why_not() -> str:
    """What is missing here for a Slurm of our own; empty if nothing is."""
    if os.geteuid() != 0:
        return "a Slurm of several nodes on one host is started by root only"
    missing = [name for name in (*_DAEMONS, "sbatch", "srun") if _which(name) is None]
    if missing:
        return (f"no {', '.join(missing)} on this machine (Debian: apt install slurm-wlm munge "
                "libpmix-dev)")
    return ""


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Slurm:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._daemons: list[subprocess.Popen[bytes]] = []
        host = socket.gethostname().split(".")[0]
        control_port, *ports = _free_ports(NODES + 1)
        nodes = [
            f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} "
            f"RealMemory={MEMORY_MB} Gres=gpu:2 State=UNKNOWN"
            for i, port in enumerate(ports, 1)]
        for i in range(1, NODES + 1):
            (directory / "spool" / f"n{i}").mkdir(parents=True)
            (directory / "tmp" / f"n{i}").mkdir(parents=True)
        (directory / "state").mkdir()
        (directory / "slurm.conf").write_text(_CONFIG.format(
            host=host, control_port=control_port, directory=directory, nodes="\n".join(nodes)))
        # Devices that every host has stand for GPUs.
        (directory / "gres.conf").write_text(
            f"NodeName=n[1-{NODES}] Name=gpu File=/dev/null\n"
            f"NodeName=n[1-{NODES}] Name=gpu File=/dev/zero\n")
        key = directory / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        self.environ = {
            name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.environ["SLURM_CONF"] = str(directory / "slurm.conf")
        self._start("munged", "--foreground", "--force", f"--key-file={key}",
                    f"--socket={directory}/munge.socket", f"--pid-file={directory}/munged.pid",
                    f"--seed-file={directory}/munge.seed", f"--log-file={directory}/munged.log")
        self._wait_for("munged", lambda: (directory / "munge.socket").exists())
        self._start("slurmctld", "-D")
        for i in range(1, NODES + 1):
            self._start("slurmd", "-D", "-N", f"n{i}")
        self._wait_for("slurmd", lambda: self.ask("sinfo", "-h", "-o", "%T %D") == f"idle {NODES}")

    def _start(self, name: str, *arguments: str) -> None:
        path = _which(name)
        assert path is not None
        with open(self.directory / f"{name}.out", "ab") as log:
            self._daemons.append(subprocess.Popen(
                [path, *arguments], env=self.environ, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True, preexec_fn=_die_with_parent))

    def _wait_for(self, name: str, ready: object) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not ready():  # type: ignore[operator]
            dead = [d.args for d in self._daemons if d.poll() is not None]
            if dead or time.monotonic() > deadline_s:
                raise RuntimeError(f"Slurm does not start (dead: {dead})\n{self.logs()}")
            time.sleep(0.05)

    def logs(self) -> str:
        """The last lines of every log, for a message."""
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-8:])
            for pattern in ("*.out", "*.log") for path in sorted(self.directory.glob(pattern)))

    def ask(self, *command: str, check: bool = False) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(command, env=self.environ, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=WAIT_S)
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}\n{self.logs()}")
        return done.stdout.strip()

    def speaks(self, kind: str) -> str:
        """Why `srun --mpi=KIND` does not work here; empty if it does."""
        done = subprocess.run(
            ["srun", f"--mpi={kind}", "--mem=100", "-n1", "true"], env=self.environ,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=WAIT_S)
        if done.returncode == 0:
            return ""
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return (f"`srun --mpi={kind}` does not work here: {lines[0]} (Debian keeps the libpmix.so "
                "that Slurm opens in libpmix-dev)")

    def close(self) -> None:
        self.ask("scancel", "-u", "root")
        for daemon in reversed(self._daemons):
            daemon.terminate()
        deadline_s = time.monotonic() + _DAEMON_END_S
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(max(deadline_s - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


class SlurmJob(Job):
    """A script in a batch job; its processes are known by the mark in their environment."""

    def __init__(
        self, slurm: Slurm, source: str, *args: str, options: tuple[str, ...] = (),
        template: str | Path = "multi_node.sbatch", **environ: str,
    ) -> None:
        self._prepare(source, environ)
        # Batch scripts source it; srun and mpirun are found beside this Python.
        self.environ |= {
            "HPCRAY_VENV": sys.prefix, "SLURM_CONF": slurm.environ["SLURM_CONF"]}
        self.environ = {
            name: value for name, value in self.environ.items()
            if name == "SLURM_CONF" or not name.startswith("SLURM_")}
        self.slurm = slurm
        self.state = ""
        self._file = self.directory / "slurm.out"
        self._read_bytes = 0
        done = subprocess.run(
            ["sbatch", "--parsable", f"--output={self._file}", f"--chdir={self.directory}",
             *options, str(TEMPLATES / template), str(self.script), *args],
            env=self.environ, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=WAIT_S)
        assert done.returncode == 0, f"sbatch: {done.stderr}"
        self.id = done.stdout.strip()

    def look(self) -> str:
        """Its state, by Slurm: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT, ..."""
        text = self.slurm.ask("scontrol", "show", "job", "-o", self.id)
        match = re.search(r"JobState=(\w+)", text)
        self.state = match[1] if match else "UNKNOWN"
        return self.state

    def over(self) -> bool:
        return self.look() not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED")

    def _read_some(self, timeout_s: float) -> bool:
        ended = self.over()
        data = b""
        if self._file.exists():
            with open(self._file, "rb") as file:
                file.seek(self._read_bytes)
                data = file.read()
        self._read_bytes += len(data)
        self.output += data.decode(errors="replace")
        if not data and not ended:
            time.sleep(min(timeout_s, 0.1))
        return bool(data) or not ended

    def signal(self, *arguments: str) -> None:
        """`scancel`, which is also how signals are sent."""
        self.slurm.ask("scancel", *arguments, self.id, check=True)

    def finish(
        self, timeout_s: float = WAIT_S, status: int | None = 0, state: str = "COMPLETED",
        killed: bool = False,
    ) -> str:
        """Wait for its end, in that state, and for everything of it to be gone; its output.

        `killed`: all of it at once by SIGKILL, so that nobody is left to remove files.
        """
        deadline_s = time.monotonic() + timeout_s
        while self._read_some(0.1):
            if time.monotonic() > deadline_s:
                self.fail(f"did not end within {timeout_s:g} s")
        deadline_s = time.monotonic() + _END_S
        while left := self.members() if killed else self.left():
            if time.monotonic() > deadline_s:
                self.fail(f"left behind, {_END_S:g} s after its end: {left}")
            time.sleep(POLL_S)
        while self._read_some(0):
            pass
        if self.state != state:
            self.fail(f"ended as {self.state}, expected {state}")
        return self.output

    def close(self) -> None:
        if not self.over():
            self.slurm.ask("scancel", "--full", "-s", "KILL", self.id)
            self.slurm.ask("scancel", self.id)
        self._kill_members()
        deadline_s = time.monotonic() + _END_S
        while not self.over() and time.monotonic() < deadline_s:
            time.sleep(0.1)
        self._remove_files()
