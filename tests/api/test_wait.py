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


# --- loops over long lists ------------------------------------------------------------------------


def _loop(ray, pending, **options):
    """Seconds that each call of a loop of `wait` took, and the order in which refs came."""
    times, seen = [], []
    while pending:
        begun_s = time.perf_counter()
        ready, pending = ray.wait(pending, timeout=20, **options)
        times.append(time.perf_counter() - begun_s)
        assert ready
        seen += ready
        options["num_returns"] = min(options["num_returns"], max(len(pending), 1))
    return times, seen


def _reference(pending, step):
    """The same loop over a plain list: each time a set is made of it, and a copy of the rest."""
    begun_s = time.perf_counter()
    while pending:
        assert len(set(pending)) == len(pending)
        pending = pending[step:]
    return time.perf_counter() - begun_s


@pytest.mark.hpcray_only("Ray's wait looks at every ref at every call")
@pytest.mark.parametrize("num_returns", [1, 7])
@pytest.mark.parametrize("kind", ["tasks", "puts", "calls"])
def test_a_call_in_a_long_loop_costs_less_than_a_set_of_its_list(ray, num_returns, kind):
    """Each call takes and returns a list of thousands, and hardly looks at most of them."""
    count = 10_000
    if kind == "tasks":
        f = ray.remote(lambda i: i)
        refs = [f.remote(i) for i in range(count)]
    elif kind == "puts":
        refs = [ray.put(i) for i in range(count)]
    else:
        @ray.remote(num_cpus=0)
        class A:
            def f(self, i):
                return i

        actor = A.remote()
        refs = [actor.f.remote(i) for i in range(count)]
    # All are ready: what is measured is the calls, not the tasks.
    ray.wait(refs, num_returns=count, timeout=30)
    times, seen = _loop(ray, refs, num_returns=num_returns)
    assert len(seen) == len(set(seen)) == count
    assert sum(times) < _reference(refs, num_returns) + len(times) * 20e-6
    assert ray.get(seen[:3], timeout=20) == [0, 1, 2]


def test_a_loop_while_the_tasks_run(ray):
    f = ray.remote(lambda i: i)
    refs = [f.remote(i) for i in range(3_000)]
    _, seen = _loop(ray, refs, num_returns=1)
    assert len(seen) == len(set(seen)) == 3_000
    assert sorted(ray.get(seen)) == list(range(3_000))


@pytest.mark.hpcray_only("Ray's wait looks at every ref at every call")
@pytest.mark.parametrize("fetch_local", [True, False])
def test_refs_that_are_not_ready_cost_no_more_than_those_that_are(ray, gate, fetch_local):
    """Thousands stay on the list from call to call: what one has asked, the next knows."""
    enter = gate.enter

    @ray.remote(num_cpus=0)
    class A:
        def hold(self, i):
            return enter(i)

    actor, count, calls = A.remote(), 5_000, 300
    held = [actor.hold.remote(i) for i in range(count)]
    gate.wait_for_arrivals()
    there = [ray.put(i) for i in range(count)]
    now = [ray.put(i) for i in range(calls)]

    def measure(refs):
        refs = [*refs, None]
        begun_s = time.perf_counter()
        for ref in now:
            refs[-1] = ref
            ready, pending = ray.wait(refs, fetch_local=fetch_local)
            assert len(ready) == 1 and len(pending) == count
        return time.perf_counter() - begun_s

    measure(held)  # asks for them
    among_ready, among_held = measure(there), measure(held)
    gate.open()
    assert among_held < 5 * among_ready + calls * 100e-6, (among_held, among_ready)
    ready, pending = ray.wait(held, num_returns=count, timeout=30, fetch_local=fetch_local)
    assert (ready, pending) == (held, [])


@pytest.mark.parametrize("num_returns", [2, 5, 64])
def test_a_loop_with_more_returns(ray, num_returns):
    f = ray.remote(lambda i: i)
    refs = [f.remote(i) for i in range(200)]
    pending, values = refs, []
    while pending:
        wanted = min(num_returns, len(pending))
        ready, pending = ray.wait(pending, num_returns=wanted, timeout=20)
        assert len(ready) == wanted
        assert [ref for ref in refs if ref in set(pending)] == pending
        values += ray.get(ready)
    assert sorted(values) == list(range(200))


@pytest.mark.parametrize("fetch_local", [True, False])
@pytest.mark.parametrize("size", [10, 200_000])
def test_fetch_local_in_a_loop(ray, gate, fetch_local, size):
    enter = gate.enter
    late = ray.remote(lambda: enter(bytes(size))).remote()
    f = ray.remote(lambda i: bytes(size))
    pending = [late, *[f.remote(i) for i in range(20)]]
    gate.wait_for_arrivals()
    for left in range(20, 0, -1):
        ready, pending = ray.wait(pending, timeout=20, fetch_local=fetch_local)
        assert len(ready) == 1 and len(pending) == left
        assert ray.get(ready[0], timeout=20) == bytes(size)
    assert pending == [late]
    assert ray.wait(pending, timeout=0, fetch_local=fetch_local) == ([], [late])
    # The other kind of interest in the same ref, and both at once.
    assert ray.wait(pending, timeout=0, fetch_local=not fetch_local) == ([], [late])
    gate.open()
    assert ray.wait(pending, timeout=20, fetch_local=not fetch_local) == ([late], [])
    assert ray.wait(pending, timeout=0, fetch_local=fetch_local) == ([late], [])


