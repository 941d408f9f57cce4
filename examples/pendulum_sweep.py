"""Swing up a pendulum on three worlds: a parameter sweep with tasks, then a search with actors.

The phases, and the shapes of parallel work in them:

    alone    some episodes one after another, so that one worker runs at a time: the speed that
             the sweep is compared with. Once before the sweep and once after it.
    sweep    grid of worlds x policies x starts; every episode is one *task*. Episodes end when
             the pendulum has been balanced for two seconds, so their lengths differ by a factor
             of eight: whoever is free takes the next one, and a bar driven by `ray.wait` moves.
             Half-way one worker is killed. Its task runs again elsewhere, and nothing is missing.
    refine   one *actor* per world makes its simulator once, keeps it warm, and searches around
             the best policy of the sweep. Its state is the best policy found so far.

The policy is the textbook one. Far from the top it *pumps*: the motor pushes along with the swing
and so adds energy, as a child does on a swing. Near the top a proportional-derivative (PD)
controller with the gains kp and kd holds the pendulum upright. The *cost* of an episode is
Gymnasium's: how far from upright the pendulum was, how fast, and how hard the motor pushed, summed
over the steps. Less is better. The simulator is Gymnasium's `Pendulum-v1`; its motor is too weak
to lift the pendulum straight up on Earth: there it has to swing first.

    python examples/pendulum_sweep.py                              # one machine
    mpirun -n 2 hpcray run examples/pendulum_sweep.py              # two ranks
    srun --mpi=pmix hpcray run examples/pendulum_sweep.py          # in a Slurm allocation
    python examples/pendulum_sweep.py --backend=ray                # the same program on Ray

Writes results.csv and results.png to `--out` (the working directory). Every episode draws its
start from its own seed, so results.csv has the same bytes whatever the number of ranks.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import os
import signal
import socket
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import gymnasium
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if "--backend=ray" not in "=".join(sys.argv):  # written with "=" or with a space
    import hpcray as ray
    from hpcray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
else:
    import ray  # type: ignore[no-redef]
    from ray.util.scheduling_strategies import (  # type: ignore[no-redef]
        NodeAffinitySchedulingStrategy,
    )

MAX_STEPS = 600  # 30 s of pendulum time at Gymnasium's 0.05 s a step
BALANCED_STEPS = 40  # upright and slow for this long (2 s) ends the episode
CATCH_ANGLE_RAD = 0.5  # closer to the top than this, the PD controller takes over


class World(NamedTuple):
    name: str
    g: float  # m/s2
    m: float  # kg
    l: float  # m  # noqa: E741  (the name Gymnasium and every textbook use)


class Policy(NamedTuple):
    pump: float  # torque per joule of missing energy and rad/s
    kp: float  # N m / rad
    kd: float  # N m s / rad


class Episode(NamedTuple):
    """The outcome of one episode. `node_id`, `host`, `pid`: where it ran; `busy_s`: how long."""

    steps: int
    balanced: bool
    cost: float  # Gymnasium's: angle^2 + 0.1 speed^2 + 0.001 torque^2, summed over the steps
    node_id: str
    host: str
    pid: int
    busy_s: float


# Heavier or longer than this, Gymnasium's speed limit of 8 rad/s stops a swing before the top.
WORLDS = [
    World(f"{planet} {m:g} kg {l:g} m", g, m, l)
    for planet, g in (("Moon", 1.62), ("Mars", 3.71), ("Earth", 9.81))
    for m, l in ((0.8, 1.0), (0.8, 1.2), (1.0, 1.0), (1.0, 1.2))  # noqa: E741
]
POLICIES = [
    Policy(*p) for p in itertools.product((0.1, 0.3, 1.0), (6.0, 12.0, 24.0), (1.0, 2.0, 4.0))
]


class Pendulum:
    """One Gymnasium environment in one world, made once and used for many episodes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.env = gymnasium.make("Pendulum-v1", g=world.g, max_episode_steps=MAX_STEPS)
        self.physics = cast(Any, self.env.unwrapped)
        self.physics.m, self.physics.l = world.m, world.l

    def torque(self, policy: Policy, cosine: float, sine: float, speed: float) -> float:
        w = self.world
        angle = math.atan2(sine, cosine)  # 0 is upright
        if abs(angle) < CATCH_ANGLE_RAD:
            return -policy.kp * angle - policy.kd * speed
        # A uniform rod about its end: inertia m l^2 / 3, centre of mass at l / 2.
        missing_j = w.m * w.g * w.l / 2 * (1 - cosine) - w.m * w.l**2 / 6 * speed**2
        # At rest there is nothing to push along with, so push anyway.
        return policy.pump * missing_j * (speed if abs(speed) > 0.1 else math.copysign(0.1, speed))

    def run(self, policy: Policy, seed: int) -> tuple[int, bool, float, list[float]]:
        """Return (steps, balanced, cost, angle at every step in rad from upright)."""
        self.env.reset(seed=seed)
        # Gymnasium starts anywhere, often near the top. Start hanging, so that it has to swing.
        angle, speed = np.random.default_rng(seed).uniform((math.pi - 0.5, -1.0), (math.pi, 1.0))
        self.physics.state = np.array([angle, speed])
        cosine, sine = math.cos(angle), math.sin(angle)
        cost, upright, angles = 0.0, 0, []
        for step in range(1, MAX_STEPS + 1):
            torque = np.array([self.torque(policy, cosine, sine, speed)], dtype=np.float32)
            observation, reward, *_ = self.env.step(torque)
            cosine, sine, speed = (float(x) for x in observation)
            cost -= float(reward)
            angles.append(math.atan2(sine, cosine))
            upright = upright + 1 if abs(angles[-1]) < 0.1 and abs(speed) < 0.3 else 0
            if upright == BALANCED_STEPS:
                return step, True, cost, angles
        return MAX_STEPS, False, cost, angles


