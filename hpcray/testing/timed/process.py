"""Drivers and workers in virtual time.

A process with a program submits and waits, and has the core of a real client (`client/core.py`).
One without runs what it is sent, and is a light one: it takes a `Run`, lets the task's time pass
and says `Done` when a real worker would say it. A worker becomes the first kind when its task is
one that submits others.

No process is given another one's channel: a value that a real worker would send to the client that
waits for it goes through the node (`client/direct_calls.py`).
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Generator
from hashlib import blake2b
from typing import Any, Protocol

from hpcray.client import link
from hpcray.client.core import Core
from hpcray.client.references import ObjectRef, ReferenceTable
from hpcray.client.store import Store
from hpcray.client.waiters import Waiter
from hpcray.protocol import ids, messages, sizes
from hpcray.protocol import messages as m
from hpcray.testing.clients import reference_kinds
from hpcray.testing.memory import Arena, Readers
from hpcray.testing.timed.clock import Running, World
from hpcray.worker.main import _FLUSH_S

# A program goes on for so long before others have their turn.
_SLICE_S = 0.001
_NONE = b"\0\x92\xc0\xc4\x00"  # None, as a worker packs it
_FUNCTION = b"f" * 300  # as long as the pickle of a small function
_RETRIES = 3  # as tasks have by default; of a task without, none waits at its worker
# Arguments of a task: its number. Of one that submits others: the first of them, and how many.
_TASK = struct.Struct("<I")
_SHARE = struct.Struct("<II")

# Yields seconds of its own that pass, or what it waits for.
Program = Generator["float | Waiter", None, None]


class Host(Protocol):
    """The node of a process, as far as that speaks to it."""

    rank: int

    def from_client(self, number: int, datagram: bytes) -> None: ...

    def exited(self, number: int) -> None: ...


class Process(Running):
    def __init__(self, world: World, host: Host, number: int) -> None:
        super().__init__(world)
        self.number = number
        # What lies in the task channel, and from when on it can be read.
        self.unread: deque[tuple[float, bytes]] = deque()
        # What a task that submits others does: (process, first, count).
        self.child: Callable[[Process, int, int], Program] | None = None
        self.on_over: Callable[[float], None] = lambda at_s: None
        self._host = host
        self._alive = True
        self._now_s = 0.0  # how far it has come in its step
        self._inbox: deque[bytes] = deque()
        self._outbox: list[Any] = []
        self._flushed_s = -1.0
        self._queue: deque[m.Run | m.Stop] = deque()
        self._templates: dict[bytes, m.Template] = {}
        self._fetching = False
        self._core: Core | None = None
        self._program: Program | None = None
        self._waiter: Waiter | None = None
        self._gave_back = False
        self._run: m.Run | None = None  # the task whose program it is, and since when
        self._began_s = 0.0

    @property
    def core(self) -> Core:
        """Of those that submit."""
        if self._core is None:
            dropped: deque[bytes] = deque()
            kind, generator = reference_kinds(dropped)
            core = self._core = Core(
                refs=ReferenceTable(kind, dropped),
                store=lambda outbox: Store(outbox, Arena(), Readers()),
                wire=_no_wire, generator=generator)
            core.number = core.direct.number = self.number
            core.tail = ids.id_tail(self._host.rank, self.world.job_id)
            core.outbox += self._outbox
            self._outbox = core.outbox
        return self._core

    # --- what reaches it ----------------------------------------

    def say_hello(self) -> None:
        self._now_s = self.world.clock.now_s
        self._outbox.append(m.Hello(1000 + self.number))
        self._flush()

    def from_node(self, datagram: bytes) -> None:
        self._inbox.append(datagram)
        self.wake(self.world.clock.now_s)

    def start(self, program: Program) -> None:
        self._program = program
        self.wake(self.world.clock.now_s)

    def die(self) -> None:
        if self._alive:
            self._alive = False
            self._host.exited(self.number)

    # --- its loop ----------------------------------------

    def step(self, now_s: float) -> None:
        if not self._alive:
            return
        self._now_s = now_s
        self._read_inbox()
        if self._program is not None:
            self._go_on(now_s)
        elif not self._fetching:
            self._work()
        self.free_s = self._now_s

    def _spend(self, seconds: float) -> None:
        self.usage.spent(self._now_s, seconds)
        self._now_s += seconds

    def _read_inbox(self) -> None:
        costs = self.world.costs.client
        while self._inbox:
            batch = messages.decode_to_client(self._inbox.popleft())
            self._spend(costs.datagram_received_s
                        + costs.value_s * sum(type(message) is m.Value for message in batch))
            for message in batch:
                if type(message) is m.TemplateIs:
                    assert message.template is not None
                    self._templates[message.template.template_id] = message.template
                    self._fetching = False
                elif self._core is not None:
                    self._core.receive([message], [])

    def _flush(self) -> None:
        if self._core is not None:
            self._core.collect(self._now_s, drain=True)
        outbox = self._outbox
        if not outbox:
            return
        self._flushed_s = self._now_s
        wire_s = self.world.costs.wire.local_s
        for datagram in sizes.parts(outbox, messages.encode):
            self._spend(self.world.costs.client.datagram_sent_s)
            self.world.clock.at(
                self._now_s + wire_s, self._host.from_client, self.number, datagram)
        outbox.clear()

    # --- a program ----------------------------------------

    def _go_on(self, began_s: float) -> None:
        assert self._program is not None
        while True:
            if self._waiter is not None:
                if self._waiter.remaining > 0:
                    return  # until something comes
                self._waiter = None
                if self._gave_back:
                    self._gave_back = False
                    self._outbox.append(m.Unblocked())
                    self._flush()
            try:
                wanted = self._program.send(None)
            except StopIteration:
                self._program = None
                self._finish()
                return
            if isinstance(wanted, float):
                self._spend(wanted)
                if self._now_s - began_s > _SLICE_S:
                    self.wake(self._now_s)
                    return
            else:
                self._waiter = wanted
                self._before_wait()

    def _before_wait(self) -> None:
        """As a real worker: give the CPU back, and what has not begun."""
        self._flush()
        assert self._waiter is not None
        if self._run is not None and self._waiter.remaining > 0:
            unstarted = tuple(item.task_id for item in self._queue if type(item) is m.Run)
            self._queue = deque(item for item in self._queue if type(item) is m.Stop)
            self._outbox.append(m.Blocked(unstarted))
            self._gave_back = True
            self._flush()

    def _finish(self) -> None:
        run, self._run = self._run, None
        if run is None:
            self.on_over(self._now_s)
            return
        self.core.report(self._done(run, self._began_s))
        self._flush()
        self.wake(self._now_s)

    def define(self, name: str, **options: Any) -> bytes:
        """The id of a template with these options."""
        key = repr((name, sorted(options.items()))).encode()
        kind = options.pop("kind", m.TASK)
        if kind != m.METHOD:
            options["resources"] = (("CPU", m.UNIT),)
        if kind == m.TASK:
            options["max_retries"] = _RETRIES
        function_id = blake2b(name.encode(), digest_size=16).digest()
        template = m.Template(
            blake2b(key, digest_size=16).digest(), function_id, kind, name, name, **options)
        function = None if kind == m.METHOD else m.DefineFunction(function_id, name, _FUNCTION)
        self.core.define(template, function)
        return template.template_id

    def submit_task(self, template_id: bytes, number: int, actor: bytes = b"") -> Any:
        return self.submit(template_id, _TASK.pack(number), actor)

    def submit_share(self, template_id: bytes, first: int, count: int) -> Any:
        return self.submit(template_id, _SHARE.pack(first, count))

    def submit(self, template_id: bytes, args: bytes, actor: bytes = b"") -> Any:
        """A task or call; the ref of its result. It leaves as by `Link.linger`."""
        core = self.core
        ref = core.submit(template_id, args, b"", 0, 1, actor)[0]
        self._spend(self.world.costs.client.submit_s)
        if (self._now_s - self._flushed_s > link._LINGER_S
                or len(core.outbox) >= link._BATCH_MESSAGES):
            self._flush()
        return ref

    def create_actor(self, template_id: bytes) -> ObjectRef[Any]:
        core = self.core
        handle = core.create_actor(m.CreateActor(
            core.new_actor_id(), template_id, m.NO_ARGS, b"", 0))
        self._spend(self.world.costs.client.submit_s)
        return handle

    def values_of(self, refs: list[Any]) -> Waiter:
        """What a `get` of them waits for. The refs have to live until it is over."""
        objects = self.core.objects
        absent = [ref._id for ref in refs if ref._value is None]
        waiter = Waiter(len(absent))
        objects.want(absent)
        objects.await_values(absent, waiter)
        return waiter

    # --- work ----------------------------------------

    def _work(self) -> None:
        """As `worker/main.py:Worker.serve`, a datagram of tasks at a time."""
        queue = self._queue
        if not queue:
            self._flush()
            if not self.unread:
                return
            if self.unread[0][0] > self._now_s:
                self.wake(self.unread[0][0])
                return
            self._spend(self.world.costs.client.datagram_received_s)
            queue.extend(messages.decode_to_worker(self.unread.popleft()[1]))
            self._flushed_s = self._now_s
        while queue:
            item = queue.popleft()
            if type(item) is m.Stop:
                self._flush()
                self.world.clock.at(self._now_s + self.world.costs.wire.local_s, self.die)
                return
            assert isinstance(item, m.Run)
            if item.template_id not in self._templates:
                queue.appendleft(item)
                self._fetching = True
                self._outbox.append(
                    m.FetchTemplate(item.template_id, ids.home_of_task(item.task_id)))
                self._flush()
                return
            if len(item.args) == _SHARE.size:
                self._begin_program(item)
                return
            self._run_task(item)
            if queue and self._now_s - self._flushed_s > _FLUSH_S:
                self._flush()
        self._flush()
        self.wake(self._now_s)

    def _run_task(self, run: m.Run) -> None:
        began_s = self._now_s
        self._spend(self.world.costs.client.task_s)
        if run.args:
            number, = _TASK.unpack(run.args)
            self._now_s += self.world.runs.ran(number, self._host.rank, self._now_s)
        self._outbox.append(self._done(run, began_s))

    def _begin_program(self, run: m.Run) -> None:
        self._run = run
        self._began_s = self._now_s
        self.core.begin_task(run.task_id, run.attempt)
        self._spend(self.world.costs.client.task_s)
        assert self.child is not None
        self._program = self.child(self, *_SHARE.unpack(run.args))
        self.wake(self._now_s)

    def _done(self, run: m.Run, began_s: float) -> m.Done:
        return m.Done(run.task_id, run.attempt, int((self._now_s - began_s) * 1e6), _NONE)


def _no_wire(descriptor: Any) -> Any:
    raise AssertionError("a simulated process is given no descriptor")
