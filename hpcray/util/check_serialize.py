"""`inspect_serializability`: which part of an object is the reason that it cannot be pickled.

    object --fails--> its parts (closure, attributes, items) --those that fail--> their parts ...

The culprits are the objects that fail while none of their parts does, or the last ones looked at
when `depth` ends. The test is the serialiser of tasks and objects itself, so registered
serialisers count.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any, TextIO

from hpcray.client.serialization import serialize

# Of a long list only so many items are tried; the culprit of a list is most often in all of them.
_MAX_ITEMS = 100
_TEXT_WIDTH = 80


class FailureTuple:
    """One culprit. Compared by identity, since the object may not be hashable.

    Attributes:
      obj: what cannot be pickled.
      path: the names that lead to it, from the outside in.
      parent: the object that refers to it; None for the outermost.
    """

    def __init__(self, obj: Any, path: tuple[str, ...], parent: Any) -> None:
        self.obj = obj
        self.path = path
        self.parent = parent

    @property
    def name(self) -> str:
        return self.path[-1] if self.path else "unknown"

    def __repr__(self) -> str:
        return (f"FailTuple({self.name} [path={' -> '.join(self.path)}, obj={_text(self.obj)}, "
                f"parent={_text(self.parent)}])")


def inspect_serializability(
    base_obj: Any, name: str | None = None, depth: int = 3, print_file: TextIO | None = None
) -> tuple[bool, set[FailureTuple]]:
    """Whether `base_obj` can be pickled, and if not, what in it cannot. Prints its search.

    Args:
      name: what to call it.
      depth: how many levels of parts to look into.
      print_file: where to print; standard output if None.
    """
    search = _Search(print_file)
    head = f"Checking Serializability of {_text(base_obj)}"
    search.print("=" * len(head), 0)
    search.print(head, 0)
    search.print("=" * len(head), 0)
    good = search.visit(base_obj, (name,) if name else (), None, depth)
    if not good:
        search.print("Not serializable:", 0)
        for failure in search.failures:
            search.print(repr(failure), 1)
        search.print("Create such objects inside the task or actor, or teach hpcray to pickle "
                     "them: ray.util.register_serializer.", 0)
    return good, set(search.failures)


class _Search:
    def __init__(self, file: TextIO | None) -> None:
        self._file = file
        # Outcome by id. The objects are kept, or another one might get the id meanwhile.
        self._seen: dict[int, tuple[Any, bool]] = {}
        self.failures: list[FailureTuple] = []

    def print(self, text: str, level: int) -> None:
        print("    " * level + text, file=self._file)

    def visit(self, obj: Any, path: tuple[str, ...], parent: Any, depth: int) -> bool:
        """Whether `obj` can be pickled; adds the culprits inside it."""
        known = self._seen.get(id(obj))
        if known is not None:
            return known[1]
        level = len(path)
        try:
            serialize(obj)
        except Exception as error:
            self._seen[id(obj)] = obj, False
            self.print(f"!!! FAIL {path[-1] if path else ''}: {error}", level)
        else:
            self._seen[id(obj)] = obj, True
            return True
        found = False
        if depth > 0:
            for label, part in _parts(obj):
                if self.visit(part, (*path, label), obj, depth - 1) is False:
                    found = True
        if not found:
            self.failures.append(FailureTuple(obj, path, parent))
        return False


def _parts(obj: Any) -> Iterator[tuple[str, Any]]:
    """What pickling `obj` pickles too, by name."""
    if isinstance(obj, functools.partial):
        yield "func", obj.func
        yield from _parts(obj.args)
        yield from _parts(obj.keywords)
    elif inspect.ismethod(obj):
        yield "__self__", obj.__self__
        yield "__func__", obj.__func__
    elif inspect.isfunction(obj):
        yield from _parts_of_function(obj)
    elif isinstance(obj, dict):
        for index, (key, value) in enumerate(obj.items()):
            if index == _MAX_ITEMS:
                return
            yield f"key {_text(key)}", key
            yield f"[{_text(key)}]", value
    elif isinstance(obj, (list, tuple, set, frozenset)):
        for index, value in enumerate(obj):
            if index == _MAX_ITEMS:
                return
            yield f"[{index}]", value
    elif inspect.isclass(obj):
        for name, member in vars(obj).items():
            if isinstance(member, (staticmethod, classmethod)):
                yield name, member.__func__
            elif isinstance(member, property):
                yield from ((name, function) for function in (member.fget, member.fset) if function)
            elif not (name.startswith("__") and not inspect.isfunction(member)):
                yield name, member
    else:
        yield from getattr(obj, "__dict__", {}).items()
        for name in _slots(type(obj)):
            if hasattr(obj, name):
                yield name, getattr(obj, name)
        if not inspect.ismodule(obj):
            yield type(obj).__name__, type(obj)


def _parts_of_function(function: Any) -> Iterator[tuple[str, Any]]:
    try:
        closure = inspect.getclosurevars(function)
    except ValueError:
        pass  # a cell that is still empty
    else:
        yield from closure.globals.items()
        yield from closure.nonlocals.items()
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is not parameter.empty:
            yield name, parameter.default
    yield from vars(function).items()


def _slots(cls: type) -> Iterator[str]:
    for base in cls.__mro__:
        slots = base.__dict__.get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else tuple(slots)
        yield from (name for name in names if name not in ("__dict__", "__weakref__"))


def _text(obj: Any) -> str:
    try:
        text = repr(obj)
    except Exception as error:
        text = f"<{type(obj).__name__} whose repr raises {type(error).__name__}>"
    return text if len(text) <= _TEXT_WIDTH else text[:_TEXT_WIDTH - 3] + "..."


__all__ = ["FailureTuple", "inspect_serializability"]
