"""Two backends on the same machine in turn, A B A B ..., against the target ratios.

Why in turn: a shared machine drifts by tens of percent within minutes; two blocks
one after the other would measure the drift. Each round is a fresh process of
`micro.py` per side, so sides may be different Pythons, and also two checkouts of
one backend.

What must not go in: measuring. Rows live in `micro.py`; this program starts it,
joins rounds and judges. A side that fails is reported, never dropped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness
from harness import Result

RAY_PYTHON_VARIABLE = "HPCRAY_RAY_PYTHON"
# micro.py limits itself to `--total-limit`; this is for a supervisor that is stuck itself.
SIDE_LIMIT_FACTOR = 1.5


@dataclass(frozen=True, slots=True)
class Target:
    """What side A shall reach: a ratio to B, or with `absolute` a value of its own."""

    bound: float
    absolute: bool = False
    better: str = "higher"

    def text(self) -> str:
        if not self.absolute:
            return f">= {self.bound:g}x"
        return f"{'<=' if self.better == 'lower' else '>='} {self.bound:g}"

    def met(self, value: float, ratio: float | None) -> bool | None:
        measured = value if self.absolute else ratio
        if measured is None:
            return None
        return measured <= self.bound if self.better == "lower" else measured >= self.bound


TARGETS: dict[str, Target] = {
    "tasks_sync": Target(5),
    "tasks_async": Target(15),
    "multi_client_tasks_async": Target(12),
    "actor_sync": Target(5),
    "actor_async": Target(8),
    "n_n_actor_async": Target(8),
    "put_small": Target(15),
    "get_small": Target(8),
    "put_100mb_of_copyto": Target(0.8, absolute=True),
    "put_500mb_of_copyto": Target(0.8, absolute=True),
    "wait_1k_refs": Target(10),
    "get_10k_refs": Target(3),
    "actor_starts": Target(15),
    "init": Target(0.8, absolute=True, better="lower"),
    "async_actor_sync": Target(6),
    "async_actor_async": Target(6),
    "n_n_async_actor_async": Target(6),
}


@dataclass(frozen=True, slots=True)
class Side:
    name: str  # "A" or "B"
    python: str
    backend: str


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the comparison. `ratio` > 1 always means that A is better."""

    name: str
    unit: str
    a: Result | None
    b: Result | None
    ratio: float | None
    target: str
    verdict: str  # "pass", "FAIL", "no result", or "" without a target


def judge(a_rows: dict[str, Result], b_rows: dict[str, Result]) -> list[Line]:
    """Join the rows of both sides; a target whose row is missing has no result."""
    names = list(dict.fromkeys([*a_rows, *b_rows]))
    return [_judge_row(name, a_rows.get(name), b_rows.get(name)) for name in names]


def _judge_row(name: str, a: Result | None, b: Result | None) -> Line:
    a_value = a.value if a else None
    b_value = b.value if b else None
    ratio = None
    better = (a or b or Result(name, "", None)).better
    if a_value and b_value:
        ratio = b_value / a_value if better == "lower" else a_value / b_value
    target = TARGETS.get(name)
    verdict = ""
    if target is not None:
        met = None if a_value is None else target.met(a_value, ratio)
        verdict = "no result" if met is None else "pass" if met else "FAIL"
    unit = next((side.unit for side in (a, b) if side and side.unit), "")
    return Line(name, unit, a, b, ratio, target.text() if target else "", verdict)


def join_rounds(rounds: Sequence[dict[str, Any]]) -> dict[str, Result]:
    """One result per row over all rounds: the median of medians, the outermost extremes.

    A row that failed in some rounds keeps its numbers from the others; `repeat` tells.
    """
    found: dict[str, list[Result]] = {}
    for document in rounds:
        for row in document["rows"]:
            found.setdefault(row["name"], []).append(Result.from_json(row))
    return {name: _join(name, results) for name, results in found.items()}


def _join(name: str, results: Sequence[Result]) -> Result:
    good = [r for r in results if r.value is not None]
    if not good:
        return results[-1]
    return Result(
        name, good[0].unit,
        statistics.median([r.value for r in good if r.value is not None]),
        min(r.min for r in good if r.min is not None),
        max(r.max for r in good if r.max is not None),
        sum(r.repeat for r in good), good[0].better,
    )


