"""How users have their objects pickled: `register_serializer` and `__reduce__`, on every way."""

from __future__ import annotations

import importlib
import os
import threading

import pytest

BACKEND = os.environ.get("HPCRAY_TEST_BACKEND", "hpcray")


@pytest.fixture
def util():
    return importlib.import_module(f"{BACKEND}.util")


@pytest.fixture
def Locked(ray, util):
    """A class that cannot be pickled, registered here; a deserialised one has gone one way more."""
    class Locked:
        def __init__(self, value, ways=0):
            self.value = value
            self.ways = ways
            self.lock = threading.Lock()

    util.register_serializer(
        Locked, serializer=lambda one: (one.value, one.ways),
        deserializer=lambda state: Locked(state[0], state[1] + 1))
    yield Locked
    util.deregister_serializer(Locked)


@pytest.fixture
def Own():
    """The same by `__reduce__`, which workers know as well."""
    class Own:
        def __init__(self, value, ways=0):
            self.value = value
            self.ways = ways
            self.lock = threading.Lock()

        def __reduce__(self):
            return (type(self), (self.value, self.ways + 1))

    return Own


def look(one, box=None):
    inner = box["one"][0] if box else one
    with one.lock, inner.lock if inner is not one else threading.Lock():
        return (one.value, one.ways), (inner.value, inner.ways)


@pytest.fixture
def local_look():
    import types

    return types.FunctionType(
        look.__code__, {"__builtins__": __builtins__, "threading": threading}, "look", (None,))


@pytest.mark.parametrize("which", ["Locked", "Own"])
def test_arguments_of_tasks_and_actors(ray, request, local_look, which):
    kind, look = request.getfixturevalue(which), local_look

    @ray.remote
    class A:
        def __init__(self, one):
            self.one = one

        def look(self, *args):
            return look(*args)

        def mine(self):
            return look(self.one)

    seen = [("v", 1)] * 2
    args = kind("v"), {"one": [kind("v")]}
    actor = A.remote(kind("v"))
    assert list(ray.get(ray.remote(look).remote(*args), timeout=20)) == seen
    assert list(ray.get(actor.look.remote(*args), timeout=20)) == seen
    assert list(ray.get(actor.mine.remote(), timeout=20)) == seen
    ref = ray.put(kind("v"))
    assert list(ray.get(ray.remote(look).remote(ref), timeout=20)) == seen
    assert list(ray.get(actor.look.remote(ref), timeout=20)) == seen
    closed = kind("v")
    assert list(ray.get(ray.remote(lambda: look(closed)).remote(), timeout=20)) == seen


def test_results_of_tasks_and_actors_by_reduce(ray, Own):
    @ray.remote
    class A:
        def make(self):
            return [Own("of an actor")]

        def back(self, one):
            return one

    made = ray.get(ray.remote(lambda: {"k": Own("of a task")}).remote(), timeout=20)["k"]
    assert (made.value, made.ways) == ("of a task", 1)
    actor = A.remote()
    (made,) = ray.get(actor.make.remote(), timeout=20)
    assert (made.value, made.ways) == ("of an actor", 1)
    back = ray.get(actor.back.remote(Own("v")), timeout=20)
    assert (back.value, back.ways) == ("v", 2)
    assert isinstance(back, Own)


def test_a_serializer_registered_in_workers(ray):
    """Each process registers its own: what comes back was pickled there."""
    def make(value):
        util = importlib.import_module(f"{BACKEND}.util")

        class Locked:
            def __init__(self):
                self.lock = threading.Lock()

        util.register_serializer(
            Locked, serializer=lambda one: value, deserializer=lambda state: ["made of", state])
        return Locked()

    @ray.remote
    class A:
        def make(self, value):
            return make(value)

    assert ray.get(ray.remote(make).remote(1), timeout=20) == ["made of", 1]
    assert ray.get(A.remote().make.remote(2), timeout=20) == ["made of", 2]


def test_an_object_that_cannot_be_pickled_after_all(ray, util, Locked):
    echo = ray.remote(lambda one: one.value)
    assert ray.get(echo.remote(Locked(1)), timeout=20) == 1
    util.deregister_serializer(Locked)
    with pytest.raises(TypeError, match="pickle"):
        echo.remote(Locked(1))
