"""`util.state`: what runs, asked while it runs; and where objects are.

On Ray these need its dashboard (`pip install 'ray[default]'`); without it they are skipped there.
Ray's answers follow the truth with a delay, hence `eventually`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from .conftest import BACKEND, Gate

Eventually = Callable[..., None]


@pytest.fixture(scope="module")
def ray(backend: ModuleType, init_options: dict[str, Any]) -> Iterator[ModuleType]:
    options = dict(init_options)
    if BACKEND == "ray":
        if importlib.util.find_spec("aiohttp_cors") is None:
            pytest.skip("Ray's state API needs its dashboard")
        options["include_dashboard"] = True
    backend.init(num_cpus=2, **options)
    before = os.environ.get("RAY_ADDRESS")
    if BACKEND == "ray":  # there may be others on this machine
        os.environ["RAY_ADDRESS"] = backend.get_runtime_context().gcs_address
    yield backend
    backend.shutdown()
    if before is None:
        os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture
def state(ray: ModuleType) -> ModuleType:
    return importlib.import_module(f"{BACKEND}.util.state")


def states_of(state: ModuleType, name: str) -> list[str]:
    return sorted(task.state for task in state.list_tasks(filters=[("name", "=", name)]))


# --- tasks ----------------------------------------------------------------------------------------


def test_the_states_of_tasks(
    ray: ModuleType, state: ModuleType, gate: Gate, eventually: Eventually
):
    enter = gate.enter

    @ray.remote
    def held(_=None):
        enter()

    refs = [held.options(name="states").remote() for _ in range(3)]
    behind = held.options(name="behind").remote(refs[0])
    gate.wait_for_arrivals(2)
    eventually(lambda: states_of(state, "states")
               == ["PENDING_NODE_ASSIGNMENT", "RUNNING", "RUNNING"])
    eventually(lambda: states_of(state, "behind") == ["PENDING_ARGS_AVAIL"])
    gate.open()
    ray.get([*refs, behind])
    eventually(lambda: states_of(state, "states") == ["FINISHED"] * 3)
    eventually(lambda: states_of(state, "behind") == ["FINISHED"])


def test_what_is_known_of_a_running_task(
    ray: ModuleType, state: ModuleType, gate: Gate, eventually: Eventually
):
    enter = gate.enter

    @ray.remote(num_cpus=2)
    def facts():
        enter()
        context = ray.get_runtime_context()
        return context.get_task_id(), context.get_worker_id(), os.getpid()

    ref = facts.options(name="facts_of_it").remote()
    gate.wait_for_arrivals()
    eventually(lambda: getattr(state.get_task(ref), "state", None) == "RUNNING")
    task = state.get_task(ref)
    gate.open()
    task_id, worker_id, pid = ray.get(ref)
    context = ray.get_runtime_context()
    assert (task.task_id, task.worker_id, task.worker_pid) == (task_id, worker_id, pid)
    assert task.node_id == context.get_node_id() and task.job_id == context.get_job_id()
    assert (task.name, task.type, task.attempt_number) == ("facts_of_it", "NORMAL_TASK", 0)
    assert task.func_or_class_name.endswith("facts")
    assert task.parent_task_id and task.actor_id is None and task.error_type is None
    assert task.required_resources == {"CPU": 2.0}
    assert task.start_time_ms > 1_600_000_000_000
    # As attributes, by name, and whole.
    assert task["state"] == task.state == task.get("state") == task.asdict()["state"]


def test_the_parent_of_a_nested_task(
    ray: ModuleType, state: ModuleType, gate: Gate, eventually: Eventually
):
    enter = gate.enter

    @ray.remote(num_cpus=1)
    def nested():
        enter()

    @ray.remote(num_cpus=1)
    def nesting():
        ref = nested.options(name="nested_one").remote()
        ray.get(ref)

    outer = nesting.remote()
    gate.wait_for_arrivals()
    parent = outer.task_id().hex() if BACKEND == "ray" else outer.hex()[:48]
    eventually(lambda: [task.parent_task_id for task in state.list_tasks(
        filters=[("name", "=", "nested_one")])] == [parent])
    gate.open()
    ray.get(outer)


def test_a_failed_task_says_why(ray: ModuleType, state: ModuleType, eventually: Eventually):
    @ray.remote
    def fails():
        raise ValueError("because of the spoon")

    ref = fails.options(name="fails_here").remote()
    with pytest.raises(ValueError):
        ray.get(ref)
    eventually(lambda: states_of(state, "fails_here") == ["FAILED"])
    task = state.get_task(ref)
    assert task.error_type == "TASK_EXECUTION_EXCEPTION"
    assert "because of the spoon" in task.error_message


def test_a_task_whose_worker_died(ray: ModuleType, state: ModuleType, eventually: Eventually):
    @ray.remote(max_retries=0)
    def dies():
        os._exit(3)

    ref = dies.options(name="dies_here").remote()
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(ref)
    eventually(lambda: states_of(state, "dies_here") == ["FAILED"])
    assert state.get_task(ref).error_type == "WORKER_DIED"
    eventually(lambda: any(
        worker.exit_type not in (None, "INTENDED_SYSTEM_EXIT", "INTENDED_USER_EXIT")
        for worker in state.list_workers(filters=[("is_alive", "=", "False")])))


def test_filters_and_limit(ray: ModuleType, state: ModuleType, eventually: Eventually):
    @ray.remote
    def many(x):
        return x

    ray.get([many.options(name=f"many{i % 2}").remote(i) for i in range(10)])

    def count(*filters: Any, **more: Any) -> int:
        return len(state.list_tasks(filters=list(filters), **more))

    eventually(lambda: count(("name", "=", "many0"), ("state", "=", "FINISHED")) == 5)
    eventually(lambda: count(("name", "=", "many1"), ("state", "=", "FINISHED")) == 5)
    assert count(("name", "=", "MANY0")) == 5, "text in any case"
    assert count(("name", "=", "many0"), ("state", "!=", "finished")) == 0
    assert count(("name", "=", "many0"), ("attempt_number", "=", "0")) == 5
    assert count(("name", "=", "many0"), ("attempt_number", "=", 0)) == 5
    assert count(("name", "!=", "many0"), ("name", "!=", "many1"),
                 ("func_or_class_name", "=", "no_such_function")) == 0
    assert count(("name", "=", "many0"), limit=2) == 2
    assert count(limit=3) == 3
    assert count(limit=0) == 0
    found = [task.task_id for task in state.list_tasks(filters=[("name", "=", "many0")])]
    assert found == sorted(found)


def test_details_only_on_demand(ray: ModuleType, state: ModuleType, eventually: Eventually):
    @ray.remote
    def plain():
        pass

    ray.get(plain.options(name="plain_one").remote())
    eventually(lambda: states_of(state, "plain_one") == ["FINISHED"])
    filters = [("name", "=", "plain_one")]
    [brief] = state.list_tasks(filters=filters)
    [full] = state.list_tasks(filters=filters, detail=True)
    assert (brief.language, brief.required_resources) == (None, None)
    assert (full.language, full.required_resources) == ("PYTHON", {"CPU": 1.0})


@pytest.mark.parametrize("wrong", [("name", ">", "a"), ("name", "=")])
def test_a_filter_has_three_parts(state: ModuleType, wrong: tuple[Any, ...]):
    with pytest.raises(ValueError, match="filter"):
        state.list_tasks(filters=[wrong])


@pytest.mark.parametrize("arguments", [
    {"filters": [("no_such_column", "=", 1)]}, {"limit": 100_001}, {"limit": -1}])
def test_misuse_names_what_there_is(state: ModuleType, arguments: dict[str, Any]):
    exception = importlib.import_module(f"{BACKEND}.util.state.exception")
    with pytest.raises(exception.RayStateApiException):
        state.list_tasks(**arguments)


def test_unknown_ids(ray: ModuleType, state: ModuleType):
    exception = importlib.import_module(f"{BACKEND}.util.state.exception")
    assert state.get_task("00" * 24) is None
    assert state.get_actor("00" * 16) is None
    assert not state.get_objects("00" * 28)
    assert state.get_node("00" * 28) is None
    assert state.get_worker("00" * 28) is None
    with pytest.raises(exception.RayStateApiException):
        state.get_task("00")
    with pytest.raises(exception.RayStateApiException):
        state.get_actor("00")


@pytest.mark.hpcray_only("Ray connects to a cluster it finds by its address")
def test_without_a_session(run_driver: Callable[..., Any]):
    run_driver("""
        from hpcray.util import state
        for function in (state.list_tasks, state.list_nodes, state.summarize_objects):
            try:
                function()
            except ConnectionError as error:
                assert "init()" in str(error)
            else:
                raise AssertionError(function)
        assert not ray.is_initialized()
        ray.init(num_cpus=1)
        try:
            state.list_tasks(address="10.0.0.1:6379")
        except ValueError as error:
            assert "leave it out" in str(error)
    """)


# --- actors ---------------------------------------------------------------------------------------


def test_the_life_of_an_actor(
    ray: ModuleType, state: ModuleType, gate: Gate, eventually: Eventually
):
    enter = gate.enter

    @ray.remote(max_restarts=1)
    class Living:
        def __init__(self):
            enter()

        def pid(self):
            return os.getpid()

        def die(self):
            os._exit(1)

    def now() -> Any:
        found = [a for a in state.list_actors(detail=True) if a.class_name.endswith("Living")]
        return found[0] if found else SimpleNamespace(state=None)

    actor = Living.options(name="the one").remote()
    gate.wait_for_arrivals()
    eventually(lambda: now().state == "PENDING_CREATION")
    gate.open()
    pid = ray.get(actor.pid.remote())
    eventually(lambda: now().state == "ALIVE" and now().pid == pid)
    found = now()
    context = ray.get_runtime_context()
    assert (found.name, found.node_id) == ("the one", context.get_node_id())
    assert found.ray_namespace == context.namespace and found.job_id == context.get_job_id()
    assert (found.num_restarts, found.is_detached, found.death_cause) == (0, False, None)
    assert state.get_actor(found.actor_id).class_name == found.class_name

    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(actor.die.remote())
    eventually(lambda: now().state == "ALIVE" and now().num_restarts == 1)
    ray.kill(actor)
    eventually(lambda: now().state == "DEAD")
    assert now().death_cause
    del actor
    eventually(lambda: now().state == "DEAD")  # remembered when no handle is left


def test_calls_of_an_actor(ray: ModuleType, state: ModuleType, gate: Gate, eventually: Eventually):
    enter = gate.enter

    @ray.remote
    class Busy:
        def work(self):
            enter()

    actor = Busy.remote()
    calls = [actor.work.remote() for _ in range(3)]
    gate.wait_for_arrivals()

    def rows() -> list[Any]:
        return [task for task in state.list_tasks(filters=[("type", "=", "ACTOR_TASK")])
                if task.name.endswith("Busy.work")]

    # Ray may not have heard yet that they have arrived.
    waits = {"PENDING_ACTOR_TASK_ORDERING_OR_CONCURRENCY",
             *(["SUBMITTED_TO_WORKER"] if BACKEND == "ray" else [])}

    def told() -> bool:
        states = [task.state for task in rows()]
        return (len(states) == 3 and states.count("RUNNING") == 1
                and set(states) <= {"RUNNING", *waits})

    eventually(told)
    [found] = [a for a in state.list_actors() if a.class_name.endswith("Busy")]
    assert {task.actor_id for task in rows()} == {found.actor_id}
    gate.open()
    ray.get(calls)


# --- the others -----------------------------------------------------------------------------------


def test_nodes_workers_and_jobs(ray: ModuleType, state: ModuleType):
    [node] = state.list_nodes()
    [known] = ray.nodes()
    assert node.node_id == known["NodeID"] and node.state == "ALIVE" and node.is_head_node
    assert node.resources_total["CPU"] == 2.0
    assert state.get_node(node.node_id).node_ip == node.node_ip
    dead = [("state", "=", "DEAD")]
    assert state.list_nodes(filters=dead, raise_on_missing_output=False) == []

    @ray.remote
    def pid():
        return os.getpid(), ray.get_runtime_context().get_worker_id()

    worker_pid, worker_id = ray.get(pid.remote())
    workers = {worker.pid: worker for worker in state.list_workers()}
    assert workers[os.getpid()].worker_type == "DRIVER"
    assert workers[worker_pid].worker_type == "WORKER" and workers[worker_pid].is_alive
    assert state.get_worker(worker_id).pid == worker_pid

    [job] = state.list_jobs()
    assert job.job_id == ray.get_runtime_context().get_job_id()
    assert state.get_job("0" * 8) is None
    assert state.list_placement_groups() == []
    assert state.get_placement_group("00" * 18) is None


def test_placement_groups(ray: ModuleType, state: ModuleType, eventually: Eventually):
    groups = importlib.import_module(f"{BACKEND}.util")
    strategies = importlib.import_module(f"{BACKEND}.util.scheduling_strategies")
    group = groups.placement_group([{"CPU": 1}], name="listed")
    assert group.wait(20)
    [found] = state.list_placement_groups(filters=[("name", "=", "listed")], detail=True)
    assert (found.placement_group_id, found.state) == (group.id.hex(), "CREATED")
    [bundle] = found.bundles
    assert bundle["unit_resources"] == {"CPU": 1.0}
    assert bundle["node_id"] == ray.get_runtime_context().get_node_id()
    assert state.get_placement_group(group.id.hex()).name == "listed"

    @ray.remote
    def inside():
        pass

    strategy = strategies.PlacementGroupSchedulingStrategy(placement_group=group)
    ref = inside.options(name="inside_a_group", scheduling_strategy=strategy).remote()
    ray.get(ref)
    eventually(lambda: state.get_task(ref) is not None)
    task = state.get_task(ref)
    assert task.placement_group_id == group.id.hex()
    groups.remove_placement_group(group)
    eventually(lambda: state.get_placement_group(group.id.hex()).state == "REMOVED")


def test_objects(ray: ModuleType, state: ModuleType, gate: Gate, eventually: Eventually):
    enter = gate.enter

    @ray.remote
    def held():
        enter()

    large, pending = ray.put(bytes(1_000_000)), held.remote()
    gate.wait_for_arrivals()
    text = large.hex()
    eventually(lambda: state.get_objects(text))
    [found] = state.get_objects(text)
    assert 1_000_000 <= found.object_size < 1_001_000
    assert (found.task_status, found.type, found.pid) == ("FINISHED", "DRIVER", os.getpid())
    assert found in state.list_objects(filters=[("pid", "=", os.getpid())], limit=10_000)
    assert found.reference_type == "LOCAL_REFERENCE"
    [found] = state.get_objects(pending.hex())
    assert found.object_size == -1
    del large
    eventually(lambda: not state.get_objects(text))
    gate.open()
    ray.get(pending)


def test_tasks_without_events(ray: ModuleType, state: ModuleType, eventually: Eventually):
    @ray.remote(enable_task_events=False)
    def secret(fail=False):
        assert not fail

    @ray.remote
    class Actor:
        @ray.method(enable_task_events=False)
        def secret(self):
            pass

        def public(self):
            pass

    @ray.remote(enable_task_events=False)
    class Secret:
        def secret(self):
            pass

        @ray.method(enable_task_events=True)
        def public(self):
            pass

    actors = [Actor.remote(), Secret.remote()]
    ray.wait([secret.remote(), secret.remote(True)], num_returns=2)
    ray.get([actor.secret.remote() for actor in actors])
    ray.get([actor.public.remote() for actor in actors])
    eventually(lambda: sum(t.name.endswith(".public") for t in state.list_tasks()) == 2)
    assert not [task for task in state.list_tasks() if task.name.endswith("secret")]
    summary = state.summarize_tasks()["cluster"]["summary"]
    assert not [name for name in summary if name.endswith("secret")]


def test_summaries(ray: ModuleType, state: ModuleType, gate: Gate, eventually: Eventually):
    enter = gate.enter

    @ray.remote
    def counted(fail=False):
        if fail:
            raise ValueError

    @ray.remote
    def waiting():
        enter()

    @ray.remote
    class Counted:
        def call(self):
            pass

    ray.get([counted.remote() for _ in range(7)])
    for ref in [counted.remote(True) for _ in range(2)]:
        with pytest.raises(ValueError):
            ray.get(ref)
    actors = [Counted.remote() for _ in range(2)]
    ray.get([actor.call.remote() for actor in actors])
    held = [waiting.remote() for _ in range(3)]
    gate.wait_for_arrivals(2)

    def tasks(function: str) -> dict[str, int]:
        for name, entry in state.summarize_tasks()["cluster"]["summary"].items():
            if name.endswith(function):
                assert entry["func_or_class_name"] == name
                return entry["state_counts"]
        return {}

    eventually(lambda: tasks("counted") == {"FINISHED": 7, "FAILED": 2})
    eventually(lambda: tasks("Counted.call") == {"FINISHED": 2})
    eventually(lambda: tasks("waiting") == {"RUNNING": 2, "PENDING_NODE_ASSIGNMENT": 1})
    total = state.summarize_tasks()["cluster"]
    assert total["summary_by"] == "func_name"
    assert total["total_tasks"] >= 12 and total["total_actor_tasks"] >= 2
    summary = state.summarize_actors()["cluster"]
    [entry] = [e for n, e in summary["summary"].items() if n.endswith("Counted")]
    assert entry["state_counts"] == {"ALIVE": 2} and summary["total_actors"] >= 2
    large = ray.put(bytes(2**20))
    eventually(lambda: state.summarize_objects()["cluster"]["total_size_mb"] >= 1)
    objects = state.summarize_objects()["cluster"]
    assert objects["total_objects"] >= 4 and list(objects["summary"]) == ["disabled"]
    del large
    gate.open()
    ray.get(held)


def test_from_tasks_and_actors(ray: ModuleType, state: ModuleType, eventually: Eventually):
    name = f"{BACKEND}.util.state"

    @ray.remote
    def ask():
        import importlib

        return [task.state for task in importlib.import_module(name).list_tasks(
            filters=[("name", "=", "asks_itself")])]

    @ray.remote
    class Asker:
        def ask(self):
            import importlib

            return len(importlib.import_module(name).list_nodes())

        async def ask_async(self):
            return self.ask()

    eventually(lambda: "RUNNING" in ray.get(ask.options(name="asks_itself").remote()))
    asker = Asker.remote()
    assert ray.get([asker.ask.remote(), asker.ask_async.remote()]) == [1, 1]


@pytest.mark.hpcray_only("Ray's records are no mappings")
def test_records_are_like_dictionaries(ray: ModuleType, state: ModuleType):
    from hpcray.util.state.common import (
        ActorState,
        JobState,
        NodeState,
        ObjectState,
        PlacementGroupState,
        TaskState,
        WorkerState,
    )

    for record, kind in ((state.list_nodes()[0], NodeState), (state.list_jobs()[0], JobState),
                         (state.list_workers()[0], WorkerState), (ActorState(), ActorState),
                         (ObjectState(), ObjectState), (TaskState(), TaskState),
                         (PlacementGroupState(), PlacementGroupState)):
        assert type(record) is kind
        assert dict(record) == record.asdict() == {k: record[k] for k in record.keys()}
        assert kind.id_column in record and kind.filterable_columns() <= set(kind.list_columns())
        assert set(kind.list_columns(detail=False)) <= set(kind.list_columns())
        assert record.get("spoon", 7) == 7
        with pytest.raises(KeyError):
            record["spoon"]


# --- object locations -----------------------------------------------------------------------------


def test_object_locations(ray: ModuleType, gate: Gate):
    locations = importlib.import_module(f"{BACKEND}.experimental").get_object_locations
    enter = gate.enter

    @ray.remote
    def held():
        enter()

    @ray.remote
    def small():
        return 1

    here = ray.get_runtime_context().get_node_id()
    large, pending, little = ray.put(bytes(1_000_000)), held.remote(), small.remote()
    ray.get(little)
    found = locations([large, pending, little])
    assert list(found) == [large, pending, little]
    assert found[large]["node_ids"] == [here] and found[large]["did_spill"] is False
    assert 1_000_000 <= found[large]["object_size"] < 1_001_000
    assert found[pending] == {"node_ids": [], "object_size": None, "did_spill": False}
    assert found[little]["node_ids"] == [] and found[little]["object_size"] > 0
    assert locations([]) == {}
    assert locations([large], timeout_ms=10_000)[large]["node_ids"] == [here]
    gate.open()
    ray.get(pending)


@pytest.mark.hpcray_only("Ray crashes the process, or says that a ref is not iterable")
def test_object_locations_of_something_else(ray: ModuleType):
    from hpcray.experimental.locations import get_local_object_locations, get_object_locations

    for function in (get_object_locations, get_local_object_locations):
        for wrong in (ray.put(1), [1], "refs"):
            with pytest.raises(TypeError, match="list of ObjectRefs"):
                function(wrong)
    many = [ray.put(i) for i in range(300)]
    assert len(get_object_locations(many)) == 300
    assert len(get_local_object_locations(many)) == 300


@pytest.mark.hpcray_only("the end of the session is Ray's own affair")
def test_object_locations_without_a_session(run_driver: Callable[..., Any]):
    run_driver("""
        from hpcray.experimental import get_object_locations
        try:
            get_object_locations([])
        except RuntimeError as error:
            assert "init()" in str(error)
        else:
            raise AssertionError
    """)
