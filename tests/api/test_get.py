"""get: what it takes, in what order it answers, when it gives up."""

from __future__ import annotations

import threading
import time

import pytest


def test_single(ray):
    assert ray.get(ray.put(1)) == 1


def test_list_in_the_order_asked(ray):
    refs = [ray.put(i) for i in range(5)]
    assert ray.get(refs[::-1]) == [4, 3, 2, 1, 0]


def test_empty_list(ray):
    assert ray.get([]) == []


def test_same_ref_twice(ray):
    ref = ray.remote(lambda: 1).remote()
    assert ray.get([ref, ref]) == [1, 1]
    assert ray.get(ref) == 1


def test_list_in_the_order_asked_whatever_ends_first(ray, make_gate):
    first_gate, second_gate = make_gate(), make_gate()
    enter_first, enter_second = first_gate.enter, second_gate.enter
    first = ray.remote(lambda: enter_first("first")).remote()
    second = ray.remote(lambda: enter_second("second")).remote()
    second_gate.open()
    assert ray.get(second) == "second"
    first_gate.open()
    assert ray.get([first, second]) == ["first", "second"]


def test_timeout(ray, gate):
    enter = gate.enter
    ref = ray.remote(enter).remote("late")
    start_s = time.monotonic()
    with pytest.raises(ray.exceptions.GetTimeoutError):
        ray.get(ref, timeout=0.1)
    assert 0.09 <= time.monotonic() - start_s < 5
    gate.open()
    assert ray.get(ref) == "late"


def test_timeout_is_a_timeout_error(ray, gate):
    enter = gate.enter
    ref = ray.remote(enter).remote()
    with pytest.raises(TimeoutError):
        ray.get(ref, timeout=0)
    gate.open()
    ray.get(ref)


def test_timeout_zero_of_what_is_there(ray):
    ref = ray.put(1)
    assert ray.get(ref, timeout=0) == 1
    assert ray.get([ref, ref], timeout=0) == [1, 1]


def test_timeout_of_a_list_waits_for_all(ray, gate):
    enter = gate.enter
    late = ray.remote(enter).remote("late")
    with pytest.raises(ray.exceptions.GetTimeoutError):
        ray.get([ray.put(1), late], timeout=0.05)
    gate.open()
    assert ray.get([late], timeout=20) == ["late"]


def test_timeout_does_not_cancel(ray, gate, counter):
    enter, add = gate.enter, counter.add

    @ray.remote
    def f():
        enter()
        return add()

    ref = f.remote()
    for _ in range(3):
        with pytest.raises(ray.exceptions.GetTimeoutError):
            ray.get(ref, timeout=0.01)
    gate.open()
    assert ray.get(ref) == 1


@pytest.mark.parametrize(
    "wrong", [1, None, "ref", 1.5, {"a": 1}, {1}, (), object], ids=lambda w: repr(w)[:12]
)
def test_not_a_ref(ray, wrong):
    with pytest.raises(ValueError, match="ObjectRef") as caught:
        ray.get(wrong)
    assert type(wrong).__name__ in str(caught.value)


def test_tuple_of_refs_is_refused(ray):
    with pytest.raises(ValueError, match="list"):
        ray.get((ray.put(1), ray.put(2)))


@pytest.mark.parametrize("wrong", [1, None, "x", [1]], ids=repr)
def test_list_with_something_else_in_it(ray, wrong):
    with pytest.raises(TypeError, match="ObjectRef"):
        ray.get([ray.put(1), wrong])


def test_list_of_lists_is_refused(ray):
    with pytest.raises(TypeError):
        ray.get([[ray.put(1)]])


def test_timeout_is_keyword_only(ray):
    with pytest.raises(TypeError):
        ray.get(ray.put(1), 1)


