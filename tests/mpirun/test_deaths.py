"""Any part of a job on several ranks dies: all of it ends, within seconds, and says why."""

from __future__ import annotations

import os
import re
import signal

import pytest

from ..process.jobs import Start

HEAD = """
import os, signal, sys, time
import hpcray as ray
from hpcray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

@ray.remote
def echo(x):
    return x

@ray.remote
def block(started):
    open(started, "w").close()
    while True:
        time.sleep(0.05)

@ray.remote
def once(path):
    first = not os.path.exists(path)
    open(path, "w").close()
    while first:
        time.sleep(0.01)
    return "retried"

def until(path):
    while not os.path.exists(path):
        time.sleep(0.005)

def mark(name):
    return os.path.join(os.environ["TMPDIR"], name)

ray.init(num_cpus=1)
on = [On(n["NodeID"], soft=False) for n in sorted(ray.nodes(), key=lambda n: n["Rank"])]
"""
PENDING = HEAD + """
refs = [block.options(scheduling_strategy=on[r]).remote(mark(f"m{r}")) for r in range(2)]
for r in range(2):
    until(mark(f"m{r}"))
print("pending", flush=True)
ray.get(refs)
"""


@pytest.mark.parametrize(("role", "rank", "number"), [
    ("node", 0, signal.SIGKILL), ("node", 0, signal.SIGTERM), ("node", 1, signal.SIGTERM),
    ("keeper", 1, signal.SIGKILL), ("keeper", 1, signal.SIGTERM), ("driver", None, signal.SIGTERM),
    ("driver", None, signal.SIGKILL), ("driver", None, signal.SIGINT),
    ("launcher", None, signal.SIGTERM), ("launcher", None, signal.SIGINT),
    ("launcher", None, signal.SIGKILL),
])
def test_a_death_ends_the_job(start: Start, role: str, rank: int | None, number: int):
    job = start(PENDING, ranks=2)
    job.expect("pending")
    job.kill(role, rank, number)
    output = job.finish(status=None, timeout_s=5)
    assert "hpcray.node" not in output and "hpcray/" not in output, "no traceback of ours"
    if number == signal.SIGKILL and role != "driver":
        return  # its keeper speaks, or nobody is left who could
    said = re.findall("^hpcray: .*$", output, re.M)
    assert len(said) == 1 and said[0].startswith("hpcray: the job ends: "), output
    if role in ("node", "keeper"):
        assert re.search(rf"rank {rank} \(pid \d+ on \S+\) was told to end \(SIGTERM\)", said[0])
        assert "Traceback" not in output
    if number == signal.SIGTERM:
        assert "Traceback" not in output


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_lost_rank_is_named_and_no_other(start: Start, number: int):
    """Though the launcher ends all of them, and MPICH's by SIGKILL."""
    job = start(PENDING, ranks=3)
    job.expect("pending")
    pid = job.kill("node", 1, number)
    output = job.finish(status=None, timeout_s=8)
    said = [line for line in output.splitlines() if re.search(r"hpcray.*\brank", line)]
    assert len(said) == 1, output
    assert f"rank 1 (pid {pid} on" in said[0] and signal.Signals(number).name in said[0]


@pytest.mark.parametrize(("rank", "dead", "parked"), [
    (0, ("driver",), False), (0, ("driver", "launcher"), False), (1, ("launcher",), False),
    (0, ("driver",), True), (0, ("driver", "launcher"), True), (1, ("driver", "launcher"), True),
])
def test_a_node_that_hangs_does_not_outlive_the_job(
    start: Start, rank: int, dead: tuple[str, ...], parked: bool
):
    """A stopped process hangs as one in an MPI library that waits for a dead process manager: no
    code, handler or thread of it runs. Also while there is no job, and so no zygote."""
    source = HEAD + """
ray.shutdown()
print("pending", flush=True)
time.sleep(1000)
""" if parked else PENDING
    job = start(source, ranks=2, HPCRAY_END_TIMEOUT_S="1")
    job.expect("pending")
    pid = job.kill("node", rank, signal.SIGSTOP)
    for role in dead:
        job.kill(role)
    output = job.finish(status=None)
    if "launcher" not in dead:  # it passes on what is said
        assert re.search(rf"hpcray: the node of rank {rank} \(pid {pid} on \S+\) hangs: it has not "
                         "ended 1 s after its driver has. It was killed", output), output


def test_ctrl_c_at_a_terminal(start: Start):
    job = start(PENDING, ranks=2, pty=True)
    job.expect("pending")
    job.say("\x03")
    output = job.finish(status=None, timeout_s=10)
    assert len(re.findall(r"hpcray: the job ends: .*Ctrl-C", output)) == 1, output
    assert "hpcray/" not in output, "no frames of ours"


def test_hpcray_run_ends_with_a_sentence_too(start: Start):
    """It becomes mpirun."""
    job = start(PENDING, ranks=2, own_mpirun=True)
    job.expect("pending")
    job.kill("launcher", number=signal.SIGTERM)
    output = job.finish(status=None, timeout_s=5)
    assert output.count("hpcray: the job ends: ") == 1 and "Traceback" not in output


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("role", ["worker", "zygote"])
def test_a_death_that_costs_a_retry(start: Start, role: str, rank: int):
    job = start(HEAD + f"""
ref = once.options(scheduling_strategy=on[{rank}]).remote(mark("once"))
until(mark("once"))
print("running", flush=True)
print(ray.get(ref), ray.get([echo.remote(i) for i in range(4)]), flush=True)
""", ranks=2)
    job.expect("running")
    if role == "worker":
        # All of that node: nothing tells from outside which one runs the task.
        for member in job.members():
            if member.role == "worker" and job.rank_of(member) == rank:
                os.kill(member.pid, signal.SIGKILL)
    else:
        job.kill(role, rank)
    job.expect(r"retried \[0, 1, 2, 3\]")
    job.finish()


def test_a_killed_sidecar_is_reported_once_and_costs_nothing(start: Start):
    job = start(HEAD + """
print("up", flush=True)
sys.stdin.readline()
assert ray.get([echo.remote(i) for i in range(20)]) == list(range(20))
print("went on", flush=True)
""", ranks=2, pty=True)
    job.expect("up")
    job.kill("server")
    job.expect("control store died")
    job.say("\n")
    job.expect("went on")
    output = job.finish()
    assert output.count("control store") == 1, output
