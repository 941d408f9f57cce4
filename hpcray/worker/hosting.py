"""Hosting an actor in a worker: sequential, threaded or asyncio.

    sequential  one call after the other, in the order given (per caller: the order submitted)
    threaded    max_concurrency > 1 or concurrency groups: a pool of threads per group
    asyncio     some method is a coroutine: an event loop per concurrency group, calls interleave
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from functools import partial
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any, NamedTuple

from hpcray import exceptions
from hpcray.client import context
from hpcray.client.client import Client
from hpcray.client.context import ActorExitRequest, TaskContext
from hpcray.protocol.messages import ActorExit, Failed, Run, Stop, Template
from hpcray.transport.datagrams import ChannelClosed
from hpcray.worker import output
from hpcray.worker.channel import TaskChannel
from hpcray.worker.ends import end_user_code, leave_if_forked
from hpcray.worker.generators import Generators
from hpcray.worker.loading import FailedDependency, Loader
from hpcray.worker.outcomes import Outcomes, us

# After a datagram this large another one is likely there already.
_LIKELY_MORE_BYTES = 1024
_GENERATORS = (GeneratorType, AsyncGeneratorType)


class Parts(NamedTuple):
    """What of its worker an actor uses."""

    client: Client
    channel: TaskChannel
    loader: Loader
    outcomes: Outcomes
    generators: Generators
    context: TaskContext
    deliver: Callable[[Run, Template, Any, float], None]
    on_terminate: Callable[[Callable[[], None]], None]


def host(parts: Parts, template: Template, actor_id: bytes) -> HostedActor:
    """What will run the actor, before it is constructed."""
    kind = HostedActor
    if template.is_async:
        kind = AsyncActor
    elif template.max_concurrency > 1 or template.groups:
        kind = ThreadedActor
    return kind(parts, template, actor_id)


class HostedActor:
    """A sequential actor; the others override how calls are run, not what a call is."""

    def __init__(self, parts: Parts, template: Template, actor_id: bytes) -> None:
        self.client = parts.client
        self.cancelled = parts.client.cancelled
        self.outcomes = parts.outcomes
        self.generators = parts.generators
        self.deliver = parts.deliver
        self.load = parts.loader.load
        self.arguments = parts.loader.arguments
        self._channel = parts.channel
        self._context = parts.context
        self._on_terminate = parts.on_terminate
        self.template = template
        self.instance: Any = None
        self.actor_id = actor_id
        self._methods: dict[str, Any] = {}
        # The actor wants to end, and how its process exits then.
        self.exit_status: int | None = None
        self._finishing = threading.Lock()  # taken once and for all

    def construct(self, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises: what the constructor raises."""
        self.instance = cls(*args, **kwargs)

    def constructed(self) -> None:
        """From now on calls come."""
        context.on_exit = self.on_exit

    def serve(self, queue: deque[Run | Stop]) -> int:
        """Run calls until told to stop; the worker's exit status."""
        client = self.client
        read = self._channel.read
        flushed_s = 0.0
        while self.exit_status is None:
            if not queue:
                if output.touched:
                    output.flush()
                client.flush(True)
                read(True)
                flushed_s = time.monotonic()
                continue
            item = queue.popleft()
            if type(item) is not Run:
                return self.finish()
            self._call(item)
            if queue and time.monotonic() - flushed_s > 0.001:
                client.flush()
                flushed_s = time.monotonic()
        # Not from within the call: its frames would keep the instance from its `__del__`.
        return self.finish()

    def _call(self, run: Run) -> None:
        client = self.client
        began_s = time.monotonic()
        if run.task_id in self.cancelled:
            client.report(self.outcomes.cancellation(run, began_s))
            return
        template = None
        try:
            template = self.load(run).template
            args, kwargs = self.arguments(run)
            method = self.method(template.method)
            self.enter(run, template)
            result = method(*args, **kwargs)
            del args, kwargs
            if run.task_id in self.cancelled:  # it may have asked, and ended early
                client.report(self.outcomes.cancellation(run, began_s))
                return
            self.deliver(run, template, result, began_s)
        except FailedDependency as failed:
            client.report(Failed(run.task_id, run.attempt, us(began_s), failed.error))
        except BaseException as error:
            leave_if_forked(error)
            if self.is_exit(error):
                self.leave(error)
                return
            if run.task_id in self.cancelled and isinstance(error, KeyboardInterrupt):
                client.report(self.outcomes.cancellation(run, began_s))
                return
            name = template.name if template is not None else "method"
            client.report(self.outcomes.failure(run, name, began_s, error, template))

    def group(self, run: Run) -> str:
        """The concurrency group of a call; "" is the default one."""
        return self.load(run).template.group if self.template.groups else ""

    def method(self, name: str) -> Any:
        found = self._methods.get(name)
        if found is None:
            if name == "__ray_call__":
                found = self._ray_call
            elif name == "__ray_ready__":
                found = _ready
            elif name == "__ray_terminate__":
                found = self._terminate
            else:
                found = _bound(self.instance, name)
            self._methods[name] = found
        return found

    def _ray_call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self.instance, *args, **kwargs)

    def _terminate(self) -> None:
        raise ActorExitRequest

    def enter(self, run: Run, template: Template) -> None:
        current = self._context
        current.task_id = run.task_id
        current.template = template
        current.attempt = run.attempt
        self.client.begin_task(run.task_id, run.attempt)

    def own_repr(self) -> str | None:
        """What the user's `__repr__` says of the instance; None if the class has none."""
        kind: Any = type(self.instance)
        if kind.__repr__ is object.__repr__:
            return None
        try:
            return repr(self.instance)
        except Exception:
            return None

    @staticmethod
    def is_exit(error: BaseException) -> bool:
        return isinstance(error, (ActorExitRequest, SystemExit))

    def on_exit(self) -> None:
        """exit_actor(), in any thread; the node's answer wakes an actor that is idle."""
        self.leave(None)

    def leave(self, error: BaseException | None) -> None:
        """The actor wants to end: for good, or by a sys.exit() that says it failed (a crash, after
        which it may be restarted). What was finished is delivered; this call is not."""
        if isinstance(error, SystemExit) and error.code not in (None, 0):
            self.exit_status = error.code if isinstance(error.code, int) else 1
        elif self.exit_status is None:
            self.exit_status = 0
            self.client.notify(ActorExit(self.actor_id))
        self.end_soon()

    def end_soon(self) -> None:
        """Once the call that runs is over: `serve` looks."""

    def finish(self) -> int:
        """A graceful end: `__ray_shutdown__`, `__del__` and atexit handlers run. The status."""
        self._finishing.acquire()  # a second thread has nothing more to do
        self.client.flush()
        try:
            if hasattr(self.instance, "__ray_shutdown__"):
                self.instance.__ray_shutdown__()
        except BaseException:
            traceback.print_exc()
        self._methods.clear()
        self.instance = None
        gc.collect()
        end_user_code()
        sys.stdout.flush()
        sys.stderr.flush()
        self.client.flush()
        return self.exit_status or 0


