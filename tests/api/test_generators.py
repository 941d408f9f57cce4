"""Generator tasks and methods: streams, dynamic lists, fixed numbers of returns."""

from __future__ import annotations

import asyncio
import gc

import pytest


def numbers(ray, **options):
    def count(n, bad=None):
        for i in range(n):
            if i == bad:
                raise ValueError("mid")
            yield i

    return ray.remote(**options)(count) if options else ray.remote(count)


def test_what_a_stream_is(ray):
    stream = numbers(ray).remote(3)
    assert isinstance(stream, ray.ObjectRefGenerator)
    assert iter(stream) is stream
    assert ray.get(stream) is stream
    ref = next(stream)
    assert isinstance(ref, ray.ObjectRef)
    assert ray.get(ref) == 0
    assert not stream.is_finished()
    assert ray.get(list(stream)) == [1, 2]
    with pytest.raises(StopIteration):
        next(stream)
    assert stream.is_finished()
    assert not stream.next_ready()
    assert ray.get(stream.completed()) is None


def test_a_stream_of_nothing(ray):
    assert list(numbers(ray).remote(0)) == []


def test_large_items(ray):
    @ray.remote
    def arrays():
        import numpy

        for i in range(4):
            yield numpy.full(1_000_000, i, dtype=numpy.uint8)

    for i, ref in enumerate(arrays.remote()):
        value = ray.get(ref)
        assert value.nbytes == 1_000_000
        assert (value == i).all()


def test_items_are_used_before_the_task_ends(ray, gate):
    enter = gate.enter

    @ray.remote
    def two():
        yield 1
        enter()
        yield 2

    double = ray.remote(lambda x: 2 * x)
    stream = two.remote()
    assert ray.get(double.remote(next(stream))) == 2
    gate.wait_for_arrivals()
    assert not stream.next_ready()
    assert not stream.is_finished()
    assert ray.wait([stream], timeout=0) == ([], [stream])
    gate.open()
    assert ray.get(double.remote(next(stream))) == 4


def test_items_outlive_their_stream(ray):
    stream = numbers(ray).remote(5)
    kept = [next(stream), next(stream)]
    del stream
    gc.collect()
    assert ray.get(kept) == [0, 1]


def test_refs_inside_items(ray):
    @ray.remote
    def nested():
        for i in range(3):
            yield [ray.put(i), {"k": ray.put([i])}]

    for i, ref in enumerate(nested.remote()):
        inner, more = ray.get(ref)
        assert ray.get(inner) == i
        assert ray.get(more["k"]) == [i]


def test_arguments_may_be_refs(ray):
    assert ray.get(list(numbers(ray).remote(ray.put(2)))) == [0, 1]


def test_a_failed_argument_is_the_only_item(ray):
    @ray.remote
    def boom():
        raise KeyError("first")

    refs = list(numbers(ray).remote(boom.remote()))
    assert len(refs) == 1
    with pytest.raises(KeyError):
        ray.get(refs[0])


def test_an_item_that_cannot_be_pickled_is_the_last(ray):
    @ray.remote
    def odd():
        import threading

        yield 1
        yield threading.Lock()
        yield 3

    good, bad = odd.remote()
    assert ray.get(good) == 1
    with pytest.raises(TypeError, match="pickle"):
        ray.get(bad)


def test_a_generator_that_waits_for_tasks(cluster):
    ray = cluster(num_cpus=1)
    child = ray.remote(lambda x: x + 1)

    @ray.remote
    def parents():
        for i in range(3):
            yield ray.get(child.remote(i))

    assert ray.get(list(parents.remote())) == [1, 2, 3]


def test_a_task_consumes_a_stream(ray):
    count = numbers(ray)

    @ray.remote
    def consume(n):
        return [ray.get(ref) for ref in count.remote(n)]

    assert ray.get(consume.remote(4)) == [0, 1, 2, 3]


def test_a_stream_stays_in_its_process(ray):
    stream = numbers(ray).remote(2)
    with pytest.raises(TypeError):
        ray.put(stream)
    with pytest.raises(TypeError):
        numbers(ray).remote(stream)
    for method in (stream.send, stream.throw):
        with pytest.raises(NotImplementedError):
            method(ValueError())
    with pytest.raises(NotImplementedError):
        stream.close()


# --- errors ---------------------------------------------------------------------------------------


def test_an_exception_is_the_last_item(ray):
    stream = numbers(ray).remote(5, 2)
    refs = list(stream)
    assert ray.get(refs[:2]) == [0, 1]
    assert len(refs) == 3
    with pytest.raises(ValueError, match="mid"):
        ray.get(refs[2])


@pytest.mark.ray_differs("Ray's completion says None of a generator that raised")
def test_the_completion_knows_the_exception(ray):
    stream = numbers(ray).remote(5, 2)
    with pytest.raises(ValueError, match="mid"):
        ray.get(stream.completed())


