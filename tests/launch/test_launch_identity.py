"""Who a process is: by the variables of each launcher, and for real under both mpiruns."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcray.exceptions import LaunchError
from hpcray.launch.identity import (
    SINGLE,
    expand_tasks_per_node,
    identity_fds,
    is_identity,
    read_launch,
    strip_identity,
)

OPEN_MPI_5 = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_RANK": "3", "PMIX_NAMESPACE": "prterun-host-77@1",
    "PRTE_LAUNCHED": "1", "OMPI_MCA_num_procs": "4", "OMPI_MCA_initial_wdir": "/home/u",
    "PMIX_SERVER_URI41": "x", "OPAL_USER_PARAMS_GIVEN": "1",
}
OPEN_MPI_4 = {
    "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1",
    "OMPI_MCA_orte_hnp_uri": "99.0;tcp://h:1", "OMPI_MCA_ess_base_jobid": "99",
    "OMPI_MCA_ess": "^singleton", "OMPI_MCA_pmix": "^s1,s2",
}
HYDRA = {
    "PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "9", "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "2", "HYDI_CONTROL_FD": "7", "HPCRAY_LAUNCH_ID": "c0ffee",
}
SRUN_TASK = {
    "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
SRUN_PMIX = SRUN_TASK | {"PMIX_RANK": "2", "PMIX_NAMESPACE": "slurm.pmix.12.0"}
SRUN_PMI2 = SRUN_TASK | {"PMI_RANK": "2", "PMI_SIZE": "4", "PMI_FD": "5", "PMI_JOBID": "12.0"}
PALS = {
    "PALS_RANKID": "1", "PALS_APID": "ab-cd", "PMI_RANK": "1", "PMI_SIZE": "8",
    "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4",
}


@pytest.mark.parametrize(("environ", "told"), [
    (OPEN_MPI_5, ("mpi", "openmpi", 3, 4, 1, 2, "prterun-host-77@1", "mpirun")),
    (OPEN_MPI_4, ("mpi", "openmpi", 0, 1, 0, 1, "99.0;tcp://h:1", "mpirun")),
    (HYDRA, ("mpi", "mpich", 1, 2, 1, 2, "c0ffee", "mpirun")),
    (SRUN_PMIX, ("mpi", "unknown", 2, 4, 0, 2, "slurm.pmix.12.0", "srun")),
    (SRUN_PMI2, ("mpi", "unknown", 2, 4, 0, 2, "12.0", "srun")),
    (PALS, ("mpi", "mpich", 1, 8, 1, 4, "ab-cd", "mpirun")),
    # mpirun inside an allocation starts its daemons by srun: the ranks see that step as well.
    (SRUN_TASK | OPEN_MPI_5, ("mpi", "openmpi", 3, 4, 1, 2, "prterun-host-77@1", "mpirun")),
    (SRUN_TASK | HYDRA, ("mpi", "mpich", 1, 2, 1, 2, "c0ffee", "mpirun")),
], ids=["openmpi5", "openmpi4", "hydra", "pmix", "pmi2", "pals", "slurm-ompi", "slurm-hydra"])
def test_each_launcher_is_understood(environ, told):
    launch = read_launch(environ)
    assert told == (launch.mode, launch.library, launch.rank, launch.size, launch.local_rank,
                    launch.local_size, launch.job_key, launch.launcher)
    # And nothing of it survives: the child of a rank is alone, also by our own reading.
    assert read_launch(strip_identity(environ)) == SINGLE


@pytest.mark.parametrize("environ", [
    {},
    {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script
    SRUN_TASK | {"SLURM_STEP_NUM_TASKS": "1"},  # srun -n 1 inside a job of 4 tasks
    SRUN_TASK | {"SLURM_STEP_ID": "4294967290"},  # salloc's interactive step
    {"OMPI_MCA_btl": "self", "OMPI_ALLOW_RUN_AS_ROOT": "1", "HPCRAY_LAUNCH_ID": "left"},
], ids=["bare", "batch", "srun1", "interactive", "tuning"])
def test_slurm_alone_makes_no_rank(environ):
    assert read_launch(environ) == SINGLE


def test_srun_without_pmi_is_refused_and_says_what_to_type():
    with pytest.raises(LaunchError, match=r"srun --mpi=pmix.*--mpi=pmi2"):
        read_launch(SRUN_TASK)


@pytest.mark.parametrize("environ", [
    {"OMPI_COMM_WORLD_RANK": "0"},
    {"PMI_RANK": "0"},
    {"PMI_RANK": "0", "PMI_SIZE": "many"},
    {"PMI_RANK": "5", "PMI_SIZE": "2"},
    {"PMIX_RANK": "0"},
], ids=["no-size", "no-pmi-size", "no-number", "beyond", "pmix-alone"])
def test_part_of_a_launch_is_refused(environ):
    with pytest.raises(LaunchError, match=r"unset|Unset|environment edited"):
        read_launch(environ)


def test_strip_keeps_the_user_and_the_job():
    kept = {
        "PATH": "/bin", "OMPI_MCA_btl": "^openib", "OMPI_MCA_pml": "ucx", "PMIX_MCA_gds": "hash",
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "SLURM_JOB_ID": "12", "SLURM_CPUS_ON_NODE": "4",
        "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
        "UCX_TLS": "sm", "FI_PROVIDER": "cxi", "OPAL_PREFIX": "/opt/mpi", "PMIX_PREFIX": "/opt/mpi",
        "HPCRAY_NUM_CPUS": "2", "I_MPI_FABRICS": "shm",
    }
    everything = kept | OPEN_MPI_5 | OPEN_MPI_4 | HYDRA | SRUN_TASK | PALS
    assert strip_identity(everything) == kept


@given(st.dictionaries(st.text(min_size=1), st.text()))
def test_strip_is_idempotent_and_only_removes(environ):
    once = strip_identity(environ)
    assert strip_identity(once) == once
    assert once.items() <= environ.items()
    assert all(is_identity(name) for name in environ.keys() - once.keys())


def test_identity_descriptors():
    assert identity_fds(HYDRA) == (9,)
    assert identity_fds(OPEN_MPI_5) == ()
    assert identity_fds({"PMI_FD": "-1"}) == ()


def test_slurm_shorthand():
    assert list(expand_tasks_per_node("2(x3),1")) == [2, 2, 2, 1]
    assert list(expand_tasks_per_node("")) == []


# A rank that never touches MPI, and what it starts.
RANK = """
import json, os, subprocess, sys
from dataclasses import asdict
from hpcray.launch.identity import identity_fds, read_launch, strip_identity

