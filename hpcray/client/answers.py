"""Values that a worker sends to the process that waits for them, past their node.

    worker --Done(told=client)--> node         first: the node knows before anybody else
           --Value--------------> client       through the client's own channel, whose other end
                                               the node has given us (ChannelOf)
           --Told---------------> node         with whatever is sent next
    client --Heard(worker)------> node         in front of what it says next: the node reads what
                                               the worker has said first

The node is on the way to every worker, but need not be on the way back: who waits is woken a turn
of the node's loop earlier. Nothing else changes: the node keeps the record, and answers itself if
the channel is full (Untold) or this process dies between the first step and the third.

Used with the client's lock held.
"""

from __future__ import annotations

import socket
from typing import Any

from hpcray.protocol import ids, messages
from hpcray.protocol.messages import Done, Told, Untold, Value

_SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


class Answers:
    def __init__(self) -> None:
        self.number = -1  # ours, among the clients of the node
        self._channels: dict[int, socket.socket] = {}
        self._values: dict[int, list[Value]] = {}
        self._sent = False

    def introduce(self, client: int, descriptor: int) -> None:
        self.forget(client)
        self._channels[client] = socket.socket(fileno=descriptor)

    def forget(self, client: int) -> None:
        channel = self._channels.pop(client, None)
        if channel is not None:
            channel.close()

    def close(self) -> None:
        for client in list(self._channels):
            self.forget(client)

    def add(self, client: int, done: Done) -> None:
        """Send the value behind its outcome, which says so; unless that client is not known yet."""
        if client in self._channels:
            done.told = client
            self._values.setdefault(client, []).append(
                Value(done.task_id + ids.FIRST_RETURN, done.value, self.number))

    @property
    def waiting(self) -> bool:
        return bool(self._values)

    def confirm(self, outbox: list[Any]) -> None:
        """Before anything is sent to the node: what it has not heard about the last values."""
        if self._sent:
            self._sent = False
            outbox.insert(0, Told())

    def send(self, outbox: list[Any]) -> None:
        """After the outcomes were sent: their values; into `outbox` what could not be."""
        found, self._values = self._values, {}
        for client, batch in found.items():
            channel = self._channels.get(client)
            if channel is None:
                continue  # that process has ended
            try:
                for datagram in messages.split_batch(batch, messages.encode(batch)):
                    channel.send(datagram, _SEND_FLAGS)
            except BlockingIOError:
                # Some of them may have been: a value that comes twice is no harm.
                outbox.append(Untold(client, b"".join(value.object_id for value in batch)))
            except OSError:
                self.forget(client)
        self._sent = True
