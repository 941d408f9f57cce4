"""Names that can be imported and passed around, and refuse to be used.

Ray's libraries import more than they use: for annotations, `isinstance`, or features that a program
may never ask for. A stub is a class, so that all of these work; making one, calling it, or asking
it for anything raises a sentence.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Sequence
from typing import Any, NoReturn

ANY = "*"


class _Stub(type):
    """A class that cannot be used."""

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(cls)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):  # typing, pickle and inspect ask politely
            raise AttributeError(name)
        _refuse(cls, name)

    def __getitem__(cls, item: Any) -> Any:  # an annotation
        return cls

    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        # A field of a model, which nothing will ever be put in.
        return importlib.import_module("pydantic_core").core_schema.any_schema()

    def __repr__(cls) -> str:
        return f"<{cls.__module__}.{cls.__qualname__}: not part of hpcray>"


def _refuse(cls: type, attribute: str = "") -> NoReturn:
    what = f"{cls.__module__}.{cls.__qualname__}" + (f".{attribute}" if attribute else "")
    raise NotImplementedError(
        f"{what} is not part of hpcray: it needs Ray's own core, and is here only to be imported; "
        'see "Bring your Ray script" in the documentation')


def stub(module: str, name: str) -> type:
    """A class of this name that refuses to be used."""
    return _Stub(name, (), {"__module__": module, "__qualname__": name})


class Importable(types.ModuleType):
    """A module of a class of its own: pickled by its name, as any."""

    def __reduce__(self) -> Any:
        return importlib.import_module, (self.__name__,)


class _StubModule(Importable):
    """Listed names, or any (`ANY`), each a stub."""

    _names: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not (name in self._names or ANY in self._names):
            raise AttributeError(f"module {self.__name__!r} (a stub of hpcray) has no {name!r}")
        value = stub(self.__name__, name)
        setattr(self, name, value)
        return value


def module(fullname: str, names: Sequence[str]) -> types.ModuleType:
    """A module of stubs."""
    made = _StubModule(fullname)
    made._names = names
    made.__path__ = []
    return made
