"""Actors with coroutines: constructors, loops, what a call returns, cancellation, the end."""

from __future__ import annotations

import os
import signal as signals

import pytest

# --- constructors ---------------------------------------------------------------------------------


def test_a_constructor_may_be_a_coroutine(ray):
    @ray.remote
    class A:
        async def __init__(self, ref, *, more):
            import asyncio

            await asyncio.sleep(0)
            self.sum = await ref[0] + more

        def get(self):
            return self.sum

        async def get_async(self):
            return self.sum

    a = A.remote([ray.put(2)], more=3)
    assert ray.get([a.get.remote(), a.get_async.remote()]) == [5, 5]


def test_a_coroutine_constructor_makes_an_actor_async(ray):
    @ray.remote
    class A:
        async def __init__(self):
            import asyncio

            self.loop = asyncio.get_running_loop()

        def same_loop(self):
            import asyncio

            return asyncio.get_running_loop() is self.loop

    assert ray.get(A.remote().same_loop.remote())


def test_a_coroutine_constructor_that_raises(ray):
    @ray.remote
    class A:
        async def __init__(self):
            import asyncio

            await asyncio.sleep(0)
            raise KeyError("not there")

        async def m(self):
            pass

    with pytest.raises(ray.exceptions.ActorDiedError, match="KeyError: 'not there'"):
        ray.get(A.remote().m.remote())


def test_calls_wait_for_a_coroutine_constructor(ray, gate):
    enter = gate.enter

    @ray.remote
    class A:
        async def __init__(self):
            import asyncio

            self.ready = False
            await asyncio.get_running_loop().run_in_executor(None, enter)
            self.ready = True

        async def is_ready(self):
            return self.ready

    a = A.remote()
    ref = a.is_ready.remote()
    gate.wait_for_arrivals()
    gate.open()
    assert ray.get(ref) is True


# --- what a call is -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "coroutine"])
def test_a_ref_that_is_returned_is_a_ref(ray, kind):
    @ray.remote
    class A:
        def __init__(self):
            self.ref = ray.put(7)

        def plain(self):
            return self.ref

        async def coroutine(self):
            return self.ref

    ref = ray.get(getattr(A.remote(), kind).remote())
    assert isinstance(ref, ray.ObjectRef)
    assert ray.get(ref) == 7


@pytest.mark.parametrize("kind", ["sequential", "threaded", "asyncio"])
def test_an_attribute_does_not_hide_a_method(ray, kind):
    class A:
        def __init__(self):
            self.done = False
            self.size = 3

        def done(self):
            return self.done

        @staticmethod
        def size():
            return "static"

        async def wait(self):
            pass

    if kind != "asyncio":
        del A.wait
    a = ray.remote(max_concurrency=1 if kind == "sequential" else 2)(A).remote()
    assert ray.get(a.done.remote()) is False
    assert ray.get(a.size.remote()) == "static"


# --- loops and threads ----------------------------------------------------------------------------


@pytest.fixture
def Grouped(ray):
    class Grouped:
        def __init__(self):
            import asyncio
            import threading

            self.home = threading.get_ident(), asyncio.get_running_loop()

        def _here(self):
            import asyncio
            import threading

            here = threading.get_ident(), asyncio.get_running_loop()
            return here == self.home, threading.get_ident(), id(here[1])

        async def where(self):
            return self._here()

        def where_plain(self):
            return self._here()

        @ray.method(concurrency_group="io")
        async def where_io(self):
            return self._here()

        @ray.method(concurrency_group="io")
        def where_io_plain(self):
            return self._here()

        @ray.method(concurrency_group="net")
        async def where_net(self):
            return self._here()

        def run(self, what):
            return what()

        @ray.method(concurrency_group="io")
        def run_io(self, what):
            return what()

        @ray.method(concurrency_group="io")
        async def items(self):
            yield 1
            yield 2

        @ray.method(concurrency_group="io")
        async def awaits(self, refs):
            return await refs[0] + 1

    return ray.remote(concurrency_groups={"io": 2, "net": 1})(Grouped)


def test_every_group_has_a_loop(ray, Grouped):
    a = Grouped.remote()
    default, plain, io, io_plain, net = ray.get([
        a.where.remote(), a.where_plain.remote(), a.where_io.remote(), a.where_io_plain.remote(),
        a.where_net.remote()])
    assert default[1:] == plain[1:]
    assert io[1:] == io_plain[1:]
    assert len({default[1], io[1], net[1]}) == len({default[2], io[2], net[2]}) == 3
    assert not io[0] and not net[0]