def test_first_error_of_a_list_is_raised(ray):
    @ray.remote
    def fail(kind):
        raise kind("no")

    failed = [fail.remote(KeyError), fail.remote(IndexError)]
    ray.wait(failed, num_returns=2)
    with pytest.raises(KeyError):
        ray.get([ray.put(1), *failed])
    with pytest.raises(IndexError):
        ray.get([ray.put(1), *failed[::-1]])


def test_get_twice_gives_equal_values(ray):
    ref = ray.put({"a": [1, 2]})
    first, second = ray.get(ref), ray.get(ref)
    assert first == second
    first["a"].append(3)
    assert ray.get(ref) == {"a": [1, 2]}


def test_in_a_task(ray):
    @ray.remote
    def total(refs):
        return sum(ray.get(refs))

    assert ray.get(total.remote([ray.put(i) for i in range(4)])) == 6


def test_timeout_in_a_task(ray, gate):
    enter = gate.enter
    late = ray.remote(enter).remote()
    gate.wait_for_arrivals()

    @ray.remote
    def impatient(refs):
        try:
            ray.get(refs, timeout=0.05)
        except ray.exceptions.GetTimeoutError:
            return "gave up"

    assert ray.get(impatient.remote([late]), timeout=20) == "gave up"
    gate.open()
    ray.get(late)


def test_in_threads_of_the_driver(ray):
    f = ray.remote(lambda i: i * i)
    answers: dict[int, list[int]] = {}

    def work(start):
        answers[start] = ray.get([f.remote(start + i) for i in range(20)])

    threads = [threading.Thread(target=work, args=(k * 100,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == {k: [(k + i) ** 2 for i in range(20)] for k in (0, 100, 200, 300)}


def test_threads_waiting_for_one_ref(ray, gate):
    enter = gate.enter
    ref = ray.remote(enter).remote("shared")
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(ray.get(ref))) for _ in range(4)]
    for thread in threads:
        thread.start()
    gate.wait_for_arrivals()
    gate.open()
    for thread in threads:
        thread.join(30)
    assert answers == ["shared"] * 4


def test_a_thread_that_waits_does_not_hold_up_another(ray, gate):
    enter = gate.enter
    late = ray.remote(enter).remote("late")
    answers: list[str] = []
    waiting = threading.Thread(target=lambda: answers.append(ray.get(late)))
    waiting.start()
    gate.wait_for_arrivals()
    assert ray.get(ray.remote(lambda: "now").remote(), timeout=20) == "now"
    assert answers == []
    gate.open()
    waiting.join(30)
    assert answers == ["late"]


def test_in_threads_of_a_task(ray):
    f = ray.remote(lambda i: i + 1)

    @ray.remote
    def fan_out():
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda i: ray.get(f.remote(i)), range(8)))

    assert ray.get(fan_out.remote()) == list(range(1, 9))


def test_interrupted_by_the_user(run_driver):
    done = run_driver(
        """
        import signal, threading
        ray.init(num_cpus=1, **INIT)

        @ray.remote
        def forever():
            threading.Event().wait()

        ref = forever.remote()
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        try:
            ray.get(ref)
        except KeyboardInterrupt:
            print("interrupted")
        """
    )
    assert done.stdout.split() == ["interrupted"]


def test_future(ray):
    assert ray.remote(lambda: 3).remote().future().result(timeout=20) == 3


def test_future_with_an_error(ray):
    @ray.remote
    def fail():
        raise KeyError("no")

    with pytest.raises(KeyError):
        fail.remote().future().result(timeout=20)


def test_futures_of_both_libraries(ray, gate):
    import asyncio
    from concurrent.futures import FIRST_COMPLETED, wait

    enter = gate.enter
    slow, fast = ray.remote(enter).remote("slow").future(), ray.remote(lambda: "fast").remote()
    gate.wait_for_arrivals()
    done, pending = wait([slow, fast.future()], timeout=20, return_when=FIRST_COMPLETED)
    assert [future.result() for future in done] == ["fast"]
    assert pending == {slow}

    async def both():
        first = asyncio.wrap_future(fast.future())
        assert await first == "fast"
        gate.open()
        return await asyncio.wait_for(asyncio.wrap_future(slow), 20)

    assert asyncio.run(both()) == "slow"


