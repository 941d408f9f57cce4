"""joblib's `Parallel` over hpcray tasks: each of its batches is one task, through an `Executor`.

    Parallel --batch--> submit --(large arrays become refs)--> Executor --> task --> callback

An array that several calls share travels once: arrays of a MiB or more are `put` at first sight
and their refs sent instead. Workers see them as read-only views of shared memory; joblib's own
process backends map arrays of that size read-only, too.
"""

from __future__ import annotations

import contextlib
import copy
import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from joblib._parallel_backends import (  # type: ignore[import-untyped, import-not-found, unused-ignore]
    AutoBatchingMixin,
    ParallelBackendBase,
)

import hpcray as ray
from hpcray.futures import Executor

# joblib's own limit for memory-mapping an argument (`max_nbytes`).
_SHARED_MIN_BYTES = 1 << 20


class RayBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]  # joblib is untyped
    """Args (of `parallel_config`, too):
      ray_remote_args: options of the tasks, as for `@remote`.
    """

    supports_retrieve_callback = True
    default_n_jobs = -1

    def __init__(self, nesting_level: int | None = None, inner_max_num_threads: int | None = None,
                 ray_remote_args: dict[str, Any] | None = None, **others: Any) -> None:
        super().__init__(
            nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads, **others)
        self._options = dict(ray_remote_args or {})
        self._executor: Executor | None = None
        # By id; the array is kept with its ref, or another one might get its id.
        self._shared: dict[int, tuple[Any, Any]] = {}

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """As joblib counts: -1 all CPUs of the cluster, -2 all but one, ..."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        if n_jobs > 0:
            return n_jobs
        if not ray.is_initialized():
            ray.init()
        return max(1, int(ray.cluster_resources().get("CPU", 1)) + 1 + n_jobs)

    def configure(self, n_jobs: int = 1, parallel: Any = None, prefer: Any = None,
                  require: Any = None, ray_remote_args: dict[str, Any] | None = None,
                  **_: Any) -> int:
        count = self.effective_n_jobs(n_jobs)
        self.parallel = parallel
        if ray_remote_args is not None:
            self._options = dict(ray_remote_args)  # also for the next call after an error
        self._executor = Executor(max_workers=count, **self._options)
        return count

    def submit(self, func: Any, callback: Callable[[Any], Any] | None = None) -> Future[Any]:
        executor = self._executor
        assert executor is not None
        future = executor.submit(_run_batch, self._with_refs(func))

        def done(future: Future[Any]) -> None:
            # What was still running when a call failed ends some time later, and is nobody's then.
            if callback is not None and self._executor is executor:
                callback(future)

        future.add_done_callback(done)
        return future

    def retrieve_result_callback(self, out: Future[Any]) -> Any:
        return out.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        self.terminate()
        # joblib cuts batches ahead. What it has not submitted when an error arrives stays in its
        # queue, and the next call of the same Parallel would run it and raise the old error.
        batches = getattr(self.parallel, "_ready_batches", None)
        with contextlib.suppress(queue.Empty):
            while batches is not None:
                batches.get(block=False)
        if ensure_ready:
            self.configure(self.parallel.n_jobs, self.parallel)

    def terminate(self) -> None:
        # Tasks that run are waited for by nobody: after an error their results do not matter.
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)
        self._shared.clear()
        if executor is not None:
            self.reset_batch_stats()

    def _with_refs(self, batch: Any) -> Any:
        """The batch with refs in place of large arrays."""
        items = [
            (function, [self._share(arg) for arg in args],
             {name: self._share(arg) for name, arg in kwargs.items()})
            for function, args, kwargs in batch.items
        ]
        batch = copy.copy(batch)
        batch.items = items
        return batch

    def _share(self, arg: Any) -> Any:
        if getattr(arg, "nbytes", 0) < _SHARED_MIN_BYTES or isinstance(arg, ray.ObjectRef):
            return arg
        known = self._shared.get(id(arg))
        if known is None:
            known = self._shared[id(arg)] = (arg, _Shared(ray.put(arg)))
        return known[1]


class _Shared:
    """A ref that we made and the task resolves; one that the user passes stays a ref."""

    __slots__ = ("ref",)

    def __init__(self, ref: Any) -> None:
        self.ref = ref


def _run_batch(batch: Any) -> Any:
    batch.items = [
        (function, [_value(arg) for arg in args],
         {name: _value(arg) for name, arg in kwargs.items()})
        for function, args, kwargs in batch.items
    ]
    return batch()


def _value(arg: Any) -> Any:
    return ray.get(arg.ref) if isinstance(arg, _Shared) else arg


__all__ = ["RayBackend"]
