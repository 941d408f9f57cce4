# /// script
# dependencies = ["sf-hamilton"]
# ///
"""sf-hamilton runs a graph of functions with its `RayGraphAdapter`, and with `RayTaskExecutor`."""

import types

import pandas as pd
import ray
import ray.cloudpickle
from hamilton import ad_hoc_utils, base, driver
from hamilton.execution import executors
from hamilton.function_modifiers.metadata import ray_remote_options
from hamilton.htypes import Collect, Parallelizable
from hamilton.plugins import h_ray


def spend(start: int) -> pd.Series:
    return pd.Series([start, 20, 30])


def signups() -> pd.Series:
    return pd.Series([1, 10, 50])


@ray_remote_options(num_cpus=1, max_retries=2)
def per_signup(spend: pd.Series, signups: pd.Series) -> pd.Series:
    return spend / signups


def number(count: int) -> Parallelizable[int]:
    yield from range(count)


def square(number: int) -> int:
    return number**2


def total(square: Collect[int]) -> int:
    return sum(square)


def module(name: str, *functions: types.FunctionType) -> types.ModuleType:
    made = ad_hoc_utils.create_temporary_module(*functions, module_name=name)
    ray.cloudpickle.register_pickle_by_value(made)  # workers have no file to import it from
    return made


if __name__ == "__main__":
    adapter = h_ray.RayGraphAdapter(
        base.PandasDataFrameResult(), ray_init_config={"num_cpus": 2})
    graph = driver.Builder().with_modules(module("costs", spend, signups, per_signup))
    frame = graph.with_adapters(adapter).build().execute(
        ["spend", "per_signup"], inputs={"start": 10})
    assert frame["per_signup"].tolist() == [10.0, 2.0, 0.6]
    ray.shutdown()

    squares = (
        driver.Builder().enable_dynamic_execution(allow_experimental_mode=True)
        .with_modules(module("squares", number, square, total))
        .with_local_executor(executors.SynchronousLocalTaskExecutor())
        .with_remote_executor(h_ray.RayTaskExecutor(num_cpus=2)).build())
    assert squares.execute(["total"], inputs={"count": 10}) == {"total": 285}
