"""What zygotes, trials and workers do to the process they are, and to what is left of others.

The zygote, its trials and its workers are forks of one process: what one of them finds out, limits
or changes, all do in the same way.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

# Rings a worker's bell. Ignored by default, so a worker that is not listening yet takes no harm.
INTERRUPT_SIGNAL = signal.SIGURG

# Read by BLAS and OpenMP libraries when they are loaded, and never again.
BLAS_VARIABLES = frozenset((
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
))

# Read by pyarrow's allocator when it is loaded: it would start a thread.
_ARROW_VARIABLE, _ARROW_THREADLESS = "JE_ARROW_MALLOC_CONF", "background_thread:false"

# Generations that may be forked while their elders are killed: only something that forks without
# end gets that far.
_LOOKS_FOR_CHILDREN = 50


def thread_count() -> int:
    """Threads of this process, those of C libraries included."""
    # Its link count is 2 + the number of threads: one system call instead of a listing.
    return os.stat("/proc/self/task").st_nlink - 2


def for_imports(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables with which libraries start no threads as they are loaded."""
    arrow = environ.get(_ARROW_VARIABLE)
    return {
        **dict.fromkeys(BLAS_VARIABLES, "1"),
        _ARROW_VARIABLE: f"{arrow},{_ARROW_THREADLESS}" if arrow else _ARROW_THREADLESS,
    }


def default_threads() -> None:
    """One thread for each kind of library that the environment says nothing of."""
    for name in BLAS_VARIABLES:
        os.environ.setdefault(name, "1")


def thread_limits() -> dict[str, int]:
    """Threads that the environment allows to the libraries of each kind (threadpoolctl's names)."""
    every = os.environ.get("OMP_NUM_THREADS", "")
    found = {"openmp": every}
    for kind in ("openblas", "mkl", "blis"):
        found[kind] = os.environ.get(f"{kind.upper()}_NUM_THREADS", every)
    first = {kind: value.partition(",")[0].strip() for kind, value in found.items()}
    return {kind: int(value) for kind, value in first.items() if value.isdecimal() and int(value)}


def limit_threads(limits: Mapping[str, int], libraries: Any = None) -> None:
    """Have libraries that are loaded already do as if they had been loaded with these limits.

    `libraries`: a ThreadpoolController, if its owner has looked for them before.
    """
    if libraries is None:
        libraries = blas_controller()
    if libraries is not None:
        for kind, limit in limits.items():
            same = {"user_api": kind} if kind == "openmp" else {"internal_api": kind}
            libraries.select(**same).limit(limits=limit)
    torch = sys.modules.get("torch")
    if torch is not None and "openmp" in limits:
        torch.set_num_threads(limits["openmp"])


def enter_as_ray(settings: Mapping[str, Any]) -> None:
    """From here on `import ray` gives hpcray, if the job wants it."""
    if settings.get("as_ray"):
        importlib.import_module("hpcray.as_ray").install()


def kill_sessions(sessions: set[int], signal_number: int) -> set[int]:
    """Signal every process of these sessions, whatever its process group; the pids there were.

    Zombies do not count. What has left its session (a daemon) is not found.
    """
    found: set[int] = set()
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                # "pid (command) state ppid pgrp session": the command may contain anything.
                state, _, _, session = file.read().rpartition(b")")[2].split()[:4]
            if int(session) in sessions and state not in b"ZX":
                os.kill(int(name), signal_number)
                found.add(int(name))
        except (OSError, ValueError):
            continue  # It has ended between two of these lines.
    return found


def end_sessions(sessions: set[int]) -> None:
    """SIGKILL to all of them, until a look finds nobody new: one look misses what is forked
    while it goes on. Who was killed can fork no more, so each look finds children only."""
    killed: set[int] = set()
    for _ in range(_LOOKS_FOR_CHILDREN):
        found = kill_sessions(sessions, signal.SIGKILL)
        if found <= killed:
            return
        killed |= found


def change_environment(changes: Mapping[bytes, bytes | None], env_vars: Mapping[str, str]) -> None:
    old_zone = os.environ.get("TZ")
    # As bytes: a variable need not be UTF-8, and messages carry no other text.
    for name, value in changes.items():
        if value is None:
            os.environb.pop(name, None)
        else:
            os.environb[name] = value
    if env_vars:
        from hpcray.config import expanded

        os.environ.update(expanded(env_vars))
    if os.environ.get("TZ") != old_zone:
        time.tzset()


def blas_controller() -> Any:
    """Finds the loaded BLAS libraries once, so that a worker need not; None if not installed."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController()
