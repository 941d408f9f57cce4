"""Queue: between driver, tasks and coroutines; blocking, limits, and its end."""

from __future__ import annotations

import asyncio
import importlib
import queue
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def module(ray: ModuleType) -> ModuleType:
    return importlib.import_module(f"{ray.__name__}.util.queue")


@pytest.fixture
def make_queue(module: ModuleType) -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def make(*args: Any, **kwargs: Any) -> Any:
        made.append(module.Queue(*args, **kwargs))
        return made[-1]

    yield make
    for one in made:
        if one.actor is not None:
            one.shutdown(force=True)


def test_first_in_first_out(make_queue: Any) -> None:
    q = make_queue()
    for item in range(10):
        q.put(item)
    assert (len(q), q.size(), q.qsize()) == (10, 10, 10)
    assert [q.get() for _ in range(10)] == list(range(10))
    assert q.empty() and not q.full()


def test_errors_are_those_of_the_standard_library(module: ModuleType) -> None:
    assert issubclass(module.Empty, queue.Empty)
    assert issubclass(module.Full, queue.Full)


def test_limits(make_queue: Any, module: ModuleType) -> None:
    q = make_queue(maxsize=1)
    with pytest.raises(module.Empty):
        q.get_nowait()
    with pytest.raises(module.Empty):
        q.get(timeout=0.05)
    q.put("a")
    assert q.full()
    with pytest.raises(module.Full):
        q.put_nowait("b")
    with pytest.raises(module.Full):
        q.put("b", timeout=0.05)
    with pytest.raises(ValueError):
        q.put("b", timeout=-1)
    with pytest.raises(ValueError):
        q.get(timeout=-1)
    assert q.get_nowait() == "a"


def test_none_is_an_item(make_queue: Any) -> None:
    q = make_queue()
    q.put(None)
    assert q.get(timeout=5) is None


def test_get_waits_for_a_put_elsewhere(make_queue: Any, ray: ModuleType) -> None:
    q, answers = make_queue(), make_queue()

    @ray.remote
    def echo() -> None:
        answers.put(q.get() + 1)

    ref = echo.remote()
    q.put(41)
    assert answers.get(timeout=20) == 42
    ray.get(ref)


def test_put_waits_for_room(make_queue: Any, ray: ModuleType) -> None:
    q = make_queue(1)

    @ray.remote
    def fill() -> None:
        for item in range(5):
            q.put(item)

    ref = fill.remote()
    assert [q.get(timeout=20) for _ in range(5)] == list(range(5))
    ray.get(ref)


def test_batches(make_queue: Any, module: ModuleType) -> None:
    q = make_queue(maxsize=3)
    q.put_nowait_batch([1, 2])
    with pytest.raises(module.Full):
        q.put_nowait_batch([3, 4])
    with pytest.raises(module.Empty):
        q.get_nowait_batch(3)
    assert q.get_nowait_batch(2) == [1, 2]
    assert q.get_nowait_batch(0) == []
    for wrong, error in ((-1, ValueError), ("1", TypeError)):
        with pytest.raises(error):
            q.get_nowait_batch(wrong)
    with pytest.raises(TypeError):
        q.put_nowait_batch(1)


def test_coroutines(make_queue: Any, module: ModuleType) -> None:
    q = make_queue(1)

    async def both() -> list[Any]:
        got = [asyncio.ensure_future(q.get_async(timeout=20)) for _ in range(3)]
        for item in range(3):
            await q.put_async(item)
        values = await asyncio.gather(*got)
        with pytest.raises(module.Empty):
            await q.get_async(block=False)
        await q.put_async(1)
        with pytest.raises(module.Full):
            await q.put_async(1, timeout=0.05)
        return values

    assert sorted(asyncio.run(both())) == [0, 1, 2]


@pytest.mark.ray_differs("in Ray the coroutine that is gone takes the next item")
def test_a_cancelled_coroutine_takes_nothing(make_queue: Any) -> None:
    q, full = make_queue(), make_queue(1)
    full.put("first")

    async def give_up() -> None:
        for waiting in (q.get_async(), full.put_async("second")):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(waiting, 0.1)

    asyncio.run(give_up())
    q.put(1)
    assert q.get(timeout=5) == 1
    assert full.get(timeout=5) == "first"
    assert full.size() == 0


def test_actor_options(make_queue: Any, ray: ModuleType) -> None:
    make_queue(actor_options={"name": "the queue"}).put(1)
    assert ray.get_actor("the queue") is not None


@pytest.mark.parametrize("force", [True, False])
def test_shutdown(make_queue: Any, ray: ModuleType, force: bool) -> None:
    q = make_queue()
    q.put(1)
    actor = q.actor
    q.shutdown(force=force)
    assert q.actor is None
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(actor.__ray_ready__.remote(), timeout=20)


@pytest.mark.ray_differs("Ray raises AttributeError")
def test_use_after_shutdown(make_queue: Any) -> None:
    q = make_queue()
    q.shutdown(force=True)
    q.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        q.put(1)
