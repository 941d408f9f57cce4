"""hpcray: the Ray programming model on MPI.

    import hpcray as ray

This is the public face; every name is Ray's, with Ray's meaning. Importing it is quick and touches
neither MPI nor numpy: nothing starts before `init` or the first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hpcray import actor, exceptions
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
from hpcray.client.references import ObjectRef
from hpcray.client.streams import DynamicObjectRefGenerator, ObjectRefGenerator
from hpcray.remote_function import RemoteFunction
from hpcray.runtime_context import get_gpu_ids, get_runtime_context

if TYPE_CHECKING:
    from hpcray import util

__version__ = "0.1.0"

ObjectID = ObjectRef  # Ray's older name

# Submodules that load on first use.
_LAZY = frozenset({"collective", "config", "experimental", "futures", "gpu", "runtime_context",
                   "runtime_env", "testing", "util"})


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "cloudpickle":  # Ray programs pickle with `ray.cloudpickle`
        return importlib.import_module("cloudpickle")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ActorClass",
    "ActorHandle",
    "DynamicObjectRefGenerator",
    "ObjectID",
    "ObjectRef",
    "ObjectRefGenerator",
    "RemoteFunction",
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
    "is_initialized",
    "kill",
    "method",
    "nodes",
    "put",
    "remote",
    "shutdown",
    "util",
    "wait",
]
