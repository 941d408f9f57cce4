"""Amounts as people write them, for messages. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from hpcray.protocol import labels
from hpcray.protocol.messages import UNIT

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(nbytes: float) -> str:
    """`1.2 GiB`, `64 MiB`, `512 B`: three digits at most, binary units."""
    unit = 0
    while nbytes >= 1000 and unit < len(_UNITS) - 1:
        nbytes /= 1024
        unit += 1
    text = f"{nbytes:.1f}" if unit and nbytes < 100 else f"{nbytes:.0f}"
    return f"{text.removesuffix('.0')} {_UNITS[unit]}"


def amount(name: str, value: int) -> str:
    """One resource of a shape: `2 CPU`, `0.5 GPU`, `1.2 GiB of memory`."""
    resource, _, group = name.partition("@")
    number = value / UNIT
    text = f"{size(number)} of {resource}" if "memory" in resource else f"{number:g} {resource}"
    return f"{text} of its placement group" if group else text


def amounts(shape: tuple[tuple[str, int], ...]) -> str:
    """A shape: `1 CPU and 2 GPU`. Conditions on labels are left out."""
    found = [amount(name, value) for name, value in shape if not labels.is_condition(name)]
    return listed(found) or "no resources"


def listed(items: list[str], most: int = 4) -> str:
    """`a, b and c`; what exceeds `most` is counted."""
    if len(items) > most:
        items = [*items[: most - 1], f"{len(items) - most + 1} more"]
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def counted(items: list[str], most: int = 4) -> str:
    """The same with equal items told once: `actor A x2 and task f`."""
    counts: dict[str, int] = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return listed([f"{item} x{n}" if n > 1 else item for item, n in counts.items()], most)


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """` Did you mean num_cpus?`, or nothing if no known name is near. What all names begin with
    says nothing about how near they are."""
    import difflib  # for mistakes only: every worker would have it in memory

    ends = [one.removeprefix(prefix) for one in known]
    near = difflib.get_close_matches(name.removeprefix(prefix), ends, 1)
    return f" Did you mean {prefix}{near[0]}?" if near else ""
