"""What a driver or worker knows and says: messages in, messages and effects out. Pure.

    receive(batch) ---> the part that the message is for ---> waiters, refs, outbox, effects
    calls of users ---> submit, put, want ... -------------> outbox
    collect()      ---> outbox, complete and in order -----> the link encodes and sends it

It has no lock, socket, clock or thread: `link.py` owns those, and calls this with its lock held.
`testing/clients.py` drives the same core over simulated channels.

Order in the outbox is what makes reference counts right: new holds before whatever relies on them,
drops last.

    part         its noun
    objects      object: asked for, arrived, awaited
    store        segment: granted to us, mapped by us
    streams      stream: consumed here (rooms: made here)
    requests     question to the node
    direct       calls and values past the node
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

from hpcray.client.direct_calls import DirectCalls, Wire
from hpcray.client.objects import Objects
from hpcray.client.references import LOCAL, ObjectRef, ReferenceTable
from hpcray.client.requests import Requests
from hpcray.client.store import Store
from hpcray.client.streams import WINDOWED, ObjectRefGenerator, Rooms, Streams
from hpcray.client.waiters import Waiter
from hpcray.protocol import ids, values
from hpcray.protocol.messages import (
    METHOD,
    ActorChannel,
    CancelTask,
    ChannelOf,
    ClientGone,
    CollectGarbage,
    CreateActor,
    DefineFunction,
    DefineTemplate,
    Done,
    DoneMany,
    Drop,
    ForgetTemplates,
    Get,
    Hold,
    InlineLimit,
    JobEnded,
    Output,
    PutInline,
    PutLocated,
    Ready,
    Released,
    Reply,
    Rows,
    SegmentClosed,
    SegmentDenied,
    SegmentGrant,
    SegmentOpened,
    SegmentReclaim,
    StreamEnded,
    StreamRoom,
    SubmitCall,
    SubmitTask,
    Taken,
    Template,
    TemplateIs,
    Value,
    ValueAt,
    Welcome,
    Yield,
    Yielded,
)

# Cancelled tasks of this worker that are remembered; the newest ones are enough.
_CANCELLED_MAX = 1000

Handlers = Mapping[type, Callable[[Any, list[Any]], None]]


# Templates that nobody uses any more, told of together.
_UNUSED_MAX = 64


class Use:
    """Whoever submits by a template's id keeps this: the node knows the template until it dies."""

    __slots__ = ("__weakref__",)


class UseRef(ref[Use]):
    __slots__ = ("template_id",)

    template_id: bytes


