"""The `hpcray` command: whose arguments are whose, who runs the script, what is imported.

Starting a node is `launch.start`'s business and has tests of its own: here two functions that
write down who called them stand in its place, so that these tests say which of them is called,
on which rank, and in what order with the script.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcray.launch import doctor
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
    ("-n=2 s.py", RunArguments("s.py", (), ranks=2)),
    ("-np=2 s.py --help", RunArguments("s.py", ("--help",), ranks=2)),
])
def test_arguments_after_the_script_are_the_scripts(line, wanted):
    assert parse_run(line.split()) == wanted


@pytest.mark.parametrize(("line", "says"), [
    ("", "needs a script"), ("-n 2", "needs a script"), ("-m", "name of a module"),
    ("-n", "a number of nodes"), ("-n 0 s.py", "from 1 up, not '0'"), ("-n s.py", "from 1 up"),
    ("-n= s.py", "from 1 up, not ''"), ("--verbose s.py", "after the script"),
    ("--ft s.py", "--with-ft ulfm"),
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


def test_the_script_may_be_a_pipe(hpcray, tmp_path: Path):
    """`echo ... | hpcray run /dev/stdin` and `hpcray run <(...)`: it can be read once only."""
    done = hpcray("run", "/dev/stdin", "a", stdin=None, input="import sys; print(sys.argv)\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["early", "['/dev/stdin', 'a']"]
    reader, writer = os.pipe()
    os.write(writer, b"print('from a pipe')\n")
    os.close(writer)
    done = hpcray("run", f"/dev/fd/{reader}", pass_fds=[reader])
    os.close(reader)
    assert (done.stdout, done.stderr) == ("early\nfrom a pipe\n", "")


def test_mpirun_hands_no_pipe_on(hpcray, environ):
    done = hpcray("run", "-n", "2", "/dev/stdin", stdin=None, input="print(1)\n",
                  env=environ | {"HPCRAY_MPIRUN": "/no"})
    assert (done.returncode, done.stdout) == (2, "") and "must be a file" in done.stderr


@pytest.mark.parametrize(("line", "says"), [
    ("--help", "usage: hpcray COMMAND"), ("-h", "hpcray COMMAND --help"),
    ("help", "usage: hpcray COMMAND"),
    ("run --help", "usage: hpcray run [-n N]"), ("help run", "usage: hpcray run [-n N]"),
    ("run -n 2 -h", "usage: hpcray run [-n N]"), ("doctor --help", "usage: hpcray doctor"),
    ("version -h", "usage: hpcray version"), ("version", "hpcray 0."), ("--version", "hpcray 0."),
])
def test_help_is_there_for_every_command(hpcray, line, says):
    done = hpcray(*line.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(says) or says in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize(("line", "says"), [
    ("fly", "there is no command 'fly'. See `hpcray --help`."),
    ("doctr", "Did you mean doctor? See `hpcray --help`."),
    ("there.py -x", "To run it: hpcray run there.py -x. See `hpcray --help`."),
    ("-n 2 there.py", "Did you mean hpcray run -n 2 there.py? See `hpcray --help`."),
    ("version x", "hpcray version: it takes no arguments, and 'x' is one. See `hpcray version -"),
    ("run --fly s.py", "there is no option --fly"), ("run -n", "See `hpcray run --help`."),
])
def test_a_wrong_command_line_costs_one_sentence(hpcray, tmp_path: Path, line, says):
    (tmp_path / "there.py").write_text("")
    done = hpcray(*line.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr and done.stderr.count("\n") == 1


def test_nothing_at_all_shows_the_commands(hpcray):
    done = hpcray()
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("usage: hpcray")


@pytest.mark.parametrize("line", ["doctor", "--help", "run --help", "version"])
def test_a_reader_that_leaves_is_no_error(environ, tmp_path: Path, line):
    """`hpcray doctor | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "hpcray", *line.split()], stdout=writer,
                          stderr=subprocess.PIPE, env=environ, cwd=tmp_path, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("line", ["run s.py", "run -n 2 s.py", "run /dev/null", "run -m this"])
def test_a_removed_working_directory_is_named(hpcray, tmp_path: Path, line):
    gone = tmp_path / "gone"
    gone.mkdir()
    done = hpcray(*line.split(), cwd=gone, preexec_fn=gone.rmdir)
    assert done.returncode == 2
    assert "working directory of this process has been removed" in done.stderr
    assert done.stderr.count("\n") == 1


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
                 "memfd", "temporary", "all well"):
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


def test_doctor_looks_whether_there_is_room_for_sockets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_MIN_TEMPORARY_BYTES", 1 << 60)
    found = doctor._temporary()
    assert found.level == "problem" and " free" in found.text and "TMPDIR" in found.fix
    monkeypatch.undo()
    assert doctor._temporary().level == "ok"


def test_doctor_reads_the_variables(python, environ):
    done = python("-m", "hpcray", "doctor", env=environ | {
        "HPCRAY_NUM_CPUS": "many", "HPCRAY_NUM_CPU": "2", "HPCRAY_KEEP_BINDING": "1",
        "HPCRAY_REDIS_URL": "redis://:secret@127.0.0.1:1"})
    assert done.returncode == 1
    for text in ("PROBLEM environment    HPCRAY_NUM_CPUS='many' in the environment is not a number",
                 "note    environment    the environment has HPCRAY_NUM_CPU, which",
                 "ok      environment    HPCRAY_KEEP_BINDING=1 (1: a rank keeps"):
        assert text in done.stdout
    assert "secret" not in done.stdout + done.stderr


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
