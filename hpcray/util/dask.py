"""Dask collections computed by hpcray: a Dask scheduler whose tasks are tasks here.

    with enable_dask_on_ray():
        array.mean().compute()          # or: dask.compute(x, scheduler=ray_dask_get)

Every node of Dask's graph is one task; what it depends on is passed as refs, so chunks stay in
shared memory and move between nodes only where they are needed. Dask's own optimisations (fusing,
culling) happen before. Needs Dask 2024.12 or newer, whose graphs are made of `Task` objects.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import dask
from dask._task_spec import Alias, DataNode, GraphNode, convert_legacy_graph
from dask.core import flatten, toposort
from dask.utils import key_split

from hpcray import api
from hpcray.absent import attributes
from hpcray.client.references import ObjectRef

_REMOTE_ARGS = "ray_remote_args"


def ray_dask_get(dsk: Any, keys: Any, **kwargs: Any) -> Any:
    """Compute `keys` (nested as they come) of the graph; for `compute(scheduler=ray_dask_get)`.

    Args:
      ray_remote_args: options of the tasks, as in `f.options(...)`;
        `dask.annotate(ray_remote_args=...)` gives some tasks their own.

    Raises:
      TaskError: a task raised; an instance of the exception's own type too.
    """
    return _compute(dsk, keys, kwargs, one_by_one=False)


def ray_dask_get_sync(dsk: Any, keys: Any, **kwargs: Any) -> Any:
    """The same with one task at a time, for looking for mistakes."""
    return _compute(dsk, keys, kwargs, one_by_one=True)


def enable_dask_on_ray(
    shuffle: str | None = "tasks", use_shuffle_optimization: bool = True
) -> Any:
    """Make `ray_dask_get` Dask's scheduler: from now on, or as a context manager for its body.

    `shuffle` is Dask's method for data frames; tasks are the only one that works between
    processes without Dask's own cluster. `use_shuffle_optimization` is Ray's and has no effect.
    """
    return dask.config.set({"scheduler": ray_dask_get, "dataframe.shuffle.method": shuffle})


def disable_dask_on_ray() -> Any:
    """Dask's own schedulers again."""
    return dask.config.set({"scheduler": None, "dataframe.shuffle.method": None})


def _compute(dsk: Any, keys: Any, kwargs: dict[str, Any], *, one_by_one: bool) -> Any:
    if kwargs.get("ray_persist"):
        raise NotImplementedError(
            "ray_persist=True is not supported: persist() keeps values in the driver; "
            "to keep chunks in the store, compute what follows in the same call")
    options = _options(dsk, kwargs.get(_REMOTE_ARGS) or {})
    # Collections come as an expression, hand-made graphs as a mapping.
    graph = convert_legacy_graph(dsk if isinstance(dsk, Mapping) else dsk.__dask_graph__())
    refs = _submit(graph, set(flatten([keys])), options, one_by_one=one_by_one)
    return _collect(keys, refs)


def _submit(
    graph: dict[Hashable, GraphNode], wanted: set[Hashable],
    options: dict[Hashable, dict[str, Any]], *, one_by_one: bool,
) -> dict[Hashable, ObjectRef[Any]]:
    """A ref for every wanted key, and for all it needs: refs go as soon as nobody needs them."""
    needed = _reachable(graph, wanted)
    users = dict.fromkeys(needed, 0)
    for key in needed:
        for dependency in graph[key].dependencies:
            users[dependency] += 1
    refs: dict[Hashable, ObjectRef[Any]] = {}
    order = toposort({key: graph[key] for key in needed},
                     dependencies={key: graph[key].dependencies for key in needed})
    functions: dict[tuple[str, str], Any] = {}
    for key in order:
        node = graph[key]
        names = sorted(node.dependencies, key=str)
        if isinstance(node, Alias):
            refs[key] = refs[node.target]
        elif isinstance(node, DataNode):
            refs[key] = api.put(node.value)
        else:
            given = options.get(key, options[None])
            kind = key_split(key), repr(given)
            if kind not in functions:
                functions[kind] = _run.options(**{"name": f"dask:{kind[0]}", **given})
            refs[key] = functions[kind].remote(node, names, *[refs[name] for name in names])
            if one_by_one:
                api.get(refs[key])
        for name in names:
            users[name] -= 1
            if not users[name] and name not in wanted:
                del refs[name]
    return refs


@api.remote
def _run(node: Any, names: list[Hashable], *values: Any) -> Any:
    return node(dict(zip(names, values, strict=True)))


def _reachable(graph: dict[Hashable, GraphNode], wanted: set[Hashable]) -> set[Hashable]:
    found: set[Hashable] = set()
    open_keys = list(wanted)
    while open_keys:
        key = open_keys.pop()
        if key not in found:
            found.add(key)
            open_keys.extend(graph[key].dependencies)
    return found


def _collect(keys: Any, refs: Mapping[Hashable, ObjectRef[Any]]) -> Any:
    """The values, in one `get`, nested as the keys are: lists nest, and anything else is a key."""
    flat = list(flatten([keys]))
    values = iter(api.get([refs[key] for key in flat]))

    def fill(part: Any) -> Any:
        return tuple(map(fill, part)) if isinstance(part, list) else next(values)

    return fill(keys)


def _options(dsk: Any, common: dict[str, Any]) -> dict[Hashable, dict[str, Any]]:
    """Options of tasks by key; None: of all others."""
    annotations: dict[str, Any] = getattr(dsk, "__dask_annotations__", dict)()
    own = annotations.get(_REMOTE_ARGS) or {}
    return {None: common, **{key: {**common, **given} for key, given in own.items()}}


__getattr__ = attributes(__name__)

__all__ = ["disable_dask_on_ray", "enable_dask_on_ray", "ray_dask_get", "ray_dask_get_sync"]
