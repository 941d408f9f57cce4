"""Routes: AC-1 and AC-3, whatever order the home and two hosts are heard in.

The home and the hosts are played. An incarnation lives on rank 2 or 3 in turn, so nothing but the
route keeps calls to the next one behind what the last one has still to say.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpcray.node.actor_routes import ActorRoutes
from hpcray.node.actor_states import ActorState
from hpcray.protocol import messages as m
from hpcray.protocol import values

from .lower import Lower

HOME = 1
# Calls that crash have so many retries; of these, one that raises is retried too.
RETRIES = {b"0": 0, b"1": 1, b"9": -1}
RAISES = b"r"
DIED = values.Failure("ActorDiedError", "it died")


def connected() -> tuple[Lower, ActorRoutes]:
    lower = Lower()
    routes = ActorRoutes(
        lower.tables, lower.outbox, lower.membership, lower.directory, lower.tasks)
    routes.say = lambda rank, message: lower.outbox.peers[rank].append(message)
    lower.tasks.binders[m.METHOD] = routes.binder(cancelled=routes.call_ready)
    for name, retries in RETRIES.items():
        lower.template(name, m.METHOD, max_retries=retries)
    lower.template(RAISES, m.METHOD, max_retries=-1, retry_exceptions=True)
    return lower, routes


class Host:
    """An incarnation where it runs: takes calls in order, and answers each."""

    def __init__(self, rank: int, incarnation: int) -> None:
        self.rank = rank
        self.incarnation = incarnation
        self.alive = True
        self.calls: deque[m.AssignCall] = deque()
        self.last: dict[Any, int] = {}  # per turn: the place of the last call it took


class RoutesMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.lower, self.routes = connected()
        self.actor_id = self.lower.actor_id(HOME)
        self.state = ActorState.PENDING
        self.incarnation = 0
        self.asked = False
        self.told: deque[m.ActorIs] = deque()  # on its way from the home
        self.hosts: dict[int, Host] = {}  # by incarnation
        self.to_host: dict[int, deque[Any]] = {2: deque(), 3: deque()}
        self.from_host: dict[int, deque[Any]] = {2: deque(), 3: deque()}
        self.places: dict[bytes, int] = {}  # calls in the order submitted
        self.raised: set[bytes] = set()
        self.objects: list[bytes] = []  # that calls wait for

    def take(self) -> None:
        for message in self.lower.said_to(HOME):
            assert type(message) is m.ActorWhere
            assert not self.asked or self.state is ActorState.DEAD, "a route asks once"
            self.asked = True
            self.tell()
        for rank, box in self.to_host.items():
            box.extend(self.lower.said_to(rank))

    def tell(self) -> None:
        if self.asked:
            alive = self.state is ActorState.ALIVE
            self.told.append(m.ActorIs(
                self.actor_id, int(self.state), self.rank if alive else -1, self.incarnation,
                DIED if self.state is ActorState.DEAD else None))

    @property
    def rank(self) -> int:
        return 2 + self.incarnation % 2

    # --- callers ----------------------------------------

    @rule(client=st.integers(0, 1), name=st.sampled_from((b"9", b"1", b"0", RAISES)),
          count=st.integers(1, 3))
    def call(self, client: int, name: bytes, count: int) -> None:
        for _ in range(count):
            self.submit(client, name)

    @rule(client=st.integers(0, 1))
    def call_that_waits(self, client: int) -> None:
        self.submit(client, b"9", waits=True)

    def submit(self, client: int, name: bytes, *, waits: bool = False) -> None:
        refs = b""
        if waits:
            refs = self.lower.pending_object()
            self.objects.append(refs)
        task_id = self.lower.task_id(client)
        self.places[task_id] = len(self.places)
        self.routes.call(self.lower.tables.clients[client], m.SubmitCall(
            task_id, name * 16, self.actor_id, b"", refs, bool(refs)))
        self.take()

    @precondition(lambda self: self.objects)
    @rule(data=st.data())
    def make(self, data: st.DataObject) -> None:
        object_id = data.draw(st.sampled_from(self.objects))
        self.objects.remove(object_id)
        self.lower.directory.resolve_inline(object_id, b"\0value")
        self.lower.directory.release(object_id)
        self.take()

    @precondition(lambda self: any(t.rank == -1 for t in self.lower.tables.tasks.values()))
    @rule()
    def cancel(self) -> None:
        """The last one that is not sent yet."""
        task = [t for t in self.lower.tables.tasks.values() if t.rank == -1][-1]
        self.lower.tasks.cancel(task.task_id, force=False, recursive=False)
        self.take()

    # --- the home, and the worker of the actor ----------------------------------------

    @precondition(lambda self: self.state in (ActorState.PENDING, ActorState.RESTARTING))
    @rule()
    def is_created(self) -> None:
        self.state = ActorState.ALIVE
        self.hosts[self.incarnation] = Host(self.rank, self.incarnation)
        self.tell()

    @precondition(lambda self: self.state is ActorState.ALIVE)
    @rule(done=st.integers(0, 2), crashed=st.integers(0, 2),
          dead=st.sampled_from((False,) * 7 + (True,)))
    def worker_dies(self, done: int, crashed: int, dead: bool) -> None:
        """Some calls are over, some crash; those that had not begun go back, in order."""
        host = self.hosts[self.incarnation]
        self.finish(done)
        host.alive = False
        for place, call in enumerate(host.calls):
            self.from_host[host.rank].append(
                m.TaskCrashed(call.task_id, call.attempt, DIED) if place < crashed
                else m.TaskReturned(call.task_id, call.attempt))
        host.calls.clear()
        self.state = ActorState.DEAD if dead else ActorState.RESTARTING
        self.incarnation += not dead
        self.tell()

    @precondition(lambda self: self.state is ActorState.ALIVE)
    @rule(done=st.integers(1, 3))
    def finish(self, done: int) -> None:
        host = self.hosts[self.incarnation]
        for _ in range(min(done, len(host.calls))):
            call = host.calls.popleft()
            if call.template_id[:1] == RAISES and call.attempt == 0:
                self.raised.add(call.task_id)
                answer: Any = m.TaskFailed(call.task_id, call.attempt, 1, b"\1error", True)
            else:
                answer = m.TaskDone(call.task_id, call.attempt, 1, b"\0value")
            self.from_host[host.rank].append(answer)

    # --- what arrives ----------------------------------------

    @precondition(lambda self: self.told)
    @rule(count=st.integers(1, 3))
    def home_is_heard(self, count: int) -> None:
        for _ in range(min(count, len(self.told))):
            self.routes.actor_is(HOME, self.told.popleft())
            self.take()

    @precondition(lambda self: any(self.to_host.values()))
    @rule(rank=st.integers(2, 3), count=st.integers(1, 4))
    def host_hears(self, rank: int, count: int) -> None:
        for _ in range(min(count, len(self.to_host[rank]))):
            self.arrives(self.to_host[rank].popleft(), rank)

    def arrives(self, call: m.AssignCall, rank: int) -> None:
        assert type(call) is m.AssignCall
        host = self.hosts[call.incarnation]
        assert host.rank == rank
        if not host.alive:
            self.from_host[rank].append(m.TaskReturned(call.task_id, call.attempt))
            return
        host.calls.append(call)
        place = self.places[call.task_id]
        if call.task_id not in self.raised:  # else others may have gone first
            assert host.last.get(call.caller, -1) < place, "AC-1"
            host.last[call.caller] = place

    @precondition(lambda self: any(self.from_host.values()))
    @rule(rank=st.integers(2, 3), count=st.integers(1, 3))
    def host_is_heard(self, rank: int, count: int) -> None:
        for _ in range(min(count, len(self.from_host[rank]))):
            message = self.from_host[rank].popleft()
            tasks = self.lower.tasks
            handle = {m.TaskDone: tasks.peer_done, m.TaskCrashed: tasks.peer_crashed,
                      m.TaskFailed: tasks.peer_failed, m.TaskReturned: tasks.peer_returned}
            handle[type(message)](rank, message)
            self.take()

    @invariant()
    def holds(self) -> None:
        self.routes.validate()
        self.lower.tasks.validate()

    def teardown(self) -> None:
        """In the end the actor dies: then every call has an outcome, and nothing is left."""
        while self.objects:
            object_id = self.objects.pop()
            self.lower.directory.resolve_inline(object_id, b"\0value")
            self.take()
        if self.state is ActorState.ALIVE:
            self.worker_dies(0, 1, dead=True)
        elif self.state is not ActorState.DEAD:
            self.state = ActorState.DEAD
            self.tell()
        while self.told or any(self.to_host.values()) or any(self.from_host.values()):
            while self.told:
                self.routes.actor_is(HOME, self.told.popleft())
                self.take()
            for rank in (2, 3):
                self.host_hears(rank, len(self.to_host[rank]))
                self.host_is_heard(rank, len(self.from_host[rank]))
        self.holds()
        assert not self.lower.tables.tasks
        assert not self.routes.routes


TestRoutes = RoutesMachine.TestCase


def dying() -> RoutesMachine:
    """Of three calls at the first incarnation the first crashed; the route has not heard."""
    play = RoutesMachine()
    play.call(0, b"9", 3)
    play.is_created()
    play.home_is_heard(2)
    play.host_hears(2, 3)
    play.worker_dies(0, 1, dead=False)
    return play


def sent_to_the_next(play: RoutesMachine) -> list[int]:
    return [play.places[call.task_id] for call in play.to_host[3]]


def test_what_comes_back_goes_before_what_waits() -> None:
    play = dying()
    play.host_is_heard(2, 1)
    play.call(0, b"9", 1)
    play.host_is_heard(2, 2)
    play.home_is_heard(1)
    play.is_created()
    play.home_is_heard(1)
    assert sent_to_the_next(play) == [0, 1, 2, 3]


def test_the_next_incarnation_waits_for_what_the_last_has_to_say() -> None:
    """The home is heard first: the crash is held back until homes of refs have answered."""
    play = dying()
    play.is_created()
    play.home_is_heard(2)
    play.call(0, b"9", 1)
    play.host_is_heard(2, 2)
    assert sent_to_the_next(play) == []
    play.host_is_heard(2, 1)
    assert sent_to_the_next(play) == [0, 1, 2, 3]


def test_a_call_whose_actor_is_dead_waits_for_nothing() -> None:
    play = RoutesMachine()
    play.call_that_waits(0)
    play.state = ActorState.DEAD
    play.tell()
    play.home_is_heard(2)
    assert not play.lower.tables.tasks
