"""The client of a node, as the face and the worker use it: submit, get, wait, put. Thread-safe.

    Client ---with link:---> Core     what is known and said (pure)
           ---link.wait----> Link     lock, socket, reader, waiting

Each method enters the door once (a wait leaves it while it sleeps), and unpickles, maps memory and
raises what tasks have raised outside of it.
"""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from hpcray import exceptions
from hpcray.client import references, serialization, waiters
from hpcray.client.arguments import pack_arguments
from hpcray.client.core import STREAMED, WINDOWED, Core
from hpcray.client.futures import Futures
from hpcray.client.groups import Group
from hpcray.client.imports import Imports
from hpcray.client.link import Link
from hpcray.client.pending import PendingCalls, exceeded
from hpcray.client.references import LOCAL, READY, ObjectRef, ReferenceTable
from hpcray.client.store import Store
from hpcray.client.streams import ObjectRefGenerator, Room
from hpcray.client.waiters import FailFast, Waiter
from hpcray.objects.segments import pinned_view
from hpcray.protocol import ids, messages, values
from hpcray.protocol.messages import (
    CreateActor,
    DefineFunction,
    Done,
    Located,
    Output,
    PinForJob,
    Preload,
    Reply,
    Run,
    SegmentDenied,
    Stop,
    Template,
    TemplateIs,
    Yield,
)
from hpcray.protocol.sizes import check_refs, check_request

# A list this long may be one that a loop waits on.
_LOOPED = 64
# Of the objects that a timed-out get has waited for, so many are explained.
_EXPLAINED = 5
# A node that is not stopped answers within a turn; it asks others for up to 0.7 s.
_EXPLAIN_S = 1.0


