"""Simulated clients: the driver and the workers of `SimulatedCluster`.

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
"""

from __future__ import annotations

import errno
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
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
    NONE,
    SystemFailed,
    TaskFailed,
    Value,
    pack,
    unpack,
)
from hpcray.testing.world import World, short

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


def _over(waiter: Waiter) -> Callable[[], bool]:
    def over() -> bool:
        return waiter.remaining <= 0

    return over


class _Wire:
    """Stands for a duplicate of the node's end of another process's channel."""

    def __init__(
        self, world: World, neighbours: dict[int, Process], count: dict[str, int], number: int,
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


class Process:
    """One client. The cluster calls `step`; scripts call the rest."""

    def __init__(
        self, world: World, history: History, bodies: dict[str, Callable[..., Any]], rank: int,
        number: int, *, neighbours: dict[int, Process], send: Callable[[bytes], None],
        exited: Callable[[Process], None],
    ) -> None:
        """`neighbours`: the processes of its node, by number. `send`: a datagram to the node."""
        self.world = world
        self.history = history
        self.rank = rank
        self.number = number
        self._bodies = bodies
        self._neighbours = neighbours
        self._send = send
        self._exited = exited
        self.alive = True
        # Client channel, from the node: datagrams, and what comes with them.
        self.inbox: deque[tuple[bytes, list[Any]]] = deque()
        self.tasks: deque[bytes] = deque()  # task channel, unread
        self.queue: deque[m.Run | m.Stop] = deque()
        self.script: Script | None = None
        self.waiting: Callable[[], bool] | None = None
        self.wake_s: float | None = None
        self.run: m.Run | None = None
        self.failed: BaseException | None = None
        self.actor: dict[str, Any] | None = None  # state of the hosted actor
        self.exit_status = 0
        self.rows: dict[int, list[Any]] = {}  # parts of replies, by request
        self._began_s = 0.0
        self._cancelled = False
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
        core.on_cancel = self._on_cancel
        core.number = core.neighbours.number = number
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
        self._environment: bytes | None = None
        self._emitted = 0
        self._templates: dict[bytes, m.Template] = {}

    @property
    def outbox(self) -> list[Any]:
        return self.core.outbox

    def __repr__(self) -> str:
        what = "idle"
        if self.run is not None:
            what = f"runs {self._name(self.run)} {short(self.run.task_id)}"
        if self.waiting is not None:
            what += f", waits ({self.waiting.__qualname__})"
        return f"process {self.number} of rank {self.rank}: {what}"

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
        return bool(self.queue or self.tasks)

    @property
    def busy(self) -> bool:
        """Something is lost with it."""
        return bool(self.run or self.core.neighbours.waiting or self._unsent)

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
        elif self.queue:
            self._start(self.queue.popleft())
        elif self.tasks:
            batch = messages.decode_to_worker(self.tasks.popleft())
            self.core.neighbours.on_runs(batch)
            self.queue.extend(batch)
        if (self.alive and not (self.due or self._unsent)
                and (rng.random() < 0.5 or not (self.queue or self.tasks))):
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

    def _on_cancel(self, task_id: bytes) -> None:
        if self.run is not None and self.run.task_id == task_id:
            self._cancelled = True

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
        self.due = self.core.neighbours.waiting
        if self.due and self.world.rng.random() < 0.7:  # else it may die between the two
            self._speak()

    def _speak(self) -> None:
        self.due = False
        self.core.neighbours.send(self.outbox, self._datagrams)

    def die(self, status: int = -9) -> None:
        """The process is gone at once: what it had not flushed is lost with it."""
        self.alive = False
        self.exit_status = status
        self.outbox.clear()
        self._unsent.clear()
        script, self.script = self.script, None
        if script is not None:
            script.close()  # nobody dies inside its own script: a Stop is not one
        self.actor = None
        self.waiting = None
        self._exited(self)

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
                    yield from self._wait(_over(waiter))
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
            yield from self._wait(_over(group))
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
        worker = self.number != 0
        if worker:
            unstarted: tuple[bytes, ...] = ()
            if self.actor is None:
                unstarted = tuple(i.task_id for i in self.queue if type(i) is m.Run)
                self.queue = deque(i for i in self.queue if type(i) is m.Stop)
            self.outbox.append(m.Blocked(unstarted))
            self.flush()
        try:
            while not condition():
                yield condition
        finally:
            if worker and self.alive:
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
                yield from self._wait(_over(waiter))
            finally:
                if waiter.remaining > 0:
                    waiters.remove(objects.ready_waiters, stream._id, waiter)
        return self.core.streams.take_item(stream._stream)

    def emit(self, value: Any) -> Script:
        """The next item of the stream this task makes; waits for room if it has a window."""
        run = self.run
        assert run is not None
        packed, contained = pack(value)
        item: bytes | m.Located = packed
        if len(packed) > INLINE_BYTES:
            item = yield from self._write(packed)
        self.core.report(m.Yield(run.task_id, self._emitted, m.Return(item, contained)))
        del value
        self._emitted += 1
        window = self._templates[run.template_id].stream_window
        if window:
            room = self.core.rooms.find(run.task_id)
            if not room.need(self._emitted - window + 1):
                yield from self._wait(_over(room))

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

    # --- running (workers) ----------------------------------------

    def _name(self, run: m.Run) -> str:
        template = self._templates.get(run.template_id)
        return "?" if template is None else template.name

    def _start(self, item: m.Run | m.Stop) -> None:
        if type(item) is m.Stop:
            self.actor = None
            self.flush()
            if self.due:
                self._speak()
            self.die(0)
            return
        assert isinstance(item, m.Run)
        self.run = item
        self.waiting = None
        self.script = self._execute(item)

    def _execute(self, run: m.Run) -> Script:
        self._began_s = self.world.now_s
        report: Any
        template = None
        try:
            template = yield from self._load(run)
            args = yield from self._arguments(run)
            self.core.begin_task(run.task_id, run.attempt)
            if template.kind != m.METHOD:
                if self._environment not in (None, template.environment):
                    self.world.fault(f"{self!r} has run in {self._environment!r}, not in "
                                       f"{template.environment!r}")
                self._environment = template.environment
            self.history.started(run, template, self.rank)
            body = self._bodies[template.name]
            self._emitted = 0
            if template.stream_window:
                self.core.rooms.open(run.task_id)
            if template.kind == m.ACTOR_CREATION:
                self.actor = {"actor_id": run.actor_id}
            result = body(self, *args)
            if isinstance(result, Generator):
                result = yield from result
            args.clear()
            report = yield from self._outcome(run, template, result)
            del result
        except (TaskFailed, SystemFailed) as error:
            # As the real worker: an error among the arguments, or raised by a get, is the outcome.
            packed = bytes((values.ERROR,)) + str(error).encode()
            if run.actor_id and ids.creation_task_id(run.actor_id) == run.task_id:
                packed = values.pack_failure(values.Failure("ActorDiedError", str(error)))
                self.queue.append(m.Stop())
            value: bytes | m.Located = packed
            retry = template is not None and template.retry_exceptions \
                and "TaskCancelledError" not in str(error)
            if (len(packed) > INLINE_BYTES and not retry and template is not None
                    and template.return_count == 1 and not template.stream
                    and template.kind != m.ACTOR_CREATION):
                value = yield from self._write(packed)
            report = m.Failed(run.task_id, run.attempt, self._run_us(), value, retry)
        self.core.rooms.close(run.task_id)
        self.core.report(report, run.reply_to)
        self.history.finished(run, self.rank)
        self.run = None
        self._cancelled = False

    def _run_us(self) -> int:
        return int((self.world.now_s - self._began_s) * 1e6 * self.world.time_scale) + 5

    def _load(self, run: m.Run) -> Generator[Any, Any, m.Template]:
        template = self._templates.get(run.template_id)
        if template is None:
            answer = yield from self._exchange(self.core.requests.fetch_template(
                run.template_id, ids.home_of_task(run.task_id)))
            template = answer.template
            if template.kind != m.METHOD and not answer.function:
                self.world.fault(f"{self!r}: no definition of {template.name}")
            self._templates[run.template_id] = template
        return template

    def _arguments(self, run: m.Run) -> Generator[Any, Any, list[Any]]:
        # All are taken before any is opened: an error among them must not leave a pin behind.
        found: list[bytes | View] = []
        pinned = [run.ids[i * 28 : i * 28 + 28] for i, dep in enumerate(run.deps)
                  if type(dep) is m.Located]
        try:
            yield from self._take_dependencies(run, pinned, found)
        finally:
            self.core.objects.unpins.extend(pinned)  # interrupted half-way: what was not taken
        opened = [self.open(item) for item in found]
        args = self._unpack(run.args, opened) if run.args else []
        assert isinstance(args, list)
        return args

    def _take_dependencies(
        self, run: m.Run, pinned: list[bytes], found: list[bytes | View]
    ) -> Script:
        for index, dep in enumerate(run.deps):
            object_id = run.ids[index * 28 : index * 28 + 28]
            if type(dep) is m.Located:
                found.append((yield from self._view(object_id, dep)))
                del pinned[0]
            elif dep == b"":
                found += yield from self.get_packed([self.core.refs.intern(object_id)])
            else:
                assert isinstance(dep, bytes)
                found.append(dep)

    def _outcome(self, run: m.Run, template: m.Template, result: Any) -> Script:
        if template.stream:
            done = m.Return(NONE)
            return m.DoneMany(run.task_id, run.attempt, self._run_us(), (done,))
        if template.kind == m.ACTOR_CREATION or result is None:
            return m.Done(run.task_id, run.attempt, self._run_us(), NONE)
        parts = result if template.return_count != 1 else (result,)
        returns = []
        for part in parts:
            packed, contained = pack(part)
            if template.return_count == 1 and not contained and len(packed) <= INLINE_BYTES:
                return m.Done(run.task_id, run.attempt, self._run_us(), packed)
            value: bytes | m.Located = packed
            if len(packed) > INLINE_BYTES:
                value = yield from self._write(packed)
            returns.append(m.Return(value, contained))
        return m.DoneMany(run.task_id, run.attempt, self._run_us(), tuple(returns))
