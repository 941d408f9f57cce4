"""What a simulated cluster is to run, and what has run."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Workload:
    """`tasks` tasks of `task_s` seconds, each longer or shorter by up to the share `vary`.

    actors  0: tasks; else calls, dealt out in turn to so many actors
    homes   0: the driver submits them all; else it starts a task on each of so many nodes, spread
            evenly, which submits its share
    """

    nodes: int
    tasks: int
    task_s: float
    cpus: int = 2  # of each node
    actors: int = 0
    homes: int = 0
    vary: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("nodes", "tasks", "cpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"there must be at least 1 of {name}, not {getattr(self, name)}")
        if not 0 <= self.homes <= self.nodes:
            raise ValueError(f"homes are nodes, and there are {self.nodes}, not {self.homes}")
        if self.actors < 0 or (self.actors and self.homes):
            raise ValueError("actors are called by the driver: they do not go together with homes")
        if self.homes > self.tasks or self.actors > self.tasks:
            raise ValueError(f"each home and each actor needs a task, and there are {self.tasks}")
        if self.task_s < 0 or not 0 <= self.vary <= 1:
            raise ValueError("a task takes at least 0 s, and varies by 0 to 1 of that")

    def durations_s(self) -> list[float]:
        rng = random.Random(f"{self.seed} durations")
        return [self.task_s * rng.uniform(1 - self.vary, 1 + self.vary)
                for _ in range(self.tasks)]

    def ideal_s(self) -> float:
        """No way of placing these tasks takes less, even if nothing else costs anything."""
        durations = self.durations_s()
        if self.actors:
            return max(sum(durations[i :: self.actors]) for i in range(self.actors))
        return max(sum(durations) / (self.nodes * self.cpus), *durations)

    def shares(self) -> list[tuple[int, int]]:
        """(first, count) of the tasks of each home."""
        ends = [self.tasks * i // self.homes for i in range(self.homes + 1)]
        return [(first, end - first) for first, end in zip(ends, ends[1:], strict=False)]


class Runs:
    """Which tasks have run, where, and when."""

    def __init__(self, work: Workload, recording: bool) -> None:
        self.durations_s = work.durations_s()
        self.count_of = bytearray(work.tasks)  # how often each task has run, up to 255
        self.tasks_of = [0] * work.nodes
        self.worked_s = 0.0
        # Begin and length of each.
        self.spans: array[float] | None = array("d") if recording else None

    def ran(self, number: int, rank: int, began_s: float) -> float:
        """Task `number` begins there; how long it takes."""
        seconds = self.durations_s[number]
        self.count_of[number] = min(self.count_of[number] + 1, 255)
        self.tasks_of[rank] += 1
        self.worked_s += seconds
        if self.spans is not None:
            self.spans.extend((began_s, seconds))
        return seconds

    @property
    def each_once(self) -> bool:
        return self.count_of.count(1) == len(self.count_of)
