"""Fixtures of the API behaviour suite: one set of tests, two backends.

The suite states what Ray Core 2 documents and does. `HPCRAY_TEST_BACKEND=ray` runs it against
Ray itself (the oracle: a test that fails there is a wrong test); the default runs it against
hpcray. Where hpcray is meant to differ, a test says so: `hpcray_only(why)`, `ray_differs(why)`.

    ray            the backend, with a cluster of 2 CPUs shared by the tests of one module
    cluster(...)   the backend, with a cluster of the test's own (init's keywords)
    bare_ray       the backend, not initialised; whatever the test starts is shut down
    gate           holds tasks open without a sleep: they block until the test says `open`
    counter        counts across processes and their deaths
    signal         an actor others wait on through `get`, so that a waiter gives its CPU back
    run_driver     a script of its own as the driver, in a process of its own

Two rules keep tests independent of how pytest imports them. Remote functions and classes are
defined inside the test, so that they travel by value: a worker can import no test module. And
what they close over is plain: `enter = gate.enter`, never the fixture object.

What must not go in: anything that reaches behind the public API of either backend.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import importlib.util
import os
import selectors
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BACKEND = os.environ.get("HPCRAY_TEST_BACKEND", "hpcray")

# Long enough for a worker start on a loaded machine, short enough to point at the test that hangs.
WAIT_S = 20.0
TEST_TIMEOUT_S = 60

# What Ray needs to be quiet and local; hpcray has no such services to switch off.
_INIT_OF_BACKEND: dict[str, dict[str, Any]] = {
    "ray": {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False},
    "hpcray": {},
}


_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


def pytest_configure(config: pytest.Config) -> None:
    if BACKEND not in _INIT_OF_BACKEND:
        raise pytest.UsageError(
            f"HPCRAY_TEST_BACKEND={BACKEND!r}: use one of {', '.join(_INIT_OF_BACKEND)}"
        )
    config.addinivalue_line(
        "markers", "hpcray_only(why): hpcray promises this and Ray does not; skipped on Ray"
    )
    config.addinivalue_line(
        "markers", "not_yet(what): Ray has this and hpcray refuses it with a sentence so far"
    )
    config.addinivalue_line(
        "markers", "ray_differs(why): hpcray deliberately does better than Ray; skipped on Ray"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_TIMEOUT_S))
        if BACKEND == "ray":
            # Ray's own warnings and daemons are not this project's to fix.
            item.add_marker(pytest.mark.filterwarnings("default"))
            item.add_marker(pytest.mark.leaves_behind("the oracle's processes are Ray's"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if BACKEND != "ray":
        mark = item.get_closest_marker("not_yet")
        if mark is not None:
            pytest.skip(f"not yet: {mark.args[0]}")
        return
    for name in ("hpcray_only", "ray_differs"):
        mark = item.get_closest_marker(name)
        if mark is not None:
            pytest.skip(f"{name}: {mark.args[0]}")


# --- the backend and its clusters -----------------------------------------------------------------


class Clusters:
    """The running cluster of this module, restarted only when a test asks for another shape.

    The next test finds out by itself that the last one shut down or crashed the cluster: it asks
    `is_initialized` and compares the keywords, and trusts nothing else.
    """

    def __init__(self, backend: ModuleType) -> None:
        self.backend = backend
        self._shape: dict[str, Any] | None = None

    def require(self, **shape: Any) -> ModuleType:
        if self._shape != shape or not self.backend.is_initialized():
            self.stop()
            self.backend.init(**_INIT_OF_BACKEND[BACKEND], **shape)
            self._shape = shape
        return self.backend

    def stop(self) -> None:
        self._shape = None
        if self.backend.is_initialized():
            self.backend.shutdown()


@pytest.fixture(scope="session")
def backend() -> ModuleType:
    return importlib.import_module(BACKEND)


@pytest.fixture(scope="session")
def init_options() -> dict[str, Any]:
    """What a test that calls `init` itself adds to it."""
    return _INIT_OF_BACKEND[BACKEND]


@pytest.fixture(scope="module")
def _clusters(backend: ModuleType) -> Iterator[Clusters]:
    clusters = Clusters(backend)
    yield clusters
    clusters.stop()


@pytest.fixture
def ray(_clusters: Clusters, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    yield _clusters.require(num_cpus=2)
    if request.node.stash.get(_FAILED, False):
        # It may have left a task running or an actor dead: one fault must not fail the neighbours.
        _clusters.stop()


@pytest.fixture
def cluster(_clusters: Clusters) -> Iterator[Callable[..., ModuleType]]:
    yield _clusters.require
    # A cluster of a test's own ends with it, so that the module's shape is not left to chance.
    _clusters.stop()


@pytest.fixture
def bare_ray(_clusters: Clusters) -> Iterator[ModuleType]:
    _clusters.stop()
    yield _clusters.backend
    _clusters.stop()


# --- holding races open ---------------------------------------------------------------------------


def _entrance(lock_path: str, arrivals_path: str) -> Callable[..., Any]:
    # A nested function, because cloudpickle sends those by value.
    def enter(value: Any = None) -> Any:
        """Say that this process arrived, block until the gate is open, return `value`."""
        import fcntl
        import os

        arrivals = os.open(arrivals_path, os.O_WRONLY)
        os.write(arrivals, b".")
        os.close(arrivals)
        with open(lock_path) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
        return value

    return enter


class Gate:
    """Closed until `open`: whoever calls `enter` (anywhere on this machine) blocks in the kernel.

    A lock on a file and not an actor, since a task that waits for an actor gives its CPU back, and
    many of these tests are about who holds one. The lock falls when the test process dies, so
    nothing stays blocked behind a failure.
    """

    def __init__(self, folder: Path, name: str) -> None:
        lock_path, arrivals_path = folder / f"{name}.lock", folder / f"{name}.arrivals"
        self._lock = open(lock_path, "w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.mkfifo(arrivals_path)
        # Read-write, so that the FIFO never reports end of file between two arrivals.
        self._arrivals_fd = os.open(arrivals_path, os.O_RDWR | os.O_NONBLOCK)
        self._arrived = 0
        self.enter = _entrance(str(lock_path), str(arrivals_path))

    def wait_for_arrivals(self, count: int = 1, timeout_s: float = WAIT_S) -> None:
        """Return once `enter` has been called `count` times in all."""
        deadline_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._arrivals_fd, selectors.EVENT_READ)
            while self._arrived < count:
                if not selector.select(max(0.0, deadline_s - time.monotonic())):
                    raise TimeoutError(f"{self._arrived} of {count} arrived within {timeout_s} s")
                self._arrived += len(os.read(self._arrivals_fd, 4096))

    def arrivals(self) -> int:
        """How many have arrived by now."""
        with contextlib.suppress(BlockingIOError):
            self._arrived += len(os.read(self._arrivals_fd, 65536))
        return self._arrived

    def open(self) -> None:
        """Let everybody through, now and later."""
        fcntl.flock(self._lock, fcntl.LOCK_UN)

    def close(self) -> None:
        self.open()
        self._lock.close()
        os.close(self._arrivals_fd)


@pytest.fixture
def make_gate(tmp_path: Path) -> Iterator[Callable[[], Gate]]:
    gates: list[Gate] = []

    def make() -> Gate:
        gates.append(Gate(tmp_path, f"gate{len(gates)}"))
        return gates[-1]

    yield make
    for gate in gates:
        gate.close()


@pytest.fixture
def gate(make_gate: Callable[[], Gate]) -> Gate:
    return make_gate()


def _adder(path: str) -> Callable[[], int]:
    def add() -> int:
        """Count one and return how many there are now, this one included."""
        import os

        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, b".")
            return os.fstat(fd).st_size
        finally:
            os.close(fd)

    return add


class Counter:
    """Counts events in any process; what a killed process had counted stays counted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()
        self.add = _adder(str(path))

    @property
    def value(self) -> int:
        return self._path.stat().st_size


