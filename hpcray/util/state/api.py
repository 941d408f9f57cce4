"""Looking at the job that runs: lists, single records and counts, from driver, task or actor.

    list_tasks(filters=[("state", "=", "RUNNING")]) --Request--> node --> every node

Every call asks all nodes for what they know this moment; answers of different nodes are moments
apart. What is asked, and the records: `common`. What nodes do for it: `node/inventory.py`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from hpcray.absent import attributes
from hpcray.client import process, serialization
from hpcray.client.client import Client
from hpcray.client.references import ObjectRef
from hpcray.exceptions import GetTimeoutError
from hpcray.protocol import ids
from hpcray.protocol.messages import UNIT
from hpcray.util.state.common import (
    DEFAULT_LIMIT,
    DEFAULT_RPC_TIMEOUT,
    MAX_LIMIT,
    ActorState,
    JobState,
    NodeState,
    ObjectState,
    PlacementGroupState,
    StateSchema,
    TaskState,
    WorkerState,
)
from hpcray.util.state.exception import RayStateApiException

Filters = Sequence[tuple[str, str, Any]]
Query = dict[str, Any]
S = TypeVar("S", bound=StateSchema)

_EVERYTHING = 1 << 60


def list_tasks(
    address: str | None = None, filters: Filters | None = None, limit: int = DEFAULT_LIMIT,
    timeout: float = DEFAULT_RPC_TIMEOUT, detail: bool = False,
    raise_on_missing_output: bool = True, _explain: bool = False,
) -> list[TaskState]:
    """Tasks and actor calls, by id: those there are, and the last of those that are over.

    The arguments are those of all lists here:

    Args:
      address: None, "auto" or "local": there is one job, this one.
      filters: (column, "=" or "!=", value): those of which all are true; text in any case.
      limit: at most so many, and at most 10,000. Which of them, if there are more, is left open.
      timeout: seconds.
      detail: fill the columns that cost more, too.

    `raise_on_missing_output` and `_explain` are Ray's and have no effect: every node answers.

    Raises:
      RayStateApiException: no such column, too high a limit, or no answer in time.
      ConnectionError: there is no session.
    """
    return _list(TaskState, "tasks", address, filters, limit, timeout, detail)


def list_actors(
    address: str | None = None, filters: Filters | None = None, limit: int = DEFAULT_LIMIT,
    timeout: float = DEFAULT_RPC_TIMEOUT, detail: bool = False,
    raise_on_missing_output: bool = True, _explain: bool = False,
) -> list[ActorState]:
    """Actors, the last dead ones too. For the arguments see `list_tasks`."""
    return _list(ActorState, "actors", address, filters, limit, timeout, detail)


def list_objects(
    address: str | None = None, filters: Filters | None = None, limit: int = DEFAULT_LIMIT,
    timeout: float = DEFAULT_RPC_TIMEOUT, detail: bool = False,
    raise_on_missing_output: bool = True, _explain: bool = False,
) -> list[ObjectState]:
    """Objects that somebody refers to, each once. For the arguments see `list_tasks`."""
    return _list(ObjectState, "objects", address, filters, limit, timeout, detail)


def list_workers(
    address: str | None = None, filters: Filters | None = None, limit: int = DEFAULT_LIMIT,
    timeout: float = DEFAULT_RPC_TIMEOUT, detail: bool = False,
    raise_on_missing_output: bool = True, _explain: bool = False,
) -> list[WorkerState]:
    """The driver, the workers, and the last that ended. For the arguments see `list_tasks`."""
    return _list(WorkerState, "workers", address, filters, limit, timeout, detail)


def list_nodes(
    address: str | None = None, filters: Filters | None = None, limit: int = DEFAULT_LIMIT,
    timeout: float = DEFAULT_RPC_TIMEOUT, detail: bool = False,
    raise_on_missing_output: bool = True, _explain: bool = False,
) -> list[NodeState]:
    """Nodes. For the arguments see `list_tasks`."""
    return _list(NodeState, _nodes, address, filters, limit, timeout, detail)


def list_jobs(
    address: str | None = None, filters: Filters | None = None, limit: int = DEFAULT_LIMIT,
    timeout: float = DEFAULT_RPC_TIMEOUT, detail: bool = False,
    raise_on_missing_output: bool = True, _explain: bool = False,
) -> list[JobState]:
    """The one job there is. For the arguments see `list_tasks`."""
    return _list(JobState, _jobs, address, filters, limit, timeout, detail)


def list_placement_groups(
    address: str | None = None, filters: Filters | None = None, limit: int = DEFAULT_LIMIT,
    timeout: float = DEFAULT_RPC_TIMEOUT, detail: bool = False,
    raise_on_missing_output: bool = True, _explain: bool = False,
) -> list[PlacementGroupState]:
    """Placement groups. For the arguments see `list_tasks`."""
    return _list(
        PlacementGroupState, _placement_groups, address, filters, limit, timeout, detail)


# --- one record ----------------------------------------------------------------------------------


def get_task(
    id: str | ObjectRef[Any], address: str | None = None, timeout: float = DEFAULT_RPC_TIMEOUT,
    _explain: bool = False,
) -> TaskState | None:
    """The task with this hexadecimal id, or the one that makes this object; None if unknown."""
    if isinstance(id, ObjectRef):
        id = ids.task_of_object(id.binary()).hex()
    return _get(TaskState, "tasks", id, ids.TASK_ID_BYTES, address, timeout)


def get_actor(
    id: str, address: str | None = None, timeout: float = DEFAULT_RPC_TIMEOUT,
    _explain: bool = False,
) -> ActorState | None:
    """The actor with this hexadecimal id; None if unknown."""
    return _get(ActorState, "actors", id, ids.ACTOR_ID_BYTES, address, timeout)


def get_objects(
    id: str, address: str | None = None, timeout: float = DEFAULT_RPC_TIMEOUT,
    _explain: bool = False,
) -> list[ObjectState]:
    """The records of the object with this hexadecimal id: one, or none if it is unknown."""
    found = _get(ObjectState, "objects", id, ids.OBJECT_ID_BYTES, address, timeout)
    return [] if found is None else [found]


def get_node(
    id: str, address: str | None = None, timeout: float = DEFAULT_RPC_TIMEOUT,
    _explain: bool = False,
) -> NodeState | None:
    """The node with this hexadecimal id; None if unknown."""
    return _get(NodeState, _nodes, id, 28, address, timeout)


def get_worker(
    id: str, address: str | None = None, timeout: float = DEFAULT_RPC_TIMEOUT,
    _explain: bool = False,
) -> WorkerState | None:
    """The worker with this hexadecimal id; None if unknown."""
    return _get(WorkerState, "workers", id, 28, address, timeout)


def get_job(
    id: str, address: str | None = None, timeout: float = DEFAULT_RPC_TIMEOUT,
    _explain: bool = False,
) -> JobState | None:
    """The job with this hexadecimal id; None if unknown."""
    return _get(JobState, _jobs, id, ids.JOB_ID_BYTES, address, timeout)


def get_placement_group(
    id: str, address: str | None = None, timeout: float = DEFAULT_RPC_TIMEOUT,
    _explain: bool = False,
) -> PlacementGroupState | None:
    """The placement group with this hexadecimal id; None if unknown."""
    return _get(PlacementGroupState, _placement_groups, id, None, address, timeout)


# --- counts --------------------------------------------------------------------------------------


def summarize_tasks(
    address: str | None = None, timeout: float = DEFAULT_RPC_TIMEOUT,
    raise_on_missing_output: bool = True, _explain: bool = False,
) -> dict[str, Any]:
    """How many tasks of each function are in each state; all that finished or failed count.

    A retried task counts once for each run that ended.
    """
    by_name: dict[str, Any] = {}
    total = {"NORMAL_TASK": 0, "ACTOR_TASK": 0, "ACTOR_CREATION_TASK": 0}
    for (name, kind, state), (count, _) in sorted(
        _counts("tasks", ["func_or_class_name", "type", "state"], "", address, timeout).items()
    ):
        entry = by_name.setdefault(
            name, {"func_or_class_name": name, "type": kind, "state_counts": {}})
        entry["state_counts"][state] = entry["state_counts"].get(state, 0) + count
        total[kind] += count
    return {"cluster": {
        "summary": by_name, "total_tasks": total["NORMAL_TASK"],
        "total_actor_tasks": total["ACTOR_TASK"],
        "total_actor_scheduled": total["ACTOR_CREATION_TASK"], "summary_by": "func_name"}}


def summarize_actors(
    address: str | None = None, timeout: float = DEFAULT_RPC_TIMEOUT,
    raise_on_missing_output: bool = True, _explain: bool = False,
) -> dict[str, Any]:
    """How many actors of each class are in each state."""
    by_class: dict[str, Any] = {}
    total = 0
    for (name, state), (count, _) in sorted(
        _counts("actors", ["class_name", "state"], "", address, timeout).items()
    ):
        entry = by_class.setdefault(name, {"class_name": name, "state_counts": {}})
        entry["state_counts"][state] = count
        total += count
    return {"cluster": {"summary": by_class, "total_actors": total, "summary_by": "class"}}


def summarize_objects(
    address: str | None = None, timeout: float = DEFAULT_RPC_TIMEOUT,
    raise_on_missing_output: bool = True, _explain: bool = False,
) -> dict[str, Any]:
    """How many objects there are, how large, and why; call sites are not recorded."""
    entry: dict[str, Any] = {
        "total_objects": 0, "total_size_mb": 0.0, "total_num_workers": 0, "total_num_nodes": 0,
        "task_state_counts": {}, "task_attempt_number_counts": {}, "ref_type_counts": {}}
    nbytes = 0
    seen: dict[str, set[Any]] = {"node_id": set(), "pid": set()}
    columns = ["task_status", "attempt_number", "reference_type", "node_id", "pid"]
    for (status, attempt, reference, node, pid), (count, size) in _counts(
        "objects", columns, "object_size", address, timeout
    ).items():
        entry["total_objects"] += count
        nbytes += size
        seen["node_id"].add(node)
        if pid is not None:
            seen["pid"].add((node, pid))
        for kind, key in (("task_state_counts", status), ("ref_type_counts", reference),
                          ("task_attempt_number_counts", str(attempt))):
            entry[kind][key] = entry[kind].get(key, 0) + count
    entry["total_size_mb"] = nbytes / 2**20
    entry["total_num_nodes"] = len(seen["node_id"])
    entry["total_num_workers"] = len(seen["pid"])
    return {"cluster": {
        "summary": {"disabled": entry} if entry["total_objects"] else {},
        "total_objects": entry["total_objects"], "total_size_mb": entry["total_size_mb"],
        "callsite_enabled": False, "summary_by": "callsite"}}


# --- asking --------------------------------------------------------------------------------------

# Where records come from: a list the nodes keep, by name, or facts one request brings whole.
Source = str | Callable[[Client, float], Iterable[dict[str, Any]]]


def _list(
    schema: type[S], source: Source, address: str | None, filters: Filters | None, limit: int,
    timeout: float, detail: bool,
) -> list[S]:
    checked = [_check_filter(schema, given) for given in filters or ()]
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(f"limit must be an integer, not {limit!r}")
    if not 0 <= limit <= MAX_LIMIT:
        raise RayStateApiException(
            f"limit={limit}: at most {MAX_LIMIT:,} at once; filters say what is wanted")
    client = _client(address)
    if limit == 0:
        return []
    if callable(source):
        rows = [row for row in source(client, timeout)
                if all((_text(row.get(name)) == text) is (predicate == "=")
                       for name, predicate, text in checked)]
    else:
        columns = schema.list_columns(detail)
        columns.remove(schema.id_column)
        columns.insert(0, schema.id_column)
        rows = _ask(client, source, columns, timeout, {"filters": checked, "limit": limit})
    shown = set(schema.list_columns(detail))
    records = [schema(**{name: value for name, value in row.items() if name in shown})
               for row in rows]
    records.sort(key=lambda record: str(record[schema.id_column]))
    return records[:limit]


def _get(
    schema: type[S], source: Source, id: str, nbytes: int | None, address: str | None,
    timeout: float,
) -> S | None:
    if not isinstance(id, str):
        raise TypeError(f"an id is a hexadecimal string, not {id!r}")
    try:
        length = len(bytes.fromhex(id))
    except ValueError:
        raise RayStateApiException(f"{id!r} is not a hexadecimal id") from None
    if nbytes is not None and length != nbytes:
        raise RayStateApiException(f"{id!r} is not an id of this kind: it has {length} bytes, "
                                   f"those have {nbytes}")
    found = _list(schema, source, address, [(schema.id_column, "=", id)], 1, timeout, True)
    return found[0] if found else None


def _check_filter(schema: type[StateSchema], given: Any) -> tuple[str, str, str]:
    """The filter as nodes take it: values are compared as text, in lower case."""
    if not isinstance(given, (tuple, list)) or len(given) != 3:
        raise ValueError(f"a filter is (column, '=' or '!=', value), not {given!r}")
    name, predicate, value = given
    if predicate not in ("=", "!="):
        raise ValueError(f"filter {given!r}: the predicate must be '=' or '!='")
    if name not in schema.filterable_columns():
        raise RayStateApiException(
            f"filter {given!r}: there is no column {name!r} to filter by; there are "
            f"{', '.join(sorted(schema.filterable_columns()))}")
    return name, predicate, _text(value)


def _text(value: Any) -> str:
    return str(value).lower()


def _client(address: str | None) -> Client:
    if address not in (None, "auto", "local", ""):
        raise ValueError(f"address={address!r}: hpcray looks at its own job only; leave it out")
    client = process.client
    if client is None:
        raise ConnectionError("there is no session to look at; call init() first")
    return client


def _ask(
    client: Client, what: str, columns: list[str], timeout: float, query: Query
) -> list[dict[str, Any]]:
    rows: list[list[Any]] = []
    try:
        client.request("state", {"what": what, "columns": columns, **query}, timeout, rows)
    except GetTimeoutError:
        raise RayStateApiException(
            f"no complete list of {what} within {timeout} s; ask for less, or with a longer "
            "timeout") from None
    found: dict[Any, dict[str, Any]] = {}
    for row in rows:
        _merge(found, dict(zip(columns, row, strict=True)))
    if what == "tasks":
        for task in found.values():
            _finish_task(task)
    return list(found.values())


def _merge(found: dict[Any, dict[str, Any]], row: dict[str, Any]) -> None:
    """Two nodes may know a task: whoever runs it knows more than its home, which gave it away."""
    key = next(iter(row.values()))
    known = found.get(key)
    if known is None:
        found[key] = row
        return
    better, worse = (known, row) if row.get("state") == "SUBMITTED_TO_WORKER" else (row, known)
    found[key] = {name: worse[name] if value is None else value for name, value in better.items()}


def _finish_task(task: dict[str, Any]) -> None:
    """What nodes cannot tell: the time of day, and what is pickled."""
    age_ms = task.get("start_time_ms")
    if age_ms is not None:
        task["start_time_ms"] = round(time.time() * 1000 - age_ms)
    error = task.get("error_message")
    if isinstance(error, bytes):
        task["error_message"] = serialization.error_text(error)


def _counts(
    what: str, columns: list[str], size: str, address: str | None, timeout: float
) -> dict[tuple[Any, ...], tuple[int, int]]:
    """(count, bytes) by the values of the columns, over all nodes."""
    counts: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0])
    rows: list[list[Any]] = []
    query = {"what": what, "columns": columns, "filters": [], "limit": _EVERYTHING, "count": True,
             "sum": size}
    try:
        _client(address).request("state", query, timeout, rows)
    except GetTimeoutError:
        raise RayStateApiException(
            f"{what} were not counted within {timeout} s; give a longer timeout") from None
    for _, *group, count, nbytes in rows:
        entry = counts[tuple(group)]
        entry[0] += count
        entry[1] += nbytes
    # A task on its way between nodes may have been seen by neither, or taken back by one alone.
    return {group: (count, nbytes) for group, (count, nbytes) in counts.items() if count > 0}


def _nodes(client: Client, timeout: float) -> list[dict[str, Any]]:
    return [
        {
            "node_id": node["node_id"], "node_ip": node["address"],
            "is_head_node": node["rank"] == 0, "state": "ALIVE" if node["alive"] else "DEAD",
            "node_name": node["host"], "labels": dict(node["labels"]),
            "resources_total": {name: units / UNIT for name, units in node["resources"].items()},
        }
        for node in client.request("nodes", None, timeout)
    ]


def _jobs(client: Client, _timeout: float) -> list[dict[str, Any]]:
    config = client.session["config"]
    head = next(node for node in _nodes(client, DEFAULT_RPC_TIMEOUT) if node["is_head_node"])
    job_id = client.job_id.hex()
    return [{
        "job_id": job_id, "type": "DRIVER", "status": "RUNNING",
        "entrypoint": config.get("script", ""), "metadata": {},
        "driver_info": {"id": job_id, "node_ip_address": head["node_ip"],
                        "pid": str(config.get("driver_pid", ""))},
        "runtime_env": dict(client.session.get("runtime_env") or {}),
    }]


def _placement_groups(client: Client, timeout: float) -> list[dict[str, Any]]:
    key = client.session["job_key"]
    found = []
    for group in client.request("placement_groups", {}, timeout):
        group_id, ranks = group["group"].hex(), group["ranks"]
        bundles = [
            {
                "bundle_id": {"placement_group_id": group_id, "bundle_index": index},
                "unit_resources": {name: units / UNIT for name, units in bundle.items()},
                "node_id": ids.node_id_hex(ranks[index], key) if ranks else None,
            }
            for index, bundle in enumerate(group["bundles"])
        ]
        found.append({
            "placement_group_id": group_id, "name": group["name"], "state": group["state"],
            "creator_job_id": client.job_id.hex(), "bundles": bundles})
    return found


__getattr__ = attributes(__name__)

__all__ = [
    "get_actor",
    "get_job",
    "get_node",
    "get_objects",
    "get_placement_group",
    "get_task",
    "get_worker",
    "list_actors",
    "list_jobs",
    "list_nodes",
    "list_objects",
    "list_placement_groups",
    "list_tasks",
    "list_workers",
    "summarize_actors",
    "summarize_objects",
    "summarize_tasks",
]
