"""Inventory: rows of what there is, in slices; what is over is remembered, bounded and rightly."""

from __future__ import annotations

from typing import Any

from hpcray.node import outbox as out
from hpcray.node.inventory import KEPT, SLICE
from hpcray.node.machine import Machine
from hpcray.protocol import ids, sizes, values
from hpcray.protocol import messages as m

JOB = ids.job_id(1)
CPU = (("CPU", m.UNIT),)
COLUMNS = ["task_id", "name", "state"]


class Node:
    """A machine with a driver, and workers that run what they are told to."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.machine = Machine(rank, size, {"CPU": 2 * m.UNIT}, 1 << 20, JOB,
                               {"job_key": "00"})
        self.machine.connect(0)
        self._prefix = ids.task_prefix(ids.driver_task_id(rank, JOB), 0)
        self._tail = ids.id_tail(rank, JOB)
        self._count = 0
        self._requests = 0
        self.running: list[tuple[int, m.Run]] = []
        self.tell(0, *(m.DefineTemplate(m.Template(
            name.encode() * 16, b"f" * 16, m.TASK, name, resources=CPU, max_retries=retries))
            for name, retries in (("f", 0), ("g", 3))))

    def tell(self, client: int, *batch: Any) -> None:
        self.machine.client_messages(client, list(batch))

    def submit(self, name: str, count: int = 1) -> list[bytes]:
        found = []
        for _ in range(count):
            self._count += 1
            found.append(ids.task_id(self._prefix, self._count, self._tail))
        self.tell(0, *(m.SubmitTask(task, name.encode() * 16, b"\0") for task in found))
        return found

    def turn(self) -> None:
        machine = self.machine
        for _ in range(4):
            machine.end_turn(0.0)
            for number, batch in machine.outbox.tasks:
                self.running += [(number, run) for run in batch if type(run) is m.Run]
            machine.outbox.tasks = []
            actions, machine.outbox.actions = machine.outbox.actions, []
            for action in actions:
                if type(action) is out.StartWorker:
                    machine.connect(action.number)
                    self.tell(action.number, m.Hello(1000 + action.number))
            if not actions:
                return

    def run(self, *, error: bytes = b"") -> None:
        """Everything there is, to its end."""
        self.turn()
        while self.running:
            number, run = self.running.pop(0)
            self.tell(number, m.Failed(run.task_id, run.attempt, 10, error) if error
                      else m.Done(run.task_id, run.attempt, 10, b"\0"))
            self.turn()

    def ask(self, what: str, columns: list[str], filters: Any = (), limit: int = 100,
            **more: Any) -> tuple[list[list[Any]], int]:
        """(rows, turns it took)."""
        self._requests += 1
        self.machine.outbox.clients.clear()
        self.tell(0, m.Request(self._requests, "state", {
            "what": what, "columns": columns, "filters": [list(f) for f in filters],
            "limit": limit, **more}))
        for turns in range(10_000):
            replies = [x for x in self.machine.outbox.clients[0] if type(x) in (m.Rows, m.Reply)]
            if replies and type(replies[-1]) is m.Reply:
                assert replies[-1].error is None, replies[-1]
                return [row for part in replies[:-1] for row in part.rows], turns
            self.machine.end_turn(0.0)
        raise AssertionError("no answer")

    def count(self) -> dict[tuple[str, str], int]:
        rows, _ = self.ask("tasks", ["name", "state"], limit=1 << 60, count=True)
        return {(name, state): count for _, name, state, count, _ in rows if count}


def test_a_backlog_is_looked_at_in_slices() -> None:
    node = Node()
    node.submit("f", 10 * SLICE)
    rows, turns = node.ask("tasks", COLUMNS, [("name", "=", "g")])
    assert not rows and turns >= 10
    rows, turns = node.ask("tasks", COLUMNS)
    assert len(rows) == 100 and turns == 1
    rows, turns = node.ask("tasks", COLUMNS, [("name", "=", "f")], limit=7)
    assert len(rows) == 7 and turns == 1


def test_what_comes_and_goes_between_slices_is_neither_lost_nor_counted_twice() -> None:
    node = Node()
    stay = node.submit("f", 3 * SLICE)
    node.tell(0, m.Request(99, "state", {"what": "tasks", "columns": ["task_id"], "filters": [],
                                         "limit": 1 << 60, "count": True}))
    node.machine.end_turn(0.0)
    node.submit("g", SLICE)
    for task in stay[:50]:
        node.machine.tasks.cancel(task, force=False, recursive=False)
    while node.machine.inventory.questions:
        node.machine.end_turn(0.0)
    counted = [row for part in node.machine.outbox.clients[0] if type(part) is m.Rows
               for row in part.rows if row[-2] > 0]
    tasks = [row[1] for row in counted]
    assert len(set(tasks)) == len(tasks)
    assert {task.hex() for task in stay[50:]} <= set(tasks)


def test_questions_take_turns() -> None:
    node = Node()
    node.submit("f", 10 * SLICE)
    node.machine.outbox.clients.clear()
    for number, name in ((1, "nobody"), (2, "f")):
        node.tell(0, m.Request(number, "state", {
            "what": "tasks", "columns": ["task_id"], "filters": [["name", "=", name]],
            "limit": 5}))
    node.machine.end_turn(0.0)
    node.machine.end_turn(0.0)
    answered = [x.request for x in node.machine.outbox.clients[0] if type(x) is m.Reply]
    assert answered == [2]


def test_states() -> None:
    node = Node()
    running = node.submit("g", 3)
    node.turn()
    rows, _ = node.ask("tasks", COLUMNS)
    assert sorted(row[2] for row in rows) == ["PENDING_NODE_ASSIGNMENT", "RUNNING", "RUNNING"]
    rows, _ = node.ask("tasks", COLUMNS, [("task_id", "=", running[0].hex())])
    assert rows == [[running[0].hex(), "g", "RUNNING"]]
    assert node.ask("tasks", COLUMNS, [("task_id", "=", "nonsense")])[0] == []
    assert node.ask("tasks", COLUMNS, [("state", "!=", "running")])[0][0][2] == (
        "PENDING_NODE_ASSIGNMENT")


def test_only_what_runs_is_running() -> None:
    """Short tasks are sent in batches: of a datagram the first one runs."""
    node = Node()
    node.submit("g", 2)
    node.run()
    node.submit("g", 64)
    node.turn()
    sent = len(node.running)
    assert sent > 2
    states = [row[2] for row in node.ask("tasks", COLUMNS)[0] if row[2] != "FINISHED"]
    assert states.count("RUNNING") == 2
    assert states.count("SUBMITTED_TO_WORKER") == sent - 2


def test_what_is_over_is_remembered() -> None:
    node = Node()
    good = node.submit("f", 3)
    node.run()
    bad = node.submit("g", 2)
    node.run(error=bytes((values.ERROR,)) + b"pickled")
    rows, _ = node.ask("tasks", [*COLUMNS, "error_type", "error_message", "worker_pid"])
    found = {row[0]: row[1:] for row in rows}
    assert set(found) == {task.hex() for task in good + bad}
    for task in good:
        assert found[task.hex()] == ["f", "FINISHED", None, None, None]
    for task in bad:
        assert found[task.hex()][:3] == ["g", "FAILED", "TASK_EXECUTION_EXCEPTION"]
        assert found[task.hex()][3] == bytes((values.ERROR,)) + b"pickled"
        assert found[task.hex()][4] > 1000
    assert node.count() == {("f", "FINISHED"): 3, ("g", "FAILED"): 2}


def test_memory_of_the_past_is_bounded() -> None:
    node = Node()
    inventory = node.machine.inventory
    for _ in range(3):
        for _ in range(5):
            node.submit("f", 250)
            node.run()
            lineage, node.machine.tasks.lineage = node.machine.tasks.lineage, []
            inventory.remember(lineage)
        node.submit("g", KEPT + 10)
        node.run(error=bytes((values.ERROR,)) + b"x" * 100_000)
    rows, _ = node.ask("tasks", COLUMNS, limit=10_000)
    states = [row[2] for row in rows]
    assert states.count("FAILED") == KEPT and states.count("FINISHED") <= KEPT + 256
    kept = sum(len(error) for _, error in inventory._failed.values())
    assert kept <= KEPT, "an error that large is not kept"
    assert node.count() == {("f", "FINISHED"): 3750, ("g", "FAILED"): 3 * (KEPT + 10)}


def test_a_failed_task_is_never_shown_as_finished() -> None:
    """Not when it is forgotten as a failure while it is fresh in the lineage either."""
    node = Node()
    failed = {task.hex() for task in node.submit("f", 2 * KEPT)}
    node.run(error=bytes((values.ERROR,)) + b"x")
    for flush in (False, True):
        if flush:
            lineage, node.machine.tasks.lineage = node.machine.tasks.lineage, []
            node.machine.inventory.remember(lineage)
        rows, _ = node.ask("tasks", COLUMNS, limit=10_000)
        assert {row[0] for row in rows} <= failed
        assert {row[2] for row in rows} == {"FAILED"}


def test_objects_are_told_by_their_home() -> None:
    node = Node(rank=1, size=1)
    mine = node.submit("f")[0] + ids.FIRST_RETURN
    foreign = ids.task_id(b"p" * 12, 1, ids.id_tail(0, JOB)) + ids.FIRST_RETURN
    node.machine.directory.hold(foreign)
    rows, _ = node.ask("objects", ["object_id", "object_size", "task_status", "reference_type"])
    assert rows == [[mine.hex(), -1, "PENDING_NODE_ASSIGNMENT", "LOCAL_REFERENCE"]]


def test_workers_and_their_ends() -> None:
    node = Node()
    node.submit("f")
    node.turn()
    number, _ = node.running[0]
    before = {row[0]: row[1:] for row in node.ask("workers", ["pid", "worker_type", "is_alive"])[0]}
    assert before[1000 + number] == ["WORKER", True]
    assert before[0] == ["DRIVER", True]
    node.machine.worker_exited(number, values.Failure("WorkerCrashedError", "it fell over"))
    rows, _ = node.ask("workers", ["pid", "is_alive", "exit_type", "exit_detail"],
                       [("is_alive", "=", "false")])
    assert rows == [[1000 + number, False, "SYSTEM_ERROR", "it fell over"]]


def test_unknown_lists_are_refused() -> None:
    node = Node()
    node.tell(0, m.Request(1, "state", {"what": "spoons", "columns": [], "filters": [],
                                        "limit": 1}))
    reply = node.machine.outbox.clients[0][-1]
    assert type(reply) is m.Reply and reply.error is not None and "spoons" in reply.error.message


def test_answers_come_in_parts_that_fit_a_datagram() -> None:
    node = Node()
    node.submit("f", 5000)
    node.machine.outbox.clients.clear()
    node.tell(0, m.Request(1, "state", {
        "what": "tasks", "columns": COLUMNS, "filters": [], "limit": 10_000}))
    while node.machine.inventory.questions:
        node.machine.end_turn(0.0)
    parts = [x for x in node.machine.outbox.clients[0] if type(x) is m.Rows]
    assert sum(len(part.rows) for part in parts) == 5000 and len(parts) > 1
    assert max(len(m.encode([part])) for part in parts) < sizes.DATAGRAM_MAX_BYTES
