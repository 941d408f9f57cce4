"""Ray's own Tune, from an installed ray, on hpcray: `make test-ray`."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..process.jobs import Job

try:
    importlib.metadata.distribution("ray")
    MISSING = ""
except importlib.metadata.PackageNotFoundError:
    MISSING = "no ray is installed here: `make test-ray` runs it"
pytestmark = [
    pytest.mark.tune, pytest.mark.timeout(240),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]

ROOT = Path(__file__).resolve().parents[2]
HEAD = """
import json, os, signal, sys, time
import ray
from ray import tune

def load(path, default):
    return json.load(open(path)) if os.path.exists(path) else default

def report(folder, score, **more):
    # A report with a checkpoint.
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "state.json"), "w") as file:
        json.dump(score, file)
    tune.report({"score": score, **more}, checkpoint=tune.Checkpoint.from_directory(folder))

def resumed():
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        return load(os.path.join(folder, "state.json"), 0)

def run_config(name, **more):
    return tune.RunConfig(storage_path=os.getcwd(), name=name, verbose=0, **more)
"""
TAIL = """
assert not any("_raylet" in line for line in open("/proc/self/maps"))
print("well", flush=True)
"""


class Tuned:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, source: str, *options: str) -> subprocess.Popen[str]:
        (self.folder / "script.py").write_text(HEAD + source + TAIL)
        command = [sys.executable, "-m", "hpcray", "run", "--as-ray", *options, "script.py"]
        self.processes.append(subprocess.Popen(
            command, cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, env={**os.environ, "TUNE_GLOBAL_CHECKPOINT_S": "0"}))
        return self.processes[-1]

    def run(self, source: str, *options: str) -> str:
        process = self.start(source, *options)
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0 and "well\n" in output, output
        return output


@pytest.fixture
def tuned(tmp_path: Path) -> Iterator[Tuned]:
    tuned = Tuned(tmp_path)
    yield tuned
    for process in tuned.processes:
        if process.returncode is None:
            process.kill()
            process.communicate()


def test_function_trainables_are_scheduled(tuned: Tuned) -> None:
    tuned.run("""
from ray.tune.schedulers import ASHAScheduler
ray.init(num_cpus=2, num_gpus=1)

def trial(config):
    assert not any("_raylet" in line for line in open("/proc/self/maps"))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    for step in range(1, 6):
        tune.report({"score": config["a"] * step, "pid": os.getpid()})

trial = tune.with_resources(trial, {"cpu": 1, "gpu": 0.5})
results = tune.Tuner(
    trial, param_space={"a": tune.grid_search([1, 2, 3, 4])},
    tune_config=tune.TuneConfig(metric="score", mode="max", scheduler=ASHAScheduler()),
    run_config=run_config("functions")).fit()
assert results.get_best_result().metrics["score"] == 20, results
assert len(results) == 4 and not results.errors
assert len(results.get_dataframe()) == 4
""")


def test_class_trainables_exploit_and_explore(tuned: Tuned) -> None:
    tuned.run("""
from ray.tune.schedulers import PopulationBasedTraining
ray.init(num_cpus=2)

class Climb(tune.Trainable):
    def setup(self, config):
        self.height = 0
    def step(self):
        self.height += self.config["pace"]
        return {"height": self.height, "done": self.iteration >= 11}
    def save_checkpoint(self, folder):
        with open(os.path.join(folder, "height.json"), "w") as file:
            json.dump(self.height, file)
    def load_checkpoint(self, folder):
        self.height = load(os.path.join(folder, "height.json"), 0)
    def reset_config(self, config):
        return True

scheduler = PopulationBasedTraining(
    time_attr="training_iteration", perturbation_interval=3, synch=True,
    hyperparam_mutations={"pace": tune.uniform(0, 5)})
results = tune.Tuner(
    tune.with_resources(Climb, {"cpu": 0.5}),
    param_space={"pace": tune.grid_search([0.01, 0.02, 3.0, 4.0])},
    tune_config=tune.TuneConfig(
        metric="height", mode="max", scheduler=scheduler, reuse_actors=True),
    run_config=run_config("classes", checkpoint_config=tune.CheckpointConfig(
        checkpoint_frequency=3))).fit()
