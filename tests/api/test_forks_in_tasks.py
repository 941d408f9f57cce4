"""Processes that a task forks: what they do with its refs is no business of the cluster's."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.ray_differs("there, what a fork drops its parent has lost")


@pytest.fixture
def use_a_pool():
    """What a task or method runs; returns the values of its refs, read here and elsewhere."""
    def use_a_pool(ray, given):
        import concurrent.futures
        import gc
        import multiprocessing

        read = ray.remote(lambda box: [ray.get(ref, timeout=20) for ref in box])
        refs = [*given, ray.put("small"), ray.put(bytes(300_000)),
                ray.remote(lambda: "of a task").remote()]
        ray.wait(refs, num_returns=len(refs), timeout=20)
        kept = list(refs)  # a list of the parent's own: a fork empties its copies of both

        def drop_all():
            # Not pickled: the processes are forked with it.
            refs.clear()
            kept.clear()
            gc.collect()

        with concurrent.futures.ProcessPoolExecutor(
            2, mp_context=multiprocessing.get_context("fork"), initializer=drop_all
        ) as pool:
            assert list(pool.map(len, ["a", "bb", "ccc"])) == [1, 2, 3]
            pool.submit(gc.collect).result(timeout=20)
            during = ray.get(read.remote(kept), timeout=20)
        assert len(kept) == len(refs) == 5
        after = ray.get(read.remote(kept), timeout=20)
        return during, after, [ray.get(ref, timeout=20) for ref in kept]

    return use_a_pool


EXPECTED = ["of the driver", bytes(200_000), "small", bytes(300_000), "of a task"]


def test_a_process_pool_in_a_task(ray, use_a_pool):
    given = [ray.put("of the driver"), ray.put(bytes(200_000))]
    task = ray.remote(lambda given: use_a_pool(ray, given))
    for _ in range(2):
        assert ray.get(task.remote(given), timeout=30) == (EXPECTED,) * 3
    assert ray.get(given, timeout=20) == EXPECTED[:2]


@pytest.mark.parametrize("options", [{}, {"max_concurrency": 2}], ids=["sequential", "threaded"])
def test_a_process_pool_in_an_actor(ray, use_a_pool, options):
    @ray.remote(**options)
    class A:
        def __init__(self):
            self.ref = ray.put("of the actor")

        def use(self, given):
            return use_a_pool(ray, given)

        def get(self):
            return ray.get(self.ref, timeout=20)

    given = [ray.put("of the driver"), ray.put(bytes(200_000))]
    actor = A.remote()
    assert ray.get(actor.use.remote(given), timeout=30) == (EXPECTED,) * 3
    assert ray.get(actor.get.remote(), timeout=20) == "of the actor"
    assert ray.get(given, timeout=20) == EXPECTED[:2]
