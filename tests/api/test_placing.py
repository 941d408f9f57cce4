"""Where tasks and actors may run: labels, affinities, accelerators; and which goes first.

On one node: what is accepted, what waits, what fails. Over ranks: tests/mpirun/test_placing.py.
"""

from __future__ import annotations

import importlib
import os

import pytest

BACKEND = os.environ.get("HPCRAY_TEST_BACKEND", "hpcray")
strategies = importlib.import_module(f"{BACKEND}.util.scheduling_strategies")
Labels = strategies.NodeLabelSchedulingStrategy
Affinity = strategies.NodeAffinitySchedulingStrategy
In, NotIn = strategies.In, strategies.NotIn
Exists, DoesNotExist = strategies.Exists, strategies.DoesNotExist


@pytest.fixture
def labelled(_clusters):
    return _clusters.require(
        num_cpus=2, labels={"zone": "a", "tier": "fast"}, resources={"accelerator_type:A100": 1})


@pytest.fixture
def node_id(labelled):
    return labelled.nodes()[0]["NodeID"]


@pytest.fixture
def runs(labelled):
    """`runs(**options)`: whether a task and an actor with the options run here."""
    task = labelled.remote(lambda: "ran")

    @labelled.remote
    class Actor:
        def ask(self):
            return "ran"

    def runs(*, actor=True, **options):
        ref = task.options(**options).remote()
        found = labelled.wait([ref], timeout=20 if actor else 0.15)[0] == [ref]
        if found:
            assert labelled.get(ref) == "ran"
        else:
            labelled.cancel(ref)
        if actor:
            assert labelled.get(Actor.options(**options).remote().ask.remote(), timeout=20) == "ran"
        return found

    return runs


# --- labels ---------------------------------------------------------------------------------------


def test_labels_of_nodes(labelled, node_id):
    found = labelled.nodes()[0]["Labels"]
    assert (found["zone"], found["tier"]) == ("a", "fast")
    assert found["ray.io/node-id"] == node_id
    assert labelled.get_runtime_context().get_node_labels() == found

    @labelled.remote
    def mine():
        return importlib.import_module(BACKEND).get_runtime_context().get_node_labels()

    assert labelled.get(mine.remote()) == found


@pytest.mark.parametrize("hard", [
    {"zone": In("a")}, {"zone": In("b", "a")}, {"zone": NotIn("b")}, {"none": NotIn("b")},
    {"zone": Exists(), "tier": Exists()}, {"none": DoesNotExist()},
], ids=repr)
def test_hard_conditions_that_hold(runs, hard):
    assert runs(scheduling_strategy=Labels(hard=hard))


@pytest.mark.parametrize("hard", [
    {"zone": In("b")}, {"zone": NotIn("a")}, {"none": Exists()}, {"zone": DoesNotExist()},
    {"zone": In("a"), "tier": In("slow")},
], ids=repr)
def test_hard_conditions_that_do_not(runs, hard):
    assert not runs(actor=False, scheduling_strategy=Labels(hard=hard))


def test_soft_conditions_do_not_have_to(runs):
    assert runs(scheduling_strategy=Labels(None, soft={"zone": In("b")}))
    assert runs(scheduling_strategy=Labels({"tier": Exists()}, soft={"none": Exists()}))
    assert not runs(actor=False, scheduling_strategy=Labels(
        {"none": Exists()}, soft={"zone": In("a")}))


@pytest.mark.parametrize("selector", [
    {"zone": "a"}, {"zone": "!b"}, {"none": "!b"}, {"zone": "in(b,a)"}, {"zone": "!in(b,c)"},
    {"none": "!in(b,c)"}, {"zone": "a", "tier": "!slow"}, {},
], ids=repr)
def test_label_selectors_that_hold(runs, selector):
    assert runs(label_selector=selector)


@pytest.mark.parametrize("selector", [
    {"zone": "b"}, {"zone": "!a"}, {"zone": "in(b,c)"}, {"zone": "!in(b,a)"}, {"none": "a"},
    {"none": ""}, {"zone": "a", "tier": "slow"}, {"A.b/c_d-e": "f.g_h-i"},
], ids=repr)
def test_label_selectors_that_do_not(runs, selector):
    assert not runs(actor=False, label_selector=selector)


def test_a_selector_of_the_node_itself(runs, node_id):
    assert runs(label_selector={"ray.io/node-id": node_id})
    assert runs(label_selector={"ray.io/node-id": f"in({'0' * 56},{node_id})"})


def test_selectors_go_with_strategies(runs, node_id):
    for strategy in ("DEFAULT", "SPREAD", Affinity(node_id, soft=False),
                     Labels({"tier": Exists()})):
        assert runs(scheduling_strategy=strategy, label_selector={"zone": "a"})
        assert runs(scheduling_strategy=strategy)
    assert not runs(actor=False, scheduling_strategy=Labels({"zone": Exists()}),
                    label_selector={"zone": "b"})


