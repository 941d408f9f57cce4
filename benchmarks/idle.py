"""What a runtime costs while nothing runs: CPU and wake-ups of nodes and workers.

    python benchmarks/idle.py
    mpirun -n 2 hpcray run benchmarks/idle.py       all ranks on this host are counted

A few tasks and one actor first, so that workers exist; then silence. A node that
polls shows up here, and on a shared host takes the time of those who work.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness
import process_tree
import psutil
from harness import Result

# Schedulers back off in steps; by now the slowest step is reached (hpcray: after 1 s).
SETTLE_S = 3.0


@dataclass(frozen=True, slots=True)
class Usage:
    cpu_s: float
    wakeups: int


def usage(process: psutil.Process) -> Usage | None:
    try:
        times = process.cpu_times()
        return Usage(times.user + times.system, process.num_ctx_switches().voluntary)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def measure(ray: Any, seconds: float) -> list[Result]:
    def nothing() -> None:
        return None

    class Idler:
        def ping(self) -> None:
            return None

    task = ray.remote(nothing)
    actor = ray.remote(num_cpus=0)(Idler).remote()
    ray.get([task.remote() for _ in range(100)] + [actor.ping.remote()])
    time.sleep(SETTLE_S)
    driver = psutil.Process()
    watched = [(driver, "driver")] + [(p, process_tree.kind(p)) for p in process_tree.processes()]
    before = {process.pid: usage(process) for process, _ in watched}
    start = time.perf_counter()
    time.sleep(seconds)
    elapsed = time.perf_counter() - start
    cpu: dict[str, float] = {}
    wakeups: dict[str, float] = {}
    count: dict[str, int] = {}
    for process, kind in watched:
        first, last = before[process.pid], usage(process)
        if first is None or last is None:
            continue  # ended meanwhile: an idle worker that was let go
        cpu[kind] = cpu.get(kind, 0.0) + (last.cpu_s - first.cpu_s) / elapsed * 100
        wakeups[kind] = wakeups.get(kind, 0.0) + (last.wakeups - first.wakeups) / elapsed
        count[kind] = count.get(kind, 0) + 1
    results: list[Result] = []
    for kind in sorted(cpu):
        label = f"{kind} ({count[kind]} processes)"
        results.append(Result.of(f"cpu: {label}", "% of a core", [cpu[kind]], "lower"))
        results.append(Result.of(f"wake-ups: {label}", "1/s", [wakeups[kind]], "lower"))
    results.append(Result.of("cpu: all", "% of a core", [sum(cpu.values())], "lower"))
    return results


def main() -> None:
    options = parse_arguments()
    before = harness.machine()
    versions: dict[str, str] = {}
    under = harness.under_launcher()
    try:
        with harness.hard_limit(options.seconds + 60, "idle"):
            ray = harness.load_backend(options.backend)
            versions = harness.versions(ray)
            if under:
                ray.init()  # the job's ranks have their CPUs already
            else:
                ray.init(num_cpus=2)
            try:
                results = measure(ray, options.seconds)
            finally:
                ray.shutdown()
    except Exception as error:
        results = [Result.failed("idle", f"{type(error).__name__}: {error}")]
    document = {
        "benchmark": "idle", "backend": options.backend, "date": harness.date(),
        "commit": harness.commit(), "machine": before, "versions": versions,
        "seconds": options.seconds, "rows": [result.to_json() for result in results],
    }
    text = f"{options.backend}, idle for {options.seconds:g} s\n"
    harness.report(document, text + harness.result_table(results), options.json)
    if any(result.error for result in results):
        raise SystemExit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CPU used while nothing runs.")
    parser.add_argument("--backend", choices=harness.BACKENDS, default="hpcray")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
