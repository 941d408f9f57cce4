"""Learn CartPole with RLlib's PPO: the same file on Ray and on hpcray.

    python examples/rllib_cartpole.py                               # on Ray
    hpcray run --as-ray examples/rllib_cartpole.py                  # on hpcray: one machine
    hpcray run -n 2 --as-ray examples/rllib_cartpole.py             # two ranks

Ends when the mean return of an episode is 450 (500 is all there is), or after `--iterations`.
Needs `pip install "ray[rllib]==2.60.0" torch`.
"""

import argparse
import time

import ray
from ray.rllib.algorithms.ppo import PPOConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--env-runners", type=int, default=1)
    parser.add_argument("--goal", type=float, default=450.0)
    options = parser.parse_args()
    ray.init()
    config = (
        PPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=options.env_runners, num_envs_per_env_runner=8)
        .training(lr=0.0003, num_epochs=6, vf_loss_coeff=0.01)
        .rl_module(model_config={"fcnet_hiddens": [32], "fcnet_activation": "linear",
                                 "vf_share_layers": True})
    )
    algorithm = config.build_algo()
    started_s = time.monotonic()
    for iteration in range(1, options.iterations + 1):
        result = algorithm.train()
        runners = result["env_runners"]
        steps = runners["num_env_steps_sampled_lifetime"]
        mean = runners["episode_return_mean"]
        elapsed_s = time.monotonic() - started_s
        print(f"{iteration:3}  return {mean:6.1f}  steps {steps:8,.0f}  "
              f"{steps / elapsed_s:7,.0f} steps/s", flush=True)
        if mean >= options.goal:
            print(f"learned: {mean:.1f} after {elapsed_s:.0f} s")
            break
    algorithm.stop()


if __name__ == "__main__":
    main()
