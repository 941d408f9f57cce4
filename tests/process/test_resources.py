"""What a job takes from its host: descriptors, memory, ports, and room for another job."""

from __future__ import annotations

import os
import stat

import pytest

from .jobs import Start

LEAK = """
import os, sys
import numpy as np
import hpcray as ray

@ray.remote
def make(i):
    return np.full(200_000, i)

def counts():
    node = next(int(p) for p in os.listdir("/proc") if p.isdigit() and parent(p) == os.getpid()
                and "hpcray.node" in open(f"/proc/{p}/cmdline").read())
    return (len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{node}/fd")),
            memory_mb(os.getpid()), memory_mb(node))

def parent(pid):
    try:
        return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
    except OSError:
        return -1

def memory_mb(pid):
    # Without the segments: what the process itself has.
    for line in open(f"/proc/{pid}/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) // 1024

ray.init(num_cpus=2, object_store_memory=600_000_000)
"""


def test_tasks_with_large_results_leak_nothing(start: Start):
    job = start(LEAK + """
for round in range(4):
    for start in range(0, 100, 10):
        got = ray.get([make.remote(i) for i in range(start, start + 10)])
        assert [int(g[0]) for g in got] == list(range(start, start + 10))
    del got
    if round == 0:
        before = counts()
after = counts()
print(before, after)
assert after[0] <= before[0] + 1 and after[1] <= before[1] + 2
assert after[2] <= before[2] + 8 and after[3] <= before[3] + 8
""")
    job.finish()


def test_an_actor_forgets_the_callers_that_have_gone(start: Start):
    """It answers them through channels of their own, which are closed when they end."""
    job = start("""
import time
import hpcray as ray

@ray.remote
class Called:
    def ping(self):
        pass
    def known(self):
        from hpcray.client.process import current_client
        return sorted(current_client().core.direct._clients)

@ray.remote(max_calls=1)
def call(called):
    from hpcray.client.process import current_client
    number = current_client().number
    while number not in ray.get(called.known.remote()):
        ray.get(called.ping.remote())
    return number

ray.init(num_cpus=2)
called = Called.remote()
assert len({ray.get(call.remote(called)) for _ in range(8)}) == 8
deadline_s = time.monotonic() + 10
while set(ray.get(called.known.remote())) - {0}:
    assert time.monotonic() < deadline_s, ray.get(called.known.remote())
print("forgotten", flush=True)
""")
    assert "forgotten\n" in job.finish(timeout_s=60)


def test_a_caller_forgets_the_actors_that_have_gone(start: Start):
    """It calls them through channels of their own, which are closed when they end."""
    job = start("""
import time
import hpcray as ray
from hpcray.client.process import current_client

@ray.remote
class Called:
    def ping(self):
        pass

ray.init(num_cpus=2)
known = current_client().core.direct.actors
for number in range(8):
    called = Called.remote()
    deadline_s = time.monotonic() + 10
    while not known:
        ray.get(called.ping.remote())
        assert time.monotonic() < deadline_s
    if number % 2:
        ray.kill(called)
    del called
    while known:
        ray.get(ray.put(1))
        time.sleep(0.001)
        assert time.monotonic() < deadline_s
print("forgotten", flush=True)
""")
    assert "forgotten\n" in job.finish(timeout_s=60)


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.skipif(
    not os.environ.get("HPCRAY_TEST_SLOW"), reason="HPCRAY_TEST_SLOW=1 runs it"))])
def test_puts_leak_nothing(start: Start, count: int):
    job = start(LEAK + f"""
data = np.ones(10_000_000, np.uint8)
for i in range({count}):
    ref = ray.put(data)
    if i == 200:
        before = counts()
after = counts()
print(before, after)
assert after[0] <= before[0] + 1 and after[1] <= before[1] + 1
assert after[2] <= before[2] + 4 and after[3] <= before[3] + 4
""")
    job.finish(timeout_s=90)


