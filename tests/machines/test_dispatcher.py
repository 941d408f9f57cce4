"""Dispatcher: DP-1 to DP-4 with workers that run, block, are slow, are raided and die at will."""

from __future__ import annotations

from collections import deque

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpcray.node import outbox as out
from hpcray.node.machine import Machine
from hpcray.node.records import WorkerState
from hpcray.node.task_states import RUNNING
from hpcray.protocol import ids, values
from hpcray.protocol import messages as m

CPU = (("CPU", m.UNIT),)
# (resources, max_retries, max_calls, priority, environment) of the functions there are.
KINDS = [
    (CPU, 3, 0, 0, b""), (CPU, 3, 0, 0, b""), (CPU, 0, 0, 2, b""), (CPU, -1, 2, -1, b""),
    ((), 3, 0, 0, b""), ((("CPU", m.UNIT // 2),), 3, 0, 1, b""),
    ((("CPU", m.UNIT), ("GPU", m.UNIT // 2)), 1, 0, 0, b""),
    ((("CPU", m.UNIT // 2), ("GPU", m.UNIT)), 3, 0, 0, b""), (CPU, 3, 0, 0, b"e1"),
    (CPU, 3, 0, 0, b"e2"), ((("CPU", m.UNIT), ("GPU", 2 * m.UNIT)), 3, 0, 0, b"e2"),
]


class WorkerModel:
    """A worker process: what it has not read, what it has read, whether it waits in get."""

    def __init__(self) -> None:
        self.unread: deque[list[m.Run | m.Stop]] = deque()
        self.queue: deque[m.Run | m.Stop] = deque()
        self.running: m.Run | None = None
        self.blocked = False
        self.runs: dict[bytes, int] = {}  # by template
        self.entered: tuple[bytes, tuple[int, ...]] | None = None  # environment and GPUs


class DispatcherMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        job = ids.job_id(1)
        self.machine = Machine(0, 1, {"CPU": 2 * m.UNIT, "GPU": 2 * m.UNIT}, 1 << 20, job, {})
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
            max_retries=retries, max_calls=calls, priority=priority, environment=environment))
            for kind, (shape, retries, calls, priority, environment) in enumerate(KINDS)))

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
            entered = KINDS[item.template_id[0]][4], item.devices
            assert worker.entered in (None, entered), "libraries look at their process once"
            worker.entered = entered
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
        running = worker.running
        assert running is not None
        others = [t for t in self.retries if t != running.task_id]
        waits = data.draw(st.lists(st.sampled_from(others), max_size=3)) if others else []
        self.tell(self.number, m.Blocked(
            unstarted, b"".join(t + ids.FIRST_RETURN for t in waits)))
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

    @precondition(lambda self: self.starting)
    @rule()
    def refused(self) -> None:
        self.machine.dispatcher.worker_refused(self.starting.pop(0), "no descriptors", "0 of 9")
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
        idle = [w for w in dispatcher.workers.values() if w.state is WorkerState.IDLE]
        for queue in dispatcher.queues.values():
            if queue.tasks and dispatcher.ledger.fits(queue.shape) and not dispatcher.pausing:
                wanted = (queue.tasks[0].template.environment,
                          dispatcher.ledger.pick(queue.shape) or ())
                assert all(w.environment is not None and (w.environment, w.bound_devices) != wanted
                           for w in idle)
                assert self.starting or dispatcher.refused, "nobody comes for it"

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
            assert moved or not self.machine.tasks.records or self.machine.dispatcher.refused, (
                "tasks wait and nobody runs them")
        assert not self.machine.tasks.records
        self.machine.validate()
        assert self.machine.dispatcher.ledger.free == self.machine.dispatcher.ledger.total


TestDispatcher = DispatcherMachine.TestCase


class Blocking:
    """A node whose workers run one task each and block when told; time stands still."""

    def __init__(self, cpus: int) -> None:
        self.machine = DispatcherMachine()
        m_ = self.machine.machine
        m_.dispatcher.ledger.total["CPU"] = m_.dispatcher.ledger.free["CPU"] = cpus * m.UNIT

    def submit(self, kind: int, count: int = 1) -> list[bytes]:
        before = set(self.machine.retries)
        self.machine.submit(kind, count)  # type: ignore[call-arg]
        self.settle()
        return [t for t in self.machine.retries if t not in before]

    def settle(self) -> None:
        machine = self.machine
        for _ in range(100):
            if machine.starting:
                machine.hello()
            for number, worker in machine.workers.items():
                if worker.unread and not worker.running:
                    machine.number = number
                    worker.queue.extend(worker.unread.popleft())
                    machine.run_next(worker)

    def running(self) -> dict[bytes, int]:
        return {w.running.task_id: n for n, w in self.machine.workers.items() if w.running}

    def block(self, task: bytes, *waits: bytes) -> None:
        number = self.running()[task]
        worker = self.machine.workers[number]
        worker.blocked = True
        unstarted = tuple(item.task_id for item in worker.queue if type(item) is m.Run)
        worker.queue.clear()
        self.machine.tell(number, m.Blocked(
            unstarted, b"".join(t + ids.FIRST_RETURN for t in waits)))
        self.machine.turn()
        self.settle()

    def done(self, task: bytes) -> None:
        number = self.running()[task]
        worker = self.machine.workers[number]
        if worker.blocked:
            worker.blocked = False
            self.machine.tell(number, m.Unblocked())
        worker.running = None
        self.machine.tell(number, m.Done(task, 0, 50, b"\0"))
        self.machine.turn()
        self.settle()

    def after(self, seconds: float) -> None:
        self.machine.time_passes(seconds)  # type: ignore[call-arg]
        self.settle()


def test_a_function_whose_tasks_block_gets_further_workers_one_by_one() -> None:
    node = Blocking(cpus=1)
    outer = node.submit(0, 100)
    begun = []
    for pause_s in (0.2, 0.4, 0.8, 1.0, 1.0):
        [running] = [t for t in node.running() if t not in begun]
        begun.append(running)
        node.block(running)  # until something comes from elsewhere
        node.after(pause_s - 0.01)
        assert set(node.running()) == set(begun), "too early"
        node.after(0.011)
    assert begun == outer[: len(begun)], "in the order of submission"


def test_what_a_blocked_task_waits_for_runs_at_once_and_first() -> None:
    node = Blocking(cpus=1)
    first, *_ = node.submit(0, 100)
    [child] = node.submit(1)
    node.block(first, child)
    assert set(node.running()) == {first, child}
    node.done(child)
    assert child not in node.running()


def test_a_recursive_function_is_not_held_back() -> None:
    node = Blocking(cpus=1)
    [task] = node.submit(0)
    chain = [task]
    for _ in range(30):
        [child] = node.submit(0)
        node.block(chain[-1], child)
        chain.append(child)
    assert set(node.running()) == set(chain)


def test_what_waits_for_what_is_here_keeps_its_cpu() -> None:
    node = Blocking(cpus=1)
    [done] = node.submit(0)
    node.done(done)
    first, second = node.submit(0, 2)
    node.block(first, done)
    assert set(node.running()) == {first} and len(node.machine.workers) == 1
    node.block(first, done, second)
    assert set(node.running()) == {first, second}


def test_what_comes_back_unstarted_keeps_its_order() -> None:
    node = Blocking(cpus=1)
    [known] = node.submit(0)
    node.done(known)  # short: the next ones are sent in batches
    first, *rest = node.submit(0, 40)
    assert len(node.machine.workers[node.running()[first]].queue) > 5
    node.block(first)
    queued = [t.task_id for q in node.machine.machine.dispatcher.queues.values() for t in q.tasks]
    assert queued == rest


def test_what_no_worker_can_ever_run_fails_with_the_reason_and_one_notice() -> None:
    node = DispatcherMachine()
    machine = node.machine
    node.submit(0, 1)
    task = next(iter(machine.tasks.records))
    attempts = 0
    while machine.tasks.records:
        while node.starting:
            attempts += 1
            machine.dispatcher.worker_refused(node.starting.pop(0), "no descriptors", "0 of 9")
        node.now_s += 0.5
        machine.tick(node.now_s)
        node.turn()
        assert node.now_s < 60
    assert 10 < node.now_s
    assert attempts < 60, "it backs off"
    value = machine.directory.records[task + ids.FIRST_RETURN].value
    assert value is not None
    failure = values.unpack_failure(value)
    assert failure.kind == "TaskUnschedulableError"
    assert "no descriptors" in failure.message


def test_queues_of_shapes_that_nothing_has_any_more_are_forgotten() -> None:
    node = Blocking(cpus=1)
    machine = node.machine
    for number in range(100):
        name = number.to_bytes(16, "little")
        machine.tell(0, m.DefineTemplate(m.Template(
            name, b"f" * 16, m.TASK, "g", resources=(("CPU", 100 + number),))))
        machine.count += 1
        task_id = ids.task_id(machine.prefix, machine.count, machine.tail)
        machine.retries[task_id] = 0
        machine.tell(0, m.SubmitTask(task_id, name, b""))
        machine.machine.tasks.cancel(task_id, force=False, recursive=False)
        machine.turn()
    node.after(2.0)
    node.after(2.0)
    assert len(machine.machine.dispatcher.queues) <= 32
    [again] = node.submit(0)
    node.done(again)
