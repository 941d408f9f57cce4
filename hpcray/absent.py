"""What Ray has and hpcray has not: what is said when a program reaches for it.

    hpcray.tune, from hpcray import tune, import hpcray.tune.schedulers
        --> "hpcray.tune is not part of hpcray: ..."

A name is written as below `hpcray`; what holds for a module holds for all below it. A row says
what to do instead, or why there is no such thing here. Reaching for an attribute is an
AttributeError, so that `hasattr` is false; an import is a ModuleNotFoundError.

What must not go in: anything that is there.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

_LIBRARY = "hpcray is Ray's Core without the libraries on top of it; run this one with Ray"
_SERVED = "Ray's own runs on hpcray with `hpcray run --as-ray SCRIPT`, from the ray installed there"
_LANGUAGES = "tasks and actors are written in Python"
_CLIENT = "the driver is the process of rank 0: mpirun -n N hpcray run script.py"
_CLUSTER = "the ranks of the launch are the cluster: mpirun -n N hpcray run script.py"
_GRAPHS = "pass refs from .remote() as arguments; there are no graphs (DAGs)"
_TENSORS = "arrays pass through host memory, as any value"
_LOGS = "what workers print goes to the driver's output, and to no files"
_RECORDS = "times and events of tasks are not recorded; hpcray.util.state has the states"
_DEBUG = "run the function here: f.__wrapped__(...), where pdb works"
_TPU = "there are no TPUs"
_COLLECTIVES = "the functions are in hpcray.util.collective itself"
_DASK = "Dask's own callbacks and optimisations apply"
_DEPRECATED = "it is deprecated in Ray, and holds what hpcray.util.iter does not count"
_REMOVED = "Ray has removed it, too"

ABSENT: dict[str, str] = {
    "tune": _SERVED,
    "data": _LIBRARY,
    "train": _SERVED,
    "serve": _LIBRARY,
    "rllib": _SERVED,
    "air": _SERVED,
    "llm": _LIBRARY,
    "workflow": _REMOVED,
    "widgets": "there are no notebook widgets",
    "dashboard": "there is no dashboard; hpcray.util.state answers from within the job",
    "job_submission": "submit jobs to the batch system: sbatch, and in it mpirun or srun",
    "autoscaler": "the allocation belongs to the batch system",
    "cluster_utils": "hpcray.init(num_cpus=...) is one node; for several: mpirun -n N hpcray run",
    "client": _CLIENT,
    "client_builder": _CLIENT,
    "ClientBuilder": _CLIENT,
    "dag": _GRAPHS,
    "Language": _LANGUAGES,
    "cross_language": _LANGUAGES,
    "java_function": _LANGUAGES,
    "java_actor_class": _LANGUAGES,
    "cpp_function": _LANGUAGES,
    "timeline": _RECORDS,
    "state": "ask hpcray.util.state, hpcray.nodes() and hpcray.cluster_resources()",
    "worker": "the verbs are hpcray's own: hpcray.get, hpcray.put, hpcray.init, ...",
    "internal.free": "an object is freed with its last ref: del ref",
    "experimental.channel": _GRAPHS,
    "experimental.compiled_dag_ref": _GRAPHS,
    "experimental.rdt": _TENSORS,
    "experimental.dynamic_resources": "give resources at the start: init(resources={...})",
    "experimental.set_resource": "give resources at the start: init(resources={...})",
    "experimental.CommunicatorMetadata": _TENSORS,
    "experimental.RDTManager": _TENSORS,
    "experimental.TensorTransportManager": _TENSORS,
    "experimental.TensorTransportMetadata": _TENSORS,
    "experimental.deregister_nixl_memory": _TENSORS,
    "experimental.register_nixl_memory": _TENSORS,
    "experimental.register_nixl_memory_pool": _TENSORS,
    "experimental.register_tensor_transport": _TENSORS,
    "experimental.set_nixl_cuda_stream": _TENSORS,
    "experimental.set_target_device_for_ref": _TENSORS,
    "experimental.set_target_for_ref": _TENSORS,
    "experimental.wait_tensor_freed": _TENSORS,
    "experimental.shuffle": "an experiment of Ray's",
    "experimental.array": _REMOVED,
    "experimental.raysort": _REMOVED,
    "experimental.job": _REMOVED,
    "experimental.util": "an empty package of Ray's",
    "util.collective.backend_registry": _COLLECTIVES,
    "util.collective.collective": _COLLECTIVES,
    "util.collective.collective_group": _COLLECTIVES,
    "util.iter_metrics": _DEPRECATED,
    "util.actor_group": "it is deprecated in Ray: [Actor.remote() for _ in range(n)]",
    "util.check_open_ports": _CLUSTER,
    "util.client": _CLIENT,
    "util.client_connect": _CLIENT,
    "util.connect": _CLIENT,
    "util.disconnect": _CLIENT,
    "util.dask.RayDaskCallback": _DASK,
    "util.dask.ProgressBarCallback": _DASK,
    "util.dask.dataframe_optimize": _DASK,
    "util.dask.callbacks": _DASK,
    "util.debugpy": _DEBUG,
    "util.ray_debugpy": _DEBUG,
    "util.rpdb": _DEBUG,
    "util.pdb": _DEBUG,
    "util.get_node_instance_id": "nodes are no cloud instances; see get_node_ip_address()",
    "util.lightgbm": _REMOVED,
    "util.xgboost": _REMOVED,
    "util.sgd": _REMOVED,
    "util.spark": "hpcray starts on no Spark cluster",
    "util.tpu": _TPU,
    "util.accelerators.tpu": _TPU,
    "util.tracing": "tasks are not traced",
    "util.serialization_addons": "hpcray.util.register_serializer teaches it other types",
    "util.serialization.StandaloneSerializationContext":
        "hpcray.cloudpickle.dumps pickles as tasks do",
    "util.state.StateApiClient": "the functions of hpcray.util.state ask the nodes themselves",
    "util.state.get_log": _LOGS,
    "util.state.list_logs": _LOGS,
    "util.state.list_cluster_events": _RECORDS,
    "util.state.list_runtime_envs": "the runtime_env of a task is in its own runtime context",
    "util.state.api.StateApiClient": "the functions of hpcray.util.state ask the nodes themselves",
    "util.state.api.get_log": _LOGS,
    "util.state.api.list_logs": _LOGS,
    "util.state.api.list_cluster_events": _RECORDS,
    "util.state.api.list_runtime_envs":
        "the runtime_env of a task is in its own runtime context",
}

_TOP = __name__.partition(".")[0]


def sentence(name: str, top: str = _TOP) -> str | None:
    """Of a name below hpcray (without it), if Ray has it and hpcray has not.

    `top`: what the program calls hpcray.
    """
    while name:
        instead = ABSENT.get(name)
        if instead is not None:
            return f"{top}.{name} is not part of hpcray: {instead}"
        name = name.rpartition(".")[0]
    return None


def attributes(
    module: str, elsewhere: dict[str, str] | None = None, submodules: Iterable[str] = ()
) -> Callable[[str], Any]:
    """The `__getattr__` of a public module.

    Args:
      elsewhere: names that come from a module on first use: `{"ActorPool": "hpcray.util.x"}`.
      submodules: of this package, imported on first use.
    """
    below = module.partition(".")[2]
    elsewhere = elsewhere or {}
    submodules = frozenset(submodules)

    def get(name: str) -> Any:
        source = elsewhere.get(name)
        if source is not None:
            return getattr(importlib.import_module(source), name)
        if name in submodules:
            return importlib.import_module(f"{module}.{name}")
        said = sentence(f"{below}.{name}" if below else name)
        raise AttributeError(
            said or f"module {module!r} has no attribute {name!r}", name=name,
            obj=sys.modules[module])

    return get


class _Finder:
    """The last of the finders: modules that nothing has found."""

    @staticmethod
    def find_spec(name: str, _path: Any = None, _target: Any = None) -> None:
        top, _, below = name.partition(".")
        if top == _TOP:
            said = sentence(below)
            if said is not None:
                # Without the module's name: `from hpcray import tune` would put its own text.
                raise ModuleNotFoundError(said)


sys.meta_path.append(_Finder)
