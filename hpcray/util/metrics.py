"""Counters, gauges and histograms of a program, under Ray's names.

Values are checked and kept in the process that reports them; nothing collects or shows them yet.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any


class Metric:
    """What the three kinds have in common: a name, and values by their tags."""

    def __init__(self, name: str, description: str = "", tag_keys: tuple[str, ...] | None = None
                 ) -> None:
        """Raises TypeError: `tag_keys` is no tuple of str."""
        keys = () if tag_keys is None else tag_keys
        if not isinstance(keys, tuple) or not all(isinstance(key, str) for key in keys):
            raise TypeError(f"tag_keys is a tuple of str, not {tag_keys!r}")
        self._name = name
        self._description = description
        self._tag_keys = keys
        self._default_tags: dict[str, str] = {}
        self._lock = threading.Lock()
        self._values: dict[tuple[tuple[str, str], ...], Any] = {}

    def set_default_tags(self, default_tags: Mapping[str, str]) -> "Metric":
        """Tags of every value that does not say otherwise.

        Raises:
          ValueError: a tag is not among `tag_keys`.
          TypeError: a value is no str.
        """
        unknown = [key for key in default_tags if key not in self._tag_keys]
        if unknown:
            raise ValueError(f"{self._name} has no tags {', '.join(map(repr, unknown))}: its "
                             f"tag_keys are {list(self._tag_keys)}")
        self._default_tags = self._checked(default_tags)
        return self

    def _checked(self, tags: Mapping[str, str] | None) -> dict[str, str]:
        for key, value in (tags or {}).items():
            if not isinstance(value, str):
                raise TypeError(f"the tag {key!r} of {self._name} is a str, not {value!r}")
        return dict(tags or {})

    def _key(self, tags: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
        """Of a value. Tags beyond `tag_keys` are its own, as in Ray."""
        found = {**self._default_tags, **self._checked(tags)}
        missing = [key for key in self._tag_keys if key not in found]
        if missing:
            raise ValueError(f"{self._name} needs the tags {', '.join(missing)}")
        return tuple(sorted(found.items()))

    @property
    def info(self) -> dict[str, Any]:
        """Name, description, tag_keys and default_tags."""
        return {"name": self._name, "description": self._description,
                "tag_keys": self._tag_keys, "default_tags": dict(self._default_tags)}

    def __reduce__(self) -> Any:
        return _again, (type(self), self._arguments(), self._default_tags)

    def _arguments(self) -> tuple[Any, ...]:
        return (self._name, self._description, self._tag_keys)


def _again(kind: type[Metric], arguments: tuple[Any, ...], default_tags: dict[str, str]) -> Metric:
    return kind(*arguments).set_default_tags(default_tags)


class Counter(Metric):
    """A sum that only grows."""

    def inc(self, value: float = 1.0, tags: Mapping[str, str] | None = None) -> None:
        """Raises ValueError: `value` is not above 0, or a tag is missing."""
        if not isinstance(value, (int, float)):
            raise TypeError(f"inc() takes a number, not {value!r}")
        if value <= 0:
            raise ValueError(f"inc() takes a number above 0, not {value!r}")
        key = self._key(tags)
        with self._lock:
            self._values[key] = self._values.get(key, 0.0) + value


class Gauge(Metric):
    """A value that comes and goes."""

    def set(self, value: float | None, tags: Mapping[str, str] | None = None) -> None:
        """None: as if not given."""
        if value is None:
            return
        if not isinstance(value, (int, float)):
            raise TypeError(f"set() takes a number, not {value!r}")
        key = self._key(tags)
        with self._lock:
            self._values[key] = value


class Histogram(Metric):
    """How often values fell between boundaries."""

    def __init__(self, name: str, description: str = "", boundaries: Sequence[float] | None = None,
                 tag_keys: tuple[str, ...] | None = None) -> None:
        super().__init__(name, description, tag_keys)
        if not boundaries:
            raise ValueError(f"{name} needs boundaries, such as [0.1, 1, 10]")
        if any(bound <= 0 for bound in boundaries):
            raise ValueError(f"boundaries are above 0, and in {list(boundaries)} are others")
        self.boundaries = list(boundaries)

    def observe(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        if not isinstance(value, (int, float)):
            raise TypeError(f"observe() takes a number, not {value!r}")
        key = self._key(tags)
        with self._lock:
            counts = self._values.setdefault(key, [0] * (len(self.boundaries) + 1))
            counts[sum(value > bound for bound in self.boundaries)] += 1

    @property
    def info(self) -> dict[str, Any]:
        return {**super().info, "boundaries": self.boundaries}

    def _arguments(self) -> tuple[Any, ...]:
        return (self._name, self._description, self.boundaries, self._tag_keys)


__all__ = ["Counter", "Gauge", "Histogram"]
