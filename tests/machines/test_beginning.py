"""The facts of a job reach every node once, and nobody sends or encodes the square of the nodes."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from hpcray.node import beginning
from hpcray.protocol import ids
from hpcray.protocol import messages as m


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 18, 273, 1000, 5000])
def test_everybody_gets_it_once(size: int) -> None:
    got: Counter[int] = Counter()
    steps, reached = 0, [0]
    while reached:
        following = []
        for rank in reached:
            children = beginning.children(rank, size)
            assert len(children) <= beginning.FANOUT
            following += children
        got.update(following)
        reached = following
        steps += bool(following)
    assert got == dict.fromkeys(range(1, size), 1)
    assert steps <= (1 if size <= 17 else 2 if size <= 273 else 3 if size <= 4369 else 4)


def facts(size: int) -> tuple[m.Begin, dict[str, object]]:
    nodes = [m.Joined(
        rank, f"node{rank:04}.cluster", f"10.1.{rank >> 8}.{rank & 255}", 100_000 + 7 * rank,
        (("CPU", 64 * m.UNIT), ("memory", (1 << 38) * m.UNIT + rank), ("GPU", 4 * m.UNIT),
         (f"node:10.1.{rank >> 8}.{rank & 255}", m.UNIT)),
        (("hpcray.io/host", f"node{rank:04}.cluster"),
         ("ray.io/node-id", ids.node_id_hex(rank, "ab" * 16)))) for rank in range(size)]
    session = {"nodes": nodes, "job_key": "ab" * 16, "gpus": [["0", "1"]] * size, "config": {}}
    return beginning.pack(b"j", session), session


def test_what_is_unpacked_is_what_was_packed() -> None:
    message, session = facts(3)
    found = beginning.unpack(m.decode_to_peer(m.encode([message]))[0])
    assert msgspec.convert(found.pop("nodes"), list[m.Joined]) == session.pop("nodes")
    assert found == session


def test_a_node_sends_at_most_two_megabytes() -> None:
    """At 1,000 nodes; node 0 has sent 500 MB when it told each of all."""
    message, _ = facts(1000)
    assert len(m.encode([message])) * beginning.FANOUT < 2_000_000
