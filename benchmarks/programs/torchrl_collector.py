# /// script
# dependencies = ["torchrl", "gymnasium"]
# ///
"""torchrl's `RayCollector`: collectors in actors, in step and not in step."""

import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.collectors.distributed import RayCollector
from torchrl.envs import GymEnv


def environment():
    return GymEnv("CartPole-v1", categorical_action_encoding=True)


class Policy(nn.Module):
    def forward(self, observation):
        return torch.zeros(observation.shape[:-1], dtype=torch.int64)


if __name__ == "__main__":
    for sync in (True, False):
        policy = TensorDictModule(Policy(), in_keys=["observation"], out_keys=["action"])
        collector = RayCollector(
            [environment] * 2, policy, collector_class=Collector, total_frames=400,
            frames_per_batch=100, sync=sync, ray_init_config={"num_cpus": 2},
            remote_configs={"num_cpus": 1, "num_gpus": 0, "memory": 1 << 28})
        frames = 0
        for batch in collector:
            frames += batch.numel()
            assert batch["observation"].shape[-1] == 4
        collector.shutdown()
        assert frames >= 400, frames
