"""Tune the controller of a pendulum with Ray Tune: the same file on Ray and on hpcray.

A PD controller (gains kp and kd) has to hold Gymnasium's pendulum upright. Its motor is weak, so
poor gains let it fall, and no gain helps against a start too far from the top. Every trial tries
one pair of gains on more and more starts, reports the mean return so far, and keeps a checkpoint.
ASHA stops the trials that are behind; what is left has the best gains.

    python examples/tune_pendulum.py                                # on Ray
    hpcray run --as-ray examples/tune_pendulum.py                   # on hpcray: one machine
    hpcray run -n 2 --as-ray examples/tune_pendulum.py              # two ranks
    sbatch slurm/tune.sbatch                                        # in a Slurm allocation

Needs `pip install "ray[tune]==2.60.0" gymnasium`.
"""

import argparse
import json
import math
import os
import tempfile
from typing import Any

import gymnasium
import numpy as np
from ray import tune
from ray.tune.schedulers import ASHAScheduler

ROUNDS = 10  # reports of a trial that ASHA lets live
STARTS = 5  # episodes in a round
STEPS = 100  # 5 s of the pendulum's time


def episode(env: Any, kp: float, kd: float, seed: int) -> float:
    """The return of one episode that starts near the top: 0 is perfect, less is worse."""
    env.reset(seed=seed)
    angle, speed = np.random.default_rng(seed).uniform((-0.4, -0.5), (0.4, 0.5))
    env.unwrapped.state = np.array([angle, speed])
    total = 0.0
    for _ in range(STEPS):
        torque = np.array([-kp * angle - kd * speed], dtype=np.float32)
        (cosine, sine, speed), reward, *_ = env.step(torque)
        angle = math.atan2(sine, cosine)
        total += float(reward)
    return total


def trial(config: dict[str, float]) -> None:
    """One trial: goes on from its checkpoint, if it was interrupted."""
    returns = []
    checkpoint = tune.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            with open(os.path.join(folder, "returns.json")) as file:
                returns = json.load(file)
    env = gymnasium.make("Pendulum-v1", max_episode_steps=STEPS + 1)
    for round_ in range(len(returns) // STARTS, ROUNDS):
        for start in range(STARTS):
            returns.append(episode(env, config["kp"], config["kd"], round_ * STARTS + start))
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "returns.json"), "w") as file:
                json.dump(returns, file)
            tune.report({"mean_return": float(np.mean(returns))},
                        checkpoint=tune.Checkpoint.from_directory(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--storage", default=os.path.abspath("tune_pendulum"),
                        help="folder for results and checkpoints, shared by all nodes")
    options = parser.parse_args()
    tuner = tune.Tuner(
        trial,
        param_space={"kp": tune.loguniform(1, 50), "kd": tune.loguniform(0.1, 10)},
        tune_config=tune.TuneConfig(
            metric="mean_return", mode="max", num_samples=options.trials,
            scheduler=ASHAScheduler(max_t=ROUNDS, grace_period=2)),
        run_config=tune.RunConfig(
            name="pendulum", storage_path=options.storage, verbose=1,
            failure_config=tune.FailureConfig(max_failures=2)),
    )
    results = tuner.fit()
    # Whoever was stopped early may have had easy starts only.
    full = [r for r in results if r.metrics["training_iteration"] == ROUNDS]
    best = max(full, key=lambda result: result.metrics["mean_return"])
    print(f"{len(results)} trials, {len(full)} of them to the end; the best gains are "
          f"kp={best.config['kp']:.1f} kd={best.config['kd']:.1f}, "
          f"mean return {best.metrics['mean_return']:.1f}")


if __name__ == "__main__":
    main()
