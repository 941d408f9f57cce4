"""Two checkouts of hpcray, sample against sample: has a change made a row slower?

Why not `compare.py`: between two runs of one and the same code, a shared machine and the layout of
memory differ by 5 % and more. Here both sides live at once and take turns of a tenth of a second,
the one that waits asleep, so whatever the machine does happens to both; and each row is measured in
several pairs of fresh processes, whose ratios scatter by what a layout does. Ten pairs find 2 %.

    this program                     two children per pair, one per checkout
    ------------                     ---------------------------------------
    coin  ---- "go" ---->            one sample of the row, by `micro.py`
          <--- numbers ---           its rates, as many as the row takes per turn

What must not go in: rows. They are `micro.py`'s, and both checkouts get those of this one.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness
import micro

END_OF_TURN = "turn"
KEPT = 0.9  # of a side's samples: the slowest tenth is somebody else's work
LIMIT_S = 300.0  # of one pair


# --- The child ----------------------------------------------------------------------------------


class PacedBench(micro.Bench):
    """Takes each sample when it is told to, and says at once what it was."""

    def wants_more(self, done: int) -> bool:
        print(END_OF_TURN, flush=True)
        return bool(sys.stdin.readline())

    def sample(  # type: ignore[override]  # static there
        self, call: Callable[[], object], step: int, seconds: float
    ) -> float:
        rate = micro.Bench.sample(call, step, seconds)
        print(rate, flush=True)
        return rate


def run_row(row: str, seconds: float) -> None:
    ray = harness.load_backend("hpcray")
    if not Path(ray.__file__).is_relative_to(os.environ["PYTHONPATH"]):
        raise SystemExit(f"hpcray came from {ray.__file__}, not from {os.environ['PYTHONPATH']}")
    ray.init(num_cpus=micro.NUM_CPUS)
    bench = PacedBench(ray, micro.Settings(seconds, 1, LIMIT_S))
    ray.get([bench.remotes.small_value.remote() for _ in range(100)])
    bench.begin(row)
    micro.ROWS[row](bench)
    ray.shutdown()


# --- The parent ---------------------------------------------------------------------------------


class Side:
    def __init__(self, checkout: str, row: str, seconds: float, seed: int) -> None:
        env = harness.launch_environment()
        env["PYTHONPATH"] = checkout
        env["PYTHONHASHSEED"] = str(seed)  # how dicts and sets fall out: the same for both
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--child", row,
             "--seconds", str(seconds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
            start_new_session=True,
        )
        self.turns: list[list[float]] = []

    def finish_turn(self) -> list[float]:
        """What the child has measured since the last time."""
        assert self._process.stdout is not None
        rates = []
        for line in self._process.stdout:
            if line.strip() == END_OF_TURN:
                return rates
            rates.append(float(line))
        raise SystemExit("a side ended in the middle of its row; what it said is above")

    def take_turn(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self.turns.append(self.finish_turn())

    def rate(self) -> float:
        """Of the turns that count. A row with two numbers a turn ends with the one it is about."""
        rates = sorted((turn[-1] for turn in self.turns), reverse=True)
        return statistics.fmean(rates[: max(1, round(KEPT * len(rates)))])

    def close(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(micro.EXIT_LIMIT_S)
        except (OSError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def one_pair(checkouts: Sequence[str], row: str, options: argparse.Namespace, seed: int) -> float:
    """How many times as fast the first checkout is, in two fresh clusters."""
    sides: list[Side] = []
    coin = random.Random(seed)
    with harness.hard_limit(LIMIT_S, row):
        try:
            for checkout in checkouts:
                sides.append(Side(checkout, row, options.seconds, seed))
            for side in sides:
                side.finish_turn()  # its warm-up
            for _ in range(options.turns):
                for side in coin.sample(sides, 2):
                    side.take_turn()
            return sides[0].rate() / sides[1].rate()
        finally:
            for side in sides:
                side.close()


def main() -> None:
    options = parse_arguments()
    if options.child:
        run_row(options.child, options.seconds)
        return
    rows = [row for row in micro.ROWS if re.search(options.filter, row)]
    if not rows:
        raise SystemExit(f"no row matches {options.filter!r}; rows: {', '.join(micro.ROWS)}")
    checkouts = [str(options.a.resolve()), str(options.b.resolve())]
    for checkout in checkouts:
        if not (Path(checkout) / "hpcray" / "__init__.py").exists():
            raise SystemExit(f"{checkout} is no checkout of hpcray: it has no hpcray/__init__.py")
    document: dict[str, Any] = {"date": harness.date(), "machine": harness.machine(),
                                "commit": harness.commit(), "rows": []}
    table = []
    slower = []
    for row in rows:
        ratios = [one_pair(checkouts, row, options, seed) for seed in range(options.pairs)]
        logs = [math.log(ratio) for ratio in ratios]
        speed = math.exp(statistics.fmean(logs))
        error = 2 * statistics.stdev(logs) / math.sqrt(len(logs))
        if speed < options.at_least:
            slower.append(row)
        print(f"{row}: {speed:.3f} ± {error:.3f}", file=sys.stderr, flush=True)
        document["rows"].append({"name": row, "speed": speed, "error": error, "ratios": ratios})
        table.append((row, f"{speed:.3f}", f"{error:.3f}", f"{min(ratios):.3f}",
                      f"{max(ratios):.3f}"))
    text = harness.markdown_table(
        ("row", "A is times as fast as B", "± 2 s.e.", "least", "most"), table)
    harness.report(document, text, options.json)
    if slower:
        raise SystemExit(f"slower than {options.at_least:g}: {', '.join(slower)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Two checkouts, sample against sample")
    parser.add_argument("--a", type=Path, default=harness.REPOSITORY, metavar="FOLDER",
                        help="default: this checkout")
    parser.add_argument("--b", type=Path, metavar="FOLDER", help="the other checkout")
    parser.add_argument("--filter", default="", metavar="REGEX")
    parser.add_argument("--pairs", type=int, default=6, help="pairs of fresh processes per row")
    parser.add_argument("--turns", type=int, default=40, help="samples of each side in a pair")
    parser.add_argument("--seconds", type=float, default=0.1, help="length of one sample")
    parser.add_argument("--at-least", type=float, default=0.0, metavar="RATIO",
                        help="exit 1 if a row is slower than this, such as 0.95")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.child and options.b is None:
        parser.error("--b is needed: another checkout, such as a `git worktree` of a release")
    if options.pairs < 2:
        parser.error("--pairs: two or more, else there is no error to tell")
    return options


if __name__ == "__main__":
    main()
