"""A node's one control-store thread: takes facts without blocking, writes them behind.

    node loop                         writer thread                       Redis
    write_*() --> facts   {(key, field): newest value} \\
              --> bulk    deque of lineage and events    > one batch ---> one round trip
              --> orders  deque of whole commands       /  every 4 ms
    reports() <-- "control store lost: ..." / "control store back ..."   (eventfd)

Why a thread, in a node that has no other: the Redis client blocks, and a fact must neither
wait for the node's loop nor stop it. The thread touches no MPI and no machine of the node.

Facts (jobs, nodes, functions, actors, names) coalesce: only the newest value of a field is
kept until it is stored, so while Redis is away they take memory by how many things exist and
not by how often they change, and none is ever dropped. Lineage and events queue up to
`buffer_limit_bytes` in all; then the oldest go, are counted, and the counts are reported.

CW-1  a batch is sent again until every command in it was answered, before any newer one.
CW-2  sent again is stored once: facts are assignments, lineage entries have an id of their
      own that Redis refuses twice, events have a number that readers drop twice.
CW-3  queued_bytes <= buffer_limit_bytes + the bytes of facts; one batch more is in flight.

Must not come in here: any decision about what a lost fact means. That is `recovery`.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from hpcray.control import connection, schema
from hpcray.control.address import ControlAddress
from hpcray.control.schema import ActorRecord, EventRecord, FunctionRecord, JobRecord, NodeRecord

# One round trip per interval however much is written: 250 a second at most.
FLUSH_INTERVAL_S = 0.004
BUFFER_LIMIT_BYTES = 64 << 20
BATCH_LIMIT_BYTES = 4 << 20
# Per rank, in Redis. Older lineage is trimmed: with it a re-execution is not possible and a
# lost object is reported as lost.
LINEAGE_BUDGET_BYTES = 64 << 20
# What one entry of a deque costs besides its bytes, roughly.
ENTRY_OVERHEAD_BYTES = 120
# Redis is often still starting when the node is not; that is no loss to report.
START_GRACE_S = 10.0
BACKOFF_S = (0.02, 2.0)
FIELDS_PER_COMMAND = 512
UNREAD_REPORTS = 64

_EVENT = -1  # in place of a rank in the bulk queue

Command = tuple[bytes | str | int, ...]


@dataclass(frozen=True, slots=True)
class ControlWriterStatistics:
    """A snapshot for `hpcray status` and for tests."""

    connected: bool
    queued_bytes: int
    commands: int
    round_trips: int
    losses: int
    dropped_lineage: int
    dropped_events: int
    refused_commands: int


@dataclass(slots=True)
class _Batch:
    """Built once and sent as it is until it is stored (CW-1)."""

    commands: list[Command] = field(default_factory=list)
    trims: list[Command] = field(default_factory=list)  # sent first, to make room
    lineage_number: int = 0  # the newest lineage in it
    sent_before: bool = False


class ControlWriter:
    """Facts in from any thread, at about a microsecond each; one thread to Redis.

    No `write_*` method blocks, raises because of Redis, or waits for an answer.
    """

    def __init__(self, address: ControlAddress, job: bytes, secret: bytes, *,
                 buffer_limit_bytes: int = BUFFER_LIMIT_BYTES,
                 lineage_budget_bytes: int = LINEAGE_BUDGET_BYTES,
                 flush_interval_s: float = FLUSH_INTERVAL_S) -> None:
        self._address = address
        self._job = job
        self._secret = secret
        self._buffer_limit_bytes = buffer_limit_bytes
        self._lineage_budget_bytes = lineage_budget_bytes
        self._flush_interval_s = flush_interval_s
        schema.seal(secret, b"")  # refuse a short secret here, not in the thread

        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._sleeping = False
        self._closing = False
        self._abandoned = False
        self._facts: dict[tuple[bytes, bytes], bytes | None] = {}
        self._bulk: deque[tuple[int, bytes, int]] = deque()
        self._orders: deque[Command] = deque()
        self._queued_bytes = 0
        self._lineage_number = 0
        self._event_number = 0
        self._writer_id = os.urandom(6)
        self._lineage_acknowledged = 0

        # Of the thread alone.
        self._connection: Any = None  # a redis.Connection, half of whose methods have no types
        self._entry_ms = int(time.time() * 1000)
        self._entry_number = 0
        self._stream_sizes: dict[int, deque[int]] = {}
        self._stream_bytes: dict[int, int] = {}
        self._renewed_s: dict[bytes, float] = {}
        self._started_s = time.monotonic()
        self._lost_since_s: float | None = None
        self._ever_connected = False
        self._dropped_reported = (0, 0)

        self._commands = self._round_trips = self._losses = self._refused = 0
        self._dropped_lineage = self._dropped_events = 0
        self._reports: deque[str] = deque(maxlen=UNREAD_REPORTS)
        self._report_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="hpcray-control", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ the node's side

    def write_job_started(self, record: JobRecord) -> None:
        key, job = schema.JOB.key(self._job), self._job.hex()
        facts = {(key, name.encode()): str(value).encode()
                 for name, value in msgspec.structs.asdict(record).items()}
        jobs = schema.JOBS.key()
        oldest_s = record.started_at_s - schema.SILENT_JOB_KEPT_S
        self._put_facts(facts, orders=[
            ("ZADD", jobs, repr(record.started_at_s), job),
            ("ZREMRANGEBYSCORE", jobs, "-inf", f"({oldest_s!r}"),
        ])

    def write_job_finished(self, status: str, finished_at_s: float,
                           ranks: Iterable[int] = ()) -> None:
        """`ranks`: whose lineage is dropped, now that nothing can need it."""
        key = schema.JOB.key(self._job)
        orders: list[Command] = [("EXPIRE", spec.key(self._job), schema.FINISHED_JOB_KEPT_S)
                                 for spec in schema.SCHEMA
                                 if spec not in (schema.JOBS, schema.LINEAGE)]
        orders += [("UNLINK", schema.LINEAGE.key(self._job, rank=rank)) for rank in ranks]
        self._put_facts({(key, b"status"): status.encode(),
                         (key, b"finished_at_s"): str(finished_at_s).encode()}, orders=orders)

    def write_node(self, rank: int, record: NodeRecord) -> None:
        """The node joined (`state="alive"`), left or died: the row is replaced."""
        self._put_fact(schema.NODES.key(self._job), b"%d" % rank, msgspec.msgpack.encode(record))

    def write_function(self, function_id: bytes, name: str, blob: bytes | memoryview) -> None:
        """The blob itself is stored, sealed, only up to FUNCTION_BLOB_LIMIT_BYTES."""
        sealed = None
        if len(blob) <= schema.FUNCTION_BLOB_LIMIT_BYTES:
            place = schema.FUNCTIONS.place(self._job, function_id)
            sealed = schema.seal(self._secret, bytes(blob), place)
        record = FunctionRecord(name, len(blob), sealed)
        self._put_fact(schema.FUNCTIONS.key(self._job), function_id,
                       msgspec.msgpack.encode(record))

    def write_actor(self, actor_id: bytes, record: ActorRecord) -> None:
        self._put_fact(schema.ACTORS.key(self._job), actor_id, msgspec.msgpack.encode(record))

    def write_named_actor(self, namespace: str, name: str, actor_id: bytes) -> None:
        self._put_fact(schema.NAMED_ACTORS.key(self._job),
                       schema.named_actor_field(namespace, name), actor_id)

    def remove_named_actor(self, namespace: str, name: str) -> None:
        self._put_fact(schema.NAMED_ACTORS.key(self._job),
                       schema.named_actor_field(namespace, name), None)

    def write_lineage(self, rank: int, batch: bytes) -> int:
        """Append to the rank's lineage; return its number, for `lineage_acknowledged`.

        In order per rank. The bytes are kept, not copied: they must not change.
        """
        with self._lock:
            self._lineage_number += 1
            number = self._lineage_number
            self._put_bulk(rank, batch, number)
        return number

    def write_event(self, kind: str, rank: int, at_s: float,
                    facts: Mapping[str, str | int | float | bool | None] | None = None) -> None:
        with self._lock:
            self._event_number += 1
            record = EventRecord(at_s, kind, rank, facts or {}, self._writer_id,
                                 self._event_number)
            self._put_bulk(_EVENT, msgspec.msgpack.encode(record), 0)

    @property
    def lineage_acknowledged(self) -> int:
        """Every batch up to this number is in Redis, or was dropped and counted as dropped."""
        return self._lineage_acknowledged

    def reports(self) -> list[str]:
        """What the node should log, each line once. Clears `fileno()`."""
        with self._lock:
            if self._report_fd >= 0:
                try:
                    os.eventfd_read(self._report_fd)
                except BlockingIOError:
                    pass
            lines = list(self._reports)
            self._reports.clear()
        return lines

    def fileno(self) -> int:
        """An eventfd, readable while there are reports."""
        return self._report_fd

    def statistics(self) -> ControlWriterStatistics:
        with self._lock:
            return ControlWriterStatistics(
                self._ever_connected and self._lost_since_s is None, self._queued_bytes,
                self._commands, self._round_trips, self._losses, self._dropped_lineage,
                self._dropped_events, self._refused)

    def start_close(self) -> None:
        """Write what is queued, then end the thread: see `ended`, `give_up`, `close`."""
        with self._lock:
            self._closing = True
            self._wake.notify_all()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def give_up(self) -> None:
        """Do not write any more. The thread ends by itself, in a moment unless Redis hangs."""
        with self._lock:
            self._abandoned = True
            self._wake.notify_all()
        current = self._connection
        if current is not None:
            current.disconnect()  # ends a send or a read that the thread is in

    def close(self, timeout_s: float) -> bool:
        """Write what is queued, then end the thread. True if everything was stored.

        Returns after `timeout_s` and the time to notice at most, whatever Redis does.
        """
        self.start_close()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.give_up()
            self._thread.join(connection.ANSWER_TIMEOUT_S + connection.CONNECT_TIMEOUT_S)
        self.close_report()
        return not (self._abandoned or self._dropped_lineage or self._dropped_events)

    def close_report(self) -> None:
        """Close `fileno()`; what is reported later is lost."""
        with self._lock:
            if self._report_fd >= 0:
                os.close(self._report_fd)
                self._report_fd = -1

    def _put_fact(self, key: bytes, name: bytes, value: bytes | None) -> None:
        self._put_facts({(key, name): value})

    def _put_facts(self, facts: Mapping[tuple[bytes, bytes], bytes | None],
                   orders: Iterable[Command] = ()) -> None:
        with self._lock:
            for at, value in facts.items():
                # Out and in again: the newest fact is written last.
                if at in self._facts:
                    self._queued_bytes -= _fact_bytes(at, self._facts.pop(at))
                self._facts[at] = value
                self._queued_bytes += _fact_bytes(at, value)
            self._orders.extend(orders)
            self._shed()
            self._notify()

    def _put_bulk(self, rank: int, data: bytes, number: int) -> None:
        """With the lock held."""
        self._bulk.append((rank, data, number))
        self._queued_bytes += len(data) + ENTRY_OVERHEAD_BYTES
        if self._queued_bytes > self._buffer_limit_bytes:
            self._shed()
        if self._sleeping:
            self._notify()

    def _shed(self) -> None:
        """CW-3, with the lock held. The newest are worth more: they are what may be re-run."""
        while self._queued_bytes > self._buffer_limit_bytes and self._bulk:
            rank, data, _ = self._bulk.popleft()
            self._queued_bytes -= len(data) + ENTRY_OVERHEAD_BYTES
            if rank == _EVENT:
                self._dropped_events += 1
            else:
                self._dropped_lineage += 1

    def _notify(self) -> None:
        if self._sleeping:
            self._sleeping = False
            self._wake.notify_all()

    # ---------------------------------------------------------- the thread's side

    def _run(self) -> None:
        # Connect before there is anything to write: a wrong password shows at once.
        batch: _Batch | None = _Batch([("PING",)])
        last_s = time.monotonic()
        try:
            while batch is not None and self._store(batch):
                self._rest_until(last_s + self._flush_interval_s)
                batch = self._next_batch()
                last_s = time.monotonic()
        except Exception as error:  # a bug of ours must not end silently
            self._report(f"control store writer failed, nothing more is written: {error!r}")
            raise
        finally:
            with self._lock:
                self._abandoned |= bool(self._bulk or self._facts or self._orders)
            self._disconnect()

    def _rest_until(self, at_s: float) -> None:
        """Let a batch gather. Writes do not end this wait; only `close` does."""
        with self._lock:
            left_s = at_s - time.monotonic()
            if left_s > 0 and not self._closing:
                self._wake.wait(left_s)

    def _next_batch(self) -> _Batch | None:
        """Sleep until there is something to write. None: closed, and nothing is left."""
        with self._lock:
            while not (self._facts or self._bulk or self._orders):
                if self._closing:
                    return None
                self._sleeping = True
                self._wake.wait()
            self._sleeping = False
            room_bytes = BATCH_LIMIT_BYTES
            facts: dict[bytes, list[tuple[bytes, bytes | None]]] = {}
            while self._facts and room_bytes > 0:
                at = next(iter(self._facts))
                value = self._facts.pop(at)
                facts.setdefault(at[0], []).append((at[1], value))
                room_bytes -= _fact_bytes(at, value)
            bulk: list[tuple[int, bytes, int]] = []
            while self._bulk and room_bytes > 0:
                bulk.append(self._bulk.popleft())
                room_bytes -= len(bulk[-1][1]) + ENTRY_OVERHEAD_BYTES
            self._queued_bytes -= BATCH_LIMIT_BYTES - room_bytes
            orders: list[Command] = []
            if not self._facts and not self._bulk:  # they speak of what was written before
                orders += self._orders
                self._orders.clear()
        return self._build(facts, bulk, orders)

    def _build(self, facts: dict[bytes, list[tuple[bytes, bytes | None]]],
               bulk: list[tuple[int, bytes, int]], orders: list[Command]) -> _Batch:
        """Commands in this order: facts, lineage and events, lifetimes, orders."""
        batch = _Batch()
        for key, fields in facts.items():
            batch.commands += _hash_commands(key, fields)
        keys = list(facts)
        lineage: dict[int, list[bytes]] = {}
        for rank, data, number in bulk:
            if rank == _EVENT:
                key = schema.EVENTS.key(self._job)
                batch.commands.append(("XADD", key, "MAXLEN", "~", schema.EVENTS_KEPT, "*",
                                       "e", data))
                keys.append(key)
            else:
                lineage.setdefault(rank, []).append(data)
                batch.lineage_number = number
        for rank, batches in lineage.items():
            key = schema.LINEAGE.key(self._job, rank=rank)
            batch.commands.append(self._lineage_command(key, rank, batches))
            keys.append(key)
        now_s = time.monotonic()
        for key in dict.fromkeys(keys):
            if now_s - self._renewed_s.get(key, -schema.DAY_S) >= schema.DAY_S:
                self._renewed_s[key] = now_s
                batch.commands.append(("EXPIRE", key, schema.SILENT_JOB_KEPT_S))
        batch.commands += orders
        return batch

    def _lineage_command(self, key: bytes, rank: int, batches: list[bytes]) -> Command:
        """One entry for all that was queued. The id is ours, so that Redis refuses a repeat.

        Only this writer appends to the rank's stream, so it knows how many of the newest
        entries fit the budget. `~` lets Redis trim whole blocks: a little more stays.
        """
        data = schema.seal(self._secret, msgspec.msgpack.encode(batches),
                           schema.LINEAGE.place(self._job, rank=rank))
        sizes = self._stream_sizes.setdefault(rank, deque())
        sizes.append(len(data))
        total_bytes = self._stream_bytes.get(rank, 0) + len(data)
        while len(sizes) > 1 and (total_bytes > self._lineage_budget_bytes
                                  or len(sizes) > schema.LINEAGE_ENTRIES_KEPT):
            total_bytes -= sizes.popleft()
        self._stream_bytes[rank] = total_bytes
        self._entry_number += 1
        return ("XADD", key, "MAXLEN", "~", len(sizes), f"{self._entry_ms}-{self._entry_number}",
                "n", len(batches), "d", data)

    def _give_up_half_the_lineage(self) -> list[Command]:
        """Redis is full, and refuses even an XADD that would trim: trim by itself, and keep less.

        Old lineage is the one thing here that may go, and what usually fills the store.
        """
        trims: list[Command] = []
        for rank, sizes in self._stream_sizes.items():
            for _ in range(len(sizes) // 2):
                self._stream_bytes[rank] -= sizes.popleft()
            trims.append(("XTRIM", schema.LINEAGE.key(self._job, rank=rank), "MAXLEN",
                          len(sizes)))
        biggest_bytes = max(self._stream_bytes.values(), default=self._lineage_budget_bytes)
        self._lineage_budget_bytes = min(self._lineage_budget_bytes, biggest_bytes)
        return trims

    def _store(self, batch: _Batch) -> bool:
        """Send until answered (CW-1); False if `close` gave up first."""
        wait_s = BACKOFF_S[0]
        while not self._given_up():
            try:
                self._send(batch)
            except Exception as error:
                self._disconnect()
                if self._given_up():
                    return False  # `close` took the connection away, so any error is expected
                if not isinstance(error, connection.transient_errors()):
                    raise
                self._note_lost(error)
                if connection.is_out_of_memory(error):
                    batch.trims = self._give_up_half_the_lineage()
                # Jitter: after an outage a thousand nodes must not come back in one instant.
                self._rest(wait_s * random.uniform(0.5, 1.0))
                wait_s = min(wait_s * 2, BACKOFF_S[1])
            else:
                self._note_back()
                self._lineage_acknowledged = max(self._lineage_acknowledged,
                                                 batch.lineage_number)
                return True
        return False

    def _given_up(self) -> bool:
        return self._abandoned

    def _rest(self, seconds: float) -> None:
        with self._lock:
            if not self._abandoned:
                self._wake.wait(seconds)

    def _send(self, batch: _Batch) -> None:
        """One round trip. Raises if it broke, or if Redis refuses and may not refuse later."""
        import redis

        if self._connection is None:
            # Its pool's only connection: made, connected and authenticated here.
            self._connection = connection.client(self._address).connection_pool.get_connection()
        again, batch.sent_before = batch.sent_before, True
        commands = batch.trims + batch.commands
        self._connection.send_packed_command(self._connection.pack_commands(commands))
        refusal: Exception | None = None
        for command in commands:
            try:
                self._connection.read_response()
            except redis.ResponseError as error:
                if connection.is_refusal(error):
                    refusal = refusal or error
                elif not (again and command[0] == "XADD" and "equal or smaller" in str(error)):
                    self._note_refused(command, error)
        with self._lock:
            self._round_trips += 1
            self._commands += len(commands)
        if refusal is not None:
            raise refusal

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.disconnect()
            self._connection = None

    # ---------------------------------------------------------------- reports

    def _note_lost(self, error: Exception) -> None:
        starting = (not self._ever_connected and not _is_authentication(error)
                    and time.monotonic() - self._started_s < START_GRACE_S)
        if self._lost_since_s is not None or starting:
            return
        self._lost_since_s = time.monotonic()
        with self._lock:
            self._losses += 1
        self._report(f"control store lost: {self._address}: {error}; facts are kept, and lineage "
                     f"and events up to {self._buffer_limit_bytes >> 20} MiB, until it is back")

    def _note_back(self) -> None:
        self._ever_connected = True
        with self._lock:
            dropped = (self._dropped_lineage, self._dropped_events)
        lineage, events = (now - then for now, then in zip(dropped, self._dropped_reported,
                                                           strict=True))
        self._dropped_reported = dropped
        lost = f"; {lineage} lineage batches and {events} events were dropped"
        if self._lost_since_s is not None:
            away_s = time.monotonic() - self._lost_since_s
            self._lost_since_s = None
            self._report(f"control store back after {away_s:.1f} s"
                         + (lost if lineage or events else ""))
        elif lineage or events:
            self._report(f"control store cannot keep up{lost}")

    def _note_refused(self, command: Command, error: Exception) -> None:
        with self._lock:
            self._refused += 1
            first = self._refused == 1
        if first:
            self._report(f"control store refused {command[0]!s} {command[1]!r}: {error}; further "
                         "refusals are only counted")

    def _report(self, text: str) -> None:
        with self._lock:
            self._reports.append(text)
            if self._report_fd >= 0:
                os.eventfd_write(self._report_fd, 1)


def _fact_bytes(at: tuple[bytes, bytes], value: bytes | None) -> int:
    return len(at[1]) + len(value or b"") + ENTRY_OVERHEAD_BYTES


def _hash_commands(key: bytes, fields: list[tuple[bytes, bytes | None]]) -> list[Command]:
    """HSET and HDEL with many fields each; a field stands here once, so their order is free."""
    commands: list[Command] = []
    written = [(name, value) for name, value in fields if value is not None]
    removed = [name for name, value in fields if value is None]
    for start in range(0, len(written), FIELDS_PER_COMMAND):
        some = written[start:start + FIELDS_PER_COMMAND]
        commands.append(("HSET", key, *(part for pair in some for part in pair)))
    for start in range(0, len(removed), FIELDS_PER_COMMAND):
        commands.append(("HDEL", key, *removed[start:start + FIELDS_PER_COMMAND]))
    return commands


def _is_authentication(error: Exception) -> bool:
    from redis import exceptions

    return isinstance(error, (exceptions.AuthenticationError, exceptions.AuthorizationError))
