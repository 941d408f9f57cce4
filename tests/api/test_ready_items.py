"""What says that a value is there: `next_ready` of a stream, and a ref as a future of asyncio."""

from __future__ import annotations

import asyncio

import pytest


@pytest.fixture
def steps(make_gate):
    """(generator that waits at a gate before each of two items, the gates)."""
    gates = make_gate(), make_gate()
    entrances = [gate.enter for gate in gates]

    def steps():
        for i, enter in enumerate(entrances):
            enter()
            yield i

    return steps, gates


@pytest.mark.parametrize("kind", ["task", "actor"])
def test_a_stream_says_when_its_next_item_is_there(ray, steps, eventually, kind):
    function, gates = steps
    if kind == "task":
        stream = ray.remote(function).remote()
    else:
        @ray.remote
        class A:
            def steps(self):
                yield from function()

        actor = A.remote()
        stream = actor.steps.remote()
    for i, gate in enumerate(gates):
        gate.wait_for_arrivals()
        assert not stream.next_ready()
        gate.open()
        eventually(stream.next_ready)
        assert stream.next_ready()  # asking takes nothing
        assert ray.wait([stream], timeout=0) == ([stream], [])
        assert not stream.is_finished()
        assert ray.get(next(stream), timeout=0 if i else 20) == i
    assert list(stream) == []
    assert not stream.next_ready()


def test_several_items_are_ready_at_once(ray, eventually, gate):
    enter = gate.enter

    @ray.remote
    def numbers():
        for i in range(3):
            yield i
        yield enter(3)

    stream = numbers.remote()
    gate.wait_for_arrivals()
    for i in range(3):
        eventually(stream.next_ready)
        assert ray.get(next(stream), timeout=20) == i
    assert not stream.next_ready()
    gate.open()
    eventually(stream.next_ready)
    assert ray.get(next(stream), timeout=20) == 3


def test_an_error_is_an_item_that_is_ready(ray, eventually):
    @ray.remote
    def fails():
        raise ValueError("at once")
        yield

    stream = fails.remote()
    eventually(stream.next_ready)
    with pytest.raises(ValueError, match="at once"):
        ray.get(next(stream), timeout=20)


# --- as_future ------------------------------------------------------------------------------------


def test_as_future(ray, gate):
    enter = gate.enter

    async def main():
        there, late = ray.put("there"), ray.remote(enter).remote("late")
        future = late.as_future()
        assert asyncio.isfuture(future)
        assert await asyncio.wait_for(there.as_future(), 20) == "there"
        while not gate.arrivals():
            await asyncio.sleep(0.005)
        assert not future.done()
        called = []
        future.add_done_callback(called.append)
        gate.open()
        assert await asyncio.wait_for(future, 20) == "late"
        await asyncio.sleep(0)
        assert called == [future]
        assert await asyncio.wait_for(late.as_future(), 20) == "late"  # a second one

    asyncio.run(main())


def test_as_future_of_a_task_that_fails(ray):
    @ray.remote
    def fail():
        raise ValueError("failed")

    async def main():
        good = ray.remote(lambda: 1).remote()
        return await asyncio.wait_for(asyncio.gather(
            fail.remote().as_future(), good.as_future(), return_exceptions=True), 20)

    error, value = asyncio.run(main())
    assert value == 1
    assert isinstance(error, ValueError)
    assert isinstance(error, ray.exceptions.RayTaskError)


def test_as_future_in_an_async_actor(ray, gate):
    enter = gate.enter

    @ray.remote
    class A:
        async def first_of(self, box):
            futures = [ref.as_future() for ref in box]
            done, pending = await asyncio.wait(
                futures, timeout=20, return_when=asyncio.FIRST_COMPLETED)
            return [future.result() for future in done], len(pending)

    held = ray.remote(enter).remote()
    gate.wait_for_arrivals()
    actor = A.remote()
    assert ray.get(actor.first_of.remote([held, ray.put("there")]), timeout=30) == (["there"], 1)
    gate.open()
    ray.get(held, timeout=20)
