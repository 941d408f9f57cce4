"""Python values <-> packed bytes, and errors of either kind -> exceptions to raise.

Pickle protocol 5 with out-of-band buffers, through cloudpickle so that functions and classes of
`__main__` travel by value. Plain built-in scalars and numeric arrays skip cloudpickle: its
pickler costs 5-10 us to set up, which small messages feel.

Refs found inside a value are collected while it is pickled (`contained`).
"""

from __future__ import annotations

import enum
import io
import pickle
import sys
import weakref
from collections.abc import Callable, Iterable
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import cloudpickle
from cloudpickle import cloudpickle as _by_value

from hpcray import exceptions
from hpcray.client import arrays, references
from hpcray.protocol import values

_ATOMS = frozenset({int, float, bool, str, bytes, type(None), complex})
_LONG = frozenset({str, bytes})  # not worth pickling to see that it is too long
NONE = values.pack_plain(pickle.dumps(None, 5))
_collecting = references.collecting


class Serialized(NamedTuple):
    """`buffers` alias the value's own memory: copy before the user may change it."""

    pickled: bytes
    buffers: list[memoryview]
    contained: list[bytes]

    @property
    def nbytes(self) -> int:
        if not self.buffers:
            return len(self.pickled) + 1
        return values.packed_size(self.pickled, self.buffers)


def _is_plain(value: Any, depth: int = 3) -> bool:
    """Whether the C pickler alone gives the same result as cloudpickle."""
    kind = type(value)
    if kind in _ATOMS:
        return True
    if kind is tuple or kind is list:
        if depth and len(value) <= 16:
            return all(_is_plain(item, depth - 1) for item in value)
        return False
    if kind is dict:
        if depth and len(value) <= 16:
            return all(
                type(key) is str and _is_plain(item, depth - 1) for key, item in value.items()
            )
        return False
    numpy = sys.modules.get("numpy")
    # Another thread may be importing it.
    return kind is getattr(numpy, "ndarray", None) and not value.dtype.hasobject


_reducers: dict[type, Callable[[Any], Any]] = {}


def register_serializer(
    cls: type, *, serializer: Callable[[Any], Any], deserializer: Callable[[Any], Any]
) -> None:
    """Pickle instances of exactly `cls` through the two functions (Ray's `register_serializer`)."""
    _reducers[cls] = lambda value: (_apply, (deserializer, serializer(value)))


def deregister_serializer(cls: type) -> None:
    _reducers.pop(cls, None)


def _apply(function: Callable[[Any], Any], value: Any) -> Any:
    return function(value)


def _reduce_code(code: CodeType) -> Any:
    """As cloudpickle does it, with the file: 3.1.3 forgets it, and tracebacks would not show it."""
    return _code_of, (code.co_filename, *cloudpickle.Pickler.dispatch_table[CodeType](code))


def _code_of(filename: str, make: Callable[..., CodeType], args: tuple[Any, ...]) -> CodeType:
    return make(*args).replace(co_filename=filename)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle is untyped
    dispatch_table = cloudpickle.Pickler.dispatch_table.new_child({CodeType: _reduce_code})

    def reducer_override(self, obj: Any) -> Any:
        if _reducers:
            reduce = _reducers.get(type(obj))
            if reduce is not None:
                return reduce(obj)
        if isinstance(obj, BaseException):
            return exceptions._reduce(obj)
        if isinstance(obj, type):
            reduced = super().reducer_override(obj)
            return _reduce_class(obj, reduced) if type(reduced) is tuple else reduced
        kind = type(obj)
        if kind is not FunctionType:
            reduced = arrays.reduce(obj, kind)
            if reduced is not None:
                return reduced
        return super().reducer_override(obj)


def _reduce_class(kind: type, reduced: tuple[Any, ...]) -> Any:
    """Of a class that travels by value."""
    make, arguments, *rest = reduced
    if make not in (_by_value._make_skeleton_class, _by_value._make_skeleton_enum):
        return reduced
    if "__slots__" in vars(kind) and not issubclass(kind, (tuple, enum.Enum)):
        # cloudpickle rebuilds it without them, and names them when it is too late: instances made
        # there would have a `__dict__`, and could not be read where the class comes from. Tuples
        # have none to fill, and a NamedTuple makes its own.
        arguments[3]["__slots__"] = vars(kind)["__slots__"]
    return _class_by_value, (make, arguments), *rest[:-1], _set_class


# Classes that came by value. Those that only cloudpickle's tracker knows were defined here.
_received: weakref.WeakSet[type] = weakref.WeakSet()


def _class_by_value(make: Callable[..., type], arguments: tuple[Any, ...]) -> type:
    """The class, made if it is not known here. cloudpickle makes it and asks afterwards, so that
    its metaclass runs for nothing: one that keeps a register would have it twice."""
    kind: type | None = _by_value._DYNAMIC_CLASS_TRACKER_BY_ID.get(arguments[-2])
    if kind is None:
        kind = make(*arguments)
        _received.add(kind)
    return kind


def _set_class(kind: type, state: Any) -> None:
    """The attributes of a class that came by value: the latest ones. One that was defined here is
    as it is; what a worker has made of its own copy does not come back with an instance."""
    if kind in _received:
        _by_value._class_setstate(kind, state)


def dumps(
    obj: Any, protocol: int | None = None,
    buffer_callback: Callable[[pickle.PickleBuffer], Any] | None = None,
) -> bytes:
    """`pickle.dumps`, by value where cloudpickle does."""
    with io.BytesIO() as file:
        dump(obj, file, protocol, buffer_callback)
        return file.getvalue()


def dump(
    obj: Any, file: Any, protocol: int | None = None,
    buffer_callback: Callable[[pickle.PickleBuffer], Any] | None = None,
) -> None:
    """`pickle.dump`, by value where cloudpickle does."""
    _Pickler(file, protocol=protocol, buffer_callback=buffer_callback).dump(obj)


