"""Actors: a class whose instance lives in a worker of its own."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import os
import threading

import pytest


@pytest.fixture
def Counter(ray):
    @ray.remote
    class Counter:
        def __init__(self, start=0, *, step=1):
            self.value = start
            self.step = step

        def add(self, n=1):
            self.value += n * self.step
            return self.value

        def get(self):
            return self.value

        def pid(self):
            return os.getpid()

    return Counter


def test_state_stays_between_calls(ray, Counter):
    counter = Counter.remote()
    assert ray.get([counter.add.remote() for _ in range(5)]) == [1, 2, 3, 4, 5]
    assert ray.get(counter.get.remote()) == 5


def test_constructor_arguments(ray, Counter):
    assert ray.get(Counter.remote(10).get.remote()) == 10
    assert ray.get(Counter.remote(start=3, step=2).add.remote(2)) == 7


def test_constructor_arguments_that_are_refs(ray, Counter):
    assert ray.get(Counter.remote(ray.put(10), step=ray.put(5)).add.remote()) == 15


def test_wrong_constructor_arguments_fail_at_the_call(Counter):
    with pytest.raises(TypeError, match="too many positional arguments"):
        Counter.remote(1, 2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        Counter.remote(z=1)


def test_wrong_method_arguments_fail_at_the_call(Counter):
    counter = Counter.remote()
    with pytest.raises(TypeError, match="too many positional arguments"):
        counter.add.remote(1, 2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        counter.add.remote(z=1)


def test_actors_are_separate_processes(ray, Counter):
    one, two = Counter.remote(), Counter.remote()
    pids = ray.get([one.pid.remote(), two.pid.remote(), one.pid.remote()])
    assert pids[0] == pids[2] != pids[1]
    assert os.getpid() not in pids


def test_more_actors_than_cpus(ray, Counter):
    actors = [Counter.remote(i) for i in range(5)]
    assert ray.get([a.get.remote() for a in actors]) == list(range(5))


def test_class_without_a_constructor(ray):
    @ray.remote
    class Plain:
        greeting = "hello"

        def greet(self):
            return self.greeting

    assert ray.get(Plain.remote().greet.remote()) == "hello"


def test_decorator_with_options(ray):
    @ray.remote(num_cpus=1, max_restarts=0)
    class A:
        def m(self):
            return 1

    a = A.remote()
    assert ray.get(a.m.remote()) == 1


def test_options_of_the_class(ray, Counter):
    counter = Counter.options(num_cpus=1, max_concurrency=1).remote(4)
    assert ray.get(counter.get.remote()) == 4


def test_remote_as_a_function(ray):
    class A:
        def m(self):
            return 1

    assert ray.get(ray.remote(A).remote().m.remote()) == 1
    assert ray.get(ray.remote(num_cpus=0)(A).remote().m.remote()) == 1
    assert A().m() == 1


def test_inheritance(ray):
    class Base:
        def __init__(self, x):
            self.x = x

        def base(self):
            return "base", self.x

        def both(self):
            return ["base"]

    class Mixin:
        def mixed(self):
            return "mixed"

    @ray.remote
    class Derived(Mixin, Base):
        def __init__(self, x):
            super().__init__(x + 1)

        def both(self):
            return [*super().both(), "derived"]

    derived = Derived.remote(1)
    assert ray.get(derived.base.remote()) == ("base", 2)
    assert ray.get(derived.both.remote()) == ["base", "derived"]
    assert ray.get(derived.mixed.remote()) == "mixed"


def test_static_and_class_methods(ray):
    @ray.remote
    class A:
        name = "A"

        @staticmethod
        def double(x):
            return 2 * x

        @classmethod
        def which(cls):
            return cls.name

    a = A.remote()
    assert ray.get([a.double.remote(2), a.which.remote()]) == [4, "A"]


def test_constants_and_static_methods_of_the_class(ray):
    @ray.remote
    class A:
        LIMIT = 3

        @staticmethod
        def double(x):
            return 2 * x

        @classmethod
        def limit(cls):
            return cls.LIMIT

    assert A.LIMIT == 3
    assert A.double(4) == 8
    assert A.limit() == 3
    with pytest.raises(AttributeError, match="no attribute 'none'"):
        A.none  # noqa: B018


def test_methods_with_names_that_classes_have(ray):
    @ray.remote
    class A:
        def __call__(self, x):
            return x

        def mro(self):
            return "mine"

    a = A.remote()
    assert ray.get(a.__call__.remote(5)) == 5
    assert ray.get(a.mro.remote()) == "mine"


def test_varargs_and_keywords_of_a_method(ray):
    @ray.remote
    class A:
        def m(self, a, b=2, *rest, c=3, **more):
            return a, b, rest, c, more

    a = A.remote()
    assert ray.get(a.m.remote(1)) == (1, 2, (), 3, {})
    assert ray.get(a.m.remote(1, 5, 6, c=7, z=8)) == (1, 5, (6,), 7, {"z": 8})


def test_method_decorator(ray):
    @ray.remote
    class A:
        @ray.method(num_returns=2)
        def two(self):
            return 1, 2

        @ray.method(num_returns=0)
        def none(self):
            return 1

        @ray.method()
        def empty(self):
            return "empty"

        @ray.method
        def bare(self):
            return "bare"

    a = A.remote()
    assert ray.get([a.empty.remote(), a.bare.remote()]) == ["empty", "bare"]
    first, second = a.two.remote()
    assert ray.get([second, first]) == [2, 1]
    assert a.none.remote() is None


def test_method_options(ray):
    @ray.remote
    class A:
        def two(self):
            return 1, 2

    a = A.remote()
    assert ray.get(a.two.options(num_returns=2).remote()) == [1, 2]
    assert ray.get(a.two.remote()) == (1, 2)


def test_method_with_the_wrong_number_of_returns(ray):
    @ray.remote
    class A:
        @ray.method(num_returns=2)
        def three(self):
            return 1, 2, 3

        def alive(self):
            return True

    a = A.remote()
    for ref in a.three.remote():
        with pytest.raises(ValueError, match="3.*num_returns=2"):
            ray.get(ref)
    assert ray.get(a.alive.remote())


def test_no_such_method(Counter):
    counter = Counter.remote()
    with pytest.raises(AttributeError, match="no_such_method"):
        counter.no_such_method.remote()


def test_attributes_are_not_reachable(Counter):
    with pytest.raises(AttributeError, match="value"):
        Counter.remote().value  # noqa: B018


def test_private_methods_can_be_called(ray):
    @ray.remote
    class A:
        def _hidden(self):
            return "hidden"

    assert ray.get(A.remote()._hidden.remote()) == "hidden"


def test_repr_of_a_handle(Counter):
    counter = Counter.remote()
    text = repr(counter)
    assert text.startswith("Actor(")
    assert "Counter, " in text
    assert counter._actor_id.hex() in text


def test_handles_are_equal_when_the_actor_is(ray, Counter):
    one, two = Counter.remote(), Counter.remote()
    (again,) = ray.get(ray.put([one]))
    assert again == one != two
    assert hash(again) == hash(one)
    assert len({one, again, two}) == 2


def test_handle_as_an_argument(ray, Counter):
    @ray.remote
    def add(counter, n):
        return ray.get(counter.add.remote(n))

    counter = Counter.remote()
    assert sorted(ray.get([add.remote(counter, 1) for _ in range(4)])) == [1, 2, 3, 4]


def test_handle_inside_containers_and_closures(ray, Counter):
    counter = Counter.remote()
    by_argument = ray.remote(lambda box: ray.get(box["c"][0].add.remote()))
    by_closure = ray.remote(lambda: ray.get(counter.add.remote()))
    assert ray.get(by_argument.remote({"c": [counter]})) == 1
    assert ray.get(by_closure.remote()) == 2


def test_handle_returned_from_a_task(ray, Counter):
    make = ray.remote(lambda: Counter.remote(7))
    counter = ray.get(make.remote())
    assert ray.get(counter.add.remote()) == 8


def test_actor_made_by_an_actor(ray, Counter):
    @ray.remote
    class Parent:
        def __init__(self):
            self.child = Counter.remote(1)

        def add(self):
            return ray.get(self.child.add.remote())

        def give(self):
            return self.child

    parent = Parent.remote()
    assert ray.get(parent.add.remote()) == 2
    assert ray.get(ray.get(parent.give.remote()).add.remote()) == 3


def test_tasks_from_an_actor(ray):
    @ray.remote
    class A:
        def fan_out(self, n):
            f = ray.remote(lambda i: i * i)
            return ray.get([f.remote(i) for i in range(n)])

    assert ray.get(A.remote().fan_out.remote(5)) == [0, 1, 4, 9, 16]


def test_actor_gives_out_its_own_handle(ray):
    @ray.remote
    class A:
        def me(self):
            return ray.get_runtime_context().current_actor

        def ping(self):
            return "pong"

    a = A.remote()
    me = ray.get(a.me.remote())
    assert me == a
    assert ray.get(me.ping.remote()) == "pong"


def test_two_actors_call_each_other(ray):
    @ray.remote
    class Player:
        def play(self, other, n):
            return 0 if n == 0 else 1 + ray.get(other.receive.remote(n - 1))

        def receive(self, n):
            return n

    one, two = Player.remote(), Player.remote()
    assert ray.get(one.play.remote(two, 5)) == 5


def test_method_call_with_refs(ray, Counter):
    counter = Counter.remote()
    first = counter.add.remote(ray.put(2))
    second = counter.add.remote(first)
    assert ray.get([first, second]) == [2, 4]


def test_result_of_an_actor_goes_to_a_task(ray, Counter):
    counter = Counter.remote(1)
    assert ray.get(ray.remote(lambda x: x * 10).remote(counter.add.remote())) == 20


def test_calls_made_before_the_actor_is_up(ray, gate):
    enter = gate.enter

    @ray.remote
    class Slow:
        def __init__(self):
            enter()

        def m(self, x):
            return x

    slow = Slow.remote()
    refs = [slow.m.remote(i) for i in range(10)]
    gate.wait_for_arrivals()
    assert ray.wait(refs, timeout=0.05)[0] == []
    gate.open()
    assert ray.get(refs) == list(range(10))


def test_actor_whose_arguments_are_late(ray, gate, Counter):
    enter = gate.enter
    counter = Counter.remote(ray.remote(enter).remote(5))
    ref = counter.add.remote()
    gate.open()
    assert ray.get(ref) == 6


def test_actor_ends_when_its_last_handle_goes(ray, Counter, eventually):
    counter = Counter.remote()
    pid = ray.get(counter.pid.remote())
    del counter
    gc.collect()
    eventually(lambda: not os.path.exists(f"/proc/{pid}"))


@pytest.mark.timeout(120)
def test_actors_whose_handles_are_in_cycles_make_room(cluster):
    """What waits for their CPU has Python's collector find them: here it does not run by itself."""
    import gc

    ray = cluster(num_cpus=1)

    @ray.remote(num_cpus=1)
    class Holder:
        def m(self):
            return "ok"

    @ray.remote(num_cpus=0)
    class Keeper:
        def keep(self, boxes):
            import gc

            gc.disable()
            boxes.append(boxes)

    gc.disable()
    try:
        for _ in range(2):
            cycle = [Holder.remote()]
            cycle.append(cycle)
            assert ray.get(cycle[0].m.remote(), timeout=40) == "ok"
            del cycle
        keeper = Keeper.remote()
        holder = Holder.remote()
        ray.get(keeper.keep.remote([holder]))  # in the cycle of an idle actor
        del holder
        assert ray.get(ray.remote(lambda: 5).remote(), timeout=40) == 5
    finally:
        gc.enable()


