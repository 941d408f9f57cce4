"""Named actors: found by name, within a namespace, as long as they live."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading

import pytest


@pytest.fixture
def A(ray):
    @ray.remote
    class A:
        def __init__(self, value=0):
            self.value = value

        def get(self):
            return self.value

    return A


def test_get_actor(ray, A):
    a = A.options(name="found").remote(5)
    found = ray.get_actor("found")
    assert found == a
    assert ray.get(found.get.remote()) == 5
    ray.kill(a)


def test_get_actor_right_after_creation(ray, A):
    handles = [A.options(name=f"quick{i}").remote(i) for i in range(3)]
    assert ray.get([ray.get_actor(f"quick{i}").get.remote() for i in range(3)]) == [0, 1, 2]
    for handle in handles:
        ray.kill(handle)


def test_get_actor_in_a_task(ray, A):
    a = A.options(name="from-task").remote(6)
    f = ray.remote(lambda: ray.get(ray.get_actor("from-task").get.remote()))
    assert ray.get(f.remote()) == 6
    ray.kill(a)


def test_named_in_a_task_found_by_the_driver(ray, A):
    make = ray.remote(lambda: A.options(name="made-there").remote(7))
    handle = ray.get(make.remote())
    assert ray.get(ray.get_actor("made-there").get.remote()) == 7
    ray.kill(handle)


def test_unknown_name(ray):
    with pytest.raises(ValueError, match="nobody"):
        ray.get_actor("nobody")


def test_empty_name(ray, A):
    with pytest.raises(ValueError):
        ray.get_actor("")
    with pytest.raises(ValueError):
        ray.get_actor(None)
    with pytest.raises(ValueError, match="empty"):
        A.options(name="").remote()


def test_name_of_the_wrong_type(ray, A):
    with pytest.raises(TypeError):
        A.options(name=3).remote()
    with pytest.raises(TypeError):
        ray.get_actor(3)


def test_duplicate_name(ray, A):
    a = A.options(name="taken").remote(1)
    with pytest.raises(ValueError, match="taken"):
        A.options(name="taken").remote(2)
    assert ray.get(ray.get_actor("taken").get.remote()) == 1
    ray.kill(a)


def test_get_if_exists(ray, A):
    first = A.options(name="shared", get_if_exists=True).remote(1)
    second = A.options(name="shared", get_if_exists=True).remote(2)
    assert first == second
    assert ray.get(second.get.remote()) == 1
    ray.kill(first)


def test_get_if_exists_needs_a_name(A):
    with pytest.raises(ValueError, match="name"):
        A.options(get_if_exists=True).remote()


def test_get_if_exists_from_many_tasks_makes_one(ray, A, counter):
    add = counter.add

    @ray.remote
    class Once:
        def __init__(self):
            add()

        def ping(self):
            return "pong"

    @ray.remote
    def reach():
        once = Once.options(name="once", get_if_exists=True, lifetime="detached").remote()
        return ray.get(once.ping.remote())

    assert ray.get([reach.remote() for _ in range(6)]) == ["pong"] * 6
    assert counter.value == 1
    ray.kill(ray.get_actor("once"))


def test_name_is_free_after_kill(ray, A, eventually):
    ray.kill(A.options(name="again").remote(1))

    def gone():
        try:
            ray.get_actor("again")
        except ValueError:
            return True

    eventually(gone)
    a = A.options(name="again").remote(2)
    assert ray.get(ray.get_actor("again").get.remote()) == 2
    ray.kill(a)


def test_named_again_and_again(ray, A):
    """By one thread, and by two: an actor that ends is never handed out."""
    failures = []

    def loop(first):
        try:
            for number in range(first, first + 30):
                a = A.options(name="loop", get_if_exists=True, num_cpus=0).remote(number)
                assert ray.get(a.get.remote(), timeout=20) is not None
                del a
        except Exception as error:
            failures.append(error)

    loop(0)
    other = threading.Thread(target=loop, args=(100,))
    other.start()
    loop(0)
    other.join()
    assert failures == []


@pytest.mark.ray_differs("a name is taken until a dropped or killed actor has ended")
def test_the_same_name_at_once(ray, A):
    for number in range(6):
        a = A.options(name="at once", num_cpus=0).remote(number)
        assert ray.get(a.get.remote()) == number
        if number % 2:
            ray.kill(a)
        del a
    with pytest.raises(ValueError, match="at once"):
        ray.get_actor("at once")


def test_found_by_itself_as_it_ends(ray, eventually, tmp_path):
    class Last:
        def __init__(self, path):
            self.path = path

        def __del__(self):
            found = ray.get_actor("last words")
            with open(self.path, "w") as file:
                file.write(str(found is not None))

        def ready(self):
            return True

    path = tmp_path / "words"
    last = ray.remote(Last).options(name="last words", num_cpus=0).remote(str(path))
    assert ray.get(last.ready.remote())
    del last
    gc.collect()
    eventually(lambda: path.exists() and path.read_text() == "True")


def test_a_name_that_was_waited_for_in_vain_is_free(ray, A, gate, eventually):
    enter = gate.enter

    class Slow:
        def __del__(self):
            enter()

        def ready(self):
            return True

    slow = ray.remote(Slow).options(name="late", num_cpus=0).remote()
    assert ray.get(slow.ready.remote())
    del slow
    eventually(lambda: gate.arrivals() == 1)
    late = A.options(name="late", num_cpus=0)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            late.remote(1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    gate.open()

    def made():
        with contextlib.suppress(ValueError):  # taken, until the answer has come and gone back
            return ray.get(late.remote(2).get.remote(), timeout=20) == 2

    eventually(made)


def test_a_name_does_not_keep_the_actor(ray, A, eventually):
    a = A.options(name="counted").remote()
    ray.get(a.get.remote())
    del a
    gc.collect()

    def gone():
        try:
            ray.get_actor("counted")
        except ValueError:
            return True

    eventually(gone)


def test_detached_outlives_its_handles(ray, A):
    a = A.options(name="detached", lifetime="detached").remote(8)
    ray.get(a.get.remote())
    del a
    gc.collect()
    found = ray.get_actor("detached")
    assert ray.get(found.get.remote()) == 8
    ray.kill(found)


def test_namespaces_are_apart(ray, A):
    here = A.options(name="one").remote("here")
    there = A.options(name="one", namespace="elsewhere").remote("there")
    assert here != there
    assert ray.get(ray.get_actor("one").get.remote()) == "here"
    assert ray.get(ray.get_actor("one", namespace="elsewhere").get.remote()) == "there"
    with pytest.raises(ValueError):
        ray.get_actor("one", namespace="nowhere")
    ray.kill(here)
    ray.kill(there)


def test_namespace_of_init(bare_ray, init_options):
    ray = bare_ray
    ray.init(num_cpus=1, namespace="mine", **init_options)

    @ray.remote
    class A:
        def namespace(self):
            return ray.get_runtime_context().namespace

    a = A.options(name="a").remote()
    assert ray.get_runtime_context().namespace == "mine"
    assert ray.get(a.namespace.remote()) == "mine"
    assert ray.get_actor("a", namespace="mine") == a


def test_each_driver_has_a_namespace_of_its_own(bare_ray, init_options):
    ray = bare_ray
    found = []
    for _ in range(2):
        ray.init(num_cpus=1, **init_options)
        found.append(ray.get_runtime_context().namespace)
        ray.shutdown()
    assert found[0] and found[1] and found[0] != found[1]


def test_a_detached_actor_lives_as_long_as_its_job(bare_ray, init_options, eventually):
    ray = bare_ray

    @ray.remote
    class A:
        def pid(self):
            return os.getpid()

    ray.init(num_cpus=1, namespace="jobs", **init_options)
    pid = ray.get(A.options(name="d", lifetime="detached").remote().pid.remote())
    ray.shutdown()
    eventually(lambda: not os.path.exists(f"/proc/{pid}"))
    ray.init(num_cpus=1, namespace="jobs", **init_options)
    with pytest.raises(ValueError):
        ray.get_actor("d")


def test_list_named_actors(ray, A):
    a = A.options(name="listed").remote()
    b = A.options(name="listed too", namespace="other").remote()
    ray.get([a.get.remote(), b.get.remote()])
    assert "listed" in ray.util.list_named_actors()
    assert "listed too" not in ray.util.list_named_actors()
    everywhere = ray.util.list_named_actors(all_namespaces=True)
    assert {"namespace": "other", "name": "listed too"} in everywhere
    ray.kill(a)
    ray.kill(b)


def test_name_in_the_runtime_context(ray):
    @ray.remote
    class Named:
        def name(self):
            return ray.get_runtime_context().get_actor_name()

    named = Named.options(name="self-aware").remote()
    assert ray.get(named.name.remote()) == "self-aware"
    ray.kill(named)
