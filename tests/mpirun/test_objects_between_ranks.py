"""Objects, actors and tasks between two real ranks."""

from __future__ import annotations

import os

import pytest

from ..process.jobs import Start

HEAD = """
import os, sys, time
import numpy as np
import hpcray as ray
from hpcray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

def mark(name):
    return os.path.join(os.environ["TMPDIR"], name)

def start(**options):
    global on, ids
    ray.init(**options)
    ids = [n["NodeID"] for n in sorted(ray.nodes(), key=lambda n: n["Rank"])]
    on = [On(i, soft=False) for i in ids]
"""


@pytest.mark.parametrize("mapped", ["1", "0"])  # by the reader itself, or over MPI
def test_sizes_both_ways_and_refs_that_outlive_their_makers(start: Start, mapped: str):
    job = start(HEAD + """
@ray.remote
def make(n, salt):
    return (np.arange(n, dtype=np.uint32) * salt).astype(np.uint8)

@ray.remote
def check(data, n, salt):
    assert data.nbytes == n and not data.flags.writeable or n < 200_000
    expected = (np.arange(n, dtype=np.uint32) * salt).astype(np.uint8)
    return bool((data == expected).all())

@ray.remote
def nested(salt):
    inner = ray.put((np.arange(300_000, dtype=np.uint32) * salt).astype(np.uint8))
    return {"big": inner, "small": ray.put(salt), "task": make.options(
        scheduling_strategy=On(ray.get_runtime_context().get_node_id(), False)).remote(5, 3)}

@ray.remote
class Holder:
    def make(self, salt):
        return [ray.put((np.arange(300_000, dtype=np.uint32) * salt).astype(np.uint8))]

start(num_cpus=2, object_store_memory=500_000_000)
KIB = 1 << 10
for salt, n in enumerate([1, 100 * KIB - 1, 100 * KIB, 100 * KIB + 1, 4096 * KIB - 1, 4096 * KIB,
                          4096 * KIB + 1, 65536 * KIB], 1):
    for a, b in ((0, 1), (1, 0)):
        ref = make.options(scheduling_strategy=on[a]).remote(n, salt)
        assert ray.get(check.options(scheduling_strategy=on[b]).remote(ref, n, salt)), (n, a, b)
        del ref
print("sizes", flush=True)
mine = ray.put(np.arange(3_000_000, dtype=np.uint8))
assert ray.get(check.options(scheduling_strategy=on[1]).remote(mine, 3_000_000, 1))

found = ray.get(nested.options(scheduling_strategy=on[1]).remote(7))
# By now that worker has run other things, and no process over there names these refs.
ray.get([make.options(scheduling_strategy=on[1]).remote(10, 1) for _ in range(10)])
for rank in (0, 1):
    assert ray.get(check.options(scheduling_strategy=on[rank]).remote(found["big"], 300_000, 7))
assert ray.get(found["small"]) == 7 and ray.get(found["task"]).tolist() == [0, 3, 6, 9, 12]
holder = Holder.options(scheduling_strategy=on[1]).remote()
[kept] = ray.get(holder.make.remote(9))
ray.kill(holder)
assert ray.get(check.remote(kept, 300_000, 9))
print("refs", flush=True)
""", ranks=2, HPCRAY_MAP_PEERS=mapped)
    job.expect("^sizes$")
    job.expect("^refs$")
    job.finish()


@pytest.mark.skipif(not os.environ.get("HPCRAY_TEST_SLOW"), reason="HPCRAY_TEST_SLOW=1 runs it")
@pytest.mark.parametrize("mapped", ["1", "0"])
def test_an_object_of_more_than_4_gib(start: Start, mapped: str):
    """16 GiB of memory are needed: two copies, and the store's own room."""
    job = start(HEAD + """
BYTES = (4 << 30) + 12_345
PLACES = (0, (2 << 30) - 1, 2 << 30, (4 << 30) - 1, 4 << 30, BYTES - 1)

@ray.remote(max_retries=0)
def make(salt):
    data = np.zeros(BYTES, np.uint8)  # memory for the pages that are written only
    data[list(PLACES)] = np.arange(salt, salt + len(PLACES))
    return data

@ray.remote(max_retries=0)
def look(data):
    return data.nbytes, data[list(PLACES)].tolist(), int(np.count_nonzero(data))

start(num_cpus=1, object_store_memory=5 << 30)
for salt, (a, b) in ((1, (0, 0)), (2, (1, 0)), (3, (0, 1))):
    ref = make.options(scheduling_strategy=on[a]).remote(salt)
    expected = (BYTES, list(range(salt, salt + len(PLACES))), len(PLACES))
    assert ray.get(look.options(scheduling_strategy=on[b]).remote(ref), timeout=100) == expected
    del ref
    print("moved", a, b, flush=True)
mine = ray.get(ray.put(make.__wrapped__(7)))
assert mine.nbytes == BYTES and mine[list(PLACES)].tolist() == list(range(7, 7 + len(PLACES)))
""", ranks=2, HPCRAY_MAP_PEERS=mapped)
    job.finish(timeout_s=110)


