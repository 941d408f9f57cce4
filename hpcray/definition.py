"""A function or class of the user's on its way to other processes: its id, pickle and signature.

Shared by remote functions and actor classes. The id is drawn at decoration and not from the
content, so that a function can refer to itself (through a global or a closure): the pickle of
its body holds the id of the whole. A copy unpickled elsewhere has the same id and defines itself
there on first use.
"""

from __future__ import annotations

import inspect
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hpcray.client.streams import STREAMED, WINDOWED
from hpcray.exceptions import RayError
from hpcray.protocol import ids, values
from hpcray.protocol.messages import STREAM, DefineFunction, Template

if TYPE_CHECKING:
    from hpcray.client.client import Client
    from hpcray.client.core import Use

# Ray's limit. Data this large belongs into an object: put(data) and pass the ref.
MAX_PICKLED_BYTES = 95 * 1024 * 1024

# One parameter: name, kind as `inspect` numbers them, whether it has a default.
Parameter = tuple[str, int, bool]
_POSITIONAL_ONLY = int(inspect.Parameter.POSITIONAL_ONLY)
_EITHER = int(inspect.Parameter.POSITIONAL_OR_KEYWORD)
_VAR_POSITIONAL = int(inspect.Parameter.VAR_POSITIONAL)
_KEYWORD_ONLY = int(inspect.Parameter.KEYWORD_ONLY)
_VAR_KEYWORD = int(inspect.Parameter.VAR_KEYWORD)
_ANYTHING = (("args", _VAR_POSITIONAL, False), ("kwargs", _VAR_KEYWORD, False))


def parameters_of(function: Callable[..., Any], skip: int = 0) -> tuple[Parameter, ...]:
    """What may be passed, less the first `skip` (self). Callables that do not tell: anything."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return _ANYTHING
    found = [(p.name, int(p.kind), p.default is not p.empty)
             for p in signature.parameters.values()]
    if skip and found and found[0][1] == _VAR_POSITIONAL:
        return tuple(found)  # def method(*args): self is among them
    return tuple(found[skip:])


class CallSignature:
    """Whether arguments fit, decided before they are sent.

    `least <= len(args) <= most` settles calls without keywords: the hot path. `inspect` itself
    (5 us a call) only words the error.
    """

    __slots__ = ("_any_keyword", "least", "most", "parameters")

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        self.parameters = tuple(parameters)
        least = most = 0
        self._any_keyword = False
        for _, kind, has_default in self.parameters:
            if kind in (_POSITIONAL_ONLY, _EITHER):
                most += 1
                least += not has_default
            elif kind == _VAR_POSITIONAL:
                most = sys.maxsize
            elif kind == _VAR_KEYWORD:
                self._any_keyword = True
            elif not has_default:
                least = sys.maxsize  # a required keyword: no positional call fits
        self.least = least
        self.most = most

    def fits(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        count = len(args)
        if count > self.most:
            return False
        taken = 0
        for index, (name, kind, has_default) in enumerate(self.parameters):
            if kind == _EITHER:
                if name in kwargs:
                    if index < count:
                        return False
                    taken += 1
                elif index >= count and not has_default:
                    return False
            elif kind == _KEYWORD_ONLY:
                if name in kwargs:
                    taken += 1
                elif not has_default:
                    return False
            elif kind == _POSITIONAL_ONLY and index >= count and not has_default:
                return False
        return self._any_keyword or taken == len(kwargs)

    def check(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raises: TypeError, worded as Python words it, headed by the callable's name."""
        if self.fits(args, kwargs):
            return
        signature = inspect.Signature([
            inspect.Parameter(
                parameter, _KINDS[kind],
                default=None if has_default else inspect.Parameter.empty)
            for parameter, kind, has_default in self.parameters
        ])
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            shown = ", ".join(_shown(p) for p in self.parameters)
            raise TypeError(f"{name}({shown}): {error}") from None
        raise TypeError(f"{name}: the arguments do not fit its signature")


_KINDS = {int(kind): kind for kind in (
    inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.KEYWORD_ONLY,
    inspect.Parameter.VAR_KEYWORD,
)}


def _shown(parameter: Parameter) -> str:
    name, kind, has_default = parameter
    stars = {_VAR_POSITIONAL: "*", _VAR_KEYWORD: "**"}.get(kind, "")
    return stars + name + ("=..." if has_default else "")


