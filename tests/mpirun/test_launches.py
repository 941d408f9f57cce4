"""The launches, with the mpirun beside this Python: what the user's script sees of them."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from ..process.jobs import Start

WHO = """
import os, sys
import hpcray as ray
from hpcray.launch.identity import is_identity
assert __name__ == "__main__" and sys.argv[1:] == ["-n", "b c"], sys.argv
print("before", flush=True)
ray.init()
print("after", flush=True)
assert not any(map(is_identity, os.environ))
nodes = ray.nodes()
assert sorted(n["Rank"] for n in nodes) == list(range(len(nodes)))

@ray.remote(num_cpus=0)
def who():
    print("hello from", ray.get_runtime_context().get_node_id(), flush=True)
    assert not any(map(is_identity, os.environ))
    return ray.get_runtime_context().get_node_id()

from hpcray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
for node in nodes:
    where = On(node["NodeID"], soft=False)
    assert ray.get(who.options(scheduling_strategy=where).remote()) == node["NodeID"]
print("nodes", len(nodes), flush=True)
"""


@pytest.mark.parametrize(("ranks", "options"), [
    (1, {}), (2, {}), (4, {}), (2, {"own_mpirun": True}), (1, {"bare": True}), (2, {"bare": True}),
    (4, {"bare": True}),
])
def test_every_launch(start: Start, ranks: int, options: dict[str, bool]):
    job = start(WHO + "sys.exit(3)\n", "-n", "b c", ranks=ranks, HPCRAY_DEDUP_LOGS="0", **options)
    output = job.finish(status=3)
    assert output.count("before") == (ranks if options.get("bare") else 1)
    assert output.count("after") == 1
    assert f"nodes {ranks}" in output
    said = set(re.findall(r"^\(who pid=\d+\) hello from (\w+)", output, flags=re.M))
    assert len(said) == ranks


@pytest.mark.parametrize("bare", [False, True])
def test_an_exception_is_printed_once(start: Start, bare: bool):
    job = start("import hpcray as ray\nray.init()\nraise ValueError('mine')\n", ranks=2, bare=bare)
    output = job.finish(status=1)
    assert output.count("ValueError: mine") == 1
    assert "hpcray" not in output.split("Traceback")[1].split("ValueError")[0]


def test_sessions_one_after_the_other(start: Start):
    """`shutdown` parks the nodes; the next `init` finds them."""
    job = start("""
import os
import hpcray as ray

@ray.remote
def node():
    return ray.get_runtime_context().get_node_id(), os.getppid()

for i in range(4):
    ray.init(num_cpus=2)
    assert ray.cluster_resources()["CPU"] == 4
    assert len(ray.nodes()) == 2
    assert len(ray.get([node.remote() for _ in range(30)])) == 30
    try:
        ray.get_actor("kept")
        print("an actor of the last session is still there")
    except ValueError:
        pass
    class A:
        pass
    ray.remote(A).options(name="kept").remote()
    ray.shutdown()
print("done")
""", ranks=2)
    output = job.finish()
    assert "done" in output and "still there" not in output


def test_mpi_in_the_driver_and_in_tasks_is_a_world_of_its_own(start: Start):
    # btl=self: Open MPI 5 leaves the shared-memory file of a world of one behind by itself.
    job = start("""
import os
import hpcray as ray

@ray.remote
def world():
    os.environ["OMPI_MCA_btl"] = "self"
    from mpi4py import MPI
    return MPI.COMM_WORLD.size, MPI.COMM_WORLD.allreduce(5)

ray.init()
assert ray.get([world.remote() for _ in range(4)]) == [(1, 5)] * 4
os.environ["OMPI_MCA_btl"] = "self"
from mpi4py import MPI
assert MPI.COMM_WORLD.size == 1
MPI.COMM_WORLD.Barrier()
assert ray.get(world.remote()) == (1, 5)
print("worlds")
""", ranks=2, bare=True)
    assert "worlds" in job.finish()


def test_mpi_before_init_is_refused(start: Start):
    job = start("""
from mpi4py import MPI
import hpcray as ray
MPI.COMM_WORLD.Barrier()
try:
    ray.init()
except ray.exceptions.LaunchError as error:
    MPI.COMM_WORLD.Barrier()
    if MPI.COMM_WORLD.rank == 0:
        print("refused:", error, flush=True)
""", ranks=2, bare=True)
    output = job.finish()
    assert re.search("refused: .*hpcray run", output)


def test_a_rank_that_never_arrives(start: Start):
    """It ends with a sentence that says what to look at, and not in a hang."""
    shared = set(Path("/dev/shm").glob("mpich_shm_*"))
    job = start("""
import os
if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "1":
    import signal
    signal.pause()
import hpcray as ray
ray.init()
""", ranks=2, bare=True, HPCRAY_START_TIMEOUT_S="2")
    output = job.finish(status=None)
    # MPICH's own, of ranks that end inside MPI_Init: nobody knows its name before that returns.
    for path in set(Path("/dev/shm").glob("mpich_shm_*")) - shared:
        path.unlink(missing_ok=True)
    assert "MPI_Init has not returned after 2 s" in output
    assert "never arrived" in output


@pytest.mark.parametrize("gone", ["driver", "launcher"])
def test_a_driver_that_ends_while_mpi_starts_leaves_no_node(start: Start, gone: str):
    """MPI_Init waits for a rank that does not come, and so long hears of nobody's end."""
    shared = set(Path("/dev/shm").glob("mpich_shm_*"))
    job = start("""
import os
if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "1":
    import signal
    signal.pause()
import hpcray as ray
print("init", flush=True)
ray.init()
""", ranks=2, bare=True)
    job.expect("init")
    deadline_s = time.monotonic() + 30
    while not any(member.role == "zygote" for member in job.members()):  # MPI is what comes next
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    node = job.pid("node")
    driver = int(Path(f"/proc/{node}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(driver if gone == "driver" else job.process.pid, signal.SIGKILL)
    # The script of rank 1 waits for nobody of ours.
    while any(member.role not in ("driver", "other") for member in job.members()):
        assert time.monotonic() < deadline_s, job.members()
        time.sleep(0.02)
    for path in set(Path("/dev/shm").glob("mpich_shm_*")) - shared:
        path.unlink(missing_ok=True)


TERMINAL = """
import sys
first = sys.stdout.isatty()
import hpcray as ray
ray.init(num_cpus=1)
import os
print("terminal", first, sys.stdout.isatty(), os.environ.get("TERM"), flush=True)

@ray.remote
def speak():
    print("spoken")
ray.get(speak.remote())
"""


def test_a_file_behind_mpirun_is_no_terminal(start: Start) -> None:
    """Open MPI gives rank 0 a pseudo-terminal, whatever mpirun's own stdout is."""
    output = start(TERMINAL, ranks=1, TERM="xterm", HPCRAY_COLOR_PREFIX="").finish()
    assert "terminal False False" in output and "\x1b" not in output
    output = start(TERMINAL, ranks=1, bare=True, TERM="xterm").finish()
    assert re.search("terminal (True|False) False", output) and "\x1b" not in output


def test_a_terminal_behind_mpirun_is_one(start: Start) -> None:
    output = start(TERMINAL, ranks=1, pty=True, TERM="xterm", NO_COLOR="").finish()
    said = re.search("terminal (True|False) (True|False) xterm", output)
    assert said is not None and said[1] == said[2], "nothing was changed"
    if said[1] == "True":  # MPICH passes a pipe on
        assert re.search(r"\x1b\[36m\(speak pid=\d+\)\x1b\[0m spoken", output)