def test_queued_calls_run_before_a_dropped_actor_ends(ray, Counter, gate):
    enter = gate.enter

    @ray.remote
    class A:
        def hold(self):
            enter()

        def m(self, x):
            return x

    a = A.remote()
    a.hold.remote()
    refs = [a.m.remote(i) for i in range(10)]
    gate.wait_for_arrivals()
    del a
    gc.collect()
    gate.open()
    assert ray.get(refs, timeout=20) == list(range(10))


def test_handle_in_a_ref_keeps_the_actor(ray, Counter):
    counter = Counter.remote(1)
    ray.get(counter.get.remote())
    box = ray.put([counter])
    del counter
    gc.collect()
    assert ray.get(ray.get(box)[0].add.remote()) == 2


@pytest.mark.parametrize("submitted", ["before it died", "afterwards"])
def test_a_call_to_a_dead_actor_does_not_wait_for_its_arguments(ray, Counter, gate, submitted):
    counter = Counter.remote()
    assert ray.get(counter.get.remote()) == 0
    later = ray.remote(gate.enter).remote(1)
    refs = [counter.add.remote(later)] if submitted == "before it died" else []
    ray.kill(counter)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(refs[0] if refs else counter.add.remote(later), timeout=20)
    assert not ray.wait([later], timeout=0)[0]
    gate.open()
    assert ray.get(later) == 1


