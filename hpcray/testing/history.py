"""What simulated processes say that they did, and whether it may have been so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcray.protocol import messages as m
from hpcray.testing.world import short


class History:
    def __init__(self, fault: Callable[[str], Any]) -> None:
        self._fault = fault
        self.templates: dict[bytes, m.Template] = {}
        self.starts: dict[bytes, list[int]] = {}
        self.ends: dict[bytes, int] = {}
        self.ran_on: dict[bytes, int] = {}
        # What processes have sent each other: values to an "inbox", calls into "tasks".
        self.direct = {"inbox": 0, "tasks": 0}
        # (actor, caller) -> calls in the order submitted; and in the order started.
        self._calls: dict[tuple[bytes, int, int], list[bytes]] = {}
        self._call_keys: dict[bytes, tuple[bytes, int, int]] = {}
        self._called: dict[tuple[bytes, int, int], list[bytes]] = {}

    def submitted(self, task_id: bytes, template: m.Template) -> None:
        self.templates[task_id] = template

    def called(self, actor_id: bytes, rank: int, number: int, task_id: bytes) -> None:
        key = (actor_id, rank, number)
        self._calls.setdefault(key, []).append(task_id)
        self._call_keys[task_id] = key

    def started(self, run: m.Run, template: m.Template, rank: int) -> None:
        attempts = self.starts.setdefault(run.task_id, [])
        if run.attempt in attempts:
            self._fault(f"attempt {run.attempt} of {short(run.task_id)} started twice")
        attempts.append(run.attempt)
        self.ran_on[run.task_id] = rank
        key = self._call_keys.get(run.task_id)
        if key is not None:
            self._called.setdefault(key, []).append(run.task_id)
        limit = template.max_retries
        if template.kind == m.TASK and limit >= 0 and len(attempts) > limit + 1:
            self._fault(f"{template.name} {short(run.task_id)} started {len(attempts)} times, "
                       f"max_retries={limit}")

    def finished(self, run: m.Run, rank: int) -> None:
        self.ends[run.task_id] = self.ends.get(run.task_id, 0) + 1

    def check_each_ran_once(self) -> None:
        for task_id, template in self.templates.items():
            starts = self.starts.get(task_id, [])
            if len(starts) != 1 or self.ends.get(task_id) != 1:
                self._fault(f"{template.name} {short(task_id)}: started {starts}, "
                           f"ended {self.ends.get(task_id, 0)} times")

    def check_calls_in_order(self) -> None:
        for key, called in self._called.items():
            submitted = self._calls[key]
            first = list(dict.fromkeys(called))
            expected = [task for task in submitted if task in set(first)]
            if first != expected:
                self._fault(f"calls of process {key[2]} of rank {key[1]} on {short(key[0])} out "
                           f"of order: {[submitted.index(t) for t in first]}")
