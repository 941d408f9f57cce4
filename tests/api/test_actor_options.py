"""What options make of an actor's calls: groups, order, limits, retries."""

from __future__ import annotations

import pytest

# --- concurrency groups ---------------------------------------------------------------------------


@pytest.fixture
def grouped(ray):
    """A threaded and an async actor class with the groups "io" (2 at once) and "one" (1)."""

    class Threaded:
        @ray.method(concurrency_group="io")
        def io(self, enter):
            return enter()

        @ray.method(concurrency_group="one")
        def one(self, enter):
            return enter()

        def other(self):
            return "other"

    class Async:
        def __init__(self):
            import asyncio

            self.event = asyncio.Event()
            self.loop = None
            self.now = self.most = 0

        @ray.method(concurrency_group="io")
        async def io(self):
            import asyncio

            self.loop = asyncio.get_running_loop()
            self.now += 1
            self.most = max(self.most, self.now)
            await self.event.wait()
            self.now -= 1

        async def release(self):
            self.loop.call_soon_threadsafe(self.event.set)  # the group's own loop

        async def seen(self):
            return self.now, self.most

    groups = {"io": 2, "one": 1}
    return (ray.remote(concurrency_groups=groups)(Threaded),
            ray.remote(concurrency_groups=groups)(Async))


def test_groups_of_a_threaded_actor(ray, grouped, gate, counter):
    actor = grouped[0].remote()
    enter, add = gate.enter, counter.add

    def count():
        add()
        enter()

    held = [actor.io.remote(count) for _ in range(100)]
    gate.wait_for_arrivals(2)
    # A full group keeps neither the others nor the default group back.
    assert ray.get(actor.other.remote()) == "other"
    assert ray.get(actor.one.remote(lambda: 5)) == 5
    assert counter.value == 2
    gate.open()
    ray.get(held)


def test_a_group_at_the_call(ray, grouped, gate):
    actor = grouped[0].remote()
    held = actor.other.options(concurrency_group="one").remote()
    assert ray.get(held) == "other"
    enter = gate.enter
    full = [actor.io.remote(enter) for _ in range(2)]
    gate.wait_for_arrivals(2)
    assert ray.get(actor.io.options(concurrency_group="one").remote(lambda: 7)) == 7
    gate.open()
    ray.get(full)


def test_groups_of_an_async_actor(ray, grouped, eventually):
    actor = grouped[1].remote()
    held = [actor.io.remote() for _ in range(5)]
    eventually(lambda: ray.get(actor.seen.remote()) == (2, 2))
    ray.get(actor.release.remote())
    ray.get(held)
    assert ray.get(actor.seen.remote()) == (0, 2)


@pytest.mark.ray_differs("Ray says it when the call has failed")
def test_groups_there_are_not(ray, grouped):
    actor = grouped[0].remote()
    with pytest.raises(ValueError, match=r"'disk'.*io"):
        actor.other.options(concurrency_group="disk").remote()

    @ray.remote
    class A:
        @ray.method(concurrency_group="io")
        def m(self):
            pass

    with pytest.raises(ValueError, match="concurrency_groups"):
        A.remote()


@pytest.mark.ray_differs("Ray checks less")
@pytest.mark.parametrize(("groups", "error"), [
    ({"io": 0}, ValueError), ({"io": "2"}, TypeError), ({1: 2}, TypeError), (["io"], TypeError)])
def test_groups_that_cannot_be(ray, groups, error):
    with pytest.raises(error):

        @ray.remote(concurrency_groups=groups)
        class A:
            pass


# --- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["async", "threaded", "allowed"])
def test_calls_that_may_overtake(ray, gate, kind):
    class Plain:
        def late(self, x):
            return x

        def early(self):
            return "early"

    class Async(Plain):
        async def early(self):
            return "early"

    actor = {
        "async": ray.remote(Async), "threaded": ray.remote(max_concurrency=2)(Plain),
        "allowed": ray.remote(allow_out_of_order_execution=True)(Plain),
    }[kind].remote()
    enter = gate.enter
    late = actor.late.remote(ray.remote(enter).remote(1))
    gate.wait_for_arrivals()
    assert ray.get(actor.early.remote()) == "early"
    gate.open()
    assert ray.get(late) == 1


# --- calls in the air -----------------------------------------------------------------------------