def run_side(side: Side, options: argparse.Namespace, folder: Path, round_: int) -> dict[str, Any]:
    """One run of micro.py; its own failure becomes a document without rows."""
    output = folder / f"{side.name}{round_}.json"
    print(f"round {round_ + 1}/{options.rounds}: {side.name} = {side.backend}", file=sys.stderr)
    command = [
        side.python, str(harness.BENCHMARKS / "micro.py"), "--backend", side.backend,
        "--json", str(output), "--filter", options.filter, "--seconds", str(options.seconds),
        "--repeat", str(options.repeat), "--total-limit", str(options.total_limit),
    ]
    env = dict(os.environ)
    if side.backend == "hpcray" and not options.installed:
        env = harness.launch_environment()  # this checkout comes first on PYTHONPATH
    problem = ""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=env,
            timeout=options.total_limit * SIDE_LIMIT_FACTOR + 60,
        )
        if done.returncode:
            problem = f"micro.py exited with {done.returncode}"
    except subprocess.TimeoutExpired:
        problem = "micro.py did not end in time"
    if not output.exists():
        return {"backend": side.backend, "versions": {}, "rows": [],
                "notes": [problem or "micro.py wrote no results"]}
    document: dict[str, Any] = json.loads(output.read_text())
    return document


def table(lines: Sequence[Line], sides: tuple[Side, Side]) -> str:
    a, b = sides
    return harness.markdown_table(
        ("row", "unit", f"A: {a.backend}", "A min-max", f"B: {b.backend}", "B min-max",
         "ratio", "target", "verdict"),
        [
            (line.name, line.unit, _value(line.a), _range(line.a), _value(line.b),
             _range(line.b), f"{line.ratio:.2f}x" if line.ratio is not None else "-",
             line.target, line.verdict)
            for line in lines
        ],
    )


def _value(result: Result | None) -> str:
    if result is None:
        return "-"
    return "error" if result.error else harness.number(result.value)


def _range(result: Result | None) -> str:
    if result is None or result.value is None:
        return "-"
    return f"{harness.number(result.min)} - {harness.number(result.max)}"


def page(document: dict[str, Any], lines: Sequence[Line], sides: tuple[Side, Side]) -> str:
    """The stored markdown: table first, then everything needed to judge the numbers."""
    machine = document["machine"]
    counted = [line.verdict for line in lines if line.verdict]
    errors = [
        f"- {side.name} {result.name}: {result.error}"
        for line in lines
        for side, result in zip(sides, (line.a, line.b), strict=True)
        if result is not None and result.error
    ]
    parts = [
        f"# {sides[0].backend} against {sides[1].backend}",
        table(lines, sides),
        f"{counted.count('pass')} of {len(counted)} targets met. A ratio above 1 means that A "
        "is better. Medians over all rounds.",
        "## Where and how",
        "\n".join([
            f"- date: {document['date']}, commit: {document['commit']}",
            f"- machine: {machine['cpu']}, {machine['cores']} cores, "
            f"{machine['memory_gib']} GiB, {machine['system']}, "
            f"load {machine['load_1min']} before the first round",
            *(
                f"- {side.name}: " + ", ".join(f"{k} {v}" for k, v in versions.items())
                for side, versions in zip(sides, document["versions"], strict=True)
            ),
            f"- rounds: {document['rounds']} (A B in turn), per row and round "
            f"{document['repeat']} samples of {document['seconds']:g} s, num_cpus=2",
        ]),
    ]
    if errors or document["notes"]:
        notes = [f"- {note}" for note in document["notes"]]
        parts += ["## Errors and notes", "\n".join([*errors, *notes])]
    return "\n\n".join(parts) + "\n"


