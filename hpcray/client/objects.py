"""The objects this process refers to: what it has asked for, what has come, who waits. Pure.

    want    Get   --> Value (inline, into the ref) | ValueAt (pinned in shared memory: `arrivals`)
    watch   Watch --> Ready (somewhere, or on this node)
    a ref dies, a view dies --> Drop, Unpin with the next batch

Each is asked for once, however many wait for it. Guarded by the client's lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from hpcray.client import waiters
from hpcray.client.direct_calls import DirectCalls
from hpcray.client.references import LOCAL, READY, ObjectRef, ReferenceTable
from hpcray.client.waiters import FailFast, Table, Waiter
from hpcray.protocol import ids, values
from hpcray.protocol.messages import Drop, Get, Located, Ready, Unpin, Value, ValueAt, Watch
from hpcray.protocol.sizes import IDS_PER_MESSAGE

# Dropped refs are told this late, unless memory is short: most of a loop's drops share a message,
# and a ref met again meanwhile costs none.
_DRAIN_S = 0.05

# Stands for an error whose bytes have not been looked at: they are in shared memory.
_SOME_ERROR = bytes((values.ERROR,))


class Objects:
    def __init__(
        self, outbox: list[Any], refs: ReferenceTable, direct: DirectCalls
    ) -> None:
        self._outbox = outbox
        self._refs = refs
        self._direct = direct
        self.asked: set[bytes] = set()  # their values come
        self._watched: dict[bytes, int] = {}  # what was asked: READY or LOCAL
        self.value_waiters: Table = {}
        self.ready_waiters: Table = {}
        # Values that came while somebody waits for them: pinned, not mapped yet.
        self.arrivals: dict[bytes, Located] = {}
        # Appended to by finalisers of views, at any time and in any thread.
        self.unpins: deque[bytes] = deque()
        self.next_drain_s = 0.0

    # --- asking -----------------------------------------------------------------------------------

    def want(self, object_ids: Iterable[bytes]) -> None:
        """Have their values sent, unless that was asked already."""
        asked = self.asked
        ask = [id_ for id_ in object_ids if id_ not in asked]
        if ask:
            self._ask(Get, ask)
            asked.update(ask)

    def watch(self, object_ids: Iterable[bytes], level: int) -> None:
        """Have it said when they are ready, READY or LOCAL, unless that was asked already."""
        watched = self._watched
        ask = [id_ for id_ in object_ids if watched.get(id_, 0) < level]
        if ask:
            self._ask(Watch, ask, level == LOCAL)
            watched.update(dict.fromkeys(ask, level))

    def _ask(self, message: Any, ask: list[bytes], *rest: Any) -> None:
        """Noted behind it: what a signal handler interrupts is asked twice, and not never."""
        self._refs.tell_holds(self._outbox)
        for start in range(0, len(ask), IDS_PER_MESSAGE):
            self._outbox.append(message(b"".join(ask[start : start + IDS_PER_MESSAGE]), *rest))

    def await_values(self, object_ids: Sequence[bytes], waiter: Waiter) -> None:
        table = self.value_waiters
        for object_id in object_ids:
            if object_id in table:
                waiters.add(table, object_id, waiter)
            else:
                table[object_id] = waiter

    def forget(self, table: Table, object_ids: Sequence[bytes], waiter: Waiter) -> None:
        """It timed out, was interrupted or needs no more."""
        for object_id in object_ids:
            waiters.remove(table, object_id, waiter)

    # --- what is here -----------------------------------------------------------------------------

    def find(self, ref: ObjectRef[Any]) -> Any:
        """The packed value, or the pinned array that an earlier get keeps alive; or None."""
        value = ref._value
        if value is None and ref._view is not None:
            return ref._view()
        return value

    def look(self, refs: Sequence[ObjectRef[Any]], found: list[Any]) -> dict[bytes, None]:
        """Complete `found`, what is here of each ref; the ids of those that have not arrived."""
        absent: dict[bytes, None] = {}
        arrivals = self.arrivals
        for index, item in enumerate(found):
            if item is None:
                ref = refs[index]
                item = ref._value
                if item is None and ref._view is not None:
                    item = ref._view()
                if item is not None:
                    found[index] = item
                elif ref._id not in arrivals:
                    absent[ref._id] = None
        return absent

    def take_arrival(self, object_id: bytes) -> Located | None:
        """Where it lies, for the one who will map it: it is pinned once."""
        return self.arrivals.pop(object_id, None)

    def forget_refusals(self, refs: Iterable[ObjectRef[Any]]) -> None:
        """That there was no room for a copy here was the answer of one `get`, and is no value: the
        next one asks again. (If it was a task's outcome, the node says so again.)"""
        for ref in refs:
            value = ref._value
            if value is not None and value[0] == values.FAILURE and (
                    values.unpack_failure(value).kind == "ObjectStoreFullError"):
                ref._value = None
                ref._ready = READY

    # --- what the node says -----------------------------------------------------------------------

    def on_value(self, message: Value, _: list[Any]) -> None:
        if message.sender < 0:
            self._direct.heard_count += 1
        else:
            self._direct.on_value(message)
        object_id = message.object_id
        self.asked.discard(object_id)
        entry = self._refs.live.get(object_id)
        ref = None if entry is None else entry()
        if ref is not None:
            ref._value = message.value
            ref._ready = LOCAL
        # `waiters.tell`, written out: this is the message that comes most often.
        waiter = self.value_waiters.pop(object_id, None)
        if waiter is not None:
            if type(waiter) is Waiter or (
                type(waiter) is FailFast and message.value[0] < values.ERROR
            ):
                waiter.remaining -= 1
            else:
                self.value_waiters[object_id] = waiter
                waiters.tell(self.value_waiters, object_id, message.value)
        if self.ready_waiters:
            waiters.tell(self.ready_waiters, object_id)

    def on_value_at(self, message: ValueAt) -> None:
        object_id = message.object_id
        self.asked.discard(object_id)
        ref = self._refs.get(object_id)
        if ref is None or object_id in self.arrivals:
            self.unpins.append(object_id)
        else:
            self.arrivals[object_id] = message.location
        if ref is not None:
            ref._ready = LOCAL
        self._arrived(object_id, _SOME_ERROR if message.failed else None)

    def _arrived(self, object_id: bytes, value: bytes | None) -> None:
        waiters.tell(self.value_waiters, object_id, value)
        if self.ready_waiters:
            waiters.tell(self.ready_waiters, object_id)

    def on_ready(self, message: Ready) -> None:
        table = self._refs
        level = LOCAL if message.local else READY
        watched = self._watched
        for object_id in ids.split_ids(message.ids):
            ref = table.get(object_id)
            if ref is not None and ref._ready < level:
                ref._ready = level
            if watched.get(object_id, 0) > level:
                continue  # somebody waits for more than this; that answer comes too
            watched.pop(object_id, None)
            waiters.tell(self.ready_waiters, object_id)

    # --- what the node is told --------------------------------------------------------------------

    def drops_are_due(self, now_s: float) -> bool:
        return bool(self._refs.dropped) and now_s > self.next_drain_s

    def drain(self, now_s: float) -> list[bytes]:
        """Refs to be told of as dropped. Before new holds are told: a ref that came and went is
        never mentioned."""
        dropped = self._refs.drain()
        self.next_drain_s = now_s + _DRAIN_S
        if self.arrivals:
            # What arrived for a get that had given up: nobody will map it.
            for object_id in dropped:
                if self.arrivals.pop(object_id, None) is not None:
                    self.unpins.append(object_id)
        return dropped

    def tell_drops(self, dropped: list[bytes]) -> None:
        for start in range(0, len(dropped), IDS_PER_MESSAGE):
            self._outbox.append(Drop(b"".join(dropped[start : start + IDS_PER_MESSAGE])))

    def tell_unpins(self) -> None:
        unpins = self.unpins
        while unpins:
            self._outbox.append(Unpin(unpins.popleft()))

    def close(self) -> None:
        self.arrivals.clear()
        self._refs.forget_values()