CloudPickler = Pickler = _Pickler
list_registry_pickle_by_value = cloudpickle.list_registry_pickle_by_value
register_pickle_by_value = cloudpickle.register_pickle_by_value
unregister_pickle_by_value = cloudpickle.unregister_pickle_by_value


def serialize(value: Any) -> Serialized:
    """Pickle `value`.

    Raises:
      TypeError: it cannot be pickled; the cause names the object at fault.
    """
    if type(value) in _ATOMS:
        return Serialized(pickle.dumps(value, 5), [], [])
    buffers: list[memoryview] = []

    def out_of_band(buffer: pickle.PickleBuffer) -> None:
        buffers.append(buffer.raw())

    outer = getattr(_collecting, "ids", None)
    contained: list[bytes] = []
    _collecting.ids = contained
    try:
        if not _reducers and _is_plain(value):
            pickled = pickle.dumps(value, 5, buffer_callback=out_of_band)
        else:
            pickled = dumps(value, 5, out_of_band)
    finally:
        _collecting.ids = outer
    if contained and references.of_none:
        contained = references.of_objects(contained)
    return Serialized(pickled, buffers, contained)


def pack_atom(value: Any, limit: int) -> bytes:
    """The packed value of a number, text, bytes or None: most results by far.

    Empty if it is anything else, or longer than `limit`.
    """
    if value is None:
        return NONE
    kind = type(value)
    if kind not in _ATOMS or (kind in _LONG and len(value) > limit):
        return b""
    packed = values.pack_plain(pickle.dumps(value, 5))
    return packed if len(packed) <= limit else b""


def deserialize(data: Any) -> Any:
    """The value of packed bytes: `bytes`, or a pinned read-only array over shared memory.

    Returns an exception *instance* (see `is_error`) for ERROR and FAILURE values.
    """
    tag = data[0]
    if tag == values.PLAIN:
        return pickle.loads(memoryview(data)[1:])
    if tag == values.BUFFERS:
        pickled, buffers = values.unpack(_aligned(data) if type(data) is bytes
                                         else memoryview(data))
        return pickle.loads(pickled, buffers=buffers)
    return load_error(data)


def _aligned(data: bytes) -> memoryview:
    """A copy that starts on a boundary as in shared memory, of a value that came in a message."""
    import ctypes  # only here: whoever has no such values need not pay for it

    room = bytearray(len(data) + values.ALIGN)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(room)) % values.ALIGN
    view = memoryview(room)[start : start + len(data)]
    view[:] = data
    return view.toreadonly()


def is_error(data: Any) -> bool:
    return bool(data[0] >= values.ERROR)


def dump_function(function: Callable[[], Any]) -> bytes:
    """One that every worker calls; plain pickle reads it."""
    return bytes(cloudpickle.dumps(function))


def dump_classes(classes: Iterable[type]) -> bytes:
    return bytes(cloudpickle.dumps(tuple(classes), protocol=5))


def load_classes(data: bytes) -> tuple[type, ...]:
    found: tuple[type, ...] = pickle.loads(data)
    return found


def dump_error(error: exceptions.TaskError, *, with_cause: bool = True) -> bytes:
    """An ERROR value. The cause is pickled on its own, so that one that cannot be read (or
    written) loses only itself and never the text."""
    cause, unpickled = b"", ""
    if error.cause is not None and with_cause:
        outer = getattr(_collecting, "ids", None)
        _collecting.ids = None
        try:
            cause = dumps(error.cause, 5)
        except Exception as reason:
            unpickled = (f"\n(the {type(error.cause).__name__} itself could not be pickled, and "
                         f"this is its text: {reason!r})")
        finally:
            _collecting.ids = outer
    text = error.traceback_str
    if len(text) > 32_768:
        text = text[:16_384] + "\n  ... (shortened) ...\n" + text[-16_384:]
    text += unpickled
    fields = (error.function_name, text, cause, error.pid, error.ip, error.rank, error.actor_id,
              error.actor_repr)
    return bytes((values.ERROR,)) + pickle.dumps(fields, 5)


def load_error(data: Any) -> BaseException:
    if data[0] == values.FAILURE:
        return failure_to_exception(values.unpack_failure(data))
    name, text, cause_bytes, *where = pickle.loads(memoryview(data)[1:])
    cause = None
    if cause_bytes:
        try:
            cause = pickle.loads(cause_bytes)
        except Exception as reason:
            text += f"\n(the exception itself could not be read here: {reason!r})"
    if not isinstance(cause, BaseException):
        cause = exceptions.RayError(text)
    error = exceptions.TaskError(name, text, cause, *where)
    return error.as_instanceof_cause()


def error_text(data: bytes) -> str:
    """The traceback in an ERROR value; what was raised is not unpickled."""
    return str(pickle.loads(memoryview(data)[1:])[1])


def failure_to_exception(failure: values.Failure) -> BaseException:
    kind: Any = getattr(exceptions, failure.kind, None) or {
        "ValueError": ValueError, "TypeError": TypeError, "RuntimeError": RuntimeError,
    }.get(failure.kind, exceptions.RaySystemError)
    error: BaseException
    if issubclass(kind, exceptions.RayActorError):
        error = kind(failure.subject or None, failure.message,
                     actor_init_failed=failure.in_constructor)
    elif kind is exceptions.ObjectStoreFullError:
        error = kind(detail=failure.message)
    elif issubclass(kind, exceptions.ObjectLostError):
        error = kind(failure.subject, detail=failure.message)
    elif kind is exceptions.TaskCancelledError:
        error = kind(failure.subject, failure.message)
    else:
        error = kind(failure.message)
    return error
