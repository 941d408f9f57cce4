"""What an actor may run at once and hold while it lives, and ends that no restart follows."""

from __future__ import annotations

import asyncio
import gc
import os
import threading

import pytest

# --- how many calls run at once -------------------------------------------------------------------


def test_an_async_actor_runs_as_many_calls_as_it_may(ray, counter, tmp_path):
    add, go = counter.add, str(tmp_path / "go")

    @ray.remote(max_concurrency=3)
    class A:
        def __init__(self):
            self.inside = self.peak = 0

        async def m(self):
            self.inside += 1
            self.peak = max(self.peak, self.inside)
            add()
            while not os.path.exists(go):
                await asyncio.sleep(0.005)
            for _ in range(20):  # whoever may come in comes now
                await asyncio.sleep(0)
            self.inside -= 1
            return self.peak

    a = A.remote()
    refs = [a.m.remote() for _ in range(12)]
    assert ray.wait(refs, timeout=0.3)[0] == []
    while counter.value < 3:
        assert ray.wait(refs, timeout=0.05)[0] == []
    assert counter.value == 3
    open(go, "w").close()
    assert set(ray.get(refs, timeout=20)) == {3}
    assert counter.value == 12


def test_a_threaded_actor_runs_as_many_calls_as_it_may(ray, gate):
    enter = gate.enter

    @ray.remote(max_concurrency=3)
    class A:
        def __init__(self):
            self.lock = threading.Lock()
            self.inside = self.peak = 0

        def m(self):
            with self.lock:
                self.inside += 1
                self.peak = max(self.peak, self.inside)
            enter()
            with self.lock:
                self.inside -= 1
                return self.peak

    a = A.remote()
    refs = [a.m.remote() for _ in range(12)]
    gate.wait_for_arrivals(3)
    assert ray.wait(refs, timeout=0.3)[0] == []
    assert gate.arrivals() == 3
    gate.open()
    assert set(ray.get(refs, timeout=20)) == {3}


def test_an_async_actor_runs_a_thousand_calls_unless_told_otherwise(ray, counter, eventually):
    add = counter.add

    @ray.remote
    class A:
        def __init__(self):
            self.event = asyncio.Event()
            self.inside = 0

        async def wait(self):
            self.inside += 1
            add()
            await self.event.wait()

        async def release(self):
            self.event.set()
            return self.inside

    a = A.remote()
    waiting = [a.wait.remote() for _ in range(1000)]
    release = a.release.remote()
    eventually(lambda: counter.value == 1000)
    assert ray.wait([release], timeout=0.2)[0] == []  # the 1001st
    ray.cancel(waiting[500])
    assert ray.get(release, timeout=20) == 1000
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(waiting.pop(500), timeout=20)
    assert ray.get(waiting, timeout=20) == [None] * 999


# --- what it holds --------------------------------------------------------------------------------


@pytest.fixture
def Device(cluster):
    ray = cluster(num_cpus=2, num_gpus=2)

    @ray.remote(num_cpus=0, num_gpus=1)
    class Device:
        def ids(self):
            return ray.get_runtime_context().get_accelerator_ids()

        def all_say(self):
            return (ray.get_gpu_ids(), os.environ["CUDA_VISIBLE_DEVICES"],
                    ray.get_runtime_context().get_assigned_resources())

    return ray, Device


def test_an_actor_keeps_its_gpu(Device, eventually):
    ray, Device = Device
    first, second = Device.remote(), Device.remote()
    held = ray.get([first.ids.remote(), second.ids.remote()], timeout=20)
    assert sorted(ids["GPU"] for ids in held) == [["0"], ["1"]]
    assert ray.get(first.ids.remote(), timeout=20) == held[0]
    (device,) = held[0]["GPU"]
    ids, visible, resources = ray.get(first.all_say.remote(), timeout=20)
    assert [str(i) for i in ids] == [device]
    assert visible == device
    assert resources["GPU"] == 1
    eventually(lambda: ray.available_resources().get("GPU", 0) == 0)
    third = Device.remote().ids.remote()
    assert ray.wait([third], timeout=0.3)[0] == []
    ray.kill(first)
    assert ray.get(third, timeout=20) == held[0]


def test_actors_share_a_gpu(Device):
    ray, Device = Device
    halves = [Device.options(num_gpus=0.5).remote() for _ in range(4)]
    found = ray.get([half.ids.remote() for half in halves], timeout=20)
    assert sorted(ids["GPU"] for ids in found) == [["0"], ["0"], ["1"], ["1"]]


def test_an_actor_holds_several_gpus_or_none(Device):
    ray, Device = Device
    none = Device.options(num_gpus=0).remote()
    assert ray.get(none.ids.remote(), timeout=20)["GPU"] == []
    both = Device.options(num_gpus=2).remote()
    assert sorted(ray.get(both.ids.remote(), timeout=20)["GPU"]) == ["0", "1"]