@pytest.fixture
def counter(tmp_path: Path) -> Counter:
    return Counter(tmp_path / "counter")


@pytest.fixture
def signal(ray: ModuleType) -> Any:
    """An actor with `send` and `wait`; `get(signal.wait.remote())` returns after `send`."""

    @ray.remote(num_cpus=0)
    class Signal:
        def __init__(self) -> None:
            import asyncio

            self._event = asyncio.Event()

        async def send(self) -> None:
            self._event.set()

        async def wait(self) -> None:
            await self._event.wait()

    return Signal.remote()


@pytest.fixture
def eventually() -> Callable[..., None]:
    """`eventually(condition)`: for what is documented as a view that follows the truth.

    Not for results: those are waited for with `get`. The deadline is the failure.
    """

    def wait(condition: Callable[[], Any], timeout_s: float = WAIT_S) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {condition}"
            time.sleep(0.01)

    return wait


# --- drivers of their own -------------------------------------------------------------------------


@pytest.fixture
def run_driver(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script, with `ray` imported, as a driver of its own; its output is text.

    `prelude=False` leaves the `import` to the script; `environ` is added to the environment.
    Killed, and the test failed, after `timeout_s`.
    """

    def run(
        script: str, *, timeout_s: float = 40.0, check: bool = True, log_to_driver: bool = False,
        prelude: bool = True, **environ: str,
    ) -> subprocess.CompletedProcess[str]:
        options = dict(_INIT_OF_BACKEND[BACKEND])
        if log_to_driver:
            options.pop("log_to_driver", None)
        head = f"import {BACKEND} as ray\nINIT = {options!r}\n" if prelude else ""
        path = tmp_path / "driver.py"
        path.write_text(head + textwrap.dedent(script))
        spec = importlib.util.find_spec(BACKEND)
        assert spec is not None and spec.origin is not None
        root = str(Path(spec.origin).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "RAY_DEDUP_LOGS": "0",
               **environ}
        done = subprocess.run(
            [sys.executable, str(path)], env=env, cwd=tmp_path, capture_output=True, text=True,
            timeout=timeout_s, stdin=subprocess.DEVNULL,
        )
        if check:
            assert done.returncode == 0, f"driver exited {done.returncode}\n{done.stderr}"
        return done

    return run
