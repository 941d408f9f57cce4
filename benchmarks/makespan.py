"""How well the scheduler fills several nodes: sleeping tasks against the ideal makespan.

    python benchmarks/makespan.py             launches `hpcray run -n 4` itself
    hpcray run -n 4 benchmarks/makespan.py    the same inside a job

2,000 tasks from one driver sleep for 1-100 ms, drawn from a seed. Sleeping takes no
CPU, so four nodes on two cores are four nodes; what is measured is placement and
start delay alone.

    lower bound = max(sum of sleeps / slots, longest sleep)       no scheduler can beat it
    list        = the tasks in submission order, each to the slot free first, at no cost
    measured    = first submission to last result in the driver

`list` is what an ideal scheduler without knowledge of durations reaches; the distance
from it to `measured` is ours.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness
from harness import Result


@dataclass(frozen=True, slots=True)
class Share:
    """What one node did."""

    node: str
    slots: int
    tasks: int
    busy_s: float


def list_schedule_s(sleeps_s: Sequence[float], slots: int) -> float:
    """The makespan when each task, in order, goes to the slot that is free first."""
    free_at = [0.0] * slots
    for sleep_s in sleeps_s:
        heapq.heapreplace(free_at, free_at[0] + sleep_s)
    return max(free_at)


def measure(ray: Any, sleeps_s: Sequence[float]) -> tuple[list[Result], list[Share]]:
    def sleep(sleep_s: float) -> tuple[str, float]:
        start = time.perf_counter()
        time.sleep(sleep_s)
        busy_s = time.perf_counter() - start
        return str(ray.get_runtime_context().get_node_id()), busy_s

    task = ray.remote(sleep)
    slots_of = {
        node["NodeID"]: int(node["Resources"].get("CPU", 0))
        for node in ray.nodes() if node["Alive"]
    }
    slots = sum(slots_of.values())
    # Workers of every node started, function known everywhere. Its short sleeps also
    # give the scheduler a first estimate, as any running program would have.
    ray.get([task.remote(0.05) for _ in range(8 * slots)])
    start = time.perf_counter()
    done = ray.get([task.remote(sleep_s) for sleep_s in sleeps_s])
    makespan_s = time.perf_counter() - start

    tasks: dict[str, int] = defaultdict(int)
    busy: dict[str, float] = defaultdict(float)
    for node_id, busy_s in done:
        tasks[node_id] += 1
        busy[node_id] += busy_s
    # A short name per node: ids differ from run to run and say nothing to a reader.
    shares = [
        Share(f"node {i}", slots_of[node_id], tasks[node_id], busy[node_id])
        for i, node_id in enumerate(slots_of)
    ]
    bound_s = max(sum(sleeps_s) / slots, max(sleeps_s))
    list_s = list_schedule_s(sleeps_s, slots)
    return [
        Result.of("makespan", "s", [makespan_s], "lower"),
        Result.of("lower_bound", "s", [bound_s], "lower"),
        Result.of("list_schedule", "s", [list_s], "lower"),
        Result.of("makespan_of_bound", "ratio", [makespan_s / bound_s], "lower"),
        Result.of("makespan_of_list", "ratio", [makespan_s / list_s], "lower"),
        # Sleeps end late on a busy machine; the share of that which is not the scheduler's.
        Result.of("sleeps_overrun", "ratio", [sum(busy.values()) / sum(sleeps_s)], "lower"),
    ], shares


def run_job(options: argparse.Namespace) -> None:
    """Start `hpcray run -n N` on this script and hand its report through."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "inside.json"
        command = [
            *harness.hpcray_command(), "run", "-n", str(options.nodes),
            str(Path(__file__).resolve()), "--inside", "--json", str(output),
            "--tasks", str(options.tasks), "--seed", str(options.seed),
            "--min-ms", str(options.min_ms), "--max-ms", str(options.max_ms),
        ]
        try:
            done = subprocess.run(
                command, env=harness.launch_environment(), stdin=subprocess.DEVNULL,
                stdout=sys.stderr, timeout=options.limit + 90,
            )
        except subprocess.TimeoutExpired:
            raise SystemExit(f"the job did not end in {options.limit + 90:g} s") from None
        if not output.exists():
            raise SystemExit(f"the job exited with {done.returncode} and wrote no results")
        document = json.loads(output.read_text())
    finish(document, options)


def run_inside(options: argparse.Namespace) -> None:
    draw = random.Random(options.seed)
    sleeps_s = [draw.uniform(options.min_ms, options.max_ms) / 1e3 for _ in range(options.tasks)]
    before = harness.machine()
    shares: list[Share] = []
    versions: dict[str, str] = {}
    try:
        with harness.hard_limit(options.limit, "makespan"):
            ray = harness.load_backend("hpcray")
            versions = harness.versions(ray)
            ray.init()
            try:
                results, shares = measure(ray, sleeps_s)
            finally:
                ray.shutdown()
    except Exception as error:
        results = [Result.failed("makespan", f"{type(error).__name__}: {error}")]
    finish({
        "benchmark": "makespan", "date": harness.date(), "commit": harness.commit(),
        "machine": before, "versions": versions, "tasks": options.tasks,
        "sleep_ms": [options.min_ms, options.max_ms], "seed": options.seed,
        "nodes": [{"node": s.node, "slots": s.slots, "tasks": s.tasks, "busy_s": s.busy_s}
                  for s in shares],
        "rows": [result.to_json() for result in results],
    }, options)


def finish(document: dict[str, Any], options: argparse.Namespace) -> None:
    """Print or store the report; exit 1 if it holds an error."""
    makespan_s = next((r["value"] for r in document["rows"] if r["name"] == "makespan"), None)
    nodes = harness.markdown_table(
        ("node", "slots", "tasks", "busy s", "filled"),
        [
            (n["node"], str(n["slots"]), str(n["tasks"]), f"{n['busy_s']:.2f}",
             f"{n['busy_s'] / (makespan_s * n['slots']):.0%}" if makespan_s and n["slots"] else "-")
            for n in document["nodes"]
        ],
    )
    results = [Result.from_json(row) for row in document["rows"]]
    text = f"{document['tasks']} sleeping tasks\n\n{nodes}\n\n{harness.result_table(results)}"
    harness.report(document, text, options.json)
    if any(result.error for result in results):
        raise SystemExit(1)


def main() -> None:
    options = parse_arguments()
    if options.inside or harness.under_launcher():
        run_inside(options)
    else:
        run_job(options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sleeping tasks against the ideal makespan.")
    parser.add_argument("--nodes", "-n", type=int, default=4)
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--min-ms", type=float, default=1.0)
    parser.add_argument("--max-ms", type=float, default=100.0)
    parser.add_argument("--seed", type=int, default=20180)
    parser.add_argument("--limit", type=float, default=180.0, metavar="S")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
