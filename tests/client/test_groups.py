"""`wait` in a loop: what `client/groups.py` remembers gives what a look at every ref would."""

from __future__ import annotations

from collections import deque
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hpcray.client import waiters
from hpcray.client.groups import Group
from hpcray.client.references import LOCAL, ReferenceTable
from hpcray.testing.clients import reference_kinds


class Loop:
    """A program that waits on one list again and again, and a model of what it gets."""

    def __init__(self) -> None:
        dropped: deque[bytes] = deque()
        self._refs = ReferenceTable(reference_kinds(dropped)[0], dropped)
        self._count = 0
        self.table: waiters.Table = {}
        self.group = Group(LOCAL)
        self.pending: list[Any] = []

    def more(self, count: int, ready: bool) -> list[Any]:
        made = []
        for _ in range(count):
            self._count += 1
            ref = self._refs.fresh(self._count.to_bytes(28, "big"))
            ref._ready = LOCAL if ready else 0
            made.append(ref)
        return made

    def becomes_ready(self, index: int) -> None:
        waiting = [ref for ref in self.pending if not ref._ready]
        if waiting:
            ref = waiting[index % len(waiting)]
            ref._ready = LOCAL
            waiters.tell(self.table, ref._id)

    def turn(self, count: int, added: list[Any]) -> None:
        """One `wait(pending + added, num_returns=count, timeout=0)`."""
        given = self.pending + added
        expected = [ref for ref in given if ref._ready][:count]
        if not self.group.match(given, LOCAL):
            assert not self.pending, "a list that only grew at its end is known"
            self.group.leave(self.table)
            self.group = Group(LOCAL)
        known = self.group.known
        absent = self.group.add(given[known:], self.table)
        assert absent == [ref for ref in given[known:] if not ref._ready]
        missing = self.group.need(count)
        assert (missing <= 0) == (len([ref for ref in given if ref._ready]) >= count)
        taken, self.pending = self.group.take(count)
        assert taken == expected
        chosen = set(expected)
        assert self.pending == [ref for ref in given if ref not in chosen]


@given(st.lists(st.one_of(
    st.tuples(st.just("turn"), st.integers(1, 12), st.integers(0, 5), st.booleans()),
    st.tuples(st.just("ready"), st.integers(0, 1000)))))
def test_a_loop_gets_what_a_look_at_every_ref_gives(steps):
    loop = Loop()
    loop.turn(1, loop.more(20, ready=False))
    for step in steps:
        if step[0] == "ready":
            loop.becomes_ready(step[1])
        else:
            loop.turn(step[1], loop.more(step[2], ready=step[3]))


def test_another_list_does_not_match():
    loop = Loop()
    loop.turn(1, loop.more(4, ready=False))
    rest = loop.pending
    assert loop.group.match(rest, LOCAL) and loop.group.match(list(rest), LOCAL)
    assert not loop.group.match(rest, LOCAL - 1), "it waits for something else"
    assert not loop.group.match(rest[1:], LOCAL)
    assert not loop.group.match(rest[::-1], LOCAL)
    rest[0] = loop.more(1, ready=False)[0]
    assert not loop.group.match(rest, LOCAL), "the user has changed the list he was given"
    assert not loop.group.match([], LOCAL)


def test_who_leaves_waits_for_nothing():
    loop = Loop()
    loop.turn(1, loop.more(4, ready=False))
    assert len(loop.table) == 4
    loop.group.leave(loop.table)
    assert loop.table == {}


def test_a_list_that_the_user_has_dropped_is_let_go():
    loop = Loop()
    loop.turn(1, loop.more(4, ready=False))
    assert not loop.group.abandoned()
    loop.pending = []
    assert loop.group.abandoned()
