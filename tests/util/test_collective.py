"""`util.collective`: Ray's names, which say what to do instead."""

from __future__ import annotations

import pytest

from hpcray.util import collective
from hpcray.util.collective.types import Backend, ReduceOp

# Every name of Ray's package.
RAYS = """
    nccl_available gloo_available is_backend_available is_group_initialized init_collective_group
    destroy_collective_group create_collective_group get_rank get_collective_group_size allreduce
    allreduce_multigpu barrier reduce reduce_multigpu broadcast broadcast_multigpu allgather
    allgather_multigpu reducescatter reducescatter_multigpu send send_multigpu recv recv_multigpu
    get_group_handle register_collective_backend
""".split()
ANSWERS = {"nccl_available": (), "gloo_available": (), "is_backend_available": ("nccl",),
           "is_group_initialized": ("default",)}
ARGUMENTS = {
    "init_collective_group": (2, 0), "create_collective_group": ([], 2, [0, 1]),
    "allgather": ([], 1), "reducescatter": (1, []), "send": (1, 0), "recv": (1, 0),
    "allreduce": (1,), "reduce": (1,), "broadcast": (1,),
}


@pytest.mark.parametrize("name", RAYS)
def test_every_name_of_ray_is_there_and_says_what_is_true(name: str):
    function = getattr(collective, name)
    if name in ANSWERS:
        assert function(*ANSWERS[name]) is False
        return
    with pytest.raises(NotImplementedError, match=name) as caught:
        function(*ARGUMENTS.get(name, ()))
    assert "refs" in str(caught.value) or "ref to" in str(caught.value)


def test_types():
    assert [op.name for op in ReduceOp] == ["SUM", "PRODUCT", "MIN", "MAX"]
    assert (Backend.NCCL, Backend.GLOO) == ("NCCL", "GLOO")


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="allscatter"):
        collective.allscatter  # noqa: B018
