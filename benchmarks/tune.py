"""Ray Tune on hpcray and on Ray, side by side: the same Tune, the same packages, in turn.

    python benchmarks/tune.py                                 # both, A B A B; needs ray[tune]
    python benchmarks/tune.py --backend hpcray --trials 30    # one of them
    python benchmarks/tune.py --rows first_trial --rounds 5   # some of the rows

| row | one unit is |
|---|---|
| `first_trial` | seconds from the start of the script to the first report of its first trial |
| `empty` | seconds for `--trials` function trials that report once |
| `pbt` | seconds for 4 trials of population-based training, 20 steps with checkpoints each |

Each sample is a fresh process. A side that fails is reported, never dropped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SAMPLE_LIMIT_S = 900.0
ROWS = ("first_trial", "empty", "pbt")


def sample(rows: list[str], trials: int, started_s: float) -> dict[str, float]:
    """In a process of its own: `import ray` gives what it was started with."""
    import ray
    from ray import tune
    from ray.tune.schedulers import PopulationBasedTraining

    folder = tempfile.mkdtemp(prefix="tune-benchmark-")

    def run_config(name: str) -> Any:
        return tune.RunConfig(storage_path=folder, name=name, verbose=0)

    def timed(config: dict[str, Any]) -> None:
        tune.report({"score": 1, "at_s": time.time()})

    def empty(config: dict[str, Any]) -> None:
        tune.report({"score": 1})

    class Climb(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.height = 0.0

        def step(self) -> dict[str, Any]:
            self.height += self.config["pace"]
            return {"height": self.height, "done": self.iteration >= 19}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            Path(checkpoint_dir, "height").write_text(str(self.height))

        def load_checkpoint(self, checkpoint: Any) -> None:
            self.height = float(Path(checkpoint, "height").read_text())

    ray.init(num_cpus=2)
    found: dict[str, float] = {}
    [first] = tune.Tuner(timed, run_config=run_config("first")).fit()
    found["first_trial"] = first.metrics["at_s"] - started_s
    if "empty" in rows:
        begin_s = time.monotonic()
        results = tune.Tuner(empty, tune_config=tune.TuneConfig(num_samples=trials),
                             run_config=run_config("empty")).fit()
        found["empty"] = time.monotonic() - begin_s
        assert len(results) == trials and not results.errors
    if "pbt" in rows:
        scheduler = PopulationBasedTraining(
            time_attr="training_iteration", perturbation_interval=5,
            hyperparam_mutations={"pace": tune.uniform(0, 1)})
        begin_s = time.monotonic()
        results = tune.Tuner(
            tune.with_resources(Climb, {"cpu": 0.5}),
            param_space={"pace": tune.grid_search([0.1, 0.2, 0.3, 0.4])},
            tune_config=tune.TuneConfig(metric="height", mode="max", scheduler=scheduler),
            run_config=run_config("pbt")).fit()
        found["pbt"] = time.monotonic() - begin_s
        assert len(results) == 4 and not results.errors
    ray.shutdown()
    return found


def run_side(backend: str, rows: list[str], trials: int) -> dict[str, float] | str:
    """One sample of a side, or what went wrong."""
    command = [sys.executable]
    if backend == "hpcray":
        command += ["-m", "hpcray", "run", "--as-ray"]
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        command += [__file__, "--sample", answer.name, "--rows", *rows,
                    "--trials", str(trials), "--started", str(time.time())]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=SAMPLE_LIMIT_S,
                env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"})
        except subprocess.TimeoutExpired:
            return f"no answer within {SAMPLE_LIMIT_S:.0f} s"
        text = answer.read()
    if done.returncode != 0 or not text:
        return f"status {done.returncode}: {done.stderr.strip()[-500:]}"
    found: dict[str, float] = json.loads(text)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backend", choices=["hpcray", "ray", "both"], default="both")
    parser.add_argument("--trials", type=int, default=100, help="of the row `empty`")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the samples there")
    parser.add_argument("--sample", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sample is not None:
        found = sample(options.rows, options.trials, options.started)
        options.sample.write_text(json.dumps(found))
        return 0
    backends = ["hpcray", "ray"] if options.backend == "both" else [options.backend]
    samples: dict[str, list[dict[str, float]]] = {backend: [] for backend in backends}
    failed = 0
    for number in range(options.rounds):
        for backend in backends:
            answer = run_side(backend, options.rows, options.trials)
            if isinstance(answer, str):
                print(f"round {number + 1}, {backend}: {answer}", file=sys.stderr)
                failed += 1
            else:
                samples[backend].append(answer)
                print(f"round {number + 1}, {backend}: " + ", ".join(
                    f"{row} {answer[row]:.1f} s" for row in options.rows), flush=True)
    print("\n| row | " + " | ".join(f"{backend}, s" for backend in backends)
          + (" | factor |" if len(backends) == 2 else " |"))
    print("|---|" + "---:|" * (len(backends) + (len(backends) == 2)))
    for row in options.rows:
        medians = [statistics.median(found[row] for found in samples[backend])
                   if samples[backend] else float("nan") for backend in backends]
        cells = [f"{median:.1f}" for median in medians]
        if len(medians) == 2:
            cells.append(f"{medians[1] / medians[0]:.1f}")
        print(f"| {row} | " + " | ".join(cells) + " |")
    if options.json is not None:
        answers = {"trials": options.trials, "samples": samples}
        options.json.write_text(json.dumps(answers, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
