"""Which node is killed when its parents are gone; with a sleeping process for the node."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

LIMIT_S = 0.5
WAIT_S = 20.0

# launcher --> launched process --> node --> watchdog. Each tells its pid; the node sleeps.
NODE = """
import os, signal, sys
from hpcray.launch.watchdog import Watchdog
watchdog = Watchdog(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), os.environ)
watchdog.unlink_at_end(sys.argv[4:5])
watchdog.unlink_at_end(sys.argv[5:])
print(os.getppid(), os.getpid(), watchdog._process.pid, flush=True)
signal.pause()
"""
PARENT = "import subprocess, sys; subprocess.run(sys.argv[1:])"


@dataclass
class Line:
    """One of them each."""

    launcher: subprocess.Popen[str]
    launched: int
    node: int
    watchdog: int
    files: list[Path]


@pytest.fixture
def line(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Line]:
    python = [sys.executable, "-c"]
    rank, generations = request.param
    files = [tmp_path / "a segment", tmp_path / "another"]
    for file in files:
        file.touch()
    launcher = subprocess.Popen(
        [*python, PARENT, *python, PARENT, *python, NODE, str(rank), str(generations),
         str(LIMIT_S), str(files[0]), str(tmp_path / "gone"), str(files[1])],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])})
    assert launcher.stdout is not None and launcher.stderr is not None
    pids = [int(word) for word in launcher.stdout.readline().split()]
    while not ignores_sigterm(pids[-1]):
        time.sleep(0.01)
    yield Line(launcher, *pids, files)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    launcher.stderr.close()


def ignores_sigterm(pid: int) -> bool:
    match = re.search(r"^SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    assert match is not None
    return bool(int(match[1], 16) & 1 << signal.SIGTERM - 1)


def wait_gone(pid: int, limit_s: float = WAIT_S) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], limit_s)[0])
    finally:
        os.close(pidfd)


@pytest.mark.parametrize(("line", "dies", "who"), [
    ((0, 1), "launched", "driver"), ((0, 2), "launched", "driver"),
    ((0, 2), "launcher", "launcher"), ((3, 2), "launcher", "launcher"),
], indirect=["line"])
def test_a_node_that_hangs_is_killed(line: Line, dies: str, who: str):
    """Though it is stopped, and everybody was told to end."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(line.watchdog, number)
    os.kill(line.node, signal.SIGSTOP)
    os.kill(line.launched if dies == "launched" else line.launcher.pid, signal.SIGKILL)
    assert wait_gone(line.node) and wait_gone(line.watchdog)
    assert not any(file.exists() for file in line.files)
    assert line.launcher.stderr is not None
    said = line.launcher.stderr.read()
    assert f"(pid {line.node} on " in said and "the node of rank " in said
    assert f"it has not ended {LIMIT_S} s after its {who} has. It was killed" in said


@pytest.mark.parametrize(("line", "dies"), [((0, 1), ""), ((0, 2), ""), ((0, 1), "launcher")],
                         indirect=["line"])
def test_a_node_that_is_wanted_lives(line: Line, dies: str):
    """Without an MPI launcher, the parent of a driver is a shell, which may go."""
    if dies:
        line.launcher.kill()
    assert not wait_gone(line.node, 4 * LIMIT_S)
    assert all(file.exists() for file in line.files)
    os.kill(line.node, signal.SIGKILL)
    assert wait_gone(line.watchdog), "it ends with its node"
    assert not any(file.exists() for file in line.files)
