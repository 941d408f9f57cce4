"""Which rank of which launch this process is: read from the environment, before MPI exists.

    launcher           says rank and size by            says the launch by
    ---------------    -----------------------------    ---------------------------
    Open MPI mpirun    OMPI_COMM_WORLD_*                PMIX_NAMESPACE
    MPICH, Intel       PMI_RANK, PMI_SIZE, MPI_LOCAL*   HPCRAY_LAUNCH_ID (ours), PMI_PORT
    srun --mpi=pmix    PMIX_RANK, SLURM_STEP_*          PMIX_NAMESPACE
    srun --mpi=pmi2    PMI_RANK, PMI_SIZE, SLURM_*      PMI_JOBID
    Cray PALS          PMI_RANK or PALS_RANKID, ...     PALS_APID

Slurm's variables alone never make a process a rank: a batch script carries the same ones as a
task, and several tasks without PMI would be several MPI worlds of one, each sure to be the job.
They only fill in what PMIx leaves out (the size of the step), and explain that mistake.

Everything here is a function of an environment mapping. No file, no process, no MPI; the
descriptor that `identity_fds` names is closed by whoever owns the process.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from hpcray.exceptions import LaunchError

# Set by `hpcray run -n` on every rank it starts: hydra gives its ranks no name of their launch.
LAUNCH_ID_VARIABLE = "HPCRAY_LAUNCH_ID"

# What makes a process a rank. A process that has one of these and calls MPI_Init *is* that rank.
LAUNCH_PREFIXES: tuple[str, ...] = (
    "OMPI_",
    "PMIX_",
    "PMI_",
    "PMI2_",
    "PRTE_",
    "MPI_LOCAL",  # hydra: MPI_LOCALRANKID, MPI_LOCALNRANKS
    "HYDI_",  # hydra's own descriptor
    "PALS_",
    "MV2_COMM_WORLD_",
    "OPAL_USER_PARAMS_GIVEN",
    LAUNCH_ID_VARIABLE,
    # The step: without PMI, Open MPI reads a step id as "srun forgot --mpi" and aborts. The job
    # (SLURM_JOB_*, SLURM_CPUS_*) stays: resources are read from it, and `srun` from a worker must
    # find its allocation. So does the place (SLURM_PROCID, SLURM_LOCALID, SLURM_NODEID): programs
    # ask it, and as a batch script has it too it makes nothing a rank.
    "SLURM_TASK_PID",
    "SLURM_STEP_",
    "SLURM_STEPID",
    "SLURM_PMIX",
    "SLURM_PMI_",
    "SLURM_SRUN_COMM_",
)

# Under those prefixes, but the user's: how MPI should work here (`OMPI_MCA_btl=^openib`) or where
# it is installed. An `MPI_Init` in a worker needs the same advice as one in the node.
_KEPT_PREFIXES: tuple[str, ...] = (
    "OMPI_MCA_",
    "PMIX_MCA_",
    "PRTE_MCA_",
    "PMIX_PREFIX",
    "PMIX_INSTALL_PREFIX",
    "PRTE_PREFIX",
    "OMPI_LIBDIR_LOC",
    "OMPI_ALLOW_RUN_AS_ROOT",
    "OMPI_CC",
    "OMPI_CXX",
    "OMPI_FC",
    "SLURM_STEP_GPUS",  # a resource of this process, not its name
)

# MCA parameters that no user writes: `mpirun` sets them on its ranks to say who they are. Open
# MPI 4 starts as rank `ess_base_vpid` of job `ess_base_jobid`, whatever else says otherwise.
_LAUNCHER_MCA = re.compile(
    r"(OMPI|PMIX|PRTE)_MCA_"
    r"(PREFIXES$|cpu_type$|initial_wdir$|num_procs$|ess$|ess_|pmix$|pmix_server|db$|orte_|prte_"
    r"|shmem_RUNTIME_QUERY_hint$|mpi_oversubscribe$)"
)

# Slurm numbers batch, extern and interactive steps from the top; no launch of tasks gets there.
_FIRST_SPECIAL_STEP = 0xFFFF_FFF0

Mode = Literal["single", "mpi"]
Library = Literal["openmpi", "mpich", "unknown"]
Launcher = Literal["mpirun", "srun"]


@dataclass(frozen=True, slots=True)
class Launch:
    """One process of one launch.

    Attributes:
      mode: "single" without a launcher; "mpi" under one, even with a size of 1.
      library: the MPI that launched; "unknown" where the launcher serves several (srun).
      local_rank, local_size: among the ranks of this launch on this host; 0 of 1 if not told.
      job_key: equal on all ranks of one launch and on no other's; None where nothing says it.
        Good for names of files, not for secrets.
      launcher: "mpirun" covers every `mpiexec`, also inside a Slurm allocation.
    """

    mode: Mode
    library: Library
    rank: int
    size: int
    local_rank: int
    local_size: int
    job_key: str | None
    launcher: Launcher | None


SINGLE = Launch("single", "unknown", 0, 1, 0, 1, None, None)


def read_launch(environ: Mapping[str, str]) -> Launch:
    """Tell this process's place from its environment.

    The most specific launcher wins: an `mpirun` inside an `srun` step leaves the variables of both.

    Raises:
      LaunchError: several tasks of a Slurm step without PMI, or variables that contradict.
    """
    if "OMPI_COMM_WORLD_RANK" in environ:
        return _check(_openmpi(environ))
    if "PMIX_RANK" in environ:
        return _check(_pmix(environ))
    if "PMI_RANK" in environ or "PALS_RANKID" in environ:
        return _check(_pmi(environ))
    if slurm_step(environ) is not None and _step_tasks(environ) > 1:
        raise LaunchError(
            f"srun started {_step_tasks(environ)} tasks without a process manager interface, so "
            "each of them would be an MPI job of its own. Start them with `srun --mpi=pmix` (Open "
            "MPI) or `srun --mpi=pmi2` (MPICH); `srun --mpi=list` shows what this site has. For "
            "one process only, use `srun -n 1`."
        )
    return SINGLE


def strip_identity(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what makes its process a rank.

    `from mpi4py import MPI` under the result is a clean world of one process. MPI tuning by the
    user and the Slurm job stay.
    """
    return {name: value for name, value in environ.items() if not is_identity(name)}


