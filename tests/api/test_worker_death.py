"""Workers die: tasks are retried, actors restarted, and what cannot be is an error that says so.

How a worker dies matters (exit, signal, fault in C code), so each way is tried.
"""

from __future__ import annotations

import os
import signal as signals
import sys

import pytest


def _exit():
    import os

    os._exit(1)


def _exit_zero():
    import os

    os._exit(0)


def _sigkill():
    import os

    os.kill(os.getpid(), 9)


def _segfault():
    import ctypes

    ctypes.string_at(0)


def _abort():
    import os

    os.abort()


# Sources and not functions: a worker cannot import this module, and a nested function travels.
DEATHS = {f.__name__.strip("_"): f for f in (_exit, _exit_zero, _sigkill, _segfault, _abort)}


@pytest.fixture(params=DEATHS, ids=list(DEATHS))
def die(request):
    code = DEATHS[request.param].__code__

    def die():
        import types

        types.FunctionType(code, {"__builtins__": __builtins__})()

    return die


@pytest.fixture
def exit_now():
    def exit_now():
        os._exit(1)

    return exit_now


def test_a_task_that_always_dies(ray, die, counter):
    add = counter.add

    @ray.remote(max_retries=0)
    def f():
        add()
        die()

    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(f.remote(), timeout=30)
    assert counter.value == 1
    assert ray.get(ray.remote(lambda: "on").remote()) == "on"


def test_a_task_that_dies_once_is_retried(ray, die, counter):
    add = counter.add

    @ray.remote(max_retries=1)
    def f():
        if add() == 1:
            die()
        return "second time"

    assert ray.get(f.remote(), timeout=30) == "second time"
    assert counter.value == 2


def test_max_retries_is_the_number_of_retries(ray, exit_now, counter):
    add = counter.add

    @ray.remote(max_retries=2)
    def f():
        add()
        exit_now()

    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(f.remote(), timeout=40)
    assert counter.value == 3


def test_three_retries_by_default(ray, exit_now, counter):
    add = counter.add

    @ray.remote
    def f():
        if add() <= 3:
            exit_now()
        return "fourth time"

    assert ray.get(f.remote(), timeout=40) == "fourth time"


def test_unlimited_retries(ray, exit_now, counter):
    add = counter.add

    @ray.remote(max_retries=-1)
    def f():
        if add() <= 5:
            exit_now()
        return "sixth time"

    assert ray.get(f.remote(), timeout=60) == "sixth time"


def test_retry_gets_the_same_arguments(ray, exit_now, counter):
    add = counter.add

    @ray.remote
    def f(array, other, *, key):
        if add() == 1:
            exit_now()
        return float(array.sum()), other, key

    import numpy as np

    ref = f.remote(ray.put(np.ones(300_000)), ray.put(2), key="k")
    assert ray.get(ref, timeout=30) == (300_000.0, 2, "k")


def test_every_return_of_a_dead_task_fails(ray, exit_now):
    refs = ray.remote(num_returns=2, max_retries=0)(exit_now).remote()
    for ref in refs:
        with pytest.raises(ray.exceptions.WorkerCrashedError):
            ray.get(ref, timeout=30)


def test_dependent_task_of_a_dead_one(ray, exit_now):
    same = ray.remote(lambda x: x)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(same.remote(ray.remote(max_retries=0)(exit_now).remote()), timeout=30)


def test_other_tasks_do_not_notice(ray, exit_now, gate):
    enter = gate.enter
    other = ray.remote(enter).remote("other")
    gate.wait_for_arrivals()
    dead = ray.remote(max_retries=0)(exit_now).remote()
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(dead, timeout=30)
    gate.open()
    assert ray.get(other) == "other"


def test_queued_tasks_run_after_a_death(ray, exit_now):
    f = ray.remote(lambda i: i)
    dead = ray.remote(max_retries=0)(exit_now)
    refs = []
    for i in range(20):
        refs.append(f.remote(i))
        if i % 7 == 3:
            dead.remote()
    assert ray.get(refs, timeout=40) == list(range(20))


def test_death_while_blocked_in_get(ray, gate, tmp_path, counter):
    enter, add = gate.enter, counter.add
    pid_file = str(tmp_path / "pid")
    late = ray.remote(lambda: enter("late")).remote()
    gate.wait_for_arrivals()

    @ray.remote(max_retries=1)
    def waits(box):
        import os

        if add() == 1:
            with open(pid_file + ".new", "w") as out:
                out.write(str(os.getpid()))
            os.rename(pid_file + ".new", pid_file)
        return ray.get(box[0])

    ref = waits.remote([late])
    while not os.path.exists(pid_file):
        ray.wait([ref], timeout=0.02)
    ray.wait([ref], timeout=0.1)
    os.kill(int((tmp_path / "pid").read_text()), signals.SIGKILL)
    assert ray.wait([ref], timeout=0.2) == ([], [ref])
    gate.open()
    assert ray.get(ref, timeout=30) == "late"
    assert counter.value == 2


