"""`ActorPool`: hand calls to whichever of a fixed set of actors is free.

    submit --> waiting --(an actor is free)--> running --get_next / get_next_unordered--> result
                                                  |
                                  taking a result is what frees its actor

Single-threaded and driven by the caller: nothing happens between two method calls of the pool.

What must not go in: anything behind the public API; starting or ending actors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from hpcray import api
from hpcray.exceptions import ActorDiedError

V = TypeVar("V")

# What a submitted function returns: the ref of a call, or the list of refs of its several returns.
Submit = Callable[[Any, V], Any]


class _Running(NamedTuple):
    actor: Any
    refs: list[Any]
    single: bool  # the function returned a ref and not a list


class ActorPool(Generic[V]):
    """Distributes calls over actors.

        pool = ActorPool([Worker.remote() for _ in range(4)])
        results = list(pool.map(lambda actor, value: actor.work.remote(value), values))

    The functions given to it take an actor and a value and return the ref of the call they made.
    An actor found dead when its result is taken leaves the pool; `push` a new one to replace it.
    """

    def __init__(self, actors: list[Any]) -> None:
        self._idle = list(actors)
        self._waiting: deque[tuple[Submit[Any], Any]] = deque()
        # In the order of submission: by number, and dictionaries keep their order.
        self._running: dict[int, _Running] = {}
        self._submitted_count = 0
        # Results of lower numbers have been taken, or skipped by get_next_unordered.
        self._next_number = 0

    # --- many at once -----------------------------------------------------------------------------

    def map(self, fn: Submit[V], values: Iterable[V]) -> Iterator[Any]:
        """Call for every value; the results in the order of the values.

        All values are read now, and results of earlier submissions are dropped. Take the results,
        or calls that wait for an actor do not run.
        """
        self._submit_all(fn, values)
        return self._results(self.get_next)

    def map_unordered(self, fn: Submit[V], values: Iterable[V]) -> Iterator[Any]:
        """As `map`, the results in the order in which they are ready."""
        self._submit_all(fn, values)
        return self._results(self.get_next_unordered)

    def _submit_all(self, fn: Submit[V], values: Iterable[V]) -> None:
        # What was submitted still runs, in front of the new calls of the same actor; its results
        # and errors are nobody's any more.
        while self._running:
            self._free(self._running.pop(next(iter(self._running))).actor)
        self._next_number = self._submitted_count
        for value in values:
            self.submit(fn, value)

    def _results(self, take: Callable[[], Any]) -> Iterator[Any]:
        while self.has_next():
            yield take()

    # --- one at a time ----------------------------------------------------------------------------

    def submit(self, fn: Submit[V], value: V) -> None:
        """Call `fn(actor, value)` now if an actor is free, else when a result is taken."""
        if not self._idle:
            self._waiting.append((fn, value))
            return
        actor = self._idle.pop()
        try:
            refs = fn(actor, value)
            single = not isinstance(refs, list)
        except BaseException:
            self._idle.append(actor)
            raise
        self._running[self._submitted_count] = _Running(actor, [refs] if single else refs, single)
        self._submitted_count += 1

    def has_next(self) -> bool:
        """Whether there is a result to take, now or later."""
        return bool(self._running)

    def get_next(self, timeout: float | None = None, ignore_if_timedout: bool = False) -> Any:
        """The next result in the order of submission.

        Args:
          timeout: seconds.
          ignore_if_timedout: a call that is not done by then is skipped: its actor counts as free,
            though it runs new calls only after that one.

        Raises:
          StopIteration: there is none.
          TimeoutError: it was not there in time.
          ValueError: get_next_unordered() took a later one while this one was running.
          Whatever the call raised.
        """
        if not self._running:
            raise StopIteration("No more results to get")
        number = next(iter(self._running))
        if number < self._next_number:
            raise ValueError("It is not allowed to call get_next() after get_next_unordered().")
        running = self._running[number]
        if timeout is not None and not self._ready(running.refs, timeout):
            self._raise_timeout(number, ignore_if_timedout)
        return self._take(number)

    def get_next_unordered(
        self, timeout: float | None = None, ignore_if_timedout: bool = False
    ) -> Any:
        """The result of any call that is done; waits for one. Arguments as for `get_next`.

        Raises:
          StopIteration: there is none.
          TimeoutError: none was there in time.
          Whatever the call raised.
        """
        if not self._running:
            raise StopIteration("No more results to get")
        # One ref stands for each call: all returns of a call become ready together.
        numbers = {running.refs[0]: number for number, running in self._running.items()}
        ready, _ = api.wait(list(numbers), num_returns=1, timeout=timeout)
        if not ready:
            self._raise_timeout(next(iter(self._running)), ignore_if_timedout)
        return self._take(numbers[ready[0]])

    @staticmethod
    def _ready(refs: list[Any], timeout_s: float) -> bool:
        ready, _ = api.wait(refs, num_returns=len(refs), timeout=timeout_s)
        return len(ready) == len(refs)

    def _raise_timeout(self, number: int, ignore: bool) -> None:
        text = "Timed out waiting for result"
        if ignore:
            running = self._running.pop(number)
            self._next_number = max(self._next_number, number + 1)
            self._free(running.actor)
            text += f". The task {running.refs[0]} has been ignored."
        raise TimeoutError(text)

    def _take(self, number: int) -> Any:
        running = self._running[number]
        alive = True
        try:
            values = api.get(running.refs)
        except ActorDiedError:
            alive = False
            raise
        except KeyboardInterrupt:
            number = -1  # not taken: the next call gets it
            raise
        finally:
            if number >= 0:
                del self._running[number]
                self._next_number = max(self._next_number, number + 1)
                if alive:
                    self._free(running.actor)
        return values[0] if running.single else values

    def _free(self, actor: Any) -> None:
        self._idle.append(actor)
        if self._waiting:
            self.submit(*self._waiting.popleft())

    # --- the actors -------------------------------------------------------------------------------

    def has_free(self) -> bool:
        """Whether an actor is free and no call waits for one."""
        return bool(self._idle) and not self._waiting

    def pop_idle(self) -> Any:
        """Take a free actor out of the pool; None if there is none."""
        return self._idle.pop() if self.has_free() else None

    def push(self, actor: Any) -> None:
        """Add an actor.

        Raises:
          ValueError: it is in the pool already.
        """
        if actor in self._idle or any(actor == r.actor for r in self._running.values()):
            raise ValueError("Actor already belongs to current ActorPool")
        self._free(actor)


__all__ = ["ActorPool"]
