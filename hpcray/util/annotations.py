"""Marks on what a library offers: for everybody, for developers, or no longer. Under Ray's names,
for the libraries that mark theirs with them.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from enum import Enum
from typing import Any


class RayDeprecationWarning(DeprecationWarning):
    """What is used may be gone in a later release."""


class AnnotationType(Enum):
    PUBLIC_API = "PublicAPI"
    DEVELOPER_API = "DeveloperAPI"
    DEPRECATED = "Deprecated"
    UNKNOWN = "Unknown"


_STABILITY = ("alpha", "beta", "stable")


def PublicAPI(*args: Any, **kwargs: Any) -> Any:
    """For everybody. `@PublicAPI`, or with `stability` ("alpha", "beta" or "stable", which is the
    default) and `api_group`.

    Raises:
      ValueError: an option is unknown, or its value is.
    """
    if not kwargs and len(args) == 1 and callable(args[0]):
        return PublicAPI()(args[0])
    stability = kwargs.pop("stability", "stable")
    group = kwargs.pop("api_group", "Others")
    _refuse("PublicAPI", kwargs)
    if stability not in _STABILITY:
        raise ValueError(f"PublicAPI(stability={stability!r}): it is one of {_STABILITY}")

    def mark(obj: Any) -> Any:
        if stability != "stable":
            _append(obj, f"**PublicAPI ({stability}):** may change before it is stable.")
        return _marked(obj, AnnotationType.PUBLIC_API, group)

    return mark


def DeveloperAPI(*args: Any, **kwargs: Any) -> Any:
    """For those who build on it: it may change with any release. Keywords are taken, as in Ray,
    and mean nothing."""
    if not kwargs and len(args) == 1 and callable(args[0]):
        return DeveloperAPI()(args[0])

    def mark(obj: Any) -> Any:
        _append(obj, "**DeveloperAPI:** may change with any release.")
        return _marked(obj, AnnotationType.DEVELOPER_API)

    return mark


def Deprecated(*args: Any, **kwargs: Any) -> Any:
    """No longer to be used. `@Deprecated`, or with `message`, which says what to use instead, and
    `warning=True`: whoever uses it gets a `RayDeprecationWarning`."""
    if not kwargs and len(args) == 1 and callable(args[0]):
        return Deprecated()(args[0])
    message = kwargs.pop("message", "")
    warning = kwargs.pop("warning", False)
    _refuse("Deprecated", kwargs)
    text = f"this may be gone in a later release. {message}".rstrip()

    def mark(obj: Any) -> Any:
        _append(obj, f"**Deprecated:** {text}")
        if warning and isinstance(obj, type):
            constructor = vars(obj).get("__init__", obj.__init__)  # type: ignore[misc]
            obj.__init__ = _warning(constructor, obj.__qualname__, text)  # type: ignore[misc]
        elif warning and callable(obj):
            obj = _warning(obj, obj.__qualname__, text)
        return _marked(obj, AnnotationType.DEPRECATED)

    return mark


def _warning(function: Callable[..., Any], name: str, text: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        warnings.warn(f"{name}: {text}", RayDeprecationWarning, stacklevel=2)
        return function(*args, **kwargs)

    return wrapper


def _refuse(decorator: str, others: dict[str, Any]) -> None:
    if others:
        raise ValueError(f"{decorator} does not know {', '.join(map(repr, others))}")


def _append(obj: Any, text: str) -> None:
    try:
        obj.__doc__ = f"{inspect.cleandoc(obj.__doc__ or '')}\n\n{text}".lstrip()
    except AttributeError:
        pass  # one whose text is fixed


def _marked(obj: Any, kind: AnnotationType, group: str = "Others") -> Any:
    try:
        obj._annotated = obj.__name__
        obj._annotated_type = kind
        obj._annotated_api_group = group
    except AttributeError:
        pass  # a property, or another thing without attributes
    return obj


__all__ = ["AnnotationType", "Deprecated", "DeveloperAPI", "PublicAPI", "RayDeprecationWarning"]