@pytest.mark.parametrize(("blocked", "free"), [("run", "run_io"), ("run_io", "run")])
def test_a_group_that_blocks_keeps_no_other_back(ray, Grouped, gate, blocked, free):
    a = Grouped.remote()
    held = getattr(a, blocked).remote(gate.enter)
    gate.wait_for_arrivals()
    assert ray.get(getattr(a, free).remote(lambda: 5)) == 5
    gate.open()
    ray.get(held)


def test_groups_stream_and_await(ray, Grouped):
    a = Grouped.remote()
    assert [ray.get(ref) for ref in a.items.remote()] == [1, 2]
    assert ray.get(a.awaits.remote([ray.put(4)])) == 5


def test_calls_of_all_groups_run_before_a_dropped_actor_ends(ray, Grouped, gate, counter):
    enter, add = gate.enter, counter.add
    a = Grouped.remote()
    refs = [a.run.remote(enter), a.run_io.remote(enter)]
    refs += [a.run.remote(add), a.run_io.remote(add)]
    gate.wait_for_arrivals(2)
    del a
    gate.open()
    ray.get(refs)
    assert counter.value == 2


# --- the end --------------------------------------------------------------------------------------


@pytest.fixture(params=["threaded", "asyncio", "groups"])
def concurrent(request, ray):
    """An actor with two calls at once whose call `wait` ends by `go`."""
    if request.param == "threaded":

        @ray.remote(max_concurrency=2)
        class Actor:
            def __init__(self):
                import threading

                self.event = threading.Event()

            def wait(self, enter):
                enter()
                self.event.wait()
                return "finished"

            def go(self):
                self.event.set()

            def go_and_exit(self):
                import threading

                threading.Timer(0.2, self.event.set).start()
                ray.actor.exit_actor()

            def go_and_signal(self):
                import threading

                threading.Timer(0.2, self.event.set).start()
                os.kill(os.getpid(), signals.SIGTERM)

            def pid(self):
                return os.getpid()

    else:
        class Actor:
            def __init__(self):
                import asyncio

                self.event = asyncio.Event()

            async def wait(self, enter):
                import asyncio

                await asyncio.get_running_loop().run_in_executor(None, enter)
                await self.event.wait()
                return "finished"

            async def go_and_exit(self):
                import asyncio

                asyncio.get_running_loop().call_later(0.2, self.event.set)
                ray.actor.exit_actor()

            async def go_and_signal(self):
                import asyncio

                asyncio.get_running_loop().call_later(0.2, self.event.set)
                os.kill(os.getpid(), signals.SIGTERM)

            async def pid(self):
                return os.getpid()

        options = {} if request.param == "asyncio" else {"concurrency_groups": {"io": 1}}
        Actor = ray.remote(max_concurrency=2, **options)(Actor)

    return Actor


def test_exit_actor_lets_running_calls_finish(ray, concurrent, gate, eventually):
    a = concurrent.remote()
    pid = ray.get(a.pid.remote())
    running = a.wait.remote(gate.enter)
    gate.wait_for_arrivals()
    gate.open()
    left = a.go_and_exit.remote()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(left)
    assert ray.get(running) == "finished"
    with pytest.raises(ray.exceptions.ActorDiedError, match="exit"):
        ray.get(a.pid.remote())
    eventually(lambda: not os.path.exists(f"/proc/{pid}"))


def test_exit_actor_fails_the_calls_that_wait(ray, concurrent, gate):
    enter = gate.enter
    a = concurrent.remote()
    running = a.wait.remote(enter)
    gate.wait_for_arrivals()
    gate.open()
    left = a.go_and_exit.remote()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(left)
    waiting = a.wait.remote(enter)
    assert ray.get(running) == "finished"
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(waiting)


def test_kill_ends_an_actor_that_exits_and_has_a_call_without_end(ray, gate):
    enter = gate.enter

    @ray.remote(max_concurrency=2)
    class A:
        def block(self):
            import threading

            enter()
            threading.Event().wait()

        def leave(self):
            ray.actor.exit_actor()

    a = A.remote()
    calls = [a.block.remote()]
    gate.wait_for_arrivals()
    gate.open()
    calls.append(a.leave.remote())
    assert ray.wait(calls[:1], timeout=0.5)[0] == []
    ray.kill(a)
    for call in calls:
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(call)


