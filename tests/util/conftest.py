"""Fixtures of the helpers' tests: one session of 2 CPUs for each module, on either backend.

`HPCRAY_TEST_BACKEND=ray` runs them against Ray itself, as in tests/api; a module that Ray does not
have is skipped there. What a remote function closes over is plain, and it is defined inside its
test: a worker can import no test module.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BACKEND = os.environ.get("HPCRAY_TEST_BACKEND", "hpcray")

_INIT_OF_BACKEND: dict[str, dict[str, Any]] = {
    "ray": {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False},
    "hpcray": {},
}

# Ray has no executor, and its environment need not have what importing hpcray takes.
collect_ignore = ["test_futures.py", "test_futures_session.py", "test_joblib.py"]
if BACKEND != "ray":
    collect_ignore = []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "ray_differs(why): hpcray deliberately does better than Ray; skipped on Ray")
    config.addinivalue_line(
        "markers", "hpcray_only(why): hpcray promises this and Ray does not; skipped on Ray")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(60))
        if BACKEND == "ray":
            item.add_marker(pytest.mark.filterwarnings("default"))
            item.add_marker(pytest.mark.leaves_behind("the oracle's processes are Ray's"))
            for name in ("hpcray_only", "ray_differs"):
                mark = item.get_closest_marker(name)
                if mark is not None:
                    item.add_marker(pytest.mark.skip(reason=f"{name}: {mark.args[0]}"))


@pytest.fixture(scope="module")
def ray() -> Iterator[ModuleType]:
    backend = importlib.import_module(BACKEND)
    backend.init(num_cpus=2, **_INIT_OF_BACKEND[BACKEND])
    yield backend
    backend.shutdown()


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Any]:
    """`hold()` in a task blocks in the kernel until `hold.release()`; any number may.

    A pipe that nobody writes to: reading it ends when the last writer, this process, lets go.
    """
    path = tmp_path / "hold"
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR)

    def wait(value: Any = None, path: str = str(path)) -> Any:
        with open(path, "rb") as pipe:
            pipe.read()
        return value

    released = []

    def release() -> None:
        if not released:
            released.append(True)
            # Whoever opens it from now on must not block either, nor find nothing.
            empty = tmp_path / "released"
            empty.touch()
            empty.replace(path)
            os.close(writer)

    wait.release = release  # type: ignore[attr-defined]
    yield wait
    release()