def test_values_of_a_dead_worker_stay(ray):
    # The result is the node's as soon as the task has ended; the worker may go.
    import numpy as np

    @ray.remote
    class Maker:
        def make(self):
            return [ray.put(np.full(300_000, 5.0)), ray.put("small")]

        def big(self):
            return np.full(300_000, 6.0)

        def die(self):
            os._exit(1)

    maker = Maker.remote()
    big = maker.big.remote()
    ray.wait([big])
    ray.kill(maker)
    assert (ray.get(big, timeout=20) == 6.0).all()


@pytest.mark.hpcray_only("the node owns a put; in Ray it is lost with the worker that made it")
def test_puts_of_a_dead_worker_stay(ray):
    import numpy as np

    @ray.remote
    class Maker:
        def make(self):
            return [ray.put(np.full(300_000, 5.0)), ray.put("small")]

    maker = Maker.remote()
    big, small = ray.get(maker.make.remote())
    ray.kill(maker)
    assert (ray.get(big, timeout=20) == 5.0).all()
    assert ray.get(small, timeout=20) == "small"


# --- actors ---------------------------------------------------------------------------------------


@pytest.fixture
def Mortal(ray):
    @ray.remote
    class Mortal:
        def __init__(self):
            self.calls = 0

        def call(self):
            self.calls += 1
            return self.calls

        def pid(self):
            return os.getpid()

        def do(self, what):
            return what()

        def restarted(self):
            return ray.get_runtime_context().was_current_actor_reconstructed

    return Mortal


def test_actor_that_dies_fails_the_call_and_all_later_ones(ray, Mortal, die):
    mortal = Mortal.remote()
    assert ray.get(mortal.call.remote()) == 1
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(mortal.do.remote(die), timeout=30)
    for _ in range(2):
        with pytest.raises(ray.exceptions.ActorDiedError) as caught:
            ray.get(mortal.call.remote(), timeout=30)
    assert caught.value.actor_id == mortal._actor_id.hex()


