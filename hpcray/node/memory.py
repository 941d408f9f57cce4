"""The node's books of shared memory: segments granted, objects in them, who waits for more. Pure.

The budget counts segments; the bytes inside are sub-allocated by the segment's owner (a client,
or the node itself for copies it pulls). This module hears when a value is placed in a segment
(`used`) and when it is freed (`free`), tells the owner, and grants, reclaims and closes segments.

    request --budget has room--> GrantSegment
            --room was given back meanwhile--> Denied(retry)      look again
            --wait: others are asked for empty segments--> grant
                  after _WAIT_S, and nothing that runs or can run may free memory--> Denied

A worker that waits gives its CPU back, so that the tasks which use up what fills the store run
before those which add to it (`set_tight`). A pull by the node waits in the same way: its
StartPull comes again every tick until there is room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice

from hpcray.node.outbox import (
    CloseSegment,
    FreeNodeRange,
    GrantSegment,
    OpenSegment,
    Outbox,
    StartPull,
)
from hpcray.node.records import DRIVER, ClientRecord, Worker, in_store
from hpcray.node.tables import Tables, unwired
from hpcray.node.task_states import ASSIGNED, FETCHING, QUEUED
from hpcray.objects.allocator import range_bytes
from hpcray.objects.budget import NODE, SegmentBudget, SegmentGrant, StoreFull
from hpcray.protocol import ids, words
from hpcray.protocol.messages import (
    UNIT,
    Located,
    Released,
    SegmentClosed,
    SegmentDenied,
    SegmentReclaim,
)

# How long a request for memory waits for others to give some back before it may be an error. Long
# enough for a busy Python process to notice; then, how often it is asked whether it still may wait.
_WAIT_S = 2.0
_AGAIN_S = 0.5
# Above this part of the budget consumers go first, until it has fallen below the other.
_TIGHT = 0.8
_EASY = 0.5
# Records looked at to find out what fills the store, or whether anything may free some of it.
_LOOKED_AT = 10_000
# Empty segments of its own the node keeps: touched memory is nine times as fast as fresh.
_WARM_SEGMENTS = 2


class NodeMemory:
    def __init__(self, tables: Tables, outbox: Outbox, capacity_bytes: int) -> None:
        self._tables = tables
        self._clients = tables.clients
        self._objects = tables.objects
        self._tasks = tables.tasks
        self._workers = tables.workers
        self._hosted = tables.hosted
        self._outbox = outbox
        # Ports: the store is filling, or not any more; a worker waits for memory, or has got it;
        # what a worker is for, in words.
        self.set_tight: Callable[[bool], None] = unwired
        self.worker_waits: Callable[[int], None] = unwired
        self.worker_goes_on: Callable[[int], None] = unwired
        self.who: Callable[[Worker], str] = unwired
        self.budget = SegmentBudget(capacity_bytes)
        # Objects per segment, and their bytes.
        self._live: dict[int, int] = {}
        self.object_bytes = 0
        # The node's own, for copies it pulls; in the order granted.
        self.node_segments: dict[int, None] = {}
        # Who has each segment mapped for reading.
        self._readers: dict[int, set[int]] = {}
        # Ranges freed this turn: client -> segment -> offsets.
        self.released: dict[int, dict[int, list[int]]] = {}
        # (client, nbytes, deadline) of requests that wait for memory.
        self._waiting: deque[tuple[int, int, float]] = deque()
        # Clients whose granted segment could not be created, and until when it is tried again.
        self._refused: dict[int, float] = {}
        # Workers among them that have given their CPU back for it; requests that were answered.
        self.lent: set[int] = set()
        self.answered = 0
        self._tight = False  # what was told by `set_tight`
        # Pulls that wait for memory, by object, and until when.
        self._pulls: dict[bytes, tuple[StartPull, float]] = {}

    # --- objects ----------------------------------------------------------------------------------

    def used(self, location: Located) -> None:
        """A value was placed there.

        Raises:
          KeyError, ValueError: there is no such place.
        """
        segment = location.segment
        if not 0 <= location.offset <= self.budget.segment(segment).nbytes - location.nbytes:
            raise ValueError(f"{location} is outside of its segment")
        live = self._live.get(segment, 0)
        if live == 0:
            self.budget.mark_used(segment)
        self._live[segment] = live + 1
        self.object_bytes += location.nbytes

    def free(self, location: Located) -> None:
        """Nobody needs the value any more: its range may be reused."""
        segment = location.segment
        self.object_bytes -= location.nbytes
        owner = self.budget.segment(segment).owner
        if owner is NODE:
            # Pulled by us, or its owner died: ours to reuse or to close.
            self._outbox.actions.append(FreeNodeRange(segment, location.offset))
        else:
            assert isinstance(owner, int)
            self.released.setdefault(owner, {}).setdefault(segment, []).append(location.offset)
            client = self._clients.get(owner)
            if client is not None:
                client.released_bytes += location.nbytes
        self._live[segment] -= 1
        if not self._live[segment]:
            del self._live[segment]
            if self.budget.mark_empty(segment):
                self._orphan_empty(segment)

    def _orphan_empty(self, segment: int) -> None:
        """A segment of the node's is empty: a dead client's goes, of our own a few stay warm."""
        if segment not in self.node_segments:
            self.close(segment)
            return
        empty = [s for s in self.node_segments if s not in self._live]
        if len(empty) > _WARM_SEGMENTS:
            self.close(empty[0])

    def _reclaim_own(self) -> bool:
        """Close the node's own empty segments; whether there were any."""
        empty = [s for s in self.node_segments if s not in self._live]
        for segment in empty:
            self.close(segment)
        return bool(empty)

    def close(self, segment: int) -> None:
        """Take the segment off the books; whoever maps it lets go."""
        self.budget.release(segment)
        self._live.pop(segment, None)
        self.node_segments.pop(segment, None)
        for client in sorted(self._readers.pop(segment, ())):
            if client in self._clients:
                self._outbox.clients[client].append(SegmentClosed(segment))
        self._outbox.actions.append(CloseSegment(segment))
        self._retry_waiting()

    # --- clients ----------------------------------------------------------------------------------

    def request(self, client: ClientRecord, nbytes: int, now_s: float) -> None:
        """A client has no room for an object of `nbytes`."""
        if client.released_bytes >= nbytes:
            client.released_bytes = 0
            self._flush_released(client.number)
            self._outbox.clients[client.number].append(self._denied(nbytes, retry=True))
            return
        client.released_bytes = 0
        if not self._grant(client.number, nbytes, final=False):
            self._tighten()
            self._waiting.append((client.number, nbytes, now_s + _WAIT_S))
            worker = self._workers.get(client.number)
            if worker is not None and not worker.blocked:
                self.lent.add(client.number)
                self.worker_waits(client.number)

    def _tighten(self) -> None:
        """Consumers first, until there is room again."""
        self._tight = True
        self.set_tight(True)

    def _answered(self, client: int) -> None:
        """It has its memory, or an error: it takes its CPU back."""
        self.answered += 1
        if client in self.lent:
            self.lent.remove(client)
            self.worker_goes_on(client)

    def _grant(self, client: int, nbytes: int, *, final: bool) -> bool:
        """Answer the request if it can be answered."""
        granted = self.budget.grant(client, range_bytes(nbytes))
        if isinstance(granted, SegmentGrant):
            self.budget.mark_empty(granted.segment_id)
            self._outbox.actions.append(
                GrantSegment(client, granted.segment_id, granted.nbytes))
            return True
        if final or granted.never_fits or not (self._ask_back() or self._room_may_come()):
            self._outbox.clients[client].append(self._denied(nbytes, retry=False))
            return True
        return False

    def refused(self, client: int, segment: int, reason: str) -> None:
        """A segment that was granted could not be created: again for a while, then Denied."""
        nbytes = self.budget.release(segment).nbytes
        now_s = self._tables.now_s
        deadline_s = self._refused.get(client, 0.0)
        if now_s > deadline_s + _WAIT_S:  # not the same shortage
            deadline_s = self._refused[client] = now_s + _WAIT_S
        if now_s < deadline_s:
            self._waiting.append((client, nbytes, deadline_s))
            return
        del self._refused[client]
        self._answered(client)
        self._outbox.clients[client].append(SegmentDenied(
            nbytes, self.object_bytes, self.budget.capacity_bytes, reason=reason))

    def _ask_back(self) -> bool:
        """Ask every process for what it does not need; False if nobody has anything."""
        node = self._reclaim_own()
        others = [owner for owner in self.budget.owners()
                  if owner is not NODE and owner in self._clients]
        for owner in others:
            assert isinstance(owner, int)
            self._flush_released(owner)  # first: what it empties is what it can give
            self._ask(owner)
        return bool(others) or node

    def _ask(self, owner: int) -> None:
        self._outbox.clients[owner].append(SegmentReclaim())
        if owner != DRIVER:
            self._outbox.interrupts.append(owner)  # it may compute for hours

    def _room_may_come(self) -> bool:
        """Whether anything that runs, or is going to, may free some of the store."""
        records = self._objects

        def located(refs: Iterable[bytes]) -> bool:
            return any(i in records and in_store(records[i]) for i in refs)

        busy = []
        runs = False
        for worker in self._workers.values():
            hosted = self._hosted.get(worker.actor_id)
            if worker.number not in self.lent and (
                    worker.datagrams or (hosted is not None and hosted.in_flight)):
                busy.append(worker.number)
                runs = runs or not worker.blocked
        if runs:
            for number in busy:
                client = self._clients.get(number)
                if client is not None and (client.pins or located(client.held)):
                    return True
        for task in islice(self._tasks.values(), _LOOKED_AT):
            elsewhere = task.state is ASSIGNED and task.rank not in (-1, self._tables.rank)
            if (runs or elsewhere or task.state in (QUEUED, FETCHING)) and (
                    task.worker not in self.lent and located(ids.split_ids(task.refs))):
                return True
        return False

    def _denied(self, nbytes: int, *, retry: bool) -> SegmentDenied:
        capacity_bytes = self.budget.capacity_bytes
        why = "" if retry or range_bytes(nbytes) > capacity_bytes else self.contents()
        return SegmentDenied(nbytes, self.object_bytes, capacity_bytes, retry, contents=why)

    def contents(self) -> str:
        """What is in the store, by what keeps it there: `1.2 GiB by refs of the driver, ...`."""
        driver = self._clients.get(DRIVER)
        found: dict[str, int] = {}
        for record in islice(self._objects.values(), _LOOKED_AT):
            if not in_store(record):
                continue
            if driver is not None and record.object_id in driver.held:
                keeper = "refs of the driver"
            elif any(record.object_id in client.held for client in self._clients.values()):
                keeper = "refs of tasks and actors"
            elif record.count > 0:
                keeper = "arguments of tasks"
            elif record.pins:
                keeper = "arrays still in use, whose refs are gone"
            else:
                keeper = "refs on other nodes"
            found[keeper] = found.get(keeper, 0) + record.nbytes
        kept = sorted(found.items(), key=lambda pair: -pair[1])
        return words.listed([f"{words.size(nbytes)} by {keeper}" for keeper, nbytes in kept], 5)

    def waits_for(self) -> str:
        """Who waits for how much memory, for people; empty if nobody does."""
        for number, nbytes, _ in self._waiting:
            worker = self._workers.get(number)
            who = "the driver" if worker is None else self.who(worker)
            return f"{who} has waited for {{}} for {words.size(nbytes)}"
        for pull, _ in self._pulls.values():
            return (f"a copy of {words.size(pull.nbytes)} from rank {pull.rank} has waited "
                    "for {} for room")
        return ""

    def grant_node(self, nbytes: int) -> SegmentGrant | None:
        """A segment for the node's own use (pulled copies)."""
        granted = self.budget.grant(NODE, range_bytes(nbytes))
        if isinstance(granted, StoreFull) and self._reclaim_own():
            granted = self.budget.grant(NODE, range_bytes(nbytes))
        if isinstance(granted, StoreFull):
            return None
        self.node_segments[granted.segment_id] = None
        self.budget.mark_empty(granted.segment_id)
        return granted

    def await_room(self, pull: StartPull, now_s: float, *, in_any_case: bool = False) -> bool:
        """There is no room for a pull: whether it waits (and is started again) or has failed.

        `in_any_case`: even if nobody can give memory back (it is not memory that is missing).
        """
        known = self._pulls.get(pull.object_id)
        if known is None:
            if range_bytes(pull.nbytes) <= self.budget.capacity_bytes and (
                    self._ask_back() or in_any_case or self._room_may_come()):
                self._tighten()
                self._pulls[pull.object_id] = (pull, now_s + _WAIT_S)
                return True
            return False
        if now_s < known[1]:
            return True
        if self._room_may_come():
            self._pulls[pull.object_id] = (pull, now_s + _AGAIN_S)
            return True
        del self._pulls[pull.object_id]
        return False

    def has_room(self, pull: StartPull) -> None:
        """The pull is under way."""
        if self._pulls.pop(pull.object_id, None) is not None:
            self.answered += 1

    def returned(self, client: ClientRecord, segment: int) -> None:
        """Its owner gives an empty segment back."""
        if self.budget.segment(segment).owner != client.number or self._live.get(segment):
            raise ValueError(f"segment {segment} is not its own, or has objects in it")
        self.close(segment)

    def open(self, client: ClientRecord, segment: int) -> None:
        self.budget.segment(segment)  # KeyError: there is none
        self._readers.setdefault(segment, set()).add(client.number)
        self._outbox.actions.append(OpenSegment(client.number, segment))

    def client_gone(self, number: int) -> None:
        """Its segments with objects live on under the node; the others go."""
        self.released.pop(number, None)
        self._refused.pop(number, None)
        self.lent.discard(number)
        for readers in self._readers.values():
            readers.discard(number)
        # What it allocated and never announced is lost with it: only announced objects count.
        disowned = self.budget.disown(number)
        for segment in disowned.released:
            for client in sorted(self._readers.pop(segment, ())):
                if client in self._clients:
                    self._outbox.clients[client].append(SegmentClosed(segment))
            self._outbox.actions.append(CloseSegment(segment))
        self._waiting = deque(entry for entry in self._waiting if entry[0] != number)
        self._retry_waiting()

    # --- time -------------------------------------------------------------------------------------

    def _retry_waiting(self) -> None:
        still: deque[tuple[int, int, float]] = deque()
        while self._waiting:
            client, nbytes, deadline_s = self._waiting.popleft()
            granted = self.budget.grant(client, range_bytes(nbytes))
            if isinstance(granted, SegmentGrant):
                self.budget.mark_empty(granted.segment_id)
                self._outbox.actions.append(
                    GrantSegment(client, granted.segment_id, granted.nbytes))
                self._answered(client)
            else:
                still.append((client, nbytes, deadline_s))
        self._waiting = still

    def end_turn(self) -> None:
        for number in list(self.released):
            self._flush_released(number)
            if self.waiting:
                self._ask(number)  # this may be what empties a segment
        # A waiting client may find room in what came back to itself.
        for entry in [e for e in self._waiting if self._room_came(e)]:
            self._waiting.remove(entry)
            self._clients[entry[0]].released_bytes = 0
            self._outbox.clients[entry[0]].append(self._denied(entry[1], retry=True))
            self._answered(entry[0])

    def _room_came(self, entry: tuple[int, int, float]) -> bool:
        client = self._clients.get(entry[0])
        return client is not None and client.released_bytes >= entry[1]

    def _flush_released(self, number: int) -> None:
        for segment, offsets in self.released.pop(number, {}).items():
            for start in range(0, len(offsets), 4000):
                self._outbox.clients[number].append(
                    Released(segment, tuple(offsets[start : start + 4000])))

    def tick(self, now_s: float) -> None:
        if self._refused:
            self._retry_waiting()
        while self._waiting and self._waiting[0][2] <= now_s:
            client, nbytes, _ = self._waiting.popleft()
            if self._room_may_come():
                if not self._grant(client, nbytes, final=False):
                    self._waiting.append((client, nbytes, now_s + _AGAIN_S))
                    continue
            else:
                self._grant(client, nbytes, final=True)
            self._answered(client)
        for pull, _ in self._pulls.values():
            self._outbox.actions.append(pull)
        tight = self.tight
        if self._tight or tight:
            self._tight = tight
            self.set_tight(tight)

    @property
    def free_units(self) -> int:
        """How much of the resource `object_store_memory` no object takes."""
        return max(self.budget.capacity_bytes - self.object_bytes, 0) * UNIT

    @property
    def tight(self) -> bool:
        """Whether what uses the store up is to run before what fills it."""
        filled = self.object_bytes / self.budget.capacity_bytes
        limit = _EASY if self._tight else _TIGHT
        return self.waiting or filled > limit

    def awaits(self, object_ids: list[bytes]) -> bool:
        """Whether a pull of one of these waits for memory."""
        return any(object_id in self._pulls for object_id in object_ids)

    @property
    def waiting(self) -> bool:
        return bool(self._waiting or self._pulls)
