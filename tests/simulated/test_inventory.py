"""What there is, asked of a cluster that works: every task once, counts that add up, no hang."""

from __future__ import annotations

from typing import Any

import pytest

from hpcray.protocol.messages import UNIT
from hpcray.testing.clients import Script
from hpcray.testing.cluster import SimulatedCluster
from hpcray.testing.processes import Process
from hpcray.util.state.api import _merge

TASKS = 24
COLUMNS = ["task_id", "name", "state", "node_id"]
STATES = {"PENDING_ARGS_AVAIL", "PENDING_NODE_ASSIGNMENT", "PENDING_ARGS_FETCH",
          "SUBMITTED_TO_WORKER", "PENDING_ACTOR_TASK_ORDERING_OR_CONCURRENCY", "RUNNING",
          "FINISHED", "FAILED"}


def nap(p: Process, seconds: float) -> Script:
    yield from p.sleep(seconds)
    return 1


def parent(p: Process, count: int) -> Script:
    """Its children have another home."""
    refs = [p.submit("nap", [0.002])[0] for _ in range(count)]
    values = []
    for ref in refs:
        values.append((yield from p.get(ref)))
    return values


def keeper(p: Process) -> None:
    assert p.actor is not None


def call(p: Process) -> int:
    return 1


def rows_of(p: Process, what: str, columns: list[str], **more: Any) -> Any:
    reply = yield from p.request("state", {
        "what": what, "columns": columns, "filters": [], "limit": 1 << 60, **more})
    assert reply.error is None, reply
    # The parts of the reply came before it.
    return p.rows.pop(reply.request, [])


def listed(p: Process) -> Any:
    found: dict[Any, dict[str, Any]] = {}
    for row in (yield from rows_of(p, "tasks", COLUMNS)):
        _merge(found, dict(zip(COLUMNS, row, strict=True)))
    return found


def counted(p: Process) -> Any:
    counts: dict[tuple[str, str], int] = {}
    rows = yield from rows_of(p, "tasks", ["name", "state"], count=True)
    for _, name, state, count, _nbytes in rows:
        counts[name, state] = counts.get((name, state), 0) + count
    return counts


@pytest.mark.parametrize("seed", range(8))
def test_asking_a_cluster_that_works(seed: int) -> None:
    """Rows hop between nodes while tasks do; nothing of it is in anybody's way."""
    seen_elsewhere = []

    def program(p: Process) -> Script:
        refs = [p.submit("nap", [0.003], rank=n % 3 - 1)[0] for n in range(TASKS)]
        refs += [p.submit("parent", [4], rank=n % 3)[0] for n in range(3)]
        handle = p.create_actor("keeper")
        for _ in range(4):
            refs.append(p.call(handle, "call")[0])
        for _ in range(6):
            tasks = yield from listed(p)
            assert {task["state"] for task in tasks.values()} <= STATES
            running = [task for task in tasks.values() if task["state"] == "RUNNING"]
            assert all(task["node_id"] is not None for task in running)
            seen_elsewhere.extend(t for t in running if t["node_id"] != "0")
            yield from counted(p)
            yield from rows_of(p, "objects", ["object_id", "object_size"])
            yield from rows_of(p, "actors", ["actor_id", "state", "pid"])
            yield from rows_of(p, "workers", ["worker_id", "pid"])
            yield from p.sleep(0.001)
        for ref in refs:
            yield from p.get(ref)
        counts = {key: count for key, count in (yield from counted(p)).items() if count}
        assert counts["nap", "FINISHED"] == TASKS + 12
        assert counts["parent", "FINISHED"] == 3
        assert {state for _, state in counts} == {"FINISHED"}
        tasks = yield from listed(p)
        assert all(task["state"] == "FINISHED" for task in tasks.values())
        assert len(tasks) == TASKS + 12 + 3 + 1 + 4
        actors = yield from rows_of(p, "actors", ["actor_id", "state", "pid"])
        assert [row[1] for row in actors] == ["ALIVE"]
        assert actors[0][2]

    bodies = {"nap": nap, "parent": parent, "keeper": keeper, "call": call}
    cluster = SimulatedCluster(3, bodies, seed=seed, lazy=0.3, resources={"CPU": 2 * UNIT})
    cluster.run(program(cluster.driver))
    cluster.check_nothing_is_left()
    assert seen_elsewhere
