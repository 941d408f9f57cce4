"""Misuse: it fails where it is written, with a text that says what would work."""

from __future__ import annotations

import functools

import pytest


def function():
    return 1


class Class:
    def m(self):
        return 1


# --- calling things directly ----------------------------------------------------------------------


def test_calling_a_remote_function(ray):
    f = ray.remote(function)
    with pytest.raises(TypeError, match=r"function\.remote\("):
        f()


def test_calling_with_options(ray):
    with pytest.raises((TypeError, AttributeError)):
        ray.remote(function).options(num_cpus=1)()


def test_instantiating_an_actor_class(ray):
    with pytest.raises(TypeError, match=r"Class\.remote\("):
        ray.remote(Class)()


def test_calling_an_actor_method(ray):
    actor = ray.remote(Class).remote()
    with pytest.raises(TypeError, match=r"m\.remote\("):
        actor.m()


def test_inheriting_from_an_actor_class(ray):
    base = ray.remote(Class)
    with pytest.raises(TypeError, match="[Ii]nherit"):

        class Derived(base):
            pass


# --- what `remote` takes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "thing",
    [functools.partial(int, "3"), type("C", (), {"__call__": lambda self: 1})()],
    ids=["partial", "callable object"],
)
def test_remote_of_something_else(ray, thing):
    with pytest.raises(TypeError, match="function or a class"):
        ray.remote(thing)


@pytest.mark.parametrize("thing", [3, "f", None, [function]], ids=repr)
def test_remote_of_a_value(ray, thing):
    with pytest.raises((AssertionError, TypeError)):
        ray.remote(thing)


@pytest.mark.ray_differs("a builtin is a function too; Ray refuses it")
def test_remote_of_a_builtin(ray):
    assert ray.get(ray.remote(len).remote([1, 2])) == 2


@pytest.mark.ray_differs("harmless parentheses; Ray refuses them")
def test_remote_with_empty_parentheses(ray):
    assert ray.get(ray.remote()(function).remote()) == 1


def test_remote_twice(ray):
    with pytest.raises(TypeError, match="remote"):
        ray.remote(ray.remote(function))
    with pytest.raises(TypeError, match="remote"):
        ray.remote(ray.remote(Class))


def test_positional_options(ray):
    with pytest.raises((AssertionError, TypeError)):
        ray.remote(function, 1)


# --- options --------------------------------------------------------------------------------------

BAD_FOR_BOTH = [
    ({"no_such_option": 1}, ValueError, "no_such_option"),
    ({"num_cpus": -1}, ValueError, "num_cpus"),
    ({"num_gpus": -0.5}, ValueError, "num_gpus"),
    ({"memory": -1}, ValueError, "memory"),
    ({"num_cpus": "two"}, TypeError, "num_cpus"),
    ({"num_cpus": 0.00001}, ValueError, r"0\.0001|1/10000"),
    ({"resources": 5}, TypeError, "resources"),
    ({"resources": {"lamp": -1}}, ValueError, "lamp"),
    ({"resources": {"CPU": 1}}, ValueError, "num_cpus"),
    ({"resources": {"GPU": 1}}, ValueError, "num_gpus"),
    ({"name": 3}, TypeError, "name"),
]
BAD_FOR_TASKS = [
    *BAD_FOR_BOTH,
    ({"num_returns": -1}, ValueError, "num_returns"),
    ({"num_returns": 1.5}, TypeError, "num_returns"),
    ({"max_retries": -2}, ValueError, "max_retries"),
    ({"max_retries": "many"}, TypeError, "max_retries"),
    ({"retry_exceptions": "all"}, TypeError, "retry_exceptions"),
    ({"max_restarts": 1}, ValueError, "max_restarts"),
    ({"max_concurrency": 1}, ValueError, "max_concurrency"),
    ({"lifetime": "detached"}, ValueError, "lifetime"),
]
BAD_FOR_ACTORS = [
    *BAD_FOR_BOTH,
    ({"max_restarts": -2}, ValueError, "max_restarts"),
    ({"max_task_retries": -2}, ValueError, "max_task_retries"),
    ({"max_concurrency": -1}, ValueError, "max_concurrency"),
    ({"max_concurrency": "a"}, TypeError, "max_concurrency"),
    ({"max_pending_calls": -2}, ValueError, "max_pending_calls"),
    ({"lifetime": "forever"}, ValueError, "detached"),
    ({"namespace": 3}, TypeError, "namespace"),
    ({"get_if_exists": True}, ValueError, "name"),
    ({"num_returns": 2}, ValueError, "num_returns"),
    ({"max_retries": 1}, ValueError, "max_retries"),
]


