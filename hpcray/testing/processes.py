"""Simulated clients: the driver and the workers of `SimulatedCluster`.

They speak the real protocol, byte for byte, in the order the real client speaks it (new holds
before whatever relies on them, drops last), but run *scripts*: generators that yield where a
real process would wait. So one thread can interleave hundreds of them in a seeded order.

    def body(p, seed, pairs):          # p: the Process that runs it
        ref = yield from p.put([seed, []])
        value = yield from p.get(ref)
        return [seed, [[ref, seed]]]

Values are lists of plain data, `Ref`s anywhere inside. A value larger than INLINE_BYTES lives in
the node's simulated shared memory; it comes back as a `Value` whose `view` pins it, and the view
checks at its death that nobody has touched the bytes meanwhile.

No threads, no sockets, no user pickles. What a script must not do: wait other than by `yield`.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec

from hpcray.client.neighbours import Neighbours
from hpcray.objects.allocator import RangeAllocator
from hpcray.protocol import ids, messages, values
from hpcray.protocol import messages as m

if TYPE_CHECKING:
    from hpcray.testing.cluster import SimulatedCluster, SimulatedNode

# Small, so that shared memory is exercised without moving megabytes.
INLINE_BYTES = 512
_REF, _PLACEHOLDER = 1, 2
# A freed range is painted, so that a reader who was not counted sees it.
_POISON = 0xDD

Script = Generator[Any, Any, Any]


class SystemFailed(Exception):
    """A value was a FAILURE: the system could not make it."""

    def __init__(self, failure: values.Failure) -> None:
        super().__init__(f"{failure.kind}: {failure.message} {failure.subject}")
        self.failure = failure


class TaskFailed(Exception):
    """A value was an ERROR: the body raised; the text is its own."""


class Ref:
    """A process's interned reference; its death is the drop."""

    __slots__ = ("__weakref__", "_dropped", "id", "packed", "ready", "view")

    def __init__(self, object_id: bytes, dropped: deque[bytes]) -> None:
        self.id = object_id
        self.packed: bytes | None = None
        self.ready = False
        self.view: weakref.ref[View] | None = None
        self._dropped = dropped

    def __del__(self) -> None:
        self._dropped.append(self.id)

    def __repr__(self) -> str:
        return f"Ref({short(self.id)})"


class Stream:
    """The consumer's end of a generator task; its death lets go of what was not taken."""

    def __init__(self, task_id: bytes, dropped: deque[bytes], state: StreamState) -> None:
        self.task_id = task_id
        self.state = state
        self._dropped = dropped

    def __del__(self) -> None:
        self._dropped.append(self.task_id)


class StreamState:
    def __init__(self) -> None:
        self.known = 0
        self.taken = 0
        self.ended = False
        self.values: dict[int, bytes] = {}


class View:
    """A pinned range of shared memory; unpins at its death, and compares the bytes then."""

    __slots__ = ("__weakref__", "_bytes", "_copy", "_fault", "_id", "_unpins")

    def __init__(
        self, object_id: bytes, view: memoryview, unpins: deque[bytes],
        fault: Callable[[str], None],
    ) -> None:
        self._id = object_id
        self._bytes = view
        self._copy = bytes(view)
        self._unpins = unpins
        self._fault = fault

    def packed(self) -> bytes:
        return self._copy

    def __del__(self) -> None:
        if self._bytes != self._copy:
            self._fault(f"the memory of {short(self._id)} was reused under a pinned view")
        self._unpins.append(self._id)


class Value(list[Any]):
    """A value read from shared memory; `view` is its pin."""

    view: View | None = None


class Large:
    """Asks for a value that does not fit into a message."""

    __slots__ = ("pad_bytes", "value")

    def __init__(self, value: Any, pad_bytes: int = 2 * INLINE_BYTES) -> None:
        self.value = value
        self.pad_bytes = pad_bytes


