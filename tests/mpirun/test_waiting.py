"""What waits for 10 s says why: a rank that is stopped, a rank that comes late. What has nothing to
wait for takes no CPU."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from ..process.jobs import Start

UP = """
import hpcray as ray
ray.init(num_cpus=1)

@ray.remote(scheduling_strategy="SPREAD")
def f():
    return ray.get_runtime_context().get_node_id()

while len(set(ray.get([f.remote() for _ in range(4)]))) < 2:
    pass
print("up", flush=True)
input()
print(len(ray.get([f.remote() for _ in range(4)])))
"""


def test_a_stopped_rank(start: Start):
    job = start(UP, ranks=2, pty=True)
    job.expect("up")
    pid = job.pid("node", 1)
    os.kill(pid, signal.SIGSTOP)
    try:
        job.expect(rf"Warning: nothing has been heard of rank 1 \(\S+, pid {pid}\) for 10 s",
                   timeout_s=30)
    finally:
        os.kill(pid, signal.SIGCONT)
    job.say("\n")
    job.finish()
    assert job.output.count("Warning") == 1


def test_a_rank_that_comes_late(start: Start):
    job = start("""
import os, time
import hpcray as ray
if "1" in (os.environ.get("OMPI_COMM_WORLD_RANK"), os.environ.get("PMI_RANK")):
    time.sleep(11)
ray.init(num_cpus=1)
print(len(ray.nodes()), "nodes")
""", ranks=2, bare=True)
    job.expect("the start has taken 10 s so far: rank 0 waits until all 2 ranks", timeout_s=30)
    job.expect("2 nodes")
    job.finish()


def test_a_stopped_rank_0_is_told_by_another_process(start: Start):
    """What people are told goes through node 0 and the driver: then somebody else speaks."""
    of_node = r"nothing has been heard of rank 0 \(\S+, pid {}\) for 10 s"
    of_driver = r"the driver \(pid {} on rank 0\) was stopped by a signal"
    jobs = {"node": (start(UP, ranks=3, pty=True), of_node),
            "driver": (start(UP, ranks=2, pty=True), of_driver)}
    pids = {}
    try:
        for role, (job, _) in jobs.items():
            job.expect("up")
            pids[role] = job.kill(role, 0 if role == "node" else None, signal.SIGSTOP)
        for role, (job, said) in jobs.items():
            job.expect("Warning: " + said.format(pids[role]), timeout_s=30)
    finally:
        for pid in pids.values():
            os.kill(pid, signal.SIGCONT)
    for job, _ in jobs.values():
        job.say("\n")
        job.finish()
        assert job.output.count("Warning") == 1, job.output


def test_an_idle_node_looks_at_mpi_rarely(start: Start):
    """Once in 10 ms, whatever the nodes tell each other to show that they are there. A look at
    every millisecond would take 2 to 4 % of a core."""
    def sleeps(pid: int) -> int:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])

    job = start(UP, ranks=2, pty=True)
    job.expect("up")
    pids = [job.pid("node", rank) for rank in range(2)]
    time.sleep(2.0)  # what has gone before is over
    began = [sleeps(pid) for pid in pids]
    time.sleep(3.0)
    counts = [sleeps(pid) - before for pid, before in zip(pids, began, strict=True)]
    job.say("\n")
    job.finish()
    assert all(20 < count < 450 for count in counts), counts