def test_pending_calls_are_counted_until_they_end(ray, gate):
    @ray.remote(max_pending_calls=2)
    class A:
        def call(self, f):
            return f()

    actor = A.remote()
    enter = gate.enter
    held = [actor.call.remote(enter), actor.call.remote(enter)]
    with pytest.raises(ray.exceptions.PendingCallsLimitExceeded):
        actor.call.remote(enter)
    gate.open()
    ray.get(held)
    for value in range(5):
        assert ray.get(actor.call.remote(lambda value=value: value)) == value


def test_pending_calls_whose_refs_are_dropped(ray, gate, eventually):
    @ray.remote(max_pending_calls=1)
    class A:
        def call(self, f):
            return f()

    actor = A.remote()
    enter = gate.enter
    actor.call.remote(enter)
    gate.wait_for_arrivals()
    with pytest.raises(ray.exceptions.PendingCallsLimitExceeded):
        actor.call.remote(enter)
    gate.open()

    def accepted():
        try:
            return ray.get(actor.call.remote(lambda: "again")) == "again"
        except ray.exceptions.PendingCallsLimitExceeded:
            return False

    eventually(accepted)


def test_pending_calls_without_results_count(ray, gate, eventually):
    @ray.remote(max_pending_calls=1)
    class A:
        def call(self, f):
            return f()

    actor = A.remote()
    call = actor.call.options(num_returns=0)
    assert call.remote(gate.enter) is None
    gate.wait_for_arrivals()
    for method in (call, actor.call):
        with pytest.raises(ray.exceptions.PendingCallsLimitExceeded):
            method.remote(int)
    gate.open()

    def accepted():
        try:
            return call.remote(int) is None
        except ray.exceptions.PendingCallsLimitExceeded:
            return False

    eventually(accepted)


def test_other_processes_have_their_own_count(ray, gate):
    @ray.remote(max_pending_calls=1, max_concurrency=2)
    class A:
        def call(self, f=None):
            return f and f()

    @ray.remote
    def other(actor):
        return ray.get(actor.call.remote())

    actor = A.remote()
    held = actor.call.remote(gate.enter)
    gate.wait_for_arrivals()
    assert ray.get(other.remote(actor)) is None
    gate.open()
    ray.get(held)


# --- retries --------------------------------------------------------------------------------------


@pytest.fixture
def flaky(ray, counter):
    add = counter.add

    @ray.remote(max_task_retries=2)
    class Flaky:
        @ray.method(retry_exceptions=[KeyError])
        def listed(self, kind):
            add()
            raise kind("x")

        @ray.method(max_task_retries=1, retry_exceptions=True)
        def once_more(self):
            add()
            raise KeyError("x")

        def plain(self, kind):
            add()
            raise kind("x")

    return Flaky.remote()


@pytest.mark.parametrize(("kind", "runs"), [(KeyError, 3), (ValueError, 1)])
def test_methods_retried_for_some_exceptions(ray, flaky, counter, kind, runs):
    with pytest.raises(kind):
        ray.get(flaky.listed.remote(kind))
    assert counter.value == runs


def test_a_method_with_retries_of_its_own(ray, flaky, counter):
    with pytest.raises(KeyError):
        ray.get(flaky.once_more.remote())
    assert counter.value == 2


def test_retried_for_a_call_only(ray, flaky, counter):
    with pytest.raises(KeyError):
        ray.get(flaky.plain.options(retry_exceptions=[LookupError]).remote(KeyError))
    assert counter.value == 3  # a KeyError is a LookupError
    with pytest.raises(KeyError):
        ray.get(flaky.plain.remote(KeyError))
    assert counter.value == 4


def test_retried_for_an_exception_of_the_script(ray, counter):
    add = counter.add

    class Own(Exception):
        pass

    class Worse(Own):
        pass

    @ray.remote(max_retries=2, retry_exceptions=[Own])
    def f():
        add()
        raise Worse("x")

    with pytest.raises(Own):
        ray.get(f.remote())
    assert counter.value == 3


def test_an_empty_list_retries_nothing(ray, counter):
    add = counter.add

    @ray.remote(max_retries=2, retry_exceptions=[])
    def f():
        add()
        raise KeyError

    with pytest.raises(KeyError):
        ray.get(f.remote())
    assert counter.value == 1
