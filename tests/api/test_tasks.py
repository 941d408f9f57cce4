"""Remote functions: calling them, what may be one, how they nest."""

from __future__ import annotations

import math
import os
import sys

import numpy as np
import pytest


def test_runs_in_another_process(ray):
    @ray.remote
    def pid():
        return os.getpid()

    assert ray.get(pid.remote()) != os.getpid()


def test_decorator_with_options(ray):
    @ray.remote(num_cpus=1, num_returns=2)
    def pair():
        return 1, 2

    first, second = pair.remote()
    assert ray.get([first, second]) == [1, 2]


def test_remote_as_a_function(ray):
    assert ray.get(ray.remote(lambda x: x * 2).remote(21)) == 42
    assert ray.get(ray.remote(num_cpus=0)(lambda x: x * 2).remote(21)) == 42


def test_a_keyword_may_be_called_self(ray):
    @ray.remote
    def f(self, args, kwargs, **others):
        return self, args, kwargs, others

    assert ray.get(f.remote(self=1, args=2, kwargs=3, name=4)) == (1, 2, 3, {"name": 4})


@pytest.mark.ray_differs("remote() of Ray's actors has a `self` of its own")
def test_a_keyword_of_an_actor_may_be_called_self(ray):
    @ray.remote
    class A:
        def __init__(this, self, args):
            this.made = (self, args)

        def m(this, self, args):
            return (*this.made, self, args)

    assert ray.get(A.remote(self=1, args=2).m.remote(self=3, args=4)) == (1, 2, 3, 4)


def test_defaults_varargs_and_keywords(ray):
    @ray.remote
    def f(a, b=2, *rest, c, d=4, **more):
        return a, b, rest, c, d, more

    assert ray.get(f.remote(1, c=3)) == (1, 2, (), 3, 4, {})
    assert ray.get(f.remote(1, 5, 6, 7, c=3, d=8, e=9)) == (1, 5, (6, 7), 3, 8, {"e": 9})
    assert ray.get(f.remote(c=3, a=1)) == (1, 2, (), 3, 4, {})


def test_positional_only(ray):
    @ray.remote
    def f(a, /, b):
        return a, b

    assert ray.get(f.remote(1, b=2)) == (1, 2)
    with pytest.raises(TypeError):
        f.remote(a=1, b=2)


