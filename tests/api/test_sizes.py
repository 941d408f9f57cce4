"""However large it is, it travels as what it is, or is refused where it is written, with the limit.

Around each limit of the implementation every size is tried, since faults sit at the edges. The
limits themselves are no part of the API: what is checked is that nobody notices them.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

MB = 1 << 20
# Inline values, datagrams, payloads, a receiver's buffer. Headers are smaller than the margin.
LIMITS = [100 * 1024, 160 * 1024, 256 * 1024, 512 * 1024]
EDGES = [limit + offset for limit in LIMITS for offset in (-4096, *range(-130, 3, 3), 4096)]


def payload(n, kind):
    return bytes(n) if kind == "bytes" else np.full(n // 8, n, dtype=np.int64)


def same(found, wanted):
    return type(found) is type(wanted) and np.array_equal(found, wanted)


@pytest.fixture
def healthy(ray):
    """Whatever the test did, the session goes on."""
    yield
    same = ray.remote(lambda x: x)
    assert ray.get([same.remote(i) for i in range(4)], timeout=20) == [0, 1, 2, 3]


pytestmark = pytest.mark.usefixtures("healthy")


@pytest.mark.parametrize("kind", ["bytes", "array"])
@pytest.mark.parametrize("way", ["put", "task", "call", "yield", "keyword"])
def test_at_the_edges(ray, kind, way):
    @ray.remote
    def echo(x=None, *, key=None):
        return key if x is None else x

    @ray.remote(num_cpus=0)
    class A:
        def echo(self, x):
            return x

    values = [payload(n, kind) for n in EDGES]
    if way == "put":
        refs = [ray.put(value) for value in values]
    elif way == "task":
        refs = [echo.remote(value) for value in values]
    elif way == "keyword":
        refs = [echo.remote(key=value) for value in values]
    elif way == "call":
        actor = A.remote()
        refs = [actor.echo.remote(value) for value in values]
    else:
        @ray.remote(num_returns="streaming")
        def stream(values):
            for value in values:
                yield value

        refs = list(stream.remote(values))
    found = ray.get(refs, timeout=30)
    assert len(found) == len(values)
    triples = zip(EDGES, found, values, strict=True)
    assert [n for n, value, wanted in triples if not same(value, wanted)] == []


@pytest.mark.parametrize("each", [90_000, 102_000, 150_000])
def test_several_arguments_and_returns_near_the_edge(ray, each):
    @ray.remote(num_returns=8)
    def shuffle(*args, **kwargs):
        return [*args, *kwargs.values()][::-1]

    @ray.remote(num_cpus=0)
    class A:
        @ray.method(num_returns=8)
        def shuffle(self, *args, **kwargs):
            return [*args, *kwargs.values()][::-1]

    values = [bytes([i]) * (each + i) for i in range(8)]
    actor = A.remote()
    for call in (shuffle, actor.shuffle):
        refs = call.remote(*values[:5], a=values[5], b=values[6], c=values[7])
        assert ray.get(refs, timeout=20) == values[::-1]
        # As refs: inlined by whoever hands them to the worker.
        given = [ray.put(value) for value in values]
        refs = call.remote(*given[:5], a=given[5], b=given[6], c=given[7])
        assert ray.get(refs, timeout=20) == values[::-1]


def test_many_results_at_once_near_the_edge(ray):
    """A batch of outcomes is longer than anything that holds one."""
    make = ray.remote(lambda n: bytes([n]) * (60_000 + n))
    assert ray.get([make.remote(n) for n in range(60)], timeout=20) == [
        bytes([n]) * (60_000 + n) for n in range(60)]


# --- many refs ------------------------------------------------------------------------------------

MANY = 100_000
slow_in_ray = pytest.mark.ray_differs("in Ray it takes minutes")


@pytest.fixture
def many(ray):
    return [ray.put(i) for i in range(MANY)]


@pytest.fixture
def check(ray):
    """In any process: whether these are the refs of `many`; some of them are read."""
    def check(refs):
        some = [0, 1, MANY // 2, MANY - 1]
        return len(refs) == MANY and ray.get([refs[i] for i in some], timeout=20) == some

    return check


@slow_in_ray
def test_many_refs_in_a_put(ray, many, check):
    box = ray.put(many)
    del many
    assert check(ray.get(box, timeout=30))


@slow_in_ray
def test_many_refs_in_an_argument_and_a_return(ray, many, check):
    @ray.remote
    def echo(refs, check_):
        return refs if check_(refs) else None

    ref = echo.remote(many, check)
    del many
    assert check(ray.get(ref, timeout=40))


@slow_in_ray
def test_many_refs_made_in_a_task(ray, check):
    @ray.remote
    def make(n):
        return [ray.put(i) for i in range(n)]

    assert check(ray.get(make.remote(MANY), timeout=40))


@slow_in_ray
def test_many_refs_in_a_yield(ray, many, check):
    @ray.remote(num_returns="streaming")
    def stream(refs):
        yield refs[0]
        yield refs

    first, everything = stream.remote([many])
    assert check(ray.get(first, timeout=40))
    assert check(ray.get(everything, timeout=40)[0])


@slow_in_ray
def test_many_refs_as_arguments(ray, many):
    @ray.remote
    def total(*values):
        return sum(values)

    assert ray.get(total.remote(*many), timeout=50) == sum(range(MANY))


@slow_in_ray
def test_many_refs_as_arguments_of_a_call(ray, many):
    @ray.remote(num_cpus=0)
    class A:
        def total(self, *values):
            return sum(values)

    assert ray.get(A.remote().total.remote(*many), timeout=50) == sum(range(MANY))


@slow_in_ray
def test_many_refs_in_a_closure(ray, many, check):
    @ray.remote
    def closed():
        return check(many)

    assert ray.get(closed.remote(), timeout=40) is True


@slow_in_ray
def test_many_refs_in_a_closure_of_an_actor(ray, many, check):
    @ray.remote(num_cpus=0)
    class A:
        def look(self):
            return check(many)

    assert ray.get(A.remote().look.remote(), timeout=40) is True


@pytest.mark.parametrize("size", [0, 1_000])
def test_many_returns(ray, size):
    count = 10_000
    make = ray.remote(num_returns=count)(lambda: [(n, bytes(size)) for n in range(count)])
    refs = make.remote()
    assert len(refs) == count
    assert [value[0] for value in ray.get(refs, timeout=40)] == list(range(count))


def test_many_returns_of_an_error(ray):
    @ray.remote(num_returns=10_000)
    def fail():
        error = KeyError("all of them")
        error.state = bytes(500_000)
        raise error

    refs = fail.remote()
    for ref in (refs[0], refs[5_000], refs[-1]):
        with pytest.raises(KeyError) as caught:
            ray.get(ref, timeout=30)
        assert caught.value.cause.state == bytes(500_000)


# --- large errors ---------------------------------------------------------------------------------

ERROR_SIZES = [10, 60_000, 98_000, 99_900, 102_400, 165_000, 524_288, MB, 10 * MB]


@pytest.fixture
def fail(ray):
    class NotConverged(Exception):
        def __init__(self, message, state=None):
            super().__init__(message)
            self.state = state

    def fail(n, count=0):
        error = NotConverged("no", np.arange(n // 8))
        error.note = "kept"
        if count:
            raise ExceptionGroup("several", [error, KeyError("k")])
        raise error

    fail.error = NotConverged
    return fail


def assert_not_converged(ray, error, n, kind):
    assert isinstance(error, kind), type(error).__mro__
    assert isinstance(error, ray.exceptions.RayTaskError)
    for one in (error, error.cause):
        assert np.array_equal(one.state, np.arange(n // 8))
        assert one.note == "kept"
    assert "NotConverged: no" in str(error)


@pytest.mark.parametrize("n", ERROR_SIZES)
@pytest.mark.parametrize("place", ["task", "actor", "async", "stream", "dependent"])
def test_an_error_with_a_large_attribute(ray, fail, n, place):
    error = fail.error
    fail_ = fail.__call__

    class Plain:
        def fail(self, n):
            fail_(n)

    class Async:
        async def fail(self, n):
            fail_(n)

    if place == "task":
        ref = ray.remote(max_retries=0)(fail).remote(n)
    elif place == "dependent":
        use = ray.remote(lambda x: x)
        ref = use.remote(use.remote(ray.remote(max_retries=0)(fail).remote(n)))
    elif place == "stream":
        @ray.remote(num_returns="streaming", max_retries=0)
        def stream():
            yield 1
            fail_(n)

        first, ref = stream.remote()
        assert ray.get(first, timeout=20) == 1
    else:
        ref = ray.remote(num_cpus=0)(Plain if place == "actor" else Async).remote().fail.remote(n)
    for _ in range(2):
        with pytest.raises(error) as caught:
            ray.get(ref, timeout=20)
        assert_not_converged(ray, caught.value, n, error)
    with pytest.raises(error):
        ray.get([ray.put(1), ref], timeout=20)
    with pytest.raises(error):
        ref.future().result(timeout=20)
    assert ray.wait([ref], timeout=20) == ([ref], [])


@pytest.mark.parametrize("n", [10, MB])
def test_a_group_of_large_errors(ray, fail, n):
    ref = ray.remote(max_retries=0)(fail).remote(n, 2)
    with pytest.raises(ExceptionGroup) as caught:
        ray.get(ref, timeout=20)
    assert [type(one).__name__ for one in caught.value.exceptions] == ["NotConverged", "KeyError"]
    assert np.array_equal(caught.value.exceptions[0].state, np.arange(n // 8))


@pytest.mark.parametrize("n", [10, 100_000, MB])
def test_a_large_error_is_retried(ray, fail, counter, n):
    add, error, fail_ = counter.add, fail.error, fail.__call__

    @ray.remote(max_retries=2, retry_exceptions=[error])
    def flaky():
        return fail_(n) if add() < 3 else "ok"

    assert ray.get(flaky.remote(), timeout=20) == "ok"
    assert counter.value == 3


@pytest.mark.parametrize("n", [10, 100_000, MB])
def test_a_large_error_is_caught_in_a_task(ray, fail, n):
    failing, error = ray.remote(max_retries=0)(fail), fail.error

    @ray.remote
    def careful():
        try:
            ray.get(failing.remote(n))
        except error as caught:
            return len(caught.cause.state)

    assert ray.get(careful.remote(), timeout=20) == n // 8


def test_a_large_error_of_a_class_of_main(run_driver):
    done = run_driver("""