def test_an_actor_holds_its_memory(cluster, eventually):
    ray = cluster(num_cpus=2)
    total = ray.cluster_resources()["memory"]
    demand = int(total * 0.6)

    @ray.remote(num_cpus=0, memory=demand)
    class A:
        def m(self):
            return ray.get_runtime_context().get_assigned_resources()

    first = A.remote()
    assert ray.get(first.m.remote(), timeout=20)["memory"] == demand
    eventually(lambda: abs(ray.available_resources()["memory"] - (total - demand)) <= 1)
    second = A.remote()
    waiting = second.m.remote()
    assert ray.wait([waiting], timeout=0.3)[0] == []
    ray.kill(first)
    assert ray.get(waiting, timeout=20)["memory"] == demand
    ray.kill(second)
    eventually(lambda: abs(ray.available_resources()["memory"] - total) <= 1)


# --- its end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sequential", "threaded", "asyncio"])
@pytest.mark.parametrize("way", ["exit_actor", "terminate"])
def test_an_actor_that_leaves_is_not_restarted(ray, counter, eventually, way, kind):
    add = counter.add

    class A:
        def __init__(self):
            add()

        def pid(self):
            return os.getpid()

        def leave(self):
            ray.actor.exit_actor()

    class Async(A):
        async def leave(self):
            ray.actor.exit_actor()

    options = {"max_concurrency": 2} if kind == "threaded" else {"num_cpus": 0}
    actor = ray.remote(max_restarts=-1, max_task_retries=-1, **options)(
        Async if kind == "asyncio" else A).remote()
    pid = ray.get(actor.pid.remote(), timeout=20)
    left = actor.leave.remote() if way == "exit_actor" else actor.__ray_terminate__.remote()
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(left, timeout=20)
    eventually(lambda: not os.path.exists(f"/proc/{pid}"))
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(actor.pid.remote(), timeout=20)
    assert counter.value == 1


@pytest.mark.parametrize("named", [False, True])
def test_queued_calls_run_before_a_dropped_threaded_actor_ends(ray, gate, eventually, named):
    enter = gate.enter

    @ray.remote(max_concurrency=2)
    class A:
        def hold(self):
            enter()
            return os.getpid()

        def m(self, x):
            return x

    if named:
        A = A.options(name="drains", get_if_exists=True)
    handles = [A.remote()]
    if named:
        handles.append(A.remote())
        assert handles[0] == handles[1]
    held = [handles[-1].hold.remote() for _ in range(2)]
    refs = [handles[-1].m.remote(i) for i in range(20)]
    gate.wait_for_arrivals(2)
    handles.clear()
    gc.collect()
    # (In Ray, a few may come before the second that holds.)
    assert ray.wait(refs, num_returns=20, timeout=0.1)[1] != []
    gate.open()
    assert ray.get(refs, timeout=20) == list(range(20))
    (pid,) = set(ray.get(held, timeout=20))
    eventually(lambda: not os.path.exists(f"/proc/{pid}"))


# --- what every actor answers ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sequential", "threaded", "asyncio"])
def test_any_function_is_called_with_the_instance(ray, kind):
    class A:
        def __init__(self):
            self.values = [1]

        def get(self):
            return self.values

    class Async(A):
        async def other(self):
            pass

    options = {"max_concurrency": 2} if kind == "threaded" else {"num_cpus": 0}
    actor = ray.remote(**options)(Async if kind == "asyncio" else A).remote()

    def extend(self, *more, twice=False):
        self.values += [*more, *more] if twice else more
        return len(self.values), os.getpid()

    length, pid = ray.get(actor.__ray_call__.remote(extend, 2, ray.put(3), twice=True), timeout=20)
    assert length == 5
    assert pid != os.getpid()
    assert ray.get(actor.get.remote(), timeout=20) == [1, 2, 3, 2, 3]
    with pytest.raises(ZeroDivisionError):
        ray.get(actor.__ray_call__.remote(lambda self: 1 // 0), timeout=20)
    assert ray.get(actor.__ray_call__.remote(lambda self: type(self).__name__), timeout=20) == (
        "Async" if kind == "asyncio" else "A")


@pytest.mark.parametrize("kind", ["sequential", "threaded", "asyncio"])
def test_ready_once_it_is_constructed(ray, gate, kind):
    enter = gate.enter

    class A:
        def __init__(self):
            enter()

        def m(self):
            pass

    class Async(A):
        async def m(self):
            pass

    options = {"max_concurrency": 2} if kind == "threaded" else {"num_cpus": 0}
    actor = ray.remote(**options)(Async if kind == "asyncio" else A).remote()
    ready = actor.__ray_ready__.remote()
    gate.wait_for_arrivals()
    assert ray.wait([ready], timeout=0.2)[0] == []
    gate.open()
    assert ray.get(ready, timeout=20)


def test_ready_fails_with_the_constructor(ray):
    @ray.remote
    class A:
        def __init__(self):
            raise ValueError("never")

    with pytest.raises(ray.exceptions.RayActorError, match="never"):
        ray.get(A.remote().__ray_ready__.remote(), timeout=20)
