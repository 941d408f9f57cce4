"""Explain: one sentence per object that is not there yet, from the records, on one node or two.
Waiting: what is stuck is said once, what is a matter of time never."""

from __future__ import annotations

from typing import Any

from hpcray.node import outbox as out
from hpcray.node.machine import Machine
from hpcray.protocol import ids, values, words
from hpcray.protocol import messages as m

JOB = ids.job_id(1)
CPU = (("CPU", m.UNIT),)
GROUP = b"\1" * 16
TEMPLATES = (
    m.Template(b"f" * 16, b"f" * 16, m.TASK, "__main__.f", resources=CPU),
    m.Template(b"g" * 16, b"f" * 16, m.TASK, "__main__.g", resources=CPU, rank=1),
    m.Template(b"b" * 16, b"f" * 16, m.TASK, "big", resources=(("CPU", 3 * m.UNIT),)),
    m.Template(b"c" * 16, b"f" * 16, m.ACTOR_CREATION, "__main__.Counter.__init__", resources=CPU),
    m.Template(b"i" * 16, b"f" * 16, m.METHOD, "Counter.inc"),
    m.Template(b"p" * 16, b"f" * 16, m.TASK, "placed",
               resources=((f"CPU@{GROUP.hex()}", m.UNIT),), group_id=GROUP),
)


class Nodes:
    """Machines that talk, with workers that start at once and run nothing to its end."""

    def __init__(self, size: int = 1) -> None:
        self.machines = [
            Machine(rank, size, {"CPU": 2 * m.UNIT}, 1 << 20, JOB,
                    {"job_key": "00"}) for rank in range(size)]
        for machine in self.machines:
            for rank in range(size):
                machine.joined(m.Joined(
                    rank, "host", "1.2.3.4", 1, (("CPU", 2 * m.UNIT),), ()))
        self.machines[0].connect(0)
        self.now_s = 0.0
        self.silent: set[int] = set()
        self.runs: dict[bytes, tuple[int, int]] = {}  # task -> rank, worker
        self.count = 0
        self._prefix = ids.task_prefix(ids.driver_task_id(0, JOB), 0)
        self.tell(0, 0, *(m.DefineTemplate(template) for template in TEMPLATES))

    def tell(self, rank: int, client: int, *batch: Any) -> None:
        self.machines[rank].client_messages(client, list(batch))

    def draw(self) -> bytes:
        self.count += 1
        return ids.task_id(self._prefix, self.count, ids.id_tail(0, JOB))

    def submit(self, name: str, *deps: bytes) -> bytes:
        task_id = self.draw()
        self.tell(0, 0, m.SubmitTask(
            task_id, name.encode() * 16, b"\0", b"".join(deps), len(deps)))
        self.turn()
        return task_id + ids.FIRST_RETURN

    def actor(self) -> bytes:
        self.count += 1
        actor_id = ids.actor_id(self._prefix, self.count, ids.id_tail(0, JOB))
        self.tell(0, 0, m.CreateActor(actor_id, b"c" * 16, b"\0", b"", 0))
        self.turn()
        return actor_id

    def call(self, actor_id: bytes) -> bytes:
        task_id = self.draw()
        self.tell(0, 0, m.SubmitCall(task_id, b"i" * 16, actor_id, b"\0"))
        self.turn()
        return task_id + ids.FIRST_RETURN

    def done(self, object_id: bytes) -> None:
        task_id = ids.task_of_object(object_id)
        rank, worker = self.runs.pop(task_id)
        self.tell(rank, worker, m.Done(task_id, 0, 10, b"\0"))
        self.turn()

    def turn(self) -> None:
        for _ in range(12):
            for rank, machine in enumerate(self.machines):
                machine.end_turn(self.now_s)
                box = machine.outbox
                for number, batch in box.tasks:
                    for run in batch:
                        if type(run) is m.Run:
                            self.runs[run.task_id] = (rank, number)
                box.tasks = []
                actions, box.actions = box.actions, []
                for action in actions:
                    if type(action) is out.StartWorker:
                        machine.connect(action.number)
                        self.tell(rank, action.number, m.Hello(100 * rank + action.number))
                for peer, batch in list(box.peers.items()):
                    if batch and rank not in self.silent:
                        sent = m.decode_to_peer(m.encode(batch))
                        if peer not in self.silent:
                            self.machines[peer].peer_messages(rank, sent)
                box.peers.clear()

    def tick(self, seconds: float) -> None:
        self.now_s += seconds
        for rank, machine in enumerate(self.machines):
            if rank not in self.silent:
                machine.tick(self.now_s)
        self.turn()

    def wait(self, seconds: int) -> list[str]:
        """What is said meanwhile."""
        for _ in range(seconds):
            self.tick(1.0)
        said = []
        for machine in self.machines:
            said += machine.outbox.notices
            machine.outbox.notices.clear()
        return said

    def explain(self, *object_ids: bytes) -> list[str] | None:
        self.machines[0].outbox.clients.clear()
        self.tell(0, 0, m.Request(7, "explain", {"ids": b"".join(object_ids)}))
        self.turn()
        return self.answer()

    def answer(self) -> list[str] | None:
        found = [x for x in self.machines[0].outbox.clients[0] if type(x) is m.Reply]
        assert len(found) < 2
        return found[0].result if found else None