heights = sorted(result.metrics["height"] for result in results)
assert len(heights) == 4 and not results.errors
assert heights[0] > 12 * 0.02 + 0.01, heights  # who was behind took over a better one
""")


def test_a_trial_whose_worker_is_killed_goes_on_from_its_checkpoint(tuned: Tuned) -> None:
    tuned.run("""
ray.init(num_cpus=2)

def trial(config):
    begun = resumed()
    for step in range(begun + 1, 7):
        report("mine", step, begun=begun)
        if step == 3 and begun == 0:
            while not os.path.exists(os.path.join(config["folder"], "saved")):
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)

class Saved(tune.Callback):
    def on_checkpoint(self, iteration, trials, trial, checkpoint, **info):
        if trial.last_result.get("score") == 3:
            open("saved", "w").close()

[result] = tune.Tuner(
    trial, param_space={"folder": os.getcwd()},
    run_config=run_config("killed", failure_config=tune.FailureConfig(max_failures=1),
                          callbacks=[Saved()])).fit()
assert result.error is None
assert (result.metrics["score"], result.metrics["begun"]) == (6, 3), result.metrics
""")


@pytest.mark.parametrize("everything", [False, True])
def test_restore_goes_on_after_a_job_was_killed(tmp_path: Path, everything: bool) -> None:
    """The driver alone, or every process of two ranks at once: nobody is left to clean up."""
    source = "import hpcray; hpcray.as_ray()\n" + HEAD + """
os.chdir(sys.argv[1])
ray.init(num_cpus=int(sys.argv[2]))

def trial(config):
    begun = resumed() % 100
    for step in range(begun + 1, 9):
        report("mine", step + 100 * config["a"], begun=begun)
        if step == 4 and not os.path.exists(config["killed"]):
            time.sleep(1000)

class Said(tune.Callback):
    def on_checkpoint(self, iteration, trials, trial, checkpoint, **info):
        if trial.last_result.get("training_iteration") == 4:
            print("half", flush=True)

path = os.path.join(os.getcwd(), "restored")
if tune.Tuner.can_restore(path):
    tuner = tune.Tuner.restore(path, trial, resume_unfinished=True)
else:
    space = {"a": tune.grid_search([1, 2]), "killed": os.path.join(os.getcwd(), "killed")}
    tuner = tune.Tuner(trial, param_space=space,
                       run_config=run_config("restored", callbacks=[Said()]))
results = tuner.fit()
assert sorted(r.metrics["score"] for r in results) == [108, 208], results
assert all(r.metrics["begun"] == 4 for r in results), results
""" + TAIL

    ranks = 2 if everything else 0
    program = () if everything else ("-m", "hpcray", "run")

    def begin(**environ: str) -> Job:
        jobs.append(Job(source, str(tmp_path), "1" if everything else "2", ranks=ranks,
                        own_mpirun=True, program=program, TUNE_GLOBAL_CHECKPOINT_S="0", **environ))
        return jobs[-1]

    jobs: list[Job] = []
    try:
        job = begin()
        for _ in range(2):
            job.expect("half", 100)
        half_s = time.time()
        deadline_s = time.monotonic() + 60
        while not any(state.stat().st_mtime > half_s  # What Tune knows when it comes back.
                      for state in (tmp_path / "restored").glob("experiment_state-*.json")):
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        if everything:
            roles = {member.role for member in job.members()}
            assert {"driver", "keeper", "node", "zygote", "worker", "server"} <= roles
            job.kill_all()
        else:
            job.kill("driver")
            job.finish(status=-signal.SIGKILL)
        (tmp_path / "killed").touch()
        again = begin(TMPDIR=str(job.directory))  # with what the other has left there
        assert "well\n" in again.finish(150)
    finally:
        for job in reversed(jobs):
            job.close()


def test_trials_run_on_all_ranks(tuned: Tuned) -> None:
    tuned.run("""
from ray.util.queue import Queue
ray.init(num_cpus=1)

def trial(config):
    context = ray.get_runtime_context()
    tune.report({"score": 1, "node": context.get_node_id()})
    time.sleep(1)

