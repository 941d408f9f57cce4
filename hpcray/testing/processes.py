"""Simulated processes: the driver and the workers of `SimulatedCluster`.

A client (`clients.py`) that also has a task channel, and runs what comes there: bodies, which are
scripts. Workers are processes that are given tasks; the driver is given a program.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping
from typing import Any

from hpcray.protocol import ids, messages, values
from hpcray.protocol import messages as m
from hpcray.testing.clients import Client, Script, over
from hpcray.testing.history import History
from hpcray.testing.memory import View
from hpcray.testing.values import INLINE_BYTES, NONE, SystemFailed, TaskFailed, pack
from hpcray.testing.world import World, short


class Process(Client):
    def __init__(
        self, world: World, history: History, bodies: dict[str, Callable[..., Any]], rank: int,
        number: int, *, neighbours: Mapping[int, Client], send: Callable[[bytes], None],
        exited: Callable[[Process], None],
    ) -> None:
        """See `Client`. `exited`: it has died."""
        super().__init__(world, history, rank, number, neighbours=neighbours, send=send)
        self._bodies = bodies
        self._exited = exited
        self.queue: deque[m.Run | m.Stop] = deque()
        self.run: m.Run | None = None
        self.actor: dict[str, Any] | None = None  # state of the hosted actor
        self._began_s = 0.0
        self._environment: bytes | None = None
        self._emitted = 0
        self._templates: dict[bytes, m.Template] = {}
        self.core.on_cancel = self._on_cancel

    def _does(self) -> str:
        run = self.run
        return "idle" if run is None else f"runs {self._name(run)} {short(run.task_id)}"

    @property
    def has_work(self) -> bool:
        return bool(self.queue or self.tasks)

    @property
    def busy(self) -> bool:
        return self.run is not None or super().busy

    def _work(self) -> None:
        if self.queue:
            self._start(self.queue.popleft())
        elif self.tasks:
            batch = messages.decode_to_worker(self.tasks.popleft())
            self.core.direct.on_runs(batch)
            self.queue.extend(batch)

    def _on_cancel(self, task_id: bytes) -> None:
        if self.run is not None and self.run.task_id == task_id:
            self._cancelled = True

    def _before_wait(self) -> m.Blocked | None:
        if self.number == 0:
            return None
        unstarted: tuple[bytes, ...] = ()
        if self.actor is None:
            unstarted = tuple(i.task_id for i in self.queue if type(i) is m.Run)
            self.queue = deque(i for i in self.queue if type(i) is m.Stop)
        return m.Blocked(unstarted)

    def die(self, status: int = -9) -> None:
        super().die(status)
        self.actor = None
        self._exited(self)

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
                yield from self._wait(over(room))
