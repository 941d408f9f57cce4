"""States as data: which there are, what leads from one to another, and why. Pure.

Each kind of record has a `Table`: its states, with a sentence each, and its edges, each with its
cause. `move(record, edge)` is the only place that assigns a state:

    move(task, TASK_READY)      QUEUED now, if a task may become ready in the state it is in

The few moves that every task makes have the two lines of `move` in place, for a call would cost as
much again.

A record remembers its last moves. They cost one field: records with the same past share one
`Story`, a node in a tree of pasts that grows once for each new one, and that is also when an edge
is checked. So an invalid move is found at once: `InvalidMoveError` says what came before.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

# A story is as long as this; older moves are forgotten.
_REMEMBERED = 8


class State(enum.IntEnum):
    """A state with a sentence that says what it means."""

    sentence: str

    def __new__(cls, value: int, sentence: str) -> State:
        member = int.__new__(cls, value)
        member._value_ = value
        member.sentence = sentence
        return member


class Edge:
    """What leads to `target`, from which states, and why."""

    __slots__ = ("cause", "sources", "target")

    def __init__(self, cause: str, sources: Iterable[State], target: State) -> None:
        self.cause = cause
        self.sources = frozenset(sources)
        self.target = target

    def __repr__(self) -> str:
        return f"{self.cause} -> {self.target.name}"


class InvalidMoveError(RuntimeError):
    """A record cannot make this move: the runtime has miscounted."""


class Story(dict[Edge, "Story"]):
    """A record's state and the moves that led there. `story[edge]` is the story after one more."""

    __slots__ = ("_table", "moves", "state")

    def __init__(self, table: Table, state: State, moves: tuple[Edge, ...]) -> None:
        self._table = table
        self.state: Any = state  # of the record's own kind
        self.moves = moves

    def __missing__(self, edge: Edge) -> Story:
        if self.state not in edge.sources:
            raise InvalidMoveError(
                f"{self._table.name} that is {self.state.name} ({self.state.sentence}) cannot "
                f"become {edge.target.name} because {edge.cause}; so far: {self}")
        after = self[edge] = self._table.story(edge.target, (*self.moves, edge)[-_REMEMBERED:])
        return after

    def __str__(self) -> str:
        return ", ".join(map(repr, self.moves)) or "nothing"

    __repr__ = __str__


class Table:
    """The states of one kind of record, and its edges."""

    def __init__(self, name: str, states: type[State], edges: Iterable[Edge]) -> None:
        self.name = name
        self.states = states
        self.edges = tuple(edges)
        self._stories: dict[tuple[State, tuple[Edge, ...]], Story] = {}

    def story(self, state: State, moves: tuple[Edge, ...] = ()) -> Story:
        """The one with these moves; without any: of a new record."""
        key = (state, moves)
        found = self._stories.get(key)
        if found is None:
            found = self._stories[key] = Story(self, state, moves)
        return found

    def lines(self) -> Iterator[str]:
        """The table for people: each state, and what leads on from it. Docstrings show it so."""
        width = max(len(state.name) for state in self.states)
        for state in self.states:
            yield f"{state.name:{width}}  {state.sentence}"
            for edge in self.edges:
                if state in edge.sources:
                    yield f"{'':{width}}    {edge.cause} --> {edge.target.name}"


class Moving(Protocol):
    state: Any
    story: Story


def move(record: Moving, edge: Edge) -> None:
    """Assign the state that `edge` leads to.

    Raises:
      InvalidMoveError: it does not start where the record is.
    """
    story = record.story = record.story[edge]
    record.state = story.state
