"""Programs that wait for each other: they end, however few CPUs there are."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def one_cpu(_clusters):
    return _clusters.require(num_cpus=1)


def test_get_deeper_than_the_cpus(one_cpu):
    @one_cpu.remote
    def deep(n):
        return 0 if n == 0 else 1 + one_cpu_get(deep.remote(n - 1))

    one_cpu_get = one_cpu.get
    assert one_cpu.get(deep.remote(20)) == 20


def test_recursion_that_branches(one_cpu):
    get = one_cpu.get

    @one_cpu.remote
    def fib(n):
        return n if n < 2 else sum(get([fib.remote(n - 1), fib.remote(n - 2)]))

    assert one_cpu.get(fib.remote(6)) == 8


def test_a_task_whose_argument_is_made_behind_it(one_cpu, gate):
    enter = gate.enter
    held = one_cpu.remote(enter).remote()
    gate.wait_for_arrivals()

    @one_cpu.remote
    def later(x):
        return x

    chain = 0
    for _ in range(5):
        chain = later.remote(chain)
    wanting = later.remote(later.remote(later.remote(1)))
    gate.open()
    assert one_cpu.get([held, wanting, chain]) == [None, 1, 0]


def test_wait_inside_tasks(one_cpu):
    get, wait = one_cpu.get, one_cpu.wait
    leaf = one_cpu.remote(lambda x: x)

    @one_cpu.remote
    def inner(n):
        pending, found = [leaf.remote(i) for i in range(n)], []
        while pending:
            ready, pending = wait(pending)
            found += get(ready)
        return sorted(found)

    @one_cpu.remote
    def outer():
        ready, _ = wait([inner.remote(3), inner.remote(3)], num_returns=2)
        return get(ready)

    assert one_cpu.get(outer.remote()) == [[0, 1, 2]] * 2


def test_get_in_a_thread_of_a_task(cluster):
    ray = cluster(num_cpus=2)
    leaf = ray.remote(lambda x: x)

    @ray.remote
    def threads():
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(4) as pool:
            return sum(pool.map(lambda i: ray.get(leaf.remote(i)), range(8)))

    assert ray.get(threads.remote()) == 28


def test_a_task_behind_actors_that_hold_the_cpus(one_cpu):
    @one_cpu.remote(num_cpus=1)
    class Holder:
        def ping(self):
            return 1

    holder = Holder.remote()
    one_cpu.get(holder.ping.remote())
    behind = one_cpu.remote(lambda: 2).remote()
    assert one_cpu.wait([behind], timeout=0.3)[0] == []
    one_cpu.kill(holder)
    assert one_cpu.get(behind) == 2


def test_an_actor_made_by_a_task_that_waits_for_it(one_cpu):
    @one_cpu.remote(num_cpus=1)
    class Maker:
        def ping(self):
            return "pong"

    get = one_cpu.get

    @one_cpu.remote
    def make():
        return get(Maker.remote().ping.remote())

    assert one_cpu.get([make.remote() for _ in range(3)]) == ["pong"] * 3


def test_actors_that_call_each_other(ray):
    @ray.remote
    class Player:
        def meet(self, other):
            self.other = other

        async def play(self, n):
            return n if n == 0 else await self.other.play.remote(n - 1)

    a, b = Player.remote(), Player.remote()
    ray.get([a.meet.remote(b), b.meet.remote(a)])
    assert ray.get([a.play.remote(20), b.play.remote(20)]) == [0, 0]


@pytest.mark.parametrize("through", ["itself", "another"])
def test_an_actor_that_waits_for_itself_can_give_up(ray, through):
    @ray.remote
    class A:
        def ping(self):
            return "pong"

        def wait_for(self, actor, other=None):
            call = actor.ping.remote() if other is None else other.wait_for.remote(actor)
            try:
                ray.get(call, timeout=0.3)
            except ray.exceptions.GetTimeoutError:
                return "gave up"

    a, b = A.remote(), A.remote()
    call = a.wait_for.remote(a) if through == "itself" else a.wait_for.remote(a, b)
    assert ray.get(call) == "gave up"
    assert ray.get(a.ping.remote()) == "pong"


def test_a_thousand_tasks_blocked_on_one(ray, gate, counter, eventually):
    enter, add = gate.enter, counter.add
    source = ray.remote(enter).remote(7)
    gate.wait_for_arrivals()

    @ray.remote
    def blocked(box):
        add()
        return ray.get(box[0])

    refs = [blocked.remote([source]) for _ in range(1000)]
    eventually(lambda: counter.value > 10)  # each gives its CPU to the next
    gate.open()
    assert ray.get(refs) == [7] * 1000


def test_blocked_tasks_do_not_become_as_many_processes(one_cpu):
    ray = one_cpu

    @ray.remote(num_cpus=0)
    class Count:
        def __init__(self):
            self.now = self.most = 0

        def add(self, n):
            self.now += n
            self.most = max(self.most, self.now)
            return self.most

    leaf = ray.remote(lambda: 1)
    count = Count.remote()

    @ray.remote
    def outer(count):
        ray.get(count.add.remote(1))
        ray.get(leaf.remote())
        return ray.get(count.add.remote(-1))

    ray.get([outer.remote(count) for _ in range(100)])
    # 2 on an idle machine; on a slow one more pauses pass, and each lets one more begin.
    assert ray.get(count.add.remote(0)) < 20


def test_get_of_what_is_here_starts_no_process(cluster):
    ray = cluster(num_cpus=2)
    refs = [ray.put(bytearray(1 << 20)) for _ in range(10)]

    @ray.remote
    def consume(refs):
        ray.get(refs)
        return os.getpid()

    assert len(set(ray.get([consume.remote(refs) for _ in range(20)]))) <= 2