class ConcurrentActor(HostedActor):
    """Several calls at once: each thread or coroutine has a context of its own."""

    def __init__(self, parts: Parts, template: Template, actor_id: bytes) -> None:
        super().__init__(parts, template, actor_id)
        # By concurrency group; "" is everybody else's.
        self.limits = {"": template.max_concurrency, **dict(template.groups)}
        # Children are those of the call that makes them, whichever call began last.
        self.client.children_of(_task_here)

    def constructed(self) -> None:
        super().constructed()
        self._on_terminate(self._on_sigterm)

    def enter(self, run: Run, template: Template) -> None:
        shared = self._context
        context.set_context(TaskContext(
            run.task_id, template, run.attempt, self.actor_id, shared.incarnation,
            shared.resources, shared.devices, shared.namespace, shared.group_id,
            shared.captures, shared.env_vars, shared.packages, self.template.is_async))

    def serve(self, queue: deque[Run | Stop]) -> int:
        """The main thread reads the calls; others run them."""
        client = self.client
        read = self._channel.read
        while True:
            if not queue:
                if output.touched:
                    output.flush()
                client.flush(True)
                read(True)
                continue
            item = queue.popleft()
            if type(item) is not Run:
                self.drain()
                return self.finish()
            if self.exit_status is None:
                self.submit(item)

    def submit(self, run: Run) -> None:
        raise NotImplementedError

    def drain(self) -> None:
        """Wait for the calls: those that run and, unless the actor exits, those behind them."""
        raise NotImplementedError

    def end_soon(self) -> None:
        """The actor exits: by itself, once no call runs. Not in this thread, which may run one."""
        threading.Thread(target=self._end, name="hpcray-exit", daemon=True).start()

    def _end(self) -> None:
        self.drain()
        os._exit(self.finish())

    def _on_sigterm(self) -> None:
        """The calls that run may finish."""
        self.exit_status = 128 + signal.SIGTERM
        self.end_soon()


