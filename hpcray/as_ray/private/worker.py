"""`ray._private.worker`: the process's place in the job."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from typing import Any

import cloudpickle

import hpcray
from hpcray import api
from hpcray.client import process

SCRIPT_MODE, WORKER_MODE, LOCAL_MODE = 0, 1, 2

logger = logging.getLogger("ray")

# Called after every `init`, automatic ones too.
_post_init_hooks = api.after_init


class _Node:
    """`_global_node`: of it, the libraries want a folder."""

    def get_session_dir_path(self) -> str:
        """A folder of this job, made at the first call, for files that one host's processes share.

        It lies below the folder for the job's packages, which the node removes at its end.
        """
        node = hpcray.get_runtime_context().get_node_id()
        path = os.path.join(tempfile.gettempdir(), f"hpcray-packages-{node}", "session")
        os.makedirs(path, mode=0o700, exist_ok=True)
        return path

    def get_session_name(self) -> str:
        return f"session_{hpcray.get_runtime_context().get_job_id()}"

    def get_temp_dir_path(self) -> str:
        return tempfile.gettempdir()

    @property
    def node_id(self) -> str:
        return hpcray.get_runtime_context().get_node_id()


class _SerializationContext:
    def _register_cloudpickle_reducer(self, cls: type, reducer: Callable[[Any], Any]) -> None:
        cloudpickle.CloudPickler.dispatch[cls] = reducer

    def _unregister_cloudpickle_reducer(self, cls: type) -> None:
        cloudpickle.CloudPickler.dispatch.pop(cls, None)


class Worker:
    """`global_worker`."""

    @property
    def connected(self) -> bool:
        return hpcray.is_initialized()

    @property
    def mode(self) -> int | None:
        client = process.client
        if client is None:
            return None
        return SCRIPT_MODE if client.is_driver else WORKER_MODE

    @property
    def actor_id(self) -> Any:
        from hpcray import ActorID

        found = hpcray.get_runtime_context().get_actor_id()
        return ActorID.nil() if found is None else ActorID.from_hex(found)

    @property
    def node(self) -> _Node | None:
        return _node()

    @property
    def runtime_env(self) -> Any:
        return hpcray.get_runtime_context().runtime_env

    def get_serialization_context(self) -> _SerializationContext:
        return _SerializationContext()


global_worker = Worker()


def _node() -> _Node | None:
    return _Node() if hpcray.is_initialized() else None


def _mode(worker: Worker = global_worker) -> int | None:
    return worker.mode


def __getattr__(name: str) -> Any:
    if name == "_global_node":
        return _node()
    try:
        return getattr(hpcray, name)
    except AttributeError as error:
        raise AttributeError(f"module 'ray._private.worker' (hpcray) has no {name!r}") from error
