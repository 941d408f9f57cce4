"""Ray's names of backends and reductions. Data only; see the package."""

from __future__ import annotations

import enum


class Backend:
    """The names of Ray's backends; hpcray has none of them."""

    NCCL = "NCCL"
    GLOO = "GLOO"
    UNRECOGNIZED = "unrecognized"


class ReduceOp(enum.Enum):
    """How values of several ranks become one."""

    SUM = 0
    PRODUCT = 1
    MIN = 2
    MAX = 3


__all__ = ["Backend", "ReduceOp"]
