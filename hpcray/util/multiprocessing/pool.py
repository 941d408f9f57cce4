"""`Pool`: the standard library's process pool, its processes being actors.

    map, apply, ... --> batches --> queue --(an actor is idle)--> actor --> outcomes --> AsyncResult

A batch is handed to an actor only when that is idle, so a slow batch holds up no other, and a
worker that died is replaced by a new one before the next batch. Completions arrive in hpcray's
helper thread: it hands out the next batch and runs the user's callbacks, as the result thread of
the standard library does, and like there a callback must not wait for the pool.

`Pool._lock` guards what the two threads share; no user code runs under it but that of pickling.

What must not go in: anything behind the public API, but for the serialiser: a worker asks it
whether an exception can travel.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import multiprocessing
import pickle
import sys
import threading
import traceback
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, Generic, NamedTuple, TypeVar

import hpcray as ray
from hpcray.client.serialization import serialize
from hpcray.exceptions import ActorDiedError, RayActorError

T = TypeVar("T")

_logger = logging.getLogger("hpcray")

# Chunks per process if nobody says how large they are, as in the standard library: few enough to
# be cheap, and enough to even out processes of different speed.
_CHUNKS_PER_PROCESS = 4
# Chunks `imap` has under way per process: one that runs, and one for when it is done.
_IMAP_CHUNKS_PER_PROCESS = 2


class Outcome(NamedTuple):
    """What one call came to. `error` is None if it returned."""

    value: Any
    error: BaseException | None
    traceback_text: str


class RemoteTraceback(Exception):
    """The `__cause__` of what a call raised: where it happened in the worker."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


# --- in the workers -------------------------------------------------------------------------------


class _PoolWorker:
    def __init__(self, initializer: Callable[..., Any] | None, arguments: tuple[Any, ...]) -> None:
        # Functions of `__main__` travel by value, each with globals of its own. What the
        # initializer sets is carried over by hand, as `global` in an initializer is what
        # programs for `multiprocessing` do.
        self._module = getattr(initializer, "__module__", None)
        self._globals: dict[str, Any] = {}
        if initializer is not None:
            scope = getattr(initializer, "__globals__", {})
            before = dict(scope)
            initializer(*arguments)
            self._globals = {name: value for name, value in scope.items()
                             if name not in before or before[name] is not value}

    def ready(self) -> None:
        """Returns once the constructor has."""

    def run(self, function: Callable[..., Any], calls: list[Any]) -> list[Outcome]:
        if (self._globals and isinstance(function, types.FunctionType)
                and function.__module__ == self._module):
            function.__globals__.update(self._globals)
        return [_call(function, args, kwargs) for args, kwargs in calls]


