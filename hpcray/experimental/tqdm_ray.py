"""Progress of tasks and actors, told to the driver: `tqdm_ray.tqdm` in place of tqdm's own.

A bar is a line of text now and then, through the output of whoever has it; so it reaches the
driver's terminal from any worker, and needs neither tqdm nor a terminal.

    for item in tqdm_ray.tqdm(items, desc="simulate"): ...      simulate: 250/1000 (25%) 12.5 it/s
"""

import builtins
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

FLUSH_INTERVAL_S = 2.0


def safe_print(*args: Any, **kwargs: Any) -> None:
    """`print`. (Ray's hides its bars meanwhile; these need not be hidden.)"""
    builtins.print(*args, **kwargs)


class tqdm:
    """Counts, and says how far it is.

    Args:
      iterable: what is counted as it is taken.
      total: how many there will be; of an iterable that has a length, that.
      position: accepted, without effect: bars are lines.
      flush_interval_s: seconds from one line to the next.
    """

    def __init__(
        self, iterable: Iterable[Any] | None = None, desc: str | None = None,
        total: int | None = None, unit: str | None = None, position: int | None = None,
        flush_interval_s: float | None = None,
    ) -> None:
        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)  # type: ignore[arg-type]
        self._iterable = iterable
        self._desc = desc or ""
        self._unit = unit or "it"
        self._interval_s = FLUSH_INTERVAL_S if flush_interval_s is None else flush_interval_s
        self._began_s = self._told_s = time.monotonic()
        self._told: int | None = None
        self._closed = False
        self.total = total
        self.n = 0

    def set_description(self, desc: str) -> None:
        self._desc = desc

    def update(self, n: int = 1) -> None:
        """So many more are done."""
        self.n += n
        if time.monotonic() - self._told_s >= self._interval_s:
            self.refresh()

    def refresh(self) -> None:
        """Say now how far it is."""
        self._told_s = now_s = time.monotonic()
        self._told = self.n
        head = f"{self._desc}: " if self._desc else ""
        done = f"{self.n}"
        if self.total:
            done += f"/{self.total} ({100 * self.n // self.total}%)"
        took_s = now_s - self._began_s
        rate = f" {self.n / took_s:.3g} {self._unit}/s" if took_s > 0 else f" {self._unit}"
        safe_print(f"{head}{done}{rate}", file=sys.stdout, flush=True)

    def close(self) -> None:
        """Say how far it came, unless that is said."""
        if not self._closed:
            self._closed = True
            if self._told != self.n:
                self.refresh()

    def __iter__(self) -> Iterator[Any]:
        if self._iterable is None:
            raise ValueError("tqdm() was given nothing to iterate over; use update()")
        try:
            for item in self._iterable:
                yield item
                self.update()
        finally:
            self.close()

    def __enter__(self) -> "tqdm":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


__all__ = ["safe_print", "tqdm"]
