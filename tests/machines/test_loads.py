"""What a busy node tells the global scheduler: little, and all that matters. And leases and turns,
whose steps do not grow with the nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from hpcray.node import outbox as out
from hpcray.node.leases import Leases, Turns
from hpcray.node.machine import Machine
from hpcray.protocol import ids
from hpcray.protocol import messages as m

JOB = ids.job_id(1)
CPU = (("CPU", m.UNIT),)
TASK = m.Template(b"t" * 16, b"f" * 16, m.TASK, "f", resources=CPU)
STEP_S = 0.0005
TASK_S = 0.01
BACKGROUND = (m.Load, m.Demand, m.GrantUnused)


class Busy:
    """One node of many, whose workers run tasks of 10 ms."""

    def __init__(self, size: int, cpus: int) -> None:
        self.machine = Machine(1, size, {"CPU": cpus * m.UNIT}, 1 << 30, JOB, {})
        for rank in range(2):
            self.machine.cluster.joined(m.Joined(rank, "h", "", 0, (("CPU", cpus * m.UNIT),)))
        self.machine.connect(99)
        self.machine.client_messages(99, [m.DefineTemplate(TASK)])
        self.now_s = 0.0
        self.sent: Counter[type] = Counter()
        self.loads: list[m.Load] = []
        self.done: list[m.TaskDone] = []
        self._ends: list[tuple[float, int, bytes]] = []
        self._prefix = ids.task_prefix(ids.driver_task_id(1, JOB), 0)
        self._count = 0
        self._next_tick_s = 0.0

    def task_id(self, home: int) -> bytes:
        self._count += 1
        return ids.task_id(self._prefix, self._count, ids.id_tail(home, JOB))

    def submit(self, count: int) -> None:
        self.machine.client_messages(99, [
            m.SubmitTask(self.task_id(1), TASK.template_id, b"") for _ in range(count)])

    def assign(self, count: int) -> None:
        self.machine.peer_messages(0, [
            m.TemplateDef(TASK),
            *(m.Assign(self.task_id(0), TASK.template_id, 0, b"") for _ in range(count))])

    def step(self, seconds: float = STEP_S) -> None:
        self.now_s += seconds
        machine = self.machine
        for due_s, worker, task_id in [end for end in self._ends if end[0] <= self.now_s]:
            self._ends.remove((due_s, worker, task_id))
            machine.client_messages(worker, [m.Done(task_id, 0, int(TASK_S * 1e6), b"\0")])
        if self.now_s >= self._next_tick_s:
            self._next_tick_s = self.now_s + 0.01
            machine.tick(self.now_s)
        for _ in range(4):
            machine.end_turn(self.now_s)
            box = machine.outbox
            box.clients.clear()
            actions, box.actions = box.actions, []
            for action in actions:
                if type(action) is out.StartWorker:
                    machine.connect(action.number)
                    machine.client_messages(action.number, [m.Hello(action.number)])
            tasks, box.tasks = box.tasks, []
            for worker, batch in tasks:
                last_s = max([end[0] for end in self._ends if end[1] == worker],
                             default=self.now_s)
                for run in batch:
                    last_s += TASK_S
                    self._ends.append((last_s, worker, run.task_id))
            for message in box.peers.pop(0, ()):
                self.sent[type(message)] += 1
                if type(message) is m.Load:
                    self.loads.append(message)
                elif type(message) is m.TaskDone:
                    self.done.append(message)
            box.peers.clear()

    def run(self, seconds: float) -> Iterator[None]:
        for _ in range(int(seconds / STEP_S)):
            self.step()
            yield

    @property
    def busy(self) -> bool:
        return bool(self._ends)

    def told(self) -> int:
        """Messages to the global scheduler since the last look."""
        count = sum(self.sent[kind] for kind in BACKGROUND)
        self.sent.clear()
        return count


@pytest.mark.parametrize("cpus", [1, 2, 16])
@pytest.mark.parametrize("whose", ["own", "others", "both"])
def test_a_thousand_busy_nodes_tell_two_messages_a_second_each(cpus: int, whose: str) -> None:
    """So the scheduler's gets 2,000. Others' tasks come as ended ones are told, a step later."""
    node = Busy(1000, cpus)
    if whose != "others":
        node.submit(1000 * cpus)
    if whose != "own":
        node.assign(cpus + 1)
    for _ in node.run(2.0):
        if whose != "own" and node.done:
            node.assign(len(node.done))
            node.done.clear()
    node.told()
    for _ in node.run(6.0):
        if whose != "own" and node.done:
            node.assign(len(node.done))
            node.done.clear()
    assert node.told() <= 12


@pytest.mark.parametrize("size", [2, 4])
def test_few_messages_per_task_on_few_nodes(size: int) -> None:
    node = Busy(size, 2)
    node.assign(3)
    count = 0
    while node.now_s < 0.6:
        node.step(0.00005)  # as long as the next ones take to come
        if node.done:
            count += len(node.done)
            node.assign(len(node.done))
            node.done.clear()
    assert count > 80
    assert node.sent[m.Load] < count / 10


def test_room_is_told_at_once_after_a_pause() -> None:
    """Be there 1,000 nodes: only who has told a load lately waits."""
    node = Busy(1000, 1)
    node.submit(150)
    list(node.run(1.2))
    assert node.loads[-1].free == (("CPU", 0),)
    while node.busy:
        node.step()
    list(node.run(0.005))
    assert node.loads[-1].free == CPU


def test_an_idle_node_shows_that_it_is_there() -> None:
    for size, seconds in ((2, 1), (1000, 4)):
        node = Busy(size, 1)
        for _ in node.run(20.0):
            pass
        assert 20 / seconds - 2 <= node.sent[m.Load] <= 20 / seconds + 2
        assert node.machine.due_s > node.now_s


def test_what_was_granted_is_told_when_it_is_over() -> None:
    """Even if all is as before: the scheduler has counted it."""
    node = Busy(4, 2)
    list(node.run(0.1))
    node.told()
    node.assign(1)
    list(node.run(0.2))
    assert node.told() >= 1
    assert node.loads[-1].free == (("CPU", 2 * m.UNIT),)


def test_turns_skip_the_full_without_a_look() -> None:
    turns = Turns(dict.fromkeys(range(1000), 1))
    assert [turns.next(0.0) for _ in range(3)] == [0, 1, 2]
    turns.back(1)
    turns.rest(3, 0.0)
    assert [turns.next(0.0) for _ in range(997)] == [*range(4, 1000), 1]
    assert turns.next(0.05) is None
    turns.back(3)
    assert turns.next(0.05) is None, "it rests"
    assert turns.next(0.11) == 3
    turns.back(5000)
    assert turns.next(0.2) is None


def test_who_was_asked_lately_is_not_asked_again() -> None:
    leases = Leases()
    for rank in range(1000):
        lease = leases.of(rank)
        for _ in range(1 + rank % 2):
            leases.bound(rank, lease)
    asked = [leases.to_ask(1, 1.0) for _ in range(500)]
    assert asked == [*range(3, 1000, 2), None]
    assert leases.to_ask(-1, 1.0) == 1
    assert leases.to_ask(-1, 1.001) is None
    leases.ended(3, leases.of(3))
    assert leases.to_ask(-1, 1.1) == 5
