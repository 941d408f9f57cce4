"""Running what a generator task (or method) has made: a generator, to its end.

    num_returns   what becomes of the items
    "streaming"   each is an object of its own, sent when it is there (Yield); then the task is Done
    "dynamic"     each is put; the value of the task is the list of refs, an exception its last
    a number      each is one of the returns; an exception is the value of those that are missing

With a window, a stream pauses when it is that far ahead of its consumer. A task that pauses gives
its CPU back, as one that waits in `get` does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import Any

from hpcray.client import references, serialization
from hpcray.client.client import Client
from hpcray.client.references import ObjectRef
from hpcray.client.streams import DynamicObjectRefGenerator, Room
from hpcray.protocol.messages import (
    DYNAMIC,
    STREAM,
    DoneMany,
    Located,
    Return,
    Run,
    Template,
    Yield,
)
from hpcray.worker.cancels import Cancels
from hpcray.worker.ends import leave_if_forked
from hpcray.worker.outcomes import Outcomes


class Generators:
    def __init__(self, client: Client, outcomes: Outcomes, cancels: Cancels) -> None:
        self._client = client
        self._outcomes = outcomes
        self._cancels = cancels

    def run(self, run: Run, template: Template, result: Any, began_s: float) -> None:
        """Run it and report all that becomes of it, the end of the task too.

        Raises: what the generator raises, where that is the outcome of the task.
        """
        if not isinstance(result, Iterable):
            raise _not_iterable(template, result)
        items = self._interruptible(run, iter(result))
        outputs = _Outputs(self._client, self._outcomes, run, template, began_s)
        if template.stream != STREAM:
            outputs.gather(items)
            return
        client = self._client
        room = client.open_room(run.task_id) if template.stream_window else None
        try:
            for item in items:
                outputs.send(item)
                del item
                if room is not None:
                    with _Interruptible(self._cancels, run):
                        client.await_room(room, outputs.count - template.stream_window + 1)
        finally:
            if room is not None:
                client.close_room(run.task_id)
        outputs.end()

    async def run_async(
        self, run: Run, template: Template, result: Any, began_s: float,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """As `run`, on the event loop of an async actor; `result` may be an async generator."""
        if not isinstance(result, (AsyncGenerator, Iterable)):
            raise _not_iterable(template, result)
        items = result if isinstance(result, AsyncGenerator) else _as_async(result)
        outputs = _Outputs(self._client, self._outcomes, run, template, began_s)
        async with aclosing(items):
            if template.stream != STREAM:
                gathered: list[Any] = []
                try:
                    async for item in items:
                        gathered.append(item)
                        if template.stream != DYNAMIC and len(gathered) == template.return_count:
                            break
                except Exception as error:
                    outputs.gather(_then_raise(gathered, error))
                else:
                    outputs.gather(iter(gathered))
                return
            client = self._client
            room = client.open_room(run.task_id) if template.stream_window else None
            try:
                async for item in items:
                    outputs.send(item)
                    del item
                    if room is not None:
                        await _room_async(
                            client, room, outputs.count - template.stream_window + 1, loop)
            finally:
                if room is not None:
                    client.close_room(run.task_id)
            outputs.end()

    def _interruptible(self, run: Run, items: Iterator[Any]) -> Iterator[Any]:
        """The items; between two of them, and while one is made, a cancel ends it."""
        task = b"" if run.actor_id else run.task_id
        cancels = self._cancels
        cancelled = cancels.cancelled
        while True:
            cancels.interruptible = task  # as _Interruptible does, for half the price
            try:
                if run.task_id in cancelled:
                    raise KeyboardInterrupt
                item = next(items)
            except StopIteration:
                return
            finally:
                cancels.interruptible = b""
            yield item
            del item


class _Outputs:
    def __init__(
        self, client: Client, outcomes: Outcomes, run: Run, template: Template, began_s: float
    ) -> None:
        self._client = client
        self._core = client.core
        self._outcomes = outcomes
        self._run = run
        self._template = template
        self._began_s = began_s
        self.count = 0

    def send(self, item: Any) -> None:
        if references.in_fork:
            leave_if_forked()
        client = self._client
        packed = serialization.pack_atom(item, self._core.inline_max_bytes)
        returned = Return(packed) if packed else self._outcomes.returned(
            serialization.serialize(item), 0)
        client.report(Yield(self._run.task_id, self.count, returned))
        client.flush()
        self.count += 1

    def end(self) -> None:
        """The value of the task itself."""
        self._done((self._outcomes.returned(serialization.serialize(None), 0),))

    def _done(self, returns: tuple[Return, ...]) -> None:
        run_us = int((time.monotonic() - self._began_s) * 1e6)
        self._client.report(
            DoneMany(self._run.task_id, self._run.attempt, run_us, returns))

    def gather(self, items: Iterator[Any]) -> None:
        """All items at once: a list of refs, or so many returns."""
        if self._template.stream == DYNAMIC:
            self._dynamic(items)
            return
        count = self._template.return_count
        returns: list[Return] = []
        nbytes = 0
        try:
            while len(returns) < count:
                try:
                    item = next(items)
                except StopIteration:
                    raise ValueError(
                        f"Task {self._template.name} yielded {len(returns)} objects, "
                        f"but num_returns={count}.") from None
                returns.append(self._outcomes.returned(serialization.serialize(item), nbytes))
                value = returns[-1].value
                nbytes += len(value) if type(value) is bytes else 0
        except Exception as error:
            returns += [Return(self._error(error))] * (count - len(returns))
        self._done(tuple(returns))

    def _dynamic(self, items: Iterator[Any]) -> None:
        client = self._client
        refs: list[ObjectRef[Any]] = []
        try:
            for item in items:
                refs.append(client.put(item))
                del item
        except Exception as error:
            packed = self._error(error)
            assert type(packed) is bytes  # only of a task with one value are they in shared memory
            refs.append(client.put_packed(packed))
        value = serialization.serialize(DynamicObjectRefGenerator(refs))
        # The refs live until this is reported: before, nothing else holds what they refer to.
        self._done((self._outcomes.returned(value, 0),))

    def _error(self, error: Exception) -> bytes | Located:
        """The exception as a value.

        Raises: the exception itself, if the task is to be tried again for it.
        """
        failed = self._outcomes.failure(
            self._run, self._template.name, self._began_s, error, self._template)
        if failed.retry:
            raise error
        assert isinstance(failed.error, bytes)  # a stream's is inline
        return failed.error


class _Interruptible:
    """A cancel may interrupt what runs inside. Of tasks: calls of actors are not interrupted."""

    __slots__ = ("_cancels", "_task")

    def __init__(self, cancels: Cancels, run: Run) -> None:
        self._cancels = cancels
        self._task = b"" if run.actor_id else run.task_id

    def __enter__(self) -> None:
        self._cancels.interruptible = self._task

    def __exit__(self, *_: object) -> None:
        self._cancels.interruptible = b""


def _then_raise(items: list[Any], error: Exception) -> Iterator[Any]:
    yield from items
    raise error


async def _as_async(items: Iterable[Any]) -> AsyncGenerator[Any, None]:
    for item in items:
        yield item


async def _room_async(
    client: Client, room: Room, needed: int, loop: asyncio.AbstractEventLoop
) -> None:
    future = loop.create_future()

    def resolve() -> None:
        if not future.done():
            future.set_result(None)

    def wake() -> None:
        loop.call_soon_threadsafe(resolve)

    room.wake = wake
    if not client.has_room(room, needed):
        await future


def _not_iterable(template: Template, result: Any) -> TypeError:
    return TypeError(
        f"{template.name} has num_returns=\"streaming\" or \"dynamic\" and must yield its items; "
        f"it returned an object of type {type(result).__name__}")


__all__ = ["Generators"]
