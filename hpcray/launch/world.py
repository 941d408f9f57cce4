"""Whether MPI sees the ranks that the launcher has started, and what to say if it does not.

A launcher and an MPI library that do not know each other start n jobs of one rank each: `srun
--mpi=pmi2` with Open MPI, the mpirun of one MPI with the library of another. Only MPI_Init tells.
Every rank finds out by itself, at once, as there is nobody else in its world.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

from hpcray.launch.identity import Launch, strip_identity

# `srun --mpi=list` reads files, and asks nobody; longer than this, it hangs.
_LIST_TIMEOUT_S = 10.0


def mismatch(
    launch: Launch, size: int, rank: int, library: str, environ: Mapping[str, str]
) -> str | None:
    """Why this rank cannot take part, in one sentence or two; None if all is well.

    `size`, `rank`, `library`: what MPI says of itself.
    """
    if launch.mode != "mpi" or (size, rank) == (launch.size, launch.rank):
        return None
    found = (f"{launch.launcher} started {launch.size} ranks, and this is rank {launch.rank}; but "
             f"{library} sees a job of {size} rank{'s'[:size != 1]}, and this as rank {rank}")
    if launch.launcher != "srun":
        return (f"{found}. mpirun and mpi4py must be of one MPI: `hpcray doctor` compares them")
    kind = environ.get("SLURM_MPI_TYPE", "")
    offered = mpi_kinds(environ)
    listed = f" (`srun --mpi=list` offers {', '.join(offered)})" if offered else ""
    return (f"{found}. {f'--mpi={kind} is' if kind else 'The --mpi of srun is'} not what this MPI "
            f"needs: take `srun --mpi=pmix` for Open MPI, pmi2 or pmix for MPICH{listed}, or start "
            "the ranks by mpirun")


def mpi_kinds(environ: Mapping[str, str]) -> list[str]:
    """What `srun --mpi=` takes here; empty if srun does not say."""
    try:
        done = subprocess.run(
            ["srun", "--mpi=list"], env=strip_identity(environ), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            timeout=_LIST_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_mpi_kinds(done.stdout) if done.returncode == 0 else []


def parse_mpi_kinds(text: str) -> list[str]:
    """One kind a line, after a headline; older versions put "srun: " before each."""
    lines = [line.removeprefix("srun: ").split() for line in text.splitlines()]
    return [words[0] for words in lines if len(words) == 1 and words[0] != "none"]