def test_wrong_arguments_fail_at_the_call(ray):
    @ray.remote
    def f(a, *, b):
        return a, b

    with pytest.raises(TypeError, match="missing a required .*argument: 'a'"):
        f.remote(b=1)
    with pytest.raises(TypeError, match="missing a required .*argument: 'b'"):
        f.remote(1)
    with pytest.raises(TypeError, match="too many positional arguments"):
        f.remote(1, 2, b=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'c'"):
        f.remote(1, b=1, c=1)


def test_arguments_are_copies(ray):
    @ray.remote
    def append(values):
        values.append(1)
        return values

    values = [0]
    assert ray.get(append.remote(values)) == [0, 1]
    assert values == [0]


def test_arguments_are_taken_at_the_call(ray, gate):
    enter = gate.enter

    @ray.remote
    def held(values):
        enter()
        return values

    values = [1]
    ref = held.remote(values)
    values.append(2)
    gate.open()
    assert ray.get(ref) == [1]


def test_return_values(ray):
    @ray.remote
    def same(x):
        return x

    values = [None, True, 0, -1, 2**100, 1.5, 1j, "", "ü\0", b"", b"\xff", (), [], {}, set(),
              frozenset({1}), ..., range(3), int, len]
    assert ray.get([same.remote(v) for v in values]) == values
    assert math.isnan(ray.get(same.remote(math.nan)))


@pytest.mark.parametrize("count", [2, 5])
def test_several_returns(ray, count):
    @ray.remote(num_returns=count)
    def f():
        return tuple(range(count))

    refs = f.remote()
    assert isinstance(refs, list)
    assert len(refs) == len(set(refs)) == count
    assert ray.get(refs) == list(range(count))


def test_several_returns_from_a_list(ray):
    assert ray.get(ray.remote(num_returns=2)(lambda: [5, 6]).remote()) == [5, 6]


def test_no_returns(ray, counter, eventually):
    add = counter.add

    @ray.remote(num_returns=0)
    def f():
        add()

    assert f.remote() is None
    eventually(lambda: counter.value == 1)


def test_one_return_keeps_a_tuple(ray):
    assert ray.get(ray.remote(num_returns=1)(lambda: (1, 2)).remote()) == (1, 2)


@pytest.mark.parametrize("returned", [(1,), (1, 2, 3), ()], ids=str)
def test_wrong_number_of_returns_fails_every_ref(ray, returned):
    refs = ray.remote(num_returns=2)(lambda: returned).remote()
    for ref in refs:
        with pytest.raises(ValueError, match=f"{len(returned)}.*num_returns=2"):
            ray.get(ref)


@pytest.mark.parametrize("kind", [dict.fromkeys, np.array, bytes], ids=lambda kind: kind.__name__)
def test_several_returns_from_anything_with_a_length(ray, kind):
    assert ray.get(ray.remote(num_returns=2)(lambda: kind([3, 4])).remote()) == [3, 4]


def test_several_returns_of_something_without_a_length(ray):
    for ref in ray.remote(num_returns=2)(lambda: 5).remote():
        with pytest.raises(ray.exceptions.RayTaskError):
            ray.get(ref)


def test_one_of_several_returns_may_be_dropped(ray):
    @ray.remote(num_returns=3)
    def f():
        return 1, 2, 3

    _, second, _ = f.remote()
    assert ray.get(second) == 2


def test_options_do_not_change_the_function(ray):
    @ray.remote
    def f():
        return 1, 2

    assert ray.get(f.options(num_returns=2).remote()) == [1, 2]
    assert ray.get(f.remote()) == (1, 2)


def test_options_may_be_kept_and_used_again(ray):
    f = ray.remote(lambda x: (x, x)).options(num_returns=2)
    assert [ray.get(f.remote(i)) for i in range(3)] == [[0, 0], [1, 1], [2, 2]]


def test_options_accept_everything_documented(ray):
    f = ray.remote(lambda: 1)
    ref = f.options(
        num_cpus=1, num_gpus=0, memory=1, resources={}, num_returns=1, max_retries=2,
        retry_exceptions=True, name="a name", runtime_env=None,
        scheduling_strategy="DEFAULT",
    ).remote()
    assert ray.get(ref) == 1


def test_none_means_the_default(ray):
    f = ray.remote(lambda: 1).options(num_cpus=None, num_returns=None, resources=None, name=None)
    assert ray.get(f.remote()) == 1


@pytest.mark.ray_differs("Ray documents None as the default and then fails at the call")
def test_max_retries_none_means_the_default(ray):
    assert ray.get(ray.remote(lambda: 1).options(max_retries=None).remote()) == 1


def test_nested_tasks(ray):
    @ray.remote
    def inner(x):
        return x + 1

    @ray.remote
    def outer(x):
        return ray.get(inner.remote(x)) + 1

    assert ray.get(outer.remote(1)) == 3


def test_recursion(ray):
    @ray.remote
    def fib(n):
        if n < 2:
            return n
        return sum(ray.get([fib.remote(n - 1), fib.remote(n - 2)]))

    assert ray.get(fib.remote(6)) == 8


def test_recursion_deeper_than_the_cpus(ray):
    @ray.remote
    def down(n):
        return 0 if n == 0 else 1 + ray.get(down.remote(n - 1))

    assert ray.get(down.remote(10)) == 10


def test_mutual_recursion(ray):
    @ray.remote
    def even(n):
        return True if n == 0 else ray.get(odd.remote(n - 1))

    @ray.remote
    def odd(n):
        return False if n == 0 else ray.get(even.remote(n - 1))

    assert ray.get(even.remote(4)) is True


def test_many_small_tasks(ray):
    f = ray.remote(lambda i: i)
    assert ray.get([f.remote(i) for i in range(500)]) == list(range(500))


def test_tasks_run_in_parallel(ray, gate):
    # Both must have arrived before either may leave.
    enter = gate.enter
    refs = [ray.remote(enter).remote(i) for i in range(2)]
    gate.wait_for_arrivals(2)
    gate.open()
    assert ray.get(refs) == [0, 1]


def test_a_slow_task_does_not_hold_up_later_ones(ray, gate):
    enter = gate.enter
    f = ray.remote(lambda x: x)
    slow = ray.remote(enter).remote("slow")
    gate.wait_for_arrivals()
    assert ray.get([f.remote(i) for i in range(50)], timeout=20) == list(range(50))
    gate.open()
    assert ray.get(slow) == "slow"


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_worker_ends_after_max_calls(ray, limit):
    """Whether the calls come all at once or one by one."""
    @ray.remote(max_calls=limit)
    def pid():
        return os.getpid()

    at_once = ray.get([pid.remote() for _ in range(4 * limit)])
    assert max(at_once.count(one) for one in at_once) <= limit
    one_by_one = at_once + [ray.get(pid.remote()) for _ in range(4 * limit)]
    assert max(one_by_one.count(one) for one in one_by_one) <= limit


def test_a_worker_with_a_gpu_ends_after_one_task(cluster):
    """Only then is all memory of the GPU free again; unless told otherwise."""
    ray = cluster(num_cpus=2, num_gpus=1)

    def own_pid():
        return os.getpid()

    pid = ray.remote(num_gpus=1)(own_pid)
    assert len({ray.get(pid.remote()) for _ in range(4)}) == 4
    pid = ray.remote(num_gpus=1, max_calls=2)(own_pid)
    assert len({ray.get(pid.remote()) for _ in range(4)}) == 2


def test_closure_captures_values(ray):
    factor, table = 3, {"a": [1]}

    @ray.remote
    def f(x):
        return x * factor, table["a"]

    assert ray.get(f.remote(2)) == (6, [1])


def test_closure_is_taken_once_when_the_function_is_first_called(ray):
    factor = 1
    f = ray.remote(lambda: factor)
    assert ray.get(f.remote()) == 1
    factor = 2
    assert ray.get(f.remote()) == 1


def test_closure_captures_modules(ray):
    import json as j

    f = ray.remote(lambda: j.dumps([1]) + os.sep)
    assert ray.get(f.remote()) == "[1]" + os.sep


def test_closure_captures_a_remote_function(ray):
    inner = ray.remote(lambda x: x + 1)
    outer = ray.remote(lambda x: ray.get(inner.remote(x)))
    assert ray.get(outer.remote(1)) == 2


def test_remote_function_as_an_argument(ray):
    inner = ray.remote(lambda x: x + 1)

    @ray.remote
    def call(f, x):
        return ray.get(f.remote(x))

    assert ray.get(call.remote(inner, 1)) == 2


def test_function_defined_in_a_task(ray):
    @ray.remote
    def outer():
        @ray.remote
        def inner():
            return "inner"

        return ray.get(inner.remote())

    assert ray.get(outer.remote()) == "inner"


def test_two_functions_of_the_same_name(ray):
    def make(value):
        @ray.remote
        def f():
            return value

        return f

    first, second = make(1), make(2)
    assert ray.get([first.remote(), second.remote(), first.remote()]) == [1, 2, 1]


@pytest.mark.ray_differs("Ray shows the doc of its own wrapper")
def test_function_keeps_its_name_and_doc(ray):
    @ray.remote
    def documented():
        """What it does."""

    assert documented.__doc__ == "What it does."
    assert documented.__name__ == "documented"


def test_local_class_instances_travel(ray):
    class Point:
        def __init__(self, x):
            self.x = x

        def __eq__(self, other):
            return type(other) is Point and self.x == other.x

        __hash__ = None

    @ray.remote
    def move(point):
        return Point(point.x + 1)

    assert ray.get(move.remote(Point(1))) == Point(2)


def test_global_state_of_the_driver_is_not_shared(ray):
    os.environ["HPCRAY_TEST_ONLY_IN_DRIVER"] = "1"
    try:
        f = ray.remote(lambda: os.environ.get("HPCRAY_TEST_ONLY_IN_DRIVER"))
        assert ray.get(f.remote()) is None
    finally:
        del os.environ["HPCRAY_TEST_ONLY_IN_DRIVER"]


def test_workers_have_the_drivers_directory_and_path(ray):
    f = ray.remote(lambda: (os.getcwd(), sys.path))
    cwd, path = ray.get(f.remote())
    assert cwd == os.getcwd()
    assert set(filter(None, sys.path)) <= set(path)


def test_module_beside_the_driver_can_be_imported(run_driver, tmp_path):
    (tmp_path / "beside.py").write_text("def value():\n    return 'beside'\n")
    done = run_driver(
        """
        import beside
        ray.init(num_cpus=1, **INIT)
        print(ray.get(ray.remote(beside.value).remote()))
        """
    )
    assert done.stdout.split() == ["beside"]


def test_functions_of_the_main_script(run_driver):
    done = run_driver(
        """
        from dataclasses import dataclass

        LIMIT = 3

        @dataclass
        class Job:
            n: int

        @ray.remote
        def run(job: Job) -> Job:
            return Job(job.n + LIMIT)

        @ray.remote
        class Host:
            def run(self, job: Job) -> Job:
                return ray.get(run.remote(job))

        if __name__ == "__main__":
            ray.init(num_cpus=2, **INIT)
            host = Host.remote()
            print(ray.get(host.run.remote(Job(1))) == Job(4))
        """
    )
    assert done.stdout.split() == ["True"]


def test_each_worker_draws_its_own_random_numbers(ray, gate):
    enter = gate.enter

    @ray.remote
    def draw():
        import random

        import numpy

        enter()  # both at once, so in two processes
        return random.random(), numpy.random.random()

    refs = [draw.remote() for _ in range(2)]
    gate.wait_for_arrivals(2)
    gate.open()
    (a, b), (c, d) = ray.get(refs)
    assert a != c
    assert b != d


def test_generator_task(ray):
    @ray.remote
    def count(n):
        for i in range(n):
            yield i

    assert [ray.get(ref) for ref in count.remote(3)] == [0, 1, 2]


@pytest.mark.ray_differs("Ray drives the generator with send, which a plain iterator lacks")
def test_generator_that_yields_from_an_iterator(ray):
    @ray.remote
    def count(n):
        yield from range(n)

    assert [ray.get(ref) for ref in count.remote(3)] == [0, 1, 2]


def test_generator_yields_before_it_ends(ray, gate):
    enter = gate.enter

    @ray.remote
    def two():
        yield 1
        enter()
        yield 2

    refs = two.remote()
    assert ray.get(next(refs)) == 1
    gate.wait_for_arrivals()
    gate.open()
    assert ray.get(next(refs)) == 2
    with pytest.raises(StopIteration):
        next(refs)


def test_generator_error_comes_after_what_was_yielded(ray):
    @ray.remote
    def breaks():
        yield 1
        raise KeyError("late")

    refs = breaks.remote()
    assert ray.get(next(refs)) == 1
    with pytest.raises(KeyError):
        ray.get(next(refs))
    with pytest.raises(StopIteration):
        next(refs)
