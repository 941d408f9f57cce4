"""Directories of three nodes, without Machine: OD-1 to OD-4 as refs travel, copies come and go.

What a node says to another is delivered in order per pair, at times that Hypothesis draws; so adds,
drops, wants, pulls and frees overtake each other between pairs as they may in a cluster. Memory is
a book of live ranges: a range that is read when it is not live, or freed twice, is a fault.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpcray.node import outbox as out
from hpcray.node.directory import Directory
from hpcray.node.membership import Membership
from hpcray.node.memory import NodeMemory
from hpcray.node.outbox import Outbox
from hpcray.node.pulls import Pulls
from hpcray.node.records import PENDING, WAIT_VALUE, ClientRecord
from hpcray.node.tables import Tables
from hpcray.protocol import ids
from hpcray.protocol import messages as m

SIZE = 3
CLIENTS = 2
JOB = ids.job_id(1)
LARGE_BYTES = 5000


class Result(NamedTuple):
    """As `TaskDoneMany`: the value of an object of the receiver's, made by the sender."""

    object_id: bytes
    returned: m.PeerReturn
    handover: int


class Data(NamedTuple):
    """The bytes of a pull have arrived."""

    transfer: int
    object_id: bytes


class Node:
    def __init__(self, world: Directories, rank: int) -> None:
        self.world = world
        self.rank = rank
        tables = Tables(rank, SIZE, JOB, {})
        self.clients = tables.clients
        self.outbox = Outbox()
        membership = Membership(tables)
        for other in range(SIZE):
            membership.joined(m.Joined(other, "h", "h", 1, ()))
        self.memory = NodeMemory(tables, self.outbox, 64 << 20)
        self.memory.set_tight = lambda tight: None
        self.directory = Directory(tables, self.outbox, membership, self.memory)
        self.directory.creation_freed = lambda object_id: None
        self.pulls = Pulls(tables, self.outbox, self.memory)
        self.pulls.arrived = self.directory.pulled
        self.pulls.failed = self.directory.pull_failed
        self.pulls.sent = self.directory.unpin
        granted = self.memory.grant_node(32 << 20)
        assert granted is not None
        self.segment = granted.segment_id
        self.offset = 0
        self.live: dict[int, bytes] = {}  # offset -> whose value lies there
        for number in range(CLIENTS):
            self.clients[number] = ClientRecord(number)
        self.answers: list[tuple[int, bytes]] = []  # (client, object): values that have come

    def place(self, object_id: bytes) -> m.Located:
        self.offset += 8192
        self.live[self.offset] = object_id
        return m.Located(self.segment, self.offset, LARGE_BYTES)

    # --- as the machine and the loop do ----------------------------------------

    def hold(self, client: int, object_id: bytes) -> None:
        held = self.clients[client].held
        if object_id not in held:
            held.add(object_id)
            barrier = self.directory.announce(self.directory.hold(object_id))
            if barrier:
                self.clients[client].add_barrier = barrier

    def drop(self, client: int, object_id: bytes) -> None:
        self.clients[client].held.remove(object_id)
        self.directory.release(object_id)

    def end_turn(self) -> None:
        while True:
            self.directory.end_turn()
            actions, self.outbox.actions = self.outbox.actions, []
            for action in actions:
                if type(action) is out.StartPull:
                    self.pulls.begun(action, self.pulls.next_transfer(),
                                     self.place(action.object_id), mapped=False)
                elif type(action) is out.FreeNodeRange:
                    del self.live[action.offset]  # OD-3: once
            if not actions:
                break
        for rank, batch in self.outbox.peers.items():
            self.world.channels[self.rank, rank].extend(batch)
        self.outbox.peers.clear()
        for client, batch in self.outbox.clients.items():
            for message in batch:
                self.answered(client, message)
        self.outbox.clients.clear()

    def answered(self, client: int, message: Any) -> None:
        if type(message) is m.Value:
            assert message.value == value_of(message.object_id), "somebody else's value"
        elif type(message) is m.ValueAt:
            assert self.live[message.location.offset] == message.object_id, "OD-3: it was freed"
            self.directory.client_unpinned(self.clients[client], message.object_id)
        else:
            return
        self.answers.append((client, message.object_id))

    def hear(self, rank: int, message: Any) -> None:
        directory = self.directory
        handlers: dict[type, Callable[[Any], None]] = {
            m.HolderAdd: self.holder_add(rank),
            m.HolderAdded: lambda x: directory.holders.acknowledged(rank, x.turn),
            m.HolderDrop: lambda x: directory.holder_dropped(rank, x.ids),
            m.HandedOver: lambda x: directory.handed_over(x.handover),
            m.Want: lambda x: directory.wanted_by(rank, x.ids),
            m.ObjectReady: lambda x: directory.object_ready(x.object_id, x.value),
            m.CopyAdded: lambda x: directory.copy_added(rank, x.object_id),
            m.FreeCopies: lambda x: directory.free_copies(x.ids),
            m.PullRequest: lambda x: self.pull_asked(rank, x),
            m.PullRefused: lambda x: self.pulls.cancelled(x.transfer),
            Data: lambda x: self.pulls.copied(x.transfer),
            Result: lambda x: self.result(rank, x),
        }
        handlers[type(message)](message)
        self.end_turn()

    def holder_add(self, rank: int) -> Callable[[Any], None]:
        def hear(message: m.HolderAdd) -> None:
            self.directory.holder_added(rank, message.ids)
            self.outbox.peers[rank].append(m.HolderAdded(message.turn))
        return hear

    def pull_asked(self, rank: int, message: m.PullRequest) -> None:
        location = self.directory.pull_asked(rank, message)
        if location is not None:
            assert self.live[location.offset] == message.object_id, "OD-3: sent from freed memory"
            self.outbox.peers[rank].append(Data(message.transfer, message.object_id))
            self.directory.unpin(message.object_id)

    def result(self, rank: int, message: Result) -> None:
        barrier = self.directory.resolve_peer_return(message.object_id, message.returned, rank)
        if message.handover:
            self.directory.holders.release(barrier, rank, m.HandedOver(message.handover))