def test_running_queued_waiting() -> None:
    nodes = Nodes()
    first = nodes.submit("f")
    nodes.submit("f")
    queued = nodes.submit("f")
    waiting = nodes.submit("f", queued)
    assert nodes.explain(first, queued, waiting) == [
        "task f: RUNNING on rank 0 (pid 1)",
        "task f: QUEUED on rank 0, waits for 1 CPU (held by task f x2)",
        "task f: WAITING for task f (QUEUED on rank 0)",
    ]


def test_actors_hold_cpus() -> None:
    nodes = Nodes()
    for _ in range(2):
        nodes.done(ids.creation_object_id(nodes.actor()))
    assert nodes.explain(nodes.submit("f")) == [
        "task f: QUEUED on rank 0, waits for 1 CPU (held by actor Counter x2)"]


def test_a_call_behind_others_and_before_its_actor_is_there() -> None:
    nodes = Nodes()
    actor_id = nodes.actor()
    early = nodes.call(actor_id)
    assert nodes.explain(early) == [
        "call Counter.inc: waits for its actor (actor Counter: RUNNING on rank 0 (pid 1))"]
    nodes.done(ids.creation_object_id(actor_id))
    assert nodes.explain(early, nodes.call(actor_id)) == [
        "call Counter.inc: RUNNING on rank 0 (pid 1)",
        "call Counter.inc: QUEUED on rank 0 behind 1 other call (pid 1)"]


def test_processes_that_are_stopped_or_wait() -> None:
    nodes = Nodes()
    nodes.machines[0].explain.process_state = {1: "T", 2: "S"}.get  # type: ignore[assignment]
    one, two = nodes.submit("f"), nodes.submit("f")
    nodes.tell(0, 2, m.Blocked(()))
    assert nodes.explain(one, two) == [
        "task f: RUNNING on rank 0 (pid 1, which is stopped by a signal)",
        "task f: RUNNING on rank 0 (pid 2, which waits in get())"]


def test_on_another_rank_the_executor_is_asked() -> None:
    nodes = Nodes(2)
    remote = nodes.submit("g")
    assert nodes.explain(remote) == ["task g: RUNNING on rank 1 (pid 101)"]


def test_a_rank_that_does_not_answer_is_named() -> None:
    nodes = Nodes(2)
    remote, local = nodes.submit("g"), nodes.draw() + ids.PUT_INDEX
    nodes.tell(0, 0, m.PutInline(local, b"\0", b""))
    nodes.silent.add(1)
    assert nodes.explain(remote, local) is None
    nodes.tick(0.5)
    assert nodes.answer() is None
    nodes.tick(0.3)
    assert nodes.answer() == [
        "task g: ASSIGNED to rank 1 (rank 1 does not answer)",
        "object made by put(): ready on rank 0"]


def test_objects_without_a_task() -> None:
    nodes = Nodes()
    there = nodes.draw() + ids.PUT_INDEX
    nodes.tell(0, 0, m.PutInline(there, b"\0", b""))
    assert nodes.explain(there, nodes.draw() + ids.FIRST_RETURN) == [
        "object made by put(): ready on rank 0", "object whose task is over: freed"]