def test_a_selector_in_the_declaration(labelled):
    @labelled.remote(label_selector={"zone": "a"})
    def f():
        return importlib.import_module(BACKEND).get_runtime_context().get_assigned_resources()

    assert labelled.get(f.remote()) == {"CPU": 1}
    assert set(labelled.available_resources()) <= set(labelled.cluster_resources())


def test_an_actor_that_no_node_may_host_waits(labelled):
    @labelled.remote(label_selector={"zone": "b"})
    class A:
        def m(self):
            pass

    actor = A.remote()
    assert labelled.wait([actor.m.remote()], timeout=0.3)[0] == []
    labelled.kill(actor)


@pytest.mark.parametrize("selector", [
    {"a": "in()"}, {"a": "!"}, {"a": "in(b"}, {"a b": "x"}, {"a": "x y"}, {"-a": "x"}, {"": "x"},
    {"a": "x" * 64}, {"ray.io/": "x"}, {"x/y/z": "q"},
], ids=repr)
def test_selectors_that_cannot_be(labelled, selector):
    with pytest.raises(ValueError):
        labelled.remote(label_selector=selector)(lambda: 1)
    with pytest.raises(ValueError):
        labelled.remote(lambda: 1).options(label_selector=selector)


@pytest.mark.parametrize("selector", ["x", [1], {"a": 1}, {1: "a"}], ids=repr)
def test_selectors_of_wrong_types(labelled, selector):
    with pytest.raises(TypeError):
        labelled.remote(label_selector=selector)(lambda: 1)


@pytest.mark.parametrize("make", [
    lambda: Labels(None), lambda: Labels({}), lambda: Labels({}, soft={}),
    lambda: Labels({"a": "b"}), lambda: Labels({1: Exists()}), lambda: Labels([1]), lambda: In(),
    lambda: NotIn(), lambda: In(1), lambda: In("a", 1),
])
def test_conditions_that_cannot_be(make):
    with pytest.raises(ValueError):
        make()


@pytest.mark.hpcray_only("Ray takes what no label can be, and waits")
def test_conditions_that_no_label_can_meet():
    for make in (lambda: In("a b"), lambda: Labels({"": Exists()}), lambda: Labels({"a b": In()})):
        with pytest.raises(ValueError):
            make()


@pytest.mark.ray_differs("Ray takes any in init, and none of these in `ray start`")
def test_labels_that_cannot_be(bare_ray, init_options):
    with pytest.raises((ValueError, TypeError)):
        bare_ray.init(num_cpus=1, labels={"a b": "c"}, **init_options)


@pytest.mark.hpcray_only("bundles on labels: Ray's test needs several nodes")
def test_bundles_on_labels(labelled):
    util = importlib.import_module(f"{BACKEND}.util")
    there = util.placement_group([{"CPU": 1}] * 2, bundle_label_selector=[{"zone": "a"}, {}])
    assert there.wait(20)
    assert there.bundle_specs == [{"CPU": 1}] * 2
    assert util.placement_group_table(there)["bundles"] == {0: {"CPU": 1}, 1: {"CPU": 1}}
    inside = strategies.PlacementGroupSchedulingStrategy(there, 0)
    task = labelled.remote(lambda: "in").options(scheduling_strategy=inside)
    assert labelled.get(task.remote()) == "in"
    util.remove_placement_group(there)
    nowhere = util.placement_group([{"CPU": 1}], bundle_label_selector=[{"zone": "b"}])
    assert not nowhere.wait(0.3)
    util.remove_placement_group(nowhere)
    for wrong, error in (([{}, {}], ValueError), ([1], TypeError), ([{"a": "in("}], ValueError)):
        with pytest.raises(error):
            util.placement_group([{"CPU": 1}], bundle_label_selector=wrong)


@pytest.mark.hpcray_only("the notice is ours")
def test_a_condition_no_node_can_meet_is_told(run_driver):
    done = run_driver("""
        import os
        os.environ["HPCRAY_LABELS"] = '{"zone": "a", "tier": "fast"}'
        ray.init(num_cpus=1, labels={"tier": "slow"})
        labels = ray.nodes()[0]["Labels"]
        assert (labels["zone"], labels["tier"]) == ("a", "slow"), labels
        assert labels["hpcray.io/host"], labels
        ref = ray.remote(lambda: 1).options(label_selector={"zone": "b"}).remote()
        assert ray.wait([ref], timeout=2) == ([], [ref])
    """)
    assert "labels zone=b" in done.stdout + done.stderr, done.stderr


# --- affinities -----------------------------------------------------------------------------------


NOWHERE = "0" * 54 + "63"  # what could be the id of a node