def _call(function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Outcome:
    try:
        return Outcome(function(*args, **kwargs), None, "")
    except Exception as error:
        text = traceback.format_exc()
        error.__traceback__ = None
        try:
            packed = serialize(error)
            pickle.loads(packed.pickled, buffers=packed.buffers)
        except Exception:
            # It must not take the results of its whole batch with it.
            return Outcome(None, RuntimeError(f"{type(error).__name__}: {error}"), text)
        return Outcome(None, error, text)


# --- batches --------------------------------------------------------------------------------------


class _Batch:
    """Calls that go to a worker together. `done` is called once, with an outcome for each."""

    __slots__ = ("calls", "done", "function")

    def __init__(self, function: Any, calls: list[Any],
                 done: Callable[[list[Outcome]], None]) -> None:
        self.function = function  # or the ref of it, which its batches share
        self.calls = calls
        self.done = done

    def fail(self, error: BaseException) -> None:
        self.done([Outcome(None, error, "")] * len(self.calls))


class _Process:
    """An actor of the pool."""

    __slots__ = ("actor", "call_count")

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.call_count = 0


# --- results --------------------------------------------------------------------------------------


class AsyncResult(Generic[T]):
    """The result of a call, or the list of results of many. Returned by the pool; never built."""

    def __init__(
        self,
        batch_count: int,
        single: bool,
        callback: Callable[[Any], object] | None,
        error_callback: Callable[[BaseException], object] | None,
    ) -> None:
        self._batches: list[list[Outcome]] = [[] for _ in range(batch_count)]
        self._left = batch_count
        self._single = single
        self._callback = callback
        self._error_callback = error_callback
        self._error: BaseException | None = None
        self._value: Any = None
        self._done = threading.Event()
        if not batch_count:
            self._finish()

    def _batch_done(self, index: int, outcomes: list[Outcome]) -> None:
        self._batches[index] = outcomes
        self._left -= 1  # by one thread at a time: see Pool._deliver
        if not self._left:
            self._finish()

    def _finish(self) -> None:
        outcomes = list(itertools.chain.from_iterable(self._batches))
        self._batches.clear()
        failed = next((one for one in outcomes if one.error is not None), None)
        if failed is not None:
            self._error = _as_raised(failed)
        else:
            values = [one.value for one in outcomes]
            self._value = values[0] if self._single else values
        # Before it counts as done, as in the standard library.
        try:
            if self._error is None and self._callback is not None:
                self._callback(self._value)
            elif self._error is not None and self._error_callback is not None:
                self._error_callback(self._error)
        except Exception:
            _logger.exception("a callback given to Pool raised")
        finally:
            self._callback = self._error_callback = None
            self._done.set()

    def get(self, timeout: float | None = None) -> T:
        """The result; waits for it.

        Raises:
          multiprocessing.TimeoutError: it was not there within `timeout` seconds.
          The first of what the calls raised, with a `RemoteTraceback` as its cause.
        """
        self.wait(timeout)
        if not self.ready():
            raise multiprocessing.TimeoutError
        if self._error is not None:
            raise self._error
        result: T = self._value
        return result

    def wait(self, timeout: float | None = None) -> None:
        """Return when all calls are done, or after `timeout` seconds."""
        self._done.wait(timeout)

    def ready(self) -> bool:
        """Whether all calls are done."""
        return self._done.is_set()

    def successful(self) -> bool:
        """Whether none of them raised.

        Raises:
          ValueError: they are not done.
        """
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        return self._error is None


def _as_raised(outcome: Outcome) -> BaseException:
    error = outcome.error
    assert error is not None
    if outcome.traceback_text:
        error.__cause__ = RemoteTraceback(outcome.traceback_text)
    return error


class IMapIterator(Iterator[T]):
    """Results of `imap` and `imap_unordered`; `next` reads the iterable, a few chunks ahead."""

    def __init__(self, pool: Pool, function: Any, calls: Iterator[Any], chunk_size: int,
                 ordered: bool) -> None:
        self._pool = pool
        self._function = function
        self._calls = calls
        self._chunk_size = chunk_size
        self._ordered = ordered
        self._arrived = threading.Condition()
        self._chunks: dict[int, list[Outcome]] = {}  # arrived, not begun to be read
        self._reading: deque[Outcome] = deque()
        self._submitted = 0
        self._read = 0
        self._exhausted = False
        for _ in range(_IMAP_CHUNKS_PER_PROCESS * pool._process_count):
            self._submit_chunk()

    def _submit_chunk(self) -> None:
        if self._exhausted:
            return
        calls = list(itertools.islice(self._calls, self._chunk_size))
        if len(calls) < self._chunk_size:
            self._exhausted = True
        if not calls:
            return
        number = self._submitted
        self._submitted += 1
        batch = _Batch(self._function, calls, lambda done: self._chunk_done(number, done))
        self._pool._enqueue([batch], accepted=True)

    def _chunk_done(self, number: int, outcomes: list[Outcome]) -> None:
        with self._arrived:
            self._chunks[number] = outcomes
            self._arrived.notify_all()

    def __iter__(self) -> IMapIterator[T]:
        return self

    def __next__(self) -> T:
        return self.next()

    def next(self, timeout: float | None = None) -> T:
        """The next result.

        Raises:
          StopIteration: there are no more.
          multiprocessing.TimeoutError: it was not there within `timeout` seconds; ask again.
          What the call raised; the iteration can go on after that.
        """
        if not self._reading:
            if self._read == self._submitted:
                raise StopIteration
            with self._arrived:
                if not self._arrived.wait_for(self._has_chunk, timeout):
                    raise multiprocessing.TimeoutError
                number = self._read if self._ordered else next(iter(self._chunks))
                self._reading.extend(self._chunks.pop(number))
            self._read += 1
            self._submit_chunk()
        outcome = self._reading.popleft()
        if outcome.error is not None:
            raise _as_raised(outcome)
        value: T = outcome.value
        return value

    def _has_chunk(self) -> bool:
        return self._read in self._chunks if self._ordered else bool(self._chunks)


# --- the pool -------------------------------------------------------------------------------------


class Pool:
    """A pool of processes, anywhere in the cluster; `init()` is called if nobody has.

    Args:
      processes: how many; None: one for each CPU of the cluster.
      initializer, initargs: called in each process when it starts. What it sets by `global` is seen
        by functions of its module.
      maxtasksperchild: a process is replaced after so many calls (a whole chunk at the least).
      context: has no effect; there for compatibility.
      ray_address: as `init(address=...)`.
      ray_remote_args: options of the processes, as for `@remote`. Unless they say otherwise a
        process takes no CPU from the scheduler.

    A call whose process dies fails with `ActorDiedError` and is not repeated.

    Raises:
      ValueError: no processes, or more than the cluster has CPUs.
      TaskError, ActorDiedError: the initializer raised.
    """

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] | None = None,
        maxtasksperchild: int | None = None,
        context: Any = None,
        ray_address: str | None = None,
        ray_remote_args: Mapping[str, Any] | None = None,
    ) -> None:
        if processes is not None and processes <= 0:
            raise ValueError("Processes in the pool must be >0.")
        if maxtasksperchild is not None and maxtasksperchild < 1:
            raise ValueError("maxtasksperchild must be a positive int or None")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if context is not None:
            _logger.warning("Pool: context has no effect; hpcray starts its own processes")
        if not ray.is_initialized():
            ray.init(ray_address, num_cpus=processes)
        cpu_count = int(ray.cluster_resources().get("CPU", 0))
        self._process_count = cpu_count if processes is None else processes
        if not 0 < self._process_count <= cpu_count:
            raise ValueError(
                f"Tried to start a pool with {self._process_count} processes on an existing ray "
                f"cluster, but there are only {cpu_count} CPUs in the ray cluster.")
        self._initializer = initializer
        self._init_args = tuple(initargs or ())
        self._max_calls = maxtasksperchild or sys.maxsize
        options = {"num_cpus": 0, **(ray_remote_args or {})}
        self._worker_class: Any = ray.remote(**options)(_PoolWorker)
        self._lock = threading.Condition(threading.RLock())
        # Results are handed over by one thread at a time, without `_lock`: callbacks are user code.
        self._delivering = threading.RLock()
        self._queue: deque[_Batch] = deque()
        self._busy: dict[_Process, _Batch] = {}
        self._closed = False
        self._terminated = False
        self._ending: list[Any] = []  # refs of the ends of processes
        self._idle = [self._new_process() for _ in range(self._process_count)]
        try:
            ray.get([process.actor.ready.remote() for process in self._idle])
        except BaseException:
            self.terminate()
            raise

    # --- calls ------------------------------------------------------------------------------------

    def apply(self, func: Callable[..., T], args: Iterable[Any] | None = None,
              kwargs: Mapping[str, Any] | None = None) -> T:
        """`func(*args, **kwargs)` in one of the processes."""
        return self.apply_async(func, args, kwargs).get()

    def apply_async(
        self,
        func: Callable[..., T],
        args: Iterable[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        callback: Callable[[T], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> AsyncResult[T]:
        """`apply` that does not wait. One of the callbacks is called, in a thread of hpcray."""
        self._check_running()
        result: AsyncResult[T] = AsyncResult(1, True, callback, error_callback)
        calls = [(tuple(args or ()), dict(kwargs or {}))]
        self._enqueue([_Batch(func, calls, lambda done: result._batch_done(0, done))])
        return result

    def map(self, func: Callable[[Any], T], iterable: Iterable[Any],
            chunksize: int | None = None) -> list[T]:
        """`func` of each item, `chunksize` of them in one message; the results in their order."""
        return self.map_async(func, iterable, chunksize).get()

    def map_async(
        self,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[list[T]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> AsyncResult[list[T]]:
        """`map` that does not wait. One of the callbacks is called once, after the last call."""
        return self._map(func, _single(iterable), chunksize, callback, error_callback)

    def starmap(self, func: Callable[..., T], iterable: Iterable[Iterable[Any]],
                chunksize: int | None = None) -> list[T]:
        """`map` whose items are the arguments: func(*item)."""
        return self.starmap_async(func, iterable, chunksize).get()

    def starmap_async(
        self,
        func: Callable[..., T],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        callback: Callable[[list[T]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> AsyncResult[list[T]]:
        """`starmap` that does not wait."""
        return self._map(func, ((tuple(item), {}) for item in iterable), chunksize, callback,
                         error_callback)

    def imap(self, func: Callable[[Any], T], iterable: Iterable[Any],
             chunksize: int | None = 1) -> IMapIterator[T]:
        """`map` as an iterator, for iterables too long to be read at once."""
        return self._imap(func, iterable, chunksize, ordered=True)

    def imap_unordered(self, func: Callable[[Any], T], iterable: Iterable[Any],
                       chunksize: int | None = 1) -> IMapIterator[T]:
        """`imap` whose results come in the order they are ready."""
        return self._imap(func, iterable, chunksize, ordered=False)

    def _map(self, func: Any, calls: Iterator[Any], chunksize: int | None,
             callback: Any, error_callback: Any) -> AsyncResult[Any]:
        self._check_running()
        all_calls = list(calls)
        size = self._chunk_size(chunksize, len(all_calls))
        starts = range(0, len(all_calls), size)
        result: AsyncResult[Any] = AsyncResult(len(starts), False, callback, error_callback)
        function = self._shared(func) if len(starts) > 1 else func
        self._enqueue([
            _Batch(function, all_calls[start:start + size],
                   lambda done, index=index: result._batch_done(index, done))  # type: ignore[misc]
            for index, start in enumerate(starts)])
        return result

    def _imap(self, func: Any, iterable: Iterable[Any], chunksize: int | None,
              ordered: bool) -> IMapIterator[Any]:
        self._check_running()
        length = len(iterable) if isinstance(iterable, Sized) else 1
        size = self._chunk_size(chunksize, length)
        return IMapIterator(self, self._shared(func), _single(iterable), size, ordered)

    def _chunk_size(self, given: int | None, length: int) -> int:
        if given is None:
            return max(1, -(-length // (self._process_count * _CHUNKS_PER_PROCESS)))
        if given < 1:
            raise ValueError(f"Chunksize must be 1+, not {given}")
        return given

    @staticmethod
    def _shared(func: Any) -> Any:
        """Pickled once for all batches."""
        return func if isinstance(func, ray.ObjectRef) else ray.put(func)

    # --- batches to processes ---------------------------------------------------------------------

    def _new_process(self) -> _Process:
        return _Process(self._worker_class.remote(self._initializer, self._init_args))

    def _enqueue(self, batches: list[_Batch], accepted: bool = False) -> None:
        """`accepted`: part of a call made before the pool was closed."""
        with self._lock:
            refused = self._terminated
            if not refused:
                if not accepted:
                    self._check_running()
                self._queue.extend(batches)
        if refused:
            self._fail(batches, _terminated())
            return
        self._hand_out()

    def _hand_out(self) -> None:
        while True:
            with self._lock:
                if not self._queue or not (self._idle or self._stopped()):
                    break
                batch = self._queue.popleft()
                # Closed and empty for a moment, and its processes have ended: imap's next chunk.
                process = self._idle.pop() if self._idle else self._new_process()
                self._busy[process] = batch
                process.call_count += len(batch.calls)
                try:
                    ref = process.actor.run.remote(batch.function, batch.calls)
                except Exception as error:  # it cannot be pickled
                    failure: Exception | None = error
                else:
                    failure = None
            if failure is not None:
                self._free(process, alive=True)
                self._fail([batch], failure)
            else:
                ref.future().add_done_callback(
                    lambda done, process=process, batch=batch: self._completed(
                        process, batch, done))
        self._end_if_done()

    def _stopped(self) -> bool:
        return self._closed and not self._idle and not self._busy

    def _completed(self, process: _Process, batch: _Batch,
                   done: concurrent.futures.Future[list[Outcome]]) -> None:
        error = done.exception()
        if not self._free(process, alive=not isinstance(error, RayActorError)):
            return  # terminated meanwhile: the batch has failed already
        # The next batch first: the callbacks below may take their time.
        self._hand_out()
        if error is None:
            with self._delivering:
                batch.done(done.result())
        else:
            self._fail([batch], error)

    def _free(self, process: _Process, alive: bool) -> bool:
        """Take a process back, or a new one in its place; False if it is not expected any more."""
        with self._lock:
            if self._busy.pop(process, None) is None:
                return False
            if not alive:
                process = self._new_process()
            elif process.call_count >= self._max_calls:
                self._end(process)
                process = self._new_process()
            self._idle.append(process)
            self._lock.notify_all()
            return True

    def _fail(self, batches: Iterable[_Batch], error: BaseException) -> None:
        with self._delivering:
            for batch in batches:
                batch.fail(error)

    # --- the end ----------------------------------------------------------------------------------

    def _check_running(self) -> None:
        if self._closed:
            raise ValueError("Pool not running")

    def close(self) -> None:
        """Take no more calls; the processes end when they have run those there are."""
        with self._lock:
            self._closed = True
        self._end_if_done()

    def terminate(self) -> None:
        """End the processes at once. Calls that are not done fail with `ActorDiedError`."""
        with self._lock:
            self._closed = self._terminated = True
            failed = [*self._busy.values(), *self._queue]
            processes = [*self._busy, *self._idle]
            self._busy.clear()
            self._queue.clear()
            self._idle.clear()
            self._lock.notify_all()
        if ray.is_initialized():
            for process in processes:
                ray.kill(process.actor)
        self._fail(failed, _terminated())

    def join(self) -> None:
        """Wait until the processes of a closed or terminated pool have ended.

        Raises:
          ValueError: it is neither.
        """
        if not self._closed:
            raise ValueError("Pool is still running")
        with self._lock:
            self._lock.wait_for(lambda: not self._busy and not self._queue and not self._idle)
            ending, self._ending = self._ending, []
        if ending:
            ray.wait(ending, num_returns=len(ending))

    def _end_if_done(self) -> None:
        with self._lock:
            if self._closed and not self._queue and not self._busy:
                while self._idle:
                    self._end(self._idle.pop())
                self._lock.notify_all()

    def _end(self, process: _Process) -> None:
        self._ending.append(process.actor.__ray_terminate__.remote())
        if len(self._ending) > 2 * self._process_count:  # maxtasksperchild, for hours
            _, self._ending = ray.wait(
                self._ending, num_returns=len(self._ending), timeout=0)

    def __enter__(self) -> Pool:
        self._check_running()
        return self

    def __exit__(self, *_: object) -> None:
        self.terminate()

    def __repr__(self) -> str:
        state = "TERMINATED" if self._terminated else "CLOSED" if self._closed else "RUNNING"
        return f"<Pool state={state} pool_size={self._process_count}>"


def _single(iterable: Iterable[Any]) -> Iterator[Any]:
    """Each item as the only argument of a call."""
    return (((item,), {}) for item in iterable)


def _terminated() -> ActorDiedError:
    return ActorDiedError(None, "the pool was terminated before this call was done")


__all__ = ["AsyncResult", "IMapIterator", "Pool", "RemoteTraceback"]
