"""Placement groups on one node: names, errors, lives. Over ranks: tests/mpirun."""

from __future__ import annotations

import importlib
import os

import pytest

BACKEND = os.environ.get("HPCRAY_TEST_BACKEND", "hpcray")


@pytest.fixture
def util():
    return importlib.import_module(f"{BACKEND}.util")


@pytest.fixture
def In(util):
    return importlib.import_module(
        f"{BACKEND}.util.scheduling_strategies").PlacementGroupSchedulingStrategy


@pytest.fixture
def ray4(_clusters):
    return _clusters.require(num_cpus=4)


@pytest.fixture
def make(ray4, util):
    """`make(bundles, ...)`: a ready group, removed at the end of the test."""
    made = []

    def make(*args, wait=True, **kwargs):
        made.append(util.placement_group(*args, **kwargs))
        if wait:
            assert made[-1].wait(20)
        return made[-1]

    yield make
    for group in made:
        util.remove_placement_group(group)


@pytest.fixture
def where(ray4):
    """A task that tells where it runs: (group, resources)."""
    def where():
        import importlib

        util = importlib.import_module(f"{BACKEND}.util")
        context = importlib.import_module(BACKEND).get_runtime_context()
        return (util.get_current_placement_group(), context.get_assigned_resources(),
                context.get_placement_group_id())

    return ray4.remote(where)


# --- what a group is ------------------------------------------------------------------------------


def test_a_group(ray4, util, make):
    group = make([{"CPU": 1}, {"CPU": 2}], name="pair")
    assert ray4.get(group.ready()) == group
    assert group.bundle_specs == [{"CPU": 1}, {"CPU": 2}]
    assert (group.bundle_count, group.is_empty) == (2, False)
    assert util.placement_group is not importlib.import_module(f"{BACKEND}.util.placement_group")
    table = util.placement_group_table(group)
    assert table["placement_group_id"] == group.id.hex()
    assert table["name"] == "pair"
    assert table["strategy"] == "PACK"
    assert table["state"] == "CREATED"
    assert table["bundles"] == {0: {"CPU": 1.0}, 1: {"CPU": 2.0}}
    node = ray4.nodes()[0]["NodeID"]
    assert table["bundles_to_node_id"] == {0: node, 1: node}
    assert util.placement_group_table()[group.id.hex()]["name"] == "pair"
    assert util.get_placement_group("pair") == group
    assert util.get_current_placement_group() is None


def test_reserved_is_not_available(ray4, make, util, eventually):
    group = make([{"CPU": 3}])
    eventually(lambda: ray4.available_resources().get("CPU") == 1)
    assert ray4.cluster_resources()["CPU"] == 4
    util.remove_placement_group(group)
    eventually(lambda: ray4.available_resources().get("CPU") == 4)


def test_a_group_waits_until_there_is_room(ray4, make, util):
    first = make([{"CPU": 3}])
    second = make([{"CPU": 2}], wait=False)
    assert not second.wait(0.2)
    assert util.placement_group_table(second)["state"] == "PENDING"
    util.remove_placement_group(first)
    assert second.wait(20)


def test_the_empty_group(util):
    group = importlib.import_module(f"{BACKEND}.util.placement_group").PlacementGroup.empty()
    assert group.is_empty


@pytest.mark.parametrize(("bundles", "options"), [
    ([], {}), ({"CPU": 1}, {}), ([{}], {}), ([{"CPU": 0}], {}), ([{"CPU": "1"}], {}), ([1], {}),
    ([{"CPU": 1}], {"strategy": "NEAR"}), ([{"CPU": 1}], {"lifetime": "short"}),
    pytest.param([{"CPU": -1}], {}, marks=pytest.mark.ray_differs("Ray takes it")),
])
def test_groups_that_cannot_be(ray4, util, bundles, options):
    with pytest.raises(ValueError):
        util.placement_group(bundles, **options)


@pytest.mark.ray_differs("Ray raises a RaySystemError")
def test_a_taken_name(ray4, util, make):
    group = make([{"CPU": 1}], name="only")
    with pytest.raises(ValueError, match="only"):
        util.placement_group([{"CPU": 1}], name="only")
    util.remove_placement_group(group)
    make([{"CPU": 1}], name="only")


def test_no_group_of_that_name(ray4, util):
    with pytest.raises(ValueError, match="nope"):
        util.get_placement_group("nope")
    with pytest.raises(ValueError):
        util.get_placement_group("")


# --- what runs in it ------------------------------------------------------------------------------


