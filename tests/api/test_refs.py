"""ObjectRef: identity, printing, and the ways a ref travels."""

from __future__ import annotations

import copy
import gc
import sys
from dataclasses import dataclass

import numpy as np
import pytest


def test_hex_and_binary(ray):
    ref = ray.put(1)
    assert isinstance(ref.binary(), bytes)
    assert len(ref.binary()) == 28
    assert ref.hex() == ref.binary().hex()


def test_repr_and_str(ray):
    ref = ray.put(1)
    assert repr(ref) == str(ref) == f"ObjectRef({ref.hex()})"


def test_equality_and_hash(ray):
    one, two = ray.put(1), ray.put(1)
    assert one == one
    assert one != two
    assert one != one.binary()
    assert len({one, two, one}) == 2
    assert {one: "a"}[ray.get(ray.put([one]))[0]] == "a"


def test_type(ray):
    assert isinstance(ray.put(1), ray.ObjectRef)
    assert isinstance(ray.remote(lambda: 1).remote(), ray.ObjectRef)
    assert isinstance(ray.get(ray.put([ray.put(1)]))[0], ray.ObjectRef)


def test_type_takes_a_parameter_in_annotations(ray):
    assert ray.ObjectRef[int] is not None


def test_ids_of_task_and_job(ray):
    ref = ray.remote(lambda: 1).remote()
    assert ref.binary().startswith(ref.task_id().binary())
    assert ref.job_id().hex() == ray.get_runtime_context().get_job_id()


def test_not_a_container(ray):
    ref = ray.put([1, 2])
    with pytest.raises(TypeError):
        iter(ref)
    with pytest.raises(TypeError):
        len(ref)


def test_copies_are_the_same_ref(ray):
    ref = ray.put(1)
    assert copy.copy(ref) == ref
    assert ray.get(copy.copy(ref)) == 1


def test_top_level_argument_is_resolved(ray):
    f = ray.remote(lambda x, *, y: (x, y))
    assert ray.get(f.remote(ray.put(1), y=ray.put(2))) == (1, 2)


def test_varargs_are_resolved(ray):
    f = ray.remote(lambda *a, **k: (a, k))
    one, two = ray.put(1), ray.put(2)
    assert ray.get(f.remote(one, 5, two, z=one)) == ((1, 5, 2), {"z": 1})


def test_same_ref_twice(ray):
    ref = ray.put(3)
    assert ray.get(ray.remote(lambda a, b: a + b).remote(ref, ref)) == 6


def test_chain_of_tasks(ray):
    inc = ray.remote(lambda x: x + 1)
    ref = ray.put(0)
    for _ in range(20):
        ref = inc.remote(ref)
    assert ray.get(ref) == 20


def test_nested_in_a_list_passes_through(ray):
    @ray.remote
    def f(refs):
        return [isinstance(ref, ray.ObjectRef) for ref in refs], ray.get(refs)

    assert ray.get(f.remote([ray.put(1), ray.put(2)])) == ([True, True], [1, 2])


@pytest.mark.parametrize("wrap", [
    lambda ref: {"k": ref}, lambda ref: (ref,), lambda ref: [[ref]], lambda ref: {ref: 1},
], ids=["dict", "tuple", "nested list", "dict key"])
def test_nested_elsewhere_passes_through(ray, wrap):
    @ray.remote
    def f(value):
        def find(v):
            if isinstance(v, ray.ObjectRef):
                return v
            return find(next(iter(v.values())) if isinstance(v, dict) and "k" in v
                        else next(iter(v)))

        return ray.get(find(value))

    assert ray.get(f.remote(wrap(ray.put("inside")))) == "inside"


def test_nested_in_a_dataclass_passes_through(ray):
    @dataclass
    class Box:
        ref: object

    f = ray.remote(lambda box: ray.get(box.ref))
    assert ray.get(f.remote(Box(ray.put("inside")))) == "inside"


def test_nested_ref_does_not_delay_the_task(ray, gate):
    enter = gate.enter
    late = ray.remote(enter).remote("late")
    gate.wait_for_arrivals()
    f = ray.remote(lambda refs: len(refs))
    assert ray.get(f.remote([late]), timeout=20) == 1
    gate.open()


def test_top_level_ref_delays_the_task(ray, gate, counter):
    enter, add = gate.enter, counter.add
    late = ray.remote(enter).remote("late")
    gate.wait_for_arrivals()

    @ray.remote
    def f(value):
        add()
        return value

    ref = f.remote(late)
    assert ray.wait([ref], timeout=0.1) == ([], [ref])
    assert counter.value == 0
    gate.open()
    assert ray.get(ref) == "late"


