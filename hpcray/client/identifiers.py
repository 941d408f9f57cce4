"""Ids as programs see them: a class per kind, made from bytes or text, equal if the bytes are.

    protocol/ids.py   plain bytes, on every path of a message
    this file         what is handed to a program, and taken from one

`ObjectRef` is not among them: it counts (client/references.py).
"""

from __future__ import annotations

import os
from typing import ClassVar, Self

from hpcray.protocol import ids


def check_bytes(kind: type, size: int, given: object) -> bytes:
    """`given`, if it can be an id of this kind.

    Raises:
      TypeError: it is no bytes.
      ValueError: it is longer or shorter than `size`.
    """
    if not isinstance(given, bytes):
        raise TypeError(f"{kind.__name__} is made of bytes, not of {type(given).__name__}"
                        f"; {kind.__name__}.from_hex() takes text")
    if len(given) != size:
        raise ValueError(f"{kind.__name__} is made of {size} bytes, not of {len(given)}")
    return given


class BaseID:
    """What all ids can do. `nil()` is the id of nothing: all its bits are set."""

    __slots__ = ("_id",)

    SIZE: ClassVar[int] = 28

    def __init__(self, id: bytes) -> None:
        """Raises TypeError, ValueError: `id` is not `size()` bytes."""
        self._id = check_bytes(type(self), self.SIZE, id)

    @classmethod
    def from_binary(cls, id: bytes) -> Self:
        return cls(id)

    @classmethod
    def from_hex(cls, hex_id: str | bytes) -> Self:
        """From what `hex()` gave.

        Raises:
          ValueError: it is not hexadecimal, or too long or short.
        """
        return cls(bytes.fromhex(hex_id.decode() if isinstance(hex_id, bytes) else hex_id))

    @classmethod
    def nil(cls) -> Self:
        return cls(b"\xff" * cls.SIZE)

    @classmethod
    def size(cls) -> int:
        """Bytes."""
        return cls.SIZE

    def is_nil(self) -> bool:
        return self._id == b"\xff" * self.SIZE

    def hex(self) -> str:
        return self._id.hex()

    def binary(self) -> bytes:
        return self._id

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.hex()})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._id == self._id

    def __hash__(self) -> int:
        return hash(self._id)

    def __reduce__(self) -> tuple[type[Self], tuple[bytes]]:
        return type(self), (self._id,)


class UniqueID(BaseID):
    """An id of no further structure."""

    __slots__ = ()

    @classmethod
    def from_random(cls) -> Self:
        return cls(os.urandom(cls.SIZE))


class NodeID(UniqueID):
    __slots__ = ()


class WorkerID(UniqueID):
    __slots__ = ()


class FunctionID(UniqueID):
    __slots__ = ()


class ActorClassID(UniqueID):
    __slots__ = ()


class ClusterID(UniqueID):
    __slots__ = ()


class JobID(BaseID):
    __slots__ = ()

    SIZE = ids.JOB_ID_BYTES

    @classmethod
    def from_int(cls, value: int) -> Self:
        return cls(ids.job_id(value))

    def int(self) -> int:
        return int.from_bytes(self._id, "big")


class ActorID(BaseID):
    __slots__ = ()

    SIZE = ids.ACTOR_ID_BYTES

    @property
    def job_id(self) -> JobID:
        """The job it lives in."""
        return JobID(self._id[12:])

    @classmethod
    def from_random(cls) -> Self:
        return cls(os.urandom(cls.SIZE))


class TaskID(BaseID):
    __slots__ = ()

    SIZE = ids.TASK_ID_BYTES

    def job_id(self) -> JobID:
        """The job it belongs to."""
        return JobID(self._id[20:])

    def actor_id(self) -> ActorID:
        """Of the task that creates an actor: that actor. Else `ActorID.nil()`: an id of ours does
        not say whether its task is a method, nor of whom."""
        if self._id[:8] != b"\0" * 8:
            return ActorID.nil()
        return ActorID(ids.actor_of_task(self._id))


class PlacementGroupID(BaseID):
    __slots__ = ()

    SIZE = 18

    @classmethod
    def from_random(cls) -> Self:
        return cls(os.urandom(cls.SIZE))


__all__ = [
    "ActorClassID",
    "ActorID",
    "BaseID",
    "ClusterID",
    "FunctionID",
    "JobID",
    "NodeID",
    "PlacementGroupID",
    "TaskID",
    "UniqueID",
    "WorkerID",
]
