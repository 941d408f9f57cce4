"""Executor and the session: `init()` by itself, and a session that ends too early."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import hpcray
from hpcray.exceptions import RaySystemError
from hpcray.futures import Executor


@pytest.fixture(autouse=True)
def session() -> Iterator[None]:
    yield
    hpcray.shutdown()


def test_init_is_implicit() -> None:
    executor = Executor()
    assert not hpcray.is_initialized()
    assert executor.submit(abs, -1).result(20) == 1
    assert hpcray.is_initialized()


def test_the_session_ends_first(hold: Any) -> None:
    hpcray.init(num_cpus=1)
    wait = hold
    executor = Executor()
    futures = [executor.submit(lambda: wait()) for _ in range(2)]
    hpcray.shutdown()
    executor.shutdown()  # returns
    assert isinstance(futures[0].exception(20), (RaySystemError, RuntimeError))
    assert futures[1].cancelled() or futures[1].exception(20) is not None
