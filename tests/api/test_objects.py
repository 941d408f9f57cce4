"""Values in the store: what arrives, where its bytes are, and for how long."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import gc
import pathlib
import typing
import uuid

import numpy as np
import pytest

T = typing.TypeVar("T")
BIG = 400_000  # elements; over the size at which a value goes to shared memory, as float64


@pytest.mark.ray_differs("what comes back from a worker has no slots, and Ray cannot read it")
def test_classes_with_slots(ray):
    @dataclasses.dataclass(slots=True)
    class Point:
        x: int
        y: int = 2

    class Base:
        __slots__ = ("__private", "a")

        def __init__(self):
            self.a, self.__private = 1, 2

        def both(self):
            return self.a, self.__private

    class Derived(Base):
        __slots__ = "b"

    assert through_a_task(ray, Point(1)) == Point(1)
    made = ray.get(ray.remote(lambda: Point(5, 6)).remote())
    assert (type(made), made.x, made.y) == (Point, 5, 6)
    derived = Derived()
    derived.b = 3
    got = through_a_task(ray, derived)
    assert (type(got), got.both(), got.b) == (Derived, (1, 2), 3)
    assert not ray.get(ray.remote(lambda point: hasattr(point, "__dict__")).remote(Point(1)))


def test_named_tuples_and_classes_with_parameters(ray):
    class Episode(typing.NamedTuple):
        reward: float
        steps: int = 1

    class Box(typing.Generic[T]):
        def __init__(self, value: T):
            self.value = value

    Pair = collections.namedtuple("Pair", "a b")
    for value in (Episode(0.5), Pair(1, 2)):
        got = through_a_task(ray, value)
        assert type(got) is type(value) and got == value
    assert through_a_task(ray, Box(3)).value == 3


def through_a_task(ray, value):
    return ray.get(ray.remote(lambda x: x).remote(value))


@pytest.mark.parametrize(
    "value",
    [
        np.arange(10),
        np.arange(BIG, dtype=np.float64),
        np.arange(BIG, dtype=np.float32).reshape(1000, -1),
        np.asfortranarray(np.arange(BIG).reshape(1000, -1)),
        np.arange(BIG)[::2],
        np.arange(BIG, dtype=np.int8),
        np.zeros((0, 5)),
        np.zeros(()),
        np.array([1 + 2j] * 100_000),
        np.array(["a", "bcd"]),
        np.array([b"a", b"bcd"] * 60_000),
        np.arange(BIG) % 3 == 0,
        np.array(["2020-01-01"] * 50_000, dtype="datetime64[D]"),
        np.array([(1, 2.5, b"x")] * 20_000, dtype=[("i", "i4"), ("f", "f8"), ("s", "S3")]),
        np.array([{"object": 1}, None], dtype=object),
        np.arange(BIG, dtype=">f4"),
        np.float64(1.5),
        np.ma.masked_array(np.arange(BIG), mask=np.arange(BIG) % 2),
    ],
    ids=lambda a: f"{type(a).__name__}-{a.dtype}-{a.shape}",
)
def test_arrays(ray, value):
    for got in (ray.get(ray.put(value)), through_a_task(ray, value)):
        assert type(got) is type(value)
        assert got.dtype == value.dtype
        assert got.shape == value.shape
        assert np.array_equal(got, value)


@pytest.mark.parametrize(
    "value",
    [
        collections.OrderedDict(a=1),
        collections.Counter("aab"),
        collections.deque([1, 2], maxlen=3),
        datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC),
        decimal.Decimal("1.10"),
        uuid.UUID(int=5),
        pathlib.PurePosixPath("/a/b"),
        range(5),
        slice(1, 2),
        bytearray(b"abc" * 100_000),
        "ü" * 200_000,
        {1: {2: {3: [4, (5, {6})]}}},
        [None] * 100_000,
    ],
    ids=lambda v: type(v).__name__,
)
def test_containers(ray, value):
    assert ray.get(ray.put(value)) == value
    assert through_a_task(ray, value) == value


@pytest.mark.ray_differs("Ray sends plain lists by msgpack, which knows no identity")
def test_dataclasses(ray):
    @dataclasses.dataclass(frozen=True)
    class Step:
        reward: float
        observation: np.ndarray = dataclasses.field(compare=False)

    step = Step(0.5, np.arange(BIG))
    got = through_a_task(ray, step)
    assert got.reward == 0.5
    assert (got.observation == step.observation).all()
    assert not got.observation.flags.writeable
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.reward = 1.0


def test_pandas(ray):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"x": np.arange(BIG), "y": np.arange(BIG) / 3, "s": ["a", "b"] * (BIG // 2)},
        index=np.arange(BIG) * 2)
    pandas.testing.assert_frame_equal(ray.get(ray.put(frame)), frame)
    pandas.testing.assert_frame_equal(through_a_task(ray, frame), frame)
    # What arrives is read-only, as every array is; what is made of it is one's own.
    got = ray.get(ray.put(frame[["x", "y"]]))
    assert (got + 1)["x"].iloc[-1] == BIG
    pandas.testing.assert_series_equal(through_a_task(ray, frame["y"]), frame["y"])


def test_arrow(ray):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"x": np.arange(BIG), "s": ["a", None] * (BIG // 2)})
    ref = ray.put(table)
    first, second = ray.get([ref, ref])
    assert first.equals(table)
    assert through_a_task(ray, table).equals(table)
    # Its columns lie in the object store: nothing was copied to read them.
    addresses = [t.column("x").chunk(0).buffers()[1].address for t in (first, second)]
    assert addresses[0] == addresses[1] != table.column("x").chunk(0).buffers()[1].address


def test_shared_references_stay_shared(ray):
    inner = [1]
    one, two = ray.get(ray.put([inner, inner]))
    assert one is two


def test_cycles(ray):
    cycle: list = [1]
    cycle.append(cycle)
    got = ray.get(ray.put(cycle))
    assert got[1] is got


def test_large_nested_dict_of_arrays(ray):
    value = {f"layer{i}": {"w": np.full((100, 200), i), "b": [np.arange(i)]} for i in range(60)}
    for got in (ray.get(ray.put(value)), through_a_task(ray, value)):
        assert got.keys() == value.keys()
        for name, layer in value.items():
            assert np.array_equal(got[name]["w"], layer["w"])
            assert np.array_equal(got[name]["b"][0], layer["b"][0])


@pytest.mark.parametrize("size", [10, 100_000, 102_400, 300_000])  # around what messages carry
def test_results_of_every_length(ray, size):
    results = [b"x" * size, "x" * size, "\N{SNOWMAN}" * (size // 2), 1 << 8 * size, [b"x" * size]]
    assert ray.get([ray.remote(lambda result=one: result).remote() for one in results]) == results


def test_lambdas_and_local_classes(ray):
    class Local:
        def __init__(self, f):
            self.f = f

    local = through_a_task(ray, Local(lambda x: x + 1))
    assert local.f(1) == 2
    assert isinstance(local, Local)


def test_own_reduce(ray):
    class Own:
        def __init__(self, x):
            self.x = x

        def __reduce__(self):
            return (Own, (self.x + 1,))

    assert ray.get(ray.put(Own(1))).x == 2


# --- where the bytes are --------------------------------------------------------------------------


def test_big_arrays_are_read_only(ray):
    got = ray.get(ray.put(np.zeros(BIG)))
    assert not got.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        got[0] = 1


def test_big_arguments_are_read_only(ray):
    @ray.remote
    def write(array):
        try:
            array[0] = 1
        except ValueError:
            return "refused"

    assert ray.get(write.remote(np.zeros(BIG))) == "refused"
    assert ray.get(write.remote(ray.put(np.zeros(BIG)))) == "refused"


def test_results_are_read_only(ray):
    got = ray.get(ray.remote(lambda: np.zeros(BIG)).remote())
    assert not got.flags.writeable


def test_two_gets_share_the_bytes(ray):
    ref = ray.put(np.zeros(BIG))
    one, two = ray.get(ref), ray.get(ref)
    assert one.__array_interface__["data"][0] == two.__array_interface__["data"][0]


@pytest.mark.hpcray_only("vector instructions and MPI like whole cache lines; Ray promises less")
def test_alignment(ray):
    value = [np.zeros(n, dtype=np.uint8) for n in (BIG, BIG + 1, BIG + 63, 200_001)]
    for array in ray.get(ray.put(value)):
        assert array.__array_interface__["data"][0] % 64 == 0


def test_a_view_outlives_its_ref(ray):
    array = ray.get(ray.put(np.arange(BIG)))
    gc.collect()
    others = [ray.put(np.zeros(BIG)) for _ in range(5)]
    assert np.array_equal(array, np.arange(BIG))
    del others


def test_a_slice_outlives_its_array_and_ref(ray):
    part = ray.get(ray.put({"a": np.arange(BIG)}))["a"][BIG // 2 : BIG // 2 + 10]
    gc.collect()
    for _ in range(5):
        ray.put(np.zeros(BIG))
    assert np.array_equal(part, np.arange(BIG // 2, BIG // 2 + 10))


def test_a_view_in_an_actor_outlives_the_ref(ray):
    @ray.remote
    class Holder:
        def hold(self, array):
            self.array = array

        def total(self):
            return int(self.array.sum())

    holder = Holder.remote()
    ray.get(holder.hold.remote(ray.put(np.arange(BIG))))
    gc.collect()
    for _ in range(5):
        ray.put(np.zeros(BIG))
    assert ray.get(holder.total.remote()) == int(np.arange(BIG).sum())


def test_freed_memory_is_used_again(cluster):
    # Twenty times the store goes through it, one object at a time.
    ray = cluster(num_cpus=1, object_store_memory=100 * 1024 * 1024)
    for i in range(50):
        ref = ray.put(np.full(40 * 1024 * 1024, i % 256, dtype=np.uint8))
        assert ray.get(ref)[-1] == i % 256
        del ref


@pytest.mark.hpcray_only("Ray may spill to disk meanwhile")
def test_puts_in_a_loop_take_constant_memory(cluster):
    import psutil

    ray = cluster(num_cpus=1, object_store_memory=128 * 1024 * 1024)
    disk = psutil.disk_usage("/tmp").used
    for i in range(100):
        ray.get(ray.put(np.full(32 * 1024 * 1024, i % 256, dtype=np.uint8)))
    assert psutil.Process().memory_info().rss < 2 * 1024**3
    assert psutil.disk_usage("/tmp").used - disk < 512 * 1024 * 1024


@pytest.mark.hpcray_only("Ray may spill to disk meanwhile")
def test_a_view_that_outlives_its_ref_keeps_its_bytes_under_pressure(cluster):
    ray = cluster(num_cpus=1, object_store_memory=128 * 1024 * 1024)
    view = ray.get(ray.put(np.full(16 * 1024 * 1024, 7, dtype=np.uint8)))
    gc.collect()
    for i in range(30):
        ray.get(ray.put(np.full(32 * 1024 * 1024, i, dtype=np.uint8)))
    assert (view == 7).all()


def test_results_of_tasks_free_their_memory(cluster):
    ray = cluster(num_cpus=1, object_store_memory=100 * 1024 * 1024)
    make = ray.remote(lambda i: np.full(30 * 1024 * 1024, i, dtype=np.uint8))
    for i in range(20):
        assert ray.get(make.remote(i))[0] == i


def test_an_object_outlives_the_task_that_put_it(ray):
    @ray.remote
    def make():
        return [ray.put(np.full(BIG, 9.0))]

    (ref,) = ray.get(make.remote())
    for _ in range(3):
        ray.get(ray.remote(lambda: ray.put(np.zeros(BIG)) and None).remote())
    assert (ray.get(ref) == 9.0).all()


def test_an_object_outlives_its_consumer(ray):
    ref = ray.put(np.full(BIG, 2.0))
    total = ray.remote(lambda x: float(x.sum()))
    assert ray.get([total.remote(ref) for _ in range(3)]) == [BIG * 2.0] * 3
    assert ray.get(ref)[0] == 2.0
