"""The node's ends of its clients' channels, and of workers' task channels. Thin.

Nothing here ever blocks. What a socket does not take now waits in a backlog:

    FULL   its receiver is slow: until the socket can be written
    SHORT  this host is out of descriptors or memory: until the next tick (`retry`)

A client that sends what cannot be read loses its connection (`Connection.fault`), and nobody else
is disturbed. Decides nothing and knows no message but what is to be sent.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from hpcray.node.inbox import Batch, Inbox, Inboxes
from hpcray.node.pool import WorkerPool
from hpcray.node.watcher import READ, WRITE, Watcher
from hpcray.protocol import messages, sizes
from hpcray.transport import datagrams
from hpcray.transport.datagrams import BARE

# Datagrams read from one client per turn: bounds a turn, keeps clients equal.
_DATAGRAMS_PER_TURN = 64
# After a datagram this large another one is likely there already.
_LIKELY_MORE_BYTES = 1024
# A batch of fewer messages is encoded as a whole, and again in parts if that is too long.
_MANY = 64


class _Unsent:
    """The rest of a batch. It is encoded as the client takes it: what waits for a slow one shares
    its values with the records, however much that is."""

    __slots__ = ("datagram", "descriptors", "rest")

    def __init__(
        self, datagram: bytes | None, rest: Iterator[bytes], descriptors: tuple[int, ...]
    ) -> None:
        self.datagram = datagram  # the next one; None: the rest makes it
        self.rest = rest
        self.descriptors = descriptors  # of our own, to send along and close

    def send(self, sock: socket.socket) -> int:
        """As `datagrams.send`, for all of it."""
        datagram = self.datagram
        while True:
            if datagram is None:
                datagram = next(self.rest, None)
                if datagram is None:
                    return datagrams.SENT
            outcome = datagrams.send(sock, datagram, self.descriptors)
            if outcome != datagrams.SENT:
                self.datagram = datagram
                return outcome
            datagram = None

    def close(self) -> None:
        datagrams.close_all(self.descriptors)


class Connection:
    """A client's channel at the node's side: what could not be sent yet waits here."""

    __slots__ = ("backlog", "fault", "in_memory", "inbox", "number", "socket", "waiting")

    def __init__(self, number: int, sock: socket.socket, inbox: Inbox) -> None:
        self.number = number
        self.inbox = inbox
        self.socket = sock
        self.backlog: deque[_Unsent] = deque()
        self.waiting = False  # for the socket to be writable
        self.in_memory = False  # what comes next, as far as it has said so
        # What is wrong with what it sent: nothing more is read of it, and it has to end.
        self.fault = ""

    def readable(self) -> bool:
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def fail(self, fault: str) -> None:
        """Hear nothing more of it; its channel's end can be read from now on."""
        self.fault = fault
        with contextlib.suppress(OSError):  # it has hung up, or there is nothing more
            self.socket.shutdown(socket.SHUT_RD)
            # A socket closed with something unread takes back what it has sent: the reason.
            while self.socket.recv(1, socket.MSG_DONTWAIT):
                pass

    def drop_backlog(self) -> None:
        for unsent in self.backlog:
            unsent.close()
        self.backlog.clear()