def test_what_found_no_room_is_there_once_there_is(start: Start):
    """That there was no room for a copy is the answer of one `get`, and no value."""
    job = start(HEAD + """
@ray.remote
def make(n):
    return np.ones(n, np.uint8)

start(num_cpus=1, object_store_memory=150_000_000)
kept = ray.get(ray.put(np.zeros(100_000_000, np.uint8)))
ref = make.options(scheduling_strategy=on[1]).remote(100_000_000)
for get in (lambda: ray.get(ref), lambda: ray.get([ref, ref]), lambda: ref.future().result()):
    try:
        get()
        print("no error")
    except ray.exceptions.ObjectStoreFullError as error:
        assert "from rank 1 does not fit" in str(error), error
del kept
assert int(ray.get(ref).sum()) == 100_000_000
print("there")
""", ranks=2)
    output = job.finish()
    assert "there" in output and "no error" not in output


def test_an_object_larger_than_the_store_is_an_error(start: Start):
    job = start(HEAD + """
@ray.remote(max_retries=0)
def make(n):
    return np.ones(n, np.uint8)

start(num_cpus=1, object_store_memory=150_000_000)
for rank in (0, 1):
    try:
        ray.get(make.options(scheduling_strategy=on[rank]).remote(400_000_000), timeout=20)
        print("no error")
    except ray.exceptions.ObjectStoreFullError as error:
        print("full", rank, str(error).splitlines()[-1], flush=True)
    except ray.exceptions.RayTaskError as error:
        assert isinstance(error, ray.exceptions.ObjectStoreFullError), repr(error)
        print("full", rank, flush=True)
try:
    ray.put(np.ones(400_000_000, np.uint8))
    print("no error")
except ray.exceptions.ObjectStoreFullError as error:
    print("full put", flush=True)
assert int(ray.get(make.options(scheduling_strategy=on[1]).remote(50_000_000)).sum()) == 50_000_000
print("still works")
# What a worker has made and nobody needs is room for what is pulled, even while it computes.
@ray.remote
def compute():
    open(mark("begun"), "w").close()
    while not os.path.exists(mark("until")):
        pass
for round in range(3):
    assert ray.get(make.options(scheduling_strategy=on[0]).remote(100_000_000)).nbytes
busy = compute.options(scheduling_strategy=on[0]).remote()
while not os.path.exists(mark("begun")):
    pass
assert ray.get(make.options(scheduling_strategy=on[1]).remote(100_000_000)).nbytes == 100_000_000
open(mark("until"), "w").close()
ray.get(busy)
print("room")
""", ranks=2)
    output = job.finish(timeout_s=60)
    assert "no error" not in output
    for line in ("full 0", "full 1", "full put", "still works", "room"):
        assert line in output


def test_actors_order_and_placement(start: Start):
    job = start(HEAD + """
@ray.remote
class Log:
    def __init__(self):
        self.seen = []
    def add(self, who, i):
        self.seen.append((who, i))
    def all(self):
        return self.seen, ray.get_runtime_context().get_node_id()

@ray.remote
def call(log, who, n):
    for i in range(n):
        log.add.remote(who, i)
    return ray.get(log.all.remote())[1]

@ray.remote
def where():
    return ray.get_runtime_context().get_node_id()

start(num_cpus=2)
log = Log.options(scheduling_strategy=on[1]).remote()
calls = [call.options(scheduling_strategy=on[r]).remote(log, f"task{r}", 300) for r in (0, 1)]
for i in range(300):
    log.add.remote("driver", i)
assert ray.get(calls) == [ids[1]] * 2
seen, node = ray.get(log.all.remote())
assert node == ids[1]
for who in ("driver", "task0", "task1"):
    assert [i for w, i in seen if w == who] == list(range(300)), who

for rank in (0, 1):
    for soft in (False, True):
        there = where.options(scheduling_strategy=On(ids[rank], soft))
        assert ray.get([there.remote() for _ in range(20)]) == [ids[rank]] * 20
nowhere = "f" * len(ids[0])
assert ray.get(where.options(scheduling_strategy=On(nowhere, True)).remote()) in ids
try:
    ray.get(where.options(scheduling_strategy=On(nowhere, False)).remote(), timeout=10)
    print("ran nowhere")
except ray.exceptions.GetTimeoutError:
    print("hangs")
except (ray.exceptions.RayError, ValueError) as error:
    print("refused", type(error).__name__)
""", ranks=2)
    output = job.finish(timeout_s=60)
    assert "refused" in output, output


