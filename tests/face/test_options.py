"""Options: what is refused where it is written, and what the rest means as a template."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcray import options
from hpcray.protocol import ids
from hpcray.protocol.messages import METHOD, TASK, UNIT
from hpcray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

FUNCTION = b"f" * 16
NODE_1 = ids.node_id_hex(1, "00")


@pytest.mark.parametrize(("whom", "given_options", "error", "says"), [
    ("t", {"nmu_cpus": 1}, ValueError, "num_cpus"),
    ("t", {"max_restarts": 1}, ValueError, "not an option of tasks"),
    ("a", {"max_retries": 1}, ValueError, "not an option of actors"),
    ("a", {"num_returns": 2}, ValueError, "not an option of actors"),
    ("m", {"num_cpus": 1}, ValueError, "not an option of actor methods"),
    ("t", {"num_cpus": -1}, ValueError, "num_cpus"),
    ("t", {"num_cpus": "1"}, TypeError, "num_cpus"),
    ("t", {"num_cpus": float("nan")}, ValueError, "finite"),
    ("t", {"num_cpus": 0.00001}, ValueError, "1/10000"),
    ("t", {"num_gpus": 1.5}, ValueError, "whole"),
    ("t", {"resources": {"CPU": 1}}, ValueError, "num_cpus="),
    ("t", {"resources": {"a": -1}}, ValueError, "'a'"),
    ("t", {"resources": [1]}, TypeError, "dict"),
    ("t", {"num_returns": -1}, ValueError, "num_returns"),
    ("t", {"num_returns": 1_000_001}, ValueError, "at most 1,000,000"),
    ("t", {"num_returns": 1.0}, TypeError, "num_returns"),
    ("t", {"_generator_backpressure_num_objects": 0}, ValueError, "at least 1"),
    ("t", {"num_returns": "many"}, TypeError, "num_returns"),
    ("t", {"max_retries": -2}, ValueError, "at least -1"),
    ("t", {"retry_exceptions": 1}, TypeError, "retry_exceptions"),
    ("t", {"retry_exceptions": [int]}, ValueError, "exception classes"),
    ("t", {"placement_group": 1}, TypeError, "PlacementGroup"),
    ("a", {"name": ""}, ValueError, "empty"),
    ("t", {"name": 1}, TypeError, "name"),
    ("t", {"scheduling_strategy": "PACK"}, ValueError, "'SPREAD'"),
    ("t", {"scheduling_strategy": 1}, TypeError, "NodeAffinity"),
    ("t", {"runtime_env": {"pip": ["x"]}}, NotImplementedError, "'pip'"),
    ("t", {"runtime_env": {"env_vars": {"A": 1}}}, TypeError, "str to str"),
    ("t", {"accelerator_type": 1}, TypeError, "accelerator_type"),
    ("a", {"accelerator_type": ""}, ValueError, "accelerator_type"),
    ("t", {"fallback_strategy": [{}]}, ValueError, "label_selector"),
    ("a", {"fallback_strategy": {}}, TypeError, "list"),
    ("t", {"object_store_memory": 1}, NotImplementedError, "init"),
    ("t", {"label_selector": [1]}, TypeError, "dict"),
    ("t", {"label_selector": {"a": 1}}, TypeError, "'a'"),
    ("t", {"label_selector": {1: "a"}}, TypeError, "1"),
    ("t", {"label_selector": {"a": "in(b"}}, ValueError, "in"),
    ("a", {"label_selector": {"a": "!"}}, ValueError, "'!value'"),
    ("a", {"label_selector": {"-a": "b"}}, ValueError, "-a"),
    ("t", {"resources": {"?zone": 1}}, ValueError, "zone"),
    ("t", {"priority": 1.5}, TypeError, "priority"),
    ("t", {"priority": 2**40}, ValueError, "at most"),
    ("a", {"priority": 1}, ValueError, "not an option of actors"),
    ("t", {"placement_group_bundle_index": -2}, ValueError, "at least -1"),
    ("a", {"lifetime": "forever"}, ValueError, "detached"),
    ("a", {"namespace": ""}, ValueError, "namespace"),
    ("a", {"max_concurrency": 0}, ValueError, "max_concurrency"),
    ("a", {"get_if_exists": True}, ValueError, "name"),
    ("a", {"concurrency_groups": {"io": 0}}, ValueError, "at least 1"),
    ("a", {"max_pending_calls": "3"}, TypeError, "max_pending_calls"),
    ("m", {"concurrency_group": 1}, TypeError, "concurrency_group"),
])
def test_refused(whom: str, given_options: dict[str, Any], error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        options.check_options(given_options, whom)


def test_defaults_of_unsupported_options_are_accepted() -> None:
    given_options: dict[str, Any] = {"_labels": None, "object_store_memory": None}
    assert options.check_options(given_options, "t") == {}


def test_max_calls_belongs_to_the_declaration() -> None:
    assert options.check_options({"max_calls": 3}, "t") == {"max_calls": 3}
    with pytest.raises(ValueError, match="max_calls"):
        options.check_options({"max_calls": 3}, "t", later=True)


def test_a_task_asks_for_one_cpu_unless_told_otherwise() -> None:
    assert options.task_resources({}) == (("CPU", UNIT),)
    assert options.task_resources({"num_cpus": 0}) == ()
    assert options.task_resources({"num_cpus": 0.1, "num_gpus": 0.5}) == (
        ("CPU", 1000), ("GPU", 5000))
    assert options.task_resources({"num_gpus": True, "memory": 0.7 * 1001}) == (
        ("CPU", UNIT), ("GPU", UNIT), ("memory", 701 * UNIT))
    assert options.task_resources({"resources": {"x": 2, "none": 0}, "memory": 100}) == (
        ("CPU", UNIT), ("memory", 100 * UNIT), ("x", 2 * UNIT))


@pytest.mark.parametrize(("given_options", "place", "held"), [
    ({}, (("CPU", UNIT),), ()),
    ({"num_cpus": 0}, (), ()),
    ({"num_cpus": 2}, (("CPU", 2 * UNIT),), (("CPU", 2 * UNIT),)),
    ({"num_gpus": 1}, (("CPU", UNIT), ("GPU", UNIT)), (("CPU", UNIT), ("GPU", UNIT))),
    ({"num_gpus": 1, "num_cpus": 0}, (("GPU", UNIT),), (("GPU", UNIT),)),
    ({"memory": 7}, (("CPU", UNIT), ("memory", 7 * UNIT)), (("memory", 7 * UNIT),)),
])
def test_what_an_actor_needs_and_holds(
    given_options: dict[str, Any], place: Any, held: Any
) -> None:
    assert options.actor_resources(given_options) == (place, held)


@given(st.integers(0, 10**9))
def test_every_ten_thousandth_is_exact(units: int) -> None:
    assert options.amount("x", units / UNIT) == units


def test_the_template_of_a_task() -> None:
    template = options.task_template(FUNCTION, "f", {})
    assert (template.kind, template.name, template.return_count) == (TASK, "f", 1)
    assert (template.max_retries, template.rank, template.max_calls) == (3, -1, 0)
    assert len(template.template_id) == 16
    template = options.task_template(FUNCTION, "f", {
        "name": "g", "num_returns": 0, "max_retries": -1, "retry_exceptions": True,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(NODE_1, soft=True)})
    assert (template.name, template.return_count, template.max_retries) == ("g", 0, -1)
    assert (template.retry_exceptions, template.rank, template.soft) == (True, 1, True)
    assert options.task_template(FUNCTION, "f", {"scheduling_strategy": "SPREAD"}).spread


def test_none_means_the_default() -> None:
    plain = options.task_template(FUNCTION, "f", {})
    assert options.task_template(FUNCTION, "f", {
        "num_cpus": None, "max_retries": None, "num_returns": None, "retry_exceptions": None,
        "name": None, "scheduling_strategy": None, "runtime_env": None}) == plain


def test_equal_options_are_one_template_and_others_are_another() -> None:
    one = options.task_template(FUNCTION, "f", {"num_cpus": 1})
    assert options.task_template(FUNCTION, "f", {}).template_id == one.template_id
    assert options.task_template(FUNCTION, "f", {"num_cpus": 2}).template_id != one.template_id
    assert options.task_template(b"g" * 16, "f", {}).template_id != one.template_id


def test_concurrency_of_actors() -> None:
    assert options.actor_template(FUNCTION, "C", {}, False).max_concurrency == 1
    template = options.actor_template(FUNCTION, "C", {}, True)
    assert (template.max_concurrency, template.is_async) == (1000, True)
    assert options.actor_template(FUNCTION, "C", {"max_concurrency": 4}, True).max_concurrency == 4
    with pytest.raises(ValueError, match="in order"):
        options.actor_template(
            FUNCTION, "C", {"max_concurrency": 4, "allow_out_of_order_execution": False}, False)


def test_the_template_of_a_method() -> None:
    template = options.method_template(
        FUNCTION, "C", "m", {"num_returns": 2, "max_task_retries": -1})
    assert (template.kind, template.name, template.method) == (METHOD, "C.m", "m")
    assert (template.return_count, template.resources, template.max_retries) == (2, (), -1)


def test_a_node_affinity_needs_a_node_id() -> None:
    for wrong in ("", "zz", "ab" * 27):
        with pytest.raises(ValueError, match="not a node id"):
            NodeAffinitySchedulingStrategy(wrong, soft=False)
    with pytest.raises(TypeError):
        NodeAffinitySchedulingStrategy(1, soft=False)  # type: ignore[arg-type]
    strategy = NodeAffinitySchedulingStrategy(NODE_1, soft=False)
    assert strategy == NodeAffinitySchedulingStrategy(NODE_1, False)


@pytest.mark.parametrize("given", [
    {"name": "n" * 10_000_000}, {"resources": {"r" * 2_000_000: 1}},
    {"runtime_env": {"env_vars": {"V": "v" * 10_000_000}}}])
def test_a_definition_too_long_to_travel_is_refused_with_the_limit(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at most 1,048,576 B can travel"):
        options.task_template(FUNCTION, "f", given)