def test_tasks_in_a_group(ray4, make, where, In):
    group = make([{"CPU": 1}, {"CPU": 2}])
    found = ray4.get([
        where.options(scheduling_strategy=In(group)).remote(),
        where.options(scheduling_strategy=In(group, 1), num_cpus=2).remote(),
        where.options(scheduling_strategy=In(group, 0), num_cpus=0).remote(),
        where.options(placement_group=group, placement_group_bundle_index=0).remote(),
    ])
    assert [one[0] for one in found] == [group] * 4
    assert [one[1].get("CPU", 0) for one in found] == [1, 2, 0, 1]
    assert found[0][2] == group.id.hex()
    # Not even in the workers that were in it.
    assert {(one[0], one[2]) for one in ray4.get([where.remote() for _ in range(8)])} == {
        (None, None)}


def test_a_bundle_is_a_limit(ray4, make, gate, In):
    group = make([{"CPU": 1}, {"CPU": 1}])
    enter = gate.enter
    held = ray4.remote(enter).options(scheduling_strategy=In(group, 0)).remote()
    gate.wait_for_arrivals()
    second = ray4.remote(lambda: 2).options(scheduling_strategy=In(group, 0)).remote()
    assert ray4.wait([second], timeout=0.3)[0] == []
    assert ray4.get(ray4.remote(lambda: 3).options(scheduling_strategy=In(group, 1)).remote()) == 3
    gate.open()
    assert ray4.get([held, second]) == [None, 2]


def test_others_do_not_take_what_is_reserved(ray4, make, gate, In):
    group = make([{"CPU": 3}])
    enter = gate.enter
    task = ray4.remote(enter)
    held = [task.remote() for _ in range(2)]
    gate.wait_for_arrivals(1)
    inside = ray4.remote(num_cpus=3)(lambda: "in").options(scheduling_strategy=In(group))
    assert ray4.get(inside.remote()) == "in"
    assert gate.arrivals() == 1
    gate.open()
    ray4.get(held)


def test_actors_in_a_group(ray4, make, In):
    group = make([{"CPU": 1}])

    @ray4.remote(num_cpus=1)
    class A:
        def group(self):
            import importlib

            return importlib.import_module(f"{BACKEND}.util").get_current_placement_group()

    first = A.options(scheduling_strategy=In(group)).remote()
    assert ray4.get(first.group.remote()) == group
    second = A.options(scheduling_strategy=In(group)).remote()
    waiting = second.group.remote()
    assert ray4.wait([waiting], timeout=0.3)[0] == []
    ray4.kill(first)
    assert ray4.get(waiting) == group


def test_children_are_captured_if_asked(ray4, make, where, In):
    group = make([{"CPU": 2}])

    @ray4.remote
    def parent():
        ray = importlib.import_module(BACKEND)
        return [ray.get(where.remote())[0],
                ray.get(where.options(scheduling_strategy="DEFAULT").remote())[0]]

    def inside(captures):
        return parent.options(scheduling_strategy=In(
            group, placement_group_capture_child_tasks=captures)).remote()

    assert ray4.get(inside(True)) == [group, None]
    assert ray4.get(inside(None)) == [None, None]
    assert ray4.get(parent.remote()) == [None, None]


def test_a_group_is_passed_to_tasks(ray4, make, where, In):
    group = make([{"CPU": 1}])

    @ray4.remote
    def use(group):
        ray = importlib.import_module(BACKEND)
        return ray.get(where.options(scheduling_strategy=In(group)).remote())[0]

    assert ray4.get(use.remote(group)) == group


def test_what_does_not_fit(ray4, make, where, In):
    group = make([{"CPU": 1}, {"CPU": 2}])
    with pytest.raises(ValueError, match="cannot fit"):
        where.options(scheduling_strategy=In(group), num_cpus=3).remote()
    for index in (2, -2):
        with pytest.raises(ValueError, match="index"):
            where.options(scheduling_strategy=In(group, index)).remote()


@pytest.mark.ray_differs("Ray asks a server, and may not wait for its answer")
def test_wait_without_time_looks(make):
    group = make([{"CPU": 1}], strategy=None)
    assert group.wait(0)


def test_an_index_without_a_group(where):
    with pytest.raises(ValueError, match="index"):
        where.options(placement_group_bundle_index=0).remote()


def test_outside_of_all_groups(ray4, make, where, In):
    group = make([{"CPU": 1}, {"CPU": 1}])

    @ray4.remote
    def parent():
        ray = importlib.import_module(BACKEND)
        return [ray.get(child.remote()) for child in (
            where, where.options(scheduling_strategy=In(None)),
            where.options(placement_group_bundle_index=1))]

    inside, outside, in_bundle = ray4.get(parent.options(
        scheduling_strategy=In(group, 0, True), num_cpus=0).remote())
    assert inside[0] == in_bundle[0] == group
    assert outside[0] is None


