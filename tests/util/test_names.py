"""Names and options of Ray that say or change little here, and that programs use."""

from __future__ import annotations

import os
from types import ModuleType

import pytest


def test_facts_of_the_context_that_are_rarely_asked_for(ray: ModuleType):
    context = ray.get_runtime_context()
    assert context.job_id.hex() == context.get_job_id()
    assert context.get_accelerator_ids() == {"GPU": []}
    assert context.get_node_labels()["ray.io/node-id"] == context.get_node_id()
    assert context.get_resource_ids() == context.get_accelerator_ids()
    assert os.path.isdir(context.get_temp_dir())
    assert context.get_placement_group_id() is None
    assert context.current_placement_group_id.is_nil()
    assert context.should_capture_child_tasks_in_placement_group is False
    with pytest.raises(NotImplementedError, match="MPI"):
        context.gcs_address  # noqa: B018

    @ray.remote
    def inside() -> tuple[str | None, str | None]:
        here = ray.get_runtime_context()
        return here.task_id and here.task_id.hex(), here.get_task_id()

    first, second = ray.get(inside.remote())
    assert first == second and first


def test_the_empty_placement_group(ray: ModuleType):
    from hpcray.util.placement_group import PlacementGroup

    assert PlacementGroup.empty().is_empty


@pytest.mark.parametrize("value", [True, False])
def test_enable_task_events_changes_no_result(ray: ModuleType, value: bool):
    @ray.remote(enable_task_events=value)
    def one() -> int:
        return 1

    assert ray.get(one.remote()) == 1