def test_exit_actor(ray, eventually):
    @ray.remote
    class A:
        def pid(self):
            return os.getpid()

        def leave(self):
            ray.actor.exit_actor()

    a = A.remote()
    pid = ray.get(a.pid.remote())
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(a.leave.remote())
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(a.pid.remote())
    eventually(lambda: not os.path.exists(f"/proc/{pid}"))


@pytest.mark.parametrize("options", [{"max_concurrency": 1}, {"max_concurrency": 2}],
                         ids=["sequential", "threaded"])
@pytest.mark.parametrize("thread", [False, True], ids=["same thread", "other thread"])
def test_exit_actor_ends_the_actor_whoever_catches_it(ray, eventually, options, thread):
    @ray.remote(**options)
    class A:
        def pid(self):
            return os.getpid()

        def leave(self):
            def leave():
                with contextlib.suppress(BaseException):
                    ray.actor.exit_actor()

            if not thread:
                return leave()
            leaving = threading.Thread(target=leave)
            leaving.start()
            leaving.join()

    a = A.remote()
    pid = ray.get(a.pid.remote())
    ray.wait([a.leave.remote()])
    eventually(lambda: not os.path.exists(f"/proc/{pid}"))
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(a.pid.remote())


@pytest.mark.ray_differs("Ray's actor waits for its next call before it ends")
def test_exit_actor_in_a_thread_of_an_idle_actor(ray, eventually):
    @ray.remote
    class A:
        def leave(self):
            threading.Timer(0.05, ray.actor.exit_actor).start()
            return os.getpid()

    a = A.remote()
    pid = ray.get(a.leave.remote())
    eventually(lambda: not os.path.exists(f"/proc/{pid}"))
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(a.leave.remote())


