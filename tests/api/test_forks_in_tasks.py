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


# --- children that leave the task -----------------------------------------------------------------

LEAVES = ("return", "raise", "sys.exit", "os._exit", "killed")


@pytest.fixture
def fork():
    """`fork(how, note)`: the child computes, writes into a pipe, and leaves in the way `how` says.

    The parent waits for it, so that a test that passes has no child left, tells `note` its id and
    exit code, and returns "parent".
    """
    def fork(how, note):
        import os
        import signal
        import sys

        here, there = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(here)
            os.write(there, str(sum(range(1000))).encode())
            os.close(there)
            if how == "raise":
                raise ValueError("of the child")
            if how == "sys.exit":
                sys.exit(3)
            if how == "os._exit":
                os._exit(4)
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            return "child"
        os.close(there)
        with open(here, "rb") as pipe:
            said = pipe.read()
        assert said == b"499500", said
        _, status = os.waitpid(pid, 0)  # ends, whichever way it leaves
        note(pid, os.waitstatus_to_exitcode(status))
        return "parent"

    return fork


def end_of(how):
    return {"os._exit": 4, "killed": -9}.get(how)


@pytest.mark.parametrize("how", LEAVES)
def test_a_child_leaves_a_task(ray, fork, how):
    @ray.remote(max_retries=0)
    def parent():
        import os

        ends = []
        value = fork(how, lambda pid, status: ends.append(status))
        return value, ends, os.getpid()

    @ray.remote(max_retries=0)
    def plain(x):
        import os

        return x, os.getpid()

    workers = set()
    for _ in range(3):
        value, ends, pid = ray.get(parent.remote(), timeout=20)
        assert value == "parent"
        if end_of(how) is not None:
            assert ends == [end_of(how)]
        workers.add(pid)
    found = ray.get([plain.remote(i) for i in range(40)], timeout=20)
    assert [x for x, _ in found] == list(range(40))
    # The workers that forked are as good as before.
    assert workers & {pid for _, pid in found}


@pytest.mark.parametrize("how", LEAVES)
@pytest.mark.parametrize("kind", ["sequential", "threaded", "async", "group"])
def test_a_child_leaves_a_method(ray, fork, how, kind):
    class Plain:
        def __init__(self):
            self.ends = []

        def parent(self):
            return fork(how, lambda pid, status: self.ends.append(status))

        def count(self):
            return len(self.ends)

    class Async(Plain):
        async def parent(self):
            return fork(how, lambda pid, status: self.ends.append(status))

        async def count(self):
            return len(self.ends)

    options = {"sequential": {}, "async": {}, "threaded": {"max_concurrency": 3},
               "group": {"concurrency_groups": {"io": 2}}}[kind]
    actor = ray.remote(num_cpus=0, max_restarts=0, **options)(
        Async if kind == "async" else Plain).remote()
    for _ in range(3):
        assert ray.get(actor.parent.remote(), timeout=20) == "parent"
    assert ray.get([actor.parent.remote() for _ in range(3)], timeout=20) == ["parent"] * 3
    assert ray.get(actor.count.remote(), timeout=20) == 6


@pytest.mark.parametrize("how", LEAVES)
def test_a_child_leaves_a_constructor(ray, fork, how, counter):
    add = counter.add

    @ray.remote(num_cpus=0, max_restarts=0)
    class A:
        def __init__(self):
            self.end = None
            self.value = fork(how, self.note)
            add()

        def note(self, pid, end):
            self.end = end

        def get(self):
            return self.value

    actor = A.remote()
    assert ray.get([actor.get.remote() for _ in range(3)], timeout=20) == ["parent"] * 3
    if how == "return":
        # The child went on to the end of its constructor, where its life ended.
        assert counter.value in (1, 2)
    else:
        assert counter.value == 1


@pytest.mark.parametrize("how", LEAVES)
def test_a_child_leaves_a_generator(ray, fork, how):
    @ray.remote(num_returns="streaming", max_retries=0)
    def items():
        yield "first"
        yield fork(how, lambda pid, status: None)
        yield "last"

    for _ in range(2):
        found = [ray.get(ref, timeout=20) for ref in items.remote()]
        assert found == ["first", "parent", "last"]
    assert ray.get(ray.remote(lambda: 1).remote(), timeout=20) == 1


def test_a_child_leaves_in_a_thread_of_a_task(ray, fork):
    """`os.fork` in a thread: the child has that thread alone, and ends with its function."""
    @ray.remote(max_retries=0)
    def parent():
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda how: fork(how, lambda *_: None), ["os._exit"] * 4))

    assert ray.get(parent.remote(), timeout=20) == ["parent"] * 4
    assert ray.get(ray.remote(lambda: 1).remote(), timeout=20) == 1


@pytest.mark.hpcray_only("a sentence says what is wrong")
@pytest.mark.parametrize("place", ["task", "actor", "driver"])
def test_calls_in_a_child_are_refused(ray, place, run_driver):
    def ask(given):
        """What a forked child is told by each function; the answers come through a pipe."""
        import json
        import os

        import hpcray

        same = hpcray.remote(lambda x: x)
        ref = hpcray.put(1)
        hpcray.get(same.remote(1))

        def calls():
            yield "put", lambda: hpcray.put(1)
            yield "put large", lambda: hpcray.put(bytes(300_000))
            yield "call", lambda: same.remote(1)
            yield "get", lambda: hpcray.get(same_ref)
            yield "wait", lambda: hpcray.wait([same_ref], timeout=5)
            yield "cancel", lambda: hpcray.cancel(same_ref)
            yield "get given", lambda: hpcray.get(given, timeout=5)
            yield "future", lambda: same_ref.future()
            yield "actor", lambda: hpcray.get_actor("nobody")
            yield "resources", lambda: hpcray.cluster_resources()

        same_ref = same.remote(2)
        here, there = os.pipe()
        pid = os.fork()
        if pid == 0:
            told = {}
            for name, call in calls():
                try:
                    told[name] = f"no error: {call()!r}"
                except BaseException as error:
                    told[name] = f"{type(error).__name__}: {error}"
            os.write(there, json.dumps(told).encode())
            os._exit(0)
        os.close(there)
        with open(here, "rb") as pipe:
            told = json.loads(pipe.read())
        os.waitpid(pid, 0)
        assert hpcray.get([ref, same_ref, same.remote(3)], timeout=20) == [1, 2, 3]
        return told

    given = [ray.put("given"), ray.put(bytes(200_000))]
    if place == "task":
        told = ray.get(ray.remote(max_retries=0)(ask).remote(given), timeout=20)
    elif place == "actor":
        class A:
            def ask(self, given):
                return ask(given)

        told = ray.get(ray.remote(num_cpus=0)(A).remote().ask.remote(given), timeout=20)
    else:
        told = ask(given)
    assert len(told) == 10
    wrong = {name: said for name, said in told.items() if "fork" not in said}
    assert wrong == {}
