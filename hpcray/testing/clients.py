"""The client half of a simulated process: what a script may do in a driver and in a task.

What they know and say is the real client's core (`client/core.py`), over channels that are lists of
datagrams: cut at a small limit, full now and then, and read in any order. They run *scripts*:
generators that yield where a real process would wait. So one thread can interleave hundreds of them
in a seeded order.

    def body(p, seed, pairs):          # p: the Process that runs it
        ref = yield from p.put([seed, []])
        value = yield from p.get(ref)
        return [seed, [[ref, seed]]]

Values are lists of plain data, refs anywhere inside. A value larger than INLINE_BYTES lives in
the node's simulated shared memory; it comes back as a `Value` whose `view` pins it, and the view
checks at its death that nobody has touched the bytes meanwhile.

No threads, no sockets, no user pickles. What a script must not do: wait other than by `yield`.
Running tasks is in `processes.py`.
"""

from __future__ import annotations

import errno
import weakref
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from hpcray.client import waiters
from hpcray.client.core import Core
from hpcray.client.groups import Group
from hpcray.client.references import LOCAL, READY, ObjectRef, ReferenceTable
from hpcray.client.store import Store
from hpcray.client.streams import STREAMED, WINDOWED, ObjectRefGenerator
from hpcray.client.waiters import Waiter
from hpcray.protocol import ids, messages, values
from hpcray.protocol import messages as m
from hpcray.protocol.sizes import parts
from hpcray.testing.history import History
from hpcray.testing.memory import Arena, Readers, View
from hpcray.testing.values import (
    INLINE_BYTES,
    SystemFailed,
    TaskFailed,
    Value,
    pack,
    unpack,
)
from hpcray.testing.world import World

# Small, so that the limits of channels are met without moving megabytes.
DATAGRAM_BYTES = 2048

Script = Generator[Any, Any, Any]
Ref = ObjectRef[Any]
Stream = ObjectRefGenerator[Any]


def reference_kinds(dropped: deque[bytes]) -> tuple[type[Any], type[Any]]:
    """Refs and generators of one process: their deaths are its drops."""

    class SimulatedRef(ObjectRef[Any]):
        __slots__ = ()

        def __del__(self) -> None:  # type: ignore[override]
            dropped.append(self._id)

    class SimulatedGenerator(ObjectRefGenerator[Any]):
        __slots__ = ()

        def __del__(self) -> None:  # type: ignore[override]
            dropped.append(self._stream.task_id)

    return SimulatedRef, SimulatedGenerator


def over(waiter: Waiter) -> Callable[[], bool]:
    def over() -> bool:
        return waiter.remaining <= 0

    return over


class _Wire:
    """Stands for a duplicate of the node's end of another process's channel."""

    def __init__(
        self, world: World, neighbours: Mapping[int, Client], count: dict[str, int], number: int,
        box: str,
    ) -> None:
        self._world = world
        self._neighbours = neighbours
        self._count = count
        self._number = number
        self._box = box

    def send(self, datagram: bytes, _flags: int) -> int:
        target = self._neighbours.get(self._number)
        if target is None or not target.alive:
            raise BrokenPipeError(errno.EPIPE, "closed")
        if self._world.rng.random() < 0.1:
            raise BlockingIOError  # it is full
        if self._box == "inbox":
            target.inbox.append((datagram, []))
        else:
            target.tasks.append(datagram)
        self._count[self._box] += 1
        return len(datagram)

    def close(self) -> None:
        pass