def test_an_affinity_to_a_node_that_is_not_there(labelled):
    f = labelled.remote(lambda: 1)

    @labelled.remote
    class A:
        def m(self):
            pass

    hard = Affinity(NOWHERE, soft=False)
    with pytest.raises(labelled.exceptions.TaskUnschedulableError):
        labelled.get(f.options(scheduling_strategy=hard).remote(), timeout=20)
    with pytest.raises(labelled.exceptions.ActorUnschedulableError):
        labelled.get(A.options(scheduling_strategy=hard).remote().m.remote(), timeout=20)
    assert labelled.get(
        f.options(scheduling_strategy=Affinity(NOWHERE, soft=True)).remote(), timeout=20) == 1


def test_an_affinity_that_can_never_be(labelled, node_id):
    hard = Affinity(node_id, soft=False)
    f = labelled.remote(num_cpus=9)(lambda: 1)
    with pytest.raises(labelled.exceptions.TaskUnschedulableError):
        labelled.get(f.options(scheduling_strategy=hard).remote(), timeout=20)
    waits = f.options(scheduling_strategy=Affinity(node_id, soft=True)).remote()
    assert labelled.wait([waits], timeout=0.3)[0] == []
    labelled.cancel(waits)


def test_an_affinity_to_a_busy_node(labelled, node_id, gate, eventually):
    enter = gate.enter
    held = labelled.remote(num_cpus=2)(enter).remote()
    gate.wait_for_arrivals()
    f = labelled.remote(lambda: 1)
    now_or_never = Affinity(node_id, soft=False, _fail_on_unavailable=True)
    waits = f.options(scheduling_strategy=Affinity(node_id, soft=False)).remote()
    spills = f.options(scheduling_strategy=Affinity(
        node_id, soft=True, _spill_on_unavailable=True)).remote()
    with pytest.raises(labelled.exceptions.TaskUnschedulableError):
        labelled.get(f.options(scheduling_strategy=now_or_never).remote(), timeout=20)

    @labelled.remote(num_cpus=1)
    class A:
        def m(self):
            pass

    with pytest.raises(labelled.exceptions.ActorUnschedulableError):
        labelled.get(A.options(scheduling_strategy=now_or_never).remote().m.remote(), timeout=20)
    gate.open()
    assert labelled.get([held, waits, spills], timeout=20) == [None, 1, 1]
    eventually(lambda: labelled.available_resources().get("CPU") == 2)
    assert labelled.get(f.options(scheduling_strategy=now_or_never).remote(), timeout=20) == 1


@pytest.mark.parametrize("flags", [
    {"soft": False, "_spill_on_unavailable": True}, {"soft": True, "_fail_on_unavailable": True}])
def test_affinities_that_contradict(flags):
    with pytest.raises(ValueError, match="soft"):
        Affinity("0" * 55 + "1", **flags)


# --- accelerators ---------------------------------------------------------------------------------


def test_accelerator_types(labelled, runs):
    accelerators = importlib.import_module(f"{BACKEND}.util.accelerators")
    assert accelerators.NVIDIA_A100 == "A100"
    assert runs(accelerator_type=accelerators.NVIDIA_A100)
    assert not runs(actor=False, accelerator_type=accelerators.NVIDIA_TESLA_V100)

    @labelled.remote(accelerator_type="A100")
    def f():
        return importlib.import_module(BACKEND).get_runtime_context().get_assigned_resources()

    assert labelled.get(f.remote()) == {"CPU": 1, "accelerator_type:A100": 0.001}


# --- priorities -----------------------------------------------------------------------------------


@pytest.mark.hpcray_only("Ray has no priorities")
def test_priorities(ray, gate, tmp_path):
    """Between tasks that wait: the highest first, whatever their resources; equals in order."""
    enter = gate.enter
    held = [ray.remote(num_cpus=2, max_retries=0)(enter).remote()]
    gate.wait_for_arrivals()
    log = str(tmp_path / "order")

    def note(number):
        with open(log, "a") as file:
            file.write(f"{number} ")

    wide = ray.remote(num_cpus=2, max_retries=0)(note)
    other = ray.remote(num_cpus=1.5, priority=2, max_retries=0)(note)
    held += [wide.remote(0), wide.options(priority=3).remote(1), other.remote(2),
             wide.options(priority=-1).remote(3), wide.options(priority=3).remote(4),
             other.options(priority=5).remote(5), wide.remote(6),
             wide.options(priority=0).remote(7)]
    ray.cluster_resources()  # its answer comes after the node has read what was submitted before
    gate.open()
    ray.get(held, timeout=30)
    with open(log) as file:
        assert file.read().split() == list("51420673")


@pytest.mark.hpcray_only("Ray has no priorities")
@pytest.mark.parametrize(("value", "error"), [
    ("1", TypeError), (1.0, TypeError), (True, TypeError), (2**31, ValueError),
    (-(2**31), ValueError)])
def test_priorities_that_cannot_be(ray, value, error):
    with pytest.raises(error, match="priority"):
        ray.remote(priority=value)(lambda: 1)
    with pytest.raises(ValueError, match="not an option of actors"):
        ray.remote(priority=1)(type("A", (), {}))
