"""How a job ends that Slurm ends: one sentence, no traceback of ours, nothing left."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator

import pytest

from .cluster import Slurm, SlurmJob
from .conftest import Submit
from .test_launches import TWO

PENDING = """
import signal, time
import hpcray as ray

@ray.remote(num_cpus=0, scheduling_strategy="SPREAD")
class Waits:
    def ping(self):
        pass
    def forever(self):
        while True:
            time.sleep(0.05)

ray.init()
actors = [Waits.remote() for _ in range(4)]
ray.get([actor.ping.remote() for actor in actors])
refs = [actor.forever.remote() for actor in actors]
print("pending", flush=True)
"""
# How long Slurm takes to look for jobs that are over their limit, twice.
_LIMIT_S = 75.0


def said(output: str) -> list[str]:
    assert "Traceback" not in output and "hpcray/" not in output, output
    return re.findall("hpcray: .*$", output, re.M)


@pytest.fixture(scope="session", autouse=True)
def at_its_limit(slurm: Slurm, mpi_kind: str) -> Iterator[SlurmJob]:
    """A job whose time is up a second after it began; Slurm looks every half a minute, so it is
    begun before all other tests and looked at after them."""
    job = SlurmJob(slurm, PENDING + "ray.get(refs)\n", options=(*TWO, "--time=1"),
                   HPCRAY_SRUN_MPI=mpi_kind)
    try:
        job.expect("pending")
        slurm.ask("scontrol", "update", f"JobId={job.id}", "EndTime=now+1seconds", check=True)
        yield job
    finally:
        job.close()


@pytest.mark.parametrize("mpirun", [False, True])
def test_scancel(submit: Submit, mpirun: bool):
    job = submit(PENDING + "ray.get(refs)\n", options=TWO, HPCRAY_USE_MPIRUN=str(int(mpirun)))
    job.expect("pending")
    job.signal()
    output = job.finish(state="CANCELLED")
    sentences = said(output)
    assert len(sentences) == 1 and "the job ends: " in sentences[0], output
    assert f"scancel, the time limit or preemption of job {job.id}" in sentences[0]


def test_a_signal_before_the_end_reaches_the_driver(submit: Submit):
    """`--signal` is for programs that save what they have; workers and nodes take no notice."""
    job = submit(PENDING + """
class Soon(Exception):
    pass
def soon(number, frame):
    raise Soon
signal.signal(signal.SIGUSR1, soon)
print("ready", flush=True)
try:
    ray.get(refs)
except Soon:
    print("saved by", ray.get(ray.remote(lambda: 42).remote()), flush=True)
""", options=TWO)
    job.expect("ready")
    job.signal("--signal=USR1")
    assert "saved by 42" in job.finish()


def test_a_rank_that_is_told_to_end(submit: Submit):
    job = submit(PENDING + "ray.get(refs)\n", options=TWO)
    job.expect("pending")
    job.kill("node", 1, signal.SIGTERM)
    output = job.finish(state="FAILED")
    sentences = said(output)
    assert len(sentences) == 1 and "rank 1 (pid " in sentences[0], output
    assert "was told to end (SIGTERM)" in sentences[0]


def test_a_rank_that_is_killed(submit: Submit):
    """Slurm kills the whole step then. The driver may see before that its node is gone."""
    job = submit(PENDING + "ray.get(refs)\n", options=TWO)
    job.expect("pending")
    job.kill("node", 1)
    output = job.finish(state="FAILED", killed=True)
    assert len(re.findall(r"hpcray: rank 1 \(pid \d+ on \S+\) was killed by SIGKILL", output)) == 1
    assert "hpcray/" not in output, "no frames of ours"


def test_a_node_that_hangs_does_not_outlive_its_driver(submit: Submit):
    job = submit(PENDING + "ray.get(refs)\n", options=TWO, HPCRAY_END_TIMEOUT_S="1")
    job.expect("pending")
    job.kill("node", 0, signal.SIGSTOP)
    job.kill("driver")
    output = job.finish(state="FAILED", killed=True)
    assert "hangs: it has not ended 1 s after its driver has. It was killed" in output


def test_the_time_limit(at_its_limit: SlurmJob):
    output = at_its_limit.finish(timeout_s=_LIMIT_S, state="TIMEOUT")
    sentences = said(output)
    assert len(sentences) == 1 and "the job ends: " in sentences[0], output
    assert "time limit" in sentences[0]