class Client:
    """The cluster calls `step`; scripts call the rest."""

    def __init__(
        self, world: World, history: History, rank: int, number: int, *,
        neighbours: Mapping[int, Client], send: Callable[[bytes], None],
    ) -> None:
        """`neighbours`: the processes of its node, by number. `send`: a datagram to the node."""
        self.world = world
        self.history = history
        self.rank = rank
        self.number = number
        self._send = send
        self.alive = True
        # Client channel, from the node: datagrams, and what comes with them.
        self.inbox: deque[tuple[bytes, list[Any]]] = deque()
        self.tasks: deque[bytes] = deque()  # task channel, unread
        self.script: Script | None = None
        self.waiting: Callable[[], bool] | None = None
        self.wake_s: float | None = None
        self.failed: BaseException | None = None
        self.exit_status = 0
        self.rows: dict[int, list[Any]] = {}  # parts of replies, by request
        self._cancelled = False  # what it runs, and has not noticed
        self._dropped: deque[bytes] = deque()
        kind, generator = reference_kinds(self._dropped)
        self.arena = Arena()
        self.core = Core(
            refs=ReferenceTable(kind, self._dropped),
            store=lambda outbox: Store(outbox, self.arena, Readers()),
            wire=lambda descriptor: _Wire(
                world, neighbours, history.direct, descriptor[1], descriptor[0]),
            generator=generator)
        core = self.core
        core.number = core.direct.number = number
        core.tail = ids.id_tail(rank, world.job_id)
        if number == 0:
            core.begin_task(ids.driver_task_id(rank, world.job_id), 0)
        else:
            core.begin_task(b"", 0, number.to_bytes(4, "little"))
        # Encoded, and not taken by the socket yet: as a real process, it does nothing else then.
        self._unsent: deque[bytes] = deque()
        # The node has been told of what is sent past it, and it is not sent yet.
        self.due = False
        self._datagrams = 0  # to the node

    @property
    def outbox(self) -> list[Any]:
        return self.core.outbox

    def __repr__(self) -> str:
        what = self._does()
        if self.waiting is not None:
            what += f", waits ({self.waiting.__qualname__})"
        return f"process {self.number} of rank {self.rank}: {what}"

    # --- of processes that run tasks ----------------------------------------

    def _does(self) -> str:
        """For people."""
        return "idle"

    @property
    def has_work(self) -> bool:
        """Whether it has something to run next."""
        return False

    def _work(self) -> None:
        """Begin it."""

    def _before_wait(self) -> m.Blocked | None:
        """What to say before it really waits."""
        return None

    # --- the loop ----------------------------------------

    @property
    def runnable(self) -> bool:
        if not self.alive:
            return False
        if (self.inbox or self._unsent or self._dropped or self.due
                or self.core.has_more(self.world.now_s) or self.core.refs.new_holds):
            return True
        if self.script is not None:
            return self.waiting is None or self._cancelled or self.waiting()
        return self.has_work

    @property
    def busy(self) -> bool:
        """Something is lost with it."""
        return bool(self.core.direct.waiting or self._unsent)

    def step(self) -> bool:
        """Do one small thing; False if there was nothing to do."""
        if not self.runnable:
            return False
        rng = self.world.rng
        if self._unsent:
            self._push()
            return True
        if self.due:
            self._speak()
            return True
        if self.inbox:
            self.read_one()
            if rng.random() < 0.3:
                return True
        if self.waiting is not None and rng.random() < 0.02:
            self._finalise()
        if self.script is not None:
            if self.waiting is None or self._cancelled or self.waiting():
                self._resume()
        else:
            self._work()
        if (self.alive and not (self.due or self._unsent)
                and (rng.random() < 0.5 or not self.has_work)):
            self.flush()  # a real process lingers up to 1 ms
        return True

    def _finalise(self) -> None:
        """What a finaliser of the user's may do while its process waits: put something, and let go
        of it."""
        ref = self.core.put_inline(*pack([]))
        del ref

    def start(self, script: Script) -> None:
        """Driver: run a program."""
        self.script = script
        self.waiting = None

    def _resume(self) -> None:
        assert self.script is not None
        self.wake_s = None
        try:
            if self._cancelled and self.waiting is not None:  # it has begun, and waits
                self._cancelled = False
                self.waiting = self.script.throw(TaskFailed("TaskCancelledError: interrupted"))
            else:
                self.waiting = self.script.send(None)
        except StopIteration:
            self.script = None
            self.waiting = None
        except Exception as error:
            self.script = None
            self.waiting = None
            self.failed = error
            self.world.fault(f"{self!r} failed: {error!r}", error)

    def read_one(self) -> None:
        datagram, descriptors = self.inbox.popleft()
        batch = messages.decode_to_client(datagram)
        for message in batch:
            if type(message) is m.Yielded:
                stream = self.core.streams.find(message.task_id)
                if stream is not None and message.index != stream.known:
                    self.world.fault(
                        f"{self!r}: item {message.index} after {stream.known} items")
            self.core.receive([message], descriptors)
        while self.core.effects:
            self.core.effects.popleft()()

    def flush(self) -> None:
        """As `Link.flush`."""
        if self.due and not self._unsent:
            self._speak()
        outbox = self.core.collect(self.world.now_s, drain=True)
        self._unsent.extend(parts(outbox, messages.encode, DATAGRAM_BYTES))
        outbox.clear()
        self._push()

    def _push(self) -> None:
        """What is encoded, as far as the socket takes it."""
        while self._unsent:
            if self.world.rng.random() < 0.05:
                return  # it is full
            self._send(self._unsent.popleft())
            self._datagrams += 1
        self.due = self.core.direct.waiting
        if self.due and self.world.rng.random() < 0.7:  # else it may die between the two
            self._speak()

    def _speak(self) -> None:
        self.due = False
        self.core.direct.send(self.outbox, self._datagrams)

    def die(self, status: int = -9) -> None:
        """The process is gone at once: what it had not flushed is lost with it."""
        self.alive = False
        self.exit_status = status
        self.outbox.clear()
        self._unsent.clear()
        script, self.script = self.script, None
        if script is not None:
            script.close()  # nobody dies inside its own script: a Stop is not one
        self.waiting = None

    # --- values ----------------------------------------

    def put(self, value: Any) -> Generator[Any, Any, Ref]:
        packed, contained = pack(value)
        if len(packed) <= INLINE_BYTES:
            return self.core.put_inline(packed, contained)
        location = yield from self._write(packed)
        ref = self.core.put_located(location, contained)
        del value
        return ref

    def _write(self, packed: bytes) -> Generator[Any, Any, m.Located]:
        store = self.core.store
        while True:
            while self.inbox:
                self.read_one()
            found = store.allocate(len(packed))
            if found is not None:
                segment, offset, view = found
                view[:] = packed
                return m.Located(segment, offset, len(packed))
            answer = yield from self._exchange(store.request(len(packed)))
            if type(answer) is m.SegmentDenied and not answer.retry:
                raise SystemFailed(values.Failure("ObjectStoreFullError", repr(answer)))

    def _exchange(self, waiter: Waiter) -> Generator[Any, Any, Any]:
        self.flush()

        def answered() -> bool:
            return waiter.remaining <= 0

        while not answered():
            yield answered
        return waiter.result

    def request(self, name: str, arguments: Any = None) -> Generator[Any, Any, m.Reply]:
        self.core.refs.tell_holds(self.outbox)
        rows: list[Any] = []
        number, waiter = self.core.requests.ask(name, arguments, rows)
        self.rows[number] = rows
        reply: m.Reply
        reply, _ = yield from self._exchange(waiter)
        return reply

    def look_up(self, name: str, arguments: Any) -> Generator[Any, Any, tuple[m.Reply, Ref | None]]:
        """Ask for a name of an actor; the ref counts as its handle. (Drops wait for the end of the
        batch here, where a real process sends them first: the more difficult order.)"""
        self.core.refs.tell_holds(self.outbox)
        _, waiter = self.core.requests.ask(name, arguments, [])
        found: tuple[m.Reply, Ref | None] = yield from self._exchange(waiter)
        return found

    def _view(self, object_id: bytes, location: m.Located) -> Generator[Any, Any, View]:
        store = self.core.store
        while not store.is_open(location.segment):
            yield from self._exchange(store.open(location.segment))
        return View(object_id, store.view(location), self.core.objects.unpins,
                    self.world.fault)

    # --- get and wait ----------------------------------------

    def get(self, ref: Ref) -> Generator[Any, Any, Any]:
        """The value; raises TaskFailed or SystemFailed."""
        found = yield from self.get_packed([ref])
        return self.open(found[0])

    def _unpack(self, packed: bytes, deps: Sequence[Any] = ()) -> Any:
        return unpack(packed, self.core.refs.intern, self._fault, deps)

    def _fault(self, text: str) -> None:
        self.world.fault(f"{self!r}: {text}")

    def open(self, found: bytes | View) -> Any:
        if isinstance(found, bytes):
            return self._unpack(found)
        value = Value(self._unpack(found.packed()))
        value.view = found
        return value

    def get_packed(self, refs: list[Ref]) -> Generator[Any, Any, list[bytes | View]]:
        objects = self.core.objects
        result: list[Any] = [None] * len(refs)
        while True:
            missing = [i for i, item in enumerate(result) if item is None]
            if not missing:
                return result
            absent = objects.look(refs, result)
            if absent:
                waiter = Waiter(len(absent))
                called = None
                if len(refs) == 1:
                    called = self.core.want_result(refs[0]._id)
                else:
                    objects.want(absent)
                objects.await_values(list(absent), waiter)
                try:
                    yield from self._wait(over(waiter))
                finally:
                    if waiter.remaining > 0:
                        objects.forget(objects.value_waiters, list(absent), waiter)
                if called is not None:
                    called.over(ids.task_of_object(refs[0]._id), refs[0]._value)
            for i in missing:
                ref = refs[i]
                if result[i] is None:
                    result[i] = objects.find(ref)
                if result[i] is None:
                    location = objects.take_arrival(ref._id)
                    if location is not None:
                        result[i] = yield from self._view(ref._id, location)
                        ref._view = weakref.ref(result[i])

    def wait(self, refs: list[Ref], fetch: bool = True) -> Generator[Any, Any, None]:
        """Until all are ready."""
        level = LOCAL if fetch else READY
        objects = self.core.objects
        given = list({ref._id: ref for ref in refs}.values())
        group = Group(level)
        absent = group.add(given, objects.ready_waiters)
        objects.watch([ref._id for ref in absent], level)
        group.need(len(given))
        try:
            yield from self._wait(over(group))
        finally:
            ready, rest = group.take(len(given))
            group.leave(objects.ready_waiters)
        if ready != given or rest:
            self.world.fault(f"{self!r}: {len(rest)} of {len(given)} refs are not ready")

    def _wait(self, condition: Callable[[], bool]) -> Script:
        """As a real client: give the CPU back only if it really waits."""
        self.flush()
        while self.due or self._unsent:  # it may die now
            yield lambda: not (self.due or self._unsent)
        if condition():
            return
        said = self._before_wait()
        if said is not None:
            self.outbox.append(said)
            self.flush()
        try:
            while not condition():
                yield condition
        finally:
            if said is not None and self.alive:
                self.outbox.append(m.Unblocked())
                self.flush()

    def ask(self, ref: Ref) -> None:
        """A get that is given up at once (as one that timed out): the answer finds nobody."""
        if self.core.objects.find(ref) is None:
            self.core.objects.want((ref._id,))

    def sleep(self, seconds: float) -> Script:
        """Compute for that long, without giving anything back."""
        until_s = self.world.now_s + seconds

        def awake() -> bool:
            return self.world.now_s >= until_s

        while not awake():
            self.wake_s = until_s
            yield awake

    # --- submitting ----------------------------------------

    def template(self, name: str, **options: Any) -> m.Template:
        """Define (once) the template of a registered body with these options."""
        key = repr((name, sorted(options.items()))).encode()
        template_id = blake2b(key, digest_size=16).digest()
        function_id = blake2b(name.encode(), digest_size=16).digest()
        kind = options.pop("kind", m.TASK)
        if kind != m.METHOD:
            options.setdefault("resources", (("CPU", m.UNIT),))
        template = m.Template(template_id, function_id, kind, name, method=name, **options)
        function = None
        if kind != m.METHOD:
            function = m.DefineFunction(function_id, name, name.encode())
        self.core.define(template, function)
        return template

    def submit(self, name: str, args: Sequence[Any] = (), **options: Any) -> list[Ref]:
        """A task; refs directly in `args` are dependencies. The refs of its returns."""
        return self._submit(self.template(name, **options), args)

    def _submit(
        self, template: m.Template, args: Sequence[Any], actor: bytes = b""
    ) -> list[Any]:
        deps: list[bytes] = []
        packed, contained = pack(list(args), deps)
        count = template.return_count
        if template.stream:
            count = WINDOWED if template.stream_window else STREAMED
        found = self.core.submit(
            template.template_id, packed, b"".join(deps) + contained, len(deps), count, actor)
        task_id = self.core.last_task_id
        self.history.submitted(task_id, template)
        if actor:
            self.history.called(actor, self.rank, self.number, task_id)
        return found

    def open_stream(
        self, name: str, args: Sequence[Any] = (), *, window: int = 0, **options: Any
    ) -> Stream:
        """A generator task (its completion is not asked for)."""
        template = self.template(name, stream=m.STREAM, stream_window=window, **options)
        stream: Stream = self._submit(template, args)[0]
        return stream

    def next_item(self, stream: Stream) -> Generator[Any, Any, Ref | None]:
        """The ref of the next item; None at the end."""
        objects = self.core.objects
        while not stream._ready:
            waiter = Waiter(1)
            waiters.add(objects.ready_waiters, stream._id, waiter)
            try:
                yield from self._wait(over(waiter))
            finally:
                if waiter.remaining > 0:
                    waiters.remove(objects.ready_waiters, stream._id, waiter)
        return self.core.streams.take_item(stream._stream)

    def named_actor(
        self, name: str, body: str, args: Sequence[Any] = (), *, get_if_exists: bool = True,
        **options: Any
    ) -> Generator[Any, Any, Ref]:
        """The handle of the actor of this name, made if there is none."""
        actor_id = self.core.new_actor_id()
        reply, held = yield from self.look_up("reserve_name", {
            "namespace": "", "name": name, "actor_id": actor_id, "handle": b"",
            "get_if_exists": get_if_exists})
        if reply.error is not None:
            raise SystemFailed(reply.error)
        return held if held is not None else self._create_actor(actor_id, name, body, args, options)

    def create_actor(self, name: str, args: Sequence[Any] = (), **options: Any) -> Ref:
        """The handle: a ref to the creation object."""
        return self._create_actor(self.core.new_actor_id(), "", name, args, options)

    def _create_actor(
        self, actor_id: bytes, name: str, body: str, args: Sequence[Any], options: dict[str, Any]
    ) -> Ref:
        options.setdefault("held_resources", ())
        template = self.template(body, kind=m.ACTOR_CREATION, **options)
        deps: list[bytes] = []
        packed, contained = pack(list(args), deps)
        handle = self.core.create_actor(m.CreateActor(
            actor_id, template.template_id, packed, b"".join(deps) + contained, len(deps), name))
        self.history.submitted(ids.creation_task_id(actor_id), template)
        return handle

    def call(self, handle: Ref, name: str, args: Sequence[Any] = (), **options: Any) -> list[Ref]:
        """A method call; the method is the registered body `name`."""
        template = self.template(name, kind=m.METHOD, **options)
        return self._submit(template, args, ids.actor_of_object(handle._id))
