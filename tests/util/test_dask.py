"""`util.dask`: Dask collections computed by tasks, with the results of Dask's own scheduler."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

dask = pytest.importorskip("dask", reason="Dask is not installed")
pytest.importorskip("dask._task_spec", reason="this Dask is older than 2024.12")

from hpcray.util.dask import (  # noqa: E402
    disable_dask_on_ray,
    enable_dask_on_ray,
    ray_dask_get,
    ray_dask_get_sync,
)


@dask.delayed
def increment(value: int) -> int:
    return value + 1


@dask.delayed
def total(*values: int) -> int:
    return sum(values)


@pytest.mark.parametrize("scheduler", [ray_dask_get, ray_dask_get_sync])
def test_delayed(ray: ModuleType, scheduler: Any):
    graph = total(*[increment(i) for i in range(10)])
    assert graph.compute(scheduler=scheduler) == 55
    found = dask.compute(graph, increment(1), [increment(2), {"a": increment(3)}], 7,
                         scheduler=scheduler)
    assert found == (55, 2, [3, {"a": 4}], 7)


def test_arrays(ray: ModuleType):
    array = pytest.importorskip("dask.array")
    x = array.random.default_rng(0).random((200, 200), chunks=(50, 50))
    for y in (x.mean(), (x @ x.T).sum(axis=0), x[::3, 5], array.sort(x.ravel().rechunk(-1))
              if hasattr(array, "sort") else x.cumsum(axis=0)):
        expected = y.compute(scheduler="sync")
        assert np.allclose(y.compute(scheduler=ray_dask_get), expected)
    assert np.allclose(dask.compute(x.sum(), x.max(), scheduler=ray_dask_get),
                       dask.compute(x.sum(), x.max(), scheduler="sync"))


def test_bags(ray: ModuleType):
    bag = pytest.importorskip("dask.bag")
    numbers = bag.from_sequence(range(100), npartitions=5).filter(lambda n: n % 3 == 0)
    assert numbers.sum().compute(scheduler=ray_dask_get) == sum(range(0, 100, 3))
    assert numbers.compute(scheduler=ray_dask_get) == list(range(0, 100, 3))


def test_hand_made_graphs(ray: ModuleType):
    graph = {"a": 1, "b": (lambda v: v + 1, "a"), "c": (sum, ["a", "b"]), "d": "c",
             "unneeded": (lambda: 1 / 0,)}
    assert ray_dask_get(graph, "c") == 3
    assert ray_dask_get(graph, ["d", ["a", "b"]]) == (3, (1, 2))
    assert ray_dask_get(graph, []) == ()
    assert ray_dask_get({("x", 0): 5, ("x", 1): (abs, -6)}, [("x", 1), ("x", 0)]) == (6, 5)


def test_enabled_for_a_while_and_for_good(ray: ModuleType):
    @dask.delayed
    def where() -> Any:
        return ray.get_runtime_context().get_task_name()

    with enable_dask_on_ray():
        assert where().compute() == "dask:where"
    assert dask.config.get("scheduler", None) is None
    enable_dask_on_ray()
    try:
        assert where().compute() == "dask:where"
    finally:
        disable_dask_on_ray()
    assert dask.config.get("scheduler", None) is None


def test_options_of_tasks(ray: ModuleType):
    @dask.delayed
    def held() -> Any:
        return ray.get_runtime_context().get_assigned_resources()

    assert held().compute(scheduler=ray_dask_get) == {"CPU": 1.0}
    two = {"num_cpus": 2}
    assert held().compute(scheduler=ray_dask_get, ray_remote_args=two) == {"CPU": 2.0}
    with dask.annotate(ray_remote_args=two):
        annotated = held()
    plain = held()
    found = dask.compute(annotated, plain, scheduler=ray_dask_get, optimize_graph=False)
    assert found == ({"CPU": 2.0}, {"CPU": 1.0})


def test_a_task_that_raises(ray: ModuleType):
    @dask.delayed
    def fails() -> None:
        raise KeyError("spoon")

    with pytest.raises(KeyError, match="spoon"):
        total(increment(1), fails()).compute(scheduler=ray_dask_get)
    with pytest.raises(NotImplementedError, match="persist"):
        ray_dask_get({"a": 1}, "a", ray_persist=True)


def test_chunks_nobody_needs_any_more_are_freed(ray: ModuleType):
    """A long chain of large chunks needs room for a few of them only."""
    from hpcray.util.state import summarize_objects

    @dask.delayed
    def grow(data: Any) -> Any:
        return data + 1

    chain = grow(np.zeros(500_000))
    for _ in range(30):
        chain = grow(chain)
    assert chain.sum().compute(scheduler=ray_dask_get) == 31 * 500_000
    assert summarize_objects()["cluster"]["total_size_mb"] < 8


@pytest.mark.hpcray_only("Ray has them")
def test_callbacks_of_ray_say_that_they_are_not_there() -> None:
    from hpcray.util import dask

    with pytest.raises(AttributeError, match="RayDaskCallback is not part of hpcray: Dask's own"):
        dask.RayDaskCallback  # noqa: B018