def is_identity(name: str) -> bool:
    """Whether the variable says which rank its process is."""
    if name.startswith(_KEPT_PREFIXES):
        return _LAUNCHER_MCA.match(name) is not None
    return name.startswith(LAUNCH_PREFIXES)


def identity_fds(environ: Mapping[str, str]) -> tuple[int, ...]:
    """Descriptors that belong to the identity: pass them to the node, close them elsewhere.

    With hydra and Slurm's pmi2, PMI_FD is the connection to the process manager, which takes a
    rank for finished once every copy of it is closed. (hydra leaks more descriptors into its
    ranks, with no variable to name them: whoever is started from a rank should inherit only what
    it was given, which is what `subprocess` does.)

    Whoever called MPI_Init in the rank's place must leave by `exit`, not by `os._exit`: MPICH
    says goodbye to its process manager in an atexit handler, after MPI_Finalize. Without it, hydra
    takes the closed descriptor for a crash and kills what is left of the rank (its driver).
    """
    found = []
    for name in ("PMI_FD", "PALS_FD"):
        value = environ.get(name, "")
        if value.isascii() and value.isdigit():
            found.append(int(value))
    return tuple(found)


def slurm_step(environ: Mapping[str, str]) -> str | None:
    """The `job.step` that this process is a task of; None in a batch or interactive shell."""
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
    if "SLURM_PROCID" not in environ or not step.isdigit() or int(step) >= _FIRST_SPECIAL_STEP:
        return None
    return f"{environ.get('SLURM_JOB_ID', '0')}.{step}"


def expand_tasks_per_node(text: str) -> Iterator[int]:
    """The numbers of Slurm's shorthand: "2(x3),1" gives 2 2 2 1. What is no number is left out."""
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\(x(\d+)\))?\s*", part)
        if match is not None:
            for _ in range(int(match[2] or 1)):
                yield int(match[1])