class Arena:
    """Segments of simulated shared memory owned by one process (or by the node itself)."""

    def __init__(self) -> None:
        self._segments: dict[int, tuple[RangeAllocator, memoryview]] = {}

    def add(self, segment: int, memory: memoryview) -> None:
        self._segments[segment] = (RangeAllocator(len(memory)), memory)

    def has(self, segment: int) -> bool:
        return segment in self._segments

    def allocate(self, nbytes: int) -> tuple[int, int, memoryview] | None:
        for segment, (allocator, memory) in self._segments.items():
            offset = allocator.allocate(nbytes)
            if offset is not None:
                return segment, offset, memory[offset : offset + nbytes]
        return None

    def release(self, segment: int, offset: int) -> None:
        allocator, memory = self._segments[segment]
        size = allocator.size_of(offset)
        memory[offset : offset + size] = bytes((_POISON,)) * size
        allocator.release(offset)

    def remove(self, segment: int) -> None:
        del self._segments[segment]

    def empty_segments(self) -> list[int]:
        return [s for s, (allocator, _) in self._segments.items() if allocator.empty]

    @property
    def used_bytes(self) -> int:
        return sum(allocator.used_bytes for allocator, _ in self._segments.values())


def short(id_: bytes) -> str:
    return id_.hex()[:8] + ".." + id_.hex()[16:]


class _Wire:
    """Stands for a duplicate of the node's end of another process's channel."""

    def __init__(self, sender: Process, number: int, box: str) -> None:
        self._sender = sender
        self._number = number
        self._box = box

    def send(self, datagram: bytes, _flags: int) -> int:
        cluster = self._sender.cluster
        target = self._sender.node.processes.get(self._number)
        if target is None or not target.alive:
            raise BrokenPipeError
        if cluster.rng.random() < 0.1:
            raise BlockingIOError  # it is full
        getattr(target, self._box).append(datagram)
        cluster.direct[self._box] += 1
        return len(datagram)

    def close(self) -> None:
        pass


