"""What `ps` and `top` call a worker: `ray::f` for a task, `ray::Class` for an actor, `ray::IDLE`.

Setting it costs a microsecond, as much as a hundredth of a short task. So it is set when a worker
turns to another function and not for every call, and an idle worker keeps the name of what it ran
last for a second. An actor is shown by its class, whatever method it runs.
"""

from __future__ import annotations

import os

from setproctitle import getproctitle, setproctitle

_PREFIX = "ray::"


def prepare() -> None:
    """By the zygote, for all its forks: the title takes the place of the arguments, and not of the
    environment behind them, which others read in /proc.

    First of all: the library finds the arguments by the first variable of the environment, as long
    as that is the one that the process began with.
    """
    os.environ["SPT_NOENV"] = "1"
    getproctitle()
    del os.environ["SPT_NOENV"]


def show(name: str) -> None:
    setproctitle(_PREFIX + name)
