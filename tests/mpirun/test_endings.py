"""A job that succeeded ends with status 0, however slow its parts are; one that hangs is named."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from ..process.jobs import Job, Start

HEAD = """
import os, sys, time
import hpcray as ray
from hpcray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

@ray.remote
def talk(lines):
    print("\\n".join(f"{i} " + "x" * 90 for i in range(lines)), flush=True)

ray.init(num_cpus=1)
on = [On(n["NodeID"], soft=False) for n in sorted(ray.nodes(), key=lambda n: n["Rank"])]
ray.get([talk.options(scheduling_strategy=there).remote(1) for there in on])
print("up", flush=True)
sys.stdin.readline()
"""


def later(seconds: float, action: object, *args: object) -> threading.Timer:
    timer = threading.Timer(seconds, action, args)  # type: ignore[arg-type]
    timer.start()
    return timer


def test_a_stopped_control_store_costs_nothing_but_the_record(start: Start):
    job = start(HEAD, ranks=2, pty=True)
    job.expect("^up")
    job.kill("server", number=signal.SIGSTOP)
    job.say("\n")
    job.finish()


def test_a_reader_that_pauses_is_waited_for(start: Start):
    """Longer than any process needs to end; nobody takes the wait for a rank that hangs."""
    job = start(HEAD + "ray.get(talk.options(scheduling_strategy=on[1]).remote(20_000))\n",
                ranks=2, pty=True)
    job.expect("^up")
    job.say("\n")
    time.sleep(8)
    output = job.finish()
    assert "19999 xxx" in output, "all of it arrives"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_pauses_is_waited_for(start: Start, rank: int):
    job = start(HEAD, ranks=2, pty=True)
    job.expect("^up")
    pid = job.kill("node", rank, signal.SIGSTOP)
    timer = later(4.0, os.kill, pid, signal.SIGCONT)
    job.say("\n")
    job.finish()
    timer.join()


def test_a_rank_that_stays_stopped_is_named_and_left(start: Start):
    job: Job = start(HEAD, ranks=3, pty=True)
    job.expect("^up")
    job.kill("node", 1, signal.SIGSTOP)
    job.say("\n")
    output = job.finish(status=None, timeout_s=60)
    assert "hpcray: rank 1 did not end with the job" in output
