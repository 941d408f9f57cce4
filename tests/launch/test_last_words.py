"""The last sentence goes to the launcher's stderr, where two writers do no harm."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcray.launch.identity import SINGLE, Launch
from hpcray.launch.last_words import LastWords, _open_again, _stderr_of

OPENMPI = Launch("mpi", "openmpi", 0, 2, 0, 2, "key", "mpirun")


def told(launch: Launch, **environ: str) -> str:
    return LastWords(launch, environ).who()


def test_who_ends_jobs():
    assert "person" in told(SINGLE)
    assert "Ctrl-C" in told(OPENMPI)
    assert "scancel" in told(OPENMPI, SLURM_JOB_ID="7")
    assert "job 7" in told(SINGLE, SLURM_JOB_ID="7")
    now, later = str(int(time.time())), str(int(time.time()) + 3600)
    assert "has reached its time limit" in told(SINGLE, SLURM_JOB_ID="7", SLURM_JOB_END_TIME=now)
    assert "scancel" in told(SINGLE, SLURM_JOB_ID="7", SLURM_JOB_END_TIME=later)


def test_without_a_launcher_on_this_host_it_is_our_own_stderr(capfd: pytest.CaptureFixture[str]):
    LastWords(OPENMPI, {}).say("the job ends")
    LastWords(SINGLE, {}).say("so it does")
    assert capfd.readouterr().err == "hpcray: the job ends\nhpcray: so it does\n"


@pytest.mark.parametrize("kind", ["pipe", "file", "appended"])
def test_the_launcher_s_stderr(tmp_path: Path, kind: str):
    """The same open file where the system gives it; else only what can have two writers."""
    path = tmp_path / "err"
    ours = theirs = -1
    if kind == "pipe":
        ours, theirs = os.pipe()
    else:
        append = os.O_APPEND if kind == "appended" else 0
        theirs = os.open(path, os.O_WRONLY | os.O_CREAT | append)
    launcher = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stderr.write('first\\n'); sys.stderr.flush();"
         "print(flush=True); input(); sys.stderr.write('last\\n')"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    assert launcher.stdin is not None and launcher.stdout is not None
    launcher.stdout.readline()
    again = _open_again(f"/proc/{launcher.pid}/fd/2", f"/proc/{launcher.pid}/fdinfo/2")
    assert (again < 0) == (kind == "file")
    for fd in (again, _stderr_of(launcher.pid)):
        if fd >= 0:
            assert not os.get_inheritable(fd)
            os.write(fd, b"ours\n")
            os.close(fd)
    launcher.communicate(b"\n")
    if kind == "pipe":
        text = os.read(ours, 1000).decode()
        os.close(ours)
    else:
        text = path.read_text()
    lines = text.splitlines()
    assert lines[0] == "first" and lines[-1] == "last" and set(lines[1:-1]) <= {"ours"}


def test_a_process_that_is_gone():
    done = subprocess.Popen(["true"])
    done.wait()
    assert _stderr_of(done.pid) == -1 and _open_again("/nonexistent", "/nonexistent") == -1
