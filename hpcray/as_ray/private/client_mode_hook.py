"""`ray._private.client_mode_hook` and `auto_init_hook`: there is no client mode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import hpcray
from hpcray.client import process

F = TypeVar("F", bound=Callable[..., Any])


def client_mode_hook(function: F) -> F:
    return function


def client_mode_wrap(function: F) -> F:
    return function


def wrap_auto_init(function: F) -> F:
    return function


def client_mode_should_convert() -> bool:
    return False


@contextlib.contextmanager
def disable_client_hook() -> Iterator[None]:
    yield


def auto_init_ray() -> None:
    """Start the session, if there is none."""
    if not hpcray.is_initialized():
        process.current_client()