def test_a_worker_that_computes_gives_back_the_memory_it_does_not_use(start: Start):
    job = start("""
import os
import numpy as np
import hpcray as ray

@ray.remote
class Maker:
    def make(self):
        return np.ones(100_000_000, np.uint8)
    def compute(self, until):
        open(until + "begun", "w").close()
        while not os.path.exists(until):
            pass

ray.init(num_cpus=1, object_store_memory=150_000_000)
maker = Maker.remote()
assert ray.get(maker.make.remote()).nbytes == 100_000_000
until = os.path.join(os.environ["TMPDIR"], "until")
busy = maker.compute.remote(until)
while not os.path.exists(until + "begun"):
    pass
ref = ray.put(np.ones(120_000_000, np.uint8))
print("room", flush=True)
open(until, "w").close()
ray.get(busy)
""")
    assert "room\n" in job.finish(timeout_s=60)


def test_room_that_was_freed_a_moment_ago_is_found(start: Start):
    """The drop and the put reach the node together: the owner hears of both, in this order."""
    job = start("""
import numpy as np
import hpcray as ray

@ray.remote
def make():
    return np.ones(100_000_000, np.uint8)

ray.init(num_cpus=1, object_store_memory=150_000_000)
for _ in range(3):
    ref = make.remote()
    assert ray.get(ref).nbytes == 100_000_000
    value = np.ones(120_000_000, np.uint8)
    del ref
    assert ray.get(ray.put(value)).nbytes == 120_000_000
print("room", flush=True)
""")
    assert "room\n" in job.finish(timeout_s=60)


def test_nobody_else_gets_in(start: Start):
    """On one host: no TCP port, a private directory, and a password on what is in it."""
    job = start("""
import sys
import hpcray as ray
ray.init()
assert ray.get(ray.remote(lambda: 1).remote()) == 1
print("up", flush=True)
sys.stdin.readline()
""", pty=True)
    job.expect("up")
    inodes = set()
    for member in job.members():
        for fd in os.listdir(f"/proc/{member.pid}/fd"):
            target = os.readlink(f"/proc/{member.pid}/fd/{fd}")
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    for table in ("tcp", "tcp6", "udp", "udp6"):
        with open(f"/proc/net/{table}") as file:
            ours = [line for line in file if line.split()[9] in inodes]
        assert not ours, ours
    with open("/proc/net/unix") as file:
        listening = [fields for fields in map(str.split, file)
                     if len(fields) > 6 and fields[6] in inodes and fields[3] == "00010000"]
    directories = list(job.directory.glob("hpcray-control-*"))
    assert len(directories) == 1
    assert stat.S_IMODE(directories[0].stat().st_mode) == 0o700
    # Named: the control store's only; no abstract one (they have no permissions).
    assert [fields[7] for fields in listening] == [str(directories[0] / "s")]
    redis = pytest.importorskip("redis")
    client = redis.Redis(unix_socket_path=str(directories[0] / "s"), socket_timeout=5)
    with pytest.raises(redis.exceptions.AuthenticationError):
        client.ping()
    client.close()
    for member in job.members():
        with open(f"/proc/{member.pid}/cmdline") as file:
            assert "requirepass" not in file.read()
    job.say("\n")
    job.finish()


def test_two_jobs_at_once(start: Start):
    source = """
import os, sys
import hpcray as ray
@ray.remote
class Counter:
    def __init__(self): self.n = 0
    def add(self):
        self.n += 1
        return self.n
ray.init(num_cpus=2)
counter = Counter.options(name="counter").remote()
assert ray.get([counter.add.remote() for _ in range(10)])[-1] == 10
print("up", flush=True)
sys.stdin.readline()
assert ray.get(ray.get_actor("counter").add.remote()) == 11
print("went on", flush=True)
"""
    first, second = start(source, pty=True), start(source, pty=True)
    first.expect("up")
    second.expect("up")
    first.kill("node")
    first.say("\n")
    first.finish(status=1)
    second.say("\n")
    second.expect("went on")
    second.finish()