@pytest.mark.ray_differs("Ray leaves it pending")
def test_what_does_not_fit_its_bundle(ray4, make, where, In):
    group = make([{"CPU": 1}, {"CPU": 2}])
    with pytest.raises(ValueError, match="bundle 0"):
        where.options(scheduling_strategy=In(group, 0), num_cpus=2).remote()
    with pytest.raises(TypeError, match="PlacementGroup"):
        In("group")


# --- removal --------------------------------------------------------------------------------------


@pytest.mark.ray_differs("Ray's running task fails as one whose node died, later ones hang")
def test_removal_ends_what_is_in_the_group(ray4, util, make, gate, In):
    group = make([{"CPU": 1}, {"CPU": 1}])
    enter = gate.enter
    task = ray4.remote(enter)

    @ray4.remote(max_restarts=3)
    class A:
        def hold(self):
            enter()

    actor = A.options(scheduling_strategy=In(group)).remote()
    held = actor.hold.remote()
    inside = [task.options(scheduling_strategy=In(group), max_retries=n).remote() for n in (0, 3)]
    gate.wait_for_arrivals(3)
    inside.append(task.options(scheduling_strategy=In(group)).remote())
    pending = A.options(scheduling_strategy=In(group), num_cpus=1).remote().hold.remote()
    util.remove_placement_group(group)
    util.remove_placement_group(group)
    for ref in inside:
        with pytest.raises(ray4.exceptions.TaskPlacementGroupRemoved):
            ray4.get(ref)
    with pytest.raises(ray4.exceptions.ActorDiedError, match="placement group"):
        ray4.get(held)
    with pytest.raises(ray4.exceptions.ActorPlacementGroupRemoved):
        ray4.get(pending)
    with pytest.raises(ray4.exceptions.TaskPlacementGroupRemoved):
        ray4.get(task.options(scheduling_strategy=In(group)).remote())
    with pytest.raises(ValueError, match="removed"):
        group.wait(20)
    assert util.placement_group_table(group)["state"] == "REMOVED"
    gate.open()


def test_removal_of_a_pending_group(ray4, util, make):
    group = make([{"CPU": 100}], wait=False)
    ready = group.ready()
    assert not group.wait(0.1)
    util.remove_placement_group(group)
    with pytest.raises(ray4.exceptions.TaskPlacementGroupRemoved):
        ray4.get(ready)


@pytest.mark.hpcray_only("the notice is ours")
def test_a_group_that_can_never_be_is_told(run_driver):
    done = run_driver("""
        from hpcray.util import placement_group
        ray.init(num_cpus=2)
        group = placement_group([{"CPU": 1}] * 2, strategy="STRICT_SPREAD", name="apart")
        assert not group.wait(2)
    """)
    assert done.returncode == 0, done.stderr
    assert "placement group apart" in done.stdout + done.stderr
    assert "can never hold" in done.stdout + done.stderr


@pytest.mark.hpcray_only("an answer that is longer than a datagram")
def test_a_table_of_many_groups(ray4, util):
    groups = [util.placement_group([{"CPU": 1000}] * 20, name=f"many {i}") for i in range(300)]
    table = util.placement_group_table()
    assert [table[group.id.hex()]["name"] for group in groups] == [
        f"many {i}" for i in range(300)]
    assert all(len(table[group.id.hex()]["bundles"]) == 20 for group in groups)
    for group in groups:
        util.remove_placement_group(group)


def test_states(ray4, util, make):
    first = make([{"CPU": 4}], name="states")
    table = util.placement_group_table(first)
    assert table["state"] == "CREATED" and table["name"] == "states"
    assert table["bundles"] == {0: {"CPU": 4.0}} and set(table["bundles_to_node_id"]) == {0}
    second = make([{"CPU": 1}], wait=False)
    assert not second.wait(0.1)
    assert util.placement_group_table(second)["state"] == "PENDING"
    util.remove_placement_group(first)
    assert second.wait(20)
    assert util.placement_group_table(first)["state"] == "REMOVED"
    assert util.placement_group_table()[first.id.hex()]["state"] == "REMOVED"
    util.remove_placement_group(first)


def test_a_zero_beside_something_is_a_bundle(make):
    assert make([{"CPU": 1, "GPU": 0}, {"CPU": 0, "memory": 100}]).bundle_count == 2
    for wrong in ([{}], [{"CPU": 0}], [], None, "x", [1], [{"CPU": 1}, {}], {"CPU": 1}):
        with pytest.raises((ValueError, TypeError)):
            make(wrong, wait=False)
