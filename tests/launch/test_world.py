"""What a rank says when MPI does not see the ranks that the launcher has started."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hpcray.launch.identity import SINGLE, Launch
from hpcray.launch.world import mismatch, parse_mpi_kinds

SRUN = Launch("mpi", "unknown", 1, 3, 0, 1, "slurm.7.0", "srun")
OLD = "srun: MPI types are...\nsrun: none\nsrun: openmpi\nsrun: pmi2\n"
NEW = """MPI plugin types are...
\tpmix
\tnone
\tpmi2
specific pmix plugin versions available: pmix_v4
"""


@pytest.mark.parametrize(("text", "kinds"), [
    (OLD, ["openmpi", "pmi2"]), (NEW, ["pmix", "pmi2"]), ("", []),
])
def test_kinds_of_every_slurm(text: str, kinds: list[str]):
    assert parse_mpi_kinds(text) == kinds


def test_all_is_well():
    assert mismatch(SINGLE, 1, 0, "MPI", {}) is None
    assert mismatch(SRUN, 3, 1, "MPI", {}) is None


def test_srun_is_told_what_there_is(tmp_path: Path):
    srun = tmp_path / "srun"
    srun.write_text(f"#!{sys.executable}\nimport sys\n"
                    f"assert sys.argv[1:] == ['--mpi=list']\nprint({NEW!r}, file=sys.stderr)\n")
    srun.chmod(0o755)
    said = mismatch(SRUN, 1, 0, "Open MPI v5.0.8",
                    {"PATH": str(tmp_path), "SLURM_MPI_TYPE": "pmi2"})
    assert said is not None
    for part in ("srun started 3 ranks, and this is rank 1", "Open MPI v5.0.8 sees a job of 1 rank",
                 "--mpi=pmi2 is not", "(`srun --mpi=list` offers pmix, pmi2)"):
        assert part in said


def test_srun_that_is_not_there_or_says_nothing(tmp_path: Path):
    said = mismatch(SRUN, 1, 0, "MPICH 5.0.2", {"PATH": str(tmp_path)})
    assert said is not None and "The --mpi of srun is not" in said and "offers" not in said


def test_mpirun_of_another_mpi():
    said = mismatch(replace(SRUN, launcher="mpirun"), 1, 0, "MPICH 5.0.2", {})
    assert said is not None and "one MPI" in said and "hpcray doctor" in said
