"""The limits that control groups set on this process: CPUs, their quota, memory.

Version 1, version 2, or both at once (a hybrid host has its memory controller in one and its
processes in the other). Only files are read, all of them below one `root`.

What the limits mean for a rank is decided in `resources`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Kernels write "no limit" in bytes as a number near 2**63, rounded to pages.
_UNLIMITED_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class Bound:
    """One limit and who sets it."""

    value: int
    source: str


class Cgroups:
    """The limits of this process's own control groups, v1, v2 or both at once.

    A limit may sit on any level between the process and the mount, so values are read on the way
    up and the lowest counts. Inside a container the mount shows only a part of the hierarchy,
    while /proc/self/cgroup may name the path seen from outside: the mount's own root (mountinfo)
    tells which part.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        paths: dict[str, str] = {}  # controller -> path; "" is the unified hierarchy
        for line in read_text(root / "proc/self/cgroup").splitlines():
            _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
            paths.update(dict.fromkeys(controllers.split(","), path))
        # controller -> directories from the process's own up to the mount
        self._levels: dict[str, list[Path]] = {}
        for offered, inside, mount in _cgroup_mounts(root):
            for controller in offered:
                if controller in paths:
                    self._levels[controller] = _levels(mount, inside, paths[controller])

    def cpu_quota(self) -> Bound | None:
        """Whole CPUs of the tightest CFS quota, at least 1."""
        bounds = []
        for level in self._levels.get("", ()):
            quota, _, period = read_text(level / "cpu.max").strip().partition(" ")
            bounds += _quota(quota, period, f"cgroup {level}/cpu.max")
        for level in self._levels.get("cpu", ()):
            quota = read_text(level / "cpu.cfs_quota_us").strip()
            period = read_text(level / "cpu.cfs_period_us").strip()
            bounds += _quota(quota, period, f"cgroup {level}/cpu.cfs_quota_us")
        return lowest(bounds)

    def cpuset(self) -> tuple[frozenset[int], str] | None:
        """The CPUs of the nearest level that names any; an outer level cannot name fewer."""
        for controller, names in (
            ("", ("cpuset.cpus.effective",)),
            ("cpuset", ("cpuset.effective_cpus", "cpuset.cpus")),
        ):
            for level in self._levels.get(controller, ()):
                for name in names:
                    cpus = frozenset(parse_cpu_list(read_text(level / name)))
                    if cpus:
                        return cpus, f"cgroup {level}/{name}"
        return None

    def memory(self) -> Bound | None:
        bounds = []
        for controller, names in (
            # Above memory.high the kernel throttles to a crawl: for planning it is the limit.
            ("", ("memory.max", "memory.high")),
            ("memory", ("memory.limit_in_bytes",)),
        ):
            for level in self._levels.get(controller, ()):
                for name in names:
                    value = read_text(level / name).strip()
                    if value.isdigit() and 0 < int(value) < _UNLIMITED_BYTES:
                        bounds.append(Bound(int(value), f"cgroup {level}/{name}"))
        return lowest(bounds)


def parse_cpu_list(text: str) -> Iterator[int]:
    """The numbers of the kernel's "0-3,8": 0 1 2 3 8."""
    for part in text.strip().split(","):
        low, dash, high = part.partition("-")
        if low.isdigit() and (high.isdigit() or not dash):
            yield from range(int(low), int(high if dash else low) + 1)


def lowest(bounds: Iterable[Bound]) -> Bound | None:
    return min(bounds, key=lambda bound: bound.value, default=None)


def read_text(path: Path) -> str:
    """The file, or "" where there is none: most machines lack most of these files."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _quota(quota: str, period: str, source: str) -> list[Bound]:
    """At most one bound. Rounded down: half a CPU over is throttled, half under is only idle."""
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return []  # "max", "-1", or no such file
    return [Bound(max(1, int(quota) // int(period)), source)]


def _cgroup_mounts(root: Path) -> Iterator[tuple[tuple[str, ...], str, Path]]:
    """(controllers, the path inside the hierarchy that is mounted, where) of each cgroup mount."""
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        head, tail = left.split(), right.split()
        if len(head) < 5 or len(tail) < 3:
            continue
        mount = root / head[4].lstrip("/")
        if tail[0] == "cgroup2":
            yield ("",), head[3], mount
        elif tail[0] == "cgroup":
            yield tuple(tail[2].split(",")), head[3], mount


def _levels(mount: Path, inside: str, path: str) -> list[Path]:
    """Directories from the process's own group up to the mount."""
    below = os.path.relpath(path, inside) if path.startswith("/") else "."
    if below.startswith(".."):
        below = "."  # outside of what is mounted here: only the mount itself can be read
    steps = [part for part in below.split("/") if part != "."]
    return [mount.joinpath(*steps[:depth]) for depth in range(len(steps), -1, -1)]
