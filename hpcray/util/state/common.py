"""The records that `hpcray.util.state` answers with: Ray's columns, as attributes and by name.

    task.state    task["state"]    task.get("state")    task.asdict()    dict(task)

Which columns there are, which of them only `detail=True` fills, and which can be filtered on is
said here, once. A column that hpcray keeps no track of is None. The nodes fill the others
(`node/inventory.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

DEFAULT_LIMIT = 100
MAX_LIMIT = 10_000
DEFAULT_RPC_TIMEOUT = 30


def _column(*, filterable: bool = True, detail: bool = False) -> Any:
    return field(default=None, metadata={"filterable": filterable, "detail": detail})


def _detail(*, filterable: bool = False) -> Any:
    return _column(filterable=filterable, detail=True)


@dataclass
class StateSchema:
    """A record: attributes, or by name as a dictionary."""

    id_column: ClassVar[str] = ""

    @classmethod
    def list_columns(cls, detail: bool = True) -> list[str]:
        return [f.name for f in fields(cls) if detail or not f.metadata["detail"]]

    @classmethod
    def filterable_columns(cls) -> set[str]:
        return {f.name for f in fields(cls) if f.metadata["filterable"]}

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self.keys() else default

    def keys(self) -> list[str]:
        return [f.name for f in fields(self)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def asdict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.keys()}


@dataclass
class TaskState(StateSchema):
    """A task, an actor's creation or a call.

    `state`: PENDING_ARGS_AVAIL (its arguments are being made), PENDING_NODE_ASSIGNMENT (waits for
    room), PENDING_ARGS_FETCH (its arguments are on their way), SUBMITTED_TO_WORKER (given to
    another node or a worker, not begun), PENDING_ACTOR_TASK_ORDERING_OR_CONCURRENCY (a call in
    its actor's queue), RUNNING, FINISHED, FAILED.

    Of what is over every node keeps the last 1,000 failed and up to 1,000 others; those know
    neither where they ran nor their attempt. `start_time_ms` is known of running tasks, not calls.
    """

    id_column: ClassVar[str] = "task_id"
    task_id: str = _column()
    attempt_number: int = _column()
    name: str = _column()
    state: str = _column()
    job_id: str = _column()
    actor_id: str | None = _column()
    type: str = _column()
    func_or_class_name: str = _column()
    parent_task_id: str | None = _column()
    node_id: str | None = _column()
    worker_id: str | None = _column()
    worker_pid: int | None = _column()
    error_type: str | None = _column()
    language: str | None = _detail(filterable=True)
    required_resources: dict[str, float] | None = _detail()
    runtime_env_info: dict[str, Any] | None = _detail()
    placement_group_id: str | None = _detail(filterable=True)
    events: list[dict[str, Any]] | None = _detail()
    profiling_data: dict[str, Any] | None = _detail()
    creation_time_ms: int | None = _detail()
    start_time_ms: int | None = _detail()
    end_time_ms: int | None = _detail()
    task_log_info: dict[str, Any] | None = _detail()
    error_message: str | None = _detail()
    is_debugger_paused: bool | None = _detail(filterable=True)
    call_site: str | None = _detail()
    label_selector: dict[str, str] | None = _detail()
    fallback_strategy: dict[str, Any] | None = _detail()


@dataclass
class ActorState(StateSchema):
    """An actor. `state`: DEPENDENCIES_UNREADY, PENDING_CREATION, ALIVE, RESTARTING, DEAD."""

    id_column: ClassVar[str] = "actor_id"
    actor_id: str = _column()
    class_name: str = _column()
    state: str = _column()
    job_id: str = _column()
    name: str | None = _column()
    node_id: str | None = _column()
    pid: int | None = _column()
    ray_namespace: str | None = _column()
    serialized_runtime_env: str | None = _detail()
    required_resources: dict[str, float] | None = _detail()
    death_cause: dict[str, Any] | None = _detail()
    is_detached: bool | None = _detail()
    placement_group_id: str | None = _detail(filterable=True)
    repr_name: str | None = _detail(filterable=True)
    num_restarts: int = _detail()
    num_restarts_due_to_lineage_reconstruction: int | None = _detail()
    num_restarts_due_to_node_preemption: int | None = _detail()
    call_site: str | None = _detail()
    label_selector: dict[str, str] | None = _detail()
    fallback_strategy: dict[str, Any] | None = _detail()


@dataclass
class ObjectState(StateSchema):
    """An object, once, as its home knows it (Ray has a record for each process that refers to it).

    `object_size` is -1 until it is known. `type` and `pid` are of a process of the home that holds
    a ref. `reference_type`: LOCAL_REFERENCE (some process has a ref), PINNED_IN_MEMORY (somebody
    reads it), ACTOR_HANDLE, or USED_BY_PENDING_TASK (as argument, or from inside another object).
    """

    id_column: ClassVar[str] = "object_id"
    object_id: str = _column()
    object_size: int = _column()
    task_status: str = _column()
    attempt_number: int = _column()
    reference_type: str = _column()
    call_site: str = _column()
    type: str | None = _column()
    pid: int | None = _column()
    ip: str = _column()


@dataclass
class NodeState(StateSchema):
    """A node: a rank of the launch."""

    id_column: ClassVar[str] = "node_id"
    node_id: str = _column()
    node_ip: str = _column()
    is_head_node: bool = _column()
    state: str = _column()
    state_message: str | None = _column(filterable=False)
    node_name: str = _column()
    resources_total: dict[str, float] = _column(filterable=False)
    labels: dict[str, str] = _column(filterable=False)
    start_time_ms: int | None = _detail()
    end_time_ms: int | None = _detail()


@dataclass
class WorkerState(StateSchema):
    """A process of the job: the driver, a worker, or one of the last workers that ended.

    `exit_type`: INTENDED_SYSTEM_EXIT, or SYSTEM_ERROR; `exit_detail` says what happened.
    """

    id_column: ClassVar[str] = "worker_id"
    worker_id: str = _column()
    is_alive: bool = _column()
    worker_type: str = _column()
    exit_type: str | None = _column()
    node_id: str = _column()
    ip: str = _column()
    pid: int = _column()
    exit_detail: str | None = _detail()
    worker_launch_time_ms: int | None = _detail()
    worker_launched_time_ms: int | None = _detail()
    start_time_ms: int | None = _detail()
    end_time_ms: int | None = _detail()
    debugger_port: int | None = _detail(filterable=True)
    num_paused_threads: int | None = _detail(filterable=True)


@dataclass
class JobState(StateSchema):
    """The job there is: its driver."""

    id_column: ClassVar[str] = "job_id"
    job_id: str = _column()
    type: str = _column()
    submission_id: str | None = _column()
    status: str = _column()
    entrypoint: str = _column()
    driver_info: dict[str, Any] | None = _column(filterable=False)
    message: str | None = _detail()
    error_type: str | None = _detail()
    start_time: int | None = _detail()
    end_time: int | None = _detail()
    metadata: dict[str, str] | None = _detail()
    runtime_env: dict[str, Any] | None = _detail()


@dataclass
class PlacementGroupState(StateSchema):
    """A placement group."""

    id_column: ClassVar[str] = "placement_group_id"
    placement_group_id: str = _column()
    name: str = _column()
    creator_job_id: str = _column()
    state: str = _column()
    bundles: list[dict[str, Any]] | None = _detail()
    is_detached: bool | None = _detail(filterable=True)
    stats: dict[str, Any] | None = _detail()


__all__ = [
    "ActorState",
    "JobState",
    "NodeState",
    "ObjectState",
    "PlacementGroupState",
    "TaskState",
    "WorkerState",
]
