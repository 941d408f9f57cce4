"""A placement group that captures children: actors of its tasks, and tasks of its actors."""

from __future__ import annotations

import importlib
import os

import pytest

BACKEND = os.environ.get("HPCRAY_TEST_BACKEND", "hpcray")


@pytest.fixture
def ray6(_clusters):
    return _clusters.require(num_cpus=6)  # enough in the group and outside


@pytest.fixture
def group(ray6):
    util = importlib.import_module(f"{BACKEND}.util")
    group = util.placement_group([{"CPU": 3}])
    assert group.wait(20)
    yield group
    util.remove_placement_group(group)


@pytest.fixture
def inside(group):
    """The strategy of the group, with children captured or not."""
    In = importlib.import_module(
        f"{BACKEND}.util.scheduling_strategies").PlacementGroupSchedulingStrategy
    return lambda captures: In(group, placement_group_capture_child_tasks=captures)


@pytest.fixture
def where():
    """Tells the group of whatever calls it, and whether that captures children."""
    def where():
        context = importlib.import_module(BACKEND).get_runtime_context()
        util = importlib.import_module(f"{BACKEND}.util")
        current = util.get_current_placement_group()
        id_ = context.get_placement_group_id()
        assert id_ == (None if current is None else current.id.hex())
        return id_, context.should_capture_child_tasks_in_placement_group

    return where


@pytest.fixture
def make_class(where):
    def make_class(kind):
        class A:
            def where(self):
                return where()

            def where_children(self):
                ray = importlib.import_module(BACKEND)

                @ray.remote
                class Child:
                    def where(self):
                        return where()

                child = Child.options(num_cpus=1).remote()
                return ray.get(
                    [ray.remote(where).remote(), child.where.remote()], timeout=20)

        class Async(A):
            async def where(self):
                return where()

            async def where_children(self):
                ray = importlib.import_module(BACKEND)

                @ray.remote
                class Child:
                    def where(self):
                        return where()

                child = Child.options(num_cpus=1).remote()
                return [await ray.remote(where).remote(), await child.where.remote()]

        return Async if kind == "asyncio" else A

    return make_class


@pytest.mark.parametrize("captures", [True, False])
def test_an_actor_of_a_task(ray6, group, inside, where, make_class, captures):
    actors = ray6.remote(make_class("sequential"))

    @ray6.remote
    def parent():
        ray = importlib.import_module(BACKEND)
        actor = actors.options(num_cpus=1).remote()
        return where(), ray.get(actor.where.remote(), timeout=20)

    mine, child = ray6.get(
        parent.options(scheduling_strategy=inside(captures)).remote(), timeout=20)
    assert mine == (group.id.hex(), captures)
    assert child == ((group.id.hex(), True) if captures else (None, False))


def test_children_of_a_captured_actor(ray6, group, inside, make_class):
    actors = ray6.remote(make_class("sequential"))

    @ray6.remote(num_cpus=0)
    def parent():
        ray = importlib.import_module(BACKEND)
        return ray.get(actors.options(num_cpus=1).remote().where_children.remote(), timeout=20)

    found = ray6.get(parent.options(scheduling_strategy=inside(True)).remote(), timeout=20)
    assert found == [(group.id.hex(), True)] * 2


@pytest.mark.parametrize("captures", [True, False])
@pytest.mark.parametrize("kind", ["sequential", "threaded", "asyncio"])
def test_children_of_an_actor(ray6, group, inside, make_class, kind, captures):
    options = {"max_concurrency": 2} if kind == "threaded" else {}
    actor = ray6.remote(**options, num_cpus=1)(make_class(kind)).options(
        scheduling_strategy=inside(captures)).remote()
    assert ray6.get(actor.where.remote(), timeout=20) == (group.id.hex(), captures)
    child = (group.id.hex(), True) if captures else (None, False)
    assert ray6.get(actor.where_children.remote(), timeout=20) == [child, child]


@pytest.mark.parametrize("what", ["task", "actor"])
@pytest.mark.parametrize("captures", [True, False])
@pytest.mark.parametrize(("how", "child"), [
    ("default", {True: ("in", True), False: ("out", False)}),
    ("default, and not its children", {True: ("out", False), False: ("out", False)}),
    ("older, and not its children", {True: ("out", False), False: ("out", False)}),
    ("default, and its children", {True: ("in", True), False: ("in", True)}),
    ("older, and its children", {True: ("in", True), False: ("in", True)}),
    ("none", {True: ("out", False), False: ("out", False)}),
    ("the group", {True: ("in", True), False: ("in", False)}),
    ("the group, older", {True: ("in", True), False: ("in", False)}),
    ("the group, and not its children", {True: ("in", False), False: ("in", False)}),
])
def test_what_a_child_says_itself(
        ray6, group, inside, where, make_class, what, captures, how, child):
    actors = ray6.remote(make_class("sequential"))

    @ray6.remote(num_cpus=0)
    def parent():
        In = type(strategy)
        options = {
            "default": lambda: {"scheduling_strategy": In("default")},
            "default, and not its children":
                lambda: {"scheduling_strategy": In("default", -1, False)},
            "older, and not its children": lambda: {"placement_group_capture_child_tasks": False},
            "default, and its children": lambda: {"scheduling_strategy": In("default", -1, True)},
            "older, and its children": lambda: {"placement_group_capture_child_tasks": True},
            "none": lambda: {"scheduling_strategy": In(None)},
            "the group": lambda: {"scheduling_strategy": In(group)},
            "the group, older": lambda: {"placement_group": group},
            "the group, and not its children":
                lambda: {"scheduling_strategy": In(group, -1, False)},
        }[how]()
        ray = importlib.import_module(BACKEND)
        if what == "task":
            return ray.get(ray.remote(where).options(**options).remote(), timeout=20)
        actor = actors.options(num_cpus=1, **options).remote()
        return ray.get(actor.where.remote(), timeout=20)

    strategy = inside(captures)
    place, hands_on = child[captures]
    assert ray6.get(parent.options(scheduling_strategy=strategy).remote(), timeout=20) == (
        group.id.hex() if place == "in" else None, hands_on)


def test_default_is_outside_of_all_groups_in_a_driver(ray6, group, inside, where):
    In = type(inside(False))
    assert ray6.get(ray6.remote(where).options(
        scheduling_strategy=In("default")).remote(), timeout=20) == (None, False)
    with pytest.raises(ValueError, match="bundle index"):
        ray6.remote(where).options(scheduling_strategy=In("default", 1)).remote()