def value_of(object_id: bytes) -> bytes:
    return b"\0" + object_id


class Directories(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.channels: dict[tuple[int, int], deque[Any]] = {
            (a, b): deque() for a in range(SIZE) for b in range(SIZE)}
        self.nodes = [Node(self, rank) for rank in range(SIZE)]
        self.count = 0
        self.pending: dict[bytes, int] = {}  # objects nobody has made: by home
        self.inside: dict[bytes, bytes] = {}  # what a value contains
        self.asked: list[tuple[int, int, bytes]] = []  # (rank, client, object): without an answer

    def new_id(self, home: int) -> bytes:
        self.count += 1
        return ids.task_id(b"p" * 12, self.count, ids.id_tail(home, JOB)) + ids.FIRST_RETURN

    def holders(self) -> list[tuple[int, int, bytes]]:
        return [(node.rank, number, object_id) for node in self.nodes
                for number, client in node.clients.items() for object_id in sorted(client.held)]

    def leads_to(self, object_id: bytes, other: bytes) -> bool:
        """Counting cannot free objects that contain each other: such are not made here."""
        return object_id == other or any(
            self.leads_to(inner, other)
            for inner in ids.split_ids(self.inside.get(object_id, b"")))

    # --- what may happen ----------------------------------------

    ranks = st.integers(0, SIZE - 1)
    numbers = st.integers(0, CLIENTS - 1)

    @rule(rank=ranks, client=numbers, large=st.booleans(), data=st.data())
    def put(self, rank: int, client: int, large: bool, data: st.DataObject) -> None:
        node = self.nodes[rank]
        held = sorted(node.clients[client].held)
        contained = b"".join(data.draw(st.lists(st.sampled_from(held), max_size=2, unique=True))
                             if held else [])
        object_id = self.new_id(rank)
        self.inside[object_id] = contained
        if large:
            location = node.place(object_id)
            node.directory.created(object_id)
            node.clients[client].held.add(object_id)
            node.directory.resolve_located(object_id, location, contained)
        else:
            node.clients[client].held.add(object_id)
            node.directory.put_inline(object_id, value_of(object_id), contained)
        node.end_turn()

    @rule(rank=ranks, client=numbers)
    def submit(self, rank: int, client: int) -> None:
        """A task whose return `client` holds; some rank will make it."""
        object_id = self.new_id(rank)
        node = self.nodes[rank]
        node.directory.created(object_id)
        node.clients[client].held.add(object_id)
        self.pending[object_id] = rank
        node.end_turn()

    @precondition(lambda self: self.pending)
    @rule(rank=ranks, client=numbers, large=st.booleans(), data=st.data())
    def finish(self, rank: int, client: int, large: bool, data: st.DataObject) -> None:
        """A worker on `rank` returns a value, with refs that it holds inside."""
        object_id = data.draw(st.sampled_from(sorted(self.pending)))
        home = self.pending.pop(object_id)
        node = self.nodes[rank]
        held = sorted(other for other in node.clients[client].held
                      if not self.leads_to(other, object_id))
        contained = b"".join(data.draw(st.lists(st.sampled_from(held), max_size=2, unique=True))
                             if held else [])
        self.inside[object_id] = contained
        directory = node.directory
        if rank == home:
            value: bytes | m.Located = node.place(object_id) if large else value_of(object_id)
            directory.resolve_return(object_id, m.Return(value, contained))
        else:
            returned = m.PeerReturn(value_of(object_id), 0, contained)
            if large:
                directory.keep_foreign(object_id, node.place(object_id))
                returned = m.PeerReturn(b"", LARGE_BYTES, contained)
            handover = directory.hand_over(contained, home) if contained else 0
            directory.holders.release(
                node.clients[client].add_barrier, home, Result(object_id, returned, handover))
        node.end_turn()

    @precondition(lambda self: self.holders())
    @rule(data=st.data())
    def get(self, data: st.DataObject) -> None:
        rank, client, object_id = data.draw(st.sampled_from(self.holders()))
        if (rank, client, object_id) not in self.asked:
            self.asked.append((rank, client, object_id))
            self.nodes[rank].directory.get(client, object_id, WAIT_VALUE)
            self.nodes[rank].end_turn()

    @precondition(lambda self: self.holders())
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """Also one that is waited for: a `get` whose time is over."""
        rank, client, object_id = data.draw(st.sampled_from(self.holders()))
        if (rank, client, object_id) in self.asked:
            self.asked.remove((rank, client, object_id))
        self.nodes[rank].drop(client, object_id)
        self.nodes[rank].end_turn()

    @precondition(lambda self: self.holders())
    @rule(rank=ranks, client=numbers, data=st.data())
    def pass_on(self, rank: int, client: int, data: st.DataObject) -> None:
        """A ref travels inside the result of a task of `rank`, whose return `client` holds."""
        maker, worker, inner = data.draw(st.sampled_from(self.holders()))
        if maker == rank:
            return
        object_id = self.new_id(rank)
        node = self.nodes[rank]
        node.directory.created(object_id)
        node.clients[client].held.add(object_id)
        node.end_turn()
        sender = self.nodes[maker]
        handover = sender.directory.hand_over(inner, rank)
        sender.directory.holders.release(
            sender.clients[worker].add_barrier, rank,
            Result(object_id, m.PeerReturn(value_of(object_id), 0, inner), handover))
        self.inside[object_id] = inner
        sender.end_turn()

    @precondition(lambda self: any(self.channels.values()))
    @rule(data=st.data(), count=st.integers(1, 6))
    def deliver(self, data: st.DataObject, count: int) -> None:
        pair = data.draw(st.sampled_from([p for p, queue in self.channels.items() if queue]))
        for _ in range(count):
            if self.channels[pair]:
                self.deliver_one(pair)

    def deliver_one(self, pair: tuple[int, int]) -> None:
        message = self.channels[pair].popleft()
        self.nodes[pair[1]].hear(pair[0], message)
        self.look_inside()

    def look_inside(self) -> None:
        """Who gets a value holds the refs inside, while it holds the value."""
        for node in self.nodes:
            answers, node.answers = node.answers, []
            for client, object_id in answers:
                asked = (node.rank, client, object_id)
                if asked in self.asked:
                    self.asked.remove(asked)
                if object_id in node.clients[client].held:
                    for inner in ids.split_ids(self.inside.get(object_id, b"")):
                        node.hold(client, inner)
                    node.end_turn()

    # --- what holds ----------------------------------------

    @invariant()
    def valid(self) -> None:
        self.look_inside()
        for node in self.nodes:
            node.directory.validate()
            node.pulls.validate()
            assert node.memory.object_bytes == LARGE_BYTES * len(node.live), "OD-3"
            for client in node.clients.values():
                for object_id in client.held:
                    record = node.directory.records.get(object_id)
                    assert record is not None and record.count > 0, "OD-1"
                    foreign = not node.directory.is_home(object_id)
                    assert not foreign or (record.extra is not None and record.extra.added), "OD-4"

    def teardown(self) -> None:
        """Everything that is asked for comes; once nobody holds anything, nothing is left."""
        for object_id, home in list(self.pending.items()):
            self.nodes[home].directory.resolve_return(
                object_id, m.Return(value_of(object_id), b""))
            self.nodes[home].end_turn()
        self.settle()
        assert not self.asked, "a get that nobody answers"
        for rank, client, object_id in self.holders():
            self.nodes[rank].drop(client, object_id)
        for node in self.nodes:
            node.end_turn()
        self.settle()
        for node in self.nodes:
            assert not node.directory.records, node.directory.records
            assert not node.live, "OD-3: memory that nobody frees"
            assert node.directory.holders.idle

    def settle(self) -> None:
        self.look_inside()
        while any(self.channels.values()):
            for pair, queue in self.channels.items():
                if queue:
                    self.deliver_one(pair)


TestDirectories = Directories.TestCase
TestDirectories.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_the_machine_reaches_the_hard_cases() -> None:
    """A copy pulled from a third node, freed when the last of three holders drops it."""
    world = Directories()
    home, maker, reader = world.nodes
    object_id = world.new_id(0)
    home.directory.created(object_id)
    home.clients[0].held.add(object_id)
    maker.directory.keep_foreign(object_id, maker.place(object_id))
    world.channels[1, 0].append(Result(object_id, m.PeerReturn(b"", LARGE_BYTES, b""), 0))
    assert home.directory.records[object_id].state is PENDING
    world.settle()
    reader.hold(0, object_id)
    world.asked.append((2, 0, object_id))
    reader.directory.get(0, object_id, WAIT_VALUE)
    reader.end_turn()
    world.settle()
    assert not world.asked
    assert sorted(home.directory.records[object_id].more().copies or ()) == [1, 2]
    assert len(maker.live) == len(reader.live) == 1
    world.teardown()
