"""Pool: as multiprocessing.Pool, with processes of the cluster."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def make(ray: ModuleType) -> Any:
    return importlib.import_module(f"{ray.__name__}.util.multiprocessing").Pool


@pytest.fixture(scope="module")
def pool(make: Any) -> Iterator[Any]:
    with make(2) as pool:
        yield pool


def test_apply(pool: Any) -> None:
    assert pool.apply(lambda a, b=0: a + b, (1,), {"b": 2}) == 3
    assert pool.apply_async(lambda: os.getpid()).get(timeout=20) != os.getpid()


@pytest.mark.parametrize("chunksize", [None, 1, 3, 100])
def test_map(pool: Any, chunksize: int | None) -> None:
    assert pool.map(lambda x: x * x, range(20), chunksize) == [x * x for x in range(20)]
    assert pool.map(lambda x: x, iter("abc"), chunksize) == ["a", "b", "c"]


def test_map_of_nothing(pool: Any) -> None:
    assert pool.map(lambda x: x, []) == []
    assert list(pool.imap(lambda x: x, iter([]))) == []


def test_starmap(pool: Any) -> None:
    assert pool.starmap(lambda a, b: a * b, [(1, 2), (3, 4)]) == [2, 12]
    assert pool.starmap_async(lambda a, b: a * b, [(1, 2)] * 5).get(timeout=20) == [2] * 5


@pytest.mark.parametrize("chunksize", [1, 4])
def test_imap(pool: Any, chunksize: int) -> None:
    assert list(pool.imap(lambda x: x + 1, range(11), chunksize)) == list(range(1, 12))
    found = pool.imap_unordered(lambda x: x + 1, iter(range(11)), chunksize)
    assert sorted(found) == list(range(1, 12))


def test_imap_reads_only_a_little_ahead(pool: Any) -> None:
    read = []

    def endless() -> Iterator[int]:
        value = 0
        while True:
            read.append(value)
            yield value
            value += 1

    results = pool.imap(lambda x: x, endless())
    assert [next(results) for _ in range(5)] == list(range(5))
    assert len(read) < 20


def test_imap_timeout(pool: Any, hold: Any) -> None:
    wait = hold
    results = pool.imap(lambda x: wait(x), [1])
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(timeout=0.05)
    hold.release()
    assert results.next(timeout=20) == 1
    with pytest.raises(StopIteration):
        results.next()


def test_errors_keep_their_type(pool: Any) -> None:
    def fail(x: int) -> int:
        if x == 3:
            raise FileNotFoundError(2, "no such thing", "there")
        return x

    with pytest.raises(FileNotFoundError) as caught:
        pool.map(fail, range(10))
    assert caught.value.filename == "there"
    result = pool.apply_async(fail, (3,))
    result.wait(20)
    assert result.ready() and not result.successful()
    with pytest.raises(FileNotFoundError):
        result.get()
    assert pool.map(fail, range(3)) == [0, 1, 2]


@pytest.mark.ray_differs("Ray hands out its wrapper of the error as a result")
def test_imap_raises_at_the_item_and_goes_on(pool: Any) -> None:
    results = pool.imap(lambda x: 1 // x, [1, 0, -1], 3)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(results) == [-1]


@pytest.mark.ray_differs("Ray fails the whole chunk with an error of its own")
def test_an_exception_that_cannot_travel(pool: Any) -> None:
    class Awkward(Exception):
        def __init__(self, first: int, second: int) -> None:
            super().__init__("both are needed")

    class Holds(Exception):
        def __init__(self) -> None:
            super().__init__("a lock")
            self.lock = threading.Lock()

    def fail(x: int) -> int:
        if x == 1:
            raise Awkward(1, 2)
        if x == 2:
            raise Holds
        return x

    results = pool.imap(fail, range(4), 4)
    assert next(results) == 0
    with pytest.raises(Awkward, match="both are needed"):
        next(results)
    with pytest.raises(RuntimeError, match="Holds: a lock"):
        next(results)
    assert next(results) == 3


@pytest.mark.ray_differs("Ray loses the worker's traceback")
def test_errors_show_the_worker_s_traceback(pool: Any) -> None:
    def fail_in_the_worker() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError) as caught:
        pool.apply(fail_in_the_worker)
    assert "fail_in_the_worker" in str(caught.value.__cause__)


def test_not_ready(pool: Any, hold: Any) -> None:
    wait = hold
    result = pool.apply_async(lambda: wait(5))
    assert not result.ready()
    with pytest.raises(ValueError):
        result.successful()
    with pytest.raises(multiprocessing.TimeoutError):
        result.get(timeout=0.05)
    hold.release()
    assert result.get(timeout=20) == 5
    assert result.successful()


def test_callbacks(pool: Any) -> None:
    called: list[Any] = []
    done = threading.Event()

    def note(value: Any) -> None:
        called.append(value)
        done.set()

    pool.map_async(lambda x: -x, range(4), callback=note, error_callback=note)
    assert done.wait(20)
    done.clear()
    pool.apply_async(lambda: 1 // 0, callback=note, error_callback=note)
    assert done.wait(20)
    assert sorted(called[0]) == [-3, -2, -1, 0]
    assert len(called) == 2
    assert "division" in str(called[1]) or "division" in str(getattr(called[1], "underlying", ""))


@pytest.mark.ray_differs("Ray gives the callback the results as they came in")
def test_a_callback_gets_the_results_in_order(pool: Any) -> None:
    called: list[Any] = []
    result = pool.map_async(lambda x: -x, range(8), chunksize=1, callback=called.append)
    result.wait(20)
    assert called == [[-x for x in range(8)]]


@pytest.mark.ray_differs("Ray deals chunks out in advance")
def test_a_slow_call_holds_up_no_other(pool: Any, hold: Any) -> None:
    wait = hold
    slow = pool.apply_async(lambda: wait(0))
    assert pool.map(lambda x: x, range(8), chunksize=1) == list(range(8))
    hold.release()
    assert slow.get(timeout=20) == 0


def test_initializer_and_maxtasksperchild(make: Any) -> None:
    def start(value: int) -> None:
        os.environ["STARTED"] = str(value)

    with make(1, initializer=start, initargs=(7,), maxtasksperchild=2) as pool:
        found = [pool.apply(lambda: (os.getpid(), os.environ["STARTED"])) for _ in range(4)]
    assert {value for _, value in found} == {"7"}
    pids = [pid for pid, _ in found]
    assert pids[0] == pids[1] != pids[2] == pids[3]


@pytest.mark.ray_differs("Ray's workers do not see it")
def test_what_the_initializer_sets_is_seen(make: Any) -> None:
    code = "def start(v):\n    global state\n    state = v\ndef read(x):\n    return state + x\n"
    # As in a script: functions of __main__ travel by value.
    scope: dict[str, Any] = {"__name__": "__main__", "state": None}
    exec(code, scope)
    with make(1, initializer=scope["start"], initargs=(40,)) as pool:
        assert pool.map(scope["read"], [2]) == [42]


@pytest.mark.ray_differs("Ray leaves the pool with a dead process")
def test_a_dead_process_is_replaced(make: Any, ray: ModuleType) -> None:
    with make(1) as pool:
        with pytest.raises(ray.exceptions.ActorDiedError):
            pool.apply(os._exit, (1,))
        assert pool.apply(lambda: 5) == 5


def test_close_and_join(make: Any) -> None:
    pool = make(1)
    results = [pool.apply_async(lambda x=x: x) for x in range(5)]
    with pytest.raises(ValueError):
        pool.join()
    pool.close()
    with pytest.raises(ValueError):
        pool.apply(lambda: 1)
    pool.join()
    assert [result.get(timeout=20) for result in results] == list(range(5))


def test_terminate_ends_what_runs(make: Any, ray: ModuleType, hold: Any) -> None:
    wait = hold
    pool = make(1)
    result = pool.apply_async(lambda: wait())
    pool.terminate()
    with pytest.raises(ray.exceptions.RayActorError):
        result.get(timeout=20)
    pool.join()
    with pytest.raises(ValueError):
        with pool:
            pass


def test_bad_arguments(make: Any, pool: Any) -> None:
    with pytest.raises(ValueError):
        make(0)
    with pytest.raises(ValueError, match="only 2 CPUs"):
        make(3)


@pytest.mark.ray_differs("Ray takes it and fails elsewhere")
def test_bad_chunksize(pool: Any) -> None:
    with pytest.raises(ValueError, match="Chunksize"):
        pool.map(abs, [1], 0)


@pytest.mark.ray_differs("Ray raises TaskError from a later call")
def test_a_failing_initializer(make: Any, ray: ModuleType) -> None:
    with pytest.raises(ray.exceptions.RayActorError, match="ZeroDivisionError"):
        make(1, initializer=lambda: 1 // 0)
