"""Values and calls that processes send each other past their node (client/direct_calls.py).

The channel may be full, either side may die before it sends or after, and what the other says next
may reach the node before what the first had said. Whoever waits gets its value, no call is lost or
run twice, and none overtakes another that its caller knew of; `run` ends with an error if somebody
waits for ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest

from hpcray.testing.clients import Ref, Script
from hpcray.testing.cluster import SimulatedCluster
from hpcray.testing.processes import Process
from hpcray.testing.values import SystemFailed

SEEDS = range(10)


def double(p: Process, number: int) -> int:
    return 2 * number


def ask(p: Process, number: int) -> Script:
    """A worker that waits for others, one after the other."""
    total = 0
    for i in range(6):
        total += yield from p.get(p.submit("double", [number + i], max_retries=-1)[0])
    return total


def start(p: Process) -> None:
    assert p.actor is not None
    p.actor["calls"] = 0


def count(p: Process) -> int:
    assert p.actor is not None
    p.actor["calls"] += 1
    calls: int = p.actor["calls"]
    return calls


def tell(p: Process, handles: list[Ref]) -> int:
    """Speaks to an actor, and does not wait."""
    for _ in range(3):
        p.call(handles[0], "count")
    return 3


def slowly(p: Process) -> Script:
    """`count`, for longer than the node gives many calls ahead for."""
    yield from p.sleep(0.004)
    return count(p)


def briefly(p: Process) -> Script:
    yield from p.sleep(0.0001)  # a round


def converse(p: Process, handles: list[Ref], calls: int) -> Script:
    """A worker that calls an actor again and again; how often it had an answer."""
    answers = 0
    for _ in range(calls):
        try:
            yield from p.get(p.call(handles[0], "count")[0])
        except SystemFailed:
            return answers
        answers += 1
    return answers


def note(p: Process, number: int) -> None:
    assert p.actor is not None
    p.actor["calls"] = number


def noted(p: Process) -> int:
    assert p.actor is not None
    number: int = p.actor["calls"]
    return number


def spread_the_word(p: Process, handles: list[Ref], number: int) -> Script:
    """Calls one actor, slow and without waiting, and says so to another."""
    for _ in range(8):
        p.call(handles[0], "slowly")
    yield from p.get(p.call(handles[1], "note", [number])[0])
    yield from p.sleep(0.02)


def forward(p: Process, handles: list[Ref]) -> None:
    """Calls another actor, without waiting."""
    for _ in range(8):
        p.call(handles[0], "slowly")


def relay(p: Process, handles: list[Ref]) -> Script:
    """Calls another actor a few times; what the first call found."""
    first = 0
    for _ in range(6):
        found = yield from p.get(p.call(handles[0], "count")[0])
        first = first or found
    return first


BODIES = {"double": double, "ask": ask, "start": start, "count": count, "tell": tell,
          "slowly": slowly, "briefly": briefly, "converse": converse, "note": note, "noted": noted,
          "spread_the_word": spread_the_word, "forward": forward, "relay": relay}


def cluster(seed: int, nodes: int) -> SimulatedCluster:
    return SimulatedCluster(nodes, BODIES, seed=seed, cpus=3)


def one_at_a_time(p: Process) -> Script:
    for i in range(60):
        assert (yield from p.get(p.submit("double", [i], max_retries=-1)[0])) == 2 * i
    for i in range(10):
        found = yield from p.get(p.submit("ask", [i], max_retries=-1)[0])
        assert found == sum(2 * (i + j) for j in range(6))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("nodes", [1, 2])
def test_one_at_a_time(seed: int, nodes: int) -> None:
    world = cluster(seed, nodes)
    world.run(one_at_a_time(world.driver))
    assert world.history.direct["inbox"] > 40  # most of them went this way
    world.history.check_each_ran_once()
    world.check_nothing_is_left()


@pytest.mark.parametrize("seed", SEEDS)
def test_workers_die_between_the_outcome_and_the_value(seed: int) -> None:
    world = cluster(seed, 1)
    world.death_rate = 0.1
    world.run(one_at_a_time(world.driver))
    assert world.history.direct["inbox"] > 10 and world.deaths > 10
    world.check_nothing_is_left()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("death_rate", [0.0, 0.05])
def test_calls_of_an_actor(seed: int, death_rate: float) -> None:
    def program(p: Process) -> Script:
        actor = p.create_actor("start", max_restarts=-1)
        last = 0
        for _ in range(40):
            try:
                calls = yield from p.get(p.call(actor, "count")[0])
            except SystemFailed:
                last = 0
                continue
            assert calls == last + 1 or calls <= 2, (calls, last)
            last = calls

    world = cluster(seed, 1)
    world.death_rate = death_rate
    world.run(program(world.driver))
    assert world.history.direct["inbox"] > (20 if not death_rate else 0)
    world.history.check_calls_in_order()
    world.check_nothing_is_left()


@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_worker_said_before_it_answered_comes_first(seed: int) -> None:
    def program(p: Process) -> Script:
        actor = p.create_actor("start")
        for turn in range(1, 21):
            yield from p.get(p.submit("tell", [[actor]])[0])
            assert (yield from p.get(p.call(actor, "count")[0])) == 4 * turn

    world = cluster(seed, 1)
    world.run(program(world.driver))
    assert world.history.direct["inbox"] > 10
    world.check_nothing_is_left()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("nodes", [1, 2])
def test_who_converses_with_an_actor_calls_it_itself(seed: int, nodes: int) -> None:
    def program(p: Process) -> Script:
        actor = p.create_actor("start", rank=nodes - 1)
        there = p.submit("converse", [[actor], 30], rank=nodes - 1)[0]
        assert (yield from p.get(there)) == 30
        for turn in range(31, 61):
            assert (yield from p.get(p.call(actor, "count")[0])) == turn

    world = cluster(seed, nodes)
    world.run(program(world.driver))
    assert world.history.direct["tasks"] > 15 * (3 - nodes)
    world.history.check_each_ran_once()
    world.history.check_calls_in_order()
    world.check_nothing_is_left()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["count", "slowly"])
def test_calls_past_the_node_keep_their_order_with_others(seed: int, name: str) -> None:
    def program(p: Process) -> Script:
        actor = p.create_actor("start")
        done = 0
        for turn in range(12):
            for _ in range(6):
                done += 1
                assert (yield from p.get(p.call(actor, name)[0])) == done
            for _ in range(turn):
                p.call(actor, name)
                done += 1

    world = cluster(seed, 1)
    world.run(program(world.driver))
    assert world.history.direct["tasks"] > 10
    world.history.check_each_ran_once()
    world.history.check_calls_in_order()
    world.check_nothing_is_left()


def kill_only(world: SimulatedCluster, chosen: Callable[[Process], bool]) -> None:
    def kill() -> None:
        found = [p for p in world.processes.values() if p.number and p.alive and chosen(p)]
        if found:
            world.world.rng.choice(found).die()
            world.deaths += 1

    world.kill_some_worker = kill  # type: ignore[method-assign]


@pytest.mark.parametrize("seed", SEEDS)
def test_callers_die_between_the_word_to_the_node_and_the_call(seed: int) -> None:
    def program(p: Process) -> Script:
        actor = p.create_actor("start")
        for _ in range(8):
            yield from p.get(p.submit("converse", [[actor], 20], max_retries=-1)[0])

    world = cluster(seed, 1)
    world.death_rate = 0.3
    kill_only(world, lambda p: p.due and p.actor is None)
    world.run(program(world.driver))
    assert world.history.direct["tasks"] > 10 and world.deaths > 3
    world.check_nothing_is_left()


@pytest.mark.parametrize("seed", SEEDS)
def test_actors_die_of_calls_that_their_node_has_not_read_about(seed: int) -> None:
    def program(p: Process) -> Script:
        actor = p.create_actor("start", max_restarts=-1)
        for _ in range(80):
            with contextlib.suppress(SystemFailed):
                yield from p.get(p.call(actor, "briefly")[0])

    world = cluster(seed, 1)
    world.death_rate = 0.3
    kill_only(world, lambda p: p.run is not None and p.run.sender >= 0)
    world.run(program(world.driver))
    assert world.history.direct["tasks"] > 10 and world.deaths > 3
    world.check_nothing_is_left()


@pytest.mark.parametrize("seed", SEEDS)
def test_callers_and_actors_die_at_any_time(seed: int) -> None:
    def program(p: Process) -> Script:
        actor = p.create_actor("start", max_restarts=-1)
        other = p.create_actor("start", max_restarts=-1)
        for _ in range(8):
            talks = p.submit("converse", [[other], 20], max_retries=-1)[0]
            for _ in range(10):
                yield from p.get(p.call(actor, "count", max_retries=-1)[0])
            yield from p.get(talks)

    world = cluster(seed, 1)
    world.death_rate = 0.05
    world.run(program(world.driver))
    assert world.history.direct["tasks"] > 10 and world.deaths > 3
    world.history.check_calls_in_order()
    world.check_nothing_is_left()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_call_does_not_overtake_what_its_caller_has_heard_of(seed: int) -> None:
    def program(p: Process) -> Script:
        slow, board = p.create_actor("start"), p.create_actor("start")
        done = 0
        for turn in range(1, 5):
            for _ in range(6):  # we call it ourselves
                done += 1
                assert (yield from p.get(p.call(slow, "count")[0])) == done
            word = p.submit("spread_the_word", [[slow, board], turn])[0]
            while (yield from p.get(p.call(board, "noted")[0])) < turn:
                pass  # and that one, too, while another writes to it
            done += 9
            assert (yield from p.get(p.call(slow, "count")[0])) == done
            yield from p.get(word)

    world = cluster(seed, 1)
    world.run(program(world.driver))
    assert world.history.direct["tasks"] > 5
    world.check_nothing_is_left()


@pytest.mark.parametrize("seed", SEEDS)
def test_nor_what_the_actor_has_done_that_answered_it(seed: int) -> None:
    def program(p: Process) -> Script:
        slow, other = p.create_actor("start"), p.create_actor("start")
        done = 0
        for turn in range(4):
            for _ in range(6):  # both answer us themselves, and so do we call both
                done += 1
                assert (yield from p.get(p.call(slow, "count")[0])) == done
                yield from p.get(p.call(other, "noted")[0])
            if turn % 2:
                yield from p.get(p.call(other, "forward", [[slow]])[0])
            else:
                p.call(other, "forward", [[slow]])
                yield from p.get(p.call(other, "noted")[0])
            done += 9
            assert (yield from p.get(p.call(slow, "count")[0])) == done

    world = cluster(seed, 1)
    world.run(program(world.driver))
    assert world.history.direct["tasks"] > 5
    world.check_nothing_is_left()


@pytest.mark.parametrize("seed", SEEDS)
def test_nor_what_its_own_caller_had_done(seed: int) -> None:
    def program(p: Process) -> Script:
        slow, middle = p.create_actor("start"), p.create_actor("start")
        done = 0
        for _ in range(5):
            done += 1
            assert (yield from p.get(p.call(middle, "relay", [[slow]])[0])) == done
            done += 5
            for _ in range(8):
                p.call(slow, "slowly")
            done += 8

    world = cluster(seed, 1)
    world.run(program(world.driver))
    assert world.history.direct["tasks"] > 5
    world.check_nothing_is_left()
