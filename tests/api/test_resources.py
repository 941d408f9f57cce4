"""Resources: what a cluster has, what is free, who waits for what."""

from __future__ import annotations

import pytest


def test_nodes(ray):
    (node,) = ray.nodes()
    assert node["Alive"] is True
    assert isinstance(node["NodeID"], str)
    assert int(node["NodeID"], 16) >= 0
    assert isinstance(node["NodeManagerAddress"], str)
    assert isinstance(node["NodeManagerHostname"], str)
    assert node["Resources"]["CPU"] == 2
    assert node["NodeID"] == ray.get_runtime_context().get_node_id()
    assert isinstance(node["Labels"], dict)


def test_cluster_resources(ray):
    resources = ray.cluster_resources()
    assert resources["CPU"] == 2
    assert resources["memory"] > 0
    assert resources["object_store_memory"] > 0
    assert all(isinstance(v, float) for v in resources.values())
    assert any(name.startswith("node:") for name in resources)


def test_everything_is_free_at_first(ray, eventually):
    eventually(lambda: ray.available_resources().get("CPU") == 2)


def test_a_task_holds_a_cpu(ray, gate, eventually):
    enter = gate.enter
    ref = ray.remote(enter).remote()
    gate.wait_for_arrivals()
    eventually(lambda: ray.available_resources().get("CPU") == 1)
    assert ray.cluster_resources()["CPU"] == 2
    gate.open()
    ray.get(ref)
    eventually(lambda: ray.available_resources().get("CPU") == 2)


def test_a_resource_that_is_all_taken_is_absent(ray, gate, eventually):
    enter = gate.enter
    ref = ray.remote(num_cpus=2)(enter).remote()
    gate.wait_for_arrivals()
    eventually(lambda: ray.available_resources().get("CPU", 0) == 0)
    gate.open()
    ray.get(ref)


def test_no_more_tasks_at_once_than_cpus(ray, gate):
    enter = gate.enter
    refs = [ray.remote(enter).remote() for _ in range(5)]
    gate.wait_for_arrivals(2)
    assert ray.wait(refs, timeout=0.2)[0] == []
    assert gate.arrivals() == 2
    gate.open()
    ray.get(refs)
    gate.wait_for_arrivals(5)


def test_half_a_cpu(ray, gate):
    enter = gate.enter
    refs = [ray.remote(num_cpus=0.5)(enter).remote() for _ in range(5)]
    gate.wait_for_arrivals(4)
    ray.wait(refs, timeout=0.2)
    assert gate.arrivals() == 4
    gate.open()
    ray.get(refs)


def test_zero_cpus(ray, gate):
    enter = gate.enter
    refs = [ray.remote(num_cpus=0)(enter).remote() for _ in range(4)]
    gate.wait_for_arrivals(4)
    gate.open()
    ray.get(refs)


def test_two_cpus_exclude_everything_else(ray, make_gate):
    gate, small_gate = make_gate(), make_gate()
    enter, enter_small = gate.enter, small_gate.enter
    big = ray.remote(num_cpus=2)(enter).remote()
    gate.wait_for_arrivals()
    small = ray.remote(enter_small).remote()
    ray.wait([small], timeout=0.2)
    assert small_gate.arrivals() == 0
    gate.open()
    ray.get(big)
    small_gate.wait_for_arrivals()
    small_gate.open()
    ray.get(small)


def test_a_wide_task_is_not_starved_by_narrow_ones(ray, make_gate):
    gates = [make_gate() for _ in range(2)]
    entrances = [g.enter for g in gates]
    narrow = [ray.remote(e).remote() for e in entrances]
    for g in gates:
        g.wait_for_arrivals()
    wide = ray.remote(num_cpus=2)(lambda: "wide").remote()
    for g in gates:
        g.open()
    assert ray.get(wide, timeout=20) == "wide"
    ray.get(narrow)


def test_a_fraction_that_is_exact(cluster, make_gate):
    ray = cluster(num_cpus=2, resources={"lamp": 1})
    gate = make_gate()
    enter = gate.enter
    f = ray.remote(num_cpus=0, resources={"lamp": 0.1})(enter)
    refs = [f.remote() for _ in range(10)]
    gate.wait_for_arrivals(10)  # ten times 0.1 is 1, not more
    gate.open()
    ray.get(refs)


