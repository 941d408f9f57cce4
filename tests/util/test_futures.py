"""Executor: what concurrent.futures promises of one, and what runs on the cluster of it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import os
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from hpcray.exceptions import TaskError, WorkerCrashedError
from hpcray.futures import Executor

WAIT_S = 20


@pytest.fixture
def executor(ray: ModuleType) -> Iterator[Executor]:
    with Executor() as executor:
        yield executor


def test_submit(executor: Executor) -> None:
    future = executor.submit(lambda a, *, b: (a, b, os.getpid()), 1, b=2)
    assert type(future) is concurrent.futures.Future
    assert future.result(WAIT_S)[:2] == (1, 2)
    assert future.result()[2] != os.getpid()


def test_any_callable(executor: Executor) -> None:
    class Add:
        def __init__(self, n: int) -> None:
            self.n = n

        def __call__(self, x: int) -> int:
            return self.n + x

        def method(self, x: int) -> int:
            return self.n - x

    calls: list[Any] = [Add(3), Add(5).method, functools.partial(pow, 2), int, abs]
    assert [executor.submit(f, 2).result(WAIT_S) for f in calls] == [5, 3, 4, 2, 2]


def test_a_ref_arrives_as_its_value(executor: Executor, ray: ModuleType) -> None:
    assert executor.submit(len, ray.put("four")).result(WAIT_S) == 4


@pytest.mark.parametrize("chunksize", [1, 7, 100])
def test_map(executor: Executor, chunksize: int) -> None:
    found = executor.map(lambda a, b: a + b, range(40), range(50), chunksize=chunksize)
    assert list(found) == [2 * i for i in range(40)]


def test_map_errors(executor: Executor, hold: Any) -> None:
    found = executor.map(lambda x: 1 // x, [1, 0, 1])
    assert next(found) == 1
    with pytest.raises(ZeroDivisionError):
        next(found)
    with pytest.raises(ValueError):
        executor.map(abs, [1], chunksize=0)
    wait = hold
    with pytest.raises(TimeoutError):
        list(executor.map(lambda _: wait(), [1], timeout=0.05))
    hold.release()


def test_an_exception_is_the_one_that_was_raised(executor: Executor) -> None:
    def fail() -> None:
        raise FileNotFoundError(2, "no such thing", "there")

    error = executor.submit(fail).exception(WAIT_S)
    assert type(error) is FileNotFoundError and error.filename == "there"
    assert isinstance(error.__cause__, TaskError)
    assert "in fail" in str(error.__cause__)


def test_what_cannot_be_pickled_shows_in_the_future(executor: Executor) -> None:
    lock = threading.Lock()

    def two() -> Iterator[int]:
        yield 1
        yield 2

    for future in (executor.submit(abs, lock), executor.submit(lambda: threading.Lock()),
                   executor.submit(lambda: lock), executor.submit(two)):
        assert isinstance(future.exception(WAIT_S), TypeError)
    assert executor.submit(abs, -1).result(WAIT_S) == 1


def test_a_worker_that_dies(ray: ModuleType) -> None:
    with Executor(max_retries=0) as executor:
        assert isinstance(executor.submit(os._exit, 1).exception(WAIT_S), WorkerCrashedError)
        assert executor.submit(abs, -1).result(WAIT_S) == 1


def test_pending_calls_can_be_cancelled(executor: Executor, hold: Any) -> None:
    wait = hold
    futures = [executor.submit(lambda i=i: wait(i)) for i in range(5)]
    assert [future.running() for future in futures] == [True, True, False, False, False]
    assert [future.cancel() for future in futures] == [False, False, True, True, True]
    hold.release()
    done, _ = concurrent.futures.wait(futures, WAIT_S)
    assert len(done) == 5
    assert [futures[i].result() for i in (0, 1)] == [0, 1]


def test_max_workers(ray: ModuleType, hold: Any) -> None:
    wait = hold
    with Executor(max_workers=1) as executor:
        futures = [executor.submit(lambda: wait()) for _ in range(2)]
        assert [future.running() for future in futures] == [True, False]
        hold.release()


def test_slots_follow_the_options(ray: ModuleType, hold: Any) -> None:
    wait = hold
    with Executor(num_cpus=2) as executor:
        futures = [executor.submit(lambda: wait()) for _ in range(2)]
        assert [future.running() for future in futures] == [True, False]
        hold.release()


def test_shutdown_cancels_what_is_pending(ray: ModuleType, hold: Any) -> None:
    executor = Executor(max_workers=1)
    wait = hold
    futures = [executor.submit(lambda i=i: wait(i)) for i in range(3)]
    executor.shutdown(wait=False, cancel_futures=True)
    assert [future.cancelled() for future in futures] == [False, True, True]
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(abs, 1)
    hold.release()
    executor.shutdown()
    assert futures[0].done()


def test_shutdown_waits_for_all(ray: ModuleType) -> None:
    executor = Executor()
    futures = [executor.submit(abs, -i) for i in range(100)]
    executor.shutdown()
    assert all(future.done() for future in futures)
    assert [future.result() for future in futures] == list(range(100))


def test_callbacks_and_as_completed(executor: Executor) -> None:
    called = threading.Event()
    future = executor.submit(abs, -3)
    future.add_done_callback(lambda done: called.set())
    assert called.wait(WAIT_S)
    futures = [executor.submit(abs, -i) for i in range(20)]
    found = sorted(one.result() for one in concurrent.futures.as_completed(futures, WAIT_S))
    assert found == list(range(20))


def test_submit_from_a_callback(executor: Executor) -> None:
    second: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def go_on(done: concurrent.futures.Future[int]) -> None:
        executor.submit(abs, done.result() - 10).add_done_callback(
            lambda last: second.set_result(last.result()))

    executor.submit(abs, -3).add_done_callback(go_on)
    assert second.result(WAIT_S) == 7


def test_from_many_threads(executor: Executor) -> None:
    found: list[int] = []

    def submit(base: int) -> None:
        futures = [executor.submit(abs, -base - i) for i in range(20)]
        found.extend(future.result(WAIT_S) for future in futures)

    threads = [threading.Thread(target=submit, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert sorted(found) == sorted(100 * n + i for n in range(4) for i in range(20))


def test_asyncio(executor: Executor) -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        return await asyncio.gather(
            *(loop.run_in_executor(executor, abs, -i) for i in range(10)))

    assert asyncio.run(main()) == list(range(10))


def test_inside_a_task_that_holds_every_cpu(ray: ModuleType) -> None:
    @ray.remote(num_cpus=2)
    def outer() -> list[int]:
        from hpcray.futures import Executor

        executor = Executor()
        futures = [executor.submit(abs, -i) for i in range(5)]
        executor.shutdown()  # gives the CPUs back while it waits
        return [future.result() for future in futures]

    assert ray.get(outer.remote(), timeout=WAIT_S) == list(range(5))


def test_bad_arguments() -> None:
    for wrong in ({"max_workers": 0}, {"num_returns": 2}, {"nonsense": 1}):
        with pytest.raises(ValueError):
            Executor(**wrong)
    with pytest.raises(TypeError):
        Executor(max_workers="2")  # type: ignore[arg-type]