def test_waiting_for_an_argument_holds_no_cpu(ray, gate):
    enter = gate.enter
    late = ray.remote(enter).remote()
    gate.wait_for_arrivals()
    blocked = [ray.remote(lambda x: x).remote(late) for _ in range(10)]
    assert ray.get(ray.remote(lambda: 1).remote(), timeout=20) == 1
    gate.open()
    ray.get(blocked)


def test_ref_returned_from_a_task(ray):
    @ray.remote
    def outer():
        return ray.remote(lambda: "inner").remote()

    ref = ray.get(outer.remote())
    assert isinstance(ref, ray.ObjectRef)
    assert ray.get(ref) == "inner"


def test_ref_returned_through_three_levels(ray):
    @ray.remote
    def f(depth):
        return [f.remote(depth - 1)] if depth else np.full(100_000, 5.0)

    value = f.remote(3)
    for _ in range(3):
        (value,) = ray.get(value)
    assert (ray.get(value) == 5.0).all()


def test_ref_outlives_every_other_holder(ray):
    inner = ray.put(np.full(300_000, 3.0))
    outer = ray.put([inner])
    del inner
    gc.collect()
    (again,) = ray.get(outer)
    del outer
    gc.collect()
    assert (ray.get(again) == 3.0).all()


def test_argument_lives_until_the_task_ran(ray, gate):
    enter = gate.enter

    @ray.remote
    def f(_, array):
        return float(array.sum())

    late = ray.remote(enter).remote()
    ref = f.remote(late, ray.put(np.ones(300_000)))
    gc.collect()
    gate.open()
    assert ray.get(ref) == 300_000


def test_dropping_the_ref_does_not_stop_the_task(ray, gate, counter, eventually):
    enter, add = gate.enter, counter.add

    @ray.remote
    def f():
        enter()
        add()

    ref = f.remote()
    gate.wait_for_arrivals()
    del ref
    gc.collect()
    gate.open()
    eventually(lambda: counter.value == 1)


def test_closure_captures_a_ref(ray):
    ref = ray.put(np.full(200_000, 2.0))
    f = ray.remote(lambda: float(ray.get(ref)[0]))
    assert ray.get(f.remote()) == 2.0


def test_pickled_by_the_user(ray):
    ref = ray.put("pickled")
    data = ray.cloudpickle.dumps(ref)
    assert ray.cloudpickle.loads(data) == ref
    assert ray.get(ray.cloudpickle.loads(data)) == "pickled"


def test_pickled_by_the_user_and_sent_as_bytes(ray):
    ref = ray.put("out of band")
    data = ray.cloudpickle.dumps([ref])
    f = ray.remote(lambda b: ray.get(ray.cloudpickle.loads(b)[0]))
    assert ray.get(f.remote(data)) == "out of band"


def test_pickled_by_the_user_outlives_the_ref(ray):
    ref = ray.put(np.full(200_000, 4.0))
    data = ray.cloudpickle.dumps(ref)
    del ref
    gc.collect()
    assert (ray.get(ray.cloudpickle.loads(data)) == 4.0).all()


def test_ref_kept_by_an_actor(ray):
    @ray.remote
    class Keeper:
        def keep(self, box):
            self.box = box

        def give(self):
            return self.box

    keeper = Keeper.remote()
    ref = ray.put(np.full(200_000, 6.0))
    ray.get(keeper.keep.remote([ref]))
    del ref
    gc.collect()
    (again,) = ray.get(keeper.give.remote())
    assert (ray.get(again) == 6.0).all()


def test_many_refs_in_one_argument(ray):
    refs = [ray.put(i) for i in range(500)]
    f = ray.remote(lambda rs: sum(ray.get(rs)))
    assert ray.get(f.remote(refs)) == sum(range(500))


def test_many_arguments(ray):
    refs = [ray.put(i) for i in range(200)]
    assert ray.get(ray.remote(lambda *a: sum(a)).remote(*refs)) == sum(range(200))


def test_a_future_can_be_cancelled_and_the_task_goes_on(ray, gate):
    enter = gate.enter
    ref = ray.remote(enter).remote("done")
    future, other = ref.future(), ref.future()
    assert future.cancel()
    assert future.cancelled()
    gate.open()
    assert other.result(timeout=20) == "done"
    assert ray.get(ref) == "done"


def test_a_ref_is_made_of_28_bytes_only(ray):
    raised = []
    before, sys.unraisablehook = sys.unraisablehook, raised.append
    try:
        for wrong in (b"1" * 27, "1" * 28, None):
            with pytest.raises((TypeError, ValueError)):
                ray.ObjectRef(wrong)
        gc.collect()
    finally:
        sys.unraisablehook = before
    assert raised == []
