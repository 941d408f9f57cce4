"""Values of simulated programs: lists of plain data with refs anywhere inside, as msgpack.

    pack    (packed, joined ids of the refs inside); refs directly in arguments become dependencies
    unpack  the value, or TaskFailed or SystemFailed raised

No user pickles: nothing of a program runs while its values are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from hpcray.client.references import ObjectRef
from hpcray.protocol import values
from hpcray.testing.memory import View

# Small, so that shared memory is met without moving megabytes.
INLINE_BYTES = 512
NONE = b"\0\x92\xc0\xc4\x00"
_REF, _PLACEHOLDER = 1, 2


class SystemFailed(Exception):
    """A value was a FAILURE: the system could not make it."""

    def __init__(self, failure: values.Failure) -> None:
        super().__init__(f"{failure.kind}: {failure.message} {failure.subject}")
        self.failure = failure


class TaskFailed(Exception):
    """A value was an ERROR: the body raised; the text is its own."""


class Value(list[Any]):
    """A value read from shared memory; `view` is its pin."""

    view: View | None = None


class Large:
    """Asks for a value that does not fit into a message."""

    __slots__ = ("pad_bytes", "value")

    def __init__(self, value: Any, pad_bytes: int = 2 * INLINE_BYTES) -> None:
        self.value = value
        self.pad_bytes = pad_bytes


def pack(value: Any, deps: list[bytes] | None = None) -> tuple[bytes, bytes]:
    """(packed, joined ids of the refs inside). With `deps`, refs directly in `value` become
    dependencies."""
    contained: list[bytes] = []
    pad = b""
    if isinstance(value, Large):
        pad = bytes((len(contained) * 7 + 3,)) * value.pad_bytes
        value = value.value

    def hook(item: Any) -> Any:
        if isinstance(item, ObjectRef):
            contained.append(item._id)
            return msgspec.msgpack.Ext(_REF, item._id)
        raise TypeError(f"{item!r} cannot be a simulated value")

    if deps is not None:
        placed = []
        for item in value:
            if isinstance(item, ObjectRef):
                placed.append(msgspec.msgpack.Ext(_PLACEHOLDER, bytes((len(deps),))))
                deps.append(item._id)
            else:
                placed.append(item)
        value = placed
    packed = b"\0" + msgspec.msgpack.encode([value, pad], enc_hook=hook)
    return packed, b"".join(contained)


def unpack(
    packed: bytes, intern: Callable[[bytes], Any], fault: Callable[[str], Any],
    deps: Sequence[Any] = (),
) -> Any:
    """`intern` makes the refs inside, `fault` ends the simulation: the value is not what it was."""
    if packed[0] == values.FAILURE:
        failure = values.unpack_failure(packed)
        if failure.kind == "ReferenceCountingAssertionError":
            fault(f"{failure.message} {failure.subject}")
        raise SystemFailed(failure)
    if packed[0] == values.ERROR:
        raise TaskFailed(packed[1:].decode())

    def hook(code: int, data: memoryview) -> Any:
        return intern(bytes(data)) if code == _REF else deps[data[0]]

    try:
        return msgspec.msgpack.decode(packed[1:], ext_hook=hook)[0]
    except msgspec.DecodeError:
        fault(f"a value has been overwritten: {packed[:40]!r}")
        raise
