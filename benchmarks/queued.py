"""A long queue: one driver submits a million empty tasks before any may run.

    1. blockers take every CPU and wait on a named pipe
    2. submit all tasks           rate per slice: must not fall as the queue grows
    3. read the node's memory     bytes per queued task
    4. open the pipe; get all     in slices, dropping the refs as they come

With `--open` nothing blocks: submission and execution overlap, as in a real program.
(Not called queue.py: a script's folder comes first on `sys.path`, and that name
would replace the standard library's `queue` in every process.)
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness
import process_tree
import psutil
from harness import Result


@contextlib.contextmanager
def gate(ray: Any, cpus: int) -> Iterator[None]:
    """Hold every CPU until the block ends.

    By pipes, not by an actor or an object: a task that blocks in `get` gives its CPU
    back. A blocker reports only once it has the gate open, so that none can miss the end.
    """
    with tempfile.TemporaryDirectory() as folder:
        gate_path, ready_path = os.path.join(folder, "gate"), os.path.join(folder, "ready")
        os.mkfifo(gate_path)
        os.mkfifo(ready_path)

        def hold() -> None:
            with open(gate_path, "rb") as held:
                with open(ready_path, "wb") as ready:
                    ready.write(b".")
                held.read()  # returns when the driver closes its end

        # Read and write: an open for one way alone waits for the other end to appear.
        gate_fd = os.open(gate_path, os.O_RDWR)
        ready_fd = os.open(ready_path, os.O_RDWR)
        try:
            blockers = [ray.remote(hold).remote() for _ in range(cpus)]
            for _ in range(cpus):
                os.read(ready_fd, 1)  # ends at the program's limit if one never starts
            yield
        finally:
            os.close(gate_fd)
            os.close(ready_fd)
        ray.get(blockers)


def node_rss_bytes() -> tuple[int, str]:
    """Memory of rank 0's node (on one host: of the largest), and what was found."""
    found = process_tree.nodes(process_tree.processes())
    sizes = [process.memory_info().rss for process in found]
    return (max(sizes), f"{len(sizes)} node process(es)") if sizes else (0, "no node process")


def measure(ray: Any, tasks: int, slice_: int, gated: bool) -> tuple[list[Result], list[float]]:
    def nothing() -> None:
        return None

    task = ray.remote(nothing)
    ray.get([task.remote() for _ in range(1000)])  # workers started, function known
    cpus = int(ray.cluster_resources()["CPU"])
    driver = psutil.Process()
    node_before, found = node_rss_bytes()
    driver_before = driver.memory_info().rss
    refs: list[Any] = []
    rates: list[float] = []
    holding: contextlib.AbstractContextManager[None] = (
        gate(ray, cpus) if gated else contextlib.nullcontext()
    )
    with holding:
        began = time.perf_counter()
        while len(refs) < tasks:
            count = min(slice_, tasks - len(refs))
            start = time.perf_counter()
            refs += [task.remote() for _ in range(count)]
            rates.append(count / (time.perf_counter() - start))
            print(f"submitted {len(refs):,}: {rates[-1]:,.0f} tasks/s", file=sys.stderr)
        submitted = time.perf_counter()
        node_after, _ = node_rss_bytes()
        driver_after = driver.memory_info().rss
        opened = time.perf_counter()
    while refs:
        # The tail: taking slices off the front of a list would copy it each time. The
        # first slice then waits for the whole queue, and the rest is there already.
        ray.get(refs[-slice_:])
        del refs[-slice_:]
    finished = time.perf_counter()
    results = [
        Result.of("submit", "tasks/s", rates),
        Result.of("submit_last_of_first", "ratio", [rates[-1] / rates[0]]),
        Result.of("run_queue", "tasks/s", [tasks / (finished - opened)]),
        Result.of("total", "s", [submitted - began + finished - opened], "lower"),
        Result.of("driver_bytes_per_task", "B", [(driver_after - driver_before) / tasks], "lower"),
    ]
    if node_before:
        per_task = (node_after - node_before) / tasks
        results.append(Result.of("node_bytes_per_task", "B", [per_task], "lower"))
    else:
        results.append(Result.failed("node_bytes_per_task", found))
    return results, rates


def main() -> None:
    options = parse_arguments()
    before = harness.machine()
    rates: list[float] = []
    versions: dict[str, str] = {}
    try:
        with harness.hard_limit(options.limit, "queued"):
            ray = harness.load_backend(options.backend)
            versions = harness.versions(ray)
            ray.init(num_cpus=2)
            try:
                results, rates = measure(ray, options.tasks, options.slice, not options.open)
            finally:
                ray.shutdown()
    except Exception as error:
        results = [Result.failed("queued", f"{type(error).__name__}: {error}")]
    document = {
        "benchmark": "queued", "backend": options.backend, "date": harness.date(),
        "commit": harness.commit(), "machine": before, "versions": versions,
        "tasks": options.tasks, "slice": options.slice, "gated": not options.open,
        "rate_per_slice": rates, "rows": [result.to_json() for result in results],
    }
    slices = harness.markdown_table(
        ("queued after", "tasks/s"),
        [(f"{min((i + 1) * options.slice, options.tasks):,}", f"{rate:,.0f}")
         for i, rate in enumerate(rates)],
    )
    text = f"{options.backend}: {options.tasks:,} empty tasks, one driver\n\n"
    harness.report(
        document, text + slices + "\n\n" + harness.result_table(results), options.json
    )
    if any(result.error for result in results):
        raise SystemExit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A million queued empty tasks.")
    parser.add_argument("--backend", choices=harness.BACKENDS, default="hpcray")
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--slice", type=int, default=100_000)
    parser.add_argument("--open", action="store_true", help="let tasks run while submitting")
    parser.add_argument("--limit", type=float, default=400.0, metavar="S")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
