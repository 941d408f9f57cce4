"""Results as they become ready: `as_completed` over refs, `map_unordered` over items.

What must not go in: anything behind the public API.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hpcray import api

CHUNK_SIZE = 10
BACKPRESSURE_SIZE = 100


def as_completed(
    refs: Sequence[Any], *, chunk_size: int = CHUNK_SIZE, yield_obj_refs: bool = False,
    timeout: float | None = None, fetch_local: bool = True,
) -> Iterator[Any]:
    """Yield the values of the refs, `chunk_size` at a time, roughly in the order they are ready.

    Args:
      yield_obj_refs: yield the refs instead.
      timeout: seconds; a chunk that is not complete by then is yielded as far as it is.

    Raises:
      ValueError: `chunk_size` is below 1.
    """
    if chunk_size < 1:
        raise ValueError("`chunk_size` must be >= 1")
    return _ready(list(refs), 0, chunk_size, yield_obj_refs, timeout, fetch_local)


def map_unordered(
    fn: Any, items: Iterable[Any], *, backpressure_size: int | None = BACKPRESSURE_SIZE,
    chunk_size: int = CHUNK_SIZE, yield_obj_refs: bool = False, timeout: float | None = None,
    fetch_local: bool = True,
) -> Iterator[Any]:
    """Call a remote function for each item; yield the results, roughly as they are ready.

    Args:
      backpressure_size: at most so many calls are in flight; None: no limit.

    The other arguments are those of `as_completed`.

    Raises:
      ValueError: `backpressure_size` or `chunk_size` is below 1.
    """
    if backpressure_size is not None and backpressure_size <= 0:
        raise ValueError("backpressure_size must be positive.")
    if chunk_size < 1:
        raise ValueError("`chunk_size` must be >= 1")
    return _map(fn, items, backpressure_size, chunk_size, yield_obj_refs, timeout, fetch_local)


def _map(
    fn: Any, items: Iterable[Any], limit: int | None, chunk_size: int, as_refs: bool,
    timeout_s: float | None, fetch_local: bool,
) -> Iterator[Any]:
    refs: list[Any] = []
    for item in items:
        refs.append(fn.remote(item))
        if limit is not None and len(refs) >= limit:
            yield from _ready(refs, limit - 1, chunk_size, as_refs, timeout_s, fetch_local)
    yield from _ready(refs, 0, chunk_size, as_refs, timeout_s, fetch_local)


def _ready(
    refs: list[Any], keep: int, chunk_size: int, as_refs: bool, timeout_s: float | None,
    fetch_local: bool,
) -> Iterator[Any]:
    """Take from `refs` what is ready until at most `keep` are left."""
    while len(refs) > keep:
        ready, refs[:] = api.wait(
            refs, num_returns=min(chunk_size, len(refs)), timeout=timeout_s,
            fetch_local=fetch_local)
        yield from ready if as_refs else api.get(ready)


__all__ = ["as_completed", "map_unordered"]
