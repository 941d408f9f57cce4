"""`Executor`: the standard library's executor interface over hpcray tasks.

    submit --> queued ----------------------> in flight --------------> done
               PENDING, can be cancelled      RUNNING, has its ref      result or exception
                 |                              ^
                 +-- while fewer than `window` are in flight

For programs written against `concurrent.futures`, and for asyncio's `run_in_executor`. Calls are
queued here and not on the nodes, because there is no way to take back a submitted task only if it
has not started: what is queued here can be cancelled exactly, as a `Future` promises.

The window is as many calls as the cluster can run at once. Short calls would leave it idle for a
round trip each, so it grows by one for each call that is back within `PREFETCH_S` and what it has
grown is halved by each that is not: a queue on the nodes is worth about that time at most.

Inside tasks and actors everything is in flight at once, as what waits there should be a ref that
gives back the waiter's CPU.

What must not go in: anything behind the public API.
"""

from __future__ import annotations

import concurrent.futures
import inspect
import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar, cast

import hpcray as ray
from hpcray.exceptions import RaySystemError, TaskError, _plain

P = ParamSpec("P")
T = TypeVar("T")

# How much work, in time, may wait on the nodes beyond what runs. Some ten round trips; arbitrary.
PREFETCH_S = 0.01
MAX_PREFETCH = 4096

# Functions whose remote form is kept: enough for a program's handful, and closures made in a loop
# do not pile up.
_KEPT_FUNCTIONS = 128


