"""The joblib backend, where joblib is installed."""

from __future__ import annotations

import sys
import time
from types import ModuleType

import numpy as np
import pytest


def test_without_joblib_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from hpcray.util.joblib import register_ray

    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(ImportError, match="pip install joblib"):
        register_ray()


@pytest.fixture
def joblib(ray: ModuleType) -> ModuleType:
    module: ModuleType = pytest.importorskip("joblib")
    from hpcray.util.joblib import register_ray

    register_ray()
    return module


def test_parallel(joblib: ModuleType) -> None:
    with joblib.parallel_config(backend="ray"):
        assert joblib.effective_n_jobs(-1) == 2
        found = joblib.Parallel()(joblib.delayed(pow)(i, 2) for i in range(50))
        assert found == [i * i for i in range(50)]
        generated = joblib.Parallel(return_as="generator")(
            joblib.delayed(abs)(-i) for i in range(10))
        assert list(generated) == list(range(10))


def test_a_failing_call(joblib: ModuleType) -> None:
    def fail(i: int) -> int:
        return 1 // (i - 5)

    with joblib.parallel_config(backend="ray", n_jobs=2):
        with pytest.raises(ZeroDivisionError):
            joblib.Parallel()(joblib.delayed(fail)(i) for i in range(20))
        assert joblib.Parallel()(joblib.delayed(abs)(i) for i in range(3)) == [0, 1, 2]


def test_nothing_of_a_failed_call_is_left_to_the_next(joblib: ModuleType) -> None:
    """The error may come while joblib is still submitting: what it has not submitted is dropped."""
    def fail(i: int) -> int:
        raise ValueError(i)

    with joblib.parallel_config(backend="ray", n_jobs=2), joblib.Parallel() as parallel:
        dispatch = parallel.dispatch_one_batch

        def dispatch_and_wait(iterator: object) -> bool:
            more: bool = dispatch(iterator)
            deadline_s = time.monotonic() + 60
            while not parallel._aborting and time.monotonic() < deadline_s:
                time.sleep(0.001)
            return more

        parallel.dispatch_one_batch = dispatch_and_wait
        with pytest.raises(ValueError, match="0"):
            parallel(joblib.delayed(fail)(i) for i in range(4))
        parallel.dispatch_one_batch = dispatch
        assert parallel(joblib.delayed(abs)(-i) for i in range(4)) == [0, 1, 2, 3]


def test_a_shared_array_arrives(joblib: ModuleType) -> None:
    data = np.arange(300_000, dtype=np.float64)

    def at(array: np.ndarray, index: int) -> tuple[float, bool]:
        return float(array[index]), bool(array.flags.writeable)

    with joblib.parallel_config(backend="ray", n_jobs=2):
        found = joblib.Parallel()(joblib.delayed(at)(data, i) for i in range(6))
    assert found == [(float(i), False) for i in range(6)]


def test_nested(joblib: ModuleType) -> None:
    def inner(n: int) -> list[int]:
        import joblib

        return list(joblib.Parallel(n_jobs=2)(joblib.delayed(abs)(-i) for i in range(n)))

    with joblib.parallel_config(backend="ray", n_jobs=2):
        assert joblib.Parallel()(joblib.delayed(inner)(n) for n in (2, 3)) == [[0, 1], [0, 1, 2]]
