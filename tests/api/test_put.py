"""put: an object without a task."""

from __future__ import annotations

import re
import threading

import numpy as np
import pytest


@pytest.mark.parametrize(
    "value", [None, 0, "", b"", (), [], {}, [[]], {"a": {"b": [1, (2, {3})]}}, 1 << 200], ids=repr
)
def test_small_values(ray, value):
    assert ray.get(ray.put(value)) == value


@pytest.mark.parametrize("nbytes", [0, 1, 1000, 100 * 1024, 100 * 1024 + 1, 1 << 20, 30_000_001])
def test_bytes_of_every_size(ray, nbytes):
    value = bytes(bytearray(range(256)) * (nbytes // 256 + 1))[:nbytes]
    assert ray.get(ray.put(value)) == value


def test_big_array(ray):
    value = np.arange(4_000_000, dtype=np.float64)
    assert np.array_equal(ray.get(ray.put(value)), value)


def test_every_put_is_a_new_object(ray):
    assert ray.put(1) != ray.put(1)


def test_put_is_a_copy(ray):
    array = np.zeros(1_000_000)
    values = [1]
    array_ref, values_ref = ray.put(array), ray.put(values)
    array[:] = 1
    values.append(2)
    assert not ray.get(array_ref).any()
    assert ray.get(values_ref) == [1]


def test_ref_is_refused(ray):
    with pytest.raises(TypeError, match=r"list|\[ref\]"):
        ray.put(ray.put(1))


def test_ref_in_a_list(ray):
    inner = ray.put(1)
    (got,) = ray.get(ray.put([inner]))
    assert got == inner
    assert ray.get(got) == 1


def test_unserialisable_value_is_named(ray):
    with pytest.raises(TypeError, match="lock"):
        ray.put(threading.Lock())


def test_in_a_task(ray):
    @ray.remote
    def make():
        return [ray.put(np.full(200_000, 7.0)), ray.put("small")]

    big, small = ray.get(make.remote())
    assert (ray.get(big) == 7.0).all()
    assert ray.get(small) == "small"


def test_in_an_actor(ray):
    @ray.remote
    class Store:
        def put(self, value):
            self.ref = ray.put(value)
            return [self.ref]

        def get(self):
            return ray.get(self.ref)

    store = Store.remote()
    (ref,) = ray.get(store.put.remote("kept"))
    assert ray.get(ref) == ray.get(store.get.remote()) == "kept"


def test_from_many_threads(ray):
    refs: list = []

    def work(k):
        refs.extend([(k, ray.put((k, i))) for i in range(50)])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({ref for _, ref in refs}) == 200
    assert all(ray.get(ref)[0] == k for k, ref in refs)


def test_put_once_and_pass_to_many(ray):
    ref = ray.put(np.arange(500_000))
    total = ray.remote(lambda array, i: int(array.sum()) + i)
    expected = int(np.arange(500_000).sum())
    assert ray.get([total.remote(ref, i) for i in range(8)]) == [expected + i for i in range(8)]


def test_exception_as_a_value_is_not_raised(ray):
    got = ray.get(ray.put(KeyError("value")))
    assert isinstance(got, KeyError)


@pytest.mark.ray_differs("Ray maps a file on disk when the store is full, however big the object")
def test_larger_than_the_store(cluster):
    ray = cluster(num_cpus=1, object_store_memory=100 * 1024 * 1024)
    with pytest.raises(ray.exceptions.ObjectStoreFullError):
        ray.put(np.zeros(400 * 1024 * 1024, dtype=np.uint8))
    # The store goes on working.
    assert ray.get(ray.put(np.ones(1_000_000))).all()


@pytest.mark.not_yet("spilling")
def test_puts_beyond_the_store_with_refs_held_spill(cluster):
    ray = cluster(num_cpus=1, object_store_memory=100 * 1024 * 1024)
    refs = [ray.put(np.full(20 * 1024 * 1024, i, dtype=np.uint8)) for i in range(10)]
    for i, ref in enumerate(refs):
        array = ray.get(ref)
        assert array[0] == array[-1] == i
        del array


def test_a_pipeline_larger_than_the_store(cluster):
    """What uses the store up runs before what fills it."""
    ray = cluster(num_cpus=2, object_store_memory=100 * 2**20)

    @ray.remote
    def make(i):
        return np.full(2_000_000, float(i))  # 16 MB

    @ray.remote
    def total(array):
        return float(array.sum())

    results = ray.get([total.remote(make.remote(i)) for i in range(20)])
    assert results == [2_000_000.0 * i for i in range(20)]


@pytest.mark.hpcray_only("Ray spills")
def test_a_put_waits_while_a_running_task_may_free_room(cluster, gate):
    ray = cluster(num_cpus=2, object_store_memory=100 * 2**20)
    enter = gate.enter

    @ray.remote
    def use(array):
        enter()

    box = [ray.put(np.zeros(40 << 20, np.uint8)) for _ in range(2)]
    kept = box[0]
    done = use.remote(box.pop())
    gate.wait_for_arrivals()
    found = []
    thread = threading.Thread(
        target=lambda: found.append(ray.put(np.ones(40 << 20, np.uint8))))
    thread.start()
    thread.join(3)  # longer than a put waits without such a task
    assert thread.is_alive() and not found
    gate.open()
    ray.get(done)
    thread.join(20)
    assert ray.get(found[0]).sum() == 40 << 20
    del kept


@pytest.mark.hpcray_only("Ray spills")
def test_a_full_store_says_what_keeps_it(cluster):
    ray = cluster(num_cpus=1, object_store_memory=100 * 2**20)
    with pytest.raises(ray.exceptions.ObjectStoreFullError, match=(
            "needs 200 MiB, more than this node's whole object store of 100 MiB")):
        ray.put(np.zeros(200 << 20, np.uint8))
    refs = [ray.put(np.zeros(30 << 20, np.uint8)) for _ in range(2)]
    array = ray.get(ray.put(np.zeros(30 << 20, np.uint8)))
    with pytest.raises(ray.exceptions.ObjectStoreFullError, match=re.escape(
            "(60 MiB by refs of the driver and 30 MiB by arrays still in use, whose refs are "
            "gone)")):
        ray.put(np.zeros(30 << 20, np.uint8))
    del array, refs