class Connections:
    def __init__(
        self, watcher: Watcher, pool: WorkerPool, handle: Callable[[int, Batch], None]
    ) -> None:
        self._watcher = watcher
        self.pool = pool
        self.inboxes = Inboxes(lambda number: bool(self.read(self.clients[number])), handle)
        self.clients: dict[int, Connection] = {}
        self._task_backlog: dict[int, deque[bytes]] = {}
        # Clients, and workers with tasks, to whom something could not be sent for want of
        # descriptors or memory.
        self._short: set[int] = set()
        self._short_tasks: set[int] = set()
        # What each worker was given last: its output may be read after its result.
        self.last_template: dict[int, bytes] = {}
        self._buffer = datagrams.receive_buffer()

    def add(self, number: int, sock: socket.socket) -> Connection:
        datagrams.enlarge_buffers(sock)
        connection = self.clients[number] = Connection(number, sock, self.inboxes.add(number))
        return connection

    def pop(self, number: int) -> Connection | None:
        """Forget a client, whose channel may not have been read dry."""
        self.inboxes.of.pop(number, None)
        self._short.discard(number)
        return self.clients.pop(number, None)

    # --- client channels --------------------------------------------------------------------------

    def read(self, connection: Connection) -> int | None:
        """Put what lies there, bounded, into the inbox: how many; None at the channel's end."""
        if connection.fault:
            return None
        batches = connection.inbox.batches
        buffer = self._buffer
        count = 0
        sock = connection.socket
        for _ in range(_DATAGRAMS_PER_TURN):
            try:
                data = (self._receive(sock) if connection.in_memory
                        else buffer[: sock.recv_into(buffer, 0, BARE)])
                if not data:
                    return count or None  # its end: seen again when these have been handled
                batch = messages.decode_to_node(data)
            except BlockingIOError:
                break
            except (datagrams.Malformed, msgspec.DecodeError) as error:
                connection.fail(f"it sent what cannot be read: {error}")
                return count or None
            except (datagrams.ChannelClosed, OSError):
                return count or None
            # An empty batch announces that the next one is in memory.
            connection.in_memory = not batch
            if batch:
                batches.append(batch)
                count += 1
                if len(data) < _LIKELY_MORE_BYTES:
                    break  # epoll says if there is more: cheaper than asking the socket in vain
        if connection.backlog:
            self._drain(connection)
        return count

    def _receive(self, sock: socket.socket) -> memoryview:
        received = datagrams.receive(sock, self._buffer)
        if received is None:
            raise BlockingIOError
        data, descriptors = received
        datagrams.close_all(descriptors)  # no client has any reason to send one
        return data

    def send(self, number: int, batch: list[Any], descriptors: tuple[int, ...] = ()) -> None:
        """Send to a client, or queue for it; to one that is gone: nothing.

        Raises:
          OSError: what has descriptors has to wait, and there is none to keep them open: it has
            not been sent, nor queued.
        """
        connection = self.clients.get(number)
        if connection is None:
            return
        if connection.backlog:
            unsent = _Unsent(None, sizes.parts(batch, messages.encode), descriptors)
            outcome = datagrams.FULL
        else:
            if len(batch) < _MANY:
                # The common case: one datagram.
                datagram = messages.encode(batch)
                if len(datagram) <= sizes.DATAGRAM_MAX_BYTES:
                    outcome = datagrams.send(connection.socket, datagram, descriptors)
                    if outcome == datagrams.SENT:
                        return
            unsent = _Unsent(None, sizes.parts(batch, messages.encode), descriptors)
            outcome = unsent.send(connection.socket)
            if outcome == datagrams.SENT or outcome == datagrams.GONE:
                return  # gone: its end is reported by the zygote, or read as EOF
        # Descriptors are kept open on their own: the segment may be closed meanwhile.
        unsent.descriptors = _duplicates(descriptors)
        connection.backlog.append(unsent)
        self._await(connection, outcome)

    def _await(self, connection: Connection, outcome: int) -> None:
        """Its first datagram can be sent when the socket is writable, or when the host allows."""
        if outcome == datagrams.SHORT:
            self._short.add(connection.number)
        waiting = outcome == datagrams.FULL and connection.number not in self._short
        if waiting != connection.waiting:
            connection.waiting = waiting
            self._watcher.change(connection.socket.fileno(), READ | WRITE if waiting else READ)

    def _drain(self, connection: Connection) -> None:
        backlog = connection.backlog
        while backlog:
            outcome = backlog[0].send(connection.socket)
            if outcome == datagrams.FULL or outcome == datagrams.SHORT:
                self._await(connection, outcome)
                return
            backlog.popleft().close()
        self._await(connection, datagrams.SENT)

    @property
    def short(self) -> bool:
        """Something waits for a `retry`."""
        return bool(self._short or self._short_tasks)

    def retry(self) -> None:
        """Send what could not be sent for want of descriptors or memory. Once per tick."""
        short, self._short = self._short, set()
        for number in short:
            self._drain(self.clients[number])
        short_tasks, self._short_tasks = self._short_tasks, set()
        for number in short_tasks:
            self._drain_tasks(number)

    def detach(self, connection: Connection) -> None:
        """Stop watching a worker; its descriptors are the pool's."""
        number = connection.number
        self._watcher.unwatch(connection.socket.fileno())
        self._drop_tasks(number)
        self.last_template.pop(number, None)
        connection.drop_backlog()

    # --- task channels ----------------------------------------------------------------------------

    def send_tasks(self, number: int, batch: list[Any]) -> None:
        """One datagram for a worker's task channel."""
        if number not in self.clients:
            return
        encoded = messages.encode(batch)
        if type(batch[-1]) is messages.Run:
            self.last_template[number] = batch[-1].template_id
        backlog = self._task_backlog.get(number)
        if backlog is None:
            outcome = self.pool.send_task(number, encoded)
            if outcome == datagrams.SENT:
                return
            backlog = self._task_backlog[number] = deque()
            self._await_tasks(number, outcome)
        backlog.append(encoded)

    def _await_tasks(self, number: int, outcome: int) -> None:
        fd = self.pool.handle(number).task_socket.fileno()
        if outcome == datagrams.SHORT:
            self._short_tasks.add(number)
            self._watcher.unwatch(fd)
        elif not self._watcher.watches(fd):
            self._watcher.watch(fd, lambda _fd: self._drain_tasks(number), WRITE)

    def _drain_tasks(self, number: int) -> None:
        backlog = self._task_backlog[number]
        while backlog:
            outcome = self.pool.send_task(number, backlog[0])
            if outcome != datagrams.SENT:
                self._await_tasks(number, outcome)
                return
            backlog.popleft()
        self._drop_tasks(number)

    def _drop_tasks(self, number: int) -> deque[bytes]:
        """Forget what waits for the task channel: it is returned."""
        backlog = self._task_backlog.pop(number, None)
        if backlog is None:
            return deque()
        self._short_tasks.discard(number)
        self._watcher.unwatch(self.pool.handle(number).task_socket.fileno())
        return backlog

    def take_back(self, number: int) -> list[bytes]:
        """The ids of the tasks the worker had not read; what else lay there is sent again.

        Raises:
          Malformed: something that lay there is lost (this process is out of descriptors).
        """
        found = self.pool.take_back(number)
        found.extend(self._drop_tasks(number))
        task_ids = []
        for datagram in found:
            for message in messages.decode_to_worker(datagram):
                if type(message) is messages.Run:
                    task_ids.append(message.task_id)
                else:
                    self.send_tasks(number, [message])
        return task_ids


def _duplicates(descriptors: tuple[int, ...]) -> tuple[int, ...]:
    """All or none."""
    with contextlib.ExitStack() as on_error:
        made = []
        for fd in descriptors:
            made.append(os.dup(fd))
            on_error.callback(os.close, made[-1])
        on_error.pop_all()
    return tuple(made)
