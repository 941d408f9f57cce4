"""The names of Ray that programs use: each is there, or says that it is not and what to do."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import pickle
import threading
from concurrent.futures import Future
from typing import Any

import pytest

from .conftest import BACKEND

# Ray's public names by module: what its `__all__` lists or its documentation describes.
NAMES: dict[str, str] = {
    "": """ActorClassID ActorID ClientBuilder FunctionID JobID Language LoggingConfig NodeID
        ObjectID ObjectRef ObjectRefGenerator DynamicObjectRefGenerator PlacementGroupID SCRIPT_MODE
        TaskID UniqueID WORKER_MODE WorkerID actor available_resources cancel client
        cluster_resources get get_actor get_gpu_ids get_runtime_context init internal
        is_initialized java_actor_class java_function kill logger method nodes put
        remote shutdown timeline util wait widgets __version__""",
    "actor": "ActorClass ActorClassInheritanceException ActorHandle ActorMethod exit_actor",
    "cloudpickle": """CloudPickler Pickler dump dump_debug dumps dumps_debug load loads
        list_registry_pickle_by_value register_pickle_by_value unregister_pickle_by_value""",
    "experimental": """CommunicatorMetadata RDTManager TensorTransportManager
        TensorTransportMetadata deregister_nixl_memory register_nixl_memory
        register_nixl_memory_pool register_tensor_transport set_nixl_cuda_stream set_resource
        set_target_device_for_ref set_target_for_ref wait_tensor_freed get_object_locations
        get_local_object_locations internal_kv tqdm_ray""",
    "experimental.internal_kv": """_internal_kv_del _internal_kv_exists _internal_kv_get
        _internal_kv_initialized _internal_kv_list _internal_kv_put _internal_kv_reset""",
    "experimental.locations": "get_local_object_locations get_object_locations",
    "experimental.queue": "Empty Full Queue",
    "experimental.state.api": """get_actor get_job get_log get_node get_objects get_placement_group
        get_task get_worker list_actors list_cluster_events list_jobs list_logs list_nodes
        list_objects list_placement_groups list_runtime_envs list_tasks list_workers
        summarize_actors summarize_objects summarize_tasks""",
    "experimental.tqdm_ray": "safe_print tqdm",
    "job_config": "JobConfig LoggingConfig",
    "remote_function": "RemoteFunction",
    "runtime_context": "RuntimeContext get_runtime_context",
    "runtime_env": "RuntimeEnv RuntimeEnvConfig",
    "types": "ObjectRef",
    "util": """ActorPool accelerators as_completed connect deregister_serializer
        disable_log_once_globally disconnect enable_periodic_logging get_current_placement_group
        get_node_instance_id get_node_ip_address get_placement_group inspect_serializability iter
        list_named_actors log_once map_unordered pdb placement_group placement_group_table
        ray_debugpy register_serializer remove_placement_group""",
    "util.accelerators": """NVIDIA_TESLA_V100 NVIDIA_A100 AMD_INSTINCT_MI300x
        AMD_INSTINCT_MI355x INTEL_GAUDI AWS_NEURON_CORE GOOGLE_TPU_V4 HUAWEI_NPU_910B APPLE_M1
        METAX_C500 MOBILINT_ARIES FURIOSA_RNGD tpu""",
    "util.actor_pool": "ActorPool",
    "util.annotations": "AnnotationType Deprecated DeveloperAPI PublicAPI RayDeprecationWarning",
    "util.check_serialize": "FailureTuple inspect_serializability",
    "util.collective": """allgather allgather_multigpu allreduce allreduce_multigpu barrier
        broadcast broadcast_multigpu create_collective_group destroy_collective_group
        get_collective_group_size get_rank init_collective_group is_group_initialized recv
        recv_multigpu reduce reduce_multigpu reducescatter reducescatter_multigpu send
        send_multigpu""",
    "util.debug": "disable_log_once_globally enable_periodic_logging log_once reset_log_once",
    "util.helpers": "as_completed map_unordered",
    "util.iter": """LocalIterator ParallelIterator ParallelIteratorWorker from_actors from_items
        from_iterators from_range""",
    "util.metrics": "Counter Gauge Histogram",
    "util.multiprocessing": "JoinableQueue Pool TimeoutError",
    "util.placement_group": """PlacementGroup get_current_placement_group get_placement_group
        placement_group placement_group_table remove_placement_group""",
    "util.queue": "Empty Full Queue",
    "util.scheduling_strategies": """DoesNotExist Exists In NodeAffinitySchedulingStrategy
        NodeLabelSchedulingStrategy NotIn PlacementGroupSchedulingStrategy""",
    "util.serialization": """StandaloneSerializationContext deregister_serializer
        register_serializer""",
    "util.state": """StateApiClient get_actor get_job get_log get_node get_objects
        get_placement_group get_task get_worker list_actors list_cluster_events list_jobs list_logs
        list_nodes list_objects list_placement_groups list_runtime_envs list_tasks list_workers
        summarize_actors summarize_objects summarize_tasks""",
    "util.state.exception": "RayStateApiException",
}
# Modules of Ray that are not there at all.
ABSENT = """tune data train serve rllib air llm widgets dashboard job_submission autoscaler dag
    cluster_utils client_builder cross_language experimental.channel experimental.dynamic_resources
    experimental.compiled_dag_ref util.actor_group util.client util.rpdb util.debugpy util.spark
    util.tracing util.iter_metrics util.serialization_addons
    util.client_connect util.tpu""".split()


@pytest.mark.parametrize("module", NAMES)
def test_every_name_is_there_or_says_that_it_is_not(module):
    found = importlib.import_module(f"{BACKEND}.{module}".rstrip("."))
    for name in NAMES[module].split():
        try:
            getattr(found, name)
        except AttributeError as error:
            assert BACKEND == "hpcray" and "is not part of hpcray: " in str(error), name


@pytest.mark.hpcray_only("Ray has them")
@pytest.mark.parametrize("module", ABSENT)
def test_an_import_of_what_is_not_there_says_so(module):
    parent, _, name = f"hpcray.{module}".rpartition(".")
    says = rf"hpcray\.{module} is not part of hpcray: \w+"
    for statement in (f"import hpcray.{module}", f"import hpcray.{module}.deeper",
                      f"from {parent} import {name}", f"from hpcray.{module} import x"):
        with pytest.raises(ModuleNotFoundError, match=says):
            exec(statement, {})
    with pytest.raises(AttributeError, match=says):
        getattr(importlib.import_module(parent), name)
    assert not hasattr(importlib.import_module(parent), name)


@pytest.mark.hpcray_only("no Ray of today has it")
def test_free_says_what_frees():
    from hpcray import internal

    with pytest.raises(AttributeError, match="del ref"):
        internal.free  # noqa: B018


@pytest.mark.hpcray_only("the words are ours")
def test_what_neither_has_is_refused_as_by_any_module():
    with pytest.raises(ModuleNotFoundError, match="No module named 'hpcray.spoon'"):
        importlib.import_module("hpcray.spoon")
    with pytest.raises(AttributeError, match="has no attribute 'spoon'"):
        importlib.import_module("hpcray.util").spoon  # noqa: B018


def test_no_package_hides_a_module_behind_a_name_of_its_own():
    """`from __future__ import annotations` in a package is a name of it, which hides a module."""
    util = importlib.import_module(f"{BACKEND}.util")
    for name in ("annotations", "debug", "queue", "state", "metrics", "serialization"):
        scope: dict[str, Any] = {}
        exec(f"from {BACKEND}.util import {name}", scope)
        assert inspect.ismodule(scope[name]), name
    assert inspect.ismodule(util.annotations)


@pytest.mark.hpcray_only("of our own packages")
def test_no_package_has_a_feature_of_the_future_as_a_name():
    import __future__

    import pkgutil

    import hpcray

    packages = [name for _, name, is_package in pkgutil.walk_packages(hpcray.__path__, "hpcray.")
                if is_package and name.split(".")[1] in ("util", "experimental", "internal")]
    for name in ["hpcray", *packages]:
        package = importlib.import_module(name)
        assert not any(isinstance(value, __future__._Feature) for value in vars(package).values())


# --- ids ------------------------------------------------------------------------------------------

KINDS = ["ActorClassID", "ActorID", "FunctionID", "JobID", "NodeID", "ObjectRef",
         "PlacementGroupID", "TaskID", "UniqueID", "WorkerID"]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_from_bytes_and_text(backend, kind):
    cls = getattr(backend, kind)
    size = cls.nil().size()
    one = cls(b"\1" * size)
    assert one.binary() == b"\1" * size and one.hex() == "01" * size
    assert one == cls.from_hex("01" * size) and hash(one) == hash(cls.from_hex("01" * size))
    assert repr(one) == f"{kind}({'01' * size})"
    assert one != cls(b"\2" * size) and one != one.binary()
    assert cls.from_binary(one.binary()) == one
    assert cls.nil().is_nil() and not one.is_nil() and cls.nil() == cls.nil()
    assert cls.nil().binary() == b"\xff" * size
    with pytest.raises(TypeError):
        cls("01")
    with pytest.raises(ValueError, match=str(size)):
        cls(b"\1")


@pytest.mark.parametrize("kind", ["NodeID", "UniqueID", "WorkerID", "ActorID", "ObjectRef"])
def test_random_ids_differ(backend, kind):
    cls = getattr(backend, kind)
    assert cls.from_random() != cls.from_random()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ObjectRef"])
def test_ids_can_be_pickled(backend, kind):
    one = getattr(backend, kind).nil()
    assert pickle.loads(pickle.dumps(one)) == one


def test_ids_know_their_job(ray):
    @ray.remote
    class A:
        def task(self) -> str:
            return ray.get_runtime_context().get_task_id()

    job = ray.get_runtime_context().get_job_id()
    actor = A.remote()
    assert actor._actor_id.job_id.hex() == job
    assert ray.TaskID.from_hex(ray.get(actor.task.remote())).job_id().hex() == job
    assert ray.TaskID.nil().actor_id().is_nil()
    assert ray.JobID.from_int(7).int() == 7
    assert isinstance(ray.ActorID(actor._actor_id.binary()), ray.ActorID)


# --- refs made from bytes -------------------------------------------------------------------------


def test_a_ref_made_from_its_own_bytes_is_that_ref(ray):
    ref = ray.put([1, 2])
    again = ray.ObjectRef(ref.binary())
    assert again == ref and hash(again) == hash(ref)
    assert ray.get(again) == [1, 2]


@pytest.mark.ray_differs("Ray waits for it")
@pytest.mark.parametrize("make", ["nil", "from_random"])
def test_a_ref_of_no_object_can_be_used_for_nothing(ray, make):
    ref = getattr(ray.ObjectRef, make)()
    for use in (lambda: ray.get(ref), lambda: ray.get([ray.put(1), ref]), lambda: ray.wait([ref]),
                lambda: ray.remote(lambda x: x).remote(ref)):
        with pytest.raises(ValueError, match="of no object of this session"):
            use()
    with pytest.raises(ValueError, match="of no object"):
        ref.future()
    # In a value it passes, and is the same there.
    assert ray.get(ray.put([ref]))[0] is ref
    assert ray.get(ray.remote(lambda found: found[0].hex()).remote([ref])) == ref.hex()
    assert pickle.loads(pickle.dumps(ref)) is ref
    assert ray.get(ray.put("still")) == "still"


@pytest.mark.ray_differs("Ray waits for it")
def test_a_ref_of_a_node_that_is_not_there_is_of_no_object(ray):
    made = ray.put(1).binary()
    ref = ray.ObjectRef(made[:16] + b"\7\7\7\7" + made[20:])
    kind = ray.exceptions.RayError if BACKEND == "ray" else ray.exceptions.ObjectLostError
    with pytest.raises(kind):
        ray.get(ref, timeout=20)


def test_a_nil_ref_needs_no_session(bare_ray):
    ref = bare_ray.ObjectRef.nil()
    assert ref.is_nil() and len({ref, bare_ray.ObjectRef.nil()}) == 1
    assert not bare_ray.is_initialized()


# --- futures --------------------------------------------------------------------------------------


def test_a_future_knows_its_ref(ray):
    future = ray.put(3).future()
    assert isinstance(future, Future)
    # As an executor passes it on; the object lives as long as the future.
    assert ray.get(ray.remote(lambda x: x + 1).remote(future.object_ref)) == 4
    assert future.result(timeout=20) == 3


def test_an_executor_over_refs(ray):
    """What executors of other projects do: futures of refs, passed on as arguments."""

    def add(a: int, b: int = 0) -> int:
        return a + b

    def submit(function: Any, *args: Any, **kwargs: Any) -> Any:
        def ref(arg: Any) -> Any:
            return arg.object_ref if isinstance(arg, Future) else arg

        remote = ray.remote(lambda *args, **kwargs: function(*args, **kwargs))
        return remote.remote(
            *map(ref, args), **{key: ref(arg) for key, arg in kwargs.items()}).future()

    first = submit(add, 1, b=2)
    second = submit(add, first, b=first)
    del first
    assert second.result(timeout=20) == 6
    assert submit(sum, [1, 2]).result(timeout=20) == 3


def test_on_completed_calls_back(ray):
    came: list[Any] = []
    there = threading.Event()

    def fail() -> None:
        raise ValueError("no")

    for ref in (ray.put("value"), ray.remote(fail).remote()):
        there.clear()
        ref._on_completed(lambda found: (came.append(found), there.set()))
        assert there.wait(20)
    assert came[0] == "value" and isinstance(came[1], ray.exceptions.RayTaskError)


def test_as_future(ray):
    async def use() -> int:
        return await ray.put(5).as_future()

    assert asyncio.run(use()) == 5


# --- older spellings of calls ---------------------------------------------------------------------


def test_remote_with_options_in_one_call(ray):
    @ray.remote
    def add(a: int, b: int = 0) -> int:
        return a + b

    @ray.remote
    class Adder:
        def __init__(self, base: int = 0) -> None:
            self.base = base

        def add(self, n: int) -> int:
            return self.base + n

    assert ray.get(add._remote(args=(1,), kwargs={"b": 2}, num_cpus=1)) == 3
    assert ray.get(add._remote([1])) == 1
    first, second = ray.remote(lambda: (1, 2))._remote(num_returns=2)
    assert ray.get([first, second]) == [1, 2]
    actor = Adder._remote(args=[10], num_cpus=0)
    assert ray.get(actor.add._remote((1,))) == 11
    assert ray.get(actor.add._remote(kwargs={"n": 2}, name="it")) == 12


def test_an_actor_class_shows_its_class(ray):
    class Plain:
        def method(self) -> None: ...

    remote = ray.remote(Plain)
    assert "method" in dir(remote) and "remote" in dir(remote)
    assert remote.__ray_metadata__.class_name.endswith("Plain")
    with pytest.raises(importlib.import_module(
            f"{ray.__name__}.actor").ActorClassInheritanceException):
        class Below(remote): ...


# --- small modules --------------------------------------------------------------------------------


def test_cloudpickle_is_a_module(backend):
    found = importlib.import_module(f"{BACKEND}.cloudpickle")
    assert backend.cloudpickle is found
    n = 2
    assert found.loads(found.dumps(lambda x: x * n))(4) == 8
    assert pickle.loads(found.dumps({"a": 1}, protocol=4)) == {"a": 1}
    with pytest.raises(TypeError, match="lock"):
        found.dumps_debug({"lock": threading.Lock()})


def test_a_key_value_store_for_the_job(ray):
    kv = importlib.import_module(f"{ray.__name__}.experimental.internal_kv")
    name = f"{ray.__name__}.experimental.internal_kv"
    assert kv._internal_kv_initialized()
    assert kv._internal_kv_put("key", "one") is False
    assert kv._internal_kv_put(b"key", b"two", overwrite=False) is True
    assert kv._internal_kv_get("key") == b"one"
    assert kv._internal_kv_put("key", b"three") is True
    assert kv._internal_kv_get("key", namespace="other") is None
    kv._internal_kv_put("key2", b"x")

    @ray.remote
    def inside() -> Any:
        import importlib

        kv = importlib.import_module(name)
        kv._internal_kv_put("from a worker", b"\0\xff")
        return kv._internal_kv_get("key"), kv._internal_kv_exists("nothing")

    assert ray.get(inside.remote()) == (b"three", False)
    assert kv._internal_kv_get("from a worker") == b"\0\xff"
    assert sorted(kv._internal_kv_list("key")) == [b"key", b"key2"]
    assert kv._internal_kv_del("key", del_by_prefix=True) == 2
    assert kv._internal_kv_list("key") == []
    assert kv._internal_kv_del("key") == 0


@pytest.mark.hpcray_only("Ray's raise others")
def test_the_store_takes_text_and_bytes_of_a_limited_size(ray):
    from hpcray.experimental import internal_kv as kv

    with pytest.raises(TypeError, match="bytes or str"):
        kv._internal_kv_put("key", 1)
    with pytest.raises(ValueError, match="1,048,576"):
        kv._internal_kv_put("key", bytes(2 << 20))
    assert kv._internal_kv_get("key") is None


def test_log_once():
    debug = importlib.import_module(f"{BACKEND}.util.debug")
    debug.reset_log_once()
    assert debug.log_once("a") and not debug.log_once("a") and debug.log_once("b")
    debug.reset_log_once("a")
    assert debug.log_once("a") and not debug.log_once("b")


def test_annotations_mark_and_return_what_they_are_put_on():
    found = importlib.import_module(f"{BACKEND}.util.annotations")

    @found.PublicAPI
    def one() -> int:
        """One."""
        return 1

    @found.PublicAPI(stability="alpha")
    @found.DeveloperAPI
    class Two: ...

    @found.Deprecated(message="call one()", warning=True)
    def old() -> int:
        return 0

    @found.Deprecated(warning=True)
    class Old:
        def __init__(self, x: int) -> None:
            self.x = x

    assert one() == 1 and one.__doc__.startswith("One.") and isinstance(Two(), Two)
    with pytest.warns(found.RayDeprecationWarning, match=r"call one\(\)"):
        assert old() == 0
    with pytest.warns(found.RayDeprecationWarning):
        assert Old(2).x == 2
    with pytest.raises(ValueError):
        found.Deprecated(mesage="x")
    assert issubclass(found.RayDeprecationWarning, DeprecationWarning)


def test_metrics_check_what_they_are_given(ray):
    metrics = importlib.import_module(f"{ray.__name__}.util.metrics")
    counter = metrics.Counter("requests", description="how many", tag_keys=("kind",))
    counter.set_default_tags({"kind": "a"})
    counter.inc()
    counter.inc(2.5, tags={"kind": "b"})
    with pytest.raises(ValueError):
        counter.inc(-1)
    with pytest.raises(ValueError, match="kind"):
        metrics.Counter("more", tag_keys=("kind",)).inc()
    with pytest.raises(TypeError):
        counter.inc(1, tags={"kind": 5})
    with pytest.raises(ValueError):
        counter.set_default_tags({"color": "red"})
    with pytest.raises(TypeError):
        metrics.Counter("more", tag_keys="kind")
    metrics.Gauge("size").set(3)
    metrics.Histogram("latency", boundaries=[0.1, 1]).observe(0.5)
    with pytest.raises(ValueError):
        metrics.Histogram("latency2")
    assert ray.get(ray.put(counter)).info["name"] == "requests"


@pytest.mark.ray_differs("Ray needs tqdm's package, and draws bars at the driver")
def test_tqdm_counts_and_says_how_far_it_is(capsys):
    from hpcray.experimental import tqdm_ray

    assert list(tqdm_ray.tqdm([1, 2, 3], desc="work", flush_interval_s=1000)) == [1, 2, 3]
    with tqdm_ray.tqdm(total=10, unit="B", flush_interval_s=0) as bar:
        bar.set_description("bytes")
        bar.update(5)
        bar.refresh()
    bar.close()
    tqdm_ray.safe_print("text")
    first, second, third, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("work: 3/3 (100%)") and first.endswith("it/s")
    assert second.startswith("bytes: 5/10 (50%)") and third.startswith("bytes: 5/10")
    assert rest == ["text"]
    with pytest.raises(ValueError, match="nothing to iterate"):
        next(iter(tqdm_ray.tqdm()))


def test_runtime_env_config():
    runtime_env = importlib.import_module(f"{BACKEND}.runtime_env")
    config = runtime_env.RuntimeEnvConfig(setup_timeout_seconds=5)
    assert config["setup_timeout_seconds"] == 5
    assert "env_vars" in runtime_env.RuntimeEnv(env_vars={"A": "b"}, config=config)
    for bad in (0, "5"):
        with pytest.raises((TypeError, ValueError)):
            runtime_env.RuntimeEnvConfig(setup_timeout_seconds=bad)


# --- init -----------------------------------------------------------------------------------------


def test_what_init_returns(bare_ray, init_options):
    found = bare_ray.init(num_cpus=1, **init_options)
    address = found.address_info
    for key in ("node_ip_address", "redis_address", "object_store_address", "raylet_socket_name",
                "webui_url", "session_dir", "metrics_export_port", "gcs_address", "address",
                "dashboard_agent_listen_port", "node_id"):
        assert key in address and key in found
    assert found["node_id"] == address["node_id"] == bare_ray.nodes()[0]["NodeID"]
    util = importlib.import_module(f"{bare_ray.__name__}.util")
    assert found["node_ip_address"] == util.get_node_ip_address()
    assert not found.dashboard_url
    assert found.python_version.count(".") == 2
    assert found.ray_version == bare_ray.__version__
    assert isinstance(found.ray_commit, str)
    with found:
        assert bare_ray.is_initialized()
    assert not bare_ray.is_initialized()


def test_a_job_config_names_the_namespace(bare_ray, init_options):
    job_config = importlib.import_module(f"{bare_ray.__name__}.job_config")
    config = job_config.JobConfig(ray_namespace="space", runtime_env={"env_vars": {"JOB": "yes"}},
                                  metadata={"a": "b"})
    config.set_metadata("c", "d")
    assert config.metadata == {"a": "b", "c": "d"}
    bare_ray.init(num_cpus=1, job_config=config, **init_options)
    assert bare_ray.get_runtime_context().namespace == "space"

    @bare_ray.remote
    def variable() -> str | None:
        import os

        return os.environ.get("JOB")

    assert bare_ray.get(variable.remote()) == "yes"


@pytest.mark.ray_differs("Ray has them")
def test_a_job_config_refuses_what_is_not_there():
    from hpcray.job_config import JobConfig

    with pytest.raises(NotImplementedError, match="lifetime='detached'"):
        JobConfig(default_actor_lifetime="detached")
    with pytest.raises(NotImplementedError, match="py_modules"):
        JobConfig(code_search_path=["/x"])
    with pytest.raises(ValueError, match="non_detached"):
        JobConfig(default_actor_lifetime="some")


def test_a_logging_config_is_checked(backend):
    config = backend.LoggingConfig(encoding="JSON", log_level="DEBUG")
    assert (config.encoding, config.log_level) == ("JSON", "DEBUG")
    for wrong in ({"encoding": "XML"}, {"additional_log_standard_attrs": ["spoon"]}):
        with pytest.raises(ValueError):
            backend.LoggingConfig(**wrong)


def test_a_logging_config_holds_in_driver_and_workers(run_driver):
    done = run_driver("""
        import logging
        INIT.pop("log_to_driver", None)
        ray.init(num_cpus=1, **INIT, logging_config=ray.LoggingConfig(
            encoding="JSON", log_level="INFO", additional_log_standard_attrs=["name"]))
        logging.getLogger("mine").info("in the driver")
        @ray.remote
        def f():
            logging.getLogger("theirs").info("in a task", extra={"key": 7})
            logging.getLogger("theirs").debug("not shown")
            return logging.getLogger().level
        assert ray.get(f.remote()) == logging.INFO
        print("job", ray.get_runtime_context().get_job_id())
        ray.shutdown()
    """, log_to_driver=True)
    lines = (done.stdout + done.stderr).splitlines()
    job = next(line.split()[1] for line in lines if line.startswith("job "))
    found = {}
    for line in lines:
        if '"message"' in line:
            import json

            fields = json.loads(line[line.index("{"):])
            found[fields["message"]] = fields
    assert found["in the driver"]["name"] == "mine"
    assert found["in the driver"]["job_id"] == found["in a task"]["job_id"] == job
    assert found["in a task"]["key"] == 7
    assert found["in a task"]["levelname"] == "INFO"
    assert {"task_id", "task_name", "worker_id", "node_id", "asctime", "filename", "lineno",
            "timestamp_ns"} <= set(found["in a task"])
    assert "not shown" not in found
    assert logging.getLogger().level == logging.WARNING  # of this process, untouched
