"""Streams whose task runs on another rank than their consumer."""

from __future__ import annotations

from ..process.jobs import Start
from .test_objects_between_ranks import HEAD


def test_streams_from_another_rank(start: Start):
    job = start(HEAD + """
import asyncio

@ray.remote
def items(n, nbytes=0, die=""):
    for i in range(n):
        if i == 2 and die and not os.path.exists(die):
            open(die, "w").close()
            os._exit(1)
        yield np.full(nbytes, i, np.uint8) if nbytes else [i, ray.put(i)]

@ray.remote(_generator_backpressure_num_objects=2)
def counted(path):
    for i in range(6):
        with open(path, "a") as out:
            out.write(".")
        yield i

@ray.remote
class Async:
    async def items(self, n):
        for i in range(n):
            await asyncio.sleep(0)
            yield i

@ray.remote
def consume(n):
    return [ray.get(ref)[0] for ref in items.options(scheduling_strategy=on[0]).remote(n)]

def made(name):
    return os.path.getsize(mark(name)) if os.path.exists(mark(name)) else 0

start(num_cpus=2)
there = items.options(scheduling_strategy=on[1])
for ref, i in zip(there.remote(4), range(4), strict=True):
    value, inner = ray.get(ref)
    assert (value, ray.get(inner)) == (i, i)
for ref, i in zip(there.remote(4, 3_000_000), range(4), strict=True):
    assert (ray.get(ref) == i).all()
print("items", flush=True)
refs = list(there.remote(4, 200_000, mark("once")))
assert [int(ray.get(ref)[0]) for ref in refs] == [0, 1, 2, 3]
print("retried", flush=True)
paused = counted.options(scheduling_strategy=on[1]).remote(mark("count"))
for taken in range(6):
    while made("count") < min(taken + 2, 6):
        time.sleep(0.005)
    assert made("count") == min(taken + 2, 6)
    assert ray.get(next(paused)) == taken
assert list(paused) == []
print("window", flush=True)
actor = Async.options(scheduling_strategy=on[1]).remote()
assert ray.get(list(actor.items.remote(3))) == [0, 1, 2]
assert ray.get(consume.options(scheduling_strategy=on[1]).remote(3)) == [0, 1, 2]
dropped = counted.options(scheduling_strategy=on[1]).remote(mark("dropped"))
next(dropped)
del dropped
while made("dropped") < 6:
    time.sleep(0.005)
print("done", flush=True)
""", ranks=2)
    for line in ("items", "retried", "window", "done"):
        job.expect(f"^{line}$")
    job.finish()
