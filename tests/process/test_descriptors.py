"""Short of descriptors or processes: what fits lives, the rest waits or fails by name."""

from __future__ import annotations

from pathlib import Path

from .jobs import ROOT, Start

# Started again with low limits, for this process and what it starts.
HEAD = """
import os, resource, sys
if "limited" not in sys.argv:
    resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, LIMIT))
    os.execv(sys.executable, [sys.executable, sys.argv[0], "limited"])
import hpcray as ray

@ray.remote
def double(x):
    return 2 * x

@ray.remote(num_cpus=0)
class Small:
    def number(self):
        return 7
"""


def test_actors_beyond_the_descriptors_wait_and_tasks_go_on(start: Start) -> None:
    job = start("LIMIT = 300\n" + HEAD + """
ray.init(num_cpus=2)
actors = [Small.remote() for _ in range(100)]
calls = [actor.number.remote() for actor in actors]
assert ray.get([double.remote(x) for x in range(50)]) == [2 * x for x in range(50)]
live, rest = ray.wait(calls, num_returns=100, timeout=6)
print(len(live), "live", flush=True)
assert 10 < len(live) < 50 and ray.get(live) == [7] * len(live)
assert ray.get([double.remote(x) for x in range(50)]) == [2 * x for x in range(50)]
# A large message, and a segment, still have their descriptors.
assert len(ray.get(double.remote(bytes(2_000_000)))) == 4_000_000
# Killed ones make room for others.
index = {call: number for number, call in enumerate(calls)}
for call in live[:8]:
    ray.kill(actors[index[call]])
more, rest = ray.wait(rest, num_returns=8, timeout=60)
assert len(more) == 8 and ray.get(more) == [7] * 8
del actors, calls, rest, more, live
assert ray.get(double.remote(4)) == 8
print("done", flush=True)
""")
    output = job.finish(timeout_s=90)
    assert "done" in output
    assert output.count("cannot start another worker") == 1, output
    assert "ulimit -Hn" in output


def test_a_preload_that_crashes_is_told_and_left_out(start: Start, tmp_path: Path) -> None:
    (tmp_path / "crashing.py").write_text("import os; os._exit(9)")
    job = start("""
import hpcray as ray

@ray.remote
def double(x):
    return 2 * x

ray.init(preload=["crashing"])
print("got", ray.get(double.remote(1)), flush=True)
""", PYTHONPATH=f"{ROOT}:{tmp_path}")
    output = job.finish(timeout_s=60)
    assert "got 2" in output
    assert output.count("crashing is not preloaded: it exits with status 9") == 1, output
    assert "starting a new one" not in output