def test_a_dead_worker_is_the_last_item(ray):
    @ray.remote(max_retries=0)
    def dies():
        import os

        yield 1
        os._exit(1)

    first, last = dies.remote()
    assert ray.get(first) == 1
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(last)


def test_a_retried_stream_goes_on_where_it_was(ray, tmp_path):
    path = str(tmp_path / "once")

    @ray.remote(max_retries=1)
    def dies_once():
        import os

        yield 0
        yield 1
        if not os.path.exists(path):
            open(path, "w").close()
            os._exit(1)
        yield 2

    assert ray.get(list(dies_once.remote())) == [0, 1, 2]


def test_retried_for_an_exception(ray, counter):
    add = counter.add

    @ray.remote(max_retries=3, retry_exceptions=True)
    def flaky():
        yield 0
        if add() < 3:
            raise RuntimeError("again")
        yield 1

    assert ray.get(list(flaky.remote())) == [0, 1]
    assert counter.value == 3


@pytest.mark.ray_differs("Ray's cancelled stream may end without an item")
def test_cancel_of_a_running_stream(ray, gate):
    enter = gate.enter

    @ray.remote
    def holds():
        yield 1
        enter()
        yield 2

    stream = holds.remote()
    first = next(stream)
    gate.wait_for_arrivals()
    ray.cancel(stream)
    gate.open()
    assert ray.get(first) == 1
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(next(stream))
    with pytest.raises(StopIteration):
        next(stream)


def test_cancel_of_a_queued_stream(cluster, gate):
    ray = cluster(num_cpus=1)
    enter = gate.enter
    held = ray.remote(enter).remote()
    gate.wait_for_arrivals()
    stream = numbers(ray).remote(3)
    ray.cancel(stream)
    (ref,) = stream
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(ref)
    gate.open()
    ray.get(held)


# --- waiting --------------------------------------------------------------------------------------


def test_wait_takes_streams_and_refs(ray, gate):
    enter = gate.enter

    @ray.remote
    def late():
        yield enter(1)

    blocked, quick, ref = late.remote(), numbers(ray).remote(1), ray.put(5)
    gate.wait_for_arrivals()
    waitables = [blocked, quick, ref]
    ready, rest = ray.wait(waitables, num_returns=2, timeout=20)
    assert (ready, rest) == ([quick, ref], [blocked])
    gate.open()
    assert ray.wait([blocked], timeout=20) == ([blocked], [])
    assert ray.get(next(blocked)) == 1


def test_a_stream_at_its_end_is_ready(ray):
    stream = numbers(ray).remote(1)
    list(stream)
    assert ray.wait([stream], timeout=20) == ([stream], [])


def test_async_iteration(ray):
    count = numbers(ray)

    async def consume(n):
        return [await ref async for ref in count.remote(n)]

    async def both():
        return await asyncio.gather(consume(3), consume(5))

    assert asyncio.run(both()) == [[0, 1, 2], [0, 1, 2, 3, 4]]


def test_async_iteration_lets_others_run(ray, gate):
    enter = gate.enter

    @ray.remote
    def late():
        yield enter(1)

    async def main():
        stream = late.remote()
        item = asyncio.ensure_future(stream.__anext__())
        while not gate.arrivals():
            await asyncio.sleep(0.01)
        assert not item.done()
        gate.open()
        return await (await item)

    assert asyncio.run(main()) == 1


# --- back-pressure --------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3])
def test_a_window_holds_the_task_back(ray, counter, eventually, window):
    add = counter.add

    @ray.remote(_generator_backpressure_num_objects=window)
    def counted():
        for i in range(8):
            add()
            yield i

    stream = counted.remote()
    for taken in range(8):
        made = min(taken + window, 8)
        eventually(lambda made=made: counter.value == made)
        assert ray.get(next(stream)) == taken
    assert list(stream) == []


@pytest.mark.ray_differs("Ray's paused generator keeps its CPU")
def test_a_paused_task_gives_its_cpu_back(cluster):
    ray = cluster(num_cpus=1)
    stream = numbers(ray, _generator_backpressure_num_objects=1).remote(3)
    first = next(stream)
    assert ray.get(ray.remote(lambda x: x).remote(first)) == 0
    assert ray.get(list(stream)) == [1, 2]


def test_a_dropped_stream_runs_to_its_end(ray, counter, eventually):
    add = counter.add

    @ray.remote(_generator_backpressure_num_objects=1)
    def counted():
        for i in range(5):
            add()
            yield i

    stream = counted.remote()
    next(stream)
    del stream
    eventually(lambda: counter.value == 5)


