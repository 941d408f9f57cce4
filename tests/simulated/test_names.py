"""Actors found by name while their last handles go, on several nodes and under many orders.

Names are on node 0, an actor's home is where it was made, it runs anywhere, and anybody may ask.
"""

from __future__ import annotations

from typing import Any

import pytest

from hpcray.protocol import ids
from hpcray.protocol.messages import UNIT
from hpcray.testing.clients import Script
from hpcray.testing.cluster import SimulatedCluster
from hpcray.testing.processes import Process
from hpcray.testing.values import SystemFailed

SEEDS = range(25)


def born(p: Process) -> None:
    pass


def answer(p: Process, number: int) -> list[Any]:
    return [number, []]


def loop(p: Process, rounds: int, rank: int) -> Script:
    """Reach the actor by its name, call it, and let go; whoever comes first makes it."""
    for number in range(rounds):
        lock = yield from p.named_actor("lock", "born", rank=rank)
        reply = p.call(lock, "answer", [number])[0]
        if number % 2:
            del lock  # before it has answered
        value = yield from p.get(reply)
        assert value == [number, []]
        lock = None


def find(p: Process, rounds: int) -> Script:
    """Whoever finds it can call it."""
    found = 0
    for number in range(rounds):
        reply, handle = yield from p.look_up("get_actor", {"namespace": "", "name": "lock"})
        if reply.error is not None:
            assert reply.error.kind == "ValueError"
            assert handle is None
            yield from p.sleep(0.0005)
            continue
        found += 1
        assert (yield from p.get(p.call(handle, "answer", [number])[0])) == [number, []]
        del handle
    return [found, []]


def again(p: Process, rounds: int, rank: int) -> Script:
    """A name is free once its actor was killed, or its only handle is gone and that was told."""
    killed = []
    for number in range(rounds):
        actor = yield from p.named_actor("mine", "born", rank=rank, get_if_exists=number % 3 == 0)
        assert (yield from p.get(p.call(actor, "answer", [number])[0])) == [number, []]
        if number % 2:
            yield from p.request("kill_actor", {"actor_id": ids.actor_of_object(actor._id)})
            killed.append(actor)
        del actor
        p.flush()


BODIES = {"born": born, "answer": answer, "loop": loop, "find": find, "again": again}


def cluster(seed: int, nodes: int = 3) -> SimulatedCluster:
    return SimulatedCluster(
        nodes, BODIES, seed=seed, lazy=0.4, resources={f"r{n}": 10 * UNIT for n in range(nodes)})


@pytest.mark.parametrize("seed", SEEDS)
def test_whoever_has_a_handle_by_name_can_call_it(seed: int) -> None:
    def program(p: Process) -> Script:
        results = [p.submit("loop", [6, (rank + 1) % 3], rank=rank)[0] for rank in (0, 1, 2, 1)]
        results += [p.submit("find", [6], rank=rank)[0] for rank in (0, 2)]
        yield from loop(p, 6, 1)
        for result in results:
            yield from p.get(result)

    c = cluster(seed)
    c.run(program(c.driver))
    c.check_nothing_is_left()
    c.history.check_each_ran_once()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_name_is_free_again(seed: int) -> None:
    def program(p: Process) -> Script:
        yield from p.get(p.submit("again", [6, 2], rank=1)[0])
        yield from p.get(p.submit("again", [6, 0], rank=0)[0])

    c = cluster(seed)
    c.run(program(c.driver))
    c.check_nothing_is_left()


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_left_of_those_who_die_over_it(seed: int) -> None:
    def program(p: Process) -> Script:
        results = [p.submit("loop", [6, (rank + 1) % 3], rank=rank, max_retries=1)[0]
                   for rank in (0, 1, 2, 0, 1, 2)]
        ended = 0
        for result in results:
            try:
                yield from p.get(result)
                ended += 1
            except SystemFailed:
                pass
            except Exception as error:  # its actor was killed
                assert "ActorDiedError" in str(error), error
        del results

    c = cluster(seed)
    c.death_rate = 0.01
    c.run(program(c.driver))
    c.check_nothing_is_left()
