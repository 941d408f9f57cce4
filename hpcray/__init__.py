"""hpcray: the Ray programming model on MPI.

    import hpcray as ray

This is the public face; every name is Ray's, with Ray's meaning. Importing it is quick and touches
neither MPI nor numpy: nothing starts before `init` or the first use.
"""

import logging
from typing import TYPE_CHECKING

from hpcray import actor, exceptions
from hpcray.absent import attributes
from hpcray.actor import ActorClass, ActorHandle, get_actor, method
from hpcray.api import (
    available_resources,
    cancel,
    cluster_resources,
    get,
    init,
    is_initialized,
    kill,
    nodes,
    put,
    remote,
    shutdown,
    wait,
)
from hpcray.client.identifiers import (
    ActorClassID,
    ActorID,
    ClusterID,
    FunctionID,
    JobID,
    NodeID,
    PlacementGroupID,
    TaskID,
    UniqueID,
    WorkerID,
)
from hpcray.client.references import ObjectRef
from hpcray.client.streams import DynamicObjectRefGenerator, ObjectRefGenerator
from hpcray.job_config import JobConfig, LoggingConfig
from hpcray.remote_function import RemoteFunction
from hpcray.runtime_context import get_gpu_ids, get_runtime_context
from hpcray.version import __version__

if TYPE_CHECKING:
    from hpcray import internal, util

ObjectID = ObjectRef  # Ray's older name
# What a process is, as Ray numbers it.
SCRIPT_MODE = 0
WORKER_MODE = 1
logger = logging.getLogger("hpcray")

__getattr__ = attributes(__name__, submodules=(
    "as_ray", "cloudpickle", "collective", "config", "experimental", "futures", "gpu", "internal",
    "job_config", "runtime_context", "runtime_env", "testing", "types", "util"))


__all__ = [
    "ActorClass",
    "ActorClassID",
    "ActorHandle",
    "ActorID",
    "ClusterID",
    "DynamicObjectRefGenerator",
    "FunctionID",
    "JobConfig",
    "JobID",
    "LoggingConfig",
    "NodeID",
    "ObjectID",
    "ObjectRef",
    "ObjectRefGenerator",
    "PlacementGroupID",
    "RemoteFunction",
    "SCRIPT_MODE",
    "TaskID",
    "UniqueID",
    "WORKER_MODE",
    "WorkerID",
    "__version__",
    "actor",
    "available_resources",
    "cancel",
    "cluster_resources",
    "exceptions",
    "get",
    "get_actor",
    "get_gpu_ids",
    "get_runtime_context",
    "init",
    "internal",
    "is_initialized",
    "kill",
    "logger",
    "method",
    "nodes",
    "put",
    "remote",
    "shutdown",
    "util",
    "wait",
]
