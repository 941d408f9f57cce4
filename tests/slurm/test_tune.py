"""Ray's own Tune in a Slurm allocation, by slurm/tune.sbatch: `make test-ray`."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..process.jobs import ROOT
from .conftest import Submit, has

pytestmark = [
    pytest.mark.tune, pytest.mark.timeout(180),
    pytest.mark.skipif(
        not has("ray"), reason="no ray is installed here: `make test-ray` runs it"),
]

THREE = ("--nodes=3", "--cpus-per-task=1", "--mem=800")
EXAMPLE = ROOT / "examples" / "tune_pendulum.py"


def test_the_tuned_pendulum_unchanged(submit: Submit, tmp_path: Path) -> None:
    job = submit(EXAMPLE.read_text(), "--trials", "6", "--storage", str(tmp_path),
                 template="tune.sbatch", options=THREE)
    output = job.finish(150)
    assert "6 trials" in output and "the best gains are kp=" in output
    assert len(list((tmp_path / "pendulum").glob("trial_*/checkpoint_*/returns.json"))) >= 6


def test_trials_run_on_all_nodes_and_a_killed_one_goes_on(submit: Submit, tmp_path: Path) -> None:
    job = submit("""
import json, os, signal, sys, time
import ray
from ray import tune

def wait_for(*paths):
    while not all(map(os.path.exists, paths)):
        time.sleep(0.05)

def trial(config):
    place = os.environ["SLURMD_NODENAME"]
    step, places = 0, []
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as folder:
            step, places = json.load(open(os.path.join(folder, "state.json")))
    open(f"{config['folder']}/begun-{config['number']}", "w").close()
    wait_for(*(f"{config['folder']}/begun-{number}" for number in range(3)))  # all three run
    while step < 3:
        step += 1
        places.append(place)
        os.makedirs("mine", exist_ok=True)
        with open("mine/state.json", "w") as file:
            json.dump([step, places], file)
        tune.report({"step": step, "places": str(places)},
                    checkpoint=tune.Checkpoint.from_directory("mine"))
        if config["number"] == 1 and step == 2:
            wait_for(f"{config['folder']}/saved")
            os.kill(os.getpid(), signal.SIGKILL)

class Saved(tune.Callback):
    def on_checkpoint(self, iteration, trials, trial, checkpoint, **info):
        if trial.config["number"] == 1 and trial.last_result.get("step") == 2:
            open(sys.argv[1] + "/saved", "w").close()

results = tune.Tuner(
    trial, param_space={"number": tune.grid_search([0, 1, 2]), "folder": sys.argv[1]},
    run_config=tune.RunConfig(
        storage_path=sys.argv[1], name="nodes", verbose=0, callbacks=[Saved()],
        failure_config=tune.FailureConfig(max_failures=1))).fit()
assert not results.errors
places = [eval(result.metrics["places"]) for result in results]
assert [len(of_one) for of_one in places] == [3, 3, 3], places
print("began on", len({of_one[0] for of_one in places}), "nodes", flush=True)
""", str(tmp_path), template="tune.sbatch", options=THREE)
    assert "began on 3 nodes" in job.finish(150)
