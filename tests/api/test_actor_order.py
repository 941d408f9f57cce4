"""The order of actor calls: as sent, for each caller; whatever happens elsewhere."""

from __future__ import annotations

import threading

import pytest


@pytest.fixture
def Log(ray):
    @ray.remote
    class Log:
        def __init__(self):
            self.entries = []

        def add(self, entry, *_):
            self.entries.append(entry)
            return entry

        def get(self):
            return self.entries

    return Log


def test_one_caller(ray, Log):
    log = Log.remote()
    for i in range(300):
        log.add.remote(i)
    assert ray.get(log.get.remote()) == list(range(300))


def test_a_late_argument_holds_up_the_calls_after_it(ray, Log, gate):
    # Order is the order of the calls, not of their arguments.
    enter = gate.enter
    log = Log.remote()
    ray.get(log.add.remote("first"))
    late = ray.remote(enter).remote("late")
    gate.wait_for_arrivals()
    log.add.remote(late)
    after = log.add.remote("after")
    assert ray.wait([after], timeout=0.1) == ([], [after])
    gate.open()
    ray.get(after)
    assert ray.get(log.get.remote()) == ["first", "late", "after"]


def test_a_failed_argument_is_skipped(ray, Log):
    @ray.remote
    def fail():
        raise KeyError("argument")

    log = Log.remote()
    log.add.remote(1)
    broken = log.add.remote(fail.remote())
    log.add.remote(2)
    with pytest.raises(KeyError):
        ray.get(broken)
    assert ray.get(log.get.remote()) == [1, 2]


def test_small_and_big_arguments_keep_their_order(ray, Log):
    log = Log.remote()
    for i in range(40):
        log.add.remote(i, b"x" * (500_000 if i % 3 == 0 else 10))
    assert ray.get(log.get.remote()) == list(range(40))


def test_each_caller_has_its_own_order(ray, Log):
    log = Log.remote()

    @ray.remote
    def call(name):
        refs = [log.add.remote((name, i)) for i in range(50)]
        ray.get(refs)

    ray.get([call.remote(name) for name in "ab"])
    entries = ray.get(log.get.remote())
    for name in "ab":
        assert [i for n, i in entries if n == name] == list(range(50))


def test_an_actor_is_a_caller(ray, Log):
    log = Log.remote()

    @ray.remote
    class Caller:
        def call(self, i):
            ray.get(log.add.remote(i)) if i % 5 == 0 else log.add.remote(i)

    caller = Caller.remote()
    ray.get([caller.call.remote(i) for i in range(50)])
    assert ray.get(log.get.remote()) == list(range(50))


def test_threads_of_the_driver_each_keep_their_order(ray, Log):
    log = Log.remote()

    def work(name):
        for i in range(50):
            log.add.remote((name, i))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = ray.get(log.get.remote())
    for name in range(3):
        assert [i for n, i in entries if n == name] == list(range(50))


def test_copies_of_a_handle_in_one_process_share_the_order(ray, Log):
    log = Log.remote()
    (copy,) = ray.get(ray.put([log]))
    for i in range(50):
        (log if i % 2 else copy).add.remote(i)
    assert ray.get(log.get.remote()) == list(range(50))


def test_a_result_handed_on_makes_an_order_between_callers(ray, Log):
    log = Log.remote()

    @ray.remote
    def second(_):
        ray.get(log.add.remote("second"))

    ray.get(second.remote(log.add.remote("first")))
    assert ray.get(log.get.remote()) == ["first", "second"]


def test_calls_before_the_constructor_ends_keep_their_order(ray, gate):
    enter = gate.enter

    @ray.remote
    class Slow:
        def __init__(self):
            enter()
            self.entries = []

        def add(self, i):
            self.entries.append(i)
            return list(self.entries)

    slow = Slow.remote()
    refs = [slow.add.remote(i) for i in range(50)]
    gate.open()
    assert ray.get(refs)[-1] == list(range(50))


def test_an_error_does_not_break_the_order(ray):
    @ray.remote
    class A:
        def __init__(self):
            self.entries = []

        def add(self, i):
            self.entries.append(i)
            if i % 2:
                raise ValueError(i)
            return list(self.entries)

    a = A.remote()
    refs = [a.add.remote(i) for i in range(21)]
    assert ray.get(refs[-1]) == list(range(21))
    with pytest.raises(ValueError):
        ray.get(refs[1])


def test_a_blocked_call_holds_up_the_next_ones(ray, Log, gate):
    enter = gate.enter

    @ray.remote
    class A:
        def __init__(self):
            self.entries = []

        def hold(self):
            enter()
            self.entries.append("hold")

        def add(self, i):
            self.entries.append(i)
            return self.entries

    a = A.remote()
    a.hold.remote()
    ref = a.add.remote(1)
    gate.wait_for_arrivals()
    assert ray.wait([ref], timeout=0.1) == ([], [ref])
    gate.open()
    assert ray.get(ref) == ["hold", 1]


@pytest.mark.hpcray_only("on a node, causes come before effects; Ray orders each caller's calls")
def test_what_a_task_has_called_comes_before_what_is_called_because_of_it(ray, Log):
    # While the log is called directly between them, by the driver and by an actor of its own.
    log = Log.remote()

    @ray.remote
    def write(log, turn):
        for i in range(20):
            log.add.remote((turn, i))

    @ray.remote
    class Reader:
        def count(self, log):
            return [len(ray.get(log.get.remote())) for _ in range(5)]

    reader = Reader.remote()
    expected = 0
    for turn in range(20):
        for i in range(5):
            ray.get(log.add.remote(i))
        ray.get(write.remote(log, turn))
        expected += 25
        assert len(ray.get(log.get.remote())) == expected
        for i in range(10):
            log.add.remote(i)
        expected += 10
        assert ray.get(reader.count.remote(log)) == [expected] * 5
