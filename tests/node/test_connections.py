"""The node's ends of channels: what cannot be sent waits, what cannot be read costs its sender."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcray.node.connections import Connections
from hpcray.node.pool import WorkerPool
from hpcray.node.watcher import READ, Watcher
from hpcray.protocol import messages as m
from hpcray.protocol.sizes import DATAGRAM_MAX_BYTES
from hpcray.transport import datagrams

TARGETS = str(Path(__file__).parent.parent / "worker")
CLIENT = 7
WORKER = 1


class Node:
    """Connections to one client that is this test, and to one worker that reads nothing."""

    def __init__(self, pool: WorkerPool) -> None:
        self.heard: list[Any] = []
        self.watcher = Watcher()
        self.connections = Connections(
            self.watcher, pool, lambda number, batch: self.heard.extend(batch))
        near, self.client = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        near.setblocking(False)
        self.connection = self.connections.add(CLIENT, near)
        self.watcher.watch(near.fileno(), lambda _: self.read())
        self.ended = False
        handle = pool.start(WORKER, {"do": "stubborn"})
        datagrams.enlarge_buffers(handle.task_socket)
        self.worker = self.connections.add(WORKER, handle.client_socket)
        self.watcher.watch(handle.client_socket.fileno(), lambda _: None, READ)
        self.buffer = datagrams.receive_buffer()

    def read(self) -> None:
        if self.connections.read(self.connection) is None:
            self.ended = True
        else:
            self.connections.inboxes.handle_all(CLIENT)

    def received(self) -> list[Any]:
        """Everything that is on its way to the client."""
        found: list[Any] = []
        while True:
            got = datagrams.receive(self.client, self.buffer)
            if got is None:
                if not self.connection.waiting:
                    return found
                self.watcher.handle(0)
                continue
            found += m.decode_to_client(got[0])
            for fd in got[1]:
                os.close(fd)

    def close(self) -> None:
        self.connections.detach(self.connection)
        self.connections.detach(self.worker)
        self.connection.socket.close()
        self.client.close()
        self.watcher.close()


@pytest.fixture
def node() -> Iterator[Node]:
    pool = WorkerPool(os.environ, target="zygote_targets:prepare", sys_path=[TARGETS, *sys.path])
    node = Node(pool)
    yield node
    node.close()
    pool.close(4)


def value(number: int, nbytes: int) -> m.Value:
    return m.Value(number.to_bytes(28, "big"), bytes(nbytes))


LENGTHS = st.lists(st.sampled_from(
    [0, 1000, 50_000, *(DATAGRAM_MAX_BYTES - 40 + n for n in range(10)), 1_000_000]), max_size=8)


@given(batches=st.lists(LENGTHS.filter(bool), max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None,
          max_examples=30)
def test_a_slow_client_gets_everything_in_order(node: Node, batches: list[list[int]]) -> None:
    sent = []
    for lengths in batches:
        batch = [value(len(sent) + index, nbytes) for index, nbytes in enumerate(lengths)]
        sent += batch
        node.connections.send(CLIENT, batch)
    assert node.received() == sent
    assert not node.connection.backlog


def test_short_of_descriptors_what_is_large_waits_and_the_rest_behind_it(
    node: Node, few_descriptors: Callable[[int], None]
) -> None:
    few_descriptors(0)
    sent = [value(0, 10), value(1, 1_000_000), value(2, 10), value(3, 2_000_000)]
    for message in sent:
        node.connections.send(CLIENT, [message])
    assert node.connections.short
    assert not node.connection.waiting, "the socket is writable all the time: nobody is to spin"
    assert node.received() == sent[:1]
    node.connections.retry()
    assert node.received() == []
    few_descriptors(1)
    node.connections.retry()
    assert node.received() == sent[1:]
    assert not node.connections.short


def test_short_of_descriptors_tasks_wait_too_and_can_be_taken_back(
    node: Node, few_descriptors: Callable[[int], None]
) -> None:
    def run(number: int, nbytes: int) -> m.Run:
        return m.Run(bytes([number]) * 24, b"", 0, bytes(nbytes))

    few_descriptors(0)
    for number, nbytes in ((1, 10), (2, 1_000_000), (3, 10)):
        node.connections.send_tasks(WORKER, [run(number, nbytes)])
    assert node.connections.short
    assert node.connections.take_back(WORKER) == [bytes([n]) * 24 for n in (1, 2, 3)]
    assert not node.connections.short
    few_descriptors(1)
    for number, nbytes in ((1, 10), (2, 1_000_000), (3, 10)):
        node.connections.send_tasks(WORKER, [run(number, nbytes)])
    assert not node.connections.short
    assert node.connections.take_back(WORKER) == [bytes([n]) * 24 for n in (1, 2, 3)]


def test_a_descriptor_that_cannot_be_kept_is_an_error_and_nothing_is_queued(
    node: Node, few_descriptors: Callable[[int], None]
) -> None:
    node.connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)
    sent = []
    while not node.connection.backlog:
        sent.append(value(len(sent), 1000))
        node.connections.send(CLIENT, sent[-1:])
    few_descriptors(0)
    with pytest.raises(OSError):
        node.connections.send(CLIENT, [m.SegmentGrant(1, 10)], (0,))
    assert node.received() == sent


@pytest.mark.parametrize("datagram", [
    b"\xc0", b"\x90\x90", b"\x91\x92\x7f\x00", b"\xc1", m.encode([m.Drop("text")]),  # type: ignore[arg-type]
    m.encode([m.Done(b"t", 0, 0, b"v")])[:-1],
])
def test_what_cannot_be_read_ends_that_connection_after_what_could(
    node: Node, datagram: bytes
) -> None:
    good = m.Drop(bytes(28))
    node.client.send(m.encode([good]))
    node.client.send(datagram)
    node.client.send(m.encode([good]))
    for _ in range(4):
        node.watcher.handle(0)
    assert node.ended
    assert node.heard == [good]
    assert "cannot be read" in node.connection.fault


def test_what_is_in_memory_is_announced_once_or_several_times(node: Node) -> None:
    sent = [m.PutInline(bytes([n]) * 28, bytes(nbytes))
            for n, nbytes in enumerate((10, 1_000_000, 2_000_000, 10, 3_000_000))]
    for message in sent:
        if message is sent[2]:
            node.client.send(m.ANNOUNCEMENT)  # the sender was interrupted behind it
            node.watcher.handle(0)
        datagrams.send(node.client, m.encode([message]), announcement=m.ANNOUNCEMENT)
    for _ in sent:
        node.watcher.handle(0)
    assert node.heard == sent
    assert not node.ended
    assert node.connection.inbox.handled == len(sent)


def test_what_is_in_memory_and_was_not_announced_ends_the_connection(node: Node) -> None:
    before = len(os.listdir("/proc/self/fd"))
    datagrams.send(node.client, m.encode([m.PutInline(bytes(28), bytes(1_000_000))]))
    node.watcher.handle(0)
    assert node.connection.fault
    assert len(os.listdir("/proc/self/fd")) == before


def test_descriptors_from_a_client_are_closed(node: Node) -> None:
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(node.client, [m.encode([m.Drop(bytes(28))])], [0, 1, 2])
    node.watcher.handle(0)
    assert node.heard == [m.Drop(bytes(28))]
    assert len(os.listdir("/proc/self/fd")) == before
