"""Queue, ActorPool, multiprocessing.Pool and Executor whose workers are on two real ranks."""

from __future__ import annotations

from ..process.jobs import Start
from .test_core_between_ranks import HEAD


def test_queue_and_actor_pool(start: Start):
    job = start(HEAD + """
from hpcray.util import ActorPool
from hpcray.util.queue import Empty, Full, Queue

@ray.remote(num_cpus=0)
def produce(queue, who, n):
    for i in range(n):
        queue.put((who, i), timeout=WAIT_S)
    return my_rank()

@ray.remote(num_cpus=0)
def consume(queue, n):
    return my_rank(), [queue.get(timeout=WAIT_S) for _ in range(n)]

@ray.remote(num_cpus=0)
def where(queue):
    return ray.get(queue.actor.__ray_call__.remote(lambda self: my_rank()))

@ray.remote(num_cpus=0)
def ask(queue):
    found = []
    for kind, call in ((Full, lambda: queue.put_nowait(0)),
                       (Full, lambda: queue.put(0, timeout=0.05)),
                       (Full, lambda: queue.put_nowait_batch([1, 2])),
                       (Empty, lambda: queue.get_nowait_batch(9))):
        try:
            found.append(call())
        except kind as error:
            found.append(kind)
    return found, len(queue), queue.full()

start(num_cpus=2)
queue = Queue(3, actor_options={"scheduling_strategy": on[1]})
assert [ray.get(where.options(scheduling_strategy=s).remote(queue), timeout=WAIT_S)
        for s in on] == [1, 1]
COUNT = 60  # of items of each of two producers, through three places
consumers = [consume.options(scheduling_strategy=s).remote(queue, COUNT) for s in on]
producers = [produce.options(scheduling_strategy=on[r]).remote(queue, r, COUNT) for r in (0, 1)]
assert ray.get(producers, timeout=WAIT_S) == [0, 1]
taken = ray.get(consumers, timeout=WAIT_S)
assert [rank for rank, _ in taken] == [0, 1]
for who in (0, 1):
    own = [[i for w, i in items if w == who] for _, items in taken]
    assert sorted(own[0] + own[1]) == list(range(COUNT)), own
    assert all(part == sorted(part) for part in own), own
assert queue.empty()
queue.put_nowait_batch(["a", "b", "c"])
for strategy in on:
    found = ray.get(ask.options(scheduling_strategy=strategy).remote(queue), timeout=WAIT_S)
    assert found == ([Full, Full, Full, Empty], 3, True), found
assert queue.get_nowait_batch(3) == ["a", "b", "c"]
# One that waits over there gets what is put here later.
waiting = consume.options(scheduling_strategy=on[0]).remote(queue, 1)
assert ray.wait([waiting], timeout=0.2)[0] == []
queue.put("late")
assert ray.get(waiting, timeout=WAIT_S) == (0, ["late"])
waiting = consume.options(scheduling_strategy=on[0]).remote(queue, 1)
assert ray.wait([waiting], timeout=0.2)[0] == []
queue.shutdown(force=True)
failure(ray.exceptions.ActorDiedError, waiting)
print("queue", flush=True)

@ray.remote(num_cpus=0)
class Worker:
    def square(self, value):
        return value * value, my_rank()
    def meet(self, value):
        add("met")
        until(lambda: count("met") >= 4)
        return value, my_rank()
    def die(self):
        os._exit(1)

workers = [Worker.options(scheduling_strategy=s).remote() for s in on * 2]
pool = ActorPool(workers)
# None returns before all four, two on each rank, are at it.
met = list(pool.map(lambda a, v: a.meet.remote(v), range(4)))
assert [v for v, _ in met] == [0, 1, 2, 3] and sorted(r for _, r in met) == [0, 0, 1, 1], met
found = list(pool.map(lambda a, v: a.square.remote(v), range(50)))
assert [v for v, _ in found] == [i * i for i in range(50)]
assert {rank for _, rank in found} == {0, 1}
found = list(pool.map_unordered(lambda a, v: a.square.remote(v), range(50)))
assert sorted(v for v, _ in found) == [i * i for i in range(50)]
mortal = ActorPool([workers[1]])  # on rank 1
mortal.submit(lambda a, _: a.die.remote(), None)
try:
    mortal.get_next(timeout=WAIT_S)
    print("no error")
except ray.exceptions.ActorDiedError:
    pass
mortal.push(workers[3])
mortal.submit(lambda a, v: a.square.remote(v), 5)
assert mortal.get_next(timeout=WAIT_S) == (25, 1)
print("actor pool", flush=True)
""", ranks=2)
    output = job.finish(timeout_s=60)
    assert "no error" not in output
    for line in ("queue", "actor pool"):
        assert f"{line}\n" in output, output


