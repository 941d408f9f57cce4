"""What goes into a value comes out of it: classes, arrays of libraries, odd Python objects."""

from __future__ import annotations

import sys
from pickle import PicklingError
from typing import Any

import numpy as np
import pytest


def address(array: Any) -> int:
    return int(array.ctypes.data)


# --- classes that the driver defines --------------------------------------------------------------


def test_a_class_of_the_driver_is_itself_when_an_instance_comes_back(run_driver):
    run_driver("""
        import collections, dataclasses, enum, typing
        class Color(enum.Enum):
            RED = 1
            GREEN = "g"
        class Number(enum.IntEnum):
            ONE = 1
        class Flags(enum.Flag):
            A = enum.auto()
            B = enum.auto()
        Point = collections.namedtuple("Point", "x y")
        class Typed(typing.NamedTuple):
            a: int
        @dataclasses.dataclass(frozen=True, order=True)
        class Data:
            x: int
        class Base: ...
        class Derived(Base):
            def who(self): return __class__
        @ray.remote
        def make(k):
            return {"color": Color.GREEN, "number": Number.ONE, "flags": Flags.A | Flags.B,
                    "point": Point(1, 2), "typed": Typed(1), "data": Data(1),
                    "derived": Derived(), "types": (int, Color, Data)}[k]
        ray.init(num_cpus=1, **INIT)
        for _ in range(2):
            assert ray.get(make.remote("color")) is Color.GREEN
            assert ray.get(make.remote("number")) is Number.ONE
            assert ray.get(make.remote("flags")) == Flags.A | Flags.B
            assert type(ray.get(make.remote("point"))) is Point
            assert ray.get(make.remote("typed")) == Typed(1)
            assert ray.get(make.remote("data")) == Data(1)
            back = ray.get(make.remote("derived"))
            assert type(back) is Derived and isinstance(back, Base) and back.who() is Derived
            assert ray.get(make.remote("types")) == (int, Color, Data)
        assert ray.get(ray.put({Color.RED: Point})) == {Color.RED: Point}
    """)


@pytest.mark.ray_differs("Ray makes the class again, and overwrites what it knows")
def test_a_class_of_the_driver_is_left_as_it_is(run_driver):
    run_driver("""
        class Meta(type):
            made = []
            def __new__(meta, name, bases, namespace):
                cls = super().__new__(meta, name, bases, namespace)
                meta.made.append(name)
                return cls
        class Mine(metaclass=Meta):
            count = 0
            known = []
            def method(self): return "mine"
        @ray.remote
        def work(value):
            type(value).count += 1
            type(value).known.append(1)
            return value, type(value).count
        ray.init(num_cpus=1, **INIT)
        method = Mine.method
        Mine.count = 10
        for _ in range(3):
            back, count = ray.get(work.remote(Mine()))
            assert type(back) is Mine and count == 11
        assert Mine.count == 10 and Mine.known == [] and Mine.method is method
        assert Meta.made == ["Mine"]
    """)


def test_a_worker_hears_of_what_the_driver_changes_in_its_class(run_driver):
    run_driver("""
        class Settings:
            level = 1
        @ray.remote
        def level(settings): return settings.level
        ray.init(num_cpus=1, **INIT)
        assert ray.get(level.remote(Settings())) == 1
        Settings.level = 2
        assert ray.get(level.remote(Settings())) == 2
    """)


# --- numpy ----------------------------------------------------------------------------------------


@pytest.mark.ray_differs("Ray aligns what lies in its store")
@pytest.mark.parametrize("count", [1, 7, 100, 1000, 6000, 10_000, 13_000, 20_000, 200_000])
def test_arrays_of_every_size_are_aligned(ray, count):
    made = np.arange(count, dtype="f8")

    @ray.remote
    def inside(array: Any) -> tuple[int, Any]:
        return array.ctypes.data % 64, array

    for _ in range(3):
        for back in (ray.get(ray.put(made)), *ray.get(ray.put([made, made[:3]]))):
            assert address(back) % 64 == 0 and not back.flags.writeable
        there, back = ray.get(inside.remote(made))
        assert there == 0 and address(back) % 64 == 0
        np.testing.assert_array_equal(back, made)


class Plain(np.ndarray):
    pass


def records(count: int) -> Any:
    return np.arange(count, dtype="f8").view([("x", "f8")]).view(np.recarray)


def masked(count: int) -> Any:
    return np.ma.masked_greater(np.arange(float(count)), 5)


@pytest.mark.ray_differs("Ray copies them at each read, and they can be written")
@pytest.mark.parametrize("count", [300, 300_000])
@pytest.mark.parametrize("make", [records, masked, lambda n: np.arange(n).view(Plain)])
def test_subclasses_of_arrays_are_read_only_and_not_copied(ray, make, count):
    made = make(count)
    ref = ray.put(made)
    first, second = ray.get(ref), ray.get(ref)
    assert type(first) is type(made) and first.dtype == made.dtype and first.shape == made.shape
    np.testing.assert_array_equal(np.asarray(first), np.asarray(made))
    if count > 100_000:
        assert address(first) == address(second)
    assert address(first) % 64 == 0
    with pytest.raises(ValueError, match="read-only|WRITEABLE"):
        first[0] = made[1]
    with pytest.raises(ValueError, match="WRITEABLE|read-only"):
        first.setflags(write=True)
        first[0] = made[1]


def test_a_mapped_file_arrives_as_an_array(ray, tmp_path):
    made = np.memmap(tmp_path / "data", dtype="f8", mode="w+", shape=(1000,))
    made[:] = 3
    back = ray.get(ray.put(made))
    assert isinstance(back, np.ndarray) and back.sum() == 3000