def test_sleeping_tasks_spread_near_the_ideal(start: Start):
    job = start(HEAD + """
import random

@ray.remote
def nap(s):
    time.sleep(s)
    return ray.get_runtime_context().get_node_id()

start(num_cpus=4)
@ray.remote
class Gate:
    pass
naps = [random.Random(i).uniform(0.001, 0.020) for i in range(2_000)]
ray.get([nap.remote(0.05) for _ in range(64)])  # workers exist on every rank
began = time.monotonic()
where = ray.get([nap.remote(s) for s in naps])
took = time.monotonic() - began
ideal = sum(naps) / 16
counts = sorted(where.count(i) for i in ids)
print(f"took {took:.2f} ideal {ideal:.2f} counts {counts}")
assert all(counts), counts  # every rank takes part; benchmarks/makespan.py measures how evenly
assert took < 2.5 * ideal + 0.5, (took, ideal)
""", ranks=4)
    job.finish(timeout_s=60)


def test_an_actor_elsewhere_that_has_a_handle_to_itself(start: Start):
    """It ends with the last handle of others, and not before: its home is another rank."""
    job = start(HEAD + """
@ray.remote
class A:
    def __init__(self):
        self.me = ray.get_runtime_context().current_actor
    def pid(self):
        return os.getpid()
    def give(self):
        return [self.me]
    def count_down(self, number):
        if number:
            self.me.count_down.remote(number - 1)
        else:
            open(mark("counted"), "w").close()

@ray.remote
def ask(handles):
    return ray.get(handles[0].pid.remote())

def ends(pid):
    deadline_s = time.monotonic() + 20
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline_s, "it lives on"
        time.sleep(0.01)

start(num_cpus=2)
for last in ("given", "asked", "counted"):
    a = A.options(scheduling_strategy=on[1]).remote()
    pid = ray.get(a.pid.remote())
    if last == "counted":
        a.count_down.remote(20)
    inside = a.give.remote()
    ray.wait([inside])
    del a
    [given] = ray.get(inside)
    del inside
    if last == "asked":
        assert ray.get([ask.options(scheduling_strategy=on[r]).remote([given])
                        for r in (0, 1)]) == [pid, pid]
    assert ray.get(given.pid.remote()) == pid
    del given
    ends(pid)
assert os.path.exists(mark("counted"))
print("ended", flush=True)
""", ranks=2)
    assert "ended\n" in job.finish(timeout_s=60)


@pytest.mark.skipif(not os.environ.get("HPCRAY_TEST_SLOW"), reason="HPCRAY_TEST_SLOW=1 runs it")
def test_30_000_values_that_another_rank_wants_at_once(start: Start):
    """6 GiB of memory are needed: 1.8 GB at the home, at the other node and in its worker."""
    start(HEAD + """
@ray.remote
def total(*lists):
    refs = [ref for some in lists for ref in some]
    return sum(map(len, ray.get(refs)))

def peaks():  # of the nodes' memory, in bytes
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.environ["TMPDIR"] in open(f"/proc/{pid}/environ").read() and (
                    "hpcray.node" in open(f"/proc/{pid}/cmdline").read()):
                status = open(f"/proc/{pid}/status").read()
                found.append(int(status.split("VmHWM:")[1].split()[0]) * 1024)
        except OSError:
            pass
    return found

start(num_cpus=1, object_store_memory=40_000_000_000)
refs = [ray.put(b"x" * 60_000) for _ in range(30_000)]
lists = [ray.put(refs[i : i + 2000]) for i in range(0, 30_000, 2000)]
assert ray.get(total.options(scheduling_strategy=on[1]).remote(*lists)) == 30_000 * 60_000
assert max(peaks()) < 2_300_000_000, "the values are there once"
""", ranks=2).finish(timeout_s=150)
