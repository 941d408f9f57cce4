"""What waits for 10 s says why: a rank that is stopped, a rank that comes late."""

from __future__ import annotations

import os
import signal

from ..process.jobs import Start


def test_a_stopped_rank(start: Start):
    job = start("""
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
""", ranks=2, pty=True)
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