def _ids(case):
    return str(case) if isinstance(case, dict) else ""


@pytest.mark.parametrize(("options", "error", "text"), BAD_FOR_TASKS, ids=_ids)
def test_task_options(ray, options, error, text):
    with pytest.raises(error, match=text):
        ray.remote(**options)(function)
    with pytest.raises(error, match=text):
        ray.remote(function).options(**options)


@pytest.mark.parametrize(("options", "error", "text"), BAD_FOR_ACTORS, ids=_ids)
def test_actor_options(ray, options, error, text):
    with pytest.raises(error, match=text):
        ray.remote(**options)(Class)
    with pytest.raises(error, match=text):
        ray.remote(Class).options(**options)


def test_an_unknown_option_lists_the_known_ones(ray):
    for thing, own in ((function, "max_retries"), (Class, "max_restarts")):
        with pytest.raises(ValueError, match="num_cpu' is not an option.*mean num_cpus") as caught:
            ray.remote(num_cpu=1)(thing)
        assert own in str(caught.value)


def test_method_options(ray):
    with pytest.raises((AssertionError, ValueError, TypeError), match="no_such_option"):
        ray.method(no_such_option=1)(function)


def test_options_are_checked_before_there_is_a_cluster(bare_ray):
    with pytest.raises(ValueError, match="num_cpus"):
        bare_ray.remote(num_cpus=-1)(function)
    assert not bare_ray.is_initialized()


# --- kill, cancel, and the rest -------------------------------------------------------------------


def test_kill_of_something_else(ray):
    for wrong in (3, None, ray.put(1), Class):
        with pytest.raises((ValueError, TypeError), match="actor"):
            ray.kill(wrong)


def test_cancel_of_something_else(ray):
    for wrong in (3, None, [ray.put(1)]):
        with pytest.raises((ValueError, TypeError), match="[Rr]ef"):
            ray.cancel(wrong)


def test_cancel_of_an_actor(ray):
    actor = ray.remote(Class).remote()
    with pytest.raises(TypeError, match="kill"):
        ray.cancel(actor)


def test_exit_actor_outside_an_actor(ray):
    with pytest.raises(TypeError):
        ray.actor.exit_actor()


def test_using_a_ref_as_if_it_were_its_value(ray):
    ref = ray.put(1)
    with pytest.raises(TypeError):
        ref + 1
    with pytest.raises(TypeError):
        ref < 2  # noqa: B015


def test_init_in_a_task_is_refused_or_ignored(ray):
    @ray.remote
    def f():
        try:
            ray.init()
        except RuntimeError:
            return "refused"

    assert ray.get(f.remote(), timeout=30) == "refused"


def test_init_says_which_keyword_was_meant(bare_ray):
    with pytest.raises(Exception, match="num_cpu"):
        bare_ray.init(num_cpu=2)


@pytest.mark.hpcray_only("the text of an error")
def test_tasks_that_wait_for_the_same_are_told_once(cluster, gate):
    ray = cluster(num_cpus=4, resources={"slot": 1})
    enter = gate.enter

    @ray.remote(resources={"slot": 1})
    def sleepy():
        enter()

    refs = [sleepy.remote() for _ in range(3)]
    gate.wait_for_arrivals()
    with pytest.raises(ray.exceptions.GetTimeoutError) as caught:
        ray.get(refs, timeout=0.5)
    gate.open()
    assert str(caught.value).count("RUNNING on rank 0") == 1
    assert str(caught.value).count("waits for 1 slot") == 1
    assert "; 2 times task " in str(caught.value)