def test_await(ray):
    import asyncio

    async def main():
        one, two = ray.remote(lambda: 1).remote(), ray.remote(lambda: 2).remote()
        return [await one, *await asyncio.gather(two, one)]

    assert asyncio.run(main()) == [1, 2, 1]


@pytest.mark.ray_differs("Ray's process may die of it")
def test_negative_timeout(ray):
    for refs in (ray.put(1), [ray.put(1)]):
        with pytest.raises(ValueError, match="timeout"):
            ray.get(refs, timeout=-1)


# --- a list with errors in it ---------------------------------------------------------------------


@pytest.fixture
def fail(ray):
    """A task, or call, that raises its argument; `fail.after(gate)` once that is open."""
    @ray.remote(max_retries=0)
    def fail(error, wait=None):
        if wait is not None:
            wait()
        raise error

    return fail


@pytest.fixture
def held(ray, make_gate):
    """`held(n)`: refs of actors' calls, which take no CPU, and the gate they wait for.

    It opens by itself in the end, so that a `get` that waits for it fails its test and no other.
    """
    gate = make_gate()
    enter = gate.enter
    opening = threading.Timer(12, gate.open)
    opening.start()

    @ray.remote(num_cpus=0, max_concurrency=4)
    class Holder:
        def hold(self, value):
            return enter(value)

    holder = Holder.remote()

    def held(count):
        return [holder.hold.remote(i) for i in range(count)]

    held.gate = gate
    yield held
    opening.cancel()
    opening.join()


@pytest.mark.parametrize("order", ["first", "last", "middle"])
@pytest.mark.parametrize(("timeout", "already"), [(None, True), (20, False), (None, False)])
def test_fails_as_soon_as_one_has_failed(ray, held, fail, make_gate, order, timeout, already):
    slow = held(3)
    gate = make_gate()
    failed = fail.remote(KeyError("failed"), None if already else gate.enter)
    if already:
        ray.wait([failed], timeout=20)
    else:
        gate.wait_for_arrivals()
    position = {"first": 0, "middle": 1, "last": 3}[order]
    refs = [*slow[:position], failed, *slow[position:]]
    opening = threading.Timer(0.1, gate.open)
    opening.start()
    with pytest.raises(KeyError, match="failed"):
        ray.get(refs, timeout=timeout)
    opening.join()
    # The others run on, and are none the worse for it.
    assert ray.wait(slow, num_returns=3, timeout=0)[0] == []
    held.gate.open()
    assert ray.get(slow, timeout=20) == [0, 1, 2]
    with pytest.raises(KeyError):
        ray.get(refs, timeout=20)


def test_the_error_that_comes_first_in_time_is_raised(ray, held, fail, make_gate):
    [slow] = held(1)
    gates = [make_gate(), make_gate()]
    refs = [slow, fail.remote(KeyError("second"), gates[0].enter),
            fail.remote(IndexError("first"), gates[1].enter)]
    for gate in gates:
        gate.wait_for_arrivals()
    opening = threading.Timer(0.1, gates[1].open)
    opening.start()
    with pytest.raises(IndexError, match="first"):
        ray.get(refs, timeout=20)
    opening.join()
    gates[0].open()
    ray.wait(refs[1:], num_returns=2, timeout=20)
    held.gate.open()
    ray.get(slow, timeout=20)


@pytest.mark.parametrize("with_slow", [True, False])
def test_of_errors_that_are_there_the_first_in_the_list(ray, held, fail, with_slow):
    slow = held(2) if with_slow else []
    kinds = [KeyError, IndexError, ZeroDivisionError]
    failed = [fail.remote(kind("x")) for kind in kinds]
    ray.wait(failed, num_returns=3, timeout=20)
    for position, kind in enumerate(kinds):
        refs = [*slow, *failed[position:], ray.put(1), *failed[:position]]
        with pytest.raises(kind):
            ray.get(refs, timeout=20)
        with pytest.raises(kind):
            ray.get(refs, timeout=0)
    held.gate.open()
    assert ray.get(slow, timeout=20) == [0, 1][: len(slow)]