def test_masked_arrays_keep_what_they_are(ray):
    made = np.ma.array([1, 2, 3], mask=[0, 1, 0], fill_value=9)
    back = ray.get(ray.put(made))
    assert type(back) is np.ma.MaskedArray
    assert list(back.mask) == [False, True, False] and back.fill_value == 9
    assert back.sum() == 4 and back.filled().tolist() == [1, 9, 3]
    without = ray.get(ray.put(np.ma.array([1.5, 2.5])))
    assert not without.mask.any() and without.sum() == 4
    rows = ray.get(ray.put(np.ma.array(
        [(1, 2.0), (3, 4.0)], mask=[(0, 1), (0, 0)], dtype=[("a", int), ("b", float)])))
    assert rows["a"].tolist() == [1, 3] and rows["b"].tolist() == [None, 4.0]
    objects = ray.get(ray.put(np.ma.array([{"a": 1}, None], mask=[0, 1], dtype=object)))
    assert objects[0] == {"a": 1}


def test_a_subclass_that_says_how_it_is_pickled_is_asked(ray):
    class Named(np.ndarray):
        def __reduce__(self) -> Any:
            make, arguments, state = super().__reduce__()
            return make, arguments, (*state, self.name)

        def __setstate__(self, state: Any) -> None:
            super().__setstate__(state[:-1])
            self.name = state[-1]

    made = np.arange(3).view(Named)
    made.name = "it"
    back = ray.get(ray.put(made))
    assert type(back) is Named and back.name == "it" and back.tolist() == [0, 1, 2]


# --- arrow and pandas -----------------------------------------------------------------------------


def test_a_slice_of_a_table_stores_the_slice(ray):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"n": np.arange(1_000_000), "s": [str(i) for i in range(1_000_000)]})
    part = table.slice(500_000, 10)
    ref = ray.put([part])
    assert ray.get(ref)[0].equals(part)

    @ray.remote
    def nbytes(found: Any) -> int:
        return found.get_total_buffer_size()

    parts = [part]
    if ray.__name__ != "ray":  # which does it for tables
        parts += [part.to_batches()[0], part.column(1), part.column(1).chunk(0),
                  table.column(0).chunk(0).slice(3, 5)]
    for one in parts:
        back = ray.get(ray.put(one))
        assert type(back) is type(one) and back.equals(one)
        assert ray.get(nbytes.remote(one)) < 10_000
    assert ray.get(ray.put(table)).equals(table)
    empty = ray.get(ray.put(part.slice(0, 0)))
    assert empty.num_rows == 0 and empty.schema == table.schema


def test_a_batch_or_array_without_rows_keeps_its_kind(ray):
    pa = pytest.importorskip("pyarrow")
    batch = pa.record_batch({"n": pa.array(range(1000))}).slice(5, 0)
    for one in (batch, pa.array(range(1000)).slice(3, 0), pa.chunked_array([[1, 2]]).slice(1, 0),
                pa.array(["a", "b"] * 500).dictionary_encode().slice(2, 3)):
        back = ray.get(ray.put(one))
        assert type(back) is type(one) and back.equals(one)


def test_frames(ray):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"a": range(1000), "b": [str(i) for i in range(1000)],
                          "c": pd.Categorical(["x", "y"] * 500)},
                         index=pd.date_range("2020", periods=1000))
    pd.testing.assert_frame_equal(ray.get(ray.put(frame)), frame)
    pd.testing.assert_frame_equal(
        ray.get(ray.remote(lambda f: f.iloc[10:20]).remote(frame)), frame.iloc[10:20])


# --- odd Python objects ---------------------------------------------------------------------------


def test_cycles_and_identity(ray):
    made: list[Any] = [1]
    made.append(made)
    back = ray.get(ray.put(made))
    assert back[1] is back
    shared = [1]
    one, two = ray.get(ray.put((shared, shared)))
    assert one is two


def test_large_integers_and_deep_structures(ray):
    assert ray.get(ray.put(7 ** 5000)) == 7 ** 5000
    deep: Any = None
    for _ in range(200):
        deep = [deep]
    assert ray.get(ray.put(deep)) == deep
    too_deep: Any = None
    for _ in range(100_000):
        too_deep = (too_deep, 1)
    with pytest.raises((TypeError, RecursionError, PicklingError), match="recursion|pickle"):
        ray.put(too_deep)
    while too_deep is not None:  # taken apart here: Python's own end of it would recurse
        too_deep = too_deep[0]
    assert ray.get(ray.put(1)) == 1


def test_closures_lambdas_and_reduce(ray):
    n = [1]

    def outer(k: int) -> Any:
        return lambda x: x + k + n[0]

    class Pair:
        def __init__(self, a: int) -> None:
            self.a = a

        def __reduce__(self) -> Any:
            return Pair, (self.a + 1,)

    assert ray.get(ray.put(outer(2)))(3) == 6
    assert ray.get(ray.put(Pair(1))).a == 2
    assert ray.get(ray.remote(lambda f: f(1)).remote(outer(5))) == 7


@pytest.mark.parametrize("make", [
    lambda: (i for i in range(3)), lambda: open(sys.executable, "rb"),
    lambda: __import__("threading").Lock(), lambda: sys._getframe()])
def test_what_cannot_be_pickled_is_refused_by_name(ray, make):
    made = make()
    kind = type(made).__name__
    try:
        with pytest.raises(TypeError, match=f"(?i){kind}"):
            ray.put(made)
        with pytest.raises(TypeError, match=f"(?i){kind}"):
            ray.remote(lambda x: x).remote([made])
    finally:
        if hasattr(made, "close"):
            made.close()
