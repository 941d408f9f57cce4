"""Dispatcher: DP-1 to DP-4 with workers that run, block, are slow, are raided and die at will."""

from __future__ import annotations

from collections import deque

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpcray.node import outbox as out
from hpcray.node.dispatch import WorkerState
from hpcray.node.machine import Machine
from hpcray.node.records import RUNNING
from hpcray.protocol import ids, values
from hpcray.protocol import messages as m

CPU = (("CPU", m.UNIT),)
# (resources, max_retries, max_calls, priority) of the functions there are.
KINDS = [
    (CPU, 3, 0, 0), (CPU, 3, 0, 0), (CPU, 0, 0, 2), (CPU, -1, 2, -1), ((), 3, 0, 0),
    ((("CPU", m.UNIT // 2),), 3, 0, 1),
    ((("CPU", m.UNIT), ("GPU", m.UNIT // 2)), 1, 0, 0),
]


class WorkerModel:
    """A worker process: what it has not read, what it has read, whether it waits in get."""

    def __init__(self) -> None:
        self.unread: deque[list[m.Run | m.Stop]] = deque()
        self.queue: deque[m.Run | m.Stop] = deque()
        self.running: m.Run | None = None
        self.blocked = False
        self.runs: dict[bytes, int] = {}  # by template


class DispatcherMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        job = ids.job_id(1)
        self.machine = Machine(0, 1, {"CPU": 2 * m.UNIT, "GPU": m.UNIT}, 1 << 20, job, {})
        self.machine.connect(0)
        self.prefix = ids.task_prefix(ids.driver_task_id(0, job), 0)
        self.tail = ids.id_tail(0, job)
        self.now_s = 0.0
        self.count = 0
        self.takes = 0
        self.workers: dict[int, WorkerModel] = {}
        self.starting: list[int] = []
        self.started: dict[bytes, list[int]] = {}
        self.retries: dict[bytes, int] = {}
        self.tell(0, *(m.DefineTemplate(m.Template(
            bytes((kind,)) * 16, b"f" * 16, m.TASK, f"f{kind}", resources=shape,
            max_retries=retries, max_calls=calls, priority=priority))
            for kind, (shape, retries, calls, priority) in enumerate(KINDS)))

    def tell(self, client: int, *batch: object) -> None:
        self.machine.client_messages(client, list(batch))

    def turn(self) -> None:
        for _ in range(8):
            self.machine.end_turn(self.now_s)
            box = self.machine.outbox
            tasks, box.tasks = box.tasks, []
            for number, batch in tasks:
                if number in self.workers:
                    self.workers[number].unread.append(batch)
            actions, box.actions = box.actions, []
            for action in actions:
                self.act(action)
            box.clients.clear()
            if not actions:
                return

    def act(self, action: out.Action) -> None:
        if type(action) is out.StartWorker:
            self.machine.connect(action.number)
            self.starting.append(action.number)
        elif type(action) is out.TakeBack and action.number in self.workers:
            worker = self.workers[action.number]
            # While the node draws the first datagram, the worker may draw the second.
            self.takes += 1
            kept = []
            if len(worker.unread) > 1 and self.takes % 2:
                kept.append(worker.unread[1])
                del worker.unread[1]
            taken = [item for batch in worker.unread for item in batch]
            worker.unread = deque(kept)
            stops: list[m.Run | m.Stop] = [item for item in taken if type(item) is m.Stop]
            if stops:
                worker.unread.append(stops)
            self.machine.dispatcher.taken_back(
                action.number, [item.task_id for item in taken if type(item) is m.Run])

    # --- what may happen ----------------------------------------

    @rule(kind=st.integers(0, len(KINDS) - 1), count=st.integers(1, 20))
    def submit(self, kind: int, count: int) -> None:
        for _ in range(count):
            self.count += 1
            task_id = ids.task_id(self.prefix, self.count, self.tail)
            self.retries[task_id] = KINDS[kind][1]
            self.tell(0, m.SubmitTask(task_id, bytes((kind,)) * 16, b""))
        self.turn()

    @precondition(lambda self: self.starting)
    @rule()
    def hello(self) -> None:
        number = self.starting.pop(0)
        self.workers[number] = WorkerModel()
        self.tell(number, m.Hello(number))
        self.turn()

    def some(self, data: st.DataObject, numbers: list[int]) -> WorkerModel:
        self.number = data.draw(st.sampled_from(numbers))
        return self.workers[self.number]

    @precondition(lambda self: any(w.unread and not w.running for w in self.workers.values()))
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        worker = self.some(data, [n for n, w in self.workers.items() if w.unread and not w.running])
        worker.queue.extend(worker.unread.popleft())
        self.run_next(worker)

    def run_next(self, worker: WorkerModel) -> None:
        if worker.queue and worker.running is None:
            item = worker.queue.popleft()
            if type(item) is m.Stop:
                del self.workers[self.number]
                self.machine.worker_exited(self.number, values.Failure("WorkerCrashedError", "0"))
                return
            assert isinstance(item, m.Run)
            worker.running = item
            attempts = self.started.setdefault(item.task_id, [])
            assert item.attempt not in attempts, "an attempt started twice"
            attempts.append(item.attempt)
            limit = self.retries[item.task_id]
            assert limit < 0 or len(attempts) <= limit + 1
            runs = worker.runs[item.template_id] = worker.runs.get(item.template_id, 0) + 1
            most = KINDS[item.template_id[0]][2]
            assert not most or runs <= most, "max_calls"

    @precondition(lambda self: any(w.running for w in self.workers.values()))
    @rule(data=st.data(), run_us=st.sampled_from((5, 50, 3000, 50_000)))
    def finish(self, data: st.DataObject, run_us: int) -> None:
        worker = self.some(data, [n for n, w in self.workers.items() if w.running])
        run = worker.running
        assert run is not None
        if worker.blocked:
            worker.blocked = False
            self.tell(self.number, m.Unblocked())
        worker.running = None
        self.tell(self.number, m.Done(run.task_id, run.attempt, run_us, b"\0"))
        self.run_next(worker)
        self.turn()

    @precondition(lambda self: any(w.running and not w.blocked for w in self.workers.values()))
    @rule(data=st.data())
    def block(self, data: st.DataObject) -> None:
        worker = self.some(
            data, [n for n, w in self.workers.items() if w.running and not w.blocked])
        worker.blocked = True
        unstarted = tuple(item.task_id for item in worker.queue if type(item) is m.Run)
        worker.queue = deque(item for item in worker.queue if type(item) is m.Stop)
        self.tell(self.number, m.Blocked(unstarted))
        self.turn()

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        self.some(data, list(self.workers))
        del self.workers[self.number]
        self.machine.worker_exited(self.number, values.Failure("WorkerCrashedError", "killed"))
        self.turn()

    @precondition(lambda self: self.starting)
    @rule()
    def stillborn(self) -> None:
        self.machine.worker_exited(
            self.starting.pop(0), values.Failure("WorkerCrashedError", "stillborn"))
        self.turn()

    @rule(seconds=st.sampled_from((0.001, 0.02, 6.0)))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.machine.tick(self.now_s)
        self.turn()

    # --- what must hold ----------------------------------------

    @invariant()
    def valid(self) -> None:
        self.machine.validate()  # DP-1, DP-4, and DP-3 of its own

    @invariant()
    def a_running_task_is_in_one_datagram(self) -> None:
        """DP-2, and the workers' truth: what they have is what the dispatcher thinks they have."""
        seen: dict[bytes, int] = {}
        for number, worker in self.machine.dispatcher.workers.items():
            for datagram in worker.datagrams:
                for task in datagram:
                    assert task.task_id not in seen
                    seen[task.task_id] = number
                    assert task.state == RUNNING
                    assert task.worker == number
        running = {t for t, task in self.machine.tasks.records.items() if task.state == RUNNING}
        assert running == set(seen)
        has: dict[bytes, int] = {}
        for number, model in self.workers.items():
            items = [*model.queue, *(item for batch in model.unread for item in batch)]
            if model.running is not None:
                items.append(model.running)
            has.update({item.task_id: number for item in items if isinstance(item, m.Run)})
        assert has == seen

    @invariant()
    def nobody_idles_beside_work_that_fits(self) -> None:
        dispatcher = self.machine.dispatcher
        if any(w.state is WorkerState.IDLE for w in dispatcher.workers.values()):
            for queue in dispatcher.queues.values():
                assert not queue.tasks or not dispatcher.ledger.fits(queue.shape)

    def teardown(self) -> None:
        """Let everybody work: all tasks end, everything is free."""
        for _ in range(10_000):
            if not self.machine.tasks.records:
                break
            moved = False
            while self.starting:
                self.hello()
                moved = True
            for number in list(self.workers):
                self.number = number
                worker = self.workers.get(number)
                if worker is None:
                    continue
                if worker.running is not None:
                    run = worker.running
                    worker.running = None
                    if worker.blocked:
                        worker.blocked = False
                        self.tell(number, m.Unblocked())
                    self.tell(number, m.Done(run.task_id, run.attempt, 5, b"\0"))
                    moved = True
                elif not worker.queue and worker.unread:
                    worker.queue.extend(worker.unread.popleft())
                    moved = True
                self.run_next(worker)
            self.now_s += 0.02
            self.machine.tick(self.now_s)
            self.turn()
            assert moved or not self.machine.tasks.records, "tasks wait and nobody runs them"
        assert not self.machine.tasks.records
        self.machine.validate()
        assert self.machine.dispatcher.ledger.free == self.machine.dispatcher.ledger.total


TestDispatcher = DispatcherMachine.TestCase