class Core:
    def __init__(
        self, *, refs: ReferenceTable, store: Callable[[list[Any]], Store],
        wire: Callable[[Any], Wire], generator: type[ObjectRefGenerator[Any]] = ObjectRefGenerator,
    ) -> None:
        """`wire`: what a descriptor that came with a message becomes: another process's channel."""
        self.outbox: list[Any] = []
        # To be done once the lock is free, in this order: what runs code that is not ours.
        self.effects: deque[Callable[[], None]] = deque()
        # What a worker has read on its task channel, and what came of its tasks, in this order:
        # appended at any time, in any thread, and taken in by the next one that has the lock.
        self.notes: deque[Any] = deque()
        self.refs = refs
        self.direct = DirectCalls()
        self.objects = Objects(self.outbox, refs, self.direct)
        self.store = store(self.outbox)
        self.streams = Streams(self.outbox, refs, self.objects.ready_waiters, generator)
        self.rooms = Rooms()
        self.requests = Requests(self.outbox)
        self._wire = wire
        self._defined: set[bytes] = set()  # functions, and templates of methods
        # Templates of tasks and actors, and who uses them; and those that nobody does any more, to
        # which other threads and the garbage collector add.
        self._templates: dict[bytes, UseRef] = {}
        self._unused: deque[UseRef] = deque()
        # Tasks of this worker that were cancelled, of which some may not have been read yet.
        self.cancelled: dict[bytes, None] = {}
        self.on_output: Callable[[Output], None] = lambda output: None
        self.on_cancel: Callable[[bytes], None] = lambda task: None
        # Something waits for what refs and handles in reference cycles may keep.
        self.on_collect: Callable[[], None] = lambda: None
        # The job has ended without us. Inside, unlike those above.
        self.on_ended: Callable[[str], None] = lambda reason: None
        # Values up to this size travel in messages; the node lowers it when they fill its memory.
        self.inline_max_bytes = values.INLINE_MAX_BYTES
        self.welcomed = Waiter(1)
        self.ended = Waiter(1)
        # Set by Welcome, as are `refs.job_id` and `refs.size`.
        self.rank = 0
        self.number = 0
        self.session: dict[str, Any] = {}
        self.tail = b""
        # Child ids: a prefix per running task and one counter per process.
        self._task: tuple[bytes, int, bytes] = (b"", 0, b"")
        self._prefix = b""
        # Where calls run side by side: the task of the thread or coroutine that makes a child.
        self._parent: Callable[[], tuple[bytes, int]] | None = None
        self._parents_prefix = ((b"", -1), b"")  # of the latest one
        self.counter = 0
        self.handlers: Handlers = self._message_handlers()

    def receive(self, batch: list[Any], descriptors: list[Any]) -> None:
        """One datagram of the node, or of a neighbour."""
        handlers = self.handlers
        for message in batch:
            handlers[type(message)](message, descriptors)

    def take_notes(self) -> None:
        """Each once; one that was interrupted once more, which does no harm."""
        notes = self.notes
        outbox = self.outbox
        while notes:
            note = notes[0]
            if type(note) is list:
                self.direct.on_runs(note)
            else:
                message, reply_to = note
                if reply_to >= 0:
                    self.direct.answer(reply_to, message, self.counter)
                outbox += (message,)  # not `append`: a handler may raise behind a call
            notes.popleft()

    def collect(self, now_s: float, drain: bool) -> list[Any]:
        """The outbox with all that belongs into it by now: holds, drops, unpins. Whoever has sent
        (or encoded) it clears it."""
        outbox = self.outbox
        refs = self.refs
        objects = self.objects
        dropped = None
        # With unpins large objects may be among them.
        if refs.dropped and (now_s > objects.next_drain_s or objects.unpins or drain):
            dropped = objects.drain(now_s)
        if refs.new_holds:
            holds: list[Any] = []
            refs.tell_holds(holds)
            outbox[:0] = holds
        if dropped:
            objects.tell_drops(dropped)
        if refs.dropped_streams:
            self.streams.drop(refs.dropped_streams)
        if objects.unpins:
            objects.tell_unpins()
        if outbox and (self.direct.sent or self.direct.heard):
            self.direct.report(outbox)
        return outbox

    def has_more(self, now_s: float) -> bool:
        """Whether something waits to be sent, be it only drops."""
        return bool(self.outbox or self.objects.unpins or self.objects.drops_are_due(now_s))

    def close(self) -> None:
        """The session is over."""
        self.direct.close()
        self.objects.close()

    def forked(self) -> None:
        """In a child of this process: the refs are its parent's, but the channels are closed."""
        self.direct.close()

    # --- children ---------------------------------------------------------------------------------

    def begin_task(self, task: bytes, attempt: int, salt: bytes = b"") -> None:
        """Child ids from now on descend from this task; hashed when the first child comes."""
        self._task = (task, attempt, salt)
        self._prefix = b""

    def children_of(self, parent: Callable[[], tuple[bytes, int]]) -> None:
        """Child ids from now on descend from the task that `parent` tells, in their thread."""
        self._parent = parent
        self._prefix = b""

    @property
    def task_prefix(self) -> bytes:
        if self._parent is not None:
            task = self._parent()
            if task != self._parents_prefix[0]:
                self._parents_prefix = (task, ids.task_prefix(*task))
            return self._parents_prefix[1]
        if not self._prefix:
            self._prefix = ids.task_prefix(*self._task)
        return self._prefix

    def new_actor_id(self) -> bytes:
        self.counter += 1
        return ids.actor_id(self.task_prefix, self.counter, self.tail)

    def is_defined(self, id_: bytes) -> bool:
        return id_ in self._defined

    @property
    def last_task_id(self) -> bytes:
        """Of the task, call or object made last."""
        return ids.task_id(self.task_prefix, self.counter, self.tail)

    def knows_function(self, function_id: bytes) -> None:
        """The node has its definition."""
        self._defined.add(function_id)

    def define(self, template: Template, function: DefineFunction | None) -> Use:
        """Make the node know the template, and before it its function, for as long as what is
        returned lives; a method's, for ever."""
        if template.kind == METHOD:
            if template.template_id not in self._defined:
                self._defined.add(template.template_id)
                self.outbox.append(DefineTemplate(template))
            return Use()
        if len(self._unused) >= _UNUSED_MAX:
            self._forget_unused()
        template_id = template.template_id
        known = self._templates.get(template_id)
        living = None if known is None else known()
        if living is not None:
            return living
        if function is not None and template.function_id not in self._defined:
            self._defined.add(template.function_id)
            self.outbox.append(function)
        use = Use()
        self._templates[template_id] = new = UseRef(use, self._unused.append)
        new.template_id = template_id
        if known is None:  # else the node has not been told to forget it
            self.outbox.append(DefineTemplate(template))
        return use

    def use_of(self, template_id: bytes) -> Use | None:
        """Of a template that the node knows. (Without the lock.)"""
        known = self._templates.get(template_id)
        return None if known is None else known()

    def _forget_unused(self) -> None:
        """Templates that nobody in this process has any more."""
        gone = []
        for _ in range(len(self._unused)):
            old = self._unused.popleft()
            if self._templates.get(old.template_id) is old:  # else it was defined again since
                del self._templates[old.template_id]
                gone.append(old.template_id)
        if gone:
            self.outbox.append(ForgetTemplates(tuple(gone)))

    def submit(
        self, template_id: bytes, args: bytes, refs: bytes, dep_count: int, return_count: int,
        actor: bytes = b"",
    ) -> list[Any]:
        """A task (or, with `actor`, a method call); the refs of its returns, or its stream."""
        self.counter = counter = self.counter + 1
        task = (self._prefix or self.task_prefix) + counter.to_bytes(4, "little") + self.tail
        outbox = self.outbox
        table = self.refs
        if table.new_holds:
            table.tell_holds(outbox)
        if actor:
            message: Any = SubmitCall(task, template_id, actor, args, refs, dep_count)
            link = self.direct.actors.get(actor)
            if link is not None:
                link.called(task)
        else:
            message = SubmitTask(task, template_id, args, refs, dep_count)
        if table.own and (refs or actor):
            self.append_naming(message, refs, actor)
        else:
            outbox.append(message)
        fresh = table.fresh
        if return_count == 1:
            return [fresh(task + ids.FIRST_RETURN)]
        if return_count < 0:
            end = fresh(task + ids.FIRST_RETURN)
            return [self.streams.open(task, return_count == WINDOWED, end)]
        return [fresh(ids.return_id(task, index)) for index in range(return_count)]

    def create_actor(self, message: CreateActor) -> ObjectRef[Any]:
        self.refs.tell_holds(self.outbox)
        self.append_naming(message, message.refs)
        return self.refs.fresh(ids.creation_object_id(message.actor_id))

    def put_inline(self, packed: bytes, contained: bytes = b"") -> ObjectRef[Any]:
        ref = self._fresh_put()
        ref._value = packed
        if contained:
            self.refs.tell_holds(self.outbox)
            self.append_naming(PutInline(ref._id, packed, contained), contained)
        else:
            self.outbox.append(PutInline(ref._id, packed))
        return ref

    def put_located(self, location: Any, contained: bytes) -> ObjectRef[Any]:
        ref = self._fresh_put()
        self.refs.tell_holds(self.outbox)
        self.append_naming(PutLocated(ref._id, location, contained), contained)
        return ref

    def _fresh_put(self) -> ObjectRef[Any]:
        self.counter += 1
        task = ids.task_id(self.task_prefix, self.counter, self.tail)
        ref = self.refs.fresh(task + ids.PUT_INDEX)
        ref._ready = LOCAL
        return ref

    def report(self, message: Any, reply_to: int = -1) -> None:
        """A task's outcome or yield; the value of a Done goes to `reply_to` past the node."""
        if reply_to >= 0 and type(message) is Done:
            self.direct.answer(reply_to, message, self.counter)
        if self.refs.new_holds:
            self.refs.tell_holds(self.outbox)
        if not self.refs.own:
            self.outbox.append(message)
        elif type(message) is DoneMany:
            self.append_naming(message, b"".join(r.contained for r in message.returns))
        else:
            self.append_naming(
                message, message.returned.contained if type(message) is Yield else b"")

    def append_naming(self, message: Any, refs: bytes, actor: bytes = b"") -> None:
        """Queue a message that names `refs` or calls `actor`. Of an actor's handle to itself the
        node is told for as long as it takes to count what the message stands for."""
        own = self.refs.own
        if own and (own in refs or (actor and own == ids.creation_object_id(actor))):
            self.outbox += (Hold(own), message, Drop(own))
        else:
            self.outbox.append(message)

    def want_result(self, object_id: bytes) -> Any:
        """Ask for one value; the link to the actor that was called for it just now, if any."""
        asked = self.objects.asked
        if object_id in asked:
            return None
        outbox = self.outbox
        if self.refs.new_holds:
            self.refs.tell_holds(outbox)
        direct = self.direct
        link = direct.called(outbox, object_id) if direct.actors else None
        if link is None or not direct.call(link, outbox):
            outbox.append(Get(object_id))
        asked.add(object_id)  # last: what is asked twice does no harm
        return link

    # --- messages ---------------------------------------------------------------------------------

    def _on_reply(self, message: Reply) -> None:
        ref = None
        if message.held:
            # The node counts it for us until Taken, and ours comes before: another handle of this
            # process may just be going.
            ref = self.refs.intern(message.held)
            self.refs.tell_holds(self.outbox)
        awaited = self.requests.on_reply(message, ref)
        if message.held or not awaited:
            self.outbox.append(Taken(message.request))

    def _hearing(self, handler: Callable[[Any], None]) -> Callable[[Any, list[Any]], None]:
        """Of what tells that somebody has done something (NB-2)."""
        direct = self.direct

        def handle(message: Any, _: list[Any]) -> None:
            direct.heard_count += 1
            handler(message)

        return handle

    def _on_cancel(self, message: CancelTask, _: list[Any]) -> None:
        cancelled = self.cancelled
        cancelled[message.task_id] = None
        if len(cancelled) > _CANCELLED_MAX:
            del cancelled[next(iter(cancelled))]
        self.rooms.let_go(message.task_id)
        self.effects.append(lambda: self.on_cancel(message.task_id))

    def _on_welcome(self, message: Welcome, _: list[Any]) -> None:
        self.refs.job_id = message.job_id
        self.refs.size = message.size
        self.rank = message.rank
        self.number = self.direct.number = message.client
        self.session = message.session
        self.tail = ids.id_tail(message.rank, message.job_id)
        if not self._task[0]:
            # What runs before the first task (an import that puts something) has ids of its own.
            self.begin_task(b"", 0, message.client.to_bytes(4, "little"))
        self.welcomed.remaining = 0

    def _on_output(self, message: Output, _: list[Any]) -> None:
        self.effects.append(lambda: self.on_output(message))

    def _on_inline_limit(self, message: InlineLimit, _: list[Any]) -> None:
        self.inline_max_bytes = message.nbytes

    def _on_ended(self, message: JobEnded, _: list[Any]) -> None:
        self.ended.remaining = 0
        if message.reason:
            self.on_ended(message.reason)

    def _message_handlers(self) -> Handlers:
        hearing = self._hearing
        objects, store, streams, rooms = self.objects, self.store, self.streams, self.rooms
        requests, direct, wire = self.requests, self.direct, self._wire
        return {
            Value: objects.on_value,
            ValueAt: hearing(objects.on_value_at),
            Ready: hearing(objects.on_ready),
            Yielded: hearing(streams.on_yielded),
            StreamEnded: hearing(streams.on_ended),
            Reply: hearing(self._on_reply),
            Rows: lambda message, _: requests.on_rows(message),
            TemplateIs: lambda message, _: requests.on_template(message),
            StreamRoom: lambda message, _: rooms.on_room(message),
            SegmentGrant: lambda message, fds: store.on_grant(message, fds.pop(0)),
            SegmentDenied: lambda message, _: store.on_denied(message),
            SegmentOpened: lambda message, fds: store.on_opened(message, fds.pop(0)),
            SegmentClosed: lambda message, _: store.on_closed(message),
            SegmentReclaim: lambda message, _: store.give_back_all(),
            Released: lambda message, _: store.on_released(message),
            ChannelOf: lambda message, fds: direct.introduce(
                message.client, wire(fds.pop(0))),
            ActorChannel: lambda message, fds: direct.introduce_actor(
                message.actor_id, message.worker, wire(fds.pop(0))),
            ClientGone: lambda message, _: direct.forget(message.client),
            CancelTask: self._on_cancel,
            CollectGarbage: lambda *_: self.effects.append(self.on_collect),
            Output: self._on_output,
            Welcome: self._on_welcome,
            InlineLimit: self._on_inline_limit,
            JobEnded: self._on_ended,
        }