results = tune.Tuner(trial, tune_config=tune.TuneConfig(num_samples=4),
                     run_config=run_config("ranks")).fit()
assert not results.errors
assert {r.metrics["node"] for r in results} == {n["NodeID"] for n in ray.nodes()}
assert len(ray.nodes()) == 2
""", "-n", "2")


def test_parts_of_gpus_over_ranks_and_a_killed_worker(tuned: Tuned) -> None:
    """Four halves of two GPUs at once, never more; who is killed goes on from its checkpoint, with
    the half that has become free."""
    tuned.run("""
ray.init(num_cpus=4, num_gpus=1)

def trial(config):
    begun = resumed()
    node, device = ray.get_runtime_context().get_node_id(), os.environ["CUDA_VISIBLE_DEVICES"]
    assert [str(number) for number in ray.get_gpu_ids()] == [device]
    using = os.path.join(config["folder"], "gpu-" + device)
    os.makedirs(using, exist_ok=True)
    mine = os.path.join(using, str(config["number"]))
    open(mine, "w").close()
    open(os.path.join(config["folder"], f"begun-{config['number']}"), "w").close()
    while sum(name.startswith("begun-") for name in os.listdir(config["folder"])) < 4:
        time.sleep(0.05)
    for step in range(begun + 1, 5):
        assert len(os.listdir(using)) <= 2
        report("mine", step, begun=begun, node=node, device=device)
        if config["number"] == 1 and step == 2:
            while not os.path.exists(os.path.join(config["folder"], "saved")):
                time.sleep(0.05)
            os.unlink(mine)
            os.kill(os.getpid(), signal.SIGKILL)
    os.unlink(mine)

class Saved(tune.Callback):
    def on_checkpoint(self, iteration, trials, trial, checkpoint, **info):
        if trial.config["number"] == 1 and trial.last_result.get("score") == 2:
            open("saved", "w").close()

results = tune.Tuner(
    tune.with_resources(trial, {"cpu": 1, "gpu": 0.5}),
    param_space={"number": tune.grid_search(list(range(7))), "folder": os.getcwd()},
    run_config=run_config("gpus", failure_config=tune.FailureConfig(max_failures=1),
                          callbacks=[Saved()])).fit()
assert not results.errors
metrics = [result.metrics for result in results]
assert [found["score"] for found in metrics] == [4] * 7
assert {found["config"]["number"]: found["begun"] for found in metrics if found["begun"]} == {1: 2}
assert len({(found["node"], found["device"]) for found in metrics}) == 2, metrics
assert {found["device"] for found in metrics} == {"0", "1"}, metrics
""", "-n", "2")


def test_the_example_runs(tuned: Tuned) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "hpcray", "run", "--as-ray",
         str(ROOT / "examples" / "tune_pendulum.py"), "--trials", "4", "--storage",
         str(tuned.folder)], cwd=tuned.folder, text=True, capture_output=True, timeout=200)
    assert process.returncode == 0, process.stderr
    assert "4 trials" in process.stdout and "the best gains are kp=" in process.stdout


def test_searchers_loggers_and_failures_of_trials(tuned: Tuned) -> None:
    tuned.run("""
from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.basic_variant import BasicVariantGenerator
ray.init(num_cpus=2)

def trial(config):
    if config["a"] > 0.5:
        raise ValueError("too much")
    tune.report({"score": config["a"]})

results = tune.Tuner(
    trial, param_space={"a": tune.grid_search([0.1, 0.2, 0.9])},
    tune_config=tune.TuneConfig(search_alg=BasicVariantGenerator(max_concurrent=1)),
    run_config=run_config("failures", callbacks=[CSVLoggerCallback(), JsonLoggerCallback()])).fit()
assert [type(error).__name__ for error in results.errors] == ["RayTaskError(ValueError)"], (
    results.errors)
assert "too much" in str(results.errors[0])
found = [r.metrics["score"] for r in results if r.error is None]
assert found == [0.1, 0.2]
assert any(name == "progress.csv" for _, _, names in os.walk("failures") for name in names)
""")
