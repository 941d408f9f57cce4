"""Where am I: ids, node, resources and name of what runs in this thread or coroutine.

Only reads: `client.context` (what runs) and the client (where). Asks the node for what is not
known here (an actor's name, a handle to oneself), so those are slower.
"""

from __future__ import annotations

import json
import tempfile
from typing import TYPE_CHECKING, Any, TypeVar

from hpcray.client import context, process
from hpcray.client.identifiers import ActorID, BaseID, JobID, NodeID, PlacementGroupID, TaskID
from hpcray.protocol import ids, labels
from hpcray.protocol.messages import PY_MODULE, UNIT, WORKING_DIR
from hpcray.runtime_env import RuntimeEnv

if TYPE_CHECKING:
    from hpcray.actor import ActorHandle

IdT = TypeVar("IdT", bound=BaseID)


class RuntimeContext:
    """See `get_runtime_context`. Holds nothing: every answer is of the moment it is asked."""

    __slots__ = ()

    def get_job_id(self) -> str:
        return process.current_client().job_id.hex()

    def get_node_id(self) -> str:
        client = process.current_client()
        return ids.node_id_hex(client.rank, client.session["job_key"])

    def get_rank(self) -> int:
        """The MPI rank of this process's node (hpcray's own; Ray has no ranks)."""
        return process.current_client().rank

    def get_worker_id(self) -> str:
        """Of this process: the driver has one too."""
        client = process.current_client()
        return ids.worker_id_hex(client.job_id, client.rank, client.number)

    def get_task_id(self) -> str | None:
        """Of the task running here; None in the driver."""
        client = process.current_client()
        return None if client.is_driver else context.current().task_id.hex() or None

    def get_task_name(self) -> str | None:
        process.current_client()
        template = context.current().template
        return template.name if template else None

    def get_task_function_name(self) -> str | None:
        """Name of the function or method, whatever name the task was given."""
        process.current_client()
        template = context.current().template
        return (template.function_name or template.name) if template else None

    def is_canceled(self) -> bool:
        """Whether `cancel` was called for what runs here. A method of an actor is not interrupted
        by it and may ask, to end early (async ones get asyncio's CancelledError instead).

        Raises:
          RuntimeError: in the driver, or in an async actor.
        """
        client = process.current_client()
        here = context.current()
        if here.template is None or here.is_async:
            raise RuntimeError(
                "is_canceled() is for tasks and for methods of actors that are not async; "
                "coroutines are cancelled as asyncio does it")
        return here.task_id in client.cancelled

    def get_actor_id(self) -> str | None:
        """Of the actor this process is; None elsewhere."""
        process.current_client()
        return context.current().actor_id.hex() or None

    def get_actor_name(self) -> str | None:
        """The name the actor was given ("" if none); None outside actors."""
        actor = context.current().actor_id
        if not actor:
            return None
        found = process.current_client().request("actor_handle", {"actor_id": actor})
        return str(found.get("name") or "")

    @property
    def current_actor(self) -> ActorHandle[Any]:
        """A handle to the actor this process is.

        Raises:
          RuntimeError: it is none.
        """
        from hpcray.actor import current_actor

        return current_actor()

    @property
    def was_current_actor_reconstructed(self) -> bool:
        """Whether this actor has been restarted.

        Raises:
          RuntimeError: outside actors.
        """
        here = context.current()
        if not here.actor_id:
            raise RuntimeError("was_current_actor_reconstructed is known inside actors only")
        return here.incarnation > 0

    @property
    def namespace(self) -> str:
        process.current_client()
        return context.current().namespace

    def get_assigned_resources(self) -> dict[str, float]:
        """What the task or actor holds; nothing in the driver."""
        current = context.current()
        if not current.group_id:
            return {name: units / UNIT for name, units in current.resources
                    if not labels.is_condition(name)}
        # In a placement group names carry the group, and "bundle" is its own.
        return {name.split("@")[0]: units / UNIT for name, units in current.resources
                if "@" in name and not name.startswith("bundle@")
                and ":" not in name.rpartition("@")[2]}

    def get_accelerator_ids(self) -> dict[str, list[str]]:
        """The devices the task or actor holds, by kind."""
        return {"GPU": [str(device) for device in context.current().devices]}

    def get_resource_ids(self) -> dict[str, list[str]]:
        return self.get_accelerator_ids()

    def get_node_labels(self) -> dict[str, str]:
        """Of the node this runs on."""
        client = process.current_client()
        [mine] = [node for node in client.request("nodes") if node["rank"] == client.rank]
        return dict(mine["labels"])

    @property
    def runtime_env(self) -> RuntimeEnv:
        """What `init` was given; in tasks and actors with what they and their parents add.
        Directories are named there by the package that was made of them."""
        here = context.current()
        env = dict(process.current_client().session["config"].get("runtime_env") or {})
        env_vars = {**env.get("env_vars", {}), **dict(here.env_vars)}
        if env_vars:
            env["env_vars"] = env_vars
        if here.template is not None and here.packages:
            names: dict[int, list[str]] = {}
            for kind, package in here.packages:
                names.setdefault(kind, []).append(f"package://{package.hex()}.zip")
            if WORKING_DIR in names:
                env["working_dir"] = names[WORKING_DIR][-1]
            if PY_MODULE in names:
                env["py_modules"] = names[PY_MODULE]
        return RuntimeEnv._checked(env)

    def get_runtime_env_string(self) -> str:
        """`runtime_env` as JSON."""
        return json.dumps(self.runtime_env, sort_keys=True)

    def get_session_name(self) -> str:
        """The same in all processes of the session, and of no other."""
        return f"session_{process.current_client().session['job_key']}"

    def get_temp_dir(self) -> str:
        """Where this node keeps files, such as unpacked working directories."""
        process.current_client()
        return tempfile.gettempdir()

    def get_placement_group_id(self) -> str | None:
        """The placement group it runs in, hexadecimal."""
        return context.current().group_id.hex() or None

    @property
    def should_capture_child_tasks_in_placement_group(self) -> bool:
        return context.current().captures

    def get(self) -> dict[str, Any]:
        """The ids above in one dictionary; those that do not apply here are left out."""
        found: dict[str, Any] = {
            "job_id": self.job_id, "node_id": self.node_id, "namespace": self.namespace,
            "task_id": self.task_id, "actor_id": self.actor_id,
        }
        return {name: value for name, value in found.items() if value is not None}

    # Ray's older spellings: ids with `hex()` and `binary()`.
    @property
    def current_placement_group_id(self) -> PlacementGroupID:
        """`PlacementGroupID.nil()` outside groups."""
        return _id(PlacementGroupID, self.get_placement_group_id()) or PlacementGroupID.nil()

    @property
    def job_id(self) -> JobID:
        return JobID(bytes.fromhex(self.get_job_id()))

    @property
    def node_id(self) -> NodeID:
        return NodeID(bytes.fromhex(self.get_node_id()))

    @property
    def task_id(self) -> TaskID | None:
        return _id(TaskID, self.get_task_id())

    @property
    def actor_id(self) -> ActorID | None:
        return _id(ActorID, self.get_actor_id())

    @property
    def gcs_address(self) -> str:
        raise NotImplementedError(
            "there is no GCS: hpcray nodes talk over MPI and keep their records in Redis")


def _id(kind: type[IdT], text: str | None) -> IdT | None:
    return None if text is None else kind(bytes.fromhex(text))


_runtime_context = RuntimeContext()


def get_runtime_context() -> RuntimeContext:
    """What runs here and where. Valid in the driver, in tasks and in actors."""
    return _runtime_context


def get_gpu_ids() -> list[int] | list[str]:
    """The GPUs this task or actor holds, as CUDA_VISIBLE_DEVICES names them; none in the driver.

    Text if the environment of the node names its devices (indices, UUIDs, MIG), else numbers.
    """
    process.current_client()
    return list(context.current().devices)  # type: ignore[return-value]
