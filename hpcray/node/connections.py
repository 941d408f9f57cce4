"""The node's ends of its clients' channels, and of workers' task channels. Thin.

Nothing here ever blocks: what a socket does not take now waits in a backlog until it can be
written. Decides nothing and knows no message but what is to be sent.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from hpcray.node.inbox import Batch, Inbox, Inboxes
from hpcray.node.pool import WorkerPool
from hpcray.node.watcher import READ, WRITE, Watcher
from hpcray.protocol import messages

# Datagrams read from one client per turn: bounds a turn, keeps clients equal.
_DATAGRAMS_PER_TURN = 64
# After a datagram this large another one is likely there already.
_LIKELY_MORE_BYTES = 1024
_SEND_FLAGS = int(socket.MSG_NOSIGNAL)
_SOCKET_BUFFER_BYTES = 4 * 1024 * 1024


def enlarge_buffers(sock: socket.socket) -> None:
    """Ask for much; the kernel gives what the host allows."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)


class Connection:
    """A client's channel at the node's side: what could not be sent yet waits here."""

    __slots__ = ("backlog", "inbox", "number", "socket", "waiting")

    def __init__(self, number: int, sock: socket.socket, inbox: Inbox) -> None:
        self.number = number
        self.inbox = inbox
        self.socket = sock
        # (datagram, descriptors of our own to send along and close)
        self.backlog: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self.waiting = False

    def readable(self) -> bool:
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def drop_backlog(self) -> None:
        for _, descriptors in self.backlog:
            for fd in descriptors:
                os.close(fd)
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
        # What each worker was given last: its output may be read after its result.
        self.last_template: dict[int, bytes] = {}
        self._buffer = memoryview(bytearray(messages.RECEIVE_BYTES))

    def add(self, number: int, sock: socket.socket) -> Connection:
        enlarge_buffers(sock)
        connection = self.clients[number] = Connection(number, sock, self.inboxes.add(number))
        return connection

    def pop(self, number: int) -> Connection | None:
        """Forget a client, whose channel may not have been read dry."""
        self.inboxes.of.pop(number, None)
        return self.clients.pop(number, None)

    # --- client channels --------------------------------------------------------------------------

    def read(self, connection: Connection) -> int | None:
        """Put what lies there, bounded, into the inbox: how many; None at the channel's end."""
        batches = connection.inbox.batches
        count = 0
        sock = connection.socket
        for _ in range(_DATAGRAMS_PER_TURN):
            try:
                nbytes = sock.recv_into(self._buffer)
            except BlockingIOError:
                break
            except OSError:
                return count or None
            if nbytes == 0:
                # The end is seen again at the next read, when these have been handled.
                return count or None
            batches.append(messages.decode_to_node(self._buffer[:nbytes]))
            count += 1
            if nbytes < _LIKELY_MORE_BYTES:
                break  # epoll says if there is more: cheaper than asking the socket in vain
        if connection.backlog:
            self._drain(connection)
        return count

    def send(self, number: int, batch: list[Any], descriptors: tuple[int, ...] = ()) -> None:
        """Send to a client, or queue for it; to one that is gone: nothing."""
        connection = self.clients.get(number)
        if connection is None:
            return
        encoded = messages.encode(batch)
        if len(encoded) <= messages.DATAGRAM_MAX_BYTES:
            self._send_datagram(connection, encoded, descriptors)
        else:
            for datagram in messages.split_batch(batch, encoded):
                self._send_datagram(connection, datagram, ())

    def _send_datagram(
        self, connection: Connection, datagram: bytes, descriptors: tuple[int, ...]
    ) -> None:
        if not connection.backlog:
            try:
                self._send_now(connection, datagram, descriptors)
                return
            except BlockingIOError:
                pass
            except OSError:
                return  # it is dying; its end is reported by the zygote, or read as EOF
        # Descriptors are kept open on their own: the segment may be closed meanwhile.
        connection.backlog.append((datagram, tuple(os.dup(fd) for fd in descriptors)))
        if not connection.waiting:
            connection.waiting = True
            self._watcher.change(connection.socket.fileno(), READ | WRITE)

    @staticmethod
    def _send_now(connection: Connection, datagram: bytes, descriptors: tuple[int, ...]) -> None:
        if descriptors:
            socket.send_fds(connection.socket, [datagram], descriptors)
        else:
            connection.socket.send(datagram, _SEND_FLAGS)

    def _drain(self, connection: Connection) -> None:
        backlog = connection.backlog
        while backlog:
            datagram, descriptors = backlog[0]
            try:
                self._send_now(connection, datagram, descriptors)
            except BlockingIOError:
                return
            except OSError:
                pass  # dying: see _send_datagram
            backlog.popleft()
            for fd in descriptors:
                os.close(fd)
        connection.waiting = False
        self._watcher.change(connection.socket.fileno(), READ)

    def detach(self, connection: Connection) -> None:
        """Stop watching a worker; its descriptors are the pool's."""
        number = connection.number
        self._watcher.unwatch(connection.socket.fileno())
        if self._task_backlog.pop(number, None) is not None:
            self._watcher.unwatch(self.pool.handle(number).task_socket.fileno())
        self.last_template.pop(number, None)
        connection.drop_backlog()

    # --- task channels ----------------------------------------------------------------------------

    def send_tasks(self, number: int, batch: list[Any]) -> None:
        """One datagram for a worker's task channel."""
        encoded = messages.encode(batch)
        if type(batch[-1]) is messages.Run:
            self.last_template[number] = batch[-1].template_id
        backlog = self._task_backlog.get(number)
        if backlog is None:
            if number not in self.clients or self.pool.send_task(number, encoded):
                return
            backlog = self._task_backlog[number] = deque()
            self._watcher.watch(
                self.pool.handle(number).task_socket.fileno(),
                partial(self._drain_tasks, number), WRITE)
        backlog.append(encoded)

    def _drain_tasks(self, number: int, _fd: int) -> None:
        backlog = self._task_backlog[number]
        while backlog and self.pool.send_task(number, backlog[0]):
            backlog.popleft()
        if not backlog:
            del self._task_backlog[number]
            self._watcher.unwatch(self.pool.handle(number).task_socket.fileno())

    def take_back(self, number: int) -> list[bytes]:
        """The ids of the tasks the worker had not read; what else lay there is sent again."""
        datagrams = self.pool.take_back(number)
        backlog = self._task_backlog.pop(number, None)
        if backlog is not None:
            self._watcher.unwatch(self.pool.handle(number).task_socket.fileno())
            datagrams.extend(backlog)
        task_ids = []
        for datagram in datagrams:
            for message in messages.decode_to_worker(datagram):
                if type(message) is messages.Run:
                    task_ids.append(message.task_id)
                else:
                    self.send_tasks(number, [message])
        return task_ids
