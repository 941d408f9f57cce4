"""States as data: what a table forbids, what it remembers, and that docstrings show the tables."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from hpcray.node import (
    actor_homes,
    actor_routes,
    actor_states,
    directory,
    dispatch,
    executor,
    job,
    records,
    task_states,
)
from hpcray.node.states import Edge, InvalidMoveError, State, Story, Table, move

# Each table, and the module whose docstring shows it.
SHOWN = [
    (records.OBJECTS, directory),
    (records.WORKERS, dispatch),
    (job.JOBS, job),
    (task_states.TASKS, executor),
    (actor_states.ACTORS, actor_homes),
    (actor_states.ROUTES, actor_routes),
]


class Light(State):
    RED = 0, "nobody goes"
    GREEN = 1, "all go"
    BROKEN = 2, "nobody knows"


GO = Edge("the time has come", (Light.RED,), Light.GREEN)
STOP = Edge("a car comes", (Light.GREEN,), Light.RED)
BREAK = Edge("a storm", Light, Light.BROKEN)
LIGHTS = Table("a light", Light, (GO, STOP, BREAK))


class Lamp(msgspec.Struct):
    state: Light = Light.RED
    story: Story = LIGHTS.story(Light.RED)


def test_moves_along_edges() -> None:
    lamp = Lamp()
    move(lamp, GO)
    assert lamp.state is Light.GREEN
    move(lamp, STOP)
    move(lamp, BREAK)
    move(lamp, BREAK)
    assert lamp.state is Light.BROKEN


def test_an_invalid_move_tells_what_came_before() -> None:
    lamp = Lamp()
    move(lamp, GO)
    with pytest.raises(InvalidMoveError) as caught:
        move(lamp, GO)
    text = str(caught.value)
    assert "a light that is GREEN (all go) cannot become GREEN because the time has come" in text
    assert text.endswith("so far: the time has come -> GREEN")
    assert lamp.state is Light.GREEN, "as it was"


def test_stories_are_bounded_and_shared() -> None:
    one, other = Lamp(), Lamp()
    for _ in range(100):
        move(one, GO)
        move(one, STOP)
    for _ in range(200):
        move(other, GO)
        move(other, STOP)
    assert one.story is other.story
    assert 1 < len(one.story.moves) < 20


@pytest.mark.parametrize(("table", "module"), SHOWN, ids=lambda x: getattr(x, "name", None))
def test_docstrings_show_the_tables(table: Table, module: ModuleType) -> None:
    shown = "\n".join(f"    {line}" for line in table.lines())
    assert shown in (module.__doc__ or ""), f"{module.__name__} has to say:\n{shown}"


def test_nothing_but_move_assigns_a_state() -> None:
    """Or its two lines, which look the edge up in the story."""
    node = Path(directory.__file__).parent
    wrong = []
    for path in sorted(node.glob("*.py")):
        lines = path.read_text().splitlines()
        for before, line in itertools.pairwise(lines):
            found = re.match(r"\s+(\w+)\.state = ", line)
            if found is None or path.name == "states.py" or found[1] in ("self", "group"):
                continue
            name = found[1]
            moved = (line.strip() == f"{name}.state = story.state"
                     and f"story = {name}.story = {name}.story[" in before)
            begun = f"{name}.story = UNKNOWN_OBJECT" in before
            if not moved and not begun:
                wrong.append(f"{path.name}: {line.strip()}")
    assert not wrong


@pytest.mark.parametrize("table", [table for table, _ in SHOWN], ids=lambda table: table.name)
def test_every_state_can_be_reached(table: Table) -> None:
    reached = {next(iter(table.states))}
    while more := {e.target for e in table.edges if e.sources & reached} - reached:
        reached |= more
    assert reached == set(table.states)
