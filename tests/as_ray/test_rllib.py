"""Ray's own RLlib, from an installed ray, on hpcray: `make test-rllib`. Minutes, and torch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.rllib, pytest.mark.timeout(900),
    pytest.mark.skipif(
        not (importlib.util.find_spec("torch") and importlib.util.find_spec("ray")),
        reason="`make test-rllib` installs ray[rllib] and torch, and runs it"),
]


def run(folder: Path, script: str | Path, *arguments: str, ranks: int = 1) -> str:
    if not isinstance(script, Path):
        path = folder / "script.py"
        path.write_text(script)
        script = path
    command = [sys.executable, "-m", "hpcray", "run", "--as-ray"]
    if ranks > 1:
        command += ["-n", str(ranks)]
    done = subprocess.run([*command, str(script), *arguments], cwd=folder, text=True,
                          capture_output=True, timeout=800, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ppo_learns(tmp_path: Path) -> None:
    assert "learned: " in run(tmp_path, ROOT / "examples" / "rllib_cartpole.py")


def test_ppo_learns_over_two_ranks(tmp_path: Path) -> None:
    example = ROOT / "examples" / "rllib_cartpole.py"
    assert "learned: " in run(tmp_path, example, "--goal", "200", ranks=2)


def test_impala_learns(tmp_path: Path) -> None:
    assert "learned" in run(tmp_path, """
import time
import ray
from ray.rllib.algorithms.impala import IMPALAConfig

ray.init()
config = (
    IMPALAConfig().environment("CartPole-v1")
    .env_runners(num_env_runners=1, num_envs_per_env_runner=5)
    .training(lr=0.0005, grad_clip=40.0, vf_loss_coeff=0.05, entropy_coeff=0.0)
    .rl_module(model_config={"vf_share_layers": True})
)
algorithm = config.build_algo()
began_s = time.monotonic()
mean = 0.0
while mean < 450 and time.monotonic() - began_s < 600:
    runners = algorithm.train()["env_runners"]
    mean = runners.get("episode_return_mean") or 0.0
    print(f"{mean:.1f}", flush=True)
assert mean >= 450, mean
print("learned")
algorithm.stop()
""")


def test_a_killed_env_runner_is_made_anew(tmp_path: Path) -> None:
    assert "well" in run(tmp_path, """
import os, signal
import ray
from ray.rllib.algorithms.ppo import PPOConfig

ray.init(num_cpus=3)
config = (
    PPOConfig().environment("CartPole-v1")
    .env_runners(num_env_runners=2)
    .training(train_batch_size_per_learner=400, minibatch_size=64, num_epochs=1)
    .fault_tolerance(restart_failed_env_runners=True)
)
algorithm = config.build_algo()
algorithm.train()
pids = algorithm.env_runner_group.foreach_env_runner(lambda _: os.getpid(), local_env_runner=False)
os.kill(pids[0], signal.SIGKILL)
for _ in range(20):
    algorithm.train()
    now = algorithm.env_runner_group.foreach_env_runner(
        lambda _: os.getpid(), local_env_runner=False)
    if len(now) == 2 and pids[0] not in now:
        break
assert len(now) == 2 and pids[0] not in now and pids[1] in now, (pids, now)
print("well")
algorithm.stop()
""")