class Process:
    """One client. The cluster calls `step`; scripts call the rest."""

    def __init__(self, cluster: SimulatedCluster, node: SimulatedNode, number: int) -> None:
        self.cluster = cluster
        self.node = node
        self.number = number
        self.alive = True
        self.inbox: deque[bytes] = deque()  # client channel, from the node
        self.tasks: deque[bytes] = deque()  # task channel, unread
        self.queue: deque[m.Run | m.Stop] = deque()
        self.outbox: list[Any] = []
        self.script: Script | None = None
        self.waiting: Callable[[], bool] | None = None
        self.wake_s: float | None = None
        self.run: m.Run | None = None
        self.failed: BaseException | None = None
        self.actor: dict[str, Any] | None = None  # state of the hosted actor
        self.exit_status = 0
        self._began_s = 0.0
        self._cancelled = False
        # The real ones, over channels that are not. `due`: the node has been told of what they
        # send, and it is not sent yet.
        self.neighbours = Neighbours()
        self.neighbours.number = number
        self.due = False
        self._datagrams = 0  # to the node
        self._arena = Arena()
        self._live: dict[bytes, weakref.ref[Ref]] = {}
        self._holds: dict[bytes, None] = {}
        self._dropped: deque[bytes] = deque()
        self._unpins: deque[bytes] = deque()
        self._asked: set[bytes] = set()
        self._arrivals: dict[bytes, m.Located] = {}
        self._open: set[int] = set()
        self._streams: dict[bytes, StreamState] = {}  # consumed here
        self._environment: bytes | None = None
        self._taken = 0  # of the stream made here
        self._emitted = 0
        self._templates: dict[bytes, m.Template] = {}
        self._functions: dict[bytes, str] = {}
        self._defined: set[bytes] = set()
        self._answer: Any = None
        self._replies: dict[int, m.Reply] = {}
        self.rows: dict[int, list[Any]] = {}  # parts of replies, by request
        self._requests = 0
        self._tail = ids.id_tail(node.rank, cluster.job_id)
        self._counter = 0
        self.task_id = ids.driver_task_id(node.rank, cluster.job_id)
        self._prefix = ids.task_prefix(self.task_id, 0)

    def __repr__(self) -> str:
        what = "idle"
        if self.run is not None:
            what = f"runs {self._name(self.run)} {short(self.run.task_id)}"
        if self.waiting is not None:
            what += f", waits ({self.waiting.__qualname__})"
        return f"process {self.number} of rank {self.node.rank}: {what}"

    # --- the loop ----------------------------------------

    @property
    def runnable(self) -> bool:
        if not self.alive:
            return False
        if (self.inbox or self.outbox or self._dropped or self._unpins or self._holds
                or self.due):
            return True
        if self.script is not None:
            return self.waiting is None or self._cancelled or self.waiting()
        return bool(self.queue or self.tasks)

    @property
    def busy(self) -> bool:
        """Something is lost with it."""
        return bool(self.run or self.neighbours.waiting)

    def step(self) -> bool:
        """Do one small thing; False if there was nothing to do."""
        if not self.runnable:
            return False
        rng = self.cluster.rng
        if self.due:
            self._speak()
            return True
        if self.inbox:
            self.read_one()
            if rng.random() < 0.3:
                return True
        if self.script is not None:
            if self.waiting is None or self._cancelled or self.waiting():
                self._resume()
        elif self.queue:
            self._start(self.queue.popleft())
        elif self.tasks:
            batch = messages.decode_to_worker(self.tasks.popleft())
            self.neighbours.on_runs(batch)
            self.queue.extend(batch)
        if self.alive and not self.due and (rng.random() < 0.5 or not (self.queue or self.tasks)):
            self.flush()  # a real process lingers up to 1 ms
        return True

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
            self.cluster.fault(f"{self!r} failed: {error!r}", error)

    def read_one(self) -> None:
        for message in messages.decode_to_client(self.inbox.popleft()):
            self._dispatch(message)

    def flush(self) -> None:
        """As `Client._flush`: drain drops, tell new holds first, drops and unpins last."""
        if self.due:
            self._speak()
        gone = self._drain()
        if self._holds:
            self.outbox[:0] = [m.Hold(b"".join(self._holds))]
            self._holds.clear()
        if gone:
            self.outbox.append(m.Drop(b"".join(gone)))
        while self._unpins:
            self.outbox.append(m.Unpin(self._unpins.popleft()))
        if self.outbox:
            self.neighbours.report(self.outbox)
            batch, self.outbox = self.outbox, []
            self.node.from_client(self.number, messages.encode(batch))
            self._datagrams += 1
            self.due = self.neighbours.waiting
            if self.due and self.cluster.rng.random() < 0.7:  # else it may die between the two
                self._speak()

    def _speak(self) -> None:
        self.due = False
        self.neighbours.send(self.outbox, self._datagrams)

    def die(self, status: int = -9) -> None:
        """The process is gone at once: what it had not flushed is lost with it."""
        self.alive = False
        self.exit_status = status
        self.outbox.clear()
        script, self.script = self.script, None
        if script is not None:
            script.close()  # nobody dies inside its own script: a Stop is not one
        self.actor = None
        self.waiting = None
        self.node.exited(self)

    # --- references ----------------------------------------

    def _fresh(self, object_id: bytes) -> Ref:
        ref = Ref(object_id, self._dropped)
        self._live[object_id] = weakref.ref(ref)
        return ref

    def intern(self, object_id: bytes) -> Ref:
        entry = self._live.get(object_id)
        if entry is not None:
            ref = entry()
            if ref is not None:
                return ref
        else:
            self._holds[object_id] = None
        return self._fresh(object_id)

    def _drain(self) -> list[bytes]:
        gone = []
        while self._dropped:
            object_id = self._dropped.popleft()
            entry = self._live.get(object_id)
            if entry is None or entry() is not None:
                stream = self._streams.pop(object_id, None)
                if stream is not None:
                    self.outbox.append(m.StreamDropped(object_id, stream.taken))
                continue
            del self._live[object_id]
            if self._arrivals.pop(object_id, None) is not None:
                self._unpins.append(object_id)  # it came too late: nobody will open it
            if object_id in self._holds:
                del self._holds[object_id]
            else:
                gone.append(object_id)
        return gone

    def _send_holds(self) -> None:
        if self._holds:
            self.outbox.append(m.Hold(b"".join(self._holds)))
            self._holds.clear()

    # --- values ----------------------------------------

    def _pack(self, value: Any, deps: list[bytes] | None = None) -> tuple[bytes, list[bytes]]:
        """(packed, contained). With `deps`, refs directly in `value` become dependencies."""
        contained: list[bytes] = []
        pad = b""
        if isinstance(value, Large):
            pad = bytes((len(contained) * 7 + 3,)) * value.pad_bytes
            value = value.value

        def hook(item: Any) -> Any:
            if isinstance(item, Ref):
                contained.append(item.id)
                return msgspec.msgpack.Ext(_REF, item.id)
            raise TypeError(f"{item!r} cannot be a simulated value")

        if deps is not None:
            placed = []
            for item in value:
                if isinstance(item, Ref):
                    placed.append(msgspec.msgpack.Ext(_PLACEHOLDER, bytes((len(deps),))))
                    deps.append(item.id)
                else:
                    placed.append(item)
            value = placed
        packed = b"\0" + msgspec.msgpack.encode([value, pad], enc_hook=hook)
        return packed, contained

    def _unpack(self, packed: bytes, deps: Sequence[Any] = ()) -> Any:
        if packed[0] == values.FAILURE:
            failure = values.unpack_failure(packed)
            if failure.kind == "ReferenceCountingAssertionError":
                self.cluster.fault(f"{self!r}: {failure.message} {failure.subject}")
            raise SystemFailed(failure)
        if packed[0] == values.ERROR:
            raise TaskFailed(packed[1:].decode())

        def hook(code: int, data: memoryview) -> Any:
            return self.intern(bytes(data)) if code == _REF else deps[data[0]]

        try:
            return msgspec.msgpack.decode(packed[1:], ext_hook=hook)[0]
        except msgspec.DecodeError:
            self.cluster.fault(f"{self!r}: a value has been overwritten: {packed[:40]!r}")
            raise

    def _new_task_id(self) -> bytes:
        self._counter += 1
        return ids.task_id(self._prefix, self._counter, self._tail)

    def put(self, value: Any) -> Generator[Any, Any, Ref]:
        packed, contained = self._pack(value)
        location = None
        if len(packed) > INLINE_BYTES:
            location = yield from self._write(packed)
        ref = self._fresh(self._new_task_id() + ids.PUT_INDEX)
        self._send_holds()
        if location is None:
            ref.packed = packed
            self.outbox.append(m.PutInline(ref.id, packed, b"".join(contained)))
        else:
            self.outbox.append(m.PutLocated(ref.id, location, b"".join(contained)))
        del value
        return ref

    def _write(self, packed: bytes) -> Generator[Any, Any, m.Located]:
        while True:
            while self.inbox:
                self.read_one()
            found = self._arena.allocate(len(packed))
            if found is not None:
                segment, offset, view = found
                view[:] = packed
                return m.Located(segment, offset, len(packed))
            answer = yield from self._exchange(m.SegmentRequest(len(packed)))
            if type(answer) is m.SegmentDenied and not answer.retry:
                raise SystemFailed(values.Failure("ObjectStoreFullError", repr(answer)))

    def _exchange(self, message: Any) -> Generator[Any, Any, Any]:
        self._answer = None
        self.outbox.append(message)
        self.flush()

        def answered() -> bool:
            return self._answer is not None

        while not answered():
            yield answered
        answer, self._answer = self._answer, None
        return answer

    def request(self, name: str, arguments: Any = None) -> Generator[Any, Any, m.Reply]:
        self._requests += 1
        number = self._requests
        self._send_holds()
        self.outbox.append(m.Request(number, name, arguments))
        self.flush()

        def replied() -> bool:
            return number in self._replies

        while not replied():
            yield replied
        return self._replies.pop(number)

    def _view(self, object_id: bytes, location: m.Located) -> Generator[Any, Any, View]:
        if location.segment not in self._open:
            yield from self._exchange(m.SegmentOpen(location.segment))
        memory = self.node.memory[location.segment]
        return View(object_id, memory[location.offset : location.offset + location.nbytes],
                    self._unpins, self.cluster.fault)

    # --- get and wait ----------------------------------------

    def get(self, ref: Ref) -> Generator[Any, Any, Any]:
        """The value; raises TaskFailed or SystemFailed."""
        found = yield from self.get_packed([ref])
        return self.open(found[0])

    def open(self, found: bytes | View) -> Any:
        if isinstance(found, bytes):
            return self._unpack(found)
        value = Value(self._unpack(found.packed()))
        value.view = found
        return value

    def get_packed(self, refs: list[Ref]) -> Generator[Any, Any, list[bytes | View]]:
        def known(ref: Ref) -> bytes | View | None:
            if ref.packed is not None:
                return ref.packed
            return ref.view() if ref.view is not None else None

        position = 0

        def arrived() -> bool:
            # What has been seen once stays: `refs` keeps the inline values, arrivals their pins.
            nonlocal position
            while position < len(refs):
                ref = refs[position]
                if known(ref) is None and ref.id not in self._arrivals:
                    return False
                position += 1
            return True

        result: dict[int, bytes | View] = {}
        while len(result) < len(refs):
            position = 0
            ask = [r.id for i, r in enumerate(refs) if i not in result and known(r) is None
                   and r.id not in self._arrivals and r.id not in self._asked]
            link = None
            if ask:
                self._asked.update(ask)
                self._send_holds()
                if len(refs) == 1:
                    link = self.neighbours.called(self.outbox, ask[0])
                if link is None or not self.neighbours.call(link, self.outbox):
                    self.outbox.append(m.Get(b"".join(ask)))
            yield from self._wait(arrived)
            if link is not None:
                link.over(ids.task_of_object(refs[0].id), refs[0].packed)
            for index, ref in enumerate(refs):
                found = known(ref)
                if found is None:
                    location = self._arrivals.pop(ref.id, None)
                    if location is None:
                        continue
                    found = yield from self._view(ref.id, location)
                    ref.view = weakref.ref(found)
                result[index] = found
        return [result[i] for i in range(len(refs))]

    def wait(self, refs: list[Ref], fetch: bool = True) -> Generator[Any, Any, None]:
        """Until all are ready."""
        def ready() -> bool:
            return all(ref.ready for ref in refs)

        ask = [ref.id for ref in refs if not ref.ready]
        if ask:
            self._send_holds()
            self.outbox.append(m.Watch(b"".join(dict.fromkeys(ask)), fetch))
        yield from self._wait(ready)

    def _wait(self, condition: Callable[[], bool]) -> Script:
        """As a real client: give the CPU back only if it really waits."""
        self.flush()
        while self.due:  # it may die now
            yield lambda: not self.due
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
        if ref.packed is None and ref.id not in self._asked:
            self._asked.add(ref.id)
            self._send_holds()
            self.outbox.append(m.Get(ref.id))

    def sleep(self, seconds: float) -> Script:
        """Compute for that long, without giving anything back."""
        until_s = self.cluster.now_s + seconds

        def awake() -> bool:
            return self.cluster.now_s >= until_s

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
        if template_id not in self._defined:
            self._defined.add(template_id)
            if kind != m.METHOD:
                self.outbox.append(m.DefineFunction(function_id, name, name.encode()))
            self.outbox.append(m.DefineTemplate(template))
        return template

    def submit(self, name: str, args: Sequence[Any] = (), **options: Any) -> list[Ref]:
        """A task; refs directly in `args` are dependencies. The refs of its returns."""
        template = self.template(name, **options)
        task_id = self._new_task_id()
        deps: list[bytes] = []
        packed, contained = self._pack(list(args), deps)
        self._send_holds()
        self.outbox.append(m.SubmitTask(
            task_id, template.template_id, packed, b"".join(deps + contained), len(deps)))
        self.cluster.submitted(task_id, template)
        return [self._fresh(ids.return_id(task_id, i)) for i in range(template.return_count)]

    def open_stream(
        self, name: str, args: Sequence[Any] = (), *, window: int = 0, **options: Any
    ) -> Stream:
        """A generator task (its completion is not asked for)."""
        ref = self.submit(name, args, stream=m.STREAM, stream_window=window, **options)[0]
        task_id = ids.task_of_object(ref.id)
        state = self._streams[task_id] = StreamState()
        return Stream(task_id, self._dropped, state)

    def next_item(self, stream: Stream) -> Generator[Any, Any, Ref | None]:
        """The ref of the next item; None at the end."""
        state = stream.state

        def there() -> bool:
            return state.known > state.taken or state.ended

        yield from self._wait(there)
        if state.known == state.taken:
            return None
        index = state.taken
        state.taken += 1
        ref = self._fresh(ids.return_id(stream.task_id, index + 1))
        ref.ready = True
        ref.packed = state.values.pop(index, None)
        self.outbox.append(m.StreamTaken(stream.task_id, state.taken))
        return ref

    def emit(self, value: Any) -> Script:
        """The next item of the stream this task makes; waits for room if it has a window."""
        run = self.run
        assert run is not None
        packed, contained = self._pack(value)
        item: bytes | m.Located = packed
        if len(packed) > INLINE_BYTES:
            item = yield from self._write(packed)
        self._send_holds()
        self.outbox.append(m.Yield(
            run.task_id, self._emitted, m.Return(item, b"".join(contained))))
        del value
        self._emitted += 1
        window = self._templates[run.template_id].stream_window
        if window:
            yield from self._wait(lambda: self._emitted - self._taken < window)

    def create_actor(self, name: str, args: Sequence[Any] = (), **options: Any) -> Ref:
        """The handle: a ref to the creation object."""
        options.setdefault("held_resources", ())
        template = self.template(name, kind=m.ACTOR_CREATION, **options)
        self._counter += 1
        actor_id = ids.actor_id(self._prefix, self._counter, self._tail)
        deps: list[bytes] = []
        packed, contained = self._pack(list(args), deps)
        self._send_holds()
        self.outbox.append(m.CreateActor(
            actor_id, template.template_id, packed, b"".join(deps + contained), len(deps)))
        self.cluster.submitted(ids.creation_task_id(actor_id), template)
        return self._fresh(ids.creation_object_id(actor_id))

    def call(self, handle: Ref, name: str, args: Sequence[Any] = (), **options: Any) -> list[Ref]:
        """A method call; the method is the registered body `name`."""
        template = self.template(name, kind=m.METHOD, **options)
        task_id = self._new_task_id()
        deps: list[bytes] = []
        packed, contained = self._pack(list(args), deps)
        self._send_holds()
        actor_id = ids.actor_of_object(handle.id)
        self.outbox.append(m.SubmitCall(
            task_id, template.template_id, actor_id, packed, b"".join(deps + contained),
            len(deps)))
        self.cluster.submitted(task_id, template)
        self.cluster.called(actor_id, self, task_id)
        link = self.neighbours.actors.get(actor_id)
        if link is not None:
            link.called(task_id)
        return [self._fresh(ids.return_id(task_id, i)) for i in range(template.return_count)]

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
        self._began_s = self.cluster.now_s
        report: Any
        template = None
        try:
            template = yield from self._load(run)
            args = yield from self._arguments(run)
            self.task_id = run.task_id
            self._prefix = ids.task_prefix(run.task_id, run.attempt)
            if template.kind != m.METHOD and self._environment not in (None, template.environment):
                self.cluster.fault(f"{self!r} has run in {self._environment!r}, not in "
                                   f"{template.environment!r}")
            if template.kind != m.METHOD and (template.environment or self._environment):
                self._environment = template.environment
            self.cluster.started(run, template, self)
            body = self.cluster.bodies[template.name]
            self._taken = self._emitted = 0
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
            retry = template is not None and template.retry_exceptions \
                and "TaskCancelledError" not in str(error)
            report = m.Failed(run.task_id, run.attempt, self._run_us(), packed, retry)
        self._send_holds()
        if type(report) is m.Done and run.reply_to >= 0:
            self.neighbours.answer(run.reply_to, report, self._counter)
        self.outbox.append(report)
        self.cluster.finished(run, self)
        self.run = None
        self._cancelled = False

    def _run_us(self) -> int:
        return int((self.cluster.now_s - self._began_s) * 1e6 * self.cluster.time_scale) + 5

    def _load(self, run: m.Run) -> Generator[Any, Any, m.Template]:
        template = self._templates.get(run.template_id)
        if template is None:
            answer = yield from self._exchange(
                m.FetchTemplate(run.template_id, ids.home_of_task(run.task_id)))
            template = answer.template
            if template.kind != m.METHOD and not answer.function:
                self.cluster.fault(f"{self!r}: no definition of {template.name}")
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
            self._unpins.extend(pinned)  # interrupted half-way: what was not taken
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
                found += yield from self.get_packed([self.intern(object_id)])
            else:
                assert isinstance(dep, bytes)
                found.append(dep)

    def _outcome(self, run: m.Run, template: m.Template, result: Any) -> Script:
        if template.stream:
            done = m.Return(b"\0" + b"\x92\xc0\xc4\x00")
            return m.DoneMany(run.task_id, run.attempt, self._run_us(), (done,))
        if template.kind == m.ACTOR_CREATION or result is None:
            return m.Done(run.task_id, run.attempt, self._run_us(), b"\0" + b"\x92\xc0\xc4\x00")
        parts = result if template.return_count != 1 else (result,)
        returns = []
        for part in parts:
            packed, contained = self._pack(part)
            if template.return_count == 1 and not contained and len(packed) <= INLINE_BYTES:
                return m.Done(run.task_id, run.attempt, self._run_us(), packed)
            value: bytes | m.Located = packed
            if len(packed) > INLINE_BYTES:
                value = yield from self._write(packed)
            returns.append(m.Return(value, b"".join(contained)))
        return m.DoneMany(run.task_id, run.attempt, self._run_us(), tuple(returns))

    # --- messages from the node ----------------------------------------

    def _dispatch(self, message: Any) -> None:
        kind = type(message)
        if kind in (m.ValueAt, m.Ready, m.Reply, m.Yielded, m.StreamEnded):
            self.neighbours.stamp += 1
        if kind is m.Value:
            if message.sender < 0:
                self.neighbours.stamp += 1
            else:
                self.neighbours.on_value(message)
            self._asked.discard(message.object_id)
            ref = self._ref(message.object_id)
            if ref is not None:
                ref.packed = message.value
                ref.ready = True
        elif kind is m.ValueAt:
            self._asked.discard(message.object_id)
            ref = self._ref(message.object_id)
            if ref is None or message.object_id in self._arrivals:
                self._unpins.append(message.object_id)
            else:
                self._arrivals[message.object_id] = message.location
                ref.ready = True
        elif kind is m.Ready:
            for object_id in ids.split_ids(message.ids):
                ref = self._ref(object_id)
                if ref is not None:
                    ref.ready = True
        elif kind is m.Released:
            for offset in message.offsets:
                self._arena.release(message.segment, offset)
            for segment in self._arena.empty_segments()[1:]:
                self._return(segment)
        elif kind is m.SegmentReclaim:
            for segment in self._arena.empty_segments():
                self._return(segment)
        elif kind is m.SegmentGrant:
            self._arena.add(message.segment, self.node.memory[message.segment])
            self._answer = message
        elif kind is m.SegmentOpened:
            self._open.add(message.segment)
            self._answer = message
        elif kind is m.SegmentClosed:
            self._open.discard(message.segment)
        elif kind in (m.SegmentDenied, m.TemplateIs):
            self._answer = message
        elif kind is m.Reply:
            self._replies[message.request] = message
        elif kind is m.Yielded:
            state = self._streams.get(message.task_id)
            if state is None:
                self.outbox.append(m.StreamDropped(message.task_id, message.index))
                return
            if message.index != state.known:
                self.cluster.fault(f"{self!r}: item {message.index} after {state.known} items")
            state.known += 1
            if message.value:
                state.values[message.index] = message.value
        elif kind is m.StreamEnded:
            state = self._streams.get(message.task_id)
            if state is not None:
                state.ended = True
        elif kind is m.StreamRoom:
            if self.run is not None and self.run.task_id == message.task_id:
                self._taken = max(self._taken, message.taken)
        elif kind is m.ChannelOf:
            self.neighbours.introduce(message.client, _Wire(self, message.client, "inbox"))
        elif kind is m.ActorChannel:
            self.neighbours.introduce_actor(
                message.actor_id, message.worker, _Wire(self, message.worker, "tasks"))
        elif kind is m.ClientGone:
            self.neighbours.forget(message.client)
        elif kind is m.Rows:
            self.rows.setdefault(message.request, []).extend(message.rows)
        elif kind is m.CancelTask:
            if self.run is not None and self.run.task_id == message.task_id:
                self._cancelled = True

    def _ref(self, object_id: bytes) -> Ref | None:
        entry = self._live.get(object_id)
        return None if entry is None else entry()

    def _return(self, segment: int) -> None:
        self._arena.remove(segment)
        self.outbox.append(m.SegmentReturn(segment))