class ThreadedActor(ConcurrentActor):
    def __init__(self, parts: Parts, template: Template, actor_id: bytes) -> None:
        super().__init__(parts, template, actor_id)
        self._threads = {
            group: ThreadPoolExecutor(limit, thread_name_prefix="hpcray-actor")
            for group, limit in self.limits.items()
        }

    def submit(self, run: Run) -> None:
        with contextlib.suppress(RuntimeError):  # shut down meanwhile: the actor exits
            self._threads[self.group(run)].submit(self._call_and_flush, run)

    def drain(self) -> None:
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=self.exit_status is not None)
        for threads in self._threads.values():
            threads.shutdown(wait=True)

    def _call_and_flush(self, run: Run) -> None:
        if self.exit_status is not None:
            return
        try:
            self._call(run)
            output.flush()
            self.client.flush()
        except (ChannelClosed, exceptions.RaySystemError):
            os._exit(1)  # the node is gone


class AsyncActor(ConcurrentActor):
    """Calls are coroutines of an event loop, which reads them, too.

    With concurrency groups each of these has a loop in a thread of its own, so that a call which
    blocks its loop keeps no other group back; the main thread reads.
    """

    def __init__(self, parts: Parts, template: Template, actor_id: bytes) -> None:
        super().__init__(parts, template, actor_id)
        self._loops = {group: EventLoop(self, limit) for group, limit in self.limits.items()}
        self._main = self._loops[""]
        self._threads: list[threading.Thread] = []

    def construct(self, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In the actor's event loop: a constructor may create tasks, or be a coroutine."""
        raised: list[BaseException] = []

        async def construct() -> None:
            try:
                if inspect.iscoroutinefunction(cls.__init__):
                    self.instance = cls.__new__(cls, *args, **kwargs)
                    await self.instance.__init__(*args, **kwargs)
                else:
                    HostedActor.construct(self, cls, args, kwargs)
            except BaseException as error:
                raised.append(error)  # around the loop, whose frames are nobody's business

        self._main.runner.run(construct())
        if raised:
            raise raised[0]

    def serve(self, queue: deque[Run | Stop]) -> int:
        self.client.on_cancel(self._cancel)
        if len(self._loops) > 1:
            self._threads = [
                threading.Thread(target=loop.run, name="hpcray-actor", daemon=True)
                for loop in self._loops.values()]
            for thread in self._threads:
                thread.start()
            return super().serve(queue)
        with self._main.runner as runner:
            return runner.run(self._serve_in_loop(queue))

    async def _serve_in_loop(self, queue: deque[Run | Stop]) -> int:
        tasks = self._channel
        main = self._main
        channel: socket.socket = self.client.link.socket
        main.loop.add_reader(tasks.socket, self._readable, queue)
        main.loop.add_reader(channel, self._client_readable, channel)
        main.loop.add_reader(tasks.signalled, tasks.take_signals)
        self.client.flush()
        main.loop.call_soon(main.start, queue)  # calls do not begin inside another task
        await main.stopped()
        main.loop.remove_reader(tasks.socket)
        main.loop.remove_reader(channel)
        main.loop.remove_reader(tasks.signalled)
        return self.finish()

    def _client_readable(self, channel: socket.socket) -> None:
        leave_if_forked()  # a child has this loop too, and its parent's channels
        if not self.client.link.read_idle() and self.client.lost is not None:
            os._exit(1)
        self.client.complete_futures()

    def _readable(self, queue: deque[Run | Stop]) -> None:
        leave_if_forked()
        try:
            for _ in range(16):
                if self._channel.read(False) < _LIKELY_MORE_BYTES:
                    break  # if there is more, the loop says so: cheaper than asking in vain
        except ChannelClosed:
            os._exit(1)
        self._main.start(queue)

    def submit(self, run: Run) -> None:
        loop = self._loops[self.group(run)]
        loop.soon(loop.start, deque((run,)))

    def drain(self) -> None:
        for loop in self._loops.values():
            loop.soon(loop.stop)
        for thread in self._threads:
            thread.join()

    def end_soon(self) -> None:
        if self._threads:
            super().end_soon()
        else:
            self._main.soon(self._main.stop)

    def _cancel(self, task_id: bytes) -> None:
        """By whoever reads the client channel."""
        for loop in self._loops.values():
            loop.soon(loop.cancel, task_id)


class EventLoop:
    """An event loop of an async actor and the calls on it, so many at once; the others wait.

    Outcomes leave once per round of the loop.
    """

    def __init__(self, actor: AsyncActor, limit: int) -> None:
        self._actor = actor
        self._client = actor.client
        self._cancelled = actor.cancelled
        self.runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self.loop = self.runner.get_loop()
        self._limit = asyncio.Semaphore(limit)
        self._stopping: asyncio.Future[None] = self.loop.create_future()
        self._flush_due = False
        self._starting = False
        self._first_step: tuple[Callable[[], None], Context] | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._by_id: dict[bytes, asyncio.Task[None]] = {}

    def soon(self, call: Callable[..., None], *args: Any) -> None:
        """From any thread; nothing if the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(call, *args)

    def run(self) -> None:
        """A thread's life."""
        with self.runner as runner:
            runner.run(self.stopped())

    async def stopped(self) -> None:
        """Returns when it is to stop and has no calls left."""
        await self._stopping
        while self._running:
            await asyncio.wait(self._running)

    def stop(self) -> None:
        if not self._stopping.done():
            self._stopping.set_result(None)

    def start(self, queue: deque[Run | Stop]) -> None:
        """Begin what was read; the outcomes of calls that do not wait leave at once, together."""
        self._starting = True
        while queue:
            item = queue.popleft()
            if type(item) is not Run:
                self.stop()
                continue
            task = self._begin(self._call(item))
            if not task.done():
                self._running.add(task)
                self._by_id[item.task_id] = task
                task.add_done_callback(partial(self._over, item.task_id))
        self._starting = False
        if self._flush_due:
            self._flush()

    def _begin(self, call: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that has run to its first suspension: most calls never come to one.

        Python 3.11 has no eager tasks: a new task asks the loop to call its first step soon, and
        that wish is caught here. A turn of the loop costs as much as all the rest of a small call.
        """
        loop: Any = self.loop
        loop.call_soon = self._catch
        try:
            task: asyncio.Task[None] = loop.create_task(call)
        finally:
            del loop.call_soon
        if self._first_step is not None:  # else a task factory of the user has its own way
            (step, context), self._first_step = self._first_step, None
            context.run(step)
        return task

    def _catch(self, step: Callable[[], None], *, context: Context) -> None:
        self._first_step = (step, context)

    def _over(self, task_id: bytes, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._by_id.pop(task_id, None)

    def cancel(self, task_id: bytes) -> None:
        task = self._by_id.get(task_id)
        if task is not None:
            task.cancel()

    async def _call(self, run: Run) -> None:
        actor = self._actor
        client = self._client
        began_s = time.monotonic()
        template = None
        try:
            await self._limit.acquire()  # not `async with`: that is two coroutines more
            try:
                if actor.exit_status is not None:
                    return  # the node says what has become of it
                began_s = time.monotonic()
                if run.task_id in self._cancelled:
                    raise asyncio.CancelledError
                template = actor.load(run).template
                args, kwargs = actor.arguments(run)
                method = actor.method(template.method)
                actor.enter(run, template)
                result = method(*args, **kwargs)
                if type(result) is CoroutineType or isinstance(result, Coroutine):
                    result = await result
                if template.stream or isinstance(result, _GENERATORS):
                    await actor.generators.run_async(
                        run, template, result, began_s, self.loop)
                elif run.task_id in self._cancelled:
                    raise asyncio.CancelledError  # it was told, and has made its own end of it
                else:
                    actor.deliver(run, template, result, began_s)
            finally:
                self._limit.release()
        except FailedDependency as failed:
            client.report(Failed(run.task_id, run.attempt, us(began_s), failed.error))
        except BaseException as error:
            leave_if_forked(error)
            if actor.is_exit(error):
                actor.leave(error)
                return
            if not isinstance(error, asyncio.CancelledError):
                name = template.name if template is not None else "method"
                client.report(actor.outcomes.failure(run, name, began_s, error, template))
            elif template is None:  # before it has begun
                client.report(actor.outcomes.cancellation(run, began_s))
            else:
                cancelled = exceptions.TaskCancelledError(run.task_id.hex())
                cancelled.__traceback__ = error.__traceback__
                client.report(actor.outcomes.failure(
                    run, template.name, began_s, cancelled, template))
        if not self._flush_due:
            self._flush_due = True
            if not self._starting:
                self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        if output.touched:
            output.flush()
        self._client.flush(not self._running)


def _task_here() -> tuple[bytes, int]:
    here = context.current()
    return here.task_id, here.attempt


def _ready() -> bool:
    return True


def _bound(instance: Any, name: str) -> Any:
    """The method as the class has it: an attribute of that name does not hide it."""
    kind = type(instance)
    member = inspect.getattr_static(kind, name)
    bind = getattr(type(member), "__get__", None)
    return member if bind is None else bind(member, instance, kind)
