"""What this process is running right now: read by `get_runtime_context`, written by the worker.

A context variable, so that each thread and each coroutine of an actor sees its own task. The
driver has the one below with its driver task id.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

from hpcray.protocol.messages import Template


@dataclass(slots=True)
class TaskContext:
    task_id: bytes = b""
    template: Template | None = None  # of the task, or of the actor's method
    attempt: int = 0
    actor_id: bytes = b""
    # Restarts of the actor before this incarnation.
    incarnation: int = 0
    # What it holds, in ten-thousandths of a unit.
    resources: tuple[tuple[str, int], ...] = ()
    devices: tuple[int | str, ...] = ()  # as `get_gpu_ids` names them
    namespace: str = ""
    # The placement group it runs in, and whether its children do by default.
    group_id: bytes = b""
    captures: bool = False
    # What its children inherit (see hpcray/environment.py).
    env_vars: tuple[tuple[str, str], ...] = ()
    packages: tuple[tuple[int, bytes], ...] = ()
    is_async: bool = False  # a coroutine of an async actor


class ActorExitRequest(BaseException):
    """Raised by `exit_actor`, understood by the worker; a user's `except Exception` lets it pass.

    Not a SystemExit: asyncio lets that one tear down the event loop, with all other calls on it.
    """


# Names what children of the running task inherit (group, environment); b"": nothing.
inherited = b""

# What `exit_actor` calls before it raises; set by the worker that hosts an actor.
on_exit: Callable[[], None] | None = None


_process_context = TaskContext()
_context: ContextVar[TaskContext | None] = ContextVar("hpcray_task", default=None)


def current() -> TaskContext:
    return _context.get() or _process_context


def set_process_context(context: TaskContext) -> None:
    """Of the driver, or of a worker's main thread: threads the user starts see it too."""
    global _process_context
    _process_context = context


def set_context(context: TaskContext | None) -> None:
    """Of this thread or coroutine only."""
    _context.set(context)
