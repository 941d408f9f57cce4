"""Hosting an actor in a worker: sequential, threaded or asyncio.

    sequential  one call after the other, in the order given (per caller: the order submitted)
    threaded    max_concurrency > 1 or concurrency groups: a pool of threads per group
    asyncio     some method is a coroutine: one event loop in the main thread, calls interleave
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import inspect
import os
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
from typing import TYPE_CHECKING, Any

from hpcray import exceptions
from hpcray.client import context
from hpcray.client.context import TaskContext
from hpcray.protocol.messages import ActorExit, Failed, Run, Stop, Template
from hpcray.transport.datagrams import ChannelClosed
from hpcray.worker import generators, output

if TYPE_CHECKING:
    from hpcray.worker.main import Worker

# After a datagram this large another one is likely there already.
_LIKELY_MORE_BYTES = 1024


class FailedDependency(Exception):
    """An argument is an error: the task fails with that error's own bytes."""

    def __init__(self, error: bytes) -> None:
        super().__init__("a dependency failed")
        self.error = error


def end_user_code() -> None:
    """What the end of an interpreter would do for user code, for one that ends by `os._exit`."""
    atexit._run_exitfuncs()
    # A world that a task has opened: mpi4py ends it where no Python code runs any more, and
    # Open MPI leaves its file in /dev/shm if nobody does.
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()


def host(worker: Worker, template: Template, actor_id: bytes) -> HostedActor:
    """What will run the actor, before it is constructed."""
    kind = HostedActor
    if template.is_async:
        kind = AsyncActor
    elif template.max_concurrency > 1 or template.groups:
        kind = ThreadedActor
    return kind(worker, template, actor_id)


class HostedActor:
    """A sequential actor; the others override how calls are run, not what a call is."""

    def __init__(self, worker: Worker, template: Template, actor_id: bytes) -> None:
        self.worker = worker
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
        context.on_exit = self.on_exit

    def serve(self, queue: deque[Run | Stop]) -> int:
        """Run calls until told to stop; the worker's exit status."""
        worker = self.worker
        client = worker.client
        flushed_s = 0.0
        while self.exit_status is None:
            if not queue:
                output.flush()
                client.flush(drain=True)
                worker.read_tasks(wait=True)
                flushed_s = time.monotonic()
                continue
            item = queue.popleft()
            if type(item) is Stop:
                return self.finish()
            assert isinstance(item, Run)
            self._call(item)
            if queue and time.monotonic() - flushed_s > 0.001:
                client.flush()
                flushed_s = time.monotonic()
        # Not from within the call: its frames would keep the instance from its `__del__`.
        return self.finish()

    def _call(self, run: Run) -> None:
        worker = self.worker
        began_s = time.monotonic()
        if run.task_id in worker.cancelled:
            worker.client.report(worker.cancellation(run, began_s))
            return
        template = None
        try:
            template = worker.load(run).template
            args, kwargs = worker.arguments(run)
            method = self.method(template.method)
            self.enter(run, template)
            result = method(*args, **kwargs)
            del args, kwargs
            if run.task_id in worker.cancelled:  # it may have asked, and ended early
                worker.client.report(worker.cancellation(run, began_s))
                return
            worker.deliver(run, template, result, began_s)
        except FailedDependency as failed:
            worker.client.report(Failed(run.task_id, run.attempt, _us(began_s), failed.error))
        except BaseException as error:
            worker.leave_if_forked(error)
            if self.is_exit(error):
                self.leave(error)
                return
            if run.task_id in worker.cancelled and isinstance(error, KeyboardInterrupt):
                worker.client.report(worker.cancellation(run, began_s))
                return
            name = template.name if template is not None else "method"
            worker.client.report(worker.failure(run, name, began_s, error, template))

    def group(self, run: Run) -> str:
        """The concurrency group of a call; "" is the default one."""
        return self.worker.load(run).template.group if self.template.groups else ""

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
                found = getattr(self.instance, name)
            self._methods[name] = found
        return found

    def _ray_call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self.instance, *args, **kwargs)

    def _terminate(self) -> None:
        raise _exit_request()

    def enter(self, run: Run, template: Template) -> None:
        current = self.worker.context
        current.task_id = run.task_id
        current.template = template
        current.attempt = run.attempt
        self.worker.client.begin_task(run.task_id, run.attempt)

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
        from hpcray.actor import ActorExitRequest

        return isinstance(error, (ActorExitRequest, SystemExit))

    def on_exit(self) -> None:
        """exit_actor(), in any thread; the node's answer wakes an actor that is idle."""
        self.leave(None)

    def leave(self, error: BaseException | None) -> None:
        """The actor wants to end: for good, or by a sys.exit() that says it failed (a crash, after
        which it may be restarted)."""
        if isinstance(error, SystemExit) and error.code not in (None, 0):
            self.exit_status = error.code if isinstance(error.code, int) else 1
        elif self.exit_status is None:
            self.exit_status = 0
            self.worker.client.notify(ActorExit(self.actor_id))

    def exit_by_itself(self) -> None:
        """exit_actor() or sys.exit(): what was finished is delivered, this call is not."""
        self.leave(sys.exception())
        os._exit(self.finish())

    def finish(self) -> int:
        """A graceful end: `__ray_shutdown__`, `__del__` and atexit handlers run. The status."""
        self._finishing.acquire()  # a second thread has nothing more to do
        self.worker.client.flush()
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
        self.worker.client.flush()
        return self.exit_status or 0