import numpy as np
class Mine(ValueError):
    pass

@ray.remote(max_retries=0)
def fail(n):
    error = Mine("of main")
    error.state, error.code = np.ones(n), n
    raise error

ray.init(num_cpus=1, **INIT)
for n in (10, 12_000, 13_000, 130_000, 1_300_000):
    try:
        ray.get(fail.remote(n), timeout=20)
    except Mine as error:
        assert (error.code, len(error.state)) == (n, n)
    else:
        raise AssertionError("no error")
print("all done")
""")
    assert done.stdout == "all done\n"


def test_many_large_errors(ray, fail):
    failing, error = ray.remote(max_retries=0)(fail), fail.error
    refs = [failing.remote(MB) for _ in range(20)]
    for ref in refs:
        with pytest.raises(error) as caught:
            ray.get(ref, timeout=20)
        assert len(caught.value.state) == MB // 8


def test_an_error_in_a_constructor(ray, fail):
    fail_ = fail.__call__

    @ray.remote(num_cpus=0, max_restarts=0)
    class A:
        def __init__(self):
            fail_(MB)

        def ping(self):
            pass

    with pytest.raises(ray.exceptions.ActorDiedError, match="NotConverged"):
        ray.get(A.remote().ping.remote(), timeout=20)


# --- large texts ----------------------------------------------------------------------------------

LONG = 10 * MB


def assert_done_or_refused(call, wanted):
    """It works, or the user is told a limit, in a message that can be read."""
    try:
        found = call()
    except ValueError as error:
        text = str(error)
        assert len(text) < 2_000, len(text)
        assert re.search(r"\d\s?[kKMG]?i?B|\d{4}|\d,\d{3}", text), text
    else:
        assert found == wanted


def test_a_long_message_of_an_error(ray):
    @ray.remote(max_retries=0)
    def fail():
        raise ValueError("x" * LONG)

    with pytest.raises(ValueError, match="xxx") as caught:
        ray.get(fail.remote(), timeout=20)
    assert isinstance(caught.value, ray.exceptions.RayTaskError)
    assert caught.value.cause.args == ("x" * LONG,)


@pytest.mark.ray_differs("Ray names no limit")
def test_a_long_name_of_a_task(ray):
    named = ray.remote(lambda: 1)
    assert_done_or_refused(lambda: ray.get(named.options(name="n" * LONG).remote(), timeout=20), 1)


@pytest.mark.ray_differs("Ray names no limit")
@pytest.mark.parametrize("attribute", ["__name__", "__qualname__", "__doc__", "__module__"])
@pytest.mark.parametrize("kind", ["function", "class"])
def test_a_long_name_of_a_definition(ray, attribute, kind):
    def f():
        return 1

    class A:
        def f(self):
            return 1

    setattr(f if kind == "function" else A, attribute, "n" * LONG)

    def call():
        ref = ray.remote(f).remote() if kind == "function" else (
            ray.remote(num_cpus=0)(A).remote().f.remote())
        return ray.get(ref, timeout=20)

    assert_done_or_refused(call, 1)


@pytest.mark.ray_differs("Ray names no limit")
@pytest.mark.parametrize("option", ["name", "namespace"])
def test_a_long_name_of_an_actor(ray, option):
    @ray.remote(num_cpus=0)
    class A:
        def f(self):
            return 1

    options = {"name": "short", option: "n" * LONG}

    def call():
        made = A.options(**options).remote()
        assert ray.get(made.f.remote(), timeout=20) == 1
        found = ray.get_actor(options["name"], options.get("namespace"))
        return ray.get(found.f.remote(), timeout=20)

    assert_done_or_refused(call, 1)
    with pytest.raises(ValueError):
        ray.get_actor("m" * LONG)


@pytest.mark.ray_differs("Ray names no limit")
@pytest.mark.parametrize("kind", ["task", "actor"])
@pytest.mark.parametrize("part", ["value", "name"])
def test_a_long_environment_variable(ray, kind, part):
    variable, text = ("V" * LONG, "v") if part == "name" else ("VARIABLE", "v" * LONG)
    runtime_env = {"env_vars": {variable: text}}

    def read(variable=variable):
        import os

        return os.environ[variable] == text

    class A:
        def read(self):
            return read()

    def call():
        if kind == "task":
            ref = ray.remote(runtime_env=runtime_env)(read).remote()
        else:
            ref = ray.remote(num_cpus=0, runtime_env=runtime_env)(A).remote().read.remote()
        return ray.get(ref, timeout=20)

    assert_done_or_refused(call, True)


@pytest.mark.ray_differs("Ray names no limit")
def test_a_long_name_of_a_resource(ray):
    wanting = ray.remote(lambda: 1).options(resources={"r" * LONG: 0.5})
    try:
        ref = wanting.remote()
    except ValueError as error:
        assert len(str(error)) < 2_000
    else:
        assert ray.wait([ref], timeout=0.2) == ([], [ref])
        ray.cancel(ref)


def test_a_long_repr_of_an_actor(ray):
    @ray.remote(num_cpus=0)
    class A:
        def __repr__(self):
            return "r" * LONG

        def fail(self):
            raise KeyError("failed")

        def say(self):
            print("said")
            return 1

    actor = A.remote()
    assert ray.get(actor.say.remote(), timeout=20) == 1
    with pytest.raises(KeyError):
        ray.get(actor.fail.remote(), timeout=20)
    assert ray.get(actor.say.remote(), timeout=20) == 1


def test_a_long_repr_of_what_is_refused(ray):
    class Long:
        def __repr__(self):
            return "r" * LONG

        def __reduce__(self):
            raise TypeError("no")

    with pytest.raises(TypeError):
        ray.remote(lambda x: x).remote(Long())
    with pytest.raises(TypeError):
        ray.put(Long())
    with pytest.raises(TypeError):
        ray.get(ray.remote(lambda: Long()).remote(), timeout=20)


@pytest.mark.hpcray_only("a sentence instead of a slow answer")
def test_questions_have_a_limit(ray):
    """A look-up, a placement group and a filter of any length: found, not found, or refused."""
    with pytest.raises(ValueError, match="Failed to look up|not found|no actor"):
        ray.get_actor("x" * 1_000_000)
    for asked in (
        lambda: ray.get_actor("x" * (1 << 20)),
        lambda: ray.get_actor("x", namespace="n" * 10_000_000),
        lambda: ray.util.placement_group([{"CPU": 1}], name="x" * 300_000_000),
        lambda: ray.util.placement_group([{"CPU": 0.001}] * 200_000),
    ):
        with pytest.raises(ValueError, match="at most 1,048,576 B"):
            asked()
