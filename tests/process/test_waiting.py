"""What waits for 10 s says why, once, on the driver's terminal."""

from __future__ import annotations

from .jobs import Start


def test_cpus_held_by_actors_and_a_stopped_process(start: Start):
    job = start("""
import os, signal, time
import hpcray as ray

ray.init(num_cpus=2)

@ray.remote(num_cpus=1)
class Keeper:
    def pid(self):
        return os.getpid()

@ray.remote
def late():
    return "came"

keepers = [Keeper.remote() for _ in range(2)]
pid = ray.get([keeper.pid.remote() for keeper in keepers])[0]
ref = late.remote()
os.kill(pid, signal.SIGSTOP)
call = keepers[0].pid.remote()
ready, _ = ray.wait([ref, call], timeout=14)
assert not ready
os.kill(pid, signal.SIGCONT)
assert ray.get(call) == pid
del keepers
print(ray.get(ref))
""")
    output = job.finish(timeout_s=40)
    assert output.count("task late has waited for 10 s for 1 CPU, held by actor Keeper x2.") == 1
    assert output.count("call Keeper.pid has not gone on for 10 s: its process (pid") == 1
    assert output.count("Warning") == 2
    assert output.rstrip().endswith("came")
