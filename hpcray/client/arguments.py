"""Arguments of a call on their way to its worker: packed, with refs at the top level left open.

    (args, kwargs) --Arguments.pack--> bytes with Placeholders + ids     in the caller
    bytes + the values of those ids --Loader.arguments--> (args, kwargs) in the worker
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hpcray.client.references import ObjectRef
from hpcray.client.serialization import Serialized, serialize
from hpcray.protocol import messages, values
from hpcray.protocol.sizes import check_refs


class Placeholder:
    """Stands for the n-th dependency inside packed arguments."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __reduce__(self) -> tuple[Any, ...]:
        return (Placeholder, (self.index,))


class Arguments:
    """`check_session` refuses refs of other sessions; `put` makes an object of a large value."""

    def __init__(
        self, check_session: Callable[[Sequence[bytes]], None],
        put: Callable[[Serialized], ObjectRef[Any]],
    ) -> None:
        self._check_session = check_session
        self._put = put

    def pack(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[bytes, bytes, int, Any]:
        """(args, refs, dep_count, keep): `keep` must live until the task is submitted.

        Top-level refs become placeholders and dependencies; refs nested deeper pass through.
        """
        if not args and not kwargs:
            return messages.NO_ARGS, b"", 0, None
        deps: list[bytes] = []
        keep: list[Any] = []
        if any(type(a) is ObjectRef for a in args):
            args = tuple(_place(a, deps, keep) if type(a) is ObjectRef else a for a in args)
        if kwargs and any(type(a) is ObjectRef for a in kwargs.values()):
            kwargs = {
                key: _place(a, deps, keep) if type(a) is ObjectRef else a
                for key, a in kwargs.items()
            }
        if deps:
            self._check_session(deps)
        serialized = serialize((args, kwargs))
        count = len(deps)
        if serialized.nbytes <= values.INLINE_MAX_BYTES:
            packed = values.pack(serialized.pickled, serialized.buffers)
            refs = b"".join(deps + serialized.contained if serialized.contained else deps)
            check_refs(len(refs), "the arguments hold")
            return packed, refs, count, keep
        # Too large for a message: the arguments become an object, the first dependency.
        ref = self._put(serialized)
        keep.append(ref)
        refs = b"".join([ref._id, *deps])
        check_refs(len(refs), "the arguments hold")
        return messages.ARGS_IN_DEP, refs, count + 1, keep


def _place(ref: ObjectRef[Any], deps: list[bytes], keep: list[Any]) -> Placeholder:
    deps.append(ref._id)
    keep.append(ref)
    return Placeholder(len(deps) - 1)
