"""The dispatcher: tasks bound (or bindable) to this node, its workers, and who runs what. Pure.

    enqueue --> queue per shape --lease: resources + an idle worker--> datagrams to the worker
                     ^                                                      |
                     +--- taken back (blocked, slow, died unread) ----------+--> finished

Workers:

    STARTING  forked, has not said hello
                it has said hello --> IDLE
    IDLE      waits for a lease
                a queue leases it for its shape --> LEASED
                there are more idle ones than needed --> STOPPING
    LEASED    runs tasks
                its lease has ended --> IDLE
                it is given an actor's creation --> ACTOR
                it has run max_calls of a function --> STOPPING
    ACTOR     hosts an actor until it exits
    STOPPING  told to exit

A worker is leased for one shape (set of resources) and runs tasks of that shape one after
another. A datagram holds as many tasks as fit into 1 ms; a second one is prefetched only for
tasks known to be short. What a worker has not read can be taken back at any time, so one slow
task holds nobody.

A worker that blocks in `get` gives its CPU back; what it waits for goes first in the queue. If
tasks of one function block on all its CPUs, the next ones of it would most likely block as well:
further workers for them are started one by one, after a pause that doubles (`BackOff`). Tasks of
other functions are not held back, nor are the few that a blocked task waits for, nor a recursive
function's own: so nested tasks go on, and a thousand blocked tasks do not become a thousand
processes.

Invariants, checked by `validate`:

DP-1  free + the shapes of all leases (less what blocked workers gave back) == total.
DP-2  a RUNNING task is in exactly one datagram of exactly one worker, or in an actor.
DP-3  an idle worker holds nothing.
DP-4  a queue is in order of priority, the highest first.
DP-5  no datagram is empty: the head of a worker's first one is what it runs.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice, takewhile
from typing import Any

from hpcray.node.executor import Executor
from hpcray.node.ledger import ResourceLedger, Shape, cpu_part, is_group_shape, without_cpu
from hpcray.node.outbox import KillWorker, Outbox, StartWorker, TakeBack
from hpcray.node.records import (
    WORKER_FREE,
    WORKER_HELLO,
    WORKER_HOSTS,
    WORKER_LEASED,
    WORKER_RETIRES,
    WORKER_SPARE,
    TaskRecord,
    Worker,
    WorkerState,
    in_store,
    is_here,
)
from hpcray.node.states import Edge, move
from hpcray.node.tables import Tables, unwired
from hpcray.node.task_states import FETCHED, QUEUED, WAITING
from hpcray.protocol import ids, values
from hpcray.protocol.messages import ACTOR_CREATION, METHOD, TASK, Stop, Template

BATCH_MAX = 16
_BATCH_BYTES = 96 * 1024
# A second datagram waits at the worker only if its tasks are this short: longer ones gain nothing.
_PREFETCH_MAX_US = 5_000
# A worker whose datagram has run for this long is slow: what it has not read is taken back.
_SLOW_S = 0.01
# Idle workers beyond the number of CPUs live this long.
_IDLE_WORKER_S = 5.0
# Beyond so many, one ends for each worker of another runtime environment that is started.
_IDLE_MAX = 32
# Pauses between further workers for a function whose tasks block: the first, and the longest.
_BACK_OFF_S = 0.2
_BACK_OFF_MAX_S = 1.0
# How far from the end of a queue a task that somebody waits for is looked for.
_LOOK_BACK = 1000
# How far into a queue the place of a task that comes back is looked for.
_LOOK_AHEAD = 256
# With more queues than this, empty ones are forgotten, this often.
_QUEUES_KEPT = 32
_PRUNE_S = 1.0
# Forks under way at once; a fork takes 1-3 ms and the zygote does them one by one.
_STARTING_MAX = 16
# Workers that could not be started are asked for again, later and later. What waits for them fails
# when nobody that could have run it has been there for so long.
_FIRST_DELAY_S = 0.05
_LAST_DELAY_S = 2.0
_REFUSED_S = 10.0
# Actors that wait for a worker fail when none of them has got one for so long: others may live on.
_CREATION_REFUSED_S = 20.0
# Workers kept for tasks when no more can be started: actors would take every one.
_KEPT_MAX = 4


class ShapeQueue:
    __slots__ = ("creation", "leased", "ranked", "shape", "starved", "tasks")

    def __init__(self, shape: Shape, creation: bool) -> None:
        self.shape = shape
        self.creation = creation
        self.tasks: deque[TaskRecord] = deque()
        self.leased: dict[int, Worker] = {}
        self.starved = False  # reported as impossible
        self.ranked = False  # has seen a priority: kept in order (DP-4)


class BackOff:
    """When the next worker may run one more task of a function whose tasks block."""

    __slots__ = ("next_s", "pause_s")

    def __init__(self, now_s: float) -> None:
        self.pause_s = _BACK_OFF_S
        self.next_s = now_s + self.pause_s

    def used(self, now_s: float) -> None:
        self.pause_s = min(2 * self.pause_s, _BACK_OFF_MAX_S)
        self.next_s = now_s + self.pause_s


def _urgency(task: TaskRecord) -> int:
    return -task.template.priority


def _place(task: TaskRecord, first: Iterable[TaskRecord]) -> int:
    """Where a task that comes back belongs among the first in a queue: behind those that the same
    parent submitted earlier."""
    prefix = task.task_id[:12]
    number = int.from_bytes(task.task_id[12:16], "little")
    place = 0
    for other in islice(first, _LOOK_AHEAD):
        other_id = other.task_id
        if (other_id[:12] != prefix or int.from_bytes(other_id[12:16], "little") > number
                or other.template.priority != task.template.priority):
            break
        place += 1
    return place


def _head_urgency(queue: ShapeQueue) -> int:
    return _urgency(queue.tasks[0]) if queue.tasks else 0


class Dispatcher:
    def __init__(
        self, tables: Tables, outbox: Outbox, ledger: ResourceLedger, executor: Executor,
        lent: set[int],
    ) -> None:
        self._tables = tables
        self._objects = tables.objects
        self._records = tables.tasks
        self._statistics = tables.statistics
        self._hosted = tables.hosted
        self._rank = tables.rank
        self._outbox = outbox
        self.ledger = ledger
        self._executor = executor
        self._lent = lent  # workers that have given their CPU back for memory (NodeMemory)
        self.workers = tables.workers
        # Ports. Of placement groups: fail a task whose group was removed (and whether it was);
        # shapes that their bundles hold.
        self.refuse_of_group: Callable[[TaskRecord], bool] = unwired
        self.held_shapes: Callable[[], list[Shape]] = unwired
        # Of other nodes: shapes that are asked for there; find an actor another place.
        self.demanded_shapes: Callable[[], set[Shape]] = unwired
        self.place_actor: Callable[[TaskRecord], None] = unwired
        # A worker was given an actor's creation (task, worker, its GPUs); a worker with an actor
        # is gone, or is being killed with its placement group; any worker is gone.
        self.creating: Callable[[TaskRecord, int, tuple[int, ...]], None] = unwired
        self.actor_gone: Callable[[bytes, int, values.Failure], None] = unwired
        self.actor_of_group: Callable[[bytes], None] = unwired
        self.worker_over: Callable[[Worker, values.Failure], None] = unwired
        self.queues: dict[tuple[Shape, bool], ShapeQueue] = {}
        self._queue_of: dict[bytes, ShapeQueue] = {}  # by template
        self._idle: deque[Worker] = deque()
        self._starting = 0
        self._worker_count = 0
        # Workers whose last datagram is finished; decided on at the end of the turn.
        self._drained: dict[int, Worker] = {}
        # Workers with an unread datagram behind the running one.
        self.piled: dict[int, Worker] = {}
        self._dirty = False
        # Some task has a priority: queues take turns by it.
        self._ranked = False
        # Leased workers that wait in `get`; by template, when more of its tasks may start; and
        # tasks that some of them wait for, which are not held back.
        self._blocked: dict[int, Worker] = {}
        self._back_offs: dict[bytes, BackOff] = {}
        self._needed: set[bytes] = set()
        self._next_prune_s = 0.0
        # The store is filling: consumers go first.
        self.tight = False
        # Some queue waits for the end of a pause.
        self.pausing = False
        # How many forked workers died before they said hello, in a row.
        self._stillborn = 0
        # Why no worker can be started now; "": nothing is known against it.
        self.refused = ""
        self._refused_since_s = 0.0
        self._created_s = 0.0  # an actor has got a worker, or the first was refused one
        # When to ask again, and how long after that: for an actor's worker and for tasks'.
        self._retry_s = [0.0, 0.0]
        self._delay_s = [_FIRST_DELAY_S, _FIRST_DELAY_S]
        self._reasons_told: set[str] = set()

    # --- tasks in ---------------------------------------------------------------------------------

    def enqueue(self, task: TaskRecord, *, front: bool = False) -> None:
        template = task.template
        if template.group_id and self.refuse_of_group(task):
            return
        queue = self._queue_of.get(template.template_id)
        if queue is None:
            queue = self._queue_of[template.template_id] = self._queue_for(template)
        if self.tight and not queue.ranked and self._consumes(task):
            tasks = queue.tasks
            ahead = takewhile(self._consumes, islice(tasks, _LOOK_AHEAD))
            tasks.insert(0 if front else sum(1 for _ in ahead), task)
        elif queue.ranked or template.priority:
            self._insert(queue, task, front)
        elif front:
            tasks = queue.tasks
            tasks.insert(_place(task, tasks), task)
        else:
            queue.tasks.append(task)
        self._dirty = True

    def _queue_for(self, template: Template) -> ShapeQueue:
        key = (template.resources, template.kind == ACTOR_CREATION)
        queue = self.queues.get(key)
        if queue is None:
            queue = self.queues[key] = ShapeQueue(*key)
        return queue

    def _insert(self, queue: ShapeQueue, task: TaskRecord, front: bool) -> None:
        """By priority; among equals last, or first."""
        tasks = queue.tasks
        queue.ranked = self._ranked = True
        bisect = bisect_left if front else bisect_right
        at = bisect(tasks, -task.template.priority, key=_urgency)
        if front:
            at += _place(task, islice(tasks, at, None))
        tasks.insert(at, task)

    def set_tight(self, tight: bool) -> None:
        """The store is filling, or not any more: if so, what uses it up goes first."""
        if tight and not self.tight:
            for queue in self.queues.values():
                first = [t for t in queue.tasks if t.dep_count and self._consumes(t)]
                if first:
                    chosen = {t.task_id for t in first}
                    rest = [t for t in queue.tasks if t.task_id not in chosen]
                    queue.tasks = deque(first + rest)
                    if queue.ranked:
                        queue.tasks = deque(sorted(queue.tasks, key=_urgency))
            self._dirty = True
        self.tight = tight

    def _consumes(self, task: TaskRecord) -> bool:
        """Whether some of its arguments lie in the store of this node."""
        records = self._objects
        for object_id in ids.split_ids(task.refs[: task.dep_count * 28]):
            record = records.get(object_id)
            if record is not None and in_store(record):
                return True
        return False

    def fetched(self, task: TaskRecord) -> None:
        """Its dependencies have arrived: it was next, it is next."""
        move(task, FETCHED)
        self.enqueue(task, front=True)

    def has_room_for(self, shape: Shape) -> bool:
        """Whether one more such task could start now."""
        queue = self.queues.get((shape, False))
        waiting = len(queue.tasks) if queue is not None else 0
        return self.ledger.fits(shape) and self.ledger.slots(shape) > waiting

    def has_room(self, template: Template) -> bool:
        return self.has_room_for(template.resources)

    def queued(self) -> int:
        return sum(len(queue.tasks) for queue in self.queues.values())

    def creations(self) -> int:
        """Actors that wait for a worker."""
        return sum(len(queue.tasks) for queue in self.queues.values() if queue.creation)

    @property
    def starting(self) -> bool:
        """Workers have been forked and have not said hello."""
        return self._starting > 0

    # --- workers come and go ----------------------------------------------------------------------

    def start_workers(self, count: int, *, for_tasks: bool = True) -> None:
        for _ in range(count):
            self._worker_count += 1
            number = self._worker_count
            self.workers[number] = Worker(number, for_tasks)
            self._starting += 1
            self._outbox.actions.append(StartWorker(number, for_tasks))

    def worker_ready(self, number: int, pid: int, now_s: float) -> None:
        worker = self.workers[number]
        worker.pid = pid
        self._starting -= 1
        self._stillborn = 0
        self._refused_since_s = now_s
        self._make_idle(worker, WORKER_HELLO, now_s)

    def _make_idle(self, worker: Worker, edge: Edge, now_s: float) -> None:
        move(worker, edge)
        worker.idle_since_s = now_s
        self._idle.append(worker)
        self._dirty = True

    def worker_gone(self, number: int, failure: values.Failure) -> None:
        """The process has ended, by whatever cause."""
        worker = self.workers.pop(number, None)
        if worker is None:
            return
        self.worker_over(worker, failure)
        if worker.state is WorkerState.STARTING:
            self._starting -= 1
            self._stillborn += 1
            if self._stillborn >= 3:
                self._refuse("workers die as they start, see their output above for why",
                             failure.message, worker.for_tasks)
        elif self.refused:
            self._retry_s = [0.0, 0.0]  # its place is free
        if worker in self._idle:
            self._idle.remove(worker)
        self.piled.pop(number, None)
        self._drained.pop(number, None)
        if worker.state is WorkerState.ACTOR or worker.actor_id:
            self.actor_gone(worker.actor_id, number, failure)
        datagrams, worker.datagrams = worker.datagrams, deque()
        first = True
        for datagram in datagrams:
            for task in datagram:
                # Any task of the first datagram may have been running: results leave per datagram.
                self._executor.worker_died(task, failure, started=first)
            first = False
        self._unlease(worker)
        self._dirty = True

    def worker_refused(self, number: int, reason: str, details: str) -> None:
        """It could not be started. `reason`: what is missing, and what to do about it."""
        worker = self.workers.pop(number, None)
        if worker is not None:
            self._starting -= 1
            self._refuse(reason, details, worker.for_tasks)

    def _refuse(self, reason: str, details: str, for_tasks: bool) -> None:
        now_s = self._tables.now_s
        if not self.refused:
            self._refused_since_s = self._created_s = now_s
            self._delay_s = [_FIRST_DELAY_S, _FIRST_DELAY_S]
        self.refused = reason
        if now_s >= self._retry_s[for_tasks]:  # the first of those that were started together
            delay_s = self._delay_s[for_tasks]
            self._retry_s[for_tasks] = now_s + delay_s
            self._delay_s[for_tasks] = min(2 * delay_s, _LAST_DELAY_S)
        if reason not in self._reasons_told:
            self._reasons_told.add(reason)
            self._outbox.notices.append(
                f"Warning: rank {self._rank} cannot start another worker: {reason} "
                f"({details}). What waits for one waits until others end, an actor for at most "
                f"{_CREATION_REFUSED_S:g} s.")

    def _retry_refused(self, now_s: float) -> None:
        """On the tick: look whether workers can be started by now; fail what waits in vain."""
        if not any(queue.tasks for queue in self.queues.values()):
            self.refused = ""  # unknown, until somebody wants one
            return
        if now_s >= min(self._retry_s):
            self._dirty = True
        if any(worker.state in (WorkerState.IDLE, WorkerState.LEASED) and not worker.blocked
               for worker in self.workers.values()):
            self._refused_since_s = now_s
        elif now_s - self._refused_since_s > _REFUSED_S:
            self._refused_since_s = now_s
            self._fail_refused(creation=False, after_s=_REFUSED_S)
        if now_s - self._created_s > _CREATION_REFUSED_S:
            self._created_s = now_s
            self._fail_refused(creation=True, after_s=_CREATION_REFUSED_S)

    def _fail_refused(self, *, creation: bool, after_s: float) -> None:
        """No worker has come that could run what waits in these queues."""
        for queue in self.queues.values():
            if queue.creation == creation and self.ledger.fits(queue.shape):
                tasks, queue.tasks = queue.tasks, deque()
                for task in tasks:
                    if not task.cancelled:
                        self._executor.refuse(task, (
                            f"no worker could be started for it on rank {self._rank} for "
                            f"{after_s:g} s: {self.refused}"))

    def _kept_for_tasks(self, queue: ShapeQueue) -> bool:
        """Whether the workers that are left are for others than this queue."""
        if not (self.refused and queue.creation):
            return False
        kept = min(max(self.ledger.total.get("CPU", 0) // 10_000, 1), _KEPT_MAX)
        actors = len(self._hosted)
        return len(self.workers) - self._starting - actors <= kept

    def _unlease(self, worker: Worker) -> None:
        shape = worker.shape
        if worker.blocked:
            shape = without_cpu(shape)
            worker.blocked = False
            self._forget_blocked(worker)
        if worker.shape or worker.devices:
            self.ledger.release(shape, worker.devices)
        worker.shape = ()
        worker.devices = ()
        for queue in self.queues.values():
            queue.leased.pop(worker.number, None)

    # --- scheduling -------------------------------------------------------------------------------

    def end_turn(self, now_s: float) -> None:
        """Give work to whoever can take it. Once per turn of the loop."""
        if not (self._dirty or self._drained):
            return
        self._dirty = self.pausing = False
        busy = [queue for queue in self.queues.values() if queue.tasks]
        if len(busy) > 1:
            # Nobody keeps a lease while others wait: everyone takes turns.
            for worker in list(self._drained.values()):
                self._end_lease(worker, now_s)
            self._drained.clear()
            progress = True
            while progress:
                progress = False
                if self._ranked:
                    busy.sort(key=_head_urgency)
                for queue in busy:
                    if queue.tasks and self._lease_one(queue, now_s):
                        progress = True
                        if self._ranked:
                            break  # the most urgent again
            for queue in busy:
                if queue.tasks:
                    self._start_for(queue)
        elif busy:
            self._serve(busy[0], now_s)
        for worker in list(self._drained.values()):
            if not worker.datagrams:
                self._steal_or_end(worker, now_s)
        self._drained.clear()

    def _serve(self, queue: ShapeQueue, now_s: float) -> None:
        for worker in list(self._drained.values()):
            if not queue.tasks:
                return
            if worker.number in queue.leased:
                if worker.retiring:
                    self._end_lease(worker, now_s)
                elif not worker.datagrams and worker.state is WorkerState.LEASED:
                    if self._blocked and not self._allowed(queue, now_s):
                        return  # the lease ends
                    self._fill(queue, worker, now_s)
            elif not worker.datagrams:
                self._end_lease(worker, now_s)
        while queue.tasks and self._lease_one(queue, now_s):
            pass
        if not queue.tasks or queue.creation:
            if queue.tasks:
                self._start_for(queue)
            return
        statistics = self._statistics
        for worker in queue.leased.values():
            if not queue.tasks:
                return
            if (len(worker.datagrams) == 1 and not worker.blocked and not worker.slow
                    and not worker.retiring):
                known = statistics[queue.tasks[0].template.template_id]
                if not known.count or known.slow_us > _PREFETCH_MAX_US or known.singly:
                    break
                self._fill(queue, worker, now_s)
        if queue.tasks:
            self._start_for(queue)

    def _lease_one(self, queue: ShapeQueue, now_s: float) -> bool:
        """Lease an idle worker for the queue and give it work; False if nothing could start."""
        if not self._idle or not self.ledger.fits(queue.shape) or self._kept_for_tasks(queue):
            return False
        if self._blocked and not self._allowed(queue, now_s):
            return False
        devices = self.ledger.acquire(queue.shape)
        worker = self._find_idle(queue, devices)
        if worker is None:
            self.ledger.release(queue.shape, devices)
            return False
        if worker is self._idle[0]:
            self._idle.popleft()
        else:
            self._idle.remove(worker)
        worker.devices = devices
        worker.shape = queue.shape
        move(worker, WORKER_LEASED)
        worker.slow = False
        if not queue.creation:
            queue.leased[worker.number] = worker
        if self._back_offs:
            back_off = self._back_offs.get(queue.tasks[0].template.template_id)
            if back_off is not None:
                back_off.used(now_s)
        if not self._fill(queue, worker, now_s):
            self._unlease(worker)
            self._make_idle(worker, WORKER_FREE, now_s)
            return bool(queue.tasks)
        return True

    def _allowed(self, queue: ShapeQueue, now_s: float) -> int:
        """How many more workers may run what is first in the queue, as far as tasks block."""
        task = queue.tasks[0]
        if queue.creation:
            return _STARTING_MAX
        if task.task_id in self._needed:
            return 1
        template_id = task.template.template_id
        same = [worker for worker in queue.leased.values()
                if worker.datagrams
                and worker.datagrams[0][0].template.template_id == template_id]
        blocked = any(worker.blocked for worker in same)
        lent = self._lent
        if lent and any(w.number in lent for w in same) and not self._consumes(task):
            self.pausing = True
            return 0  # one more would only wait for memory as well
        room = self.ledger.slots_in_all(queue.shape) - len(same)
        if not blocked or room > 0:
            self._back_offs.pop(template_id, None)
            return room if blocked else _STARTING_MAX
        back_off = self._back_offs.get(template_id)
        if back_off is None:
            back_off = self._back_offs[template_id] = BackOff(now_s)
        self.pausing = True
        return int(now_s >= back_off.next_s)

    def _find_idle(self, queue: ShapeQueue, devices: tuple[int, ...]) -> Worker | None:
        """An idle worker for the first task: one of its runtime environment and its GPUs, or one
        that has run nothing yet."""
        wanted = queue.tasks[0].template.environment
        fresh = None
        for worker in self._idle:
            if worker.environment == wanted and worker.bound_devices == devices:
                return worker
            if fresh is None and worker.environment is None:
                fresh = worker
        return fresh

    def _fill(self, queue: ShapeQueue, worker: Worker, now_s: float) -> bool:
        """Send one datagram of tasks to the worker; False if none in the queue can run yet."""
        executor = self._executor
        waiting = queue.tasks
        number = worker.number
        devices = worker.devices
        datagram: deque[TaskRecord] = deque()
        run: list[Any] = []
        limit = 0
        room_bytes = _BATCH_BYTES
        template = None
        while waiting:
            task = waiting[0]
            if task.state is not QUEUED or task.cancelled:
                waiting.popleft()
                continue
            if task.template is not template:
                template = task.template
                if template.max_calls and worker.datagrams:
                    break  # what is under way may be the worker's last
                if template.environment != worker.environment:
                    if worker.environment is not None or run or worker.datagrams:
                        break  # for another worker
                    worker.environment = template.environment
                    worker.bound_devices = devices
                batch = self._statistics[template.template_id].batch(BATCH_MAX)
                if template.max_retries == 0 or template.max_calls or queue.creation:
                    batch = 1  # its outcome must be known before anything else runs
                if limit and (batch == 1 or len(run) >= batch):
                    break
                limit = batch if not limit else min(limit, batch)
            if run and (len(run) >= limit or len(task.args) > room_bytes):
                break
            waiting.popleft()
            if task.dep_count:
                if not executor.fetch(task):
                    continue  # comes back to the front when its dependencies have arrived
                room_bytes = 0
            room_bytes -= len(task.args)
            datagram.append(task)
            alone = not (run or waiting or worker.datagrams)
            run.append(executor.run_message(task, number, devices, alone))
        if not run:
            return False
        if not worker.datagrams:
            worker.sent_s = now_s
        worker.datagrams.append(datagram)
        if len(worker.datagrams) > 1:
            self.piled[worker.number] = worker
        self._outbox.tasks.append((worker.number, run))
        if queue.creation:
            self._created_s = now_s
            move(worker, WORKER_HOSTS)
            worker.actor_id = datagram[0].actor_id
            self.creating(datagram[0], worker.number, worker.devices)
        return True

    def _start_for(self, queue: ShapeQueue) -> None:
        """Fork workers if that is what is missing."""
        for_tasks = not queue.creation
        if self.refused and self._tables.now_s < self._retry_s[for_tasks]:
            return
        if (self._idle and not self._kept_for_tasks(queue)
                and self._find_idle(queue, self.ledger.pick(queue.shape) or ()) is not None):
            return
        wanted = min(len(queue.tasks), self.ledger.slots(queue.shape), _STARTING_MAX)
        if self._blocked:
            wanted = min(wanted, self._allowed(queue, self._tables.now_s))
        if self.refused:
            wanted = min(wanted, _KEPT_MAX)
        if self._starting < wanted:
            self.start_workers(wanted - self._starting, for_tasks=for_tasks)
            # Those that are idle are of other environments. There may be many of these.
            if self._idle and (self.refused or len(self._idle) > _IDLE_MAX):
                self._stop_idle()

    def _steal_or_end(self, worker: Worker, now_s: float) -> None:
        """A leased worker without work: take what waits unread at another, or end the lease."""
        if self.piled and worker.state is WorkerState.LEASED and not worker.retiring:
            for other in self.piled.values():
                if other.shape == worker.shape and not other.slow:
                    other.slow = True  # not refilled until its running datagram is done
                    self._outbox.actions.append(TakeBack(other.number))
                    break
        self._end_lease(worker, now_s)

    def _end_lease(self, worker: Worker, now_s: float) -> None:
        if worker.state is not WorkerState.LEASED or worker.datagrams:
            return
        self._unlease(worker)
        if worker.retiring:
            move(worker, WORKER_RETIRES)
            self._outbox.tasks.append((worker.number, [Stop()]))
        else:
            self._make_idle(worker, WORKER_FREE, now_s)

    # --- outcomes ---------------------------------------------------------------------------------

    def finished(self, task: TaskRecord) -> None:
        """A task of this node's workers has an outcome."""
        if self._needed:
            self._needed.discard(task.task_id)
        worker = self.workers.get(task.worker)
        if worker is None or not worker.datagrams:
            return
        datagrams = worker.datagrams
        datagram = datagrams[0]
        if datagram[0] is task:
            datagram.popleft()
        else:
            for datagram in datagrams:
                if task in datagram:
                    datagram.remove(task)
                    break
        if not datagram:
            self._drop_empty(worker)
            datagrams = worker.datagrams
        template = task.template
        if template.max_calls:
            if worker.calls is None:
                worker.calls = {}
            runs = worker.calls.get(template.template_id, 0) + 1
            worker.calls[template.template_id] = runs
            worker.retiring = worker.retiring or runs >= template.max_calls
        if len(datagrams) < 2:
            self.piled.pop(worker.number, None)
            if not datagrams:
                self._drained[worker.number] = worker
            else:
                self._dirty = True

    def _drop_empty(self, worker: Worker) -> None:
        """Any of a worker's datagrams may have become empty: while the node takes back the first,
        the worker may read the second."""
        if worker.datagrams and not worker.datagrams[0]:
            worker.sent_s = self._tables.now_s
            worker.slow = False
        worker.datagrams = deque(datagram for datagram in worker.datagrams if datagram)

    def blocked(self, number: int, unstarted: tuple[bytes, ...], waits: bytes = b"") -> None:
        """The worker waits: it gives back its CPU and everything it has not started.

        If all it waits for is here, the answers are on their way to it, and it keeps its CPU.
        """
        worker = self.workers.get(number)
        if worker is None or worker.blocked or worker.state not in (
            WorkerState.LEASED, WorkerState.ACTOR
        ):
            return
        if unstarted:
            self._take_all(worker, unstarted)
            self._dirty = True
        if waits and self._all_here(waits):
            return
        worker.blocked = True
        self.ledger.release(cpu_part(worker.shape))
        if worker.state is WorkerState.LEASED:
            self._blocked[number] = worker
            if waits:
                self._bring_forward(worker, waits)
        if len(worker.datagrams) > 1 and not worker.actor_id:
            self._outbox.actions.append(TakeBack(number))
        self._dirty = True

    def _all_here(self, waits: bytes) -> bool:
        for object_id in ids.split_ids(waits):
            record = self._objects.get(object_id)
            if record is None or not is_here(record):
                return False
        return True

    def _bring_forward(self, worker: Worker, waits: bytes) -> None:
        """What a blocked worker waits for goes first, and what that waits for before it."""
        records = self._records
        own = worker.datagrams[0][0].template if worker.datagrams else None
        pending = ids.split_ids(waits)
        few = len(pending) <= self.ledger.slots_in_all(worker.shape)
        for _ in range(_LOOK_BACK):
            if not pending:
                return
            task = records.get(ids.task_of_object(pending.pop()))
            if task is None or task.template.kind != TASK or task.home != self._rank:
                continue
            if task.state is WAITING:
                pending += ids.split_ids(task.refs[: task.dep_count * 28])
                continue
            if own is task.template or few:
                self._needed.add(task.task_id)  # if it was sent already, it may come back unread
            if task.state is QUEUED:
                self._put_first(task)

    def _put_first(self, task: TaskRecord) -> None:
        """Before others of its priority, if it is not far from the end: it was submitted lately."""
        queue = self._queue_of.get(task.template.template_id)
        if queue is None:
            return
        tasks = queue.tasks
        for back in range(1, min(len(tasks), _LOOK_BACK) + 1):
            if tasks[-back] is task:
                del tasks[-back]
                at = bisect_left(tasks, _urgency(task), key=_urgency) if queue.ranked else 0
                tasks.insert(at, task)
                return

    def _forget_blocked(self, worker: Worker) -> None:
        if self._blocked.pop(worker.number, None) is not None and not self._blocked:
            self._back_offs.clear()
            self._needed.clear()

    def unblocked(self, number: int) -> None:
        worker = self.workers.get(number)
        if worker is not None and worker.blocked:
            worker.blocked = False
            self._forget_blocked(worker)
            self.ledger.take_back(cpu_part(worker.shape))

    def taken_back(self, number: int, task_ids: list[bytes]) -> None:
        """These Runs came back unread."""
        worker = self.workers.get(number)
        if worker is None:
            return
        self._take_all(worker, task_ids)
        if len(worker.datagrams) < 2:
            self.piled.pop(number, None)
        if not worker.datagrams and worker.state is WorkerState.LEASED:
            self._drained[number] = worker
        self._dirty = True

    def _take_all(self, worker: Worker, task_ids: Iterable[bytes]) -> None:
        """Back to the front of their queues, in their order."""
        wanted = set(task_ids)
        for datagram in reversed(worker.datagrams):
            for task in reversed([t for t in datagram if t.task_id in wanted]):
                datagram.remove(task)
                self._take(task)
        self._drop_empty(worker)

    def _take(self, task: TaskRecord) -> None:
        self._executor.unrun(task)
        if task.cancelled:
            self._executor.drop_cancelled(task)
        else:
            self.enqueue(task, front=True)

    # --- time -------------------------------------------------------------------------------------

    def tick(self, now_s: float) -> None:
        """About every 10 ms while anything is piled, else every second."""
        for worker in list(self.piled.values()):
            if not worker.slow and now_s - worker.sent_s > _SLOW_S:
                worker.slow = True
                self._outbox.actions.append(TakeBack(worker.number))
        if self.pausing:
            self._dirty = True
        if len(self.queues) > _QUEUES_KEPT and now_s >= self._next_prune_s:
            self._next_prune_s = now_s + _PRUNE_S
            self._prune()
        if self.refused:
            self._retry_refused(now_s)
        cpus = max(self.ledger.total.get("CPU", 0) // 10_000, 1)
        while len(self._idle) > cpus and now_s - self._idle[0].idle_since_s > _IDLE_WORKER_S:
            self._stop_idle()

    def _stop_idle(self) -> None:
        worker = self._idle.popleft()  # idle for longest
        move(worker, WORKER_SPARE)
        self._outbox.tasks.append((worker.number, [Stop()]))

    def _prune(self) -> None:
        """Forget queues of shapes that nothing has now (of removed groups, mostly): every turn
        looks at all there are."""
        demanded = self.demanded_shapes()
        self.queues = {
            key: queue for key, queue in self.queues.items()
            if queue.tasks or queue.leased or queue.shape in demanded}
        self._queue_of = {template_id: queue for template_id, queue in self._queue_of.items()
                          if self.queues.get((queue.shape, queue.creation)) is queue}

    def template_gone(self, template: Template) -> None:
        """It is forgotten here."""
        self._queue_of.pop(template.template_id, None)
        self._back_offs.pop(template.template_id, None)

    def give_back_to(self, home: int, shape: Shape, count: int) -> None:
        """The home has a better place for tasks it bound here and that have not started."""
        queue = self.queues.get((shape, False))
        if queue is None:
            return
        for task in [t for t in reversed(queue.tasks) if t.home == home and t.state is QUEUED
                     and t.template.rank < 0 and not t.cancelled][:count]:
            queue.tasks.remove(task)
            self._executor.give_back(task)

    def give_back_foreign(self) -> None:
        """What cannot start here and could elsewhere: other homes' tasks return to them, and actors
        of this home ask for a place again."""
        for queue in list(self.queues.values()):
            if queue.tasks and not self.ledger.fits(queue.shape):
                kept: deque[TaskRecord] = deque()
                for task in queue.tasks:
                    if task.cancelled:
                        continue
                    if (task.home != self._rank and task.state is QUEUED
                            and task.template.rank < 0 and task.template.kind != METHOD):
                        self._executor.give_back(task)
                    elif (queue.creation and task.home == self._rank
                            and task.template.rank < 0 and not task.template.group_id):
                        self.place_actor(task)
                    else:
                        kept.append(task)
                queue.tasks = kept

    def actor_holds(self, number: int, held: Shape) -> None:
        """The actor is created: from now on it holds only this."""
        worker = self.workers.get(number)
        if worker is None:
            return
        devices = worker.devices
        keeps_gpu = any(name[:3] == "GPU" for name, _ in held)
        self.ledger.release(worker.shape, devices)
        self.ledger.take_back(held, devices)
        worker.shape = held
        worker.devices = devices if keeps_gpu else ()
        worker.datagrams.clear()
        self._dirty = True

    def actor_failed(self, number: int) -> None:
        """The constructor raised in this worker, which exits by itself: it hosts nobody."""
        worker = self.workers.get(number)
        if worker is not None:
            worker.datagrams.clear()
            worker.actor_id = b""

    def resources_changed(self) -> None:
        self._dirty = True

    def end_group(self, group: str) -> None:
        """A placement group is gone: kill the workers in it, refuse what is queued."""
        for worker in self.workers.values():
            if any(group in name for name, _ in worker.shape):
                self._outbox.actions.append(KillWorker(worker.number))
                if worker.actor_id:
                    self.actor_of_group(worker.actor_id)
        for queue in self.queues.values():
            if any(group in name for name, _ in queue.shape):
                tasks, queue.tasks = queue.tasks, deque()
                for task in tasks:
                    if not task.cancelled:
                        self.refuse_of_group(task)

    def stop_worker(self, number: int, *, kill: bool) -> None:
        worker = self.workers.get(number)
        if worker is None:
            return
        if kill:
            self._outbox.actions.append(KillWorker(number))
        else:
            self._outbox.tasks.append((number, [Stop()]))

    def infeasible(self) -> list[tuple[ShapeQueue, TaskRecord]]:
        """Queues that can never be served on this node, each reported once."""
        found = []
        for queue in self.queues.values():
            if queue.tasks and not queue.starved and not is_group_shape(queue.shape) and (
                not self.ledger.could_ever_fit(queue.shape)
            ):
                queue.starved = True
                found.append((queue, queue.tasks[0]))
        return found

    def validate(self) -> None:
        held = self.held_shapes()
        for worker in self.workers.values():
            shape = worker.shape
            if worker.blocked:
                shape = without_cpu(shape)
            held.append(shape)
            if worker.state is WorkerState.IDLE:
                assert not worker.shape and not worker.datagrams, worker.number
            assert all(worker.datagrams), "DP-5"
        for queue in self.queues.values():
            urgency = [_urgency(task) for task in queue.tasks]
            assert urgency == sorted(urgency), "DP-4"
            assert queue.ranked or not any(urgency), "DP-4"
        self.ledger.validate(held)
