"""JobLife: JL-1 and JL-2 over several nodes whose messages travel at their own pace.

Three lives and a driver, as data: what one says to another is delivered in order per pair, at times
that Hypothesis draws. Any end of it all - shutdown, a parked session, a lost driver, a signal, a
silent rank - ends every node that can still hear.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpcray.node.job import ENDING, JOINING, LEFT, PARKED, RUNNING, JobLife
from hpcray.protocol import messages as m

SIZE = 3
RESOURCES = (("CPU", 2 * m.UNIT), ("memory", m.UNIT << 30))
PAIRS = [(a, b) for a in range(SIZE) for b in range(SIZE) if a != b]


class Node:
    """A life, and what the loop around it would do."""

    def __init__(self, jobs: Jobs, rank: int) -> None:
        me = m.Joined(rank, f"h{rank}", "", 100 + rank, RESOURCES, gpus=m.Gpus(named=True))
        self.life = life = JobLife(me, SIZE, b"k")
        self.heard: list[Any] = []  # by its machine, in this job
        self.own_end = True
        self.notices: list[str] = []
        self.last_words: list[str] = []
        life.to_peer = partial(jobs.say, rank)
        life.to_driver = jobs.told.append
        life.pass_on = partial(jobs.pass_on, rank)
        life.notice = self.notices.append
        life.say_last = self.last_words.append
        life.who_ends = lambda: "the launcher"
        life.secret = lambda: b"s"
        life.control_address = lambda: b""
        life.begin = self.begin
        life.deliver = lambda _, batch: self.heard.extend(batch)
        life.end_here = self.end_here

    def begin(self, _job_id: bytes, facts: dict[str, Any]) -> None:
        assert len(facts["nodes"]) == SIZE
        self.heard.clear()

    def end_here(self, _park: bool) -> None:
        self.own_end = False


class Jobs(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []  # to the driver
        self.channels: dict[tuple[int, int], deque[tuple[int, Any]]] = {p: deque() for p in PAIRS}
        self.nodes: list[Node] = []
        self.nodes += [Node(self, rank) for rank in range(SIZE)]
        self.now_s = 0.0
        self.session = 0
        self.driver = True
        self.silent: set[int] = set()
        self.signs = [0] * SIZE
        for node in self.nodes:
            node.life.start(0.0)

    @property
    def head(self) -> JobLife:
        return self.nodes[0].life

    def say(self, sender: int, receiver: int, message: Any) -> None:
        self.channels[sender, receiver].append((self.nodes[sender].life.epoch, message))

    def pass_on(self, sender: int, message: m.Begin) -> None:
        for rank in range(1, SIZE):
            self.say(sender, rank, message)

    # --- what may happen ----------------------------------------

    @precondition(lambda self: self.driver and self.head.state in (JOINING, PARKED)
                  and self.head.config is None)
    @rule()
    def driver_says_hello(self) -> None:
        self.hello()

    def hello(self) -> None:
        self.session += 1
        self.told.clear()
        self.head.driver_wants({"session": self.session, "driver_pid": 7})

    @precondition(lambda self: self.driver and self.head.state is RUNNING)
    @rule(park=st.booleans())
    def driver_ends_the_job(self, park: bool) -> None:
        self.head.end(park=park)

    @precondition(lambda self: self.driver)
    @rule()
    def driver_is_gone(self) -> None:
        self.driver = False
        self.head.driver_gone(launched=True)

    @rule(rank=st.integers(0, SIZE - 1))
    def is_told_to_end(self, rank: int) -> None:
        if self.nodes[rank].life.state is not LEFT and rank not in self.silent:
            self.nodes[rank].life.terminate("SIGTERM")

    @precondition(lambda self: not self.silent)
    @rule(rank=st.integers(1, SIZE - 1))
    def falls_silent(self, rank: int) -> None:
        """Stopped, and nobody knows."""
        self.silent.add(rank)

    @rule(pair=st.sampled_from(PAIRS))
    def talk(self, pair: tuple[int, int]) -> None:
        sender = self.nodes[pair[0]].life
        if sender.state is RUNNING:
            self.say(*pair, m.FetchFunction(bytes((sender.epoch,))))

    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        full = [pair for pair, queue in self.channels.items()
                if queue and not {*pair} & self.silent]
        if full:
            self.deliver_one(data.draw(st.sampled_from(full)))

    def deliver_one(self, pair: tuple[int, int]) -> None:
        epoch, message = self.channels[pair].popleft()
        self.signs[pair[0]] += 1
        self.signs[pair[1]] += 1  # it acknowledges
        life = self.nodes[pair[1]].life
        if life.state is not LEFT:
            life.on_peer(pair[0], epoch, [message])

    @rule(rank=st.integers(0, SIZE - 1))
    def own_end(self, rank: int) -> None:
        self.nodes[rank].own_end = True

    @rule(seconds=st.sampled_from((0.01, 3.0)))
    def time_passes(self, seconds: float) -> None:
        self.later(seconds)

    def later(self, seconds: float) -> None:
        self.now_s += seconds
        for rank, node in enumerate(self.nodes):
            if node.life.state is ENDING and rank not in self.silent:
                node.life.step(self.now_s, own_end=node.own_end, driver_reads=False,
                               heard=self.signs.__getitem__)

    # --- what holds ----------------------------------------

    @invariant()
    def valid(self) -> None:
        for node in self.nodes:
            node.life.validate()
            assert len(node.last_words) <= 1, "JL-2"
            for message in node.heard:
                assert message.function_id == bytes((node.life.epoch,)), "JL-1"

    def deliver_all(self) -> None:
        while any(queue and not {*pair} & self.silent for pair, queue in self.channels.items()):
            for pair, queue in self.channels.items():
                while queue and not {*pair} & self.silent:
                    self.deliver_one(pair)

    def settle(self) -> None:
        """Everything is delivered and every step taken, for long."""
        for _ in range(60):
            self.deliver_all()
            for node in self.nodes:
                node.own_end = True
            self.later(1.0)

    def teardown(self) -> None:
        self.settle()
        self.head.end(park=False)
        self.settle()
        assert self.head.state is LEFT
        for rank, node in enumerate(self.nodes):
            assert rank in self.silent or node.life.state is LEFT or self.silent, rank
        for node in self.nodes:
            assert set(node.life.left_behind) <= self.silent


TestJobs = Jobs.TestCase
TestJobs.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def states(jobs: Jobs) -> list[Any]:
    return [node.life.state for node in jobs.nodes]


def test_a_parked_job_is_followed_by_another() -> None:
    jobs = Jobs()
    for session in (1, 2, 3):
        jobs.hello()
        jobs.deliver_all()
        assert states(jobs) == [RUNNING] * SIZE
        assert [node.life.epoch for node in jobs.nodes] == [session] * SIZE
        jobs.head.end(park=True)
        jobs.settle()
        assert states(jobs) == [PARKED] * SIZE
        assert jobs.told[-1] == m.JobEnded("")
    jobs.head.end(park=False)
    jobs.settle()
    assert states(jobs) == [LEFT] * SIZE
    assert [node.life.exit_status for node in jobs.nodes] == [0] * SIZE


def test_the_cause_of_an_end_is_told_once() -> None:
    jobs = Jobs()
    jobs.hello()
    jobs.deliver_all()
    jobs.nodes[2].life.terminate("SIGTERM")
    jobs.settle()
    assert jobs.nodes[0].last_words == [
        "the job ends: rank 2 (pid 102 on h2) was told to end (SIGTERM), by the launcher"]
    assert [node.life.exit_status for node in jobs.nodes] == [1, 0, 143]


def test_a_silent_rank_is_left_behind() -> None:
    jobs = Jobs()
    jobs.hello()
    jobs.deliver_all()
    jobs.silent.add(1)
    jobs.head.end(park=False)
    jobs.settle()
    assert jobs.head.state is LEFT
    assert jobs.head.left_behind == (1,)
    assert jobs.told[-1] == m.JobEnded("")


def test_what_cannot_begin_is_refused_and_may_be_asked_again() -> None:
    jobs = Jobs()
    jobs.deliver_all()
    jobs.head.driver_wants({"num_gpus": 9})
    refused = jobs.told.pop()
    assert type(refused) is m.Welcome and "refused" in refused.session
    assert jobs.head.state is JOINING
    jobs.hello()
    jobs.deliver_all()
    assert jobs.head.state is RUNNING


def test_who_has_not_joined_is_told_of_once() -> None:
    jobs = Jobs()
    jobs.channels[2, 0].clear()  # it is stuck in MPI_Init
    jobs.hello()
    jobs.deliver_all()
    for now_s in (5.0, 10.5, 11.0, 30.0):
        jobs.head.tell_late(now_s)
    assert len(jobs.nodes[0].notices) == 1
    assert "for rank 2 to join" in jobs.nodes[0].notices[0]
