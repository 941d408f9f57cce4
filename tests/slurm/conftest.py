"""`slurm`: a real Slurm for the whole session; `submit`: jobs in it, ended by the fixture.

Both MPIs are tested: the suite with Open MPI by `srun --mpi=pmix`, and the part of it that runs
again with MPICH (`pytest -m mpirun`), which is a few of these, by `srun --mpi=pmi2`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from .cluster import Slurm, SlurmJob, why_not

Submit = Callable[..., SlurmJob]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    ours = [item for item in items if here in item.path.parents]
    reason = why_not() if ours else ""
    for item in ours:
        item.add_marker(pytest.mark.slurm)
        # Again with MPICH: what differs between the two MPIs.
        if item.name.startswith(("test_several_nodes", "test_scancel", "test_a_node_that_hangs")):
            item.add_marker(pytest.mark.mpirun)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def has(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


@pytest.fixture(scope="session")
def mpi_kind() -> str:
    """What `srun --mpi=` is to be for the MPI of this environment."""
    return "pmi2" if has("mpich") else "pmix"


# For every test of this folder, so that the daemons are older than the module that is watched.
@pytest.fixture(scope="session", autouse=True)
def slurm(mpi_kind: str) -> Iterator[Slurm]:
    if why_not():
        pytest.skip(why_not())
    directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    directory.chmod(0o755)
    cluster = Slurm(directory)
    try:
        reason = cluster.speaks(mpi_kind)
        if reason:
            pytest.skip(reason)
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def submit(slurm: Slurm, mpi_kind: str) -> Iterator[Submit]:
    """submit(source, *arguments, options=sbatch's, **environment) -> the job."""
    jobs: list[SlurmJob] = []

    def submit(source: str, *args: str, **options: object) -> SlurmJob:
        options.setdefault("HPCRAY_SRUN_MPI", mpi_kind)
        jobs.append(SlurmJob(slurm, source, *args, **options))  # type: ignore[arg-type]
        return jobs[-1]

    yield submit
    for job in jobs:
        job.close()
