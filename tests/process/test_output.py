"""What tasks print reaches the driver's terminal: all of it, soon, and named."""

from __future__ import annotations

import re

from .jobs import Start


def test_ten_thousand_lines_and_last_words(start: Start):
    job = start("""
import os, sys, time
import hpcray as ray

@ray.remote
def talk(n):
    for i in range(n):
        print("line", i)

@ray.remote(max_retries=0)
def die():
    sys.stderr.write("last words")
    os._exit(1)

ray.init(num_cpus=1)
ray.get(talk.remote(1))
began = time.monotonic()
ray.get(talk.remote(10_000))
print("took", time.monotonic() - began)
try:
    ray.get(die.remote())
except ray.exceptions.WorkerCrashedError:
    print("died")
""")
    output = job.finish()
    lines = re.findall(r"\(talk pid=\d+\) line (\d+)$", output, re.M)
    assert [int(n) for n in lines[1:]] == list(range(10_000))
    assert "last words" in output and "died" in output
    took = re.search(r"took ([\d.]+)", output)
    assert took is not None and float(took[1]) < 5


def test_the_same_line_from_many_workers_is_folded(start: Start):
    job = start("""
import time
import hpcray as ray

@ray.remote
class Talker:
    def talk(self):
        print("the same")
    def ready(self):
        return True

ray.init(num_cpus=4)
actors = [Talker.remote() for _ in range(4)]
ray.get([a.ready.remote() for a in actors])
ray.get([a.talk.remote() for a in actors])
""")
    output = job.finish()
    assert len(re.findall("the same", output)) == 2, output
    assert re.search(r"the same \[repeated 3x across cluster\]", output), output
