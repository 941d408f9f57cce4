"""Private names that Ray's libraries want of modules of hpcray (see `table.EXTRA_NAMES`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hpcray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    NodeLabelSchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

SchedulingStrategyT = (
    None | str | PlacementGroupSchedulingStrategy | NodeAffinitySchedulingStrategy
    | NodeLabelSchedulingStrategy)


class NextValueNotReady(Exception):
    """RLlib's threads give it to each other."""


def valid_resource_shape(
    resources: Mapping[str, float], bundle_specs: Iterable[Mapping[str, float]]
) -> bool:
    """Whether some bundle has room for these resources."""
    return any(
        all(bundle.get(name, 0) >= amount for name, amount in resources.items() if name != "bundle")
        for bundle in bundle_specs)


def dumps_debug(value: Any, *args: Any, **kwargs: Any) -> bytes:
    """`cloudpickle.dumps`; what fails says which part of it did."""
    from hpcray import cloudpickle
    from hpcray.util.check_serialize import inspect_serializability

    try:
        return bytes(cloudpickle.dumps(value, *args, **kwargs))
    except (TypeError, AttributeError) as error:
        inspect_serializability(value)
        raise TypeError(f"{value!r} cannot be pickled: {error}") from error


def mark_annotated(obj: Any, annotation_type: Any = None, api_group: str = "Others") -> None:
    """Ray's decorators leave a mark that its documentation tools read; nobody reads it here."""