class Executor(concurrent.futures.Executor):
    """Runs calls as tasks of the cluster; `init()` is called if nobody has.

    Args:
      max_workers: at most so many calls are in flight at once; None: what the cluster can run.
      options: of the tasks, as for `@remote`: num_cpus, num_gpus, resources, max_retries, ...

    Functions, arguments and results are pickled. Plain functions are pickled once, at their first
    call, as with `@remote`. An `ObjectRef` given as an argument arrives as its value. Unlike in the
    standard library a call whose worker dies is repeated (`max_retries`, 3 by default).

    An exception arrives as it was raised, and its `__cause__` is the `TaskError` with the remote
    traceback. Done-callbacks run in a thread of hpcray and must not wait for other futures of it.

    Raises:
      ValueError, TypeError, NotImplementedError: a bad `max_workers` or option.
    """

    def __init__(self, max_workers: int | None = None, **options: Any) -> None:
        if max_workers is not None:
            if isinstance(max_workers, bool) or not isinstance(max_workers, int):
                raise TypeError(f"max_workers must be an integer or None, not {max_workers!r}")
            if max_workers < 1:
                raise ValueError(f"max_workers must be at least 1, not {max_workers}")
        if options.get("num_returns") not in (None, 1):
            raise ValueError("a Future has one result: num_returns must be 1")
        self._max_workers = max_workers
        self._options = options
        self._call_any = _remote(_call, options)  # checks the options
        self._functions: OrderedDict[Any, Any] = OrderedDict()
        # Guards all below. A callback of hpcray takes it too, so nothing that waits runs under it.
        self._changed = threading.Condition(threading.RLock())
        self._queue: deque[_Call] = deque()
        self._in_flight: dict[_Call, Any] = {}  # its ref
        self._slots = 0  # calls the cluster runs at once; 0: not asked yet
        self._prefetch = 0
        self._launching = False
        self._closed = False

    def submit(
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> concurrent.futures.Future[T]:
        """Schedule `fn(*args, **kwargs)`.

        What cannot be pickled shows in the future.

        Raises:
          RuntimeError: the executor is shut down.
        """
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if not self._slots:
                self._slots = self._count_slots()
            self._queue.append(_Call(future, fn, args, kwargs))
        self._launch()
        return future

    def map(
        self, fn: Callable[..., T], *iterables: Iterable[Any], timeout: float | None = None,
        chunksize: int = 1, **others: Any,
    ) -> Iterator[T]:
        """`fn` over the zipped iterables, `chunksize` calls in a task; results in their order.

        The iterables are read at once (`buffersize` of Python 3.14 limits that).

        Raises:
          TimeoutError: from the iterator, `timeout` seconds after this call.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be at least 1")
        if chunksize == 1:
            return super().map(fn, *iterables, timeout=timeout, **others)
        shared = ray.put(fn)  # the chunks share one copy
        results = super().map(
            _call_chunk, itertools.repeat(shared),
            _chunks(zip(*iterables, strict=False), chunksize), timeout=timeout, **others)
        return _flatten(results)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls. May be called again, from any thread but hpcray's own.

        Args:
          wait: return once every call is done.
          cancel_futures: cancel what is not in flight.
        """
        with self._changed:
            self._closed = True
            cancelled = list(self._queue) if cancel_futures else []
            if cancel_futures:
                self._queue.clear()
        for call in cancelled:
            call.future.cancel()
        if wait:
            self._wait_until_idle()

    # --- from queued to in flight -----------------------------------------------------------------

    def _count_slots(self) -> int:
        """How many calls the cluster, or `max_workers`, lets run at once; at least 1."""
        if self._max_workers is not None:
            return self._max_workers
        needs = dict(self._options.get("resources") or {})
        needs["CPU"] = 1 if self._options.get("num_cpus") is None else self._options["num_cpus"]
        needs["GPU"] = self._options.get("num_gpus") or 0
        total = ray.cluster_resources()
        fits = [total.get(name, 0.0) / need for name, need in needs.items() if need]
        # Calls that need nothing at all still need a limit.
        return max(1, int(min(fits, default=total.get("CPU", 1.0))))

    def _window(self) -> int:
        return self._slots + (self._prefetch if self._max_workers is None else 0)

    def _launch(self) -> None:
        """Submit from the queue while the window has room."""
        with self._changed:
            if self._launching:
                return  # that thread, or this one further up, looks again before it stops
            self._launching = True
        try:
            while (call := self._next()) is not None:
                self._start(call)
        except BaseException:
            # Ctrl-C: the next submission or completion goes on.
            with self._changed:
                self._launching = False
            raise

    def _next(self) -> _Call | None:
        """The next call to submit; None ends the launching."""
        with self._changed:
            while self._queue and (len(self._in_flight) < self._window() or _in_task()):
                call = self._queue.popleft()
                if call.future.set_running_or_notify_cancel():
                    self._in_flight[call] = None
                    return call
            self._launching = False
            self._changed.notify_all()
            return None

    def _start(self, call: _Call) -> None:
        call.launched_s = time.monotonic()
        try:
            ref = self._submit(call)
            with self._changed:
                self._in_flight[call] = ref
                self._changed.notify_all()
            completed = ref.future()
        except BaseException as error:
            self._settle(call, None, error)
            if not isinstance(error, Exception):
                raise
        else:
            completed.add_done_callback(lambda done: self._completed(call, done))

    def _submit(self, call: _Call) -> Any:
        if inspect.isgeneratorfunction(call.fn):
            raise TypeError(f"a Future has one result, and {call.fn.__name__} yields many: "
                            "return a list, or call it as a remote function")
        if not inspect.isfunction(call.fn):
            # Classes, partials, bound methods and other callables have no remote form.
            return self._call_any.remote(call.fn, *call.args, **call.kwargs)
        function = self._functions.get(call.fn)
        if function is None:
            function = self._functions[call.fn] = _remote(call.fn, self._options)
            if len(self._functions) > _KEPT_FUNCTIONS:
                self._functions.popitem(last=False)
        return function.remote(*call.args, **call.kwargs)

    # --- from in flight to done -------------------------------------------------------------------

    def _completed(self, call: _Call, done: concurrent.futures.Future[Any]) -> None:
        with self._changed:
            if time.monotonic() - call.launched_s < PREFETCH_S:
                self._prefetch = min(self._prefetch + 1, MAX_PREFETCH)
            else:
                self._prefetch //= 2
            if len(self._in_flight) == 1 and not self._queue:
                self._prefetch = 0  # the last one: what comes next may be of another kind
        error = done.exception()
        self._settle(call, None if error is not None else done.result(), error)
        self._launch()

    def _settle(self, call: _Call, result: Any, error: BaseException | None) -> None:
        with self._changed:
            if call not in self._in_flight:
                return  # given up: the session ended
        # Before it leaves `_in_flight`: shutdown(wait=True) promises futures that are done.
        if error is None:
            call.future.set_result(result)
        else:
            call.future.set_exception(_as_raised(error))
        with self._changed:
            del self._in_flight[call]
            self._changed.notify_all()

    def _wait_until_idle(self) -> None:
        while True:
            with self._changed:
                # A call is without a ref only for the moment in which some thread submits it.
                self._changed.wait_for(lambda: None not in self._in_flight.values())
                if not self._in_flight and not self._queue:
                    return
                waited = dict(self._in_flight)
            if waited:
                try:
                    # Not just the condition: this gives back the CPU of a task that waits here.
                    ray.wait(list(waited.values()), num_returns=len(waited), fetch_local=False)
                except (RuntimeError, ValueError, RaySystemError) as error:
                    self._give_up(error)
                    return
            with self._changed:
                # Ready by now, and the helper thread is about to say so.
                self._changed.wait_for(lambda: self._in_flight.keys().isdisjoint(waited)  # noqa: B023
                                       and bool(self._in_flight or not self._queue))

    def _give_up(self, error: BaseException) -> None:
        """The session has ended: nothing in flight can complete any more."""
        with self._changed:
            in_flight, self._in_flight = list(self._in_flight), {}
            queued = list(self._queue)
            self._queue.clear()
        for call in in_flight:
            if not call.future.done():
                call.future.set_exception(error)
        for call in queued:
            call.future.cancel()


class _Call:
    """One submitted call. Compared by identity."""

    __slots__ = ("args", "fn", "future", "kwargs", "launched_s")

    def __init__(self, future: concurrent.futures.Future[Any], fn: Callable[..., Any],
                 args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.future = future
        self.fn = fn
        self.args = args
        self.kwargs = kwargs
        self.launched_s = 0.0


def _remote(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    return ray.remote(**options)(function) if options else ray.remote(function)


def _in_task() -> bool:
    return ray.get_runtime_context().get_task_id() is not None


def _as_raised(error: BaseException) -> BaseException:
    """What the call raised, with the remote traceback below it; hpcray's own errors as they are."""
    if not isinstance(error, TaskError) or error.cause is None:
        return error
    raised, where = error.cause, _plain(error)
    raised.__cause__ = TaskError(
        where.function_name, where.traceback_str, None, where.pid, where.ip, where.rank,
        where.actor_id)
    return raised


# --- what runs in the workers ---------------------------------------------------------------------


def _call(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return fn(*args, **kwargs)


def _call_chunk(fn: Callable[..., T], chunk: list[tuple[Any, ...]]) -> list[T]:
    return [fn(*args) for args in chunk]


def _chunks(items: Iterable[tuple[Any, ...]], size: int) -> Iterator[list[tuple[Any, ...]]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _flatten(chunks: Iterator[list[T]]) -> Iterator[T]:
    # Closing this generator closes the one below, which cancels what is not in flight.
    try:
        for chunk in chunks:
            chunk.reverse()
            while chunk:
                yield chunk.pop()  # and not kept here while the consumer works on it
    finally:
        cast(Any, chunks).close()


__all__ = ["Executor"]
