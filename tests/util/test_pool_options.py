"""`ray_remote_args`: the options of a Pool's processes and of joblib's tasks."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest

ENV = {"env_vars": {"OF_POOL": "yes"}}


@pytest.fixture
def look(ray: ModuleType) -> Any:
    def look(_: Any = None) -> tuple[Any, Any, bool]:
        import os

        context = ray.get_runtime_context()
        return (context.get_assigned_resources(), os.environ.get("OF_POOL"),
                context.get_actor_id() is not None)

    return look


@pytest.fixture(scope="module")
def Pool(ray: ModuleType) -> Any:
    return importlib.import_module(f"{ray.__name__}.util.multiprocessing").Pool


def test_options_of_processes(Pool: Any, look: Any) -> None:
    with Pool(2, ray_remote_args={"num_cpus": 0.5, "runtime_env": ENV}) as pool:
        assert pool.map(look, range(6), chunksize=1) == [({"CPU": 0.5}, "yes", True)] * 6


@pytest.mark.ray_differs("Ray's processes keep the CPUs of actors")
def test_processes_hold_nothing_by_default(Pool: Any, look: Any) -> None:
    with Pool(2) as pool:
        assert pool.apply(look) == ({}, None, True)


def test_a_process_that_replaces_another_has_its_options(Pool: Any, look: Any) -> None:
    args = {"num_cpus": 1, "runtime_env": ENV}
    with Pool(1, maxtasksperchild=1, ray_remote_args=args) as pool:
        assert [pool.apply(look) for _ in range(3)] == [({"CPU": 1.0}, "yes", True)] * 3


def test_processes_that_hold_cpus_leave_none_to_tasks(Pool: Any, ray: ModuleType) -> None:
    task = ray.remote(lambda: 1)
    pool = Pool(2, ray_remote_args={"num_cpus": 1})
    try:
        waiting = task.remote()
        assert ray.wait([waiting], timeout=0.3)[0] == []
    finally:
        pool.terminate()
        pool.join()
    assert ray.get(waiting, timeout=20) == 1


def test_options_that_actors_do_not_have(Pool: Any) -> None:
    with pytest.raises(ValueError, match="max_retries"):
        Pool(1, ray_remote_args={"max_retries": 1})


# --- joblib ---------------------------------------------------------------------------------------


@pytest.fixture
def joblib(ray: ModuleType) -> ModuleType:
    module: ModuleType = pytest.importorskip("joblib")
    importlib.import_module(f"{ray.__name__}.util.joblib").register_ray()
    return module


OPTIONS = {"num_cpus": 0.5, "runtime_env": ENV}
FOUND = [({"CPU": 0.5}, "yes", False)] * 4


@pytest.mark.hpcray_only("joblib's calls are processes of a pool in Ray")
def test_options_of_joblib_by_config(joblib: ModuleType, look: Any) -> None:
    with joblib.parallel_config(backend="ray", n_jobs=2, ray_remote_args=OPTIONS):
        assert joblib.Parallel()(joblib.delayed(look)(i) for i in range(4)) == FOUND
    with joblib.parallel_config(backend="ray", n_jobs=2):
        found = joblib.Parallel()(joblib.delayed(look)(i) for i in range(4))
    assert found == [({"CPU": 1.0}, None, False)] * 4


@pytest.mark.hpcray_only("joblib's calls are processes of a pool in Ray")
def test_options_of_joblib_by_call(joblib: ModuleType, look: Any) -> None:
    parallel = joblib.Parallel(n_jobs=2, backend="ray", ray_remote_args=OPTIONS)
    for _ in range(2):
        assert parallel(joblib.delayed(look)(i) for i in range(4)) == FOUND


@pytest.mark.hpcray_only("joblib's calls are processes of a pool in Ray")
@pytest.mark.parametrize("given_to", ["parallel_config", "Parallel"])
def test_options_of_joblib_stay_after_an_error(
    joblib: ModuleType, look: Any, given_to: str
) -> None:
    def fail(_: int) -> None:
        raise ValueError("failed")

    options: dict[str, Any] = {"backend": "ray", "n_jobs": 2, "ray_remote_args": OPTIONS}
    both = (options, {}) if given_to == "parallel_config" else ({"backend": "ray"}, options)
    with joblib.parallel_config(**both[0]), joblib.Parallel(**both[1]) as parallel:
        with pytest.raises(ValueError, match="failed"):
            parallel(joblib.delayed(fail)(i) for i in range(4))
        assert parallel(joblib.delayed(look)(i) for i in range(4)) == FOUND
