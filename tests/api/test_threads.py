"""Many threads of one process in the API at once, with the collector in all of them."""

from __future__ import annotations

import os

import pytest

SLOW = os.environ.get("HPCRAY_TEST_SLOW") == "1"

# Every thread repeats what it has drawn, checks every answer, and says what was wrong.
DRIVER = """
import collections, faulthandler, gc, random, sys, threading, time, traceback

SECONDS, THREADS = {seconds}, {threads}
faulthandler.dump_traceback_later(SECONDS + 25, exit=True)
import numpy  # the import itself, in many threads, is another test's
ray.init(num_cpus=2, **INIT)
TIMEOUT_S = 20

@ray.remote
def same(x, *more):
    return x

@ray.remote(num_returns=3)
def three(x):
    return x, [x], bytes(150_000)

@ray.remote(num_returns="streaming")
def items(x, n):
    for i in range(n):
        yield x, i

@ray.remote(max_retries=0)
def fail(x):
    raise KeyError(x)

@ray.remote(num_cpus=0)
class Counter:
    def __init__(self):
        self.calls = collections.Counter()
    def add(self, thread):
        self.calls[thread] += 1
        return self.calls[thread]
    def total(self):
        return self.calls

counter = Counter.remote()
large = ray.put(bytes(500_000))
ray.get(counter.add.remote(-1))
many = [ray.put(n) for n in range(100)]
wrong, done, calls = [], collections.Counter(), collections.Counter()
end_s = time.monotonic() + SECONDS


class Cycle:
    # Each makes garbage that only the collector finds, with a ref in it.
    def __init__(self, ref):
        self.me, self.ref = self, ref
    def __del__(self):
        ray.wait([self.ref], timeout=0)


def work(me):
    draw = random.Random(me)
    n = me * 1_000_000

    def get():
        assert ray.get([same.remote(n), same.remote([n], large)], timeout=TIMEOUT_S) == [n, [n]]
    def get_put():
        ref = ray.put((n, bytes(draw.choice([10, 150_000]))))
        assert ray.get(ref, timeout=TIMEOUT_S)[0] == n
    def shared():
        found = ray.get([large, *many], timeout=TIMEOUT_S)
        assert len(found[0]) == 500_000 and found[1:] == list(range(100))
    def wait():
        refs = [same.remote(n + i) for i in range(4)]
        seen, pending = [], refs
        while pending:
            ready, pending = ray.wait(pending, timeout=TIMEOUT_S)
            assert len(ready) == 1, ready
            seen += ray.get(ready)
        assert sorted(seen) == [n + i for i in range(4)], seen
    def look():
        refs = [same.remote(n), large]
        ready, pending = ray.wait(refs, num_returns=2, timeout=0)
        assert large in ready and set(ready) | set(pending) == set(refs)
    def call():
        calls[me] += 1
        assert ray.get(counter.add.remote(me), timeout=TIMEOUT_S) == calls[me]
    def returns():
        a, b, c = three.remote(n)
        assert ray.get([c, a, b], timeout=TIMEOUT_S) == [bytes(150_000), n, [n]]
    def stream():
        found = [ray.get(ref, timeout=TIMEOUT_S) for ref in items.remote(n, 3)]
        assert found == [(n, 0), (n, 1), (n, 2)], found
    def future():
        assert same.remote(n).future().result(timeout=TIMEOUT_S) == n
    def error():
        try:
            ray.get([same.remote(n), fail.remote(n)], timeout=TIMEOUT_S)
        except KeyError as error:
            assert error.cause.args == (n,), error
        else:
            raise AssertionError("no error")
    def cancel():
        ref = same.remote(n)
        ray.cancel(ref)
        try:
            assert ray.get(ref, timeout=TIMEOUT_S) == n
        except ray.exceptions.TaskCancelledError:
            pass
    def garbage():
        Cycle(same.remote(n))

    operations = [get, get_put, shared, wait, look, call, returns, stream, future, error, cancel,
                  garbage]
    while time.monotonic() < end_s and not wrong:
        n += 10
        operation = draw.choice(operations)
        try:
            operation()
        except BaseException:
            wrong.append(f"thread {{me}} after {{done[me]}}: {{traceback.format_exc()}}")
        done[me] += 1

gc.freeze()
gc.set_threshold(1, 1000, 1000)
threads = [threading.Thread(target=work, args=(me,), daemon=True) for me in range(THREADS)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
gc.set_threshold(700, 10, 10)
print("\\n".join(wrong[:2]))
assert not wrong
assert min(done[me] for me in range(THREADS)) >= 2, done
total = ray.get(counter.total.remote(), timeout=TIMEOUT_S)
assert total == calls | {{-1: 1}}, (total, calls)
# Nothing is left half done: all of it works once more, in this thread.
work_again = [same.remote(n) for n in range(200)]
assert ray.get(work_again, timeout=TIMEOUT_S) == list(range(200))
print(sum(done.values()), "operations", file=sys.stderr)
print("all done")
"""


@pytest.mark.timeout(150)
@pytest.mark.parametrize("threads", [64])
def test_every_operation_in_many_threads(run_driver, threads):
    seconds = 60 if SLOW else 8
    done = run_driver(DRIVER.format(seconds=seconds, threads=threads), timeout_s=seconds + 60,
                      check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-8000:]
    assert done.stdout.split() == ["all", "done"]


def test_many_threads_of_an_actor(ray):
    @ray.remote
    def same(x):
        return x

    @ray.remote(num_cpus=0, max_concurrency=16)
    class A:
        def work(self, me):
            import gc

            gc.set_threshold(1, 1000, 1000)
            try:
                for n in range(me * 100, me * 100 + 10):
                    refs = [same.remote(n), ray.put([n]), ray.put(bytes(150_000))]
                    ready, pending = ray.wait(refs, num_returns=3, timeout=20)
                    if (ready, pending) != (refs, []):
                        return ready, pending
                    values = ray.get(refs, timeout=20)
                    if values != [n, [n], bytes(150_000)]:
                        return values
                return me
            finally:
                gc.set_threshold(700, 10, 10)

    actor = A.remote()
    assert ray.get([actor.work.remote(i) for i in range(32)], timeout=50) == list(range(32))


def test_calls_while_another_thread_imports(run_driver):
    """A library that is half imported is not there yet."""
    done = run_driver("""
import sys, threading
ray.init(num_cpus=1, **INIT)
class Mine:
    pass
ray.put(Mine())
importing = threading.Thread(target=__import__, args=("numpy",))
importing.start()
while importing.is_alive():
    assert isinstance(ray.get(ray.put(Mine())), Mine)
importing.join()
print("all done")
""")
    assert done.stdout == "all done\n"