def test_a_custom_resource(cluster, make_gate, eventually):
    ray = cluster(num_cpus=4, resources={"lamp": 2})
    gate = make_gate()
    enter = gate.enter
    assert ray.cluster_resources()["lamp"] == 2
    refs = [ray.remote(resources={"lamp": 1})(enter).remote() for _ in range(3)]
    gate.wait_for_arrivals(2)
    ray.wait(refs, timeout=0.2)
    assert gate.arrivals() == 2
    eventually(lambda: ray.available_resources().get("lamp", 0) == 0)
    gate.open()
    ray.get(refs)
    eventually(lambda: ray.available_resources().get("lamp") == 2)


def test_a_task_that_waits_for_a_rare_resource_holds_up_nobody(cluster, make_gate):
    ray = cluster(num_cpus=2, resources={"lamp": 1})
    gate = make_gate()
    enter = gate.enter
    held = ray.remote(num_cpus=0, resources={"lamp": 1})(enter).remote()
    gate.wait_for_arrivals()
    waiting = [ray.remote(resources={"lamp": 1})(lambda: 1).remote() for _ in range(5)]
    assert ray.get(ray.remote(lambda: "free").remote(), timeout=20) == "free"
    gate.open()
    ray.get([held, *waiting])


def test_infeasible_waits(ray):
    ref = ray.remote(num_cpus=100)(lambda: 1).remote()
    assert ray.wait([ref], timeout=0.3) == ([], [ref])
    assert ray.get(ray.remote(lambda: "others run").remote(), timeout=20) == "others run"
    ray.cancel(ref)


def test_unknown_resource_waits(ray):
    ref = ray.remote(resources={"unobtainium": 1})(lambda: 1).remote()
    assert ray.wait([ref], timeout=0.3) == ([], [ref])
    ray.cancel(ref)


def test_infeasible_actor_waits(ray):
    @ray.remote(num_cpus=100)
    class Big:
        def m(self):
            return 1

    big = Big.remote()
    ref = big.m.remote()
    assert ray.wait([ref], timeout=0.3) == ([], [ref])
    ray.kill(big)


def test_memory(cluster, make_gate, eventually):
    ray = cluster(num_cpus=4)
    gate = make_gate()
    enter = gate.enter
    total = ray.cluster_resources()["memory"]
    demand = int(total * 0.6)
    refs = [ray.remote(memory=demand)(enter).remote() for _ in range(2)]
    gate.wait_for_arrivals()
    ray.wait(refs, timeout=0.2)
    assert gate.arrivals() == 1
    eventually(lambda: ray.available_resources()["memory"] <= total - demand + 1)
    gate.open()
    ray.get(refs)


def test_object_store_memory_of_init(cluster):
    ray = cluster(num_cpus=1, object_store_memory=100 * 1024 * 1024)
    assert ray.cluster_resources()["object_store_memory"] == 100 * 1024 * 1024


def test_an_actor_holds_nothing_by_default(ray, eventually):
    @ray.remote
    class A:
        def m(self):
            return 1

    actors = [A.remote() for _ in range(3)]
    ray.get([a.m.remote() for a in actors])
    eventually(lambda: ray.available_resources().get("CPU") == 2)
    assert ray.get(ray.remote(num_cpus=2)(lambda: 1).remote(), timeout=20) == 1


def test_an_actor_needs_a_cpu_to_be_placed_and_none_with_num_cpus_0(cluster, gate):
    ray, enter = cluster(num_cpus=1), gate.enter

    @ray.remote
    class A:
        def m(self):
            return 1

    busy = ray.remote(enter).remote()
    gate.wait_for_arrivals()
    assert ray.get(A.options(num_cpus=0).remote().m.remote(), timeout=20) == 1
    placed = A.remote().m.remote()
    assert ray.wait([placed], timeout=0.3)[0] == []
    gate.open()
    assert ray.get(placed, timeout=20) == 1
    ray.get(busy)


