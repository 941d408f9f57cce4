"""One end of a client-node channel: batches of messages over a SEQPACKET socket.

    sending    messages are appended to `outbox`; `flush` encodes them into datagrams
    receiving  `receive` hands every message of one datagram, with its descriptors, to its handler

Knows nothing of objects or tasks, and takes no lock: the client does.

A channel never sticks: when the socket is full, `flush` reads what has come in while it waits
(two parties that only send stop each other after 432 KiB).
"""

from __future__ import annotations

import array
import contextlib
import mmap
import select
import socket
from collections.abc import Callable, Mapping
from typing import Any

from hpcray.protocol import messages

_MAX_DESCRIPTORS = 64
_ANCILLARY_BYTES = socket.CMSG_SPACE(_MAX_DESCRIPTORS * 4)
# Plain ints: combining the enum members costs a microsecond at each call.
_SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_WAIT_FLAGS = int(socket.MSG_CMSG_CLOEXEC)
_LOOK_FLAGS = int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)


# By the type of the message; the descriptors of its datagram are taken in order.
Handlers = Mapping[type, Callable[[Any, list[int]], None]]


class ChannelClosed(Exception):
    """The node hung up."""


def receive_buffer() -> memoryview:
    """Room for any datagram. Takes memory only as far as datagrams reach into it: a `bytearray`
    is zeroed, and its 128 page faults are a good part of a worker's start."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return memoryview(mmap.mmap(-1, messages.RECEIVE_BYTES, flags=private))


class Channel:
    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.outbox: list[Any] = []
        self.sent = 0  # datagrams
        self._buffer = receive_buffer()
        self._decode = messages.decode_to_client
        self.closed = False
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, option, 4 * 1024 * 1024)

    def flush(self, handlers: Handlers) -> None:
        """Send everything queued.

        Raises:
          ChannelClosed: the node is gone; what was queued is lost.
        """
        batch = self.outbox
        if not batch:
            return
        self.outbox = []
        encoded = messages.encode(batch)
        if len(encoded) <= messages.DATAGRAM_MAX_BYTES:
            self._send(encoded, handlers)
        else:
            for datagram in messages.split_batch(batch, encoded):
                self._send(datagram, handlers)

    def _send(self, datagram: bytes, handlers: Handlers) -> None:
        while True:
            try:
                self.socket.send(datagram, _SEND_FLAGS)
                self.sent += 1
                return
            except BlockingIOError:
                poller = select.poll()
                poller.register(self.socket, select.POLLOUT | select.POLLIN)
                poller.poll(1000)
                while self.receive(handlers, wait=False):
                    pass
            except OSError as error:
                self.closed = True
                raise ChannelClosed(str(error)) from None

    def receive(self, handlers: Handlers, *, wait: bool) -> bool:
        """Handle one datagram; False if there was none (only without `wait`).

        Raises:
          ChannelClosed: the node is gone.
        """
        read = self.read(wait=wait)
        if read is None:
            return False
        batch, descriptors = read
        for message in batch:
            handlers[type(message)](message, descriptors)
        return True

    def read(self, *, wait: bool) -> tuple[list[Any], list[int]] | None:
        """One datagram, decoded, with its descriptors (in the order messages take them).

        Safe to call without the client's lock by the one thread that reads: the buffer is its own
        until `decode` has copied everything out.
        """
        try:
            nbytes, ancillary, _, _ = self.socket.recvmsg_into(
                [self._buffer], _ANCILLARY_BYTES, _WAIT_FLAGS if wait else _LOOK_FLAGS)
        except BlockingIOError:
            return None
        except OSError as error:
            self.closed = True
            raise ChannelClosed(str(error)) from None
        if nbytes == 0:
            self.closed = True
            raise ChannelClosed("the node closed the connection")
        descriptors: list[int] = []
        for _level, _kind, data in ancillary:
            received = array.array("i")
            received.frombytes(data[: len(data) - len(data) % 4])
            descriptors.extend(received)
        return self._decode(self._buffer[:nbytes]), descriptors

    def close(self) -> None:
        self.closed = True
        self.socket.close()
