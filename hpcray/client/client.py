"""The client of a node: submit, get, wait, put, and the references this process holds.

    user threads                    helper thread (drivers always, workers once they submit)
      submit/put --> outbox           flushes what lingers (1 ms), reads while nobody waits,
      get/wait   --> one of them      completes futures
                     reads for all

One lock guards everything here; the socket is read by one thread at a time, without the lock.
A thread that waits reads the socket itself when nobody else does (13 us a round trip; 69 us
through a reader thread), and hands out what it gets.

Order on the channel is what makes reference counts right: new holds leave before whatever
relies on them, drops leave last.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from hpcray import exceptions
from hpcray.client import references, serialization
from hpcray.client.arguments import pack_arguments
from hpcray.client.channel import Channel, ChannelClosed, Handlers
from hpcray.client.futures import Futures
from hpcray.client.helper import Helper
from hpcray.client.memory import ClientMemory
from hpcray.client.neighbours import Neighbours
from hpcray.client.pending import PendingCalls
from hpcray.client.references import LOCAL, READY, ObjectRef, ReferenceTable
from hpcray.client.streams import Rooms, Streams
from hpcray.client.waiters import Waiter, count_down
from hpcray.protocol import ids, messages, values
from hpcray.protocol.messages import (
    ActorChannel,
    CancelTask,
    ChannelOf,
    ClientGone,
    DefineFunction,
    DefineTemplate,
    Done,
    DoneMany,
    Drop,
    Get,
    Hold,
    InlineLimit,
    JobEnded,
    Output,
    PinForJob,
    PutInline,
    PutLocated,
    Ready,
    Released,
    Reply,
    Request,
    Rows,
    Run,
    SegmentClosed,
    SegmentDenied,
    SegmentGrant,
    SegmentOpened,
    SegmentReclaim,
    Stop,
    StreamEnded,
    StreamRoom,
    SubmitCall,
    SubmitTask,
    Template,
    TemplateIs,
    Value,
    ValueAt,
    Watch,
    Welcome,
    Yield,
    Yielded,
)

# Instead of a number of returns: a stream, without and with a window.
STREAMED = -1
WINDOWED = -2

# A datagram of this many messages is long enough to amortise its system call.
_BATCH_MESSAGES = 48
# Ids of one Get or Watch: 4,000 x 28 B stay below the datagram limit.
_IDS_PER_MESSAGE = 4000
# Submissions further apart than this leave at once; closer ones are gathered.
_LINGER_S = 0.0005
# Dropped refs are told this late, unless memory is short: most of a loop's drops share a message,
# and a ref met again meanwhile costs none.
_DRAIN_S = 0.05
_DRAIN_REFS = 50_000


class Client:
    """See the module. Made once per process by `init` or the worker's start."""

    def __init__(self, sock: Any, *, is_driver: bool) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._reading = False
        self._sleepers = 0  # threads that wait for the one that reads
        self.last_read_s = 0.0
        self._last_flush_s = 0.0
        self._last_drain_s = 0.0
        self._channel = Channel(sock)
        self._refs = ReferenceTable()
        self.memory = ClientMemory(self)
        self.neighbours = Neighbours()
        self._asked: set[bytes] = set()
        self._watched: dict[bytes, int] = {}  # what was asked: READY or LOCAL
        self._waiters: dict[bytes, Any] = {}  # id -> Waiter or list of Waiters, for values
        self._ready_waiters: dict[bytes, Any] = {}
        self._replies: dict[int, Waiter] = {}
        self._rows: dict[int, list[Any]] = {}  # parts of replies on their way
        self._request_count = 0
        self.futures = Futures(self)
        self.streams = Streams(self)  # consumed here
        self.rooms = Rooms(self)  # of streams made here
        self.pending_calls = PendingCalls(self)
        # runtime_env's directories: digest of the packed content -> object.
        self.packages: dict[bytes, bytes] = {}
        self._defined: set[bytes] = set()
        self._templates: dict[bytes, Waiter] = {}
        self._lost: str | None = None
        self._helper = Helper(self)
        self._pid = os.getpid()
        self.is_driver = is_driver
        self.on_output: Callable[[Sequence[str]], None] = lambda lines: None
        self.on_lost: Callable[[str], None] = lambda reason: None
        self.on_cancel: Callable[[bytes], None] = lambda task: None
        # Tasks of this worker that were cancelled, of which some may not have been read yet.
        self.cancelled: dict[bytes, None] = {}
        # Called between two reads of a wait; may raise (a worker's cancelled task).
        self.check_interrupt: Callable[[], None] | None = None
        # A worker gives its CPU back around a wait; set by worker/main.
        self.before_wait: Callable[[Waiter], bool] | None = None
        self.after_wait: Callable[[], None] | None = None
        # Values up to this size travel in messages; the node lowers it when they fill its memory.
        self.inline_max_bytes = values.INLINE_MAX_BYTES
        # Set by Welcome.
        self.job_id = b""
        self.rank = 0
        self.size = 1
        self.number = 0
        self.session: dict[str, Any] = {}
        self._tail = b""
        self._welcome = Waiter(1)
        self._ended = Waiter(1)
        # Child ids: a prefix per running task and one counter per process.
        self._task: tuple[bytes, int, bytes] = (b"", 0, b"")
        self._task_prefix = b""
        self._counter = 0
        self._handlers = self._message_handlers()

    # --- connection ------------------------------------------------------------------------------

    def start(self, timeout_s: float, config: dict[str, Any] | None = None) -> None:
        """Introduce this process and wait for the node's welcome.

        Raises:
          LaunchError: no welcome in time, or the node went away.
        """
        with self._lock:
            self._channel.outbox.append(messages.Hello(os.getpid(), config))
            try:
                self._flush()
                deadline_s = time.monotonic() + timeout_s
                done = self._wait(self._welcome, deadline_s, giving_back=False)
            except exceptions.RaySystemError as error:
                raise exceptions.LaunchError(f"the node could not start: {error}") from None
        if not done:
            raise exceptions.LaunchError(
                f"the node did not become ready within {timeout_s:g} s "
                "(HPCRAY_START_TIMEOUT_S); did every rank of the launch arrive?"
            )

    def begin_task(self, task: bytes, attempt: int, salt: bytes = b"") -> None:
        """Child ids from now on descend from this task; hashed when the first child comes."""
        self._task = (task, attempt, salt)
        self._task_prefix = b""

    def set_actor(self, actor_id: bytes) -> None:
        """This process is that actor from now on."""
        self._refs.own = ids.creation_object_id(actor_id)

    @property
    def task_prefix(self) -> bytes:
        if not self._task_prefix:
            self._task_prefix = ids.task_prefix(*self._task)
        return self._task_prefix

    def close(self) -> None:
        """Hang up. Pending waits in other threads end with an error."""
        self._helper.stop()
        with self._lock:
            if self._lost is None:
                self._lost = "hpcray was shut down"
            self._channel.close()
            self._changed.notify_all()
            self.futures.lost()
            self._refs.forget_values()
            self.neighbours.close()
        self.futures.complete()  # with the error of the wait that can no longer be answered
        self.memory.close()

    def end_job(
        self, status: int, *, park: bool, look_s: float, is_stuck: Callable[[], bool]
    ) -> bool:
        """Tell the node that the driver is done and wait until the job is gone.

        `is_stuck` is asked every `look_s`; once it says so the node is given up: False.
        """
        with self._lock:
            if self._lost is not None:
                return False
            self._channel.outbox.append(messages.EndJob(status, park))
            try:
                self._flush()
                while not self._wait(self._ended, time.monotonic() + look_s):
                    if is_stuck():
                        return False
                return True
            except exceptions.RaySystemError:
                return False

    @property
    def lost(self) -> str | None:
        return self._lost

    # --- submitting -------------------------------------------------------------------------------

    def define(self, template: Template, function: Callable[[], DefineFunction] | None) -> None:
        """Make the node know the template (and, before it, its function)."""
        with self._lock:
            if template.template_id in self._defined:
                return
            if function is not None and template.function_id not in self._defined:
                message = function()
                self._defined.add(template.function_id)
                self._channel.outbox.append(message)
            self._defined.add(template.template_id)
            self._channel.outbox.append(DefineTemplate(template))

    def is_defined(self, id_: bytes) -> bool:
        return id_ in self._defined

    def new_actor_id(self) -> bytes:
        with self._lock:
            self._counter += 1
            return ids.actor_id(self.task_prefix, self._counter, self._tail)

    def submit(
        self, template_id: bytes, args: bytes, refs: bytes, dep_count: int, return_count: int,
        actor: bytes = b"",
    ) -> list[Any]:
        """Send a task (or, with `actor`, a method call); the refs of its returns, or its stream."""
        lock = self._lock
        lock.acquire()
        try:
            if self._lost is not None:
                self._raise_lost()
            self._counter = counter = self._counter + 1
            prefix = self._task_prefix or self.task_prefix
            task = prefix + counter.to_bytes(4, "little") + self._tail
            outbox = self._channel.outbox
            table = self._refs
            if table.new_holds:
                self._send_holds(outbox)
            if actor:
                message: Any = SubmitCall(task, template_id, actor, args, refs, dep_count)
                link = self.neighbours.actors.get(actor)
                if link is not None:
                    link.called(task)
            else:
                message = SubmitTask(task, template_id, args, refs, dep_count)
            if table.own and (refs or actor):
                self._append_naming(message, refs, actor)
            else:
                outbox.append(message)
            if return_count == 1:
                result: list[Any] = [table.fresh(task + ids.FIRST_RETURN)]
            elif return_count < 0:
                end = table.fresh(task + ids.FIRST_RETURN)
                result = [self.streams.open(task, return_count == WINDOWED, end)]
            else:
                fresh = table.fresh
                result = [fresh(ids.return_id(task, index)) for index in range(return_count)]
            self._linger(len(args) > 16_384)
            return result
        finally:
            lock.release()

    def create_actor(self, message: messages.CreateActor) -> ObjectRef[Any]:
        with self._lock:
            self._check()
            self._send_holds(self._channel.outbox)
            self._append_naming(message, message.refs)
            ref = self._refs.fresh(ids.creation_object_id(message.actor_id))
            self._linger(False)
            return ref

    def _linger(self, large: bool) -> None:
        """Send now if the channel was quiet or enough has gathered; else soon (helper)."""
        outbox = self._channel.outbox
        now = time.monotonic()
        if large or len(outbox) >= _BATCH_MESSAGES or now - self._last_flush_s > _LINGER_S:
            self._flush()
        else:
            self._helper.arm()

    # A method, because the face must not import it: it brings cloudpickle along.
    pack_arguments = pack_arguments

    # --- objects ----------------------------------------------------------------------------------

    def put(self, value: Any) -> ObjectRef[Any]:
        packed = serialization.pack_atom(value, self.inline_max_bytes)
        return self.put_packed(packed) if packed else self.put_serialized(
            serialization.serialize(value))

    def put_packed(self, packed: bytes) -> ObjectRef[Any]:
        """`put` of a small packed value without refs in it."""
        with self._lock:
            self._check()
            ref = self._fresh_put()
            ref._value = packed
            ref._ready = LOCAL
            self._channel.outbox.append(PutInline(ref._id, packed))
            self._linger(len(packed) > 16_384)
        return ref

    def put_serialized(self, serialized: serialization.Serialized) -> ObjectRef[Any]:
        pickled, buffers, contained = serialized
        small = serialized.nbytes <= self.inline_max_bytes
        if small and not contained:
            return self.put_packed(values.pack(pickled, buffers))
        stored: Any = values.pack(pickled, buffers) if small else self.memory.write(serialized)
        with self._lock:
            self._check()
            ref = self._fresh_put()
            if small:
                ref._value = stored
            ref._ready = LOCAL
            self._send_holds(self._channel.outbox)
            refs = b"".join(contained)
            message = PutInline if small else PutLocated
            self._append_naming(message(ref._id, stored, refs), refs)
            self._linger(not small or len(stored) > 16_384)
        return ref

    def _fresh_put(self) -> ObjectRef[Any]:
        self._counter += 1
        task = ids.task_id(self.task_prefix, self._counter, self._tail)
        return self._refs.fresh(task + ids.PUT_INDEX)

    def intern(self, object_id: bytes) -> ObjectRef[Any]:
        """The ref of an object met in a value being unpickled."""
        with self._lock:
            return self._refs.intern(object_id)

    def pin_for_job(self, object_id: bytes) -> None:
        with self._lock:
            self._channel.outbox.append(PinForJob(object_id))
            self._linger(False)

    def get(self, refs: Sequence[ObjectRef[Any]], timeout_s: float | None) -> list[Any]:
        """The values, in order.

        Raises:
          GetTimeoutError: not all were there in time.
          the exception of the first ref, in order, whose value is an error.
        """
        if len(refs) == 1:
            value = refs[0]._value
            if value is None:
                value = self._get_one(refs[0], timeout_s)
            if value is not None:  # known already: no lock, no message
                return [self._open(value)]
        data = self.get_packed(refs, timeout_s)
        return [self._open(item) for item in data]

    @staticmethod
    def _open(data: Any) -> Any:
        value = serialization.deserialize(data)
        if data[0] >= values.ERROR:
            raise value
        return value

    def _get_one(self, ref: ObjectRef[Any], timeout_s: float | None) -> bytes | None:
        """`get_packed` of one ref, for a small value; None: it is not one."""
        object_id = ref._id
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            if ref._value is None and not (
                ref._view is not None or self.memory.has_arrived(object_id)
            ):
                waiter = Waiter(1)
                self._check_session((object_id,))
                link = None
                if object_id not in self._asked:
                    self._asked.add(object_id)
                    outbox = self._channel.outbox
                    if self._refs.new_holds:
                        self._send_holds(outbox)
                    link = self.neighbours.called(outbox, object_id)
                    if link is None or not self.neighbours.call(link, outbox):
                        outbox.append(Get(object_id))
                if not self._await_ids(self._waiters, (object_id,), waiter, deadline):
                    raise _timed_out(timeout_s, 1, 1)
                if link is not None:
                    link.over(ids.task_of_object(object_id), ref._value)
            return ref._value

    def get_packed(self, refs: Sequence[ObjectRef[Any]], timeout_s: float | None) -> list[Any]:
        """The packed values: `bytes`, or pinned arrays over shared memory."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        result: list[Any] = [ref._value for ref in refs]
        while True:
            missing = [i for i, item in enumerate(result) if item is None]
            if not missing:
                return result
            with self._lock:
                absent: dict[bytes, None] = {}
                for i in missing:
                    ref = refs[i]
                    item = ref._value
                    if item is None:
                        item = self.memory.live_view(ref)
                    if item is None and not self.memory.has_arrived(ref._id):
                        absent[ref._id] = None
                    result[i] = item
                if absent:
                    if not self._get_absent(list(absent), deadline):
                        raise _timed_out(timeout_s, len(absent), len(refs))
                    for i in missing:
                        if result[i] is None:
                            result[i] = refs[i]._value
            for i in missing:
                if result[i] is None:
                    # Outside the lock: opening a segment may take a round trip.
                    result[i] = self.memory.open_arrived(refs[i])

    def _get_absent(self, absent: list[bytes], deadline: float | None) -> bool:
        waiter = Waiter(len(absent))
        self._check_session(absent)
        asked = self._asked
        ask = [id_ for id_ in absent if id_ not in asked]
        asked.update(ask)
        self._ask(Get, ask)
        return self._await_ids(self._waiters, absent, waiter, deadline)

    def _ask(self, message: Callable[..., Any], ask: list[bytes], *rest: Any) -> None:
        outbox = self._channel.outbox
        self._send_holds(outbox)
        for start in range(0, len(ask), _IDS_PER_MESSAGE):
            outbox.append(message(b"".join(ask[start : start + _IDS_PER_MESSAGE]), *rest))

    def _await_ids(
        self, table: dict[bytes, Any], absent: Sequence[bytes], waiter: Waiter,
        deadline: float | None,
    ) -> bool:
        waiter.ids = absent
        for id_ in absent:
            other = table.get(id_)
            if other is None:
                table[id_] = waiter
            elif type(other) is list:
                other.append(waiter)
            else:
                table[id_] = [other, waiter]
        try:
            self._flush()
            return self._wait(waiter, deadline)
        finally:
            if waiter.remaining > 0:  # timed out, interrupted or lost: forget the rest
                for id_ in absent:
                    other = table.get(id_)
                    if other is waiter:
                        del table[id_]
                    elif type(other) is list and waiter in other:
                        other.remove(waiter)

    def wait(
        self, refs: list[ObjectRef[Any]], count: int, timeout_s: float | None, fetch: bool
    ) -> tuple[list[ObjectRef[Any]], list[ObjectRef[Any]]]:
        """Split `refs` into at most `count` ready ones and the rest, both in the given order.

        An ObjectRefGenerator stands for its next item.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        level = LOCAL if fetch else READY
        ready = self._first_ready(refs, count, level)
        if len(ready) < count:
            with self._lock:
                watched = self._watched
                ask = [
                    r._id for r in refs if r._ready < level and watched.get(r._id, 0) < level
                    and type(r) is ObjectRef  # a stream tells by itself
                ]
                if ask:
                    watched.update(dict.fromkeys(ask, level))
                    self._ask(Watch, ask, fetch)
                absent = [r._id for r in refs if r._ready < level]
                self._check_session(absent)
                waiter = Waiter(count - (len(refs) - len(absent)))
                if waiter.remaining > 0:
                    self._await_ids(self._ready_waiters, absent, waiter, deadline)
                    # Those not needed stay watched: the next wait finds them ready for free.
                    self._forget_waiter(self._ready_waiters, absent, waiter)
            ready = self._first_ready(refs, count, level)
        if not ready:
            return [], list(refs)
        if len(ready) == 1:
            index = ready[0]
            return [refs[index]], refs[:index] + refs[index + 1 :]
        chosen = set(ready)
        return (
            [refs[i] for i in ready],
            [ref for i, ref in enumerate(refs) if i not in chosen],
        )

    @staticmethod
    def _first_ready(refs: list[ObjectRef[Any]], count: int, level: int) -> list[int]:
        found = []
        for index, ref in enumerate(refs):
            if ref._ready >= level:
                found.append(index)
                if len(found) == count:
                    break
        return found

    @staticmethod
    def _forget_waiter(table: dict[bytes, Any], absent: list[bytes], waiter: Waiter) -> None:
        for id_ in absent:
            other = table.get(id_)
            if other is waiter:
                del table[id_]
            elif type(other) is list and waiter in other:
                other.remove(waiter)

    # --- the slow path ----------------------------------------------------------------------------

    def request(
        self, name: str, arguments: Any = None, timeout_s: float | None = None,
        rows: list[Any] | None = None,
    ) -> Any:
        """Ask the node something rare: the reply or its error. `rows` takes what comes in parts."""
        with self._lock:
            self._check()
            self._request_count += 1
            number = self._request_count
            waiter = self._replies[number] = Waiter(1)
            found = self._rows[number] = [] if rows is None else rows
            self._send_holds(self._channel.outbox)
            self._channel.outbox.append(Request(number, name, arguments))
            self._flush()
            deadline = None if timeout_s is None else time.monotonic() + timeout_s
            try:
                if not self._wait(waiter, deadline):
                    raise exceptions.GetTimeoutError(f"no answer to {name!r} in {timeout_s} s")
            finally:
                self._replies.pop(number, None)
                self._rows.pop(number, None)
        reply: Reply = waiter.result
        if reply.error is not None:
            raise serialization.failure_to_exception(reply.error)
        return found + reply.result if rows is None and found else reply.result

    def notify(self, message: Any) -> None:
        """Queue a one-way message and send it now."""
        with self._lock:
            self._check()
            self._send_holds(self._channel.outbox)
            self._channel.outbox.append(message)
            self._flush()

    def exchange(self, message: Any, slot: Waiter) -> Any:
        """Send a message whose answer its handler puts into `slot`; the answer."""
        with self._lock:
            self._check()
            self._channel.outbox.append(message)
            self._flush(drain=True)
            self._wait(slot, None, giving_back=False)
        return slot.result

    def fetch_template(self, template_id: bytes, home: int) -> TemplateIs:
        """What a template id stands for (a worker meets it for the first time)."""
        waiter = self._templates.setdefault(template_id, Waiter(1))
        answer: TemplateIs = self.exchange(messages.FetchTemplate(template_id, home), waiter)
        self._templates.pop(template_id, None)
        return answer

    # --- reporting (workers) ----------------------------------------------------------------------

    def report(self, message: Any, reply_to: int = -1) -> None:
        """Queue a task's outcome; `flush` sends it, and the value of a Done to `reply_to`."""
        with self._lock:
            if reply_to >= 0 and type(message) is Done:
                self.neighbours.answer(reply_to, message, self._counter)
            outbox = self._channel.outbox
            if self._refs.new_holds:
                self._send_holds(outbox)
            if not self._refs.own:
                outbox.append(message)
            elif type(message) is DoneMany:
                self._append_naming(message, b"".join(r.contained for r in message.returns))
            else:
                self._append_naming(
                    message, message.returned.contained if type(message) is Yield else b"")

    def on_runs(self, batch: list[Run | Stop]) -> None:
        """By a worker, of each datagram of its task channel."""
        with self._lock:
            self.neighbours.on_runs(batch)

    def flush(self, *, drain: bool = False) -> None:
        """Send what is queued; with `drain` (before a process idles) dropped refs too."""
        with self._lock:
            self._flush(drain=drain)

    def flush_lingering(self) -> bool:
        """By the helper: send what has waited; whether there was anything."""
        with self._lock:
            if self._lost is not None:
                return False
            late = (self._refs.pending_drops()
                    and time.monotonic() - self._last_drain_s > _DRAIN_S)
            if self._channel.outbox or late or self.memory.pending_unpins():
                self._flush()
                return True
            return False

    # --- inside, with the lock held ---------------------------------------------------------------

    def _check(self) -> None:
        if self._lost is not None:
            self._raise_lost()
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this process was forked from an hpcray process and has no connection of its own; "
                "call hpcray functions from the parent only"
            )

    def _check_session(self, object_ids: Sequence[bytes]) -> None:
        job = self.job_id
        for object_id in object_ids:
            if object_id[20:24] != job:
                raise ValueError(
                    f"ObjectRef({object_id.hex()}) belongs to an earlier session: its object went "
                    "with shutdown()")

    def _raise_lost(self) -> None:
        raise exceptions.RaySystemError(f"the connection to the node is gone: {self._lost}")

    def _send_holds(self, outbox: list[Any]) -> None:
        holds = self._refs.new_holds
        if holds:
            holds.pop(self._refs.own, None)
            found = list(holds)
            holds.clear()
            for start in range(0, len(found), _IDS_PER_MESSAGE):
                outbox.append(Hold(b"".join(found[start : start + _IDS_PER_MESSAGE])))

    def _append_naming(self, message: Any, refs: bytes, actor: bytes = b"") -> None:
        """Queue a message that names `refs` or calls `actor`. Of an actor's handle to itself the
        node is told for as long as it takes to count what the message stands for."""
        outbox = self._channel.outbox
        own = self._refs.own
        if own and (own in refs or (actor and own == ids.creation_object_id(actor))):
            outbox += (Hold(own), message, Drop(own))
        else:
            outbox.append(message)

    def _flush(self, *, drain: bool = False) -> None:
        channel = self._channel
        outbox = channel.outbox
        refs = self._refs
        dropped = None
        if refs.pending_drops() and (
            drain or time.monotonic() - self._last_drain_s > _DRAIN_S
            or refs.pending_drops() > _DRAIN_REFS
            or self.memory.pending_unpins()  # large objects may be among them
        ):
            # Drained before new holds are told: a ref that came and went is never mentioned.
            dropped = refs.drain()
            self.memory.forget_arrivals(dropped)
            self._last_drain_s = time.monotonic()
        if refs.new_holds:
            holds: list[Any] = []
            self._send_holds(holds)
            outbox[:0] = holds
        if dropped:
            for start in range(0, len(dropped), _IDS_PER_MESSAGE):
                outbox.append(Drop(b"".join(dropped[start : start + _IDS_PER_MESSAGE])))
        if refs.dropped_streams:
            self.streams.drop(refs.dropped_streams, outbox)
        if self.memory.pending_unpins():
            self.memory.collect_unpins(outbox)
        if outbox:
            neighbours = self.neighbours
            neighbours.report(outbox)
            try:
                channel.flush(self._handlers)
                if neighbours.waiting:
                    neighbours.send(channel.outbox, channel.sent)
                    channel.flush(self._handlers)  # what could not be sent, mostly nothing
            except ChannelClosed as closed:
                self._set_lost(str(closed))
                self._raise_lost()
            self._last_flush_s = time.monotonic()

    def _wait(
        self, waiter: Waiter, deadline: float | None, giving_back: bool = True
    ) -> bool:
        """Wait until nothing remains; False at the deadline. The lock is held, but not asleep.

        Raises:
          RaySystemError: the node is gone.
        """
        gave_back = False
        channel = self._channel
        try:
            while waiter.remaining > 0:
                if self._lost is not None:
                    self._raise_lost()
                remaining_s = None if deadline is None else deadline - time.monotonic()
                if remaining_s is not None and remaining_s <= 0:
                    # Whatever lies there already counts: timeout=0 means "look", not "give up".
                    if not self._reading:
                        self._read_available()
                    return waiter.remaining <= 0
                if giving_back and not gave_back and self.before_wait is not None:
                    gave_back = self.before_wait(waiter)
                    if gave_back:
                        self._flush()
                        continue
                if self._reading:
                    self._sleepers += 1
                    try:
                        self._changed.wait(remaining_s)
                    finally:
                        self._sleepers -= 1
                    continue
                self._reading = True
                self._lock.release()
                read = None
                try:
                    if remaining_s is None:
                        read = channel.read(wait=True)
                    elif self._helper.poll_socket(channel.socket, remaining_s):
                        read = channel.read(wait=False)
                except ChannelClosed as closed:
                    self._set_lost(str(closed))
                finally:
                    self._lock.acquire()
                    self._reading = False
                    if read is not None:
                        batch, descriptors = read
                        handlers = self._handlers
                        for message in batch:
                            handlers[type(message)](message, descriptors)
                        self.last_read_s = time.monotonic()
                    if self._sleepers:
                        self._changed.notify_all()
                if self.check_interrupt is not None:
                    self.check_interrupt()
            return True
        finally:
            if gave_back and self.after_wait is not None:
                self.after_wait()

    def _read_available(self) -> None:
        try:
            while self._channel.receive(self._handlers, wait=False):
                pass
        except ChannelClosed as closed:
            self._set_lost(str(closed))
        self._changed.notify_all()

    def read_now(self) -> bool:
        """From a signal handler: read what is there; False if the client is in use this moment."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if not self._reading and self._lost is None:
                self._read_available()
        finally:
            self._lock.release()
        return True

    def read_idle(self) -> bool:
        """By the helper: read if nobody else does; whether it should go on watching."""
        with self._lock:
            if self._reading or self._lost is not None:
                return False
            self._read_available()
            return True

    @property
    def being_read(self) -> bool:
        """Whether waiting threads read: then the helper keeps away (unless futures need it)."""
        return self._reading or (
            not self.futures.waiting and time.monotonic() - self.last_read_s < 0.01)

    def _set_lost(self, reason: str) -> None:
        if self._lost is None:
            self._lost = reason
            self.futures.lost()
            self.on_lost(reason)

    def _on_value(self, message: Value, _: list[int]) -> None:
        object_id = message.object_id
        if message.sender < 0:
            self.neighbours.stamp += 1
        else:
            self.neighbours.on_value(message)
        self._asked.discard(object_id)
        entry = self._refs.live.get(object_id)
        ref = None if entry is None else entry()
        if ref is not None:
            ref._value = message.value
            ref._ready = LOCAL
        self._arrived(object_id)

    def _on_value_at(self, message: ValueAt, _: list[int]) -> None:
        self.neighbours.stamp += 1
        object_id = message.object_id
        self._asked.discard(object_id)
        ref = self._refs.get(object_id)
        self.memory.arrived(object_id, message.location, wanted=ref is not None)
        if ref is not None:
            ref._ready = LOCAL
        self._arrived(object_id)

    def _arrived(self, object_id: bytes) -> None:
        waiter = self._waiters.pop(object_id, None)
        if type(waiter) is Waiter:
            waiter.remaining -= 1
        elif waiter is not None:
            count_down(waiter)
        if self.futures.waiting:
            self.futures.arrived(object_id)

    def _on_ready(self, message: Ready, _: list[int]) -> None:
        self.neighbours.stamp += 1
        table = self._refs
        waiters = self._ready_waiters
        level = LOCAL if message.local else READY
        watched = self._watched
        for object_id in ids.split_ids(message.ids):
            ref = table.get(object_id)
            if ref is not None and ref._ready < level:
                ref._ready = level
            if watched.get(object_id, 0) > level:
                continue  # somebody waits for more than this; that answer comes too
            watched.pop(object_id, None)
            waiter = waiters.pop(object_id, None)
            if waiter is not None:
                count_down(waiter)

    def _on_yielded(self, message: Yielded, _: list[int]) -> None:
        self.neighbours.stamp += 1
        self.streams.yielded(message)

    def _on_stream_ended(self, message: StreamEnded, _: list[int]) -> None:
        self.neighbours.stamp += 1
        self.streams.ended(message)

    def _on_released(self, message: Released, _: list[int]) -> None:
        self.memory.released(message.segment, message.offsets)

    def _on_grant(self, message: SegmentGrant, descriptors: list[int]) -> None:
        self.memory.granted(message.segment, message.nbytes, descriptors.pop(0))

    def _on_denied(self, message: SegmentDenied, _: list[int]) -> None:
        self.memory.denied(message)

    def _on_channel_of(self, message: ChannelOf, descriptors: list[int]) -> None:
        self.neighbours.introduce(message.client, socket.socket(fileno=descriptors.pop(0)))

    def _on_actor_channel(self, message: ActorChannel, descriptors: list[int]) -> None:
        self.neighbours.introduce_actor(
            message.actor_id, message.worker, socket.socket(fileno=descriptors.pop(0)))

    def _on_client_gone(self, message: ClientGone, _: list[int]) -> None:
        self.neighbours.forget(message.client)

    def _on_opened(self, message: SegmentOpened, descriptors: list[int]) -> None:
        self.memory.opened(message.segment, message.nbytes, descriptors.pop(0))

    def _on_closed(self, message: SegmentClosed, _: list[int]) -> None:
        self.memory.closed(message.segment)

    def _on_reclaim(self, _message: SegmentReclaim, _: list[int]) -> None:
        self.memory.give_back(self._channel.outbox)
        self._helper.arm()

    def _on_template(self, message: TemplateIs, _: list[int]) -> None:
        if message.template is not None:
            waiter = self._templates.get(message.template.template_id)
            if waiter is not None:
                waiter.result = message
                waiter.remaining = 0

    def _on_reply(self, message: Reply, _: list[int]) -> None:
        self.neighbours.stamp += 1
        waiter = self._replies.get(message.request)
        if waiter is not None:
            waiter.result = message
            waiter.remaining = 0

    def _on_rows(self, message: Rows, _: list[int]) -> None:
        rows = self._rows.get(message.request)
        if rows is not None:
            rows.extend(message.rows)

    def _on_output(self, message: Output, _: list[int]) -> None:
        self.on_output(message.lines)

    def _on_cancel(self, message: CancelTask, _: list[int]) -> None:
        self.cancelled[message.task_id] = None
        if len(self.cancelled) > 1000:  # the newest ones are enough
            del self.cancelled[next(iter(self.cancelled))]
        self.rooms.let_go(message.task_id)
        self.on_cancel(message.task_id)

    def _on_welcome(self, message: Welcome, _: list[int]) -> None:
        self.job_id = message.job_id
        self.rank = message.rank
        self.size = message.size
        self.number = self.neighbours.number = message.client
        self.session = message.session
        self._tail = ids.id_tail(message.rank, message.job_id)
        self._welcome.remaining = 0

    def _on_inline_limit(self, message: InlineLimit, _: list[int]) -> None:
        self.inline_max_bytes = message.nbytes

    def _on_ended(self, _message: JobEnded, _: list[int]) -> None:
        self._ended.remaining = 0

    def _message_handlers(self) -> Handlers:
        return {
            Value: self._on_value,
            ValueAt: self._on_value_at,
            Ready: self._on_ready,
            Released: self._on_released,
            SegmentGrant: self._on_grant,
            SegmentDenied: self._on_denied,
            SegmentOpened: self._on_opened,
            ChannelOf: self._on_channel_of,
            ActorChannel: self._on_actor_channel,
            ClientGone: self._on_client_gone,
            SegmentClosed: self._on_closed,
            SegmentReclaim: self._on_reclaim,
            TemplateIs: self._on_template,
            Reply: self._on_reply,
            Rows: self._on_rows,
            Output: self._on_output,
            CancelTask: self._on_cancel,
            Welcome: self._on_welcome,
            InlineLimit: self._on_inline_limit,
            JobEnded: self._on_ended,
            Yielded: self._on_yielded,
            StreamEnded: self._on_stream_ended,
            StreamRoom: lambda message, _: self.rooms.taken(message),
        }


def _timed_out(timeout_s: float | None, absent: int, count: int) -> exceptions.GetTimeoutError:
    return exceptions.GetTimeoutError(
        f"get timed out after {timeout_s:g} s: {absent} of {count} objects were not there when "
        "the wait began and some still are not")


def _after_fork_in_child() -> None:
    # The child shares the socket but may not use it: its client is dead, its finalisers silent.
    client = references.client_or_none()
    if client is not None:
        client._lost = "this process is a fork"
        client.neighbours.close()
        references.forked()


os.register_at_fork(after_in_child=_after_fork_in_child)