class ConcurrentActor(HostedActor):
    """Several calls at once: each thread or coroutine has a context of its own."""

    def enter(self, run: Run, template: Template) -> None:
        shared = self.worker.context
        context.set_context(TaskContext(
            run.task_id, template, run.attempt, self.actor_id, shared.incarnation,
            shared.resources, shared.devices, shared.namespace, shared.group_id,
            shared.captures, shared.env_vars, shared.packages, self.template.is_async))


class ThreadedActor(ConcurrentActor):
    def __init__(self, worker: Worker, template: Template, actor_id: bytes) -> None:
        super().__init__(worker, template, actor_id)
        # By concurrency group; "" is everybody else's.
        self._threads = {
            group: ThreadPoolExecutor(limit, thread_name_prefix="hpcray-actor")
            for group, limit in (("", template.max_concurrency), *template.groups)
        }

    def serve(self, queue: deque[Run | Stop]) -> int:
        worker = self.worker
        while True:
            if not queue:
                output.flush()
                worker.client.flush(drain=True)
                worker.read_tasks(wait=True)
                continue
            item = queue.popleft()
            if type(item) is Stop:
                for threads in self._threads.values():
                    threads.shutdown(wait=True)
                return self.finish()
            assert isinstance(item, Run)
            self._threads[self.group(item)].submit(self._call_and_flush, item)

    def _call_and_flush(self, run: Run) -> None:
        try:
            self._call(run)
            if self.exit_status is not None:
                self.exit_by_itself()
            output.flush()
            self.worker.client.flush()
        except (ChannelClosed, exceptions.RaySystemError):
            os._exit(1)  # the node is gone


