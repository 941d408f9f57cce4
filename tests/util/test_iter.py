"""Iterators in shards."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def it(ray: ModuleType) -> ModuleType:
    return importlib.import_module(f"{ray.__name__}.util.iter")


# Two CPUs: two shards at most, or a parent and a child of one each.


def test_items_and_their_order(it: ModuleType) -> None:
    assert list(it.from_items([1, 2, 3, 4, 5]).gather_sync()) == [1, 2, 3, 4, 5]
    assert list(it.from_range(5).gather_sync()) == [0, 2, 1, 3, 4]
    assert sorted(it.from_range(5).gather_async()) == [0, 1, 2, 3, 4]
    made = it.from_iterators([range(2), lambda: ["a", "b"]])
    assert list(made.gather_sync()) == [0, "a", 1, "b"]
    assert list(made.batch_across_shards()) == [[0, "a"], [1, "b"]]  # it begins anew
    assert made.num_shards() == 2
    assert it.from_items([1, 2], repeat=True).take(5) == [1, 2, 1, 2, 1]
    with pytest.raises(TypeError, match="gather_sync"):
        iter(made)


def test_names(it: ModuleType) -> None:
    made = it.from_items([1, 2])
    assert repr(made) == "ParallelIterator[from_items[int, 2, shards=2]]"
    assert repr(made.for_each(abs).batch(2)).endswith(".for_each().batch(2)]")


def test_transforms_in_the_shards(it: ModuleType) -> None:
    made = it.from_range(6, num_shards=1)
    assert made.for_each(lambda x: x * 2).filter(lambda x: x > 2).take(9) == [4, 6, 8, 10]
    assert made.batch(4).take(9) == [[0, 1, 2, 3], [4, 5]]
    assert made.batch(4).flatten().take(9) == [0, 1, 2, 3, 4, 5]
    assert made.combine(lambda x: [x] * (x % 3)).take(9) == [1, 2, 2, 4, 5, 5]
    assert made.transform(lambda items: (x + 1 for x in items)).take(2) == [1, 2]
    shuffled = made.local_shuffle(3, seed=1).take(9)
    assert sorted(shuffled) == list(range(6))


def test_items_of_a_shard_as_tasks(it: ModuleType) -> None:
    made = it.from_range(4, num_shards=1).for_each(lambda x: -x, max_concurrency=2)
    assert sorted(made.take(9)) == [-3, -2, -1, 0]  # Ray's come as they are ready


def test_shards_and_unions(it: ModuleType) -> None:
    one = it.from_items([1, 2], num_shards=1)
    two = it.from_items([10, 20], num_shards=1).for_each(lambda x: x + 1)
    both = one.union(two)
    assert list(both.gather_sync()) == [1, 11, 2, 21]
    assert [list(shard) for shard in both.shards()] == [[1, 2], [11, 21]]
    apart = it.from_items([1, 2, 3])
    assert list(apart.select_shards([1]).gather_sync()) == [2]
    assert list(apart.get_shard(0)) == [1, 3]
    with pytest.raises((ValueError, AssertionError)):
        apart.select_shards([0, 0])


def test_repartition(it: ModuleType) -> None:
    made = it.from_range(6, num_shards=1).repartition(1)
    assert sorted(made.gather_async()) == list(range(6))


def test_slices_have_every_item_once(it: ModuleType) -> None:
    worker = it.ParallelIteratorWorker(range(7), False)
    worker.par_iter_init([])
    found: dict[int, list[int]] = {0: [], 1: []}
    for start in (1, 0, 1, 0, 0, 0, 1):
        found[start].append(worker.par_iter_slice(2, start))
    assert found == {0: [0, 2, 4, 6], 1: [1, 3, 5]}
    for start in (0, 1):
        with pytest.raises(StopIteration):
            worker.par_iter_slice(2, start)


def test_actors_of_ones_own(ray: ModuleType, it: ModuleType) -> None:
    actors = [ray.remote(it.ParallelIteratorWorker).remote([i, i + 1], False) for i in (0, 10)]
    pairs = list(it.from_actors(actors).gather_async(num_async=2).zip_with_source_actor())
    assert sorted(item for _, item in pairs) == [0, 1, 10, 11]
    assert all(actor in actors and (actor == actors[0]) == (item < 10) for actor, item in pairs)


def test_local_iterators(it: ModuleType, capsys: Any) -> None:
    made = it.from_range(6, num_shards=1)
    local = made.gather_sync()
    assert isinstance(local, it.LocalIterator)
    assert next(local) == 0 and next(local) == 1
    local = made.gather_sync().for_each(lambda x: x + 1).filter(lambda x: x % 2)
    assert local.take(9) == [1, 3, 5]
    assert made.gather_sync().batch(5).take(9) == [[0, 1, 2, 3, 4], [5]]
    assert made.gather_sync().combine(lambda x: [x, x]).take(3) == [0, 0, 1]
    assert sorted(made.gather_sync().shuffle(2, seed=3)) == list(range(6))
    first, second = made.gather_sync().duplicate(2)
    assert list(zip(first, second, strict=True)) == [(i, i) for i in range(6)]
    made.show(2)
    assert capsys.readouterr().out == "0\n1\n"


def test_unions_of_local_iterators(it: ModuleType) -> None:
    one = it.from_items([1, 2, 3], num_shards=1).gather_sync()
    two = it.from_items([10, 20], num_shards=1).gather_sync()
    assert list(one.union(two, deterministic=True)) == [1, 10, 2, 20, 3]
    weighted = one.union(two, deterministic=True, round_robin_weights=[2, 1])
    assert list(weighted) == [1, 2, 10, 3, 20]