class Client:
    """See the module. One per process: made by `init`, or by the zygote for all its workers."""

    def __init__(self, *, is_driver: bool) -> None:
        self.refs = ReferenceTable()
        self.core = Core(refs=self.refs, store=Store, wire=_wire)
        self.link = Link(self.core, is_driver=is_driver)
        self.is_driver = is_driver
        # Of each task; not methods: a call less.
        self.begin_task = self.core.begin_task
        self.on_runs: Callable[[list[Run | Stop]], None] = self.core.notes.append
        self._futures = Futures(self.core.objects, self._value_of, self._wake_helper)
        self.link.helper.complete = self._tick
        self.core.on_collect = self._collect_garbage
        self.link.helper.has_futures = lambda: self._futures.waiting
        self._pending = PendingCalls(self.core.objects)
        self._group: Group | None = None  # of the latest `wait`
        # One request for memory at a time: others would all be granted a segment each. (Only a
        # finaliser that puts makes a second one, of the same thread.)
        self._requesting = threading.RLock()
        # runtime_env's directories: digest of the packed content -> object.
        self.packages: dict[bytes, bytes] = {}
        self.imports: Imports | None = None  # of a driver whose workers are to have them

    # --- connection -------------------------------------------------------------------------------

    def open(self, sock: socket.socket) -> None:
        """First of all: this is the channel. All that does not depend on it is made before."""
        self.link.open(sock)

    def start(self, timeout_s: float, config: dict[str, Any] | None = None) -> None:
        """Introduce this process and wait for the node's welcome.

        Raises:
          LaunchError: no welcome in time, or the node went away.
        """
        with self.link as link:
            self.core.outbox.append(messages.Hello(os.getpid(), config))
            try:
                link.flush()
                done = link.wait(
                    self.core.welcomed, time.monotonic() + timeout_s, giving_back=False)
            except exceptions.RaySystemError as error:
                raise exceptions.LaunchError(f"the node could not start: {error}") from None
        if not done:
            raise exceptions.LaunchError(
                f"the node did not become ready within {timeout_s:g} s "
                "(HPCRAY_START_TIMEOUT_S); did every rank of the launch arrive?")

    def watch_always(self) -> None:
        """Show what workers print, and notice that the node is gone, while nobody calls us."""
        self.link.helper.start()

    def close(self) -> None:
        """Hang up. Pending waits in other threads end with an error."""
        self.link.close("hpcray was shut down")
        with self.link:
            self._futures.lost()
            self._group = None
        self._futures.complete()  # with the error of the wait that can no longer be answered

    def end_job(
        self, status: int, *, park: bool, look_s: float, is_stuck: Callable[[], bool]
    ) -> bool:
        """Tell the node that the driver is done and wait until the job is gone.

        `is_stuck` is asked every `look_s`; once it says so the node is given up: False.
        """
        with self.link as link:
            if link.lost is not None:
                return link.ended
            self.core.outbox.append(messages.EndJob(status, park))
            try:
                link.flush()
                while not link.wait(self.core.ended, time.monotonic() + look_s):
                    if is_stuck():
                        return False
                return True
            except exceptions.RaySystemError:
                return False

    @property
    def lost(self) -> str | None:
        return self.link.lost

    def _collect_garbage(self) -> None:
        gc.collect()
        if self.link.lost is None:
            self.flush(drain=True)

    def on_output(self, show: Callable[[Output], None]) -> None:
        """What to do with lines that workers have printed."""
        self.core.on_output = show

    def on_lost(self, tell: Callable[[str], None]) -> None:
        """What to do when the node is gone."""
        def lost(reason: str) -> None:
            with self.link:
                self._futures.lost()
            self._wake_helper()
            tell(reason)

        self.link.on_lost = lost

    # --- what this process is ---------------------------------------------------------------------

    @property
    def job_id(self) -> bytes:
        return self.core.job_id

    @property
    def rank(self) -> int:
        return self.core.rank

    @property
    def size(self) -> int:
        return self.core.size

    @property
    def number(self) -> int:
        """Among the clients of its node."""
        return self.core.number

    @property
    def session(self) -> dict[str, Any]:
        return self.core.session

    @property
    def task_prefix(self) -> bytes:
        return self.core.task_prefix

    def children_of(self, parent: Callable[[], tuple[bytes, int]]) -> None:
        """Child ids from now on descend from the (task, attempt) that `parent` tells, asked in the
        thread or coroutine that makes them."""
        self.core.children_of(parent)

    def set_actor(self, actor_id: bytes) -> None:
        """This process is that actor from now on."""
        self.refs.own = ids.creation_object_id(actor_id)

    # --- submitting -------------------------------------------------------------------------------

    def define(self, template: Template, function: DefineFunction | None) -> None:
        """Make the node know the template (and, before it, its function).

        A new function may refer to modules imported meanwhile.
        """
        news = self.imports.news() if self.imports is not None and function is not None else ()
        with self.link:
            if news:
                self.core.outbox.append(Preload(news))
            self.core.define(template, function)

    def is_defined(self, id_: bytes) -> bool:
        return self.core.is_defined(id_)

    def new_actor_id(self) -> bytes:
        with self.link:
            return self.core.new_actor_id()

    def submit(
        self, template_id: bytes, args: bytes, refs: bytes, dep_count: int, return_count: int,
        actor: bytes = b"",
    ) -> list[Any]:
        """Send a task (or, with `actor`, a method call); the refs of its returns, or its stream."""
        link = self.link
        link.enter()
        try:
            if link.lost is not None:
                link.check()
            result = self.core.submit(template_id, args, refs, dep_count, return_count, actor)
            if return_count < 0:
                result[0]._client = self
            link.linger(len(args) + len(refs))
            return result
        finally:
            link.leave()

    def create_actor(self, message: CreateActor) -> ObjectRef[Any]:
        with self.link as link:
            link.check()
            ref = self.core.create_actor(message)
            link.linger(len(message.args) + len(message.refs))
            return ref

    def check_pending(self, actor_id: bytes, limit: int, name: str) -> None:
        """Whether this process may call the actor once more.

        Raises:
          PendingCallsLimitExceeded: no.
        """
        with self.link as link:
            if self._pending.count(actor_id) >= limit:
                link.read(all=True)
            count = self._pending.count(actor_id)
        if count >= limit:
            raise exceeded(name, count, limit)

    def note_pending(self, actor_id: bytes, result: Any) -> None:
        """A call of an actor with a limit is in the air; `result`: its (first) return."""
        with self.link as link:
            self._pending.note(actor_id, result)
            link.linger(0)

    # A method, because the face must not import it: it brings cloudpickle along.
    pack_arguments = pack_arguments

    # --- objects ----------------------------------------------------------------------------------

    def put(self, value: Any) -> ObjectRef[Any]:
        packed = serialization.pack_atom(value, self.core.inline_max_bytes)
        return self.put_packed(packed) if packed else self.put_serialized(
            serialization.serialize(value))

    def put_packed(self, packed: bytes, contained: bytes = b"") -> ObjectRef[Any]:
        """`put` of a small packed value."""
        with self.link as link:
            if link.lost is not None:
                link.check()
            ref = self.core.put_inline(packed, contained)
            link.linger(len(packed) + len(contained))
        return ref

    def put_serialized(self, serialized: serialization.Serialized) -> ObjectRef[Any]:
        """
        Raises:
          ObjectStoreFullError: no room. ValueError: there are too many refs in it.
        """
        pickled, buffers, found = serialized
        contained = b"".join(found)
        check_refs(len(contained), "the value of this put holds")
        if serialized.nbytes <= self.core.inline_max_bytes:
            return self.put_packed(values.pack(pickled, buffers), contained)
        location = self.write(serialized)
        with self.link as link:
            link.check()
            ref = self.core.put_located(location, contained)
            link.flush()
        return ref

    def intern(self, object_id: bytes) -> ObjectRef[Any]:
        """The ref of an object met in a value being unpickled."""
        with self.link:
            return self.refs.intern(object_id)

    def pin_for_job(self, object_id: bytes) -> None:
        with self.link as link:
            self.core.outbox.append(PinForJob(object_id))
            link.linger(0)

    def get(self, refs: Sequence[ObjectRef[Any]], timeout_s: float | None) -> list[Any]:
        """The values, in order.

        Raises:
          GetTimeoutError: not all were there in time.
          an exception that is the value of one of them, as soon as it is known: others may be on
            their way. Of several that are known, the first in the order given.
        """
        if len(refs) == 1:
            value = refs[0]._value
            if value is None:
                value = self._get_one(refs[0], timeout_s)
            if value is not None:  # known already: no lock, no message
                return [_open(value)]
        return [_open(item) for item in self.get_packed(refs, timeout_s, fail_fast=True)]

    def _get_one(self, ref: ObjectRef[Any], timeout_s: float | None) -> bytes | None:
        """`get_packed` of one ref, for a small value; None: it is not one."""
        object_id = ref._id
        core = self.core
        objects = core.objects
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        late = False
        link = self.link
        link.enter()
        try:
            if ref._value is None and ref._view is None and object_id not in objects.arrivals:
                if object_id[20:24] != core.job_id:
                    self.check_session((object_id,))
                waiter = Waiter(1, (object_id,))
                called = core.want_result(object_id)
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
        objects = self.core.objects
        result: list[Any] = [ref._value for ref in refs]
        again = False
        while True:
            missing = [i for i, item in enumerate(result) if item is None]
            if not missing:
                return result
            waiter: Waiter = FailFast(0) if fail_fast else Waiter(0)
            done = True
            with self.link:
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
                        result[i] = self._open_arrived(refs[i])
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
                    result[i] = self._open_arrived(refs[i])

    def _await_values(
        self, absent: list[bytes], waiter: Waiter, deadline_s: float | None
    ) -> bool:
        """Inside. Ask for the values and wait for them (or the first error); False: too late."""
        self.check_session(absent)
        objects = self.core.objects
        waiter.ids = absent
        waiter.remaining = len(absent)
        objects.want(absent)
        objects.await_values(absent, waiter)
        in_time = False
        try:
            self.link.flush()
            in_time = self.link.wait(waiter, deadline_s)
            return in_time
        finally:
            if not in_time or waiter.result is not None:  # an error or interrupted: forget the rest
                objects.forget(objects.value_waiters, absent, waiter)

    def _explain(self, absent: list[bytes]) -> list[str]:
        """What the first of these objects wait for, in sentences. Behind it has come whatever the
        node had for us."""
        try:
            found = self.request("explain", {"ids": b"".join(absent[:_EXPLAINED])}, _EXPLAIN_S)
        except exceptions.RayError:
            return []  # the node is stopped, or gone
        return [sentence for sentence in found if sentence]

    def check_session(self, object_ids: Sequence[bytes]) -> None:
        """Raises ValueError: one of them is of no object of this session."""
        job = self.core.job_id
        made = references._of_none  # from bytes, by hand
        for object_id in object_ids:
            if object_id[20:24] != job:
                if object_id in made:
                    raise ValueError(
                        f"ObjectRef({object_id.hex()}) is of no object of this session: refs are "
                        "made by .remote() and put(), and passed on as refs")
                raise ValueError(
                    f"ObjectRef({object_id.hex()}) belongs to an earlier session: its object went "
                    "with shutdown()")

    def known_part(self, refs: list[Any], *, fetch: bool) -> int:
        """How many of the refs, from the first one on, are what the latest `wait` left."""
        group = self._group
        if group is not None and group.match(refs, LOCAL if fetch else READY):
            return group.known
        return 0

    def is_known(self, ref: Any) -> bool:
        """Whether the latest `wait` left it among others."""
        group = self._group
        return group is not None and group.has(ref)

    def wait(
        self, refs: list[Any], count: int, timeout_s: float | None, fetch: bool
    ) -> tuple[list[Any], list[Any]]:
        """Split `refs` into at most `count` ready ones and the rest, both in the given order.

        An ObjectRefGenerator stands for its next item.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        level = LOCAL if fetch else READY
        # A few of many refs are what a loop waits for, which comes again with the others.
        known = self.known_part(refs, fetch=fetch)
        looped = len(refs) >= _LOOPED and count * 4 <= len(refs)
        if not (looped or known) or set(map(type, refs[known:])) - {ObjectRef}:
            return self._wait_once(refs, count, deadline_s, level)
        objects = self.core.objects
        with self.link as link:
            group = self._group
            if group is None or not group.match(refs, level):
                if group is not None and not group.busy:
                    group.leave(objects.ready_waiters)
                group = Group(level)
            known = group.known
            if known < len(refs):
                absent = group.add(refs[known:], objects.ready_waiters)
                asked = [ref._id for ref in absent]
                self.check_session(asked)
                objects.watch(asked, level)
            group.busy = True
            self._group = group
            try:
                if group.need(count) > 0:
                    link.flush()
                    link.wait(group, deadline_s)
                    # Those not needed stay watched: the next wait finds them ready for free.
                return group.take(count)
            finally:
                group.busy = False
                if self._group is not group:  # another thread has waited meanwhile
                    group.leave(objects.ready_waiters)

    def _wait_once(
        self, refs: list[Any], count: int, deadline_s: float | None, level: int
    ) -> tuple[list[Any], list[Any]]:
        """Streams may be among them, whose ids change."""
        objects = self.core.objects
        with self.link as link:
            absent = [ref for ref in refs if ref._ready < level]
            waiter = Waiter(count - (len(refs) - len(absent)))
            if waiter.remaining > 0:
                awaited = waiter.ids = [ref._id for ref in absent]
                self.check_session(awaited)
                # A stream tells by itself.
                objects.watch([r._id for r in absent if type(r) is ObjectRef], level)
                for object_id in awaited:
                    waiters.add(objects.ready_waiters, object_id, waiter)
                try:
                    link.flush()
                    link.wait(waiter, deadline_s)
                finally:
                    if waiter.remaining > 0 or count < len(refs):
                        objects.forget(objects.ready_waiters, awaited, waiter)
        ready: list[Any] = []
        rest: list[Any] = []
        for ref in refs:
            (ready if len(ready) < count and ref._ready >= level else rest).append(ref)
        return ready, rest

    def future(self, ref: ObjectRef[Any]) -> Future[Any]:
        """A future of the ref's value. To cancel it ends the wait, and not the task."""
        with self.link as link:
            link.check()
            if ref._id[20:24] != self.core.job_id and ref._value is None:
                self.check_session((ref._id,))
            self.link.helper.start()
            future = self._futures.of(ref)
            link.flush()
        self._wake_helper()
        return future

    def _value_of(self, ref: ObjectRef[Any]) -> Any:
        return self.get((ref,), None)[0]

    def _wake_helper(self) -> None:
        self.link.helper.wake()

    def _tick(self) -> None:
        """By the helper, now and then."""
        self._futures.complete()
        self._let_go()

    def _let_go(self) -> None:
        """Of the refs of a `wait` whose list the user has dropped."""
        group = self._group
        if group is not None and group.abandoned():
            with self.link:
                if self._group is group and group.abandoned():
                    group.leave(self.core.objects.ready_waiters)
                    self._group = None

    def complete_futures(self) -> None:
        """By an event loop that reads the channel itself."""
        self._futures.complete()

    # --- streams ----------------------------------------------------------------------------------

    def next_item(self, generator: ObjectRefGenerator[Any]) -> ObjectRef[Any] | None:
        """The ref of the stream's next item, waited for; None at the end."""
        core = self.core
        stream = generator._stream
        link = self.link
        link.enter()
        try:
            while stream.known == stream.taken and not stream.ended:
                if link.lost is not None:
                    link.check()
                waiter = Waiter(1)
                object_id = stream.next_id
                table = core.objects.ready_waiters
                waiters.add(table, object_id, waiter)
                try:
                    link.flush()
                    link.wait(waiter, None)
                finally:
                    if waiter.remaining > 0:
                        waiters.remove(table, object_id, waiter)
            ref = core.streams.take_item(stream)
            if stream.windowed and core.outbox:
                link.flush()  # the task may wait for that
            return ref
        finally:
            link.leave()

    def item_future(self, generator: ObjectRefGenerator[Any]) -> Future[None]:
        """Completed when the stream has another item or its end."""
        with self.link as link:
            link.check()
            self.link.helper.start()
            future = self._futures.of_item(generator)
            link.flush()
        self._wake_helper()
        return future

    def open_room(self, task_id: bytes) -> Room:
        with self.link:
            return self.core.rooms.open(task_id)

    def close_room(self, task_id: bytes) -> None:
        with self.link:
            self.core.rooms.close(task_id)

    def await_room(self, room: Room, needed: int) -> None:
        """Wait until the consumer of a stream made here has taken `needed` items."""
        with self.link as link:
            if not room.need(needed):
                link.flush()
                link.wait(room, None)

    def has_room(self, room: Room, needed: int) -> bool:
        """As `await_room`, but `room.wake` is called instead."""
        with self.link as link:
            link.flush()
            return room.need(needed)

    # --- memory -----------------------------------------------------------------------------------

    def write(self, serialized: serialization.Serialized) -> Located:
        """Copy a value into shared memory.

        Raises:
          ObjectStoreFullError: no room, and none to be expected.
        """
        nbytes = serialized.nbytes
        segment, offset, view = self._allocate(nbytes)
        location = Located(segment, offset, nbytes)
        try:
            if serialized.buffers:
                values.pack_into(view[:nbytes], serialized.pickled, serialized.buffers)
            else:
                view[0:1] = b"\0"
                view[1:nbytes] = serialized.pickled
        except BaseException:  # interrupted: nobody will hear of the range
            self.discard(location)
            raise
        return location

    def write_packed(self, packed: bytes) -> Located:
        """As `write`, of what is packed already."""
        segment, offset, view = self._allocate(len(packed))
        view[: len(packed)] = packed
        return Located(segment, offset, len(packed))

    def discard(self, location: Located) -> None:
        """What was written will not be told to anybody."""
        with self.link:
            self.core.store.release(location)

    def _allocate(self, nbytes: int) -> tuple[int, int, memoryview]:
        store = self.core.store
        with self.link:
            found = store.allocate(nbytes)
        if found is not None:
            return found
        with self._requesting:
            while True:
                with self.link as link:
                    link.check()
                    # Freed ranges may have come back while we waited for our turn, or lie unread.
                    link.read(all=True)
                    found = store.allocate(nbytes)
                    if found is not None:
                        return found
                    waiter = store.request(nbytes)
                    link.flush(drain=True)
                    link.wait(waiter, None, giving_back=False)
                answer = waiter.result
                if isinstance(answer, SegmentDenied) and not answer.retry:
                    raise exceptions.ObjectStoreFullError(
                        answer.need_bytes, answer.used_bytes, answer.capacity_bytes,
                        answer.reason or answer.contents)

    def _open_arrived(self, ref: ObjectRef[Any]) -> Any:
        """The pinned array of an object that has arrived; None if another thread took it first."""
        objects = self.core.objects
        with self.link:
            view = objects.find(ref)
            if view is not None:
                return view
            location = objects.take_arrival(ref._id)
        if location is None:
            return None
        array = self.pinned(ref._id, location)
        ref._view = weakref.ref(array)
        return array

    def pinned(self, object_id: bytes, location: Located) -> Any:
        """An array over a location the node has pinned for us; its death sends the Unpin."""
        store = self.core.store
        with self.link as link:
            while not store.is_open(location.segment):
                waiter = store.open(location.segment)
                link.flush(drain=True)
                link.wait(waiter, None, giving_back=False)
            view = store.view(location)
        unpins = self.core.objects.unpins

        def release(object_id: bytes = object_id) -> None:
            unpins.append(object_id)

        return pinned_view(view, release)

    def unpin(self, object_id: bytes) -> None:
        """Of what the node has pinned for us and nobody will open."""
        self.core.objects.unpins.append(object_id)

    # --- the slow path ----------------------------------------------------------------------------

    def request(
        self, name: str, arguments: Any = None, timeout_s: float | None = None,
        rows: list[Any] | None = None,
    ) -> Any:
        """Ask the node something rare: the reply or its error. `rows` takes what comes in parts."""
        found: list[Any] = [] if rows is None else rows
        reply, _ = self._ask(name, arguments, timeout_s, found)
        return found + reply.result if rows is None and found else reply.result

    def look_up(self, name: str, arguments: Any) -> tuple[Any, ObjectRef[Any] | None]:
        """Ask the node for a name of an actor; the answer, and the ref that makes the actor's
        handle count. What this process has dropped comes first: it may be the last handle."""
        self.flush(drain=True)
        reply, ref = self._ask(name, arguments, None, [])
        return reply.result, ref

    def _ask(
        self, name: str, arguments: Any, timeout_s: float | None, found: list[Any]
    ) -> tuple[Reply, ObjectRef[Any] | None]:
        check_request(len(messages.encode(arguments)), name)
        with self.link as link:
            link.check()
            self.refs.tell_holds(self.core.outbox)
            number, waiter = self.core.requests.ask(name, arguments, found)
            try:
                link.flush()
                deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
                if not link.wait(waiter, deadline_s):
                    raise exceptions.GetTimeoutError(f"no answer to {name!r} in {timeout_s} s")
            finally:
                self.core.requests.forget(number)
        reply, ref = waiter.result
        if reply.error is not None:
            raise serialization.failure_to_exception(reply.error)
        return reply, ref

    def notify(self, message: Any) -> None:
        """Send a one-way message now."""
        with self.link as link:
            link.check()
            self.refs.tell_holds(self.core.outbox)
            self.core.outbox.append(message)
            link.flush()

    # --- of workers -------------------------------------------------------------------------------

    def fetch_template(self, template_id: bytes, home: int) -> TemplateIs:
        """What a template id stands for (a worker meets it for the first time)."""
        with self.link as link:
            waiter = self.core.requests.fetch_template(template_id, home)
            link.flush(drain=True)
            link.wait(waiter, None, giving_back=False)
            answer: TemplateIs = waiter.result
            return answer

    def knows_function(self, function_id: bytes) -> None:
        """The node has it: nested submissions of it need no definition."""
        self.core.knows_function(function_id)

    @property
    def cancelled(self) -> dict[bytes, None]:
        """Tasks of this worker that were cancelled."""
        return self.core.cancelled

    def on_cancel(self, tell: Callable[[bytes], None]) -> None:
        self.core.on_cancel = tell

    def report(self, message: Any, reply_to: int = -1) -> None:
        """Queue a task's outcome; `flush` sends it, and the value of a Done to `reply_to`."""
        if type(message) is Done or (type(message) is Yield and not message.returned.contained):
            self.core.notes.append((message, reply_to))
        else:  # it may name refs, which die only when the lock is free again
            with self.link:
                self.core.report(message, reply_to)

    def flush(self, drain: bool = False) -> None:
        """Send what is queued; with `drain` (before a process idles) dropped refs too."""
        if drain and self._group is not None:
            self._let_go()
        link = self.link
        link.enter()
        try:
            link.flush(drain)
        finally:
            link.leave()

    def forked(self) -> None:
        """This process is a child of the one that made the client."""
        self.link.forked()


def _wire(descriptor: int) -> socket.socket:
    return socket.socket(fileno=descriptor)


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
    if absent > _EXPLAINED:
        parts.append(f"and {absent - _EXPLAINED} more")
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


def _after_fork_in_child() -> None:
    # The child shares the socket but may not use it: its client is dead, its finalisers silent.
    client = references.client_or_none()
    if client is not None:
        client.forked()
        references.forked()


os.register_at_fork(after_in_child=_after_fork_in_child)

__all__ = ["STREAMED", "WINDOWED", "Client"]
