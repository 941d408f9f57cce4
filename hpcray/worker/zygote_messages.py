"""What a node and its zygote say to each other: one msgpack struct per datagram.

The node knows of the worker's room this file and `own_process.py`, and nothing else.
"""

from __future__ import annotations

import os
from typing import TypedDict

import msgspec

DEFAULT_TARGET = "hpcray.worker.main:prepare"

# Settings larger than this travel in a memfd: a datagram has to fit into a socket buffer
# (208 KiB by default), and an environment with module systems in it may not.
INLINE_SETTINGS_BYTES = 64 * 1024

# A preload that makes no progress for so long hangs. Patience with a file system that many nodes
# read at once: a module is dropped for the whole job.
PRELOAD_PATIENCE_S = 30.0

# How long workers have between SIGTERM and SIGKILL when their node is gone without a word.
DEFAULT_GRACE_S = 1.0


class WorkerSettings(TypedDict, total=False):
    """What the zygote itself reads from a request's settings. The target gets all of them and
    may define more. Missing means: as the zygote has it."""

    cwd: str
    sys_path: list[str]
    environ: dict[bytes, bytes | None]  # changes of the zygote's own; None takes one away
    env_vars: dict[str, str]  # on top of those, with ${NAME} in them replaced
    as_ray: bool  # `import ray` gives hpcray, from the first user code on


# --- node -> zygote -----------------------------------------------------------------------------


class ForkRequest(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=1):
    """Four descriptors come along: task, client, stdout, stderr; a fifth (a memfd) holds the
    settings if they are not inline."""

    number: int
    settings: bytes = b""  # msgpack, decoded by the worker


class ReapRequest(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=2):
    """The node is done with this dead worker's pid. Kills what is left of its session."""

    number: int


class CleanupRequest(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=3):
    """Remove this folder once all workers have ended."""

    folder: str


class StopRequest(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=4):
    """An orderly end: terminate the workers and exit.

    The node hangs up behind it, so that a preload is not waited for.
    """

    grace_s: float


class PreloadRequest(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=5):
    """Import settings["modules"], in this order, as a worker with these settings would; but none
    that harms forks. A descriptor (a memfd) holds the settings if they are not inline."""

    settings: bytes = b""
    patience_s: float = PRELOAD_PATIENCE_S  # longest time without progress
    quiet: bool = False  # comes back in Preloaded


Request = ForkRequest | ReapRequest | CleanupRequest | StopRequest | PreloadRequest

# --- zygote -> node -----------------------------------------------------------------------------


class Ready(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=1):
    """The zygote's own imports are done. `problems`: a line for each that failed."""

    pid: int
    import_s: float
    problems: tuple[str, ...]


class Forked(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=2):
    number: int
    pid: int


class ForkRefused(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=3):
    """There is no such worker; `reason` says what to do about it."""

    number: int
    reason: str


class Exited(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=4):
    """The worker is dead (a zombie until ReapRequest); `wait_status` as waitpid has it."""

    number: int
    pid: int
    wait_status: int

    @property
    def exit_code(self) -> int:
        """0 to 255, or the negative number of the signal that killed it."""
        return os.waitstatus_to_exitcode(self.wait_status)


class Problem(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A module that is not preloaded: "it `text`"."""

    module: str
    text: str
    crashed: bool = False  # or hung


class Preloaded(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=5):
    """The first unanswered PreloadRequest is done. `problems`: the first that there were, with
    those that crashed in front."""

    import_s: float
    problems: tuple[Problem, ...]
    quiet: bool
    pid: int  # of the zygote from here on: a child of the former one, or still the same


class Trying(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=6):
    """A child imports modules on trial, as leader of a session of its own."""

    pid: int


Event = Ready | Forked | ForkRefused | Exited | Preloaded | Trying
