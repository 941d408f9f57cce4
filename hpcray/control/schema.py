"""Every Redis key of hpcray, in one table: name, type, contents, writer, lifetime.

Pure: no Redis, no clock. `writer` and `reader` get each key from `SCHEMA`; a test reads
their source and finds no key built anywhere else. The table is also the documentation:
`describe()` prints it.

Whoever can write to the Redis can write anything into it, and on a shared machine that
may be more people than the job's owner. So every value that might be unpickled after a
read carries a keyed BLAKE2 tag (`seal`), whose key never touches Redis. The tag covers
the *place* of the value too: a genuine blob moved to another key is refused.

What must not come in here: how values are batched or when they are written (`writer`).
"""

from __future__ import annotations

import enum
import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, unquote

import msgspec

PREFIX = "hpcray"

TAG_BYTES = 16
MIN_SECRET_BYTES = 16

# A bigger function keeps only its name and size here; its blob lives in the object store.
FUNCTION_BLOB_LIMIT_BYTES = 64 * 1024

DAY_S = 24 * 3600
# How long a finished job can be looked at in a Redis that outlives it.
FINISHED_JOB_KEPT_S = 7 * DAY_S
# A job that never said goodbye is forgotten then. Longer than any queue's wall time we
# know of, and every day of writing renews it.
SILENT_JOB_KEPT_S = 30 * DAY_S

EVENTS_KEPT = 10_000
# Entries, on top of the budget in bytes that the writer keeps per rank.
LINEAGE_ENTRIES_KEPT = 65_536


class RedisType(enum.Enum):
    """The names are what Redis's TYPE command answers."""

    HASH = "hash"
    STREAM = "stream"
    SORTED_SET = "zset"


@dataclass(frozen=True, slots=True)
class KeySpec:
    """One row of the table. `pattern` may name `{job}` (hex) and `{rank}`."""

    name: str
    pattern: str
    type: RedisType
    contents: str
    writer: str
    lifetime: str
    # Whether its values carry a seal, because they can reach an unpickler.
    sealed: bool = False

    def key(self, job: bytes = b"", *, rank: int | None = None) -> bytes:
        """The key's name in Redis.

        Raises:
          ValueError: if the pattern needs a job or a rank that was not given, or the reverse.
        """
        if ("{job}" in self.pattern) != bool(job) or ("{rank}" in self.pattern) != (
            rank is not None
        ):
            raise ValueError(f"{self.name} is {self.pattern}: got job={job!r}, rank={rank}")
        return self.pattern.format(job=job.hex(), rank=rank).encode()

    def place(self, job: bytes, field: bytes = b"", *, rank: int | None = None) -> bytes:
        """What a seal in this key is bound to: the key and, in a hash, the field."""
        return self.key(job, rank=rank) + b"/" + field


_JOB = PREFIX + ":{job}:"
_KEPT = "7 days after the job's end; 30 days without a write"

JOBS = KeySpec("jobs", PREFIX + ":jobs", RedisType.SORTED_SET,
               "job hex, scored by its start in Unix seconds", "node 0", "30 days a member")
JOB = KeySpec("job", _JOB + "job", RedisType.HASH,
              "started_at_s, host, pid, script, user, status, finished_at_s", "node 0", _KEPT)
NODES = KeySpec("nodes", _JOB + "nodes", RedisType.HASH,
                "rank -> msgpack NodeRecord", "each node its own; node 0 the dead", _KEPT)
FUNCTIONS = KeySpec("functions", _JOB + "functions", RedisType.HASH,
                    "function id -> msgpack FunctionRecord, its blob sealed if it is small",
                    "the node of the exporting process", _KEPT, sealed=True)
ACTORS = KeySpec("actors", _JOB + "actors", RedisType.HASH,
                 "actor id -> msgpack ActorRecord", "the actor's home", _KEPT)
NAMED_ACTORS = KeySpec("named_actors", _JOB + "named-actors", RedisType.HASH,
                       "namespace/name (namespace percent-quoted) -> actor id", "node 0", _KEPT)
PLACEMENT_GROUPS = KeySpec("placement_groups", _JOB + "placement-groups", RedisType.HASH,
                           "reserved: placement group id -> msgpack", "node 0", _KEPT)
CHECKPOINTS = KeySpec("checkpoints", _JOB + "checkpoints", RedisType.HASH,
                      "reserved: actor id -> msgpack object id and position",
                      "the actor's node", _KEPT)
