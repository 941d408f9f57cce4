"""wait: which refs are ready, in what order, and what it refuses."""

from __future__ import annotations

import time

import numpy as np
import pytest


def test_splits_ready_from_pending(ray, gate):
    enter = gate.enter
    late, now = ray.remote(enter).remote(), ray.put(1)
    assert ray.wait([late, now]) == ([now], [late])
    gate.open()
    assert ray.wait([late, now], num_returns=2) == ([late, now], [])


def test_returns_at_most_num_returns(ray):
    refs = [ray.put(i) for i in range(5)]
    ready, pending = ray.wait(refs)
    assert (len(ready), len(pending)) == (1, 4)
    ready, pending = ray.wait(refs, num_returns=3)
    assert (len(ready), len(pending)) == (3, 2)
    assert set(ready) | set(pending) == set(refs)


def test_both_lists_keep_the_order_asked(ray, gate):
    enter = gate.enter
    late = [ray.remote(enter).remote(i) for i in range(2)]
    now = [ray.put(i) for i in range(3)]
    mixed = [now[2], late[1], now[0], late[0], now[1]]
    ready, pending = ray.wait(mixed, num_returns=5, timeout=0.2)
    assert ready == [now[2], now[0], now[1]]
    assert pending == [late[1], late[0]]
    gate.open()
    ray.get(late)


def test_timeout_zero_answers_at_once(ray, gate):
    enter = gate.enter
    late = ray.remote(enter).remote()
    start_s = time.monotonic()
    assert ray.wait([late], timeout=0) == ([], [late])
    assert time.monotonic() - start_s < 2
    gate.open()
    ray.get(late)
    assert ray.wait([late], timeout=0) == ([late], [])


def test_timeout_is_the_only_way_to_fewer(ray, gate):
    enter = gate.enter
    late, now = ray.remote(enter).remote(), ray.put(1)
    assert ray.wait([late, now], num_returns=2, timeout=0.05) == ([now], [late])
    gate.open()
    assert ray.wait([late, now], num_returns=2) == ([late, now], [])


def test_wakes_up_when_one_gets_ready(ray, make_gate):
    gates = [make_gate() for _ in range(2)]
    entrances = [g.enter for g in gates]
    refs = [ray.remote(e).remote(i) for i, e in enumerate(entrances)]
    for g in gates:
        g.wait_for_arrivals()
    gates[1].open()
    assert ray.wait(refs) == ([refs[1]], [refs[0]])
    gates[0].open()
    assert ray.wait([refs[0]]) == ([refs[0]], [])


def test_an_error_is_ready(ray):
    @ray.remote
    def fail():
        raise KeyError("no")

    ref = fail.remote()
    assert ray.wait([ref]) == ([ref], [])
    with pytest.raises(KeyError):
        ray.get(ref)


def test_empty_list(ray):
    assert ray.wait([]) == ([], [])


def test_fetch_local_false(ray):
    ref = ray.remote(lambda: 1).remote()
    assert ray.wait([ref], fetch_local=False) == ([ref], [])


def test_loop_until_all_are_done(ray):
    f = ray.remote(lambda i: i)
    pending, seen = [f.remote(i) for i in range(50)], set()
    while pending:
        ready, pending = ray.wait(pending)
        seen |= set(ray.get(ready))
    assert seen == set(range(50))


def test_in_a_task(ray, gate):
    enter = gate.enter
    late = ray.remote(enter).remote()
    gate.wait_for_arrivals()

    @ray.remote
    def split(refs):
        ready, pending = ray.wait(refs)
        return len(ready), len(pending)

    assert ray.get(split.remote([late, ray.put(1)])) == (1, 1)
    gate.open()


def test_actor_calls(ray):
    @ray.remote
    class A:
        def m(self, x):
            return x

    a = A.remote()
    refs = [a.m.remote(i) for i in range(3)]
    assert ray.wait(refs, num_returns=3) == (refs, [])


def test_single_ref_is_refused(ray):
    with pytest.raises(TypeError, match="list"):
        ray.wait(ray.put(1))


@pytest.mark.parametrize("wrong", [(), None, 1, "refs", {}], ids=repr)
def test_only_lists(ray, wrong):
    with pytest.raises(TypeError, match="list"):
        ray.wait(wrong)


def test_tuple_of_refs_is_refused(ray):
    with pytest.raises(TypeError, match="list"):
        ray.wait((ray.put(1),))


def test_something_else_in_the_list(ray):
    with pytest.raises(TypeError, match="int"):
        ray.wait([ray.put(1), 1])


def test_duplicates_are_refused(ray):
    ref = ray.put(1)
    with pytest.raises(ValueError, match="unique|once"):
        ray.wait([ref, ref])


@pytest.mark.parametrize("num_returns", [0, -1])
def test_num_returns_below_one(ray, num_returns):
    with pytest.raises(ValueError, match=str(num_returns)):
        ray.wait([ray.put(1)], num_returns=num_returns)


def test_num_returns_above_the_length(ray):
    with pytest.raises(ValueError, match="num_returns"):
        ray.wait([ray.put(1)], num_returns=2)


def test_negative_timeout(ray):
    with pytest.raises(ValueError, match="timeout"):
        ray.wait([ray.put(1)], timeout=-1)


def test_options_are_keyword_only(ray):
    with pytest.raises(TypeError):
        ray.wait([ray.put(1)], 1)


def test_num_returns_may_be_an_integer_of_numpy(ray):
    refs = [ray.put(i) for i in range(3)]
    assert len(ray.wait(refs, num_returns=np.int64(2))[0]) == 2
    with pytest.raises(TypeError):
        ray.wait(refs, num_returns="2")
