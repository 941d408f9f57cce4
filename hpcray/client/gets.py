"""`get`: the values of refs, for threads that wait until they are there.

    known already ----------------------------------------> unpickle
    one small value: want_result, wait -------------------> unpickle
    several, or large ones: look, want, wait, map, again --> unpickle

The table of what was asked for and has come is in `objects.py`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from hpcray import exceptions
from hpcray.client import serialization, waiters
from hpcray.client.link import Link
from hpcray.client.memory import Memory
from hpcray.client.objects import Objects
from hpcray.client.questions import EXPLAINED
from hpcray.client.references import LOCAL, ObjectRef, ReferenceTable
from hpcray.client.waiters import FailFast, Waiter
from hpcray.protocol import ids, values


class Gets:
    def __init__(
        self, link: Link, refs: ReferenceTable, objects: Objects, memory: Memory,
        want_result: Callable[[bytes], Any], explain: Callable[[list[bytes]], list[str]],
    ) -> None:
        self._link = link
        self._refs = refs
        self._objects = objects
        self._memory = memory
        self._want_result = want_result
        self._explain = explain

    def get(self, refs: Sequence[ObjectRef[Any]], timeout_s: float | None) -> list[Any]:
        """The values, in order.

        Raises:
          GetTimeoutError: not all were there in time.
          an exception that is the value of one of them, as soon as it is known: others may be on
            their way. Of several that are known, the first in the order given.
        """
        try:
            if len(refs) == 1:
                value = refs[0]._value
                if value is None:
                    value = self._get_one(refs[0], timeout_s)
                if value is not None:  # known already: no lock, no message
                    return [_open(value)]
            return [_open(item) for item in self.get_packed(refs, timeout_s, fail_fast=True)]
        except exceptions.ObjectStoreFullError:
            with self._link:
                self._objects.forget_refusals(refs)
            raise

    def _get_one(self, ref: ObjectRef[Any], timeout_s: float | None) -> bytes | None:
        """`get_packed` of one ref, for a small value; None: it is not one."""
        object_id = ref._id
        objects = self._objects
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        late = False
        link = self._link
        link.enter()
        try:
            if ref._value is None and ref._view is None and object_id not in objects.arrivals:
                if object_id[20:24] != self._refs.job_id:
                    self._refs.check_session((object_id,))
                waiter = Waiter(1, (object_id,))
                called = self._want_result(object_id)
                table = objects.value_waiters
                if object_id in table:
                    waiters.add(table, object_id, waiter)
                else:
                    table[object_id] = waiter
                try:
                    link.flush()
                    late = not link.wait(waiter, deadline_s)
                finally:
                    if waiter.remaining > 0:
                        waiters.remove(table, object_id, waiter)
                if called is not None:
                    called.over(ids.task_of_object(object_id), ref._value)
        finally:
            link.leave()
        if late:
            why = self._explain([object_id])
            if ref._value is None and ref._ready < LOCAL:
                raise _timed_out(timeout_s, 1, 1, why)
        return ref._value

    def get_packed(
        self, refs: Sequence[ObjectRef[Any]], timeout_s: float | None, *, fail_fast: bool = False
    ) -> list[Any]:
        """The packed values: `bytes`, or pinned arrays over shared memory.

        With `fail_fast`: the first error alone, as soon as one is known.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        objects = self._objects
        open_arrived = self._memory.open_arrived
        result: list[Any] = [ref._value for ref in refs]
        again = False
        while True:
            missing = [i for i, item in enumerate(result) if item is None]
            if not missing:
                return result
            waiter: Waiter = FailFast(0) if fail_fast else Waiter(0)
            done = True
            with self._link:
                absent = objects.look(refs, result)
                error = _first_error(result) if fail_fast and absent else None
                if error is not None:
                    return [error]
                if absent:
                    done = self._await_values(list(absent), waiter, deadline_s)
                    for i in missing:
                        if result[i] is None:
                            result[i] = refs[i]._value
            if waiter.result is not None:
                for i in missing:
                    if result[i] is None and refs[i]._id in objects.arrivals:
                        result[i] = open_arrived(refs[i])
                error = _first_error(result)
                if error is not None:
                    return [error]
            if not done:
                late = [ref for ref in refs if ref._id in absent and ref._ready < LOCAL]
                why = self._explain([ref._id for ref in late])
                # What was ready all the time has come before the explanation.
                error = _first_error([ref._value for ref in refs]) if fail_fast else None
                if error is not None:
                    return [error]
                late = [ref for ref in late if ref._ready < LOCAL]
                if late or again:
                    raise _timed_out(timeout_s, len(late) or len(absent), len(refs), why)
                again = True
                continue
            for i in missing:
                if result[i] is None:
                    # Outside the lock: opening a segment may take a round trip.
                    result[i] = open_arrived(refs[i])

    def _await_values(
        self, absent: list[bytes], waiter: Waiter, deadline_s: float | None
    ) -> bool:
        """Inside. Ask for the values and wait for them (or the first error); False: too late."""
        self._refs.check_session(absent)
        objects = self._objects
        waiter.ids = absent
        waiter.remaining = len(absent)
        objects.want(absent)
        objects.await_values(absent, waiter)
        in_time = False
        try:
            self._link.flush()
            in_time = self._link.wait(waiter, deadline_s)
            return in_time
        finally:
            if not in_time or waiter.result is not None:  # an error or interrupted: forget the rest
                objects.forget(objects.value_waiters, absent, waiter)


def _timed_out(
    timeout_s: float | None, absent: int, count: int, why: list[str]
) -> exceptions.GetTimeoutError:
    text = (f"get() timed out after {timeout_s:g} s: {absent} of {count} objects "
            f"{'is' if absent == 1 else 'are'} not ready")
    if not why:
        return exceptions.GetTimeoutError(text)
    # Many tasks of one kind wait for the same: that is said once.
    parts = [f"{count} times {sentence}" if count > 1 else sentence
             for sentence, count in Counter(why).items()]
    if absent > EXPLAINED:
        parts.append(f"and {absent - EXPLAINED} more")
    return exceptions.GetTimeoutError(f"{text} ({'; '.join(parts)})")


def _open(data: Any) -> Any:
    value = serialization.deserialize(data)
    if data[0] >= values.ERROR:
        raise value
    return value


def _first_error(packed: list[Any]) -> Any:
    for item in packed:
        if item is not None and item[0] >= values.ERROR:
            return item
    return None