@pytest.mark.parametrize("window", [
    0, pytest.param(-2, marks=pytest.mark.ray_differs("Ray takes any negative number"))])
def test_windows_that_cannot_be(ray, window):
    with pytest.raises(ValueError, match="_generator_backpressure_num_objects"):
        numbers(ray).options(_generator_backpressure_num_objects=window).remote(1)


def test_no_window(ray):
    stream = numbers(ray).options(_generator_backpressure_num_objects=-1).remote(3)
    assert ray.get(list(stream)) == [0, 1, 2]


def test_cancel_of_a_paused_stream(ray, counter, eventually):
    add = counter.add

    @ray.remote(_generator_backpressure_num_objects=1)
    def counted():
        for i in range(5):
            add()
            yield i

    stream = counted.remote()
    assert ray.get(next(stream)) == 0
    eventually(lambda: counter.value == 2)
    ray.cancel(stream)
    refs = list(stream)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(refs[-1])
    assert counter.value <= 3


@pytest.mark.parametrize("concurrency", [1, 2])
def test_cancel_of_a_paused_stream_of_an_actor(ray, counter, eventually, concurrency):
    add = counter.add

    @ray.remote(max_concurrency=concurrency)
    class Source:
        def items(self):
            for i in range(5):
                add()
                yield i

        def call(self):
            return "free"

    source = Source.remote()
    stream = source.items.options(_generator_backpressure_num_objects=1).remote()
    assert ray.get(next(stream)) == 0
    eventually(lambda: counter.value == 2)
    ray.cancel(stream)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(stream.completed(), timeout=30)
    assert ray.get(source.call.remote(), timeout=30) == "free"
    assert counter.value == 2


# --- other numbers of returns ---------------------------------------------------------------------


def test_dynamic(ray):
    refs = ray.get(numbers(ray).options(num_returns="dynamic").remote(3))
    assert len(refs) == 3
    assert [ray.get(ref) for ref in refs] == [0, 1, 2]


def test_dynamic_with_an_exception(ray):
    refs = list(ray.get(numbers(ray, num_returns="dynamic").remote(3, 1)))
    assert len(refs) == 2
    assert ray.get(refs[0]) == 0
    with pytest.raises(ValueError, match="mid"):
        ray.get(refs[1])


def test_a_fixed_number(ray):
    count = numbers(ray, num_returns=3)
    assert ray.get(count.remote(3)) == [0, 1, 2]
    refs = count.remote(3, 1)
    assert ray.get(refs[0]) == 0
    for ref in refs[1:]:
        with pytest.raises(ValueError, match="mid"):
            ray.get(ref)


def test_fewer_than_the_fixed_number(ray):
    refs = numbers(ray, num_returns=3).remote(2)
    assert ray.get(refs[:2]) == [0, 1]
    with pytest.raises(ValueError, match="num_returns=3"):
        ray.get(refs[2])


def test_one_return_is_the_first_item(ray):
    assert ray.get(numbers(ray, num_returns=1).remote(2)) == 0


def test_none_means_a_stream(ray):
    stream = numbers(ray).options(num_returns=None).remote(2)
    assert ray.get(list(stream)) == [0, 1]


@pytest.mark.parametrize("count", ["streaming", "dynamic"])
def test_only_generators_stream(ray, count):
    def plain():
        return [1, 2]

    with pytest.raises(ValueError, match="generator"):
        ray.remote(num_returns=count)(plain)
    with pytest.raises(ValueError, match="generator"):

        class A:
            @ray.method(num_returns=count)
            def plain(self):
                return [1, 2]


# --- methods --------------------------------------------------------------------------------------


@pytest.fixture
def actors(ray):
    class Plain:
        def count(self, n, bad=None):
            for i in range(n):
                if i == bad:
                    raise ValueError("mid")
                yield i

        @ray.method(num_returns=2)
        def two(self):
            yield 1
            yield 2

        def ping(self):
            return "pong"

    class Async(Plain):
        async def count(self, n, bad=None):
            for i in range(n):
                await asyncio.sleep(0)
                if i == bad:
                    raise ValueError("mid")
                yield i

    return {
        "sequential": ray.remote(Plain), "threaded": ray.remote(max_concurrency=4)(Plain),
        "asyncio": ray.remote(Async),
    }


@pytest.mark.parametrize("kind", ["sequential", "threaded", "asyncio"])
def test_methods(ray, actors, kind):
    actor = actors[kind].remote()
    streams = [actor.count.remote(n) for n in range(4)]
    assert [ray.get(list(stream)) for stream in streams] == [[], [0], [0, 1], [0, 1, 2]]
    refs = list(actor.count.remote(3, 1))
    assert ray.get(refs[0]) == 0
    with pytest.raises(ValueError, match="mid"):
        ray.get(refs[1])
    assert ray.get(actor.two.remote()) == [1, 2]
    assert ray.get(actor.ping.remote()) == "pong"


