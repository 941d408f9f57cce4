"""A cluster of any size on one computer, in virtual time: how long would it take?

    python -m hpcray.testing.simulate --nodes 1000 --tasks 100000 --task-ms 10

Real node machines, and costs that were measured once; docs/scale.md says what the figures mean.
Here is only the command line: the rest is in `hpcray/testing/timed/`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hpcray.testing.timed import costs, plot
from hpcray.testing.timed.cluster import TimedCluster, no_collector
from hpcray.testing.timed.measure import MeasureError, measure
from hpcray.testing.timed.node import Node
from hpcray.testing.timed.report import ClockedNode, ClockGovernedNode, Report
from hpcray.testing.timed.workload import Workload


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m hpcray.testing.simulate", allow_abbrev=False,
        description="Simulates a cluster: real node machines in virtual time, with measured costs. "
        "Prints the makespan against the ideal one, what each process did, and who is saturated.")
    add = made.add_argument
    add("--nodes", type=int, default=10, metavar="N")
    add("--cpus-per-node", type=int, default=2, metavar="C")
    add("--tasks", type=int, default=10_000, metavar="N")
    add("--task-ms", type=float, default=10.0, metavar="MS", help="how long a task takes")
    add("--vary", type=float, default=0.1, metavar="SHARE",
        help="each task is longer or shorter by up to this share (default: 0.1)")
    who = made.add_mutually_exclusive_group()
    who.add_argument("--driver", action="store_true",
                     help="one driver on node 0 submits all tasks (the default)")
    who.add_argument("--homes", type=int, default=0, metavar="K",
                     help="a task on each of K nodes submits a K-th of them")
    who.add_argument("--actors", type=int, default=0, metavar="N",
                     help="the driver calls N actors in turn, instead of submitting tasks")
    add("--seed", type=int, default=0, metavar="S",
        help="of the tasks' times and the order of events: the same seed gives the same run")
    add("--costs", type=Path, default=costs.FILE, metavar="FILE",
        help="what things cost (default: the file that comes with hpcray)")
    add("--clock", action="store_true",
        help="let the time that the nodes' own code takes on this computer pass, instead of "
        "counting messages: costs that grow with the cluster show, and no run is like another")
    add("--plot", type=Path, metavar="FILE", help="draw who was busy when; needs matplotlib")
    add("--measure", action="store_true",
        help="instead: measure what things cost on this computer, with real processes (about a "
        "minute; it should have nothing else to do), and write it to the file of --output")
    add("--output", type=Path, metavar="FILE",
        help="of --measure (default: the file that comes with hpcray)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 2 for a wrong command line, 1 for what does not work here."""
    commands = parser()
    options = commands.parse_args(arguments)
    if options.output is not None and not options.measure:
        commands.error("--output is for --measure")
    try:
        work = Workload(
            nodes=options.nodes, tasks=options.tasks, task_s=options.task_ms / 1000,
            cpus=options.cpus_per_node, actors=options.actors, homes=options.homes,
            vary=options.vary, seed=options.seed)
    except ValueError as error:
        commands.error(str(error))
    try:
        if options.measure:
            measure_to(options.output or costs.FILE)
        else:
            simulate(work, costs.load(options.costs), options.plot, by_clock=options.clock)
        sys.stdout.flush()
    except (costs.CostsError, MeasureError, plot.PlotError) as error:
        print(error, file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever reads it, `head` perhaps, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def measure_to(path: Path) -> None:
    """Raises CostsError: the file cannot be written. MeasureError: something cannot be measured."""
    found = measure(say=lambda what: print(f"measuring: {what}", file=sys.stderr, flush=True))
    try:
        path.write_text(costs.dump(found))
    except OSError as error:
        raise costs.CostsError(f"{path} cannot be written: {error}") from None
    print(path)


def simulate(
    work: Workload, cost: costs.Costs, picture: Path | None = None, *, by_clock: bool = False
) -> Report:
    """Run it, draw what came of it, and print that."""
    if picture is not None:
        plot.check()
    with no_collector():
        cluster = TimedCluster(
            work, cost, recording=picture is not None,
            node0=ClockGovernedNode if by_clock else ClockedNode,
            others=ClockGovernedNode if by_clock else Node)
        cluster.run()
    report = Report(cluster)
    if picture is not None:
        plot.plot(report, picture)
    for line in report.lines():
        print(line)
    return report


if __name__ == "__main__":
    sys.exit(main())
