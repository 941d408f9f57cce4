"""ActorPool: what is promised about order, errors and which actors are free."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def make_pool(ray: ModuleType) -> Any:
    @ray.remote(num_cpus=0)
    class Worker:
        def double(self, value: int) -> int:
            return 2 * value

        def fail(self, value: int) -> None:
            raise ValueError(value)

        def call(self, function: Any) -> Any:
            return function()

        def die(self) -> None:
            import os

            os._exit(1)

    pool_class = importlib.import_module(f"{ray.__name__}.util").ActorPool
    return lambda count=2: pool_class([Worker.remote() for _ in range(count)])


def double(actor: Any, value: int) -> Any:
    return actor.double.remote(value)


def test_map_keeps_order(make_pool: Any) -> None:
    assert list(make_pool().map(double, range(10))) == [2 * i for i in range(10)]


def test_map_unordered_has_all(make_pool: Any) -> None:
    assert sorted(make_pool().map_unordered(double, range(10))) == [2 * i for i in range(10)]


def test_map_unordered_yields_what_is_ready_first(make_pool: Any, hold: Any) -> None:
    pool = make_pool()
    wait = hold
    results = pool.map_unordered(
        lambda a, v: a.call.remote(lambda v=v, wait=wait: wait(v) if v == 0 else v), [0, 1, 2])
    assert [next(results), next(results)] == [1, 2]
    hold.release()
    assert list(results) == [0]


def test_submit_and_get_next(make_pool: Any) -> None:
    pool = make_pool(1)
    for value in (1, 2, 3):
        pool.submit(double, value)
    assert [pool.get_next() for _ in range(3)] == [2, 4, 6]
    assert not pool.has_next()


def test_nothing_to_get_is_stop_iteration(make_pool: Any) -> None:
    with pytest.raises(StopIteration):
        make_pool().get_next()
    with pytest.raises(StopIteration):
        make_pool().get_next_unordered()


def test_timeout_leaves_the_call_in_place(make_pool: Any, hold: Any) -> None:
    pool = make_pool(1)
    wait = hold
    pool.submit(lambda a, v: a.call.remote(lambda: wait(v)), 7)
    with pytest.raises(TimeoutError):
        pool.get_next(timeout=0.05)
    with pytest.raises(TimeoutError):
        pool.get_next_unordered(timeout=0.05)
    hold.release()
    assert pool.get_next(timeout=20) == 7


def test_a_timed_out_call_can_be_ignored(make_pool: Any, hold: Any) -> None:
    pool = make_pool(1)
    wait = hold
    pool.submit(lambda a, v: a.call.remote(lambda: wait(v)), 7)
    pool.submit(double, 4)
    with pytest.raises(TimeoutError):
        pool.get_next(timeout=0.05, ignore_if_timedout=True)
    hold.release()
    assert pool.get_next() == 8
    assert not pool.has_next()


def test_get_next_after_unordered_took_a_later_one(make_pool: Any, hold: Any) -> None:
    pool = make_pool()
    wait = hold
    pool.submit(lambda a, v: a.call.remote(lambda: wait(v)), 1)
    pool.submit(double, 2)
    assert pool.get_next_unordered() == 4
    with pytest.raises(ValueError, match="get_next_unordered"):
        pool.get_next()
    hold.release()
    assert pool.get_next_unordered() == 1


def test_an_error_frees_the_actor(make_pool: Any) -> None:
    pool = make_pool(1)
    pool.submit(lambda a, v: a.fail.remote(v), 1)
    pool.submit(double, 2)
    with pytest.raises(ValueError):
        pool.get_next()
    assert pool.get_next() == 4
    assert pool.has_free()


def test_a_dead_actor_leaves_the_pool(make_pool: Any, ray: ModuleType) -> None:
    pool = make_pool()
    pool.submit(lambda a, v: a.die.remote(), 0)
    with pytest.raises(ray.exceptions.RayActorError):
        pool.get_next()
    assert list(pool.map(double, range(4))) == [0, 2, 4, 6]
    assert pool.pop_idle() is not None
    assert pool.pop_idle() is None


def test_push_and_pop(make_pool: Any) -> None:
    pool = make_pool(1)
    pool.submit(double, 1)
    assert not pool.has_free()
    assert pool.pop_idle() is None
    assert pool.get_next() == 2
    actor = pool.pop_idle()
    pool.submit(double, 5)
    assert not pool.has_next()
    pool.push(actor)
    assert pool.get_next() == 10
    with pytest.raises(ValueError, match="already belongs"):
        pool.push(actor)


def test_map_drops_earlier_results(make_pool: Any) -> None:
    pool = make_pool()
    for value in range(5):
        pool.submit(double, value)
    assert list(pool.map(double, [10, 11])) == [20, 22]
