# /// script
# dependencies = ["tianshou", "gymnasium"]
# ///
"""tianshou's `RayVectorEnv` steps environments in actors: all at once, and some at a time."""

import gymnasium as gym
import numpy as np
from tianshou.env import RayVectorEnv

if __name__ == "__main__":
    envs = RayVectorEnv([lambda: gym.make("CartPole-v1") for _ in range(4)])
    envs.seed(0)
    observations, _ = envs.reset()
    assert observations.shape == (4, 4)
    for _ in range(50):
        observations, rewards, *_ = envs.step(np.zeros(4, dtype=int))
        assert rewards.tolist() == [1.0] * 4 or rewards.min() >= 0.0
    envs.set_env_attr("colour", "red")
    assert envs.get_env_attr("spec")[0].id == "CartPole-v1"
    envs.close()

    envs = RayVectorEnv([lambda: gym.make("CartPole-v1") for _ in range(4)], wait_num=2)
    envs.reset()
    ids = np.arange(4)
    for _ in range(10):
        *_, infos = envs.step(np.zeros(len(ids), dtype=int), ids)
        ids = np.array([info["env_id"] for info in infos])
        assert len(ids) >= 2
    while len(envs.waiting_id):  # what is under way is taken back before the end
        envs.step(None, None)
    envs.close()