def _openmpi(environ: Mapping[str, str]) -> Launch:
    # Open MPI 4 has no namespace under some launchers; its job id is unique with the daemon's URI.
    old_key = environ.get("OMPI_MCA_orte_hnp_uri", environ.get("OMPI_MCA_ess_base_jobid"))
    return Launch(
        "mpi",
        "openmpi",
        _number(environ, "OMPI_COMM_WORLD_RANK"),
        _number(environ, "OMPI_COMM_WORLD_SIZE"),
        _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK", default=0),
        _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", default=1),
        environ.get("PMIX_NAMESPACE", old_key),
        "mpirun",
    )


def _pmix(environ: Mapping[str, str]) -> Launch:
    """PMIx without Open MPI's mpirun. PMIx has no variable for the size; Slurm's step has one."""
    if slurm_step(environ) is None:
        raise LaunchError(
            "PMIX_RANK is set, but no variable says how many ranks there are. Start the job with "
            "`mpirun -n N hpcray run script.py` or `srun --mpi=pmix`; to run one process from "
            "inside such a job, unset PMIX_RANK first."
        )
    local_rank, local_size = _slurm_local(environ)
    return Launch(
        "mpi",
        "unknown",
        _number(environ, "PMIX_RANK"),
        _step_tasks(environ),
        local_rank,
        local_size,
        environ.get("PMIX_NAMESPACE", f"slurm.{slurm_step(environ)}"),
        "srun",
    )


def _pmi(environ: Mapping[str, str]) -> Launch:
    """PMI-1 and PMI-2: hydra, gforker, Intel MPI, Cray PALS, `srun --mpi=pmi2|cray_shasta`."""
    rank = _number(environ, "PMI_RANK" if "PMI_RANK" in environ else "PALS_RANKID")
    # A hydra inside a Slurm allocation starts its proxies with srun, so its ranks see a step too.
    hydra = "MPI_LOCALRANKID" in environ or "HYDI_CONTROL_FD" in environ
    srun = slurm_step(environ) is not None and not hydra
    default_local = _slurm_local(environ) if srun else (0, 1)
    size_default = _step_tasks(environ) if srun else None
    key = environ.get("PALS_APID", environ.get("PMI_JOBID"))
    if srun:
        key = key or f"slurm.{slurm_step(environ)}"
    else:
        key = environ.get(LAUNCH_ID_VARIABLE, key or environ.get("PMI_PORT"))
    return Launch(
        "mpi",
        "unknown" if srun else "mpich",
        rank,
        _number(environ, "PMI_SIZE", "PALS_SIZE", default=size_default),
        _number(environ, "MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID",
                default=default_local[0]),
        _number(environ, "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE",
                default=default_local[1]),
        key,
        "srun" if srun else "mpirun",
    )


def _step_tasks(environ: Mapping[str, str]) -> int:
    # The step's own count first: SLURM_NTASKS of an inner `srun -n 1` may be the job's.
    return _number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS", default=1)


def _slurm_local(environ: Mapping[str, str]) -> tuple[int, int]:
    local_rank = _number(environ, "SLURM_LOCALID", default=0)
    counts = list(expand_tasks_per_node(
        environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", ""))
    ))
    node = _number(environ, "SLURM_NODEID", default=0)
    return local_rank, counts[node] if node < len(counts) else local_rank + 1


def _number(environ: Mapping[str, str], *names: str, default: int | None = None) -> int:
    """The first of the variables that is set, as a number that is not negative."""
    for name in names:
        value = environ.get(name)
        if value is None or value == "":
            continue
        if value.isascii() and value.isdigit():
            return int(value)
        raise LaunchError(f"{name}={value!r} is not a number; was the environment edited by hand?")
    if default is not None:
        return default
    raise LaunchError(
        f"this process carries part of a launcher's environment, but not {' or '.join(names)}. "
        "Start it with mpirun or srun directly, or unset the launcher's variables (OMPI_*, PMI_*, "
        "PMIX_*) to run it alone."
    )


def _check(launch: Launch) -> Launch:
    if launch.rank >= launch.size or launch.local_rank >= launch.local_size:
        raise LaunchError(
            f"the launcher's variables say rank {launch.rank} of {launch.size} (on this host "
            f"{launch.local_rank} of {launch.local_size}). That cannot be; they were inherited "
            "from another launch, in part. Unset OMPI_*, PMI_* and PMIX_* before starting this one."
        )
    return launch