def test_amounts_for_people() -> None:
    assert [words.size(n) for n in (0, 999, 1024, 1 << 26, 1288490188, 1 << 50)] == [
        "0 B", "999 B", "1 KiB", "64 MiB", "1.2 GiB", "1024 TiB"]
    assert words.amounts((("CPU", 5000), ("memory", 25276538880 * m.UNIT))) == (
        "0.5 CPU and 23.5 GiB of memory")
    assert words.counted(["a", "a", "b", "c", "d", "e"]) == "a x2, b, c and 2 more"


# --- what waits for long ------------------------------------------------------------------------

KEEPS = ("An actor keeps its resources until it ends: start with more of them, or give actors less "
         "(num_cpus=0).")


def test_garbage_is_collected_before_anything_is_said() -> None:
    """Handles in cycles may keep the actors: every process of every rank looks for them, once."""
    nodes = Nodes(2)

    def asked() -> list[int]:
        counts = [sum(type(x) is m.CollectGarbage for batch in machine.outbox.clients.values()
                      for x in batch) for machine in nodes.machines]
        for machine in nodes.machines:
            machine.outbox.clients.clear()
        return counts

    for _ in range(4):
        nodes.done(ids.creation_object_id(nodes.actor()))
    nodes.submit("f")
    processes = [len(machine.clients) for machine in nodes.machines]
    asked()
    assert nodes.wait(1) == []
    assert asked() == [0, 0]
    assert nodes.wait(4) == []
    assert asked() == processes
    assert len(nodes.wait(10)) == 1
    assert asked() == [0, 0]


def test_no_garbage_is_collected_for_what_waits_its_turn() -> None:
    nodes = Nodes()
    for _ in range(3):
        nodes.submit("f")
    nodes.wait(9)
    assert not any(type(x) is m.CollectGarbage for batch in
                   nodes.machines[0].outbox.clients.values() for x in batch)


def test_garbage_is_collected_for_what_gets_stuck_later() -> None:
    """A task that ended by itself kept it from being stuck at the first look."""
    nodes = Nodes()
    creations = [ids.creation_object_id(nodes.actor()) for _ in range(2)]
    nodes.done(creations[0])
    nodes.submit("f")
    assert nodes.wait(6) == []
    nodes.done(creations[1])
    nodes.machines[0].outbox.clients.clear()
    assert nodes.wait(5) == []
    assert any(type(x) is m.CollectGarbage for batch in
               nodes.machines[0].outbox.clients.values() for x in batch)
    assert len(nodes.wait(3)) == 1


def test_tasks_behind_actors_are_told_once() -> None:
    nodes = Nodes()
    for _ in range(2):
        nodes.done(ids.creation_object_id(nodes.actor()))
    nodes.submit("f")
    nodes.submit("f")
    assert nodes.wait(9) == []
    assert nodes.wait(3) == ["Warning: task f and 1 more have waited for 10 s for 1 CPU, held by "
                             f"actor Counter x2. {KEEPS}"]
    nodes.submit("f")
    assert nodes.wait(60) == []


def test_what_got_on_is_told_again_if_it_is_stuck_again() -> None:
    nodes = Nodes()
    one, _ = (nodes.actor() for _ in range(2))
    for actor_id in (one, _):
        nodes.done(ids.creation_object_id(actor_id))
    nodes.submit("f")
    assert len(nodes.wait(12)) == 1
    worker = next(iter(nodes.machines[0].dispatcher.workers))
    nodes.machines[0].worker_exited(worker, values.Failure("WorkerCrashedError", "x"))
    nodes.turn()
    assert nodes.wait(2) == []
    nodes.submit("f")
    assert nodes.wait(30) == []  # behind a task, which ends


def test_an_actor_that_finds_no_room() -> None:
    nodes = Nodes()
    for _ in range(2):
        nodes.done(ids.creation_object_id(nodes.actor()))
    nodes.actor()
    assert nodes.wait(12) == [
        f"Warning: actor Counter has waited for 10 s for 1 CPU, held by actor Counter x2. {KEEPS}"]


def test_long_tasks_are_no_reason() -> None:
    nodes = Nodes()
    for _ in range(5):
        nodes.submit("f")
    assert nodes.wait(100) == []