class Definition:
    """A function or class and its id. Copies in other processes are equal by id."""

    __slots__ = ("_signature", "function_id", "name", "target")

    _signature: CallSignature | None

    def __init__(self, target: Callable[..., Any]) -> None:
        self.target = target
        self.function_id = os.urandom(ids.FUNCTION_ID_BYTES)
        # As Ray names tasks; the module is added where a definition as such is named.
        self.name: str = getattr(target, "__qualname__", None) or repr(target)
        self._signature = None

    @property
    def full_name(self) -> str:
        module = getattr(self.target, "__module__", None)
        return f"{module}.{self.name}" if module else self.name

    def __reduce__(self) -> tuple[Any, ...]:
        # State apart from the constructor: the target may refer back to us.
        return (_blank_definition, (), (self.function_id, self.name, self.target))

    def __setstate__(self, state: tuple[bytes, str, Callable[..., Any]]) -> None:
        self.function_id, self.name, self.target = state
        self._signature = None

    @property
    def signature(self) -> CallSignature:
        """Of a call, or of the constructor. Found on first use: see `RemoteFunction._bind_to`."""
        if self._signature is None:
            self._signature = CallSignature(_call_parameters(self.target))
        return self._signature

    def define(self, client: Client, template: Template) -> Use:
        """Make the client's node know the template and what it runs, for as long as what is
        returned lives.

        Raises:
          TypeError: it cannot be pickled.
          ValueError: it is larger than MAX_PICKLED_BYTES.
        """
        known = client.use_of(template.template_id)
        if known is not None:
            return known
        if client.is_defined(self.function_id):
            return client.define(template, None)
        return client.define(template, self._pack(client))

    def _pack(self, client: Client) -> DefineFunction:
        from hpcray.client import serialization

        what = "class" if isinstance(self.target, type) else "function"
        try:
            serialized = serialization.serialize(self.target)
        except Exception as error:
            culprit = next(_culprits(self.target), "")
            raise TypeError(
                f"the {what} {self.full_name} cannot be sent to workers: "
                f"{culprit or 'it'} cannot be pickled ({type(error).__name__}: {error}). "
                "Make it inside the function instead, or pass it as an argument") from error
        if serialized.nbytes > MAX_PICKLED_BYTES:
            raise ValueError(
                f"the {what} {self.full_name} is too large: {serialized.nbytes >> 20} MiB pickled, "
                f"at most {MAX_PICKLED_BYTES >> 20} MiB. It probably refers to large data by a "
                "global or closure: put() the data and pass the ref as an argument")
        # The definition lives as long as the job, and so must what it refers to.
        for object_id in serialized.contained:
            client.pin_for_job(object_id)
        if serialized.nbytes <= values.INLINE_MAX_BYTES:
            packed = values.pack(serialized.pickled, serialized.buffers)
            return DefineFunction(self.function_id, self.full_name, packed)
        ref = client.put_serialized(serialized)
        client.pin_for_job(ref.binary())
        return DefineFunction(self.function_id, self.full_name, b"", ref.binary())


def _call_parameters(target: Callable[..., Any]) -> tuple[Parameter, ...]:
    if not isinstance(target, type):
        return parameters_of(target)
    for name in ("__init__", "__new__"):
        function = getattr(target, name)
        if function is not getattr(object, name):
            return parameters_of(function, 1)
    return ()


def _blank_definition() -> Definition:
    return Definition.__new__(Definition)


def submitted_returns(template: Template) -> int:
    """The `return_count` of `Client.submit`."""
    if template.stream != STREAM:
        return template.return_count
    return WINDOWED if template.stream_window else STREAMED


def pack_call(
    client: Client, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[bytes, bytes, int, Any]:
    """`client/arguments.py:Arguments.pack`, whose failures name the argument.

    Raises:
      TypeError: an argument cannot be pickled.
    """
    try:
        return client.pack_arguments(args, kwargs)
    except RayError:
        raise
    except Exception as error:
        from hpcray.client import interrupts, serialization

        if interrupts.raised_by_handler(error):
            raise

        named = [(f"argument {index}", arg) for index, arg in enumerate(args)]
        named += [(f"argument {key!r}", arg) for key, arg in kwargs.items()]
        for label, arg in named:
            if not _picklable(serialization.serialize, arg):
                raise TypeError(
                    f"{name}: {label} of type {type(arg).__name__} cannot be pickled "
                    f"({type(error).__name__}: {error})") from error
        raise


def _picklable(serialize: Callable[[Any], Any], value: Any) -> bool:
    try:
        serialize(value)
    except Exception:
        return False
    return True


def _culprits(target: Any) -> Iterator[str]:
    """What of a function's or class's surroundings cannot be pickled, for people."""
    from hpcray.client.serialization import serialize

    functions = [target] if not isinstance(target, type) else [
        member for member in vars(target).values() if isinstance(member, types.FunctionType)]
    if isinstance(target, type):
        for name, member in vars(target).items():
            if not isinstance(member, types.FunctionType) and not name.startswith("__") and (
                not _picklable(serialize, member)
            ):
                yield f"its attribute {name!r} ({type(member).__name__})"
    for function in functions:
        if not isinstance(function, types.FunctionType):
            continue
        where = f" of {function.__name__}" if function is not target else ""
        code = function.__code__
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
            try:
                value = cell.cell_contents
            except ValueError:
                continue  # not assigned yet
            if value is not target and not _picklable(serialize, value):
                yield f"its closure variable {name!r}{where} ({type(value).__name__})"
        for name in code.co_names:
            value = function.__globals__.get(name)
            if value is not None and value is not target and not _picklable(serialize, value):
                yield f"the global {name!r}{where} ({type(value).__name__})"
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for value in defaults:
            if not _picklable(serialize, value):
                yield f"a default value{where} ({type(value).__name__})"


__all__ = ["MAX_PICKLED_BYTES", "CallSignature", "Definition", "pack_call",
           "parameters_of", "submitted_returns"]