@pytest.mark.parametrize("kind", [
    "sequential", "threaded",
    pytest.param("asyncio", marks=pytest.mark.ray_differs("Ray's async methods cannot"))])
def test_dynamic_methods(ray, actors, kind):
    actor = actors[kind].remote()
    assert len(ray.get(actor.count.options(num_returns="dynamic").remote(3))) == 3


@pytest.mark.parametrize("kind", ["threaded", "asyncio"])
def test_a_window_of_a_method(ray, actors, kind):
    actor = actors[kind].remote()
    stream = actor.count.options(_generator_backpressure_num_objects=1).remote(4)
    assert ray.get(next(stream)) == 0
    assert ray.get(actor.ping.remote()) == "pong"  # the paused call does not hold the others
    assert ray.get(list(stream)) == [1, 2, 3]


@pytest.mark.ray_differs("Ray's stream may end without what it had yielded")
def test_an_actor_that_dies_in_mid_stream(ray):
    @ray.remote
    class A:
        def dies(self):
            import os

            yield 1
            os._exit(1)

    actor = A.remote()
    first, last = actor.dies.remote()
    assert ray.get(first) == 1
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(last)


@pytest.mark.hpcray_only("the objects a node has are not seen from outside in Ray")
def test_nothing_is_left_of_streams(ray, eventually):
    """Items taken and not, of streams that ended, were dropped early or failed."""
    from hpcray.client import process

    def objects():
        gc.collect()
        return process.current_client().request("statistics")["objects"]

    before = objects()

    @ray.remote
    def large(n, bad=None):
        for i in range(n):
            if i == bad:
                raise ValueError
            yield bytes(200_000)

    for n, taken in ((5, 5), (5, 2), (5, 0), (0, 0)):
        stream = large.remote(n)
        for _ in range(taken):
            ray.get(next(stream))
        del stream
    stream = large.remote(5, 3)
    next(stream)
    del stream
    eventually(lambda: objects() <= before)


def test_many_items(ray):
    stream = numbers(ray).remote(2000)
    assert [ray.get(ref) for ref in stream] == list(range(2000))


def test_its_refs_are_arguments(ray):
    add = ray.remote(lambda *values: sum(values))
    assert ray.get(add.remote(*numbers(ray).remote(4))) == 6
    pairs = zip(numbers(ray).remote(2), numbers(ray).remote(2), strict=True)
    assert [ray.get([a, b]) for a, b in pairs] == [[0, 0], [1, 1]]


def test_a_stream_that_passes_another_on(ray):
    inner = numbers(ray)

    @ray.remote(num_cpus=0)
    def values(n):
        for ref in inner.remote(n):
            yield ray.get(ref) * 10

    @ray.remote(num_cpus=0)
    def refs(n):
        for ref in inner.remote(n):
            yield ref

    assert [ray.get(ref) for ref in values.remote(3)] == [0, 10, 20]
    assert [ray.get(ray.get(ref)) for ref in refs.remote(2)] == [0, 1]


def test_wait_in_a_loop_gives_the_stream_itself(ray):
    stream = numbers(ray).remote(3)
    todo, got = [stream], []
    while todo:
        ready, todo = ray.wait(todo, timeout=20)
        assert ready == [stream] and ready[0] is stream
        try:
            got.append(ray.get(next(stream)))
            todo.append(stream)
        except StopIteration:
            pass
    assert got == [0, 1, 2]


def test_an_exception_may_be_an_item(ray):
    def give():
        yield None
        yield 1

    assert ray.get(list(ray.remote(give).remote())) == [None, 1]

    def leave():
        yield 1
        raise StopIteration

    items = list(ray.remote(leave).remote())
    assert ray.get(items[0]) == 1
    with pytest.raises(RuntimeError):
        ray.get(items[1])


def test_streams_of_an_async_actor(ray):
    @ray.remote
    class Async:
        async def count(self, n):
            for i in range(n):
                await asyncio.sleep(0)
                yield i

        async def endless(self):
            i = 0
            while True:
                await asyncio.sleep(0.01)
                yield (i := i + 1)

        async def ask(self):
            return 1

    actor = Async.remote()
    one, two = actor.count.remote(3), actor.count.remote(3)
    assert ray.get(list(one)) == ray.get(list(two)) == [0, 1, 2]
    stream = actor.endless.remote()
    next(stream)
    ray.cancel(stream)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        for ref in stream:
            ray.get(ref)
    assert ray.get(actor.ask.remote()) == 1
    stream = actor.endless.remote()
    next(stream)
    ray.kill(actor)
    with pytest.raises(ray.exceptions.ActorDiedError):
        for ref in stream:
            ray.get(ref)
