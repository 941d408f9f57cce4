"""What everybody in a simulated cluster shares: one seed, one clock, and how a fault ends it."""

from __future__ import annotations

import random
from typing import NoReturn

from hpcray.protocol import ids


class Fault(AssertionError):
    """What a script or a check saw and must never see."""


class World:
    def __init__(self, size: int, seed: int, time_scale: float) -> None:
        self.size = size  # nodes
        self.seed = seed
        self.rng = random.Random(seed)
        self.job_id = ids.job_id(1)
        self.now_s = 0.0
        # A round is 0.1 ms: how much longer the tasks claim to have run, for batching.
        self.time_scale = time_scale

    def fault(self, text: str, cause: BaseException | None = None) -> NoReturn:
        raise Fault(f"seed {self.seed}, {self.now_s:.4f} s: {text}") from cause


def short(id_: bytes) -> str:
    return id_.hex()[:8] + ".." + id_.hex()[16:]