def print_table(lines: Sequence[Line], sides: tuple[Side, Side]) -> None:
    """In colour where rich is installed and someone looks; as markdown otherwise."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(table(lines, sides))
        return
    if not sys.stdout.isatty():
        print(table(lines, sides))
        return
    shown = Table(title=f"A: {sides[0].backend}   B: {sides[1].backend}")
    shown.add_column("row")
    for header in ("unit", "A", "B", "ratio", "target", "verdict"):
        shown.add_column(header, justify="right")
    colours = {"pass": "green", "FAIL": "red", "no result": "yellow"}
    for line in lines:
        shown.add_row(
            line.name, line.unit, _value(line.a), _value(line.b),
            f"{line.ratio:.2f}x" if line.ratio is not None else "-", line.target, line.verdict,
            style=colours.get(line.verdict),
        )
    Console().print(shown)


def find_python(given: str | None, side: str, backend: str) -> str:
    """The interpreter of a side, or an error that says how to make one."""
    if given is None and backend == "ray":
        given = os.environ.get(RAY_PYTHON_VARIABLE)
        if given is None:
            raise SystemExit(
                f"Which Python has Ray? Set {RAY_PYTHON_VARIABLE} or --{side.lower()}-python.\n"
                "To make one (Ray needs a venv of its own):\n"
                "    python -m venv ray-venv\n"
                "    ray-venv/bin/pip install ray==2.60.0 numpy\n"
                f"    export {RAY_PYTHON_VARIABLE}=$PWD/ray-venv/bin/python"
            )
    python = given or sys.executable
    if shutil.which(python) is None:
        raise SystemExit(f"side {side}: {python} is not an executable Python")
    probe = subprocess.run(
        [python, "-c", f"import importlib.util as u, sys; sys.exit(not u.find_spec({backend!r}))"],
        env=harness.launch_environment(), timeout=60,
    )
    if probe.returncode:
        raise SystemExit(f"side {side}: {python} has no {backend}; install it there"
                         + (" (`pip install ray==2.60.0`)" if backend == "ray" else ""))
    return python


def main() -> None:
    options = parse_arguments()
    sides = (
        Side("A", find_python(options.a_python, "A", options.a_backend), options.a_backend),
        Side("B", find_python(options.b_python, "B", options.b_backend), options.b_backend),
    )
    before = harness.machine()
    runs: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    with tempfile.TemporaryDirectory() as folder:
        for round_ in range(options.rounds):
            for side, documents in zip(sides, runs, strict=True):
                documents.append(run_side(side, options, Path(folder), round_))
    lines = judge(join_rounds(runs[0]), join_rounds(runs[1]))
    document: dict[str, Any] = {
        "date": harness.date(),
        "commit": harness.commit(),
        "machine": before,
        "versions": [
            next((r["versions"] for r in documents if r["versions"]), {}) for documents in runs
        ],
        "backends": [side.backend for side in sides],
        "rounds": options.rounds,
        "seconds": options.seconds,
        "repeat": options.repeat,
        "notes": [
            f"{side.name}: {note}"
            for side, documents in zip(sides, runs, strict=True)
            for run in documents
            for note in run["notes"]
        ],
        "rows": [
            {"name": line.name, "unit": line.unit, "a": line.a.to_json() if line.a else None,
             "b": line.b.to_json() if line.b else None, "ratio": line.ratio,
             "target": line.target, "verdict": line.verdict}
            for line in lines
        ],
        "runs": {side.name: documents for side, documents in zip(sides, runs, strict=True)},
    }
    stem = options.out or harness.BENCHMARKS / "results" / (
        f"{sides[0].backend}-{sides[1].backend}-{document['commit'].replace('+', '-')}"
    )
    stem = stem.with_suffix("") if stem.suffix in (".md", ".json") else stem
    stem.parent.mkdir(parents=True, exist_ok=True)
    # Appended, not `with_suffix`: a stem such as `v1.2` has a suffix already.
    Path(f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    Path(f"{stem}.md").write_text(page(document, lines, sides))
    if options.json:
        print(json.dumps(document, indent=1))
    else:
        print_table(lines, sides)
    print(f"written: {stem}.md, {stem}.json", file=sys.stderr)
    if options.check and any(line.verdict in ("FAIL", "no result") for line in lines):
        raise SystemExit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare two backends, A B A B ...")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--a-python", metavar="PATH", help="default: this Python")
    parser.add_argument("--a-backend", choices=harness.BACKENDS, default="hpcray")
    parser.add_argument("--b-python", metavar="PATH", help=f"default: ${RAY_PYTHON_VARIABLE}")
    parser.add_argument("--b-backend", choices=harness.BACKENDS, default="ray")
    parser.add_argument("--installed", action="store_true",
                        help="use the hpcray that each Python has, not this checkout")
    parser.add_argument("--filter", default="", metavar="REGEX")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--total-limit", type=float, default=200.0, metavar="S",
                        help="limit of one side in one round")
    parser.add_argument("--json", action="store_true", help="JSON on stdout, not the table")
    parser.add_argument("--out", type=Path, metavar="STEM",
                        help="write STEM.md and STEM.json (default: in benchmarks/results/)")
    parser.add_argument("--check", action="store_true", help="exit 1 if a target is missed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
