"""Which processes a backend runs on this host, by kind, for `queued.py` and `idle.py`.

Reads command lines only: what `ps` shows is the one view that both backends offer.

    launcher (mpirun, hpcray run)     <- the root, if the driver has one above it
      ├─ node                            else the driver is the root
      │    └─ zygote ── workers
      └─ driver                          this process

What must not go in: anything that signals or ends a process.
"""

from __future__ import annotations

from collections.abc import Iterable

import psutil

# Checked in order; the first mark found in the command line names the kind. Command
# lines of forked workers are their zygote's, so the two share a kind unless retitled.
KINDS: tuple[tuple[str, str], ...] = (
    ("hpcray.node", "node"),
    ("raylet/raylet", "node"),
    ("valkey", "control store"),
    ("redis", "control store"),
    ("gcs_server", "control store"),
    ("hpcray", "zygote or worker"),
    ("ray::", "zygote or worker"),
    ("default_worker", "zygote or worker"),
)
LAUNCHER_MARKS = ("hpcray", "mpirun", "mpiexec", "prterun", "hydra_pmi_proxy")


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return ""


def kind(process: psutil.Process) -> str:
    line = command_line(process)
    return next((name for mark, name in KINDS if mark in line), "other")


def processes() -> list[psutil.Process]:
    """Every process of this run on this host, without the driver itself."""
    driver = psutil.Process()
    root = driver
    for parent in driver.parents():
        if not any(mark in command_line(parent) for mark in LAUNCHER_MARKS):
            break
        root = parent
    return [process for process in root.children(recursive=True) if process.pid != driver.pid]


def nodes(found: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The node processes: of a family with one command line, its eldest."""
    candidates = {process.pid: process for process in found if kind(process) == "node"}
    return [p for p in candidates.values() if p.ppid() not in candidates]
