"""Identifiers. Plain `bytes`, so that they hash, compare and travel at C speed.

The lengths are Ray's. The home rank is a field of the id itself, so that whoever
holds a ref knows whom to ask without looking anything up:

    job    [ job 4 ]
    actor  [ unique 8                      | home 4 | job 4 ]                       16 B
    task   [ prefix 12       | counter 4   | home 4 | job 4 ]                       24 B
    object [ task 24                                        | index 4 ]             28 B

`prefix` is hashed once per running task from (parent task, attempt); `counter` counts the
children of that task in this process. The task that creates an actor has the id
[ zeros 8 | actor 16 ], so one is derived from the other.

Index 0 is the value of a `put` (which draws a task id of its own); the returns of a task
are 1, 2, ... and do not depend on the attempt, so a retried task fulfils the same refs.
"""

from __future__ import annotations

from hashlib import blake2b

JobID = bytes
ActorID = bytes
TaskID = bytes
ObjectID = bytes
FunctionID = bytes
TemplateID = bytes

JOB_ID_BYTES = 4
ACTOR_ID_BYTES = 16
TASK_ID_BYTES = 24
OBJECT_ID_BYTES = 28
# Functions and templates are named by content or drawn at random; both are 16 B.
FUNCTION_ID_BYTES = 16

PUT_INDEX = b"\0\0\0\0"
# Almost every task has one return: its suffix is a constant.
FIRST_RETURN = b"\1\0\0\0"


def job_id(number: int) -> JobID:
    return number.to_bytes(4, "big")


def id_tail(home: int, job: JobID) -> bytes:
    """The part all ids drawn by one process have in common."""
    return home.to_bytes(4, "big") + job


def task_prefix(parent: TaskID, attempt: int, salt: bytes = b"") -> bytes:
    """`salt` tells apart processes that share a parent (threads share a counter instead)."""
    return blake2b(parent + attempt.to_bytes(4, "big") + salt, digest_size=12).digest()


def driver_task_id(home: int, job: JobID) -> TaskID:
    return b"\xff" * 16 + id_tail(home, job)


def task_id(prefix: bytes, counter: int, tail: bytes) -> TaskID:
    return prefix + counter.to_bytes(4, "little") + tail


def actor_id(prefix: bytes, counter: int, tail: bytes) -> ActorID:
    unique = blake2b(prefix + counter.to_bytes(4, "little"), digest_size=8).digest()
    return unique + tail


def creation_task_id(actor: ActorID) -> TaskID:
    return b"\0" * 8 + actor


def creation_object_id(actor: ActorID) -> ObjectID:
    """The object whose holders keep the actor alive: an actor handle is a ref to it."""
    return b"\0" * 8 + actor + FIRST_RETURN


def actor_of_task(task: TaskID) -> ActorID:
    """The actor that this creation task creates."""
    return task[8:]


def actor_of_object(object_: ObjectID) -> ActorID:
    """The actor whose creation object this is (meaningful for creation objects only)."""
    return object_[8:24]


def is_creation_object(object_: ObjectID) -> bool:
    return object_[:8] == b"\0\0\0\0\0\0\0\0" and object_[24:] == FIRST_RETURN


def return_id(task: TaskID, index: int) -> ObjectID:
    """The id of return `index`, counted from 0."""
    return task + (index + 1).to_bytes(4, "little")


def task_of_object(object_: ObjectID) -> TaskID:
    return object_[:24]


# Where the home's rank lies in the id of a task or an object.
HOME = slice(16, 20)


def home_tag(rank: int) -> bytes:
    """The rank as ids have it, at `HOME`."""
    return rank.to_bytes(4, "big")


def home_of_object(object_: ObjectID) -> int:
    return int.from_bytes(object_[16:20], "big")


def home_of_task(task: TaskID) -> int:
    return int.from_bytes(task[16:20], "big")


def home_of_actor(actor: ActorID) -> int:
    return int.from_bytes(actor[8:12], "big")


def split_ids(joined: bytes) -> list[ObjectID]:
    """Object ids travel joined: one copy instead of one header each."""
    return [joined[i : i + 28] for i in range(0, len(joined), 28)]


def worker_id_hex(job: JobID, rank: int, client: int) -> str:
    """Ray's 28-byte hexadecimal worker id, of client number `client` on that rank."""
    return blake2b(f"{job.hex()}/{rank}/{client}".encode(), digest_size=28).hexdigest()


def node_id_hex(rank: int, job_key: str) -> str:
    """Ray's 28-byte hexadecimal node id; the rank is its last four bytes. `job_key`: of the
    session, hexadecimal."""
    return (blake2b(bytes.fromhex(job_key) + rank.to_bytes(4, "big"), digest_size=24).digest()
            + rank.to_bytes(4, "big")).hex()


def rank_of_node_id(node_hex: str) -> int:
    raw = bytes.fromhex(node_hex)
    if len(raw) != 28:
        raise ValueError(f"{node_hex!r} is not a node id; take one from hpcray.nodes()")
    return int.from_bytes(raw[24:], "big")