LINEAGE = KeySpec("lineage", _JOB + "lineage:{rank}", RedisType.STREAM,
                  "n: batches, d: sealed msgpack list of them", "the node with that rank",
                  "dropped at the job's end; capped by bytes and by 65,536 entries", sealed=True)
EVENTS = KeySpec("events", _JOB + "events", RedisType.STREAM,
                 "e: msgpack EventRecord", "every node", _KEPT + "; the newest 10,000")

SCHEMA: tuple[KeySpec, ...] = (
    JOBS, JOB, NODES, FUNCTIONS, ACTORS, NAMED_ACTORS, PLACEMENT_GROUPS, CHECKPOINTS, LINEAGE,
    EVENTS,
)


def describe() -> str:
    """The table, for `docs` and for people with a Redis prompt in front of them."""
    rows = [("key", "type", "contents", "writer", "lifetime")]
    rows += [(s.pattern, s.type.value, s.contents, s.writer, s.lifetime) for s in SCHEMA]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


# ---------------------------------------------------------------- values

class JobRecord(msgspec.Struct, frozen=True, gc=False):
    """The job hash. Every field is written as text, so that a Redis prompt can read it."""

    started_at_s: float
    host: str = ""
    pid: int = 0
    script: str = ""
    user: str = ""
    status: str = "running"
    finished_at_s: float = 0.0


class NodeRecord(msgspec.Struct, frozen=True, gc=False):
    host: str
    pid: int
    resources: Mapping[str, float]
    state: str = "alive"  # alive | left | dead


class FunctionRecord(msgspec.Struct, frozen=True, gc=False):
    name: str
    size_bytes: int
    # None: too big for the control store (FUNCTION_BLOB_LIMIT_BYTES).
    sealed_blob: bytes | None = None


class ActorRecord(msgspec.Struct, frozen=True, gc=False):
    state: str
    class_name: str
    name: str = ""
    rank: int = -1
    pid: int = 0
    incarnation: int = 0


class EventRecord(msgspec.Struct, frozen=True, gc=False):
    at_s: float
    kind: str
    rank: int
    facts: Mapping[str, str | int | float | bool | None]
    # (writer, number) names the event once: a batch whose answer was lost is sent again,
    # and a reader drops the second copy.
    writer: bytes = b""
    number: int = 0


def named_actor_field(namespace: str, name: str) -> bytes:
    """The namespace is quoted so that the first `/` always ends it, whatever the name has."""
    return f"{quote(namespace, safe='')}/{name}".encode()


def split_named_actor_field(field: bytes) -> tuple[str, str]:
    namespace, _, name = field.decode().partition("/")
    return unquote(namespace), name


# ----------------------------------------------------------------- seals

class BadSeal(Exception):
    """A value read from Redis is not what this job wrote there. It must not be unpickled."""

    def __init__(self, place: bytes, reason: str) -> None:
        super().__init__(place, reason)
        self.place = place
        self.reason = reason

    def __str__(self) -> str:
        return (f"control store value at {self.place.decode(errors='replace') or '(no place)'} "
                f"refused: {self.reason}. It was changed, moved or written by another job; "
                "check who else can write to this Redis")


def seal(secret: bytes, blob: bytes, place: bytes = b"") -> bytes:
    """`blob` with a tag in front that only a holder of `secret` can make for this `place`."""
    return _tag(secret, blob, place) + blob


def unseal(secret: bytes, sealed: bytes, place: bytes = b"") -> bytes:
    """The blob given to `seal` with the same secret and place.

    Raises:
      BadSeal: if one bit of tag, blob, place or secret differs.
    """
    if len(sealed) < TAG_BYTES:
        raise BadSeal(place, f"it has {len(sealed)} B, and its tag alone has {TAG_BYTES} B")
    blob = sealed[TAG_BYTES:]
    if not hmac.compare_digest(sealed[:TAG_BYTES], _tag(secret, blob, place)):
        raise BadSeal(place, "its BLAKE2 tag is wrong")
    return blob


def _tag(secret: bytes, blob: bytes, place: bytes) -> bytes:
    if len(secret) < MIN_SECRET_BYTES:
        raise ValueError(f"the job's secret has {len(secret)} B; it needs {MIN_SECRET_BYTES}")
    # The length in front keeps place + blob from being cut at another point.
    digest = hashlib.blake2b(len(place).to_bytes(4, "big"), digest_size=TAG_BYTES, key=secret)
    digest.update(place)
    digest.update(blob)
    return digest.digest()