@pytest.mark.parametrize("awaited", [True, False])
def test_exit_actor_in_a_coroutine_of_a_method(ray, eventually, awaited):
    @ray.remote
    class A:
        async def pid(self):
            return os.getpid()

        async def leave(self):
            async def leave():
                ray.actor.exit_actor()

            self.task = asyncio.create_task(leave())
            if awaited:
                await asyncio.wait([self.task])

    a = A.remote()
    pid = ray.get(a.pid.remote())
    ray.wait([a.leave.remote()])
    eventually(lambda: not os.path.exists(f"/proc/{pid}"))
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(a.pid.remote())


@pytest.mark.parametrize(("way", "is_async"), [
    ("handle", False), ("exit_actor", False), ("terminate", False), ("kill", False),
    ("handle", True), ("terminate", True), ("kill", True),
    pytest.param("exit_actor", True, marks=pytest.mark.ray_differs("no `__del__` there")),
])
def test_what_a_graceful_end_calls(ray, eventually, tmp_path, way, is_async):
    trace = tmp_path / "trace"

    class A:
        def __init__(self):
            atexit.register(self.note, "atexit")

        @staticmethod
        def note(what):
            with open(trace, "a") as file:
                file.write(what + "\n")

        def pid(self):
            return os.getpid()

        def leave(self):
            ray.actor.exit_actor()

        def __ray_shutdown__(self):
            self.note("shutdown")
            raise ValueError("must not keep the others from running")

        def __del__(self):
            self.note("del")

    class Async(A):
        async def early(self):
            pass

    kind = ray.remote(Async if is_async else A)  # kept: Ray's is an A, and has its `__del__`
    a = kind.remote()
    pid = ray.get(a.pid.remote())
    if way == "exit_actor":
        ray.wait([a.leave.remote()])
    elif way == "terminate":
        ray.wait([a.__ray_terminate__.remote()])
    elif way == "kill":
        ray.kill(a)
    del a
    eventually(lambda: not os.path.exists(f"/proc/{pid}"))
    called = trace.read_text().split() if trace.exists() else []
    assert called == ([] if way == "kill" else ["shutdown", "del", "atexit"])


@pytest.fixture(params=["sequential", "async"])
def knows_itself(ray, request):
    class KnowsItself:
        def __init__(self):
            self.me = ray.get_runtime_context().current_actor

        def pid(self):
            return os.getpid()

        def give(self):
            return [self.me]

        def count_down(self, number, path):
            if number:
                self.me.count_down.remote(number - 1, path)
            else:
                open(path, "w").close()

    class Async(KnowsItself):
        async def early(self):
            pass

    return ray.remote(Async if request.param == "async" else KnowsItself)


def test_an_actor_does_not_keep_itself_alive(ray, knows_itself, eventually):
    actor = knows_itself.remote()
    pid = ray.get(actor.pid.remote())
    del actor
    eventually(lambda: not os.path.exists(f"/proc/{pid}"))