def test_timeout_zero_polls(ray, gate):
    enter = gate.enter
    late = [ray.remote(num_cpus=0.1)(enter).remote(i) for i in range(3)]
    gate.wait_for_arrivals(3)
    now = ray.put(1)
    for _ in range(200):
        assert ray.wait([*late, now], num_returns=2, timeout=0) == ([now], late)
    gate.open()
    seen, deadline_s = [], time.monotonic() + 20
    while late and time.monotonic() < deadline_s:
        ready, late = ray.wait(late, num_returns=len(late), timeout=0)
        seen += ready
    assert sorted(ray.get(seen)) == [0, 1, 2]


def test_generators_and_refs_together(ray, make_gate):
    gates = [make_gate(), make_gate()]
    enter_items, enter_late = (g.enter for g in gates)

    @ray.remote(num_returns="streaming", num_cpus=0.1)
    def items():
        for i in range(3):
            enter_items()
            yield i

    stream, late = items.remote(), ray.remote(num_cpus=0.1)(enter_late).remote("late")
    for g in gates:
        g.wait_for_arrivals()
    assert ray.wait([stream, late], timeout=0.05) == ([], [stream, late])
    gates[0].open()
    found = []
    while True:
        ready, pending = ray.wait([stream, late], timeout=20)
        assert (ready, pending) == ([stream], [late])
        try:
            found.append(ray.get(next(stream)))
        except StopIteration:
            break
    assert found == [0, 1, 2]
    gates[1].open()
    assert ray.wait([late], timeout=20) == ([late], [])


def test_refs_dropped_while_watched(ray, gate):
    """Whoever stops waiting for a ref, and forgets it, leaves the others as they were."""
    enter = gate.enter

    @ray.remote(num_cpus=0)
    class A:
        def hold(self):
            return enter()

    actor, f = A.remote(), ray.remote(lambda i: i)
    for round_ in range(30):
        late = actor.hold.remote()
        now = [f.remote(i) for i in range(1, 4)]
        ready, pending = ray.wait([late, *now], num_returns=2, timeout=20)
        assert len(ready) == 2
        assert all(value in (1, 2, 3) for value in ray.get(ready, timeout=20))
        del late
        if round_ % 2:
            del pending
        else:
            pending = pending[1:]
            assert ray.wait(pending, timeout=20) == (pending, [])
    gate.open()
    kept = [f.remote(i) for i in range(20)]
    assert ray.wait(kept, num_returns=20, timeout=20) == (kept, [])


@pytest.mark.parametrize("seed", range(3))
def test_threads_that_wait_for_the_same_refs(ray, seed):
    """Each takes its own way through lists that overlap; all of them see all of theirs."""
    import random
    import threading

    f = ray.remote(lambda i: i)
    refs = [f.remote(i) for i in range(300)]
    values = {ref: i for i, ref in enumerate(refs)}
    wrong: list[str] = []

    def work(me):
        draw = random.Random(seed * 100 + me)
        mine = draw.sample(refs, 150)
        pending, seen = list(mine), []
        while pending:
            wanted = draw.randint(1, min(5, len(pending)))
            timeout = draw.choice([0, 0.001, 20])
            before = pending
            ready, pending = ray.wait(
                pending, num_returns=wanted, timeout=timeout, fetch_local=draw.random() < 0.7)
            if timeout == 20 and len(ready) != wanted:
                wrong.append(f"{len(ready)} of {wanted}")
            if [r for r in before if r in set(ready)] != ready or (
                    [r for r in before if r in set(pending)] != pending):
                wrong.append("another order")
            if ray.get(ready, timeout=20) != [values[ref] for ref in ready]:
                wrong.append("other values")
            seen += ready
        if sorted(map(values.get, seen)) != sorted(map(values.get, mine)):
            wrong.append("lost or doubled")

    threads = [threading.Thread(target=work, args=(me,)) for me in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_the_same_list_again_and_again(ray, gate):
    """What an earlier call has learnt holds for the next ones, in any order of the list."""
    enter = gate.enter
    late = ray.remote(num_cpus=0.1)(enter).remote()
    f = ray.remote(lambda i: i)
    refs = [f.remote(i) for i in range(50)]
    ray.wait(refs, num_returns=50, timeout=20)
    for refs_ in (refs, refs[::-1], [*refs[25:], *refs[:25]]):
        ready, pending = ray.wait([late, *refs_], num_returns=51, timeout=0)
        assert (ready, pending) == (refs_, [late])
        ready, pending = ray.wait([late, *refs_], num_returns=3, timeout=20)
        assert len(ready) == 3
        assert ready == [ref for ref in refs_ if ref in set(ready)]
        assert pending == [ref for ref in [late, *refs_] if ref not in set(ready)]
    gate.open()
    assert ray.wait([late], timeout=20) == ([late], [])