def test_actor_killed_from_outside(ray, Mortal):
    mortal = Mortal.remote()
    os.kill(ray.get(mortal.pid.remote()), signals.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        while True:  # the node may not have noticed yet
            ray.get(mortal.call.remote(), timeout=30)


def test_queued_calls_fail_with_the_actor(ray, Mortal, gate):
    enter = gate.enter
    mortal = Mortal.remote()

    def wait_and_die():
        enter()
        os._exit(1)

    refs = [mortal.do.remote(wait_and_die), *[mortal.call.remote() for _ in range(5)]]
    gate.wait_for_arrivals()
    gate.open()
    for ref in refs:
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(ref, timeout=30)


def test_kill(ray, Mortal, eventually):
    mortal = Mortal.remote()
    pid = ray.get(mortal.pid.remote())
    ray.kill(mortal)
    with pytest.raises(ray.exceptions.ActorDiedError, match="kill"):
        ray.get(mortal.call.remote(), timeout=30)
    eventually(lambda: not os.path.exists(f"/proc/{pid}"))


def test_kill_fails_the_running_call_and_the_queue(ray, Mortal, gate):
    enter = gate.enter
    mortal = Mortal.remote()
    refs = [mortal.do.remote(enter), *[mortal.call.remote() for _ in range(5)]]
    gate.wait_for_arrivals()
    ray.kill(mortal)
    for ref in refs:
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(ref, timeout=30)


def test_kill_before_the_actor_is_up(ray, gate):
    enter = gate.enter

    @ray.remote
    class Slow:
        def __init__(self):
            enter()

        def m(self):
            return 1

    slow = Slow.remote()
    ref = slow.m.remote()
    gate.wait_for_arrivals()
    ray.kill(slow)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(ref, timeout=30)


def test_kill_twice(ray, Mortal):
    mortal = Mortal.remote()
    ray.get(mortal.call.remote())
    ray.kill(mortal)
    ray.kill(mortal)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(mortal.call.remote(), timeout=30)


def test_kill_does_not_restart(ray, Mortal):
    mortal = Mortal.options(max_restarts=-1).remote()
    last = ray.get(mortal.call.remote())
    ray.kill(mortal)
    with pytest.raises(ray.exceptions.ActorDiedError):
        while True:  # a call may still get in before the kill; none may meet a new state
            value = ray.get(mortal.call.remote(), timeout=30)
            assert value == last + 1
            last = value


def test_kill_with_restart(ray, Mortal):
    mortal = Mortal.options(max_restarts=1).remote()
    pid = ray.get(mortal.pid.remote())
    ray.kill(mortal, no_restart=False)
    while (now := _call_until_up(ray, mortal, "pid")) == pid:
        pass
    assert now != pid


def test_kill_from_a_task(ray, Mortal):
    mortal = Mortal.remote()
    ray.get(mortal.call.remote())
    ray.get(ray.remote(lambda actor: ray.kill(actor)).remote(mortal))
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(mortal.call.remote(), timeout=30)


def test_actor_is_restarted_with_a_new_state(ray, Mortal, exit_now):
    mortal = Mortal.options(max_restarts=1).remote()
    assert ray.get([mortal.call.remote(), mortal.call.remote()]) == [1, 2]
    assert ray.get(mortal.restarted.remote()) is False
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(mortal.do.remote(exit_now), timeout=30)
    assert _call_until_up(ray, mortal) == 1
    assert ray.get(mortal.restarted.remote()) is True


def test_restarts_are_counted(ray, Mortal, exit_now):
    mortal = Mortal.options(max_restarts=1).remote()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(mortal.do.remote(exit_now), timeout=30)
    _call_until_up(ray, mortal)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(mortal.do.remote(exit_now), timeout=30)
    with pytest.raises(ray.exceptions.ActorDiedError, match="max_restarts=1 is used up"):
        _call_until_up(ray, mortal)


def test_max_task_retries_sends_the_call_again(ray, counter):
    add = counter.add

    @ray.remote(max_restarts=1, max_task_retries=1)
    class A:
        def dies_once(self):
            if add() == 1:
                os._exit(1)
            return "second time"

    a = A.remote()
    assert ray.get(a.dies_once.remote(), timeout=40) == "second time"
    assert counter.value == 2


@pytest.fixture
def restarting(ray, gate, counter):
    """(actor, its gate): it has died, and its second constructor waits at the gate."""
    enter, add = gate.enter, counter.add

    def make(**options):
        @ray.remote(max_restarts=2, **options)
        class Actor:
            def __init__(self):
                if add() > 1:
                    enter()

            def pid(self):
                return os.getpid()

        actor = Actor.remote()
        os.kill(ray.get(actor.pid.remote()), signals.SIGKILL)
        gate.wait_for_arrivals()
        return actor

    return make


def test_a_call_while_the_actor_restarts_is_unavailable(ray, restarting, gate):
    actor = restarting()
    with pytest.raises(ray.exceptions.ActorUnavailableError, match="restart") as caught:
        ray.get(actor.pid.remote(), timeout=20)
    assert caught.value.actor_id == actor._actor_id.hex()
    # So it is from elsewhere, too.
    with pytest.raises(ray.exceptions.ActorUnavailableError):
        ray.get(ray.remote(num_cpus=0)(lambda: ray.get(actor.pid.remote())).remote(), timeout=20)
    gate.open()
    _call_until_up(ray, actor, "pid")


def test_a_call_with_retries_waits_for_the_restart(ray, restarting, gate):
    actor = restarting(max_task_retries=1)
    refs = [actor.pid.remote() for _ in range(3)]
    assert ray.wait(refs, timeout=0.2) == ([], refs)
    gate.open()
    assert len(set(ray.get(refs, timeout=30))) == 1


def test_calls_behind_the_one_that_crashes_are_unavailable(ray, counter, gate):
    add, enter = counter.add, gate.enter

    @ray.remote(max_restarts=1)
    class A:
        def die(self):
            enter()
            os._exit(1)

        def count(self):
            add()

    a = A.remote()
    refs = [a.die.remote(), *[a.count.remote() for _ in range(200)]]
    gate.wait_for_arrivals()
    gate.open()
    for ref in refs:
        with pytest.raises(ray.exceptions.ActorUnavailableError):
            ray.get(ref, timeout=30)
    _call_until_up(ray, a, "count")
    assert counter.value == 1


def test_calls_before_the_first_constructor_wait_for_one_that_works(ray, gate, counter):
    add, enter = counter.add, gate.enter

    @ray.remote(max_restarts=2)
    class A:
        def __init__(self):
            if add() < 3:
                enter()
                os._exit(1)

        def m(self):
            return "up"

    a = A.remote()
    ref = a.m.remote()
    gate.wait_for_arrivals()
    gate.open()
    assert ray.get(ref, timeout=30) == "up"


def test_a_constructor_that_crashes_is_not_tried_again_without_a_handle(
    ray, gate, counter, eventually
):
    add, enter = counter.add, gate.enter

    @ray.remote(max_restarts=-1)
    class A:
        def __init__(self):
            add()
            enter()
            os._exit(1)

    a = A.options(name="hopeless").remote()
    gate.wait_for_arrivals()
    del a
    gate.open()

    def gone():
        try:
            ray.get_actor("hopeless")
        except ValueError:
            return True
        return False

    eventually(gone)
    count = counter.value
    ray.get(ray.remote(lambda: None).remote())
    assert counter.value == count


def test_calls_without_retries_are_not_sent_again(ray, counter):
    add = counter.add

    @ray.remote(max_restarts=1)
    class A:
        def dies(self):
            add()
            os._exit(1)

    a = A.remote()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(a.dies.remote(), timeout=30)
    assert counter.value == 1


def test_constructor_arguments_are_kept_for_a_restart(ray, exit_now):
    @ray.remote(max_restarts=1)
    class A:
        def __init__(self, x, *, y):
            self.both = x, y

        def get(self):
            return self.both

        def do(self, what):
            what()

    a = A.remote(ray.put(1), y="two")
    assert ray.get(a.get.remote()) == (1, "two")
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(a.do.remote(exit_now), timeout=30)
    assert _call_until_up(ray, a, "get") == (1, "two")


@pytest.mark.parametrize("code", [
    pytest.param(None, marks=pytest.mark.ray_differs("Ray takes sys.exit() for a crash")),
    0, 1, "why",
])
def test_system_exit_that_says_it_failed_is_a_crash(ray, code):
    @ray.remote(max_restarts=1)
    class A:
        def leave(self):
            sys.exit(code)

        def m(self):
            return 1

    a = A.remote()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(a.leave.remote(), timeout=30)
    if code in (None, 0):
        with pytest.raises(ray.exceptions.ActorDiedError):
            _call_until_up(ray, a, "m")
    else:
        assert _call_until_up(ray, a, "m") == 1


def test_death_in_the_constructor(ray):
    @ray.remote
    class A:
        def __init__(self):
            os._exit(1)

        def m(self):
            return 1

    a = A.remote()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(a.m.remote(), timeout=30)


def test_task_that_waits_for_a_dying_actor(ray, Mortal, gate):
    enter = gate.enter
    mortal = Mortal.remote()

    def wait_and_die():
        enter()
        os._exit(1)

    @ray.remote
    def waits():
        try:
            ray.get(mortal.do.remote(wait_and_die))
        except ray.exceptions.RayActorError:
            return "knows"

    ref = waits.remote()
    gate.wait_for_arrivals()
    gate.open()
    assert ray.get(ref, timeout=30) == "knows"


def _call_until_up(ray, actor, method="call"):
    # A call sent while the actor restarts may fail as unavailable; that is documented.
    while True:
        try:
            return ray.get(getattr(actor, method).remote(), timeout=30)
        except ray.exceptions.ActorUnavailableError:
            continue


@pytest.mark.hpcray_only("what a node has pinned is not seen from outside in Ray")
@pytest.mark.parametrize("how", ["function", "argument"])
def test_arguments_of_a_task_that_cannot_start_are_let_go(ray, eventually, how):
    """Its function, or one of its arguments, cannot be unpickled: the others are not kept."""
    from hpcray.client import process

    class Bomb:
        def __reduce__(self):
            return (exec, ("raise ValueError('cannot be read')",))

    def used():
        return process.current_client().request("statistics")["object_bytes"]

    before = used()
    large = ray.put(bytes(1_000_000))
    if how == "function":
        bomb = Bomb()
        task = ray.remote(lambda *args: bomb)
        ref = task.remote(large)
    else:
        bad = ray.put([Bomb(), bytes(200_000)])
        ref = ray.remote(lambda *args: None).remote(bad, large)
        del bad
    with pytest.raises(Exception, match="cannot be read"):
        ray.get(ref)
    del large, ref
    eventually(lambda: used() <= before)


def test_a_call_that_ends_its_actor_runs_once(ray, tmp_path):
    # One call after the other: before long the caller sends them itself, and the actor may be dead
    # before its node has heard of the call that did it.
    trace = tmp_path / "trace"

    @ray.remote(max_restarts=-1)
    class Fragile:
        def ping(self):
            return "pong"

        def end(self, number):
            import os

            with open(trace, "a") as file:
                file.write(f"{number}\n")
            os._exit(1)

    actor = Fragile.remote()
    for number in range(10):
        for _ in range(5):
            assert ray.get(actor.ping.options(max_task_retries=-1).remote()) == "pong"
        with pytest.raises((ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError)):
            ray.get(actor.end.remote(number))
    assert trace.read_text().split() == [str(number) for number in range(10)]
