"""Object references of this process.

One `ObjectRef` per id per process, interned, so identity is equality and hash. The node
is told when the first local ref to an object appears and when the last one goes.

Life of an entry in `live`:

    fresh()/intern() --> alive --(last ref dies: __del__ appends to `dropped`)--> dead
                           ^                                                       |
                           +------------ intern() of the same id ------------------+--> drained

A finaliser may run at any allocation, in any thread, inside any lock: it only appends to
a deque. `ReferenceTable.drain` reads it later and skips ids that came to life again.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from typing import Any, Generic, Self, TypeVar, cast

from hpcray.client.identifiers import JobID, TaskID, check_bytes
from hpcray.protocol import ids, values
from hpcray.protocol.messages import Hold
from hpcray.protocol.sizes import IDS_PER_MESSAGE

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_dropped: deque[bytes] = deque()
drop = _dropped.append  # what finalisers call

NOT_READY = 0
READY = 1  # somewhere
LOCAL = 2  # on this node


class ObjectRef(Generic[T_co]):
    """A reference to an object: the future result of a task, or a value that was `put`.

    Refs are made by `remote`, `put` and `wait`. A ref may be passed to tasks and put inside other
    objects; the object lives as long as any ref to it, anywhere.

    `ObjectRef(bytes)` is the ref of that id. It keeps the object alive if that is alive still; what
    is made of any other id (`nil()`, `from_random()`) compares and hashes, and `get` refuses it.
    """

    # Attributes with an underscore are hpcray's own: the client's parts read and write them.
    __slots__ = ("__weakref__", "_id", "_ready", "_value", "_view")

    _id: bytes
    _value: bytes | None  # the packed inline value, once known
    _ready: int
    _view: weakref.ref[Any] | None  # the pinned array, while one lives

    def __new__(cls, id: bytes) -> Self:
        # Not in __init__: there would be a ref without an id, and `__del__` would meet it.
        check_bytes(cls, ids.OBJECT_ID_BYTES, id)
        table = _table
        if table is None or table.job_id != id[20:24]:
            return cast("Self", _of_no_object(id))
        home = ids.home_of_object(id)
        if home >= table.size:
            ref = _of_no_object(id)
            ref._value = values.pack_failure(values.Failure(
                "ObjectLostError", f"this job has no rank {home}, which would have made it",
                id.hex()))
            ref._ready = LOCAL
            return cast("Self", ref)
        return cast("Self", table.intern_locked(id))

    @classmethod
    def from_binary(cls, id: bytes) -> Self:
        return cls(id)

    @classmethod
    def from_hex(cls, hex_id: str | bytes) -> Self:
        return cls(bytes.fromhex(hex_id.decode() if isinstance(hex_id, bytes) else hex_id))

    @classmethod
    def nil(cls) -> Self:
        """The ref of no object."""
        return cast("Self", _of_no_object(b"\xff" * ids.OBJECT_ID_BYTES))

    @classmethod
    def from_random(cls) -> Self:
        """A ref of no object that equals no other."""
        return cast("Self", _of_no_object(os.urandom(ids.OBJECT_ID_BYTES)))

    @classmethod
    def size(cls) -> int:
        """Bytes of an id."""
        return ids.OBJECT_ID_BYTES

    def is_nil(self) -> bool:
        return self._id == b"\xff" * ids.OBJECT_ID_BYTES

    def binary(self) -> bytes:
        """The 28-byte id."""
        return self._id

    def hex(self) -> str:
        return self._id.hex()

    def task_id(self) -> TaskID:
        """The task that makes this object."""
        return TaskID(ids.task_of_object(self._id))

    def job_id(self) -> JobID:
        """The job it belongs to."""
        return JobID(self._id[20:24])

    def future(self) -> Future[T_co]:
        """A `concurrent.futures.Future` of the value (or of the task's exception). It knows this
        ref as `object_ref` and keeps it."""
        return current_table().future(self)

    def _on_completed(self, py_callback: Callable[[Any], Any]) -> None:
        """Call it with the value, or with the exception that `get` would raise, when there is
        one: in a thread of hpcray, which must not be blocked."""
        self.future().add_done_callback(
            lambda done: py_callback(done.exception() or done.result()))

    def __await__(self) -> Generator[Any, None, T_co]:
        import asyncio

        return asyncio.wrap_future(self.future()).__await__()

    def as_future(self, _internal: bool = False) -> Any:
        """An `asyncio.Future` of the value, in the running loop."""
        import asyncio

        return asyncio.wrap_future(self.future())

    def __repr__(self) -> str:
        return f"ObjectRef({self._id.hex()})"

    def __reduce__(self) -> tuple[Any, ...]:
        collected = getattr(collecting, "ids", None)
        if collected is None:
            # Pickled by the user's own means: it leaves our sight, so the object stays for the job.
            if self._id in of_none:
                return (ObjectRef, (self._id,))
            current_table().pin_for_job(self._id)
        else:
            collected.append(self._id)
        return (_load_ref, (self._id,))

    def __copy__(self) -> ObjectRef[T_co]:
        return self

    def __deepcopy__(self, memo: object) -> ObjectRef[T_co]:
        return self

    def __del__(self, _drop: Callable[[bytes], None] = drop) -> None:
        _drop(self._id)

    def __iter__(self) -> Any:
        raise TypeError("an ObjectRef cannot be iterated; call get(ref) first")


# The ids of refs met by the serialiser running in this thread; absent when none runs.
collecting = threading.local()

_new = object.__new__
_ref = weakref.ref

# Refs of ids that are no object's of this session, by id. No table has them, so no node hears of
# them, and what they are used for refuses them (`ReferenceTable.check_session`).
of_none: weakref.WeakValueDictionary[bytes, ObjectRef[Any]] = weakref.WeakValueDictionary()


def _of_no_object(object_id: bytes) -> ObjectRef[Any]:
    return of_none.setdefault(object_id, ReferenceTable().fresh(object_id))


def of_objects(contained: list[bytes]) -> list[bytes]:
    """Without those of no object."""
    return [object_id for object_id in contained if object_id not in of_none]


class ReferenceTable:
    """Which refs live in this process, and what the node has not been told yet.

    Not locked: the client calls it with its own lock held. `kind` and `dropped` are others only
    where several processes are simulated in one.
    """

    # What a ref needs that takes the lock or a thread; the wiring sets them (client.py).
    intern_locked: Callable[[bytes], ObjectRef[Any]]
    pin_for_job: Callable[[bytes], None]
    future: Callable[[ObjectRef[Any]], Future[Any]]

    def __init__(
        self, kind: type[ObjectRef[Any]] = ObjectRef, dropped: deque[bytes] = _dropped
    ) -> None:
        self._kind = kind
        self.dropped = dropped  # refs and generators that have died
        self.live: dict[bytes, weakref.ref[ObjectRef[Any]]] = {}
        # First refs to objects from elsewhere: told before anything that relies on it.
        self.new_holds: dict[bytes, None] = {}
        # The creation object of the actor this process is; b"": none. Its refs here count for
        # nothing: an actor does not keep itself alive.
        self.own = b""
        # Tasks whose generator has died (see client/streams.py).
        self.dropped_streams: list[bytes] = []
        # The session that these refs belong to; set by its Welcome.
        self.job_id = b""
        self.size = 1

    def check_session(self, object_ids: Sequence[bytes]) -> None:
        """Raises ValueError: one of them is of no object of this session."""
        job = self.job_id
        for object_id in object_ids:
            if object_id[20:24] != job:
                if object_id in of_none:  # made from bytes, by hand
                    raise ValueError(
                        f"ObjectRef({object_id.hex()}) is of no object of this session: refs are "
                        "made by .remote() and put(), and passed on as refs")
                raise ValueError(
                    f"ObjectRef({object_id.hex()}) belongs to an earlier session: its object went "
                    "with shutdown()")

    def fresh(self, object_id: bytes) -> ObjectRef[Any]:
        """The ref of an object this process has just made; the message says so to the node."""
        ref: ObjectRef[Any] = _new(self._kind)
        ref._id = object_id
        ref._value = None
        ref._ready = NOT_READY
        ref._view = None
        self.live[object_id] = _ref(ref)
        return ref

    def tell_holds(self, outbox: list[Any]) -> None:
        """Of refs met since the last time: before anything that relies on them."""
        holds = self.new_holds
        if holds:
            # `_load_ref` adds to them without the lock: but no other thread runs between its look
            # for the dict and the addition, so none is lost that comes while they are told.
            self.new_holds = {}
            holds.pop(self.own, None)
            found = list(holds)
            for start in range(0, len(found), IDS_PER_MESSAGE):
                outbox.append(Hold(b"".join(found[start : start + IDS_PER_MESSAGE])))

    def intern(self, object_id: bytes) -> ObjectRef[Any]:
        """The ref of an object met inside a value."""
        entry = self.live.get(object_id)
        if entry is not None:
            ref = entry()
            if ref is not None:
                return ref
            # Dead but not drained: the node still counts it; the entry is simply revived.
        else:
            self.new_holds[object_id] = None
        return self.fresh(object_id)

    def get(self, object_id: bytes) -> ObjectRef[Any] | None:
        entry = self.live.get(object_id)
        return None if entry is None else entry()

    def drain(self) -> list[bytes]:
        """Ids whose last ref is gone and that the node counts."""
        dropped = self.dropped
        live = self.live
        holds = self.new_holds
        own = self.own
        gone = []
        while dropped:
            object_id = dropped.popleft()
            entry = live.get(object_id)
            if entry is None or entry() is not None:
                if len(object_id) == ids.TASK_ID_BYTES:
                    self.dropped_streams.append(object_id)
                continue  # of an earlier session, drained already, or alive again
            del live[object_id]
            if object_id in holds:
                del holds[object_id]  # never told: nothing to take back
            elif object_id != own:
                gone.append(object_id)
        return gone

    def forget_values(self) -> None:
        """The session ends: refs that outlive it stand for nothing any more."""
        for entry in list(self.live.values()):
            ref = entry()
            if ref is not None:
                ref._value = None
                ref._ready = NOT_READY


# Of this process, while it has a client.
_table: ReferenceTable | None = None
_connect: Callable[[], ReferenceTable] | None = None
in_fork = False  # of a process that had a client


def set_table(table: ReferenceTable | None) -> None:
    global _table
    _table = table


def set_connector(connect: Callable[[], ReferenceTable]) -> None:
    """How the first use of a ref in a process without a client gets it one."""
    global _connect
    _connect = connect


def current_table() -> ReferenceTable:
    """Of this process, which becomes a client if it is none yet."""
    if _table is not None:
        return _table
    if _connect is None:
        raise RuntimeError("hpcray is not initialised in this process")
    return _connect()


def forked() -> None:
    """In the child: all refs are its parent's."""
    global in_fork
    in_fork = True
    _dropped.clear()


def _load_ref(object_id: bytes) -> ObjectRef[Any]:
    """What an unpickled ref becomes: `ReferenceTable.intern`, but without the lock, because an
    object may hold 10,000 refs. Only a ref whose death is not told yet needs it.

    Two threads that meet a ref at once get the same one: `setdefault` is one step.
    """
    table = _table
    if table is None:
        if in_fork:
            # What it is used for says why not; an error here would end, say, a worker of a Pool
            # that was sent it, while whoever sent it waits.
            return ReferenceTable().fresh(object_id)
        table = current_table()
    live = table.live
    if object_id not in live:
        if object_id[20:24] != table.job_id:
            return _of_no_object(object_id)
        met: ObjectRef[Any] = _new(ObjectRef)
        met._id = object_id
        met._value = None
        met._ready = NOT_READY
        met._view = None
        weak = _ref(met)
        if live.setdefault(object_id, weak) is weak:
            table.new_holds[object_id] = None
            return met
    entry = live.get(object_id)
    ref = None if entry is None else entry()
    return table.intern_locked(object_id) if ref is None else ref
