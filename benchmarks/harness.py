"""What every benchmark here shares: backends, samples, machine, limits, tables.

Why: a number without its machine, versions, commit and spread is not worth
keeping, so all programs take those from one place and print them the same way.

What must not go in: anything that only one program needs, anything that looks
inside a backend, and anything a task or actor calls. Remote code is pickled by
value from the script itself; a function of this module would be pickled by name
and then missing on a worker that cannot import `benchmarks/`.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
REPOSITORY = BENCHMARKS.parent
BACKENDS = ("hpcray", "ray")

# The variables by which an MPI library finds out that it was launched as a rank.
# A nested `mpirun` that inherits them takes itself for a rank of the outer job.
LAUNCH_IDENTITY_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MPI_LOCAL", "HYDRA_", "HYDI_")


@dataclass(frozen=True, slots=True)
class Result:
    """One measured row. `value` is the median of `repeat` samples, None with an `error`."""

    name: str
    unit: str
    value: float | None
    min: float | None = None
    max: float | None = None
    repeat: int = 0
    better: str = "higher"  # or "lower"
    error: str | None = None

    @staticmethod
    def of(name: str, unit: str, samples: Sequence[float], better: str = "higher") -> Result:
        return Result(
            name, unit, statistics.median(samples), min(samples), max(samples),
            len(samples), better,
        )

    @staticmethod
    def failed(name: str, error: str) -> Result:
        return Result(name, "", None, error=scrub(error))

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Result:
        return Result(**row)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def load_backend(name: str) -> Any:
    """Import `hpcray` or `ray`; a missing one ends the program with what to do."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise  # the backend is there and one of its own imports failed: show that
        hint = (
            "run `pip install -e .` at the top of this repository, or set PYTHONPATH to it"
            if name == "hpcray"
            else "run this with a Python that has it (`pip install ray==2.60.0` in its own venv)"
        )
        raise SystemExit(f"{name} cannot be imported by {sys.executable}: {hint}") from None


# --- What was measured, where -------------------------------------------------------


def machine() -> dict[str, Any]:
    """The hardware and system, without host name or paths: results are published."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "load_1min": round(os.getloadavg()[0], 2),
    }


def versions(backend: Any | None = None) -> dict[str, str]:
    found = {"python": platform.python_version()}
    if backend is not None:
        found[backend.__name__] = str(getattr(backend, "__version__", "unknown"))
    for package in ("numpy", "mpi4py"):
        with contextlib.suppress(ImportError):
            # mpi4py's package does not touch MPI; only `mpi4py.MPI` initialises it.
            found[package] = str(importlib.import_module(package).__version__)
    return found


def commit() -> str:
    """Short commit of this repository, `+dirty` if the tree differs from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def date() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def scrub(text: str) -> str:
    """Take the paths of this machine out of a text that will be stored."""
    known = ((sys.prefix, "<venv>"), (str(REPOSITORY), "<repo>"), (str(Path.home()), "~"))
    for path, word in known:
        if len(path) > 1:
            text = text.replace(path, word)
    return text


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(REPOSITORY), *arguments],
        check=True, capture_output=True, text=True, timeout=10,
    )
    return done.stdout.strip()


# --- Limits and launching -----------------------------------------------------------


@contextlib.contextmanager
def hard_limit(limit_s: float, what: str) -> Iterator[None]:
    """Raise TimeoutError in the main thread after `limit_s`, kill the process 30 s later.

    The second, fatal alarm is for a clean-up that hangs as well: no benchmark may
    outlive its limit, and a driver's death ends its nodes.
    """

    expired = False

    def expire(signum: int, frame: FrameType | None) -> None:
        nonlocal expired
        expired = True
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 30.0)
        raise TimeoutError(f"{what}: not finished after {limit_s:g} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        if not expired:  # else leave the fatal alarm armed for what comes after us
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def launch_environment() -> dict[str, str]:
    """An environment from which `mpirun` starts a fresh job, also on few cores or as root."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(LAUNCH_IDENTITY_PREFIXES)
    }
    # As variables, not flags: MPICH's mpirun ignores them, but would refuse the flags.
    env["PRTE_MCA_rmaps_default_mapping_policy"] = ":oversubscribe"
    if os.geteuid() == 0:
        env["OMPI_ALLOW_RUN_AS_ROOT"] = env["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    env["PYTHONPATH"] = os.pathsep.join(
        part for part in (str(REPOSITORY), env.get("PYTHONPATH", "")) if part
    )
    return env


def under_launcher() -> bool:
    """Was this script started by `hpcray run`, or as a rank by mpirun or srun?

    `hpcray run` may already have dropped the launch identity, but it has imported
    hpcray before it runs the script; a plain `python script.py` has not.
    """
    marks = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
    return "hpcray" in sys.modules or any(mark in os.environ for mark in marks)


def beside_python(program: str) -> str | None:
    """The program of this interpreter's venv (MPI wheels bring a mpirun), else PATH's."""
    own = Path(sys.executable).parent / program
    return str(own) if own.exists() else shutil.which(program)


def hpcray_command() -> list[str]:
    program = Path(sys.executable).parent / "hpcray"
    return [str(program)] if program.exists() else [sys.executable, "-m", "hpcray"]


# --- Output -------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Four significant digits, thousands separated, no exponent."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    decimals = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(headers), *cells]) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        # Numbers read best right-aligned; the first column is always the name.
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return "| " + " | ".join([row[0].ljust(widths[0]), *rest]) + " |"

    rule = "|" + "|".join(
        "-" * (width + 2) if i == 0 else "-" * (width + 1) + ":" for i, width in enumerate(widths)
    )
    return "\n".join([line(headers), rule + "|", *map(line, cells)])


def result_table(results: Sequence[Result]) -> str:
    return markdown_table(
        ("row", "unit", "median", "min", "max", "n"),
        [
            (r.name, r.unit, number(r.value), number(r.min), number(r.max), str(r.repeat))
            if r.error is None
            else (r.name, "", "error: " + r.error[:90], "", "", "")
            for r in results
        ],
    )


def report(document: Mapping[str, Any], text: str, json_to: str | None) -> None:
    """Text on stdout; with `--json` the document goes there and the text to stderr."""
    if json_to is None:
        print(text, flush=True)
        return
    body = json.dumps(document, indent=1)
    if json_to == "-":
        print(text, file=sys.stderr, flush=True)
        print(body, flush=True)
    else:
        print(text, flush=True)
        Path(json_to).write_text(body + "\n")