def test_an_error_wins_over_the_timeout(ray, held, fail):
    [slow] = held(1)
    failed = fail.remote(KeyError("x"))
    ray.wait([failed], timeout=20)
    with pytest.raises(KeyError):
        ray.get([slow, failed], timeout=0)
    with pytest.raises(ray.exceptions.GetTimeoutError):
        ray.get([slow, ray.put(1)], timeout=0)
    held.gate.open()


@pytest.mark.parametrize("how", ["killed actor", "cancelled", "dead worker"])
def test_fails_fast_with_the_failures_of_the_system(ray, held, how):
    [slow] = held(1)
    if how == "killed actor":
        @ray.remote(num_cpus=0)
        class A:
            def never(self):
                threading.Event().wait()

        actor = A.remote()
        failing, expected = actor.never.remote(), ray.exceptions.RayActorError
        act = lambda: ray.kill(actor)  # noqa: E731
    elif how == "cancelled":
        failing, expected = ray.remote(max_retries=0)(
            lambda: [time.sleep(0.01) for _ in range(10_000)]).remote(), (
                ray.exceptions.TaskCancelledError)
        act = lambda: ray.cancel(failing)  # noqa: E731
    else:
        @ray.remote(max_retries=0)
        def die():
            import os

            time.sleep(0.2)
            os._exit(1)

        failing, expected = die.remote(), ray.exceptions.WorkerCrashedError
        act = lambda: None  # noqa: E731
    acting = threading.Timer(0.1, act)
    acting.start()
    with pytest.raises(expected):
        ray.get([slow, failing, ray.put(2)], timeout=20)
    acting.join()
    held.gate.open()
    assert ray.get(slow, timeout=20) == 0


@pytest.mark.parametrize("place", ["task", "actor", "thread"])
def test_fails_fast_elsewhere(ray, held, fail, place):
    slow = held(2)

    def careful(slow):
        try:
            ray.get([slow[0], fail.remote(KeyError("x")), slow[1]], timeout=20)
        except KeyError:
            return ray.wait(slow, timeout=0)[0] == []

    if place == "task":
        assert ray.get(ray.remote(careful).remote(slow), timeout=20)
    elif place == "actor":
        class A:
            def careful(self, slow):
                return careful(slow)

        assert ray.get(ray.remote(num_cpus=0)(A).remote().careful.remote(slow), timeout=20)
    else:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(careful, [slow] * 4)) == [True] * 4
    held.gate.open()
    assert ray.get(slow, timeout=20) == [0, 1]


def test_a_large_value_and_an_error(ray, held, fail):
    [slow] = held(1)
    large = ray.remote(lambda: bytes(500_000)).remote()
    with pytest.raises(KeyError):
        ray.get([large, slow, fail.remote(KeyError("x"))], timeout=20)
    held.gate.open()
    assert len(ray.get(large, timeout=20)) == 500_000
    assert ray.get(slow, timeout=20) == 0


def test_many_errors_of_many(ray, fail):
    f = ray.remote(lambda i: i)
    refs = [f.remote(i) if i % 10 else fail.remote(IndexError(i)) for i in range(300)]
    with pytest.raises(IndexError):
        ray.get(refs, timeout=20)
    ray.wait(refs, num_returns=300, timeout=20)
    with pytest.raises(IndexError) as caught:
        ray.get(refs, timeout=20)
    assert caught.value.cause.args == (0,)
    assert ray.get([ref for i, ref in enumerate(refs) if i % 10], timeout=20) == [
        i for i in range(300) if i % 10]
