"""What drivers do, and tasks that submit others.

A generator per process: it spends its process's time where it submits, and yields what it waits
for (or 0.0, where it could be interrupted).
"""

from __future__ import annotations

from typing import Any

from hpcray.protocol import ids
from hpcray.protocol import messages as m
from hpcray.testing.timed.process import Process, Program
from hpcray.testing.timed.workload import Workload


def submits(p: Process, first: int, count: int) -> Program:
    """Submit these tasks, and get their results."""
    template = p.define("work")
    refs = []
    for number in range(first, first + count):
        refs.append(p.submit_task(template, number))
        yield 0.0
    yield p.values_of(refs)


def hands_out(p: Process, work: Workload) -> Program:
    """Start a task on each home, which submits its share."""
    refs = []
    for home, (first, count) in enumerate(work.shares()):
        template = p.define("submits", rank=home * work.nodes // work.homes)
        refs.append(p.submit_share(template, first, count))
        yield 0.0
    yield p.values_of(refs)


def creates(p: Process, count: int, handles: list[Any]) -> Program:
    """Create actors, and wait until all of them answer."""
    template = p.define("Actor", kind=m.ACTOR_CREATION, held_resources=())
    call = p.define("Actor.work", kind=m.METHOD)
    for _ in range(count):
        handles.append(p.create_actor(template))
        yield 0.0
    refs = [p.submit(call, m.NO_ARGS, _actor(handle)) for handle in handles]
    yield p.values_of(refs)


def calls(p: Process, count: int, handles: list[Any]) -> Program:
    """Call the actors in turn, and get the results."""
    call = p.define("Actor.work", kind=m.METHOD)
    refs = []
    for number in range(count):
        refs.append(p.submit_task(call, number, _actor(handles[number % len(handles)])))
        yield 0.0
    yield p.values_of(refs)


def _actor(handle: Any) -> bytes:
    return ids.actor_of_object(handle._id)
