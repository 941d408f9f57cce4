"""Ray's collectives among actors: the names are here, the operations are not yet.

What tells what there is answers truly (no backend, no group); everything else raises
`NotImplementedError` with what to do instead. A program written for Ray so fails where it asks
for a collective, in words, and not at its imports.
"""

from typing import Any, NoReturn

from hpcray.util.collective.types import Backend, ReduceOp

_INSTEAD = (
    "collectives among tasks and actors are not there yet. Workers are no MPI ranks, so mpi4py in "
    "a task is a world of one. Pass refs instead: put() once what all need, and add results in a "
    "tree of tasks (examples/tree_reduce.py); what is tightly coupled belongs into an MPI program")
_TRANSFER = (
    "send and recv among tasks and actors are not there yet. Return the value, or put() it, and "
    "pass its ref to the receiver: large arrays move between nodes by MPI, once")


def _absent(name: str, instead: str = _INSTEAD) -> NoReturn:
    raise NotImplementedError(f"{name}(): {instead}")


# --- what there is -------------------------------------------------------------------------------


def nccl_available() -> bool:
    """False: there is no NCCL backend."""
    return False


def gloo_available() -> bool:
    """False: there is no Gloo backend."""
    return False


def is_backend_available(backend: str) -> bool:
    """False, for every backend."""
    return False


def is_group_initialized(group_name: str = "default") -> bool:
    """False: no group can be made."""
    return False


# --- groups --------------------------------------------------------------------------------------


def init_collective_group(
    world_size: int, rank: int, backend: str = "gloo", group_name: str = "default", **_: Any
) -> NoReturn:
    """Not there yet: raises NotImplementedError."""
    _absent("init_collective_group")


def create_collective_group(
    actors: list[Any], world_size: int, ranks: list[int], backend: str = "gloo",
    group_name: str = "default", **_: Any,
) -> NoReturn:
    """Not there yet: raises NotImplementedError."""
    _absent("create_collective_group")


def destroy_collective_group(group_name: str = "default") -> NoReturn:
    """Not there yet: raises NotImplementedError."""
    _absent("destroy_collective_group")


def get_rank(group_name: str = "default") -> NoReturn:
    """Not there yet: raises NotImplementedError."""
    _absent("get_rank")


def get_collective_group_size(group_name: str = "default") -> NoReturn:
    """Not there yet: raises NotImplementedError."""
    _absent("get_collective_group_size")


def get_group_handle(group_name: str = "default") -> NoReturn:
    """Not there yet: raises NotImplementedError."""
    _absent("get_group_handle")


def register_collective_backend(*_: Any, **__: Any) -> NoReturn:
    """Not there yet: raises NotImplementedError."""
    _absent("register_collective_backend")


# --- operations ----------------------------------------------------------------------------------


def allreduce(tensor: Any, group_name: str = "default", op: ReduceOp = ReduceOp.SUM) -> NoReturn:
    """Not there yet: raises NotImplementedError."""
    _absent("allreduce")


def barrier(group_name: str = "default") -> NoReturn:
    """Not there yet: raises NotImplementedError."""
    _absent("barrier")


def reduce(
    tensor: Any, dst_rank: int = 0, group_name: str = "default", op: ReduceOp = ReduceOp.SUM
) -> NoReturn:
    """Not there yet: raises NotImplementedError."""
    _absent("reduce")


def broadcast(tensor: Any, src_rank: int = 0, group_name: str = "default") -> NoReturn:
    """Not there yet: raises NotImplementedError."""
    _absent("broadcast")


def allgather(tensor_list: list[Any], tensor: Any, group_name: str = "default") -> NoReturn:
    """Not there yet: raises NotImplementedError."""
    _absent("allgather")


def reducescatter(
    tensor: Any, tensor_list: list[Any], group_name: str = "default", op: ReduceOp = ReduceOp.SUM
) -> NoReturn:
    """Not there yet: raises NotImplementedError."""
    _absent("reducescatter")


def send(tensor: Any, dst_rank: int, group_name: str = "default") -> NoReturn:
    """Not there yet: raises NotImplementedError."""
    _absent("send", _TRANSFER)


def recv(tensor: Any, src_rank: int, group_name: str = "default") -> NoReturn:
    """Not there yet: raises NotImplementedError."""
    _absent("recv", _TRANSFER)


# Ray's forms for several GPUs in one process.
def __getattr__(name: str) -> Any:
    if name in _MULTIGPU:
        def absent(*_: Any, **__: Any) -> NoReturn:
            _absent(name, _TRANSFER if name in ("send_multigpu", "recv_multigpu") else _INSTEAD)

        absent.__name__ = name
        return absent
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_MULTIGPU = frozenset({
    "allreduce_multigpu", "reduce_multigpu", "broadcast_multigpu", "allgather_multigpu",
    "reducescatter_multigpu", "send_multigpu", "recv_multigpu",
})

__all__ = [
    "Backend",
    "ReduceOp",
    "allgather",
    "allreduce",
    "barrier",
    "broadcast",
    "create_collective_group",
    "destroy_collective_group",
    "get_collective_group_size",
    "get_group_handle",
    "get_rank",
    "gloo_available",
    "init_collective_group",
    "is_backend_available",
    "is_group_initialized",
    "nccl_available",
    "recv",
    "reduce",
    "reducescatter",
    "register_collective_backend",
    "send",
]