class AsyncActor(ConcurrentActor):
    """Calls are tasks of one event loop; outcomes leave once per round of it."""

    def __init__(self, worker: Worker, template: Template, actor_id: bytes) -> None:
        super().__init__(worker, template, actor_id)
        self._runner = asyncio.Runner()
        self._flush_due = False
        self._starting = False
        self._first_step: tuple[Callable[[], None], Context] | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._by_id: dict[bytes, asyncio.Task[None]] = {}
        self._stopping: asyncio.Future[None] | None = None

    def construct(self, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In the actor's event loop: a constructor may create tasks."""

        raised: list[BaseException] = []

        async def construct() -> None:
            try:
                HostedActor.construct(self, cls, args, kwargs)
            except BaseException as error:
                raised.append(error)  # around the loop, whose frames are nobody's business

        self._runner.run(construct())
        if raised:
            raise raised[0]

    def on_exit(self) -> None:
        """At once: a call may never end, and others would be cancelled by nobody."""
        super().on_exit()
        self._runner.get_loop().call_soon_threadsafe(self.exit_by_itself)

    def serve(self, queue: deque[Run | Stop]) -> int:
        with self._runner:
            return self._runner.run(self._serve(queue))

    async def _serve(self, queue: deque[Run | Stop]) -> int:
        loop = asyncio.get_running_loop()
        worker = self.worker
        self._loop = loop
        self._limits = {
            group: asyncio.Semaphore(limit)
            for group, limit in (("", self.template.max_concurrency), *self.template.groups)
        }
        self._stopping = loop.create_future()
        channel: socket.socket = worker.client.link.socket
        loop.add_reader(worker._tasks, self._readable, queue)
        loop.add_reader(channel, self._client_readable, channel)
        worker.client.on_cancel(self._cancel)
        worker.client.flush()
        loop.call_soon(self._start_calls, queue)  # calls do not begin inside another task
        await self._stopping
        loop.remove_reader(worker._tasks)
        loop.remove_reader(channel)
        if self._running:
            await asyncio.wait(self._running)
        return self.finish()

    def _client_readable(self, channel: socket.socket) -> None:
        self.worker.leave_if_forked()  # a child has this loop too, and its parent's channels
        if not self.worker.client.link.read_idle() and self.worker.client.lost is not None:
            os._exit(1)
        self.worker.client.complete_futures()

    def _readable(self, queue: deque[Run | Stop]) -> None:
        self.worker.leave_if_forked()
        try:
            for _ in range(16):
                if self.worker.read_tasks(wait=False) < _LIKELY_MORE_BYTES:
                    break  # if there is more, the loop says so: cheaper than asking in vain
        except ChannelClosed:
            os._exit(1)
        self._start_calls(queue)

    def _start_calls(self, queue: deque[Run | Stop]) -> None:
        """Begin what was read; the outcomes of calls that do not wait leave at once, together."""
        self._starting = True
        while queue:
            item = queue.popleft()
            if type(item) is Stop:
                assert self._stopping is not None
                if not self._stopping.done():
                    self._stopping.set_result(None)
                continue
            assert isinstance(item, Run)
            task = self._begin(self._call_async(item))
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
        loop: Any = self._loop
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

    def _cancel(self, task_id: bytes) -> None:
        """By whoever reads the client channel."""
        self._loop.call_soon_threadsafe(self._cancel_now, task_id)

    def _cancel_now(self, task_id: bytes) -> None:
        task = self._by_id.get(task_id)
        if task is not None:
            task.cancel()

    async def _call_async(self, run: Run) -> None:
        worker = self.worker
        client = worker.client
        began_s = time.monotonic()
        template = None
        try:
            async with self._limits[self.group(run)]:
                began_s = time.monotonic()
                if run.task_id in worker.cancelled:
                    raise asyncio.CancelledError
                template = worker.load(run).template
                args, kwargs = worker.arguments(run)
                method = self.method(template.method)
                self.enter(run, template)
                result = method(*args, **kwargs)
                if inspect.isawaitable(result):
                    result = await result
                if template.stream or inspect.isgenerator(result) or inspect.isasyncgen(result):
                    await generators.run_async(
                        worker, run, template, result, began_s, self._loop)
                else:
                    worker.deliver(run, template, result, began_s)
        except FailedDependency as failed:
            client.report(Failed(run.task_id, run.attempt, _us(began_s), failed.error))
        except BaseException as error:
            worker.leave_if_forked(error)
            if self.is_exit(error):
                # Not from here: these frames would keep the instance from its `__del__`.
                self.leave(error)
                self._loop.call_soon(self.exit_by_itself)
                return
            if isinstance(error, asyncio.CancelledError) and run.task_id in worker.cancelled:
                client.report(worker.cancellation(run, began_s))
            else:
                name = template.name if template is not None else "method"
                client.report(worker.failure(run, name, began_s, error, template))
        if not self._flush_due:
            self._flush_due = True
            if not self._starting:
                self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        output.flush()
        self.worker.client.flush(drain=not self._running)


def _ready() -> bool:
    return True


def _exit_request() -> BaseException:
    from hpcray.actor import ActorExitRequest

    return ActorExitRequest()


def _us(began_s: float) -> int:
    return int((time.monotonic() - began_s) * 1_000_000)


__all__ = ["AsyncActor", "HostedActor", "ThreadedActor", "host", "threading"]
