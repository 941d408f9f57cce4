"""Registered serialisers, inspect_serializability, and the small helpers."""

from __future__ import annotations

import importlib
import io
import threading
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def util(ray: ModuleType) -> ModuleType:
    return importlib.import_module(f"{ray.__name__}.util")


def test_register_serializer(ray: ModuleType, util: ModuleType) -> None:
    class Locked:
        def __init__(self, value: int) -> None:
            self.value = value
            self.lock = threading.Lock()

    with pytest.raises(TypeError):
        ray.put(Locked(1))
    util.register_serializer(
        Locked, serializer=lambda one: one.value, deserializer=lambda value: value + 1)
    try:
        assert ray.get(ray.put(Locked(1))) == 2
    finally:
        util.deregister_serializer(Locked)
    with pytest.raises(TypeError):
        ray.put(Locked(1))
    util.deregister_serializer(Locked)


def check(util: ModuleType, *args: Any, **kwargs: Any) -> tuple[bool, list[Any], str]:
    module = importlib.import_module(f"{util.__name__}.check_serialize")
    text = io.StringIO()
    good, failures = module.inspect_serializability(*args, **kwargs, print_file=text)
    return good, sorted(failures, key=repr), text.getvalue()


def test_what_can_be_pickled(util: ModuleType) -> None:
    good, failures, text = check(util, {"a": [1, 2]}, name="things")
    assert good and failures == []
    assert "Checking Serializability" in text


def test_the_culprit_in_a_closure(util: ModuleType) -> None:
    lock = threading.Lock()

    def use() -> Any:
        return lock

    good, failures, _ = check(util, use, name="use")
    assert not good
    assert [one.obj for one in failures] == [lock]
    assert failures[0].parent is use
    assert failures[0].path == ("use", "lock")
    assert "FailTuple(lock" in repr(failures[0])


def test_the_culprit_in_an_object(util: ModuleType) -> None:
    class Outer:
        def __init__(self) -> None:
            self.fine = 1
            self.lock = threading.Lock()

    outer = Outer()
    good, failures, _ = check(util, outer, name="outer")
    assert not good
    assert any(one.obj is outer.lock for one in failures)


@pytest.mark.ray_differs("Ray does not look into containers, partials and methods")
def test_the_culprit_further_inside(util: ModuleType) -> None:
    import functools

    lock = threading.Lock()
    for obj in ({"a": [lock]}, functools.partial(print, lock), (1, {"b": lock})):
        good, failures, _ = check(util, obj)
        assert not good
        assert [one.obj for one in failures] == [lock]


@pytest.mark.ray_differs("Ray goes one level less")
def test_depth_ends_the_search(util: ModuleType) -> None:
    inner = [threading.Lock()]
    _, failures, _ = check(util, [[inner]], depth=2)
    assert [one.obj for one in failures] == [inner]


@pytest.mark.hpcray_only("Ray needs a session of its own for it")
def test_cycles_end_the_search(util: ModuleType) -> None:
    cycle: list[Any] = [threading.Lock()]
    cycle.append(cycle)
    good, failures, _ = check(util, cycle)
    assert not good and [one.obj for one in failures] == [cycle[0]]


def test_exports(ray: ModuleType, util: ModuleType) -> None:
    for name in ("ActorPool", "inspect_serializability", "register_serializer",
                 "deregister_serializer", "list_named_actors", "get_node_ip_address",
                 "as_completed", "map_unordered"):
        assert callable(getattr(util, name))
    assert util.list_named_actors() == []
    assert util.get_node_ip_address().count(".") == 3


def test_as_completed_and_map_unordered(ray: ModuleType, util: ModuleType) -> None:
    @ray.remote
    def double(x: int) -> int:
        return 2 * x

    refs = [double.remote(i) for i in range(7)]
    assert sorted(util.as_completed(refs, chunk_size=3)) == [2 * i for i in range(7)]
    found = util.map_unordered(double, iter(range(9)), backpressure_size=2, chunk_size=1)
    assert sorted(found) == [2 * i for i in range(9)]
    for wrong in ({"backpressure_size": 0}, {"chunk_size": 0}):
        with pytest.raises(ValueError):
            list(util.map_unordered(double, [1], **wrong))