def test_an_actor_holds_what_it_asked_for_until_it_ends(ray, eventually):
    @ray.remote(num_cpus=1)
    class A:
        def m(self):
            return 1

    a = A.remote()
    ray.get(a.m.remote())
    eventually(lambda: ray.available_resources().get("CPU") == 1)
    wide = ray.remote(num_cpus=2)(lambda: "wide").remote()
    assert ray.wait([wide], timeout=0.2) == ([], [wide])
    ray.kill(a)
    assert ray.get(wide, timeout=20) == "wide"
    eventually(lambda: ray.available_resources().get("CPU") == 2)


def test_an_actor_that_waits_for_resources(ray, gate):
    enter = gate.enter

    @ray.remote(num_cpus=2)
    class A:
        def m(self):
            return "up"

    held = ray.remote(enter).remote()
    gate.wait_for_arrivals()
    a = A.remote()
    ref = a.m.remote()
    assert ray.wait([ref], timeout=0.2) == ([], [ref])
    gate.open()
    assert ray.get(ref, timeout=20) == "up"
    ray.get(held)
    ray.kill(a)


def test_resources_come_back_after_a_death(ray, eventually):
    import os

    f = ray.remote(num_cpus=2, max_retries=0)(lambda: os._exit(1))
    for _ in range(2):
        with pytest.raises(ray.exceptions.WorkerCrashedError):
            ray.get(f.remote(), timeout=30)
    eventually(lambda: ray.available_resources().get("CPU") == 2)


def test_resources_come_back_after_an_error(ray, eventually):
    f = ray.remote(num_cpus=2)(lambda: 1 / 0)
    for _ in range(5):
        with pytest.raises(ZeroDivisionError):
            ray.get(f.remote())
    eventually(lambda: ray.available_resources().get("CPU") == 2)


def test_the_head_node_has_a_name(ray):
    assert ray.cluster_resources()["node:__internal_head__"] == 1
    on_head = ray.remote(resources={"node:__internal_head__": 0.001})(lambda: 1)
    assert ray.get(on_head.remote(), timeout=20) == 1


def test_what_is_stored_is_not_available(cluster, eventually):
    mib = 2**20
    ray = cluster(num_cpus=1, object_store_memory=200 * mib)

    def free():
        return round(ray.available_resources()["object_store_memory"] / mib)

    eventually(lambda: free() == 200)
    ref = ray.put(bytes(50 * mib))
    eventually(lambda: free() == 150)
    assert ray.cluster_resources()["object_store_memory"] == 200 * mib
    del ref
    eventually(lambda: free() == 200)


