"""Reading the control store back: for the command line, for resume, and for tests.

Synchronous, and raises what the Redis client raises: whoever reads can wait and can fail.
A node never reads here while it runs; what it needs is in its memory or a message away.
Values that could be unpickled are handed out only unsealed, so a caller needs the secret.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from hpcray.control import connection, schema
from hpcray.control.address import ControlAddress
from hpcray.control.schema import ActorRecord, EventRecord, FunctionRecord, JobRecord, NodeRecord

# Entries fetched per round trip.
PAGE = 256


class ControlReader:
    """One job's facts. Use as a context manager, or call `close`."""

    def __init__(self, address: ControlAddress, job: bytes) -> None:
        self._job = job
        # Typed Any: the client's stubs answer "a value or an awaitable" to everything.
        self._redis: Any = connection.client(address)

    def __enter__(self) -> ControlReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._redis.close()

    def jobs(self) -> list[str]:
        """Hex ids of the jobs this Redis knows, oldest first."""
        return [job.decode() for job in self._redis.zrange(schema.JOBS.key(), 0, -1)]

    def job(self) -> JobRecord | None:
        fields = self._redis.hgetall(schema.JOB.key(self._job))
        if b"started_at_s" not in fields:
            return None
        texts = {name.decode(): value.decode() for name, value in fields.items()}
        return msgspec.convert(texts, JobRecord, strict=False)

    def nodes(self) -> dict[int, NodeRecord]:
        rows = self._redis.hgetall(schema.NODES.key(self._job))
        return {int(rank): msgspec.msgpack.decode(row, type=NodeRecord)
                for rank, row in sorted(rows.items(), key=lambda item: int(item[0]))}

    def functions(self) -> dict[bytes, FunctionRecord]:
        rows = self._redis.hgetall(schema.FUNCTIONS.key(self._job))
        return {name: msgspec.msgpack.decode(row, type=FunctionRecord)
                for name, row in rows.items()}

    def function_blob(self, function_id: bytes, secret: bytes) -> bytes | None:
        """The exported function; None if it is unknown, or too big to be kept here.

        Raises:
          BadSeal: if it is not what this job wrote. Then it must not be unpickled.
        """
        row = self._redis.hget(schema.FUNCTIONS.key(self._job), function_id)
        if row is None:
            return None
        sealed = msgspec.msgpack.decode(row, type=FunctionRecord).sealed_blob
        if sealed is None:
            return None
        return schema.unseal(secret, sealed, schema.FUNCTIONS.place(self._job, function_id))

    def actors(self) -> dict[bytes, ActorRecord]:
        rows = self._redis.hgetall(schema.ACTORS.key(self._job))
        return {name: msgspec.msgpack.decode(row, type=ActorRecord) for name, row in rows.items()}

    def named_actors(self) -> dict[tuple[str, str], bytes]:
        """(namespace, name) -> actor id."""
        rows = self._redis.hgetall(schema.NAMED_ACTORS.key(self._job))
        return {schema.split_named_actor_field(name): actor for name, actor in rows.items()}

    def events(self, limit: int = 1000) -> list[EventRecord]:
        """The newest `limit`, oldest first, each once."""
        entries = self._redis.xrevrange(schema.EVENTS.key(self._job), count=limit)
        events = [msgspec.msgpack.decode(fields[b"e"], type=EventRecord)
                  for _, fields in reversed(entries)]
        return list({(e.writer, e.number): e for e in events}.values())

    def lineage_counts(self) -> dict[int, int]:
        """Batches stored per rank, for every rank that ever joined."""
        return {rank: sum(int(fields[b"n"]) for fields in self._entries(rank))
                for rank in self.nodes()}

    def lineage(self, rank: int, secret: bytes) -> Iterator[bytes]:
        """The rank's batches, oldest first.

        Raises:
          BadSeal: at the first entry that is not what this job wrote.
        """
        place = schema.LINEAGE.place(self._job, rank=rank)
        for fields in self._entries(rank):
            packed = schema.unseal(secret, fields[b"d"], place)
            yield from msgspec.msgpack.decode(packed, type=list[bytes])

    def _entries(self, rank: int) -> Iterator[dict[bytes, bytes]]:
        key, after = schema.LINEAGE.key(self._job, rank=rank), "-"
        while page := self._redis.xrange(key, min=after, count=PAGE):
            for _, fields in page:
                yield fields
            # "The next id after this one" without `(`, which Redis before 6.2 does not know.
            milliseconds, _, number = page[-1][0].decode().partition("-")
            after = f"{milliseconds}-{int(number) + 1}"
