"""Values of options that programs really pass: computed ones, empty ones, wrong ones."""

from __future__ import annotations

import abc

import pytest


def nothing():
    return 1


@pytest.mark.parametrize(("options", "error"), [
    ({"num_cpus": "1"}, TypeError), ({"num_cpus": -1}, ValueError),
    ({"num_gpus": "1"}, TypeError), ({"memory": -1}, ValueError),
    ({"resources": []}, TypeError), ({"resources": {"CPU": 1}}, ValueError),
    ({"num_returns": -1}, ValueError), ({"num_returns": 1.5}, TypeError),
    ({"num_returns": "dynamic"}, ValueError), ({"num_returns": "streaming"}, ValueError),
    ({"max_retries": -2}, ValueError), ({"max_retries": "x"}, TypeError),
    ({"max_calls": -1}, ValueError), ({"retry_exceptions": [1]}, ValueError),
    ({"retry_exceptions": ValueError}, TypeError), ({"name": 1}, TypeError),
    ({"scheduling_strategy": 1}, TypeError), ({"runtime_env": []}, TypeError),
    ({"runtime_env": {"env_vars": {"a": 1}}}, TypeError), ({"placement_group": 1}, TypeError),
    ({"placement_group_bundle_index": "x"}, TypeError), ({"accelerator_type": 1}, TypeError),
    ({"placement_group_capture_child_tasks": 1}, TypeError), ({"lifetime": "detached"}, ValueError),
    ({"enable_task_events": 1}, TypeError), ({"label_selector": 1}, TypeError),
    ({"no_such_option": 1}, ValueError), ({"concurrency_groups": {}}, ValueError),
])
def test_refused_of_a_task_where_it_is_written(ray, options, error):
    with pytest.raises(error):
        ray.remote(**options)(nothing)
    with pytest.raises(error):
        ray.remote(nothing).options(**options)


@pytest.mark.parametrize(("options", "error"), [
    ({"max_restarts": -2}, ValueError), ({"max_restarts": "x"}, TypeError),
    ({"max_task_retries": -2}, ValueError), ({"max_concurrency": -1}, ValueError),
    ({"max_concurrency": "x"}, TypeError), ({"max_pending_calls": -2}, ValueError),
    ({"lifetime": "x"}, ValueError), ({"namespace": 1}, TypeError),
    ({"num_returns": 1}, ValueError),
    ({"max_retries": 1}, ValueError), ({"retry_exceptions": True}, ValueError),
])
def test_refused_of_an_actor_where_it_is_written(ray, options, error):
    class Plain:
        pass

    with pytest.raises(error):
        ray.remote(**options)(Plain)


def test_an_abstract_class_is_no_actor(ray):
    class Abstract(abc.ABC):
        @abc.abstractmethod
        def ask(self): ...

    with pytest.raises(TypeError, match="abstract"):
        ray.remote(Abstract).remote()


def test_truth_values_and_fractions_are_numbers(ray):
    """`num_gpus=torch.cuda.is_available()`, `memory=0.7 * total`."""
    assert ray.get(ray.remote(num_cpus=True, num_gpus=False)(nothing).remote()) == 1
    assert ray.get(ray.remote(memory=0.7 * 1001)(nothing).remote()) == 1
    group = ray.util.placement_group([{"CPU": True, "memory": 1000}])
    assert group.wait(30)
    ray.util.remove_placement_group(group)


def test_a_task_with_an_empty_name_has_its_own(ray):
    assert ray.get(ray.remote(nothing).options(name="").remote()) == 1


def test_a_method_decorator_without_options(ray):
    @ray.remote
    class Actor:
        @ray.method()
        def ask(self):
            return 1

    assert ray.get(Actor.remote().ask.remote()) == 1


@pytest.mark.parametrize(("value", "error"), [
    (1, TypeError), (None, TypeError), ((1, 2, 3), ValueError), ([], ValueError)])
def test_returns_that_are_not_as_many_as_told(ray, value, error):
    @ray.remote(num_returns=2)
    def give():
        return value

    for ref in give.remote():
        with pytest.raises(error):
            ray.get(ref)


def test_one_label_selector_for_each_bundle(ray):
    with pytest.raises(ValueError, match=r"bundle.?label.?selector"):
        ray.util.placement_group([{"CPU": 1}], bundle_label_selector=[])


def test_waiting_for_a_group_needs_seconds(ray):
    group = ray.util.placement_group([{"CPU": 1}])
    assert group.wait(30)
    with pytest.raises(TypeError):
        group.wait("long")
    ray.util.remove_placement_group(group)