def test_pools_of_processes(start: Start):
    job = start(HEAD + """
import concurrent.futures
from hpcray.futures import Executor
from hpcray.util.multiprocessing import Pool

def meet(name, value, parties=4):
    add(name)
    until(lambda: count(name) >= parties)
    return value, my_rank()

def square(value):
    return value * value, my_rank(), os.getpid()

def fail(value):
    raise KeyError(f"value {value} on {my_rank()}")

def kept(value):
    return value, SETTING

def initialize(setting):
    global SETTING
    SETTING = setting
    add("initialized")

def ranks(results):
    return sorted(result[1] for result in results)

start(num_cpus=2)
# A CPU for each of the four processes: two on each rank. None returns before all are at it.
with Pool(4, initialize, ("set",), ray_remote_args={"num_cpus": 1}) as pool:
    assert count("initialized") == 4
    met = pool.starmap(meet, [("pool", i) for i in range(4)], chunksize=1)
    assert [v for v, _ in met] == [0, 1, 2, 3] and ranks(met) == [0, 0, 1, 1], met
    assert pool.map(kept, range(20)) == [(i, "set") for i in range(20)]
    found = list(pool.imap(square, range(40), chunksize=3))
    assert [v for v, *_ in found] == [i * i for i in range(40)]
    found = list(pool.imap_unordered(square, range(40)))
    assert sorted(v for v, *_ in found) == [i * i for i in range(40)]
    try:
        pool.map(fail, [7], chunksize=1)
        print("no error")
    except KeyError as error:
        assert str(error).startswith("'value 7 on "), error
        assert "in fail" in str(error.__cause__), error.__cause__
    ends = [pool.apply_async(os._exit, (1,)) for _ in range(4)]
    for end in ends:
        try:
            end.get(WAIT_S)
            print("no error")
        except ray.exceptions.ActorDiedError:
            pass
    met = pool.starmap(meet, [("replaced", i) for i in range(4)], chunksize=1)
    assert ranks(met) == [0, 0, 1, 1] and count("initialized") == 8, met
pool.join()
until(lambda: ray.available_resources().get("CPU") == 4)
with Pool(2, ray_remote_args={"scheduling_strategy": on[1]}) as pool:
    assert {rank for _, rank, _ in pool.map(square, range(20))} == {1}
pool.join()
print("pool", flush=True)

with Executor() as executor:
    met = [executor.submit(meet, "executor", i) for i in range(4)]
    met = [future.result(WAIT_S) for future in met]
    assert [v for v, _ in met] == [0, 1, 2, 3] and ranks(met) == [0, 0, 1, 1], met
    for chunksize in (1, 7):
        found = list(executor.map(square, range(200), chunksize=chunksize, timeout=WAIT_S))
        assert [v for v, *_ in found] == [i * i for i in range(200)]
with Executor(max_workers=1, scheduling_strategy=on[1]) as executor:
    assert {r for _, r, _ in executor.map(square, range(20), timeout=WAIT_S)} == {1}
    error = executor.submit(fail, 8).exception(WAIT_S)
    assert type(error) is KeyError and error.args == ("value 8 on 1",), error
    assert isinstance(error.__cause__, ray.exceptions.TaskError) and error.__cause__.rank == 1
    assert "rank=1" in str(error.__cause__) and "in fail" in str(error.__cause__)
    running = executor.submit(meet, "held", 9, 2)
    until(lambda: count("held") == 1)
    queued = executor.submit(meet, "cancelled", 0, 1)
    assert not running.cancel() and queued.cancel()
    add("held")
    assert running.result(WAIT_S) == (9, 1)
assert count("cancelled") == 0

@ray.remote
def nested():
    with Executor(scheduling_strategy=on[0]) as executor:
        return my_rank(), {r for _, r, _ in executor.map(square, range(10), timeout=WAIT_S)}

assert ray.get(nested.options(scheduling_strategy=on[1]).remote(), timeout=WAIT_S) == (1, {0})
print("executor", flush=True)
""", ranks=2)
    output = job.finish(timeout_s=60)
    assert "no error" not in output
    for line in ("pool", "executor"):
        assert f"{line}\n" in output, output
