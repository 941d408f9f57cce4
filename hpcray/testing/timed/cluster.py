"""A cluster in virtual time, and one run of a workload on it."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from hpcray.node import server
from hpcray.node.records import DRIVER
from hpcray.protocol import ids
from hpcray.protocol import messages as m
from hpcray.testing.timed import programs
from hpcray.testing.timed.clock import Usage, World
from hpcray.testing.timed.costs import Costs
from hpcray.testing.timed.node import Node
from hpcray.testing.timed.process import Program
from hpcray.testing.timed.workload import Runs, Workload

# More than a task's way costs anybody in any case: what takes longer than all tasks together, one
# after the other, does not end.
_OVERHEAD_S = 0.001
_LIMIT_S = 60.0


class TimedCluster:
    def __init__(
        self, work: Workload, costs: Costs, *, recording: bool = False,
        node0: type[Node] = Node, others: type[Node] | None = None,
    ) -> None:
        """`recording`: keep what happened when, for a plot. `node0`, `others`: other classes of
        nodes, where something about them is measured (by default all are as node 0)."""
        self.work = work
        self.runs = Runs(work, recording)
        self.world = World(costs, self.runs, work.nodes, work.seed, recording)
        self.began_s = 0.0
        self._over_s: float | None = None
        offered = {"CPU": work.cpus * m.UNIT}
        kinds = [node0, *[others or node0] * (work.nodes - 1)]
        self.nodes = [kind(self.world, rank, dict(offered), programs.submits)
                      for rank, kind in enumerate(kinds)]
        joined = [m.Joined(rank, f"host{rank}", "", rank, tuple(offered.items()))
                  for rank in range(work.nodes)]
        for node in self.nodes:
            self.world.to_node.append(node.from_network)
            for one in joined:
                node.machine.cluster.joined(one)
            node.machine.dispatcher.start_workers(work.cpus)
            node.wake(server._TICK_S * self.world.rng.random())  # nobody's ticks are in step
        head = self.nodes[0]
        head.machine.connect(DRIVER)
        self.driver = head.add_process(DRIVER)
        self.driver.on_over = partial(setattr, self, "_over_s")
        self.driver.core.begin_task(ids.driver_task_id(0, self.world.job_id), 0)
        head.machine.welcome(DRIVER)

    @property
    def makespan_s(self) -> float:
        """From the first submission until the driver has all results."""
        assert self._over_s is not None
        return self._over_s - self.began_s

    def run(self) -> None:
        """All of it. Accounts are opened when the workers are up, and the actors.

        Raises:
          NeverEnds: somebody waits for ever.
        """
        work = self.work
        clock = self.world.clock
        ready_s = 0.1 + 2 * work.cpus * self.world.costs.client.start_s
        clock.at(ready_s, lambda: None)
        clock.run(lambda: clock.now_s >= ready_s, math.inf)
        handles: list[Any] = []
        if work.actors:
            self._run_program(programs.creates(self.driver, work.actors, handles))
        self._open_accounts()
        if work.actors:
            program = programs.calls(self.driver, work.tasks, handles)
        elif work.homes:
            program = programs.hands_out(self.driver, work)
        else:
            program = programs.submits(self.driver, 0, work.tasks)
        self._run_program(program)

    def _open_accounts(self) -> None:
        self.began_s = max(self.world.clock.now_s, self.driver.free_s)
        for node in self.nodes:
            for process in (node, *node.processes.values()):
                process.usage = Usage(self.world.recording)

    def _run_program(self, program: Program) -> None:
        self._over_s = None
        self.driver.start(program)
        work = self.work
        limit_s = (self.world.clock.now_s + _LIMIT_S + work.tasks * (work.task_s + _OVERHEAD_S)
                   + work.actors * 2 * self.world.costs.client.start_s)
        self.world.clock.run(lambda: self._over_s is not None, limit_s)


@contextmanager
def no_collector() -> Iterator[None]:
    """Machines make no cycles: Python would look through millions of records for nothing."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