def test_what_can_never_run_is_told_as_that() -> None:
    nodes = Nodes()
    nodes.submit("b")
    said = nodes.wait(20)
    assert len(said) == 1 and "which no node of this job can ever offer" in said[0]


def test_a_task_that_holds_what_it_waits_for() -> None:
    nodes = Nodes()
    nodes.tell(0, 0, m.DefineTemplate(m.Template(
        b"d" * 16, b"f" * 16, m.TASK, "disk", resources=(("disk", m.UNIT),))))
    ledger = nodes.machines[0].dispatcher.ledger
    ledger.total["disk"] = ledger.free["disk"] = m.UNIT
    nodes.machines[0].cluster.totals()[0]["disk"] = m.UNIT
    outer = nodes.submit("d")
    inner = nodes.submit("d")
    worker = nodes.runs[ids.task_of_object(outer)][1]
    assert nodes.wait(12) == []
    nodes.tell(0, worker, m.Get(inner), m.Blocked(()))
    assert nodes.wait(22) == ["Warning: task disk has waited for 10 s for 1 disk, held by task "
                              "disk, which waits for it."]


def test_over_ranks_it_is_stuck_only_if_no_rank_can() -> None:
    nodes = Nodes(2)
    actors = [nodes.actor() for _ in range(4)]
    for actor_id in actors:
        nodes.done(ids.creation_object_id(actor_id))
    nodes.submit("f")
    assert nodes.wait(12) == ["Warning: task f has waited for 10 s for 1 CPU, held by actor "
                              f"Counter x2 on rank 0 and actor Counter x2 on rank 1. {KEEPS}"]
    nodes = Nodes(2)
    for actor_id in [nodes.actor() for _ in range(3)]:
        nodes.done(ids.creation_object_id(actor_id))
    for _ in range(3):
        nodes.submit("f")
    assert nodes.wait(40) == []  # the fourth CPU runs tasks


def test_a_placement_group_that_finds_no_room() -> None:
    nodes = Nodes()
    nodes.done(ids.creation_object_id(nodes.actor()))
    nodes.tell(0, 0, m.Request(1, "create_placement_group", {
        "group": b"p" * 16, "name": "pair", "strategy": "PACK",
        "bundles": [{"CPU": m.UNIT}, {"CPU": m.UNIT}]}))
    assert nodes.wait(12) == ["Warning: placement group pair (2 bundles, PACK) has waited for 10 s "
                              f"for 1 CPU x2, held by actor Counter. {KEEPS}"]


def test_placement_groups_alike_are_said_once_and_for_their_tasks() -> None:
    nodes = Nodes()
    nodes.done(ids.creation_object_id(nodes.actor()))
    nodes.done(ids.creation_object_id(nodes.actor()))
    for number in range(3):
        nodes.tell(0, 0, m.Request(number, "create_placement_group", {
            "group": bytes((GROUP[0] + number,)) * 16, "name": f"group {number}",
            "strategy": "PACK", "bundles": [{"CPU": m.UNIT}]}))
    nodes.submit("p")
    assert nodes.wait(40) == [
        "Warning: placement group group 0 (1 bundle, PACK) and 2 more have waited for 10 s for "
        f"1 CPU, held by actor Counter x2. {KEEPS}"]


def test_a_stopped_process() -> None:
    nodes = Nodes()
    state = {1: "S"}
    nodes.machines[0].explain.process_state = lambda pid: state.get(pid, "")
    nodes.submit("f")
    assert nodes.wait(30) == []
    state[1] = "T"
    assert nodes.wait(13) == [
        "Warning: task f has not gone on for 10 s: its process (pid 1 on rank 0) was stopped by a "
        "signal, and goes on after `kill -CONT 1`."]


def test_a_silent_rank() -> None:
    nodes = Nodes(2)
    assert nodes.wait(30) == []
    nodes.silent.add(1)
    assert nodes.wait(13) == [
        "Warning: nothing has been heard of rank 1 (host, pid 1) for 10 s: its process is stopped "
        "or its host is overloaded, and what runs there is waited for."]
    assert nodes.wait(30) == []


def test_a_node_that_was_stopped_itself_blames_nobody() -> None:
    nodes = Nodes(2)
    nodes.wait(3)
    nodes.silent.add(1)
    nodes.tick(3600.0)
    nodes.silent.clear()
    assert nodes.wait(20) == []
