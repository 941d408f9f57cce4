"""The `hpcray` command: whose arguments are whose, who runs the script, what is imported.

Starting a node is `launch.start`'s business and has tests of its own: here two functions that
write down who called them stand in its place, so that these tests say which of them is called,
on which rank, and in what order with the script.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hpcray.observe.cli import RunArguments, UsageError, parse_run

# `hpcray` as installed, but for the two doors into the runtime.
STAND_IN = """
import os, sys, types
start = types.ModuleType("hpcray.launch.start")
def start_early():
    print("early", flush=True)
def become_node():
    print("node", flush=True)
    os._exit(0)
start.start_early, start.become_node = start_early, become_node
sys.modules["hpcray.launch.start"] = start
from hpcray.observe.cli import main
if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture
def hpcray(python, tmp_path: Path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/hpcray").write_text(STAND_IN)
    return lambda *args, **options: python(str(tmp_path / "bin/hpcray"), *args, **options)


@pytest.mark.parametrize(("line", "wanted"), [
    ("s.py", RunArguments("s.py", ())),
    ("s.py -n 3 --ft -m x", RunArguments("s.py", ("-n", "3", "--ft", "-m", "x"))),
    ("-n 2 s.py -n 3", RunArguments("s.py", ("-n", "3"), ranks=2)),
    ("-n2 --ft s.py", RunArguments("s.py", (), ranks=2, ft=True)),
    ("-np 4 -m pkg.mod -v", RunArguments("pkg.mod", ("-v",), module=True, ranks=4)),
    ("-n 2 -- -odd.py", RunArguments("-odd.py", (), ranks=2)),
])
def test_arguments_after_the_script_are_the_scripts(line, wanted):
    assert parse_run(line.split()) == wanted


@pytest.mark.parametrize(("line", "says"), [
    ("", "needs a script"), ("-n 2", "needs a script"), ("-m", "name of a module"),
    ("-n", "number from 1"), ("-n 0 s.py", "number from 1"), ("-n s.py", "number from 1"),
    ("--verbose s.py", "after its name"), ("--ft s.py", "--with-ft ulfm"),
])
def test_a_wrong_line_is_explained(line, says):
    with pytest.raises(UsageError, match=says):
        parse_run(line.split())


def test_single_starts_early_and_is_the_script(hpcray, tmp_path: Path):
    (tmp_path / "script.py").write_text("import sys; print(sys.argv, __name__); sys.exit(5)\n")
    done = hpcray("run", "script.py", "-n", "7")
    assert (done.returncode, done.stderr) == (5, "")
    assert done.stdout.splitlines() == ["early", "['script.py', '-n', '7'] __main__"]


def test_single_module(hpcray, tmp_path: Path):
    (tmp_path / "tool.py").write_text("import sys; print(sys.argv[1:], __name__)\n")
    done = hpcray("run", "-m", "tool", "-m", "x")
    assert done.stdout.splitlines() == ["early", "['-m', 'x'] __main__"]


@pytest.mark.parametrize("program", [
    "def f():\n    raise ValueError('mine')\nf()\n",
    "from hpcray.exceptions import LaunchError\nraise LaunchError('from the script')\n",
    "raise KeyboardInterrupt\n",
])
def test_errors_look_like_pythons(hpcray, python, tmp_path: Path, program):
    (tmp_path / "script.py").write_text(program)
    plain, ours = python("script.py"), hpcray("run", "script.py")
    assert (ours.returncode, ours.stderr) == (plain.returncode, plain.stderr)


def test_a_typo_is_found_before_anything_starts(hpcray, python, tmp_path: Path):
    (tmp_path / "script.py").write_text("x = = 1\n")
    done = hpcray("run", "script.py")
    assert done.stdout == "" and done.returncode == 1
    assert done.stderr == python("script.py").stderr
    missing = hpcray("run", "nowhere.py")
    assert missing.returncode == 2 and missing.stdout == ""
    assert missing.stderr.startswith("hpcray run: can't open file")
    assert len(missing.stderr.splitlines()) == 1


def test_help_version_and_unknown(hpcray):
    assert "usage: hpcray" in hpcray("--help").stdout
    assert hpcray("version").stdout == hpcray("--version").stdout != ""
    for line in ((), ("fly",), ("version", "x"), ("run", "--fly")):
        done = hpcray(*line)
        assert done.returncode == 2 and "usage: hpcray" in done.stderr


def test_python_m_is_the_same_command(python):
    done = python("-m", "hpcray", "version")
    assert done.returncode == 0 and done.stdout.startswith("hpcray ")


def test_srun_without_pmi_stops_here(hpcray, slurm_task, tmp_path: Path):
    (tmp_path / "script.py").write_text("print('ran')\n")
    done = hpcray("run", "script.py", env=slurm_task)
    assert done.returncode == 2 and done.stdout == ""
    assert "srun --mpi=pmix" in done.stderr


RANKED = """
import os, sys
from hpcray.launch.identity import read_launch
launch = read_launch(os.environ)
# A line and not all: the mpirun of Open MPI 5.0 forwards input, but not always its end.
print("script", launch.rank, launch.size, *sys.argv[1:], sys.stdin.readline().strip(), flush=True)
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.mpirun
@pytest.mark.parametrize("status", [0, 3])
def test_n_ranks_one_script(hpcray, mpirun, tmp_path: Path, status):
    """-n becomes mpirun: the script runs on rank 0 only, with its arguments, stdin and status."""
    (tmp_path / "script.py").write_text(RANKED)
    done = hpcray("run", "-n", "2", "script.py", str(status), "-n", "a b", stdin=None, input="in\n")
    assert done.returncode == status, done.stdout + done.stderr
    # Counted rather than compared by line: hydra may weave the lines of two ranks into each other.
    assert done.stdout.count("early") == 1
    assert done.stdout.count(f"script 0 2 {status} -n a b in") == 1
    assert done.stdout.count("script") == 1
    if status == 0:  # else mpirun may end the other rank before it says anything
        assert done.stdout.count("node") == 1


@pytest.mark.mpirun
def test_n_inside_a_rank_is_refused(run_ranks, tmp_path: Path):
    (tmp_path / "script.py").write_text("")
    done = run_ranks(1, [sys.executable, "-m", "hpcray", "run", "-n", "2",
                         str(tmp_path / "script.py")])
    assert done.returncode == 2
    assert "leave -n out" in done.stderr


def test_n_of_a_missing_script_never_starts_mpirun(hpcray, environ):
    done = hpcray("run", "-n", "2", "nowhere.py", env=environ | {"HPCRAY_MPIRUN": "/no"})
    assert (done.returncode, done.stdout) == (2, "") and "can't open file" in done.stderr


@pytest.mark.mpirun
def test_doctor_on_this_machine(python, mpirun):
    done = python("-m", "hpcray", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("python", str(mpirun), "mpi4py", "control store", "cpus", "memory", "/dev/shm",
                 "memfd", "all well"):
        assert word in done.stdout


def test_doctor_names_what_is_wrong_and_what_to_do(python, slurm_task, tmp_path: Path):
    done = python("-m", "hpcray", "doctor", env=slurm_task | {
        "HPCRAY_REDIS_URL": f"unix://{tmp_path}/nobody.sock", "HPCRAY_MPIRUN": "/no/such",
    })
    assert done.returncode == 1
    assert "PROBLEM launch" in done.stdout and "--mpi=pmix" in done.stdout
    assert "PROBLEM control store" in done.stdout
    assert "note    mpirun" in done.stdout
    assert "2 problems found" in done.stdout


def test_run_adds_next_to_nothing_to_the_import_of_hpcray(python, tmp_path: Path):
    """The start of every rank: no MPI, no Redis, no command-line library, no subprocesses."""
    (tmp_path / "script.py").write_text("import sys; print(*sys.modules)\n")
    (tmp_path / "start.py").write_text(STAND_IN)
    loaded = set(python("start.py", "run", "script.py").stdout.splitlines()[-1].split())
    package = set(python("-c", "import sys, hpcray; print(*sys.modules)").stdout.split())
    assert len(package) > 10
    assert {name for name in loaded - package if name.startswith("hpcray")} == {
        "hpcray.observe", "hpcray.observe.cli", "hpcray.launch", "hpcray.launch.identity",
        "hpcray.launch.script", "hpcray.launch.start"}
    others = {name for name in loaded - package if not name.startswith("hpcray")}
    assert len(others) <= 5, others