def test_a_sigterm_lets_running_calls_finish(ray, concurrent, gate, eventually):
    a = concurrent.remote()
    pid = ray.get(a.pid.remote())
    running = a.wait.remote(gate.enter)
    gate.wait_for_arrivals()
    gate.open()
    signalled = a.go_and_signal.remote()
    assert ray.get(running) == "finished"
    assert ray.get(signalled) is None
    eventually(lambda: not os.path.exists(f"/proc/{pid}"))
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(a.pid.remote())


@pytest.mark.parametrize("is_async", [False, True])
def test_exit_actor_in_the_constructor(ray, counter, is_async):
    add = counter.add

    def leave():
        add()
        ray.actor.exit_actor()

    if is_async:
        class A:
            async def __init__(self):
                leave()

            async def m(self):
                pass
    else:
        class A:
            def __init__(self):
                leave()

            def m(self):
                pass

    a = ray.remote(max_restarts=-1)(A).remote()
    with pytest.raises(ray.exceptions.ActorDiedError, match="exit_actor"):
        ray.get(a.m.remote())
    assert counter.value == 1  # it is not restarted


# --- cancellation ---------------------------------------------------------------------------------


@pytest.fixture
def Sleeper(ray):
    @ray.remote
    class Sleeper:
        def __init__(self):
            self.seen = []
            self.begun = 0

        async def sleep(self, then="raise"):
            import asyncio

            self.begun += 1
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                self.seen.append(then)
                if then == "raise":
                    raise
            return "its own value"

        async def call(self, other):
            self.begun += 1
            return await other.sleep.remote()

        async def raise_cancelled(self):
            import asyncio

            raise asyncio.CancelledError

        async def state(self):
            return self.begun, self.seen

    return Sleeper


@pytest.mark.parametrize("then", ["raise", "return"])
def test_a_cancelled_coroutine_sees_it(ray, Sleeper, eventually, then):
    a = Sleeper.remote()
    ref = a.sleep.remote(then)
    eventually(lambda: ray.get(a.state.remote()) == (1, []))
    ray.cancel(ref)
    with pytest.raises(ray.exceptions.TaskCancelledError) as caught:
        ray.get(ref)
    assert isinstance(caught.value, ray.exceptions.RayTaskError)
    assert ray.get(a.state.remote()) == (1, [then])


def test_a_coroutine_that_raises_cancelled(ray, Sleeper):
    a = Sleeper.remote()
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(a.raise_cancelled.remote())
    assert ray.get(a.state.remote()) == (0, [])


@pytest.mark.parametrize("recursive", [True, False])
def test_cancelling_a_coroutine_and_its_calls(ray, Sleeper, eventually, recursive):
    outer, inner = Sleeper.remote(), Sleeper.remote()
    ref = outer.call.remote(inner)
    eventually(lambda: ray.get(inner.state.remote())[0] == 1)
    ray.cancel(ref, recursive=recursive)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(ref)
    if recursive:
        eventually(lambda: ray.get(inner.state.remote()) == (1, ["raise"]))
    else:
        assert ray.get(inner.state.remote()) == (1, [])


def test_only_the_calls_of_the_cancelled_coroutine_are_cancelled(ray, Sleeper, eventually):
    outer = Sleeper.remote()
    inner = [Sleeper.remote() for _ in range(3)]
    refs = [outer.call.remote(one) for one in inner]
    for one in inner:
        eventually(lambda one=one: ray.get(one.state.remote())[0] == 1)
    ray.cancel(refs[1])
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(refs[1])
    eventually(lambda: ray.get(inner[1].state.remote()) == (1, ["raise"]))
    assert ray.get([inner[0].state.remote(), inner[2].state.remote()]) == [(1, [])] * 2


@pytest.mark.ray_differs("Ray may run it all the same")
def test_a_coroutine_that_waits_for_its_turn_is_cancelled(ray, gate):
    enter = gate.enter

    @ray.remote(max_concurrency=1)
    class A:
        async def wait(self):
            import asyncio

            await asyncio.get_running_loop().run_in_executor(None, enter)
            return "over"

    a = A.remote()
    first, second = a.wait.remote(), a.wait.remote()
    gate.wait_for_arrivals()
    ray.cancel(second)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(second)
    gate.open()
    assert ray.get(first) == "over"
