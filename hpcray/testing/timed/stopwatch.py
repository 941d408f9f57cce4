"""What code takes of a processor, whatever else the computer does meanwhile.

    began_s = stopwatch.now()
    ...
    seconds = stopwatch.since(began_s)
"""

from __future__ import annotations

import time

now = time.thread_time


def _look_s() -> float:
    looks = 2000
    began_s = now()
    for _ in range(looks):
        now()
    return (now() - began_s) / looks


# A look is a system call, and no part of what it shows.
LOOK_S = min(_look_s() for _ in range(3))


def since(began_s: float) -> float:
    return max(now() - began_s - LOOK_S, 0.0)
