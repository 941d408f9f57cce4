"""What becomes of a task, as the message that says so: Done, DoneMany or Failed.

    result     --outcome------> Done (one small value) | DoneMany; large values are in shared memory
    exception  --failure------> Failed, with the remote traceback
    cancelled  --cancellation-> Failed

Nothing is sent here.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Collection, Iterable
from typing import Any

from hpcray import exceptions
from hpcray.client import serialization
from hpcray.client.client import Client
from hpcray.client.context import TaskContext
from hpcray.protocol import sizes, values
from hpcray.protocol.messages import Done, DoneMany, Failed, Located, Return, Run, Template
from hpcray.worker.ends import leave_if_forked


class Outcomes:
    def __init__(
        self, client: Client, context: TaskContext,
        unpin: Callable[[Run, tuple[bytes | Located, ...]], None],
    ) -> None:
        """`unpin` lets go of what is pinned for a task that will not open it."""
        self._client = client
        self._core = client.core
        self._context = context
        self._unpin = unpin
        self._retry_only: dict[bytes, tuple[type, ...]] = {}
        # What the actor that is hosted here says of itself, if it does.
        self.own_repr: Callable[[], str | None] = _no_actor
        # Where this worker is, for tracebacks.
        self.host = ""
        self.address = ""
        self.rank = 0

    def outcome(self, run: Run, template: Template, result: Any, began_s: float) -> Any:
        count = template.return_count
        if count == 1:
            limit = self._core.inline_max_bytes
            packed = serialization.pack_atom(result, limit)
            if packed:
                return Done(run.task_id, run.attempt, us(began_s), packed)
            serialized = _serialized(template, result)
            if not serialized.contained and serialized.nbytes <= limit:
                packed = values.pack(serialized.pickled, serialized.buffers)
                return Done(run.task_id, run.attempt, us(began_s), packed)
            parts: tuple[Return, ...] = (self.returned(serialized, 0),)
        elif count == 0:
            parts = ()
        else:
            if not isinstance(result, Collection):
                raise TypeError(f"Task {template.name} returned an object of type "
                                 f"{type(result).__name__}, but num_returns={count}.")
            if len(result) != count:
                raise ValueError(f"Task {template.name} returned {len(result)} objects, "
                                 f"but num_returns={count}.")
            parts = self.gathered(_serialized(template, item) for item in result)
        return DoneMany(run.task_id, run.attempt, us(began_s), parts)

    def gathered(self, results: Iterable[serialization.Serialized]) -> tuple[Return, ...]:
        """Several values for one message: as many of them inline as it should carry."""
        parts = []
        nbytes = 0
        for serialized in results:
            part = self.returned(serialized, nbytes)
            nbytes += inline_bytes(part)
            parts.append(part)
        return tuple(parts)

    def returned(self, serialized: serialization.Serialized, before_bytes: int) -> Return:
        """One value, behind `before_bytes` of others in the same message."""
        contained = b"".join(serialized.contained)
        sizes.check_refs(len(contained), "the result holds")
        nbytes = serialized.nbytes
        if nbytes <= self._core.inline_max_bytes and (
            nbytes <= sizes.SMALL_BYTES or before_bytes + nbytes <= sizes.GATHERED_BYTES
        ):
            return Return(values.pack(serialized.pickled, serialized.buffers), contained)
        return Return(self._client.write(serialized), contained)

    def failure(self, run: Run, name: str, began_s: float, error: BaseException,
                template: Template | None = None) -> Failed:
        leave_if_forked(error)
        self._unpin(run, run.deps)
        task_error = exceptions.TaskError(
            name, self.describe(name, error), error, os.getpid(), self.address, self.rank,
            run.actor_id.hex() or None, self.own_repr())
        if isinstance(error, exceptions.UserCodeException) and error.__cause__ is not None:
            error = error.__cause__
        retry = (template is not None and template.retry_exceptions
                 and not isinstance(error, exceptions.TaskCancelledError)
                 and (not template.retry_only or isinstance(error, self._retried(template))))
        packed = self._error_value(task_error, template, retry)
        return Failed(run.task_id, run.attempt, us(began_s), packed, retry)

    def _error_value(
        self, error: exceptions.TaskError, template: Template | None, retry: bool
    ) -> bytes | Located:
        """A large one travels as a large result does; unless the home may run the task again: who
        waits on this node would take what lies here for the outcome."""
        packed = serialization.dump_error(error)
        if len(packed) <= self._core.inline_max_bytes:
            return packed
        try:
            if (template is not None and template.return_count == 1 and not template.stream
                    and not retry):
                return self._client.write_packed(packed)
            if len(packed) <= sizes.MESSAGE_MAX_BYTES // 2:
                return packed  # one message, and one value for all returns
        except exceptions.ObjectStoreFullError:
            pass
        return serialization.dump_error(error, with_cause=False)

    def _retried(self, template: Template) -> tuple[type, ...]:
        found = self._retry_only.get(template.retry_only)
        if found is None:
            found = self._retry_only[template.retry_only] = serialization.load_classes(
                template.retry_only)
        return found

    def describe(self, name: str, error: BaseException) -> str:
        """The remote traceback, headed by where it comes from; our own frames left out."""
        if type(error).__name__ == "BdbQuit":  # breakpoint(), which found the end of its input
            error.add_note("A worker has no terminal for a debugger: call f.__wrapped__(...) in "
                           "the driver, or wait in the task for a remote debugger (debugpy).")
        frames = error.__traceback__
        folder = os.path.dirname(os.path.abspath(__file__))
        while frames is not None and frames.tb_frame.f_code.co_filename.startswith(folder):
            frames = frames.tb_next
        text = "".join(traceback.format_exception(type(error), error, frames)).rstrip()
        actor = self._context.actor_id
        whose = f", actor_id={actor.hex()}" if actor else ""
        own = self.own_repr()
        if own is not None:
            whose += f", repr={own}"
        return (f"hpcray::{name}() (host={self.host}, rank={self.rank}, "
                f"pid={os.getpid()}, ip={self.address}{whose})\n{text}")

    def cancellation(self, run: Run, began_s: float) -> Failed:
        leave_if_forked()
        self._unpin(run, run.deps)
        failure = values.Failure("TaskCancelledError", "", run.task_id.hex())
        return Failed(run.task_id, run.attempt, us(began_s), values.pack_failure(failure))

    def creation_failure(
        self, run: Run, name: str, began_s: float, error: BaseException
    ) -> Failed:
        """Of a constructor, and so of its actor."""
        leave_if_forked(error)
        text = self.describe(name, error)
        packed = values.pack_failure(values.Failure(
            "ActorDiedError",
            "The actor died because of an error raised in its creation task (its constructor), "
            + text[:32_768], run.actor_id.hex(), in_constructor=True))
        return Failed(run.task_id, run.attempt, us(began_s), packed)


def _no_actor() -> None:
    return None


def inline_bytes(part: Return) -> int:
    """What it adds to its message."""
    return len(part.value) if type(part.value) is bytes else 0


def _serialized(template: Template, result: Any) -> serialization.Serialized:
    try:
        return serialization.serialize(result)
    except TypeError as error:
        error.add_note(f"(while the return value of {template.name} was pickled)")
        raise


def us(began_s: float) -> int:
    return int((time.monotonic() - began_s) * 1_000_000)