@pytest.mark.ray_differs("there it ends when the first handle goes")
def test_an_actor_s_handle_to_itself_is_one_to_others(ray, knows_itself, eventually):
    actor = knows_itself.remote()
    pid = ray.get(actor.pid.remote())
    inside = actor.give.remote()
    ray.wait([inside])
    del actor
    [given] = ray.get(inside)
    del inside
    assert ray.get(given.pid.remote()) == pid
    del given
    eventually(lambda: not os.path.exists(f"/proc/{pid}"))


@pytest.mark.hpcray_only("Ray's actor ends with the first of them")
def test_an_actor_lives_until_its_own_calls_are_over(ray, knows_itself, eventually, tmp_path):
    actor = knows_itself.remote()
    pid = ray.get(actor.pid.remote())
    actor.count_down.remote(20, str(tmp_path / "done"))
    del actor
    eventually(lambda: not os.path.exists(f"/proc/{pid}"))
    assert (tmp_path / "done").exists()


def test_constructor_of_an_async_actor_runs_in_its_loop(ray):
    @ray.remote
    class A:
        def __init__(self, ref):
            self.loop = asyncio.get_running_loop()
            self.ticks = 0
            self.task = asyncio.create_task(self.tick())
            self.value = ray.get(ref[0])

        async def tick(self):
            while True:
                self.ticks += 1
                await asyncio.sleep(0)

        async def look(self):
            while not self.ticks:
                await asyncio.sleep(0)
            return self.loop is asyncio.get_running_loop(), self.value

    assert ray.get(A.remote([ray.put(4)]).look.remote(), timeout=20) == (True, 4)


def test_constructor_of_an_async_actor_that_raises(ray):
    @ray.remote
    class A:
        def __init__(self):
            raise ValueError("no")

        async def m(self):
            pass

    with pytest.raises(ray.exceptions.ActorDiedError, match="ValueError: no") as caught:
        ray.get(A.remote().m.remote())
    assert "asyncio" not in str(caught.value)


def test_async_actor_interleaves(ray, signal):
    waiting = [signal.wait.remote() for _ in range(3)]
    assert ray.wait(waiting, timeout=0.05)[0] == []
    ray.get(signal.send.remote())
    assert ray.get(waiting) == [None] * 3


def test_async_method_awaits_refs(ray):
    f = ray.remote(lambda x: x + 1)

    @ray.remote
    class A:
        async def m(self, x):
            return await f.remote(x)

    a = A.remote()
    assert ray.get([a.m.remote(i) for i in range(5)]) == [1, 2, 3, 4, 5]


def test_async_method_error(ray):
    @ray.remote
    class A:
        async def fail(self):
            raise KeyError("async")

        async def ok(self):
            return 1

    a = A.remote()
    with pytest.raises(KeyError):
        ray.get(a.fail.remote())
    assert ray.get(a.ok.remote()) == 1


def test_threaded_actor_runs_calls_at_once(ray):
    @ray.remote(max_concurrency=3)
    class Threaded:
        def __init__(self):
            self.barrier = threading.Barrier(3)

        def meet(self):
            return self.barrier.wait(20) in range(3)

    threaded = Threaded.remote()
    assert ray.get([threaded.meet.remote() for _ in range(3)]) == [True] * 3


def test_sync_actor_runs_one_call_at_a_time(ray):
    @ray.remote
    class A:
        def __init__(self):
            self.inside = 0

        def m(self):
            self.inside += 1
            seen = self.inside
            ray.get(ray.put(1))  # even when it blocks
            self.inside -= 1
            return seen

    a = A.remote()
    assert set(ray.get([a.m.remote() for _ in range(50)])) == {1}


def test_generator_method(ray):
    @ray.remote
    class A:
        def count(self, n):
            for i in range(n):
                yield i

    assert [ray.get(ref) for ref in A.remote().count.remote(3)] == [0, 1, 2]


def test_max_pending_calls(ray, gate):
    enter = gate.enter

    @ray.remote(max_pending_calls=2)
    class A:
        def hold(self):
            enter()

    a = A.remote()
    refs = [a.hold.remote(), a.hold.remote()]
    with pytest.raises(ray.exceptions.PendingCallsLimitExceeded):
        for _ in range(10):
            refs.append(a.hold.remote())
    gate.open()
    ray.get(refs)
