"""What things cost: seconds of a processor, measured once and kept in a file.

    costs.toml <-- measure.py: real machines and real processes of one computer
        |
        +--> node.py, process.py: what was done, counted, times what each of it costs

Counting makes a simulated run repeatable: the clock of the computer that simulates does not enter
it. What counting cannot see is a cost per message that grows with the cluster: report.py looks for
that with a clock, and says so.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec

from hpcray.protocol import ids
from hpcray.protocol import messages as m

FILE = Path(__file__).with_name("costs.toml")
# Stands for every kind of message that has not been met while costs were measured.
OTHER = "other"
# What these cost goes by the objects they name.
PER_OBJECT = frozenset({m.Get, m.Watch, m.Hold, m.Drop})


def weight(message: Any) -> int:
    """So many times it costs what its kind costs."""
    return max(len(message.ids) // ids.OBJECT_ID_BYTES, 1) if type(message) in PER_OBJECT else 1


class NodeCosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a node process."""

    # Of the machine's part (decided, received, sent): what a real node takes for a program, by what
    # it adds up to for the simulated one.
    factor: float
    turn_s: float  # one turn of its loop, whatever is in it
    poll_s: float  # a look at MPI, in such a turn
    decided_s: float  # a message that the end of a turn decides to send (`Machine.end_turn`)
    datagram_received_s: float
    datagram_sent_s: float
    frame_received_s: float  # MPI
    frame_sent_s: float
    # A message of this kind: decoding and handling it. Of PER_OBJECT: one object of it.
    received_s: dict[str, float]
    sent_s: dict[str, float]  # encoding it


class ClientCosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a driver or worker process."""

    submit_s: float  # one task, or one call of an actor
    value_s: float  # one result that a `get` of many waits for
    task_s: float  # around a task's own time, in the worker
    datagram_received_s: float
    datagram_sent_s: float
    start_s: float  # a worker: from the node's wish to its hello


class WireCosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Between processes: time that passes, and nobody's processor."""

    local_s: float  # a datagram on a host: until its receiver runs
    latency_s: float  # a frame between nodes
    bytes_per_s: float


class Costs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    measured: dict[str, str]  # where and when, for people
    node: NodeCosts
    client: ClientCosts
    wire: WireCosts


class CostsError(Exception):
    """A file of costs cannot be used."""


def load(path: Path = FILE) -> Costs:
    """Raises CostsError: there is no such file, or it is not one of costs."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Costs)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError,
            msgspec.ValidationError) as error:
        raise CostsError(
            f"{path} cannot be used as a file of costs: {error}. Write one with "
            f"`python -m hpcray.testing.simulate --measure --output {path}`") from None


def dump(costs: Costs) -> str:
    """As TOML; `load` reads it."""
    lines = ["# What things cost, in seconds, for the simulator (docs/scale.md). Written by",
             "# `python -m hpcray.testing.simulate --measure`."]

    def table(name: str, entries: dict[str, object]) -> None:
        lines.extend(("", f"[{name}]"))
        for key, value in entries.items():
            if isinstance(value, float):
                lines.append(f"{key} = {value:.3e}" if value < 1000 else f"{key} = {value:.0f}.0")
            elif isinstance(value, str):
                lines.append(f'{key} = "{value}"')

    table("measured", dict(costs.measured))
    for name in ("node", "client", "wire"):
        entries = msgspec.structs.asdict(getattr(costs, name))
        table(name, entries)
        for key, value in entries.items():
            if isinstance(value, dict):
                table(f"{name}.{key}", dict(sorted(value.items())))
    return "\n".join(lines) + "\n"