@ray.remote
def episode(world: int, policy: int, seed: int) -> tuple[Any, ...]:
    """One task: one episode of one policy in one world, as an `Episode` takes it.

    Numbers and a plain tuple travel, and the lists come along once, with the function. Instances of
    this script's own classes would take their class along with each task: that costs more time.
    """
    started = time.perf_counter()
    steps, balanced, cost, _ = Pendulum(WORLDS[world]).run(POLICIES[policy], seed)
    busy_s = time.perf_counter() - started
    where = ray.get_runtime_context().get_node_id()
    return steps, balanced, cost, where, socket.gethostname(), os.getpid(), busy_s


@ray.remote(num_cpus=0, max_retries=0)
def kill_process(pid: int) -> None:
    """What the out-of-memory killer or a bug in C does to a worker, without a word of warning."""
    os.kill(pid, signal.SIGKILL)


def kill_worker_of(victim: Episode) -> None:
    """Kill the worker that has just finished this episode and is in the middle of another one."""
    there = NodeAffinitySchedulingStrategy(node_id=victim.node_id, soft=False)
    try:
        ray.get(kill_process.options(scheduling_strategy=there).remote(victim.pid))
    except ray.exceptions.WorkerCrashedError:
        pass  # it was sent to the very worker it had to kill


@ray.remote
class Search:
    """One actor: a warm simulator and the best policy found in its world so far."""

    def __init__(self, world: World, policy: Policy, seeds: Sequence[int]) -> None:
        self.pendulum = Pendulum(world)
        self.seeds = list(seeds)
        # Seeded by what is searched, never by the time or the process: runs are repeatable.
        self.random = np.random.default_rng(WORLDS.index(world))
        self.policy, self.cost = policy, self._mean_cost(policy)

    def improve(self, tries: int) -> tuple[Policy, float]:
        """Try `tries` random neighbours of the best policy; return the best one and its cost."""
        for _ in range(tries):
            factors = np.exp(self.random.normal(0.0, 0.3, size=3))
            candidate = Policy(*(float(p * f) for p, f in zip(self.policy, factors, strict=True)))
            cost = self._mean_cost(candidate)
            if cost < self.cost:
                self.policy, self.cost = candidate, cost
        return self.policy, self.cost

    def trajectory(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The angle from upright, in rad, at each step of one episode of the best policy."""
        return np.array(self.pendulum.run(self.policy, self.seeds[0])[3])

    def _mean_cost(self, policy: Policy) -> float:
        return statistics.fmean(self.pendulum.run(policy, seed)[2] for seed in self.seeds)


def collect(refs: Sequence[Any], title: str, console: Console,
            at_half: Callable[[Any], None] | None = None) -> list[Any]:  # fmt: skip
    """Return the values of `refs`, in order, moving a bar as they finish in any order. `at_half` is
    called with the latest value when half of them are there."""
    values: dict[Any, Any] = {}
    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, expand=True) as progress:
        bar = progress.add_task(title, total=len(refs))
        pending = list(refs)
        while pending:
            done, pending = ray.wait(pending, num_returns=min(16, len(pending)), timeout=0.25)
            values.update(zip(done, ray.get(done), strict=True))
            progress.update(bar, completed=len(values))
            if at_half is not None and done and 2 * len(values) >= len(refs):
                at_half(values[done[-1]])
                at_half = None
    return [values[ref] for ref in refs]


def one_by_one(points: Sequence[tuple[int, int, int]]) -> tuple[int, float]:
    """Run these episodes so that each begins when the last one is there: one worker at a time.
    Return (steps, seconds)."""
    started = time.perf_counter()
    steps = sum(Episode(*ray.get(episode.remote(*point))).steps for point in points)
    return steps, time.perf_counter() - started


def write_csv(path: Path, rows: Iterable[tuple[World, Policy, int, Episode]]) -> None:
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["world", "g", "m", "l", "pump", "kp", "kd", "seed",
                      "steps", "balanced", "cost"])  # fmt: skip
        for world, policy, seed, e in rows:
            out.writerow([*world, *policy, seed, e.steps, int(e.balanced), f"{e.cost:.6f}"])


def write_plot(path: Path, best: dict[World, tuple[Policy, float]], curves: dict[World, Any],
               grid: dict[World, dict[Policy, float]]) -> None:  # fmt: skip
    import matplotlib

    matplotlib.use("Agg")  # a compute node has no display
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for i, world in enumerate(WORLDS):
        costs = sorted(grid[world].values())
        axes[0].scatter([i] * len(costs), costs, s=14, alpha=0.5, color=f"C{i // 4}")
        axes[0].scatter([i], [best[world][1]], marker="*", s=120, color="black", zorder=3)
        seconds = 0.05 * np.arange(1, len(curves[world]) + 1)
        axes[1].plot(seconds, np.degrees(np.unwrap(curves[world])), color=f"C{i // 4}",
                     alpha=0.8, label=world.name.split()[0] if i % 4 == 0 else None)  # fmt: skip
    axes[0].set_xticks(range(len(WORLDS)), [w.name for w in WORLDS], rotation=60, ha="right")
    axes[0].set(title="27 policies a world (star: after refining)", ylabel="mean cost",
                yscale="log")  # fmt: skip
    axes[1].set(title="swing-up with the best policy", xlabel="time (s)",
                ylabel="angle from upright (degrees)")  # fmt: skip
    axes[1].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the results")
    parser.add_argument("--starts", type=int, default=4, help="episodes for each grid point")
    parser.add_argument("--tries", type=int, default=10, help="policies each search actor tries")
    parser.add_argument("--backend", choices=["hpcray", "ray"], default="hpcray")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    ray.init()
    grid = list(itertools.product(range(len(WORLDS)), range(len(POLICIES)), range(args.starts)))
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))

    # Each worker imports the simulator with its first episode. That is not to be measured.
    ray.get([episode.remote(*point) for point in grid[: 4 * cpus]])

    # The speed of one worker, before and after the sweep: a shared machine has its moods.
    sample = grid[:: max(1, len(grid) // 100)]
    alone = [one_by_one(sample)]

    # Phase 1: one task for each episode.
    killed: list[Episode] = []

    def kill_one(latest: tuple[Any, ...]) -> None:
        killed.append(Episode(*latest))
        kill_worker_of(killed[-1])

    started = time.perf_counter()
    refs = [episode.remote(*point) for point in grid]
    episodes = [Episode(*values) for values in collect(refs, "sweep ", console, kill_one)]
    sweep_s = time.perf_counter() - started
    alone.append(one_by_one(sample))
    refine_from = time.perf_counter()

    costs: dict[World, dict[Policy, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (world, policy, _), e in zip(grid, episodes, strict=True):
        costs[WORLDS[world]][POLICIES[policy]].append(e.cost)
    means = {w: {p: statistics.fmean(c) for p, c in by.items()} for w, by in costs.items()}
    first = {world: min(by, key=lambda policy: by[policy]) for world, by in means.items()}

    # Phase 2: one actor for each world. Calls to one actor run in order, so the second call
    # already finds what the first has improved. A few actors at a time: each holds a worker.
    best: dict[World, tuple[Policy, float]] = {}
    curves: dict[World, Any] = {}
    for i in range(0, len(WORLDS), cpus):
        some = WORLDS[i : i + cpus]
        searches = [Search.remote(w, first[w], range(args.starts)) for w in some]
        refined = [s.improve.remote(args.tries) for s in searches]
        drawn = [s.trajectory.remote() for s in searches]
        title = f"refine {i + 1}-{i + len(some)} of {len(WORLDS)}"
        best.update(zip(some, collect(refined, title, console), strict=True))
        curves.update(zip(some, ray.get(drawn), strict=True))
        del searches  # the last handle: the actors end and give their CPUs back

    refined_s = time.perf_counter() - refine_from
    rows = [(WORLDS[world], POLICIES[policy], seed, e)
            for (world, policy, seed), e in zip(grid, episodes, strict=True)]  # fmt: skip
    write_csv(args.out / "results.csv", rows)
    write_plot(args.out / "results.png", best, curves, means)
    report(console, best, first, means)
    report_where(console, episodes, sweep_s)
    rate = sum(e.steps for e in episodes) / sweep_s
    alone_rate = sum(steps for steps, _ in alone) / sum(seconds for _, seconds in alone)
    console.print(
        f"Sweep: {len(episodes)} episodes in {sweep_s:.1f} s, {rate:,.0f} steps/s on {cpus} CPUs.\n"
        f"One worker alone: {alone_rate:,.0f} steps/s. Speed-up: {rate / alone_rate:.1f}."
    )
    for e in killed:
        console.print(
            f"Half-way the worker with pid {e.pid} on {e.host} was killed.\n"
            f"Its episode ran again in another one: all {len(episodes)} results are there."
        )
    console.print(
        f"Refined in {refined_s:.1f} s. Wrote "
        f"{args.out / 'results.csv'} and {args.out / 'results.png'}.")  # fmt: skip
    ray.shutdown()


def report(console: Console, best: dict[World, tuple[Policy, float]], first: dict[World, Policy],
           means: dict[World, dict[Policy, float]]) -> None:  # fmt: skip
    table = Table(title="Best policy in each world", title_justify="left")
    for heading in ("world", "pump", "kp", "kd", "cost", "sweep's best"):
        table.add_column(heading, justify="left" if heading == "world" else "right")
    for world in WORLDS:
        policy, cost = best[world]
        gains = (f"{x:.2f}" for x in policy)
        table.add_row(world.name, *gains, f"{cost:.1f}", f"{means[world][first[world]]:.1f}")
    console.print(table)
    console.print(
        "pump: how hard the motor pushes along with the swing.\n"
        "kp, kd: the gains of the controller that holds it upright.\n"
        "cost: distance from upright, speed and torque, added up. Less is better.\n"
    )


def report_where(console: Console, episodes: Sequence[Episode], sweep_s: float) -> None:
    table = Table(title="Where the episodes ran", title_justify="left")
    for heading in ("node", "host", "CPUs", "workers", "episodes", "steps", "busy"):
        table.add_column(heading, justify="left" if heading in ("node", "host") else "right")
    for node in ray.nodes():
        here = [e for e in episodes if e.node_id == node["NodeID"]]
        cpus = node["Resources"].get("CPU", 0)
        workers, steps = len({e.pid for e in here}), sum(e.steps for e in here)
        # Of the time that its CPUs had, from the first submission to the last result.
        busy = sum(e.busy_s for e in here) / (max(1, cpus) * sweep_s)
        table.add_row(node["NodeID"][:12], node["NodeManagerHostname"], f"{cpus:g}", str(workers),
                      str(len(here)), f"{steps:,}", f"{busy:.0%}")  # fmt: skip
    console.print(table)
    console.print(
        "CPUs: the node's share of its host. workers: the processes that ran episodes.\n"
        "busy: the part of the CPUs' time that went into episodes.\n"
    )


if __name__ == "__main__":
    main()