def child(code, environ, fds=()):
    done = subprocess.run([sys.executable, "-c", code], env=environ, pass_fds=fds, text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=60)
    return done.returncode, done.stdout.split()

launch = read_launch(os.environ)
# btl=self: Open MPI 5 leaves the shared-memory file of a world of one behind by itself.
alone = child("from mpi4py import MPI; print(MPI.COMM_WORLD.size)",
              {"OMPI_MCA_btl": "self", **strip_identity(os.environ)})
# It ends before its parent does, which a process manager might take for a crash.
instead = child(
    "from mpi4py import MPI; c = MPI.COMM_WORLD; print(c.rank, *c.allgather(c.rank))",
    dict(os.environ), identity_fds(os.environ))
with open(os.path.join(sys.argv[1], str(launch.rank)), "w") as file:
    json.dump({"launch": asdict(launch), "alone": alone, "instead": instead}, file)
"""


@pytest.mark.mpirun
def test_stripped_child_is_alone_and_a_child_may_be_the_rank(run_ranks, mpirun, tmp_path: Path):
    done = run_ranks(2, [sys.executable, "-c", RANK, str(tmp_path)])
    assert done.returncode == 0, done.stdout + done.stderr
    said = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    for rank, one in enumerate(said):
        assert one["alone"] == [0, ["1"]]
        assert one["instead"] == [0, [str(rank), "0", "1"]]
        launch = one["launch"]
        assert (launch["mode"], launch["launcher"], launch["library"]) == (
            "mpi", "mpirun", mpirun.family)
        assert (launch["rank"], launch["size"]) == (rank, 2)
        assert (launch["local_rank"], launch["local_size"]) == (rank, 2)
    assert said[0]["launch"]["job_key"] == said[1]["launch"]["job_key"] is not None


@pytest.mark.mpirun
def test_one_rank_under_mpirun_is_mpi(run_ranks):
    code = ("import os; from hpcray.launch.identity import read_launch\n"
            "print(read_launch(os.environ))")
    done = run_ranks(1, [sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert "mode='mpi'" in done.stdout and "size=1" in done.stdout