@pytest.mark.parametrize(("options", "assigned", "of_an_actor"), [
    ({}, {"CPU": 1}, {}), ({"num_cpus": 0}, {}, {}),
    ({"num_cpus": 0.5}, {"CPU": 0.5}, {"CPU": 0.5}),
    ({"resources": {"lamp": 0.5}}, {"CPU": 1, "lamp": 0.5}, {"CPU": 1, "lamp": 0.5}),
    ({"resources": {"lamp": 0}}, {"CPU": 1}, None),
    ({"memory": 1000}, {"CPU": 1, "memory": 1000}, {"memory": 1000}),
    ({"num_gpus": 1}, {"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1}),
    ({"num_cpus": 1.5, "resources": {"lamp": 1.5}}, {"CPU": 1.5, "lamp": 1.5}, None),
], ids=str)
def test_assigned_resources(_clusters, options, assigned, of_an_actor):
    ray = _clusters.require(num_cpus=4, num_gpus=1, resources={"lamp": 2})

    def look(self=None):
        return ray.get_runtime_context().get_assigned_resources()

    assert ray.get(ray.remote(look).options(**options).remote()) == assigned
    if of_an_actor is not None:
        actor = ray.remote(type("Actor", (), {"look": look})).options(**options).remote()
        assert ray.get(actor.look.remote()) == of_an_actor


# --- choosing by labels ---------------------------------------------------------------------------


def test_a_fallback_is_taken_where_the_first_choice_is_not(cluster):
    ray = cluster(num_cpus=1, labels={"zone": "a"})
    f = ray.remote(lambda: 1)
    choices = [{"label_selector": {"zone": "y"}}, {"label_selector": {"zone": "in(a,b)"}}]
    first = {"label_selector": {"zone": "x"}}
    assert ray.get(f.options(**first, fallback_strategy=choices).remote(), timeout=20) == 1
    actor = ray.remote(type("Actor", (), {"f": lambda self: 2}))
    actor = actor.options(**first, fallback_strategy=choices).remote()
    assert ray.get(actor.f.remote(), timeout=20) == 2
    nowhere = f.options(**first, fallback_strategy=choices[:1]).remote()
    assert ray.wait([nowhere], timeout=0.3) == ([], [nowhere])
    ray.cancel(nowhere)
    anywhere = f.options(**first, fallback_strategy=[{"label_selector": {}}])
    assert ray.get(anywhere.remote(), timeout=20) == 1


@pytest.mark.parametrize(("strategy", "error"), [
    ({"label_selector": {"zone": "a"}}, TypeError), ([{"num_cpus": 1}], ValueError),
    ([{"label_selector": {"zone": 1}}], TypeError), (["zone"], (TypeError, ValueError)),
])
def test_fallbacks_that_cannot_be(ray, strategy, error):
    with pytest.raises(error):
        ray.remote(fallback_strategy=strategy)(lambda: 1).remote()


# --- blocked tasks give their CPU back ------------------------------------------------------------


def test_a_task_blocked_in_get_gives_its_cpu_back(ray, signal):
    @ray.remote
    def waits():
        ray.get(signal.wait.remote())
        return "woken"

    blocked = [waits.remote() for _ in range(2)]  # would hold both CPUs
    assert ray.wait(blocked, timeout=0.1)[0] == []
    assert ray.get(ray.remote(lambda: "ran").remote(), timeout=30) == "ran"
    ray.get(signal.send.remote())
    assert ray.get(blocked) == ["woken"] * 2


def test_a_task_blocked_in_wait_gives_its_cpu_back(ray, signal):
    @ray.remote
    def waits():
        ready, _ = ray.wait([signal.wait.remote()])
        return len(ready)

    blocked = [waits.remote() for _ in range(2)]
    assert ray.wait(blocked, timeout=0.1)[0] == []
    assert ray.get(ray.remote(lambda: "ran").remote(), timeout=30) == "ran"
    ray.get(signal.send.remote())
    assert ray.get(blocked) == [1, 1]


def test_blocked_tasks_keep_custom_resources(cluster, make_gate):
    ray = cluster(num_cpus=2, resources={"lamp": 1})
    gate = make_gate()
    enter = gate.enter
    inner = ray.remote(num_cpus=0)(enter)

    @ray.remote(resources={"lamp": 1})
    def outer():
        ray.get(inner.remote())

    ref = outer.remote()
    gate.wait_for_arrivals()
    other = ray.remote(resources={"lamp": 1})(lambda: 1).remote()
    assert ray.wait([other], timeout=0.2) == ([], [other])
    gate.open()
    assert ray.get([ref, other]) == [None, 1]


@pytest.mark.timeout(120)
def test_many_blocked_tasks_on_two_cpus(ray, signal):
    count = 100 if ray.__name__ == "hpcray" else 12  # Ray starts a process in half a second

    @ray.remote
    def waits(i):
        ray.get(signal.wait.remote())
        return i

    refs = [waits.remote(i) for i in range(count)]
    assert ray.wait(refs, timeout=0.1)[0] == []
    ray.get(signal.send.remote())
    assert ray.get(refs) == list(range(count))


def test_tree_of_tasks_wider_than_the_cpus(ray):
    @ray.remote
    def tree(depth):
        if depth == 0:
            return 1
        return sum(ray.get([tree.remote(depth - 1) for _ in range(2)]))

    assert ray.get(tree.remote(4), timeout=60) == 16


@pytest.mark.ray_differs("in Ray an actor keeps its CPUs while it blocks, and this deadlocks")
def test_a_blocked_actor_gives_its_cpu_back(ray):
    @ray.remote(num_cpus=2)
    class A:
        def m(self):
            return ray.get(ray.remote(lambda: "from a task").remote())

    a = A.remote()
    assert ray.get(a.m.remote(), timeout=30) == "from a task"
    ray.kill(a)
