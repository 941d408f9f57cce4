"""One end of a SEQPACKET channel between processes of a host: datagrams, with descriptors.

    send     fits into a datagram ------------------------------> one system call
             does not: memfd, written, its descriptor travels --> a datagram of 9 bytes
    receive  recvmsg into the receiver's buffer; what came in a memfd is read from there

So a message of any size is one datagram: it is received as a whole or not at all, in its order,
and can be taken back unread like any other. Nothing has to be put together again, and several
senders may share a channel.

A receiver that gets nothing but contents may use recv, for less, if there is one sender and that
announces what is in memory: so the node reads its clients (node/connections.py).

Nothing here waits, takes a lock, or raises for what can happen: `send` says how it went, and
`receive` raises only what ends the channel. It knows nothing of messages.
"""

from __future__ import annotations

import array
import contextlib
import errno
import mmap
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import repeat
from operator import getitem
from typing import Any

from hpcray.protocol.sizes import DATAGRAM_MAX_BYTES, MESSAGE_MAX_BYTES, RECEIVE_BYTES

SENT = 0
FULL = 1  # the receiver is slow: when the socket is writable
SHORT = 2  # no descriptor or memory just now: after a while
GONE = 3  # the other end is closed

# The first byte of a datagram whose content is in a memfd; no msgpack value begins with it.
_IN_MEMORY = 0xC1
_MAX_DESCRIPTORS = 16
_ANCILLARY_BYTES = socket.CMSG_SPACE(_MAX_DESCRIPTORS * 4)
# Plain ints: combining the enum members costs a microsecond at each call.
_SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
SEND_FLAGS = (_SEND_FLAGS,)
# To wait for a datagram, and leave it where it is.
PEEK = int(socket.MSG_PEEK)
_NO_DESCRIPTORS: list[int] = []
_LOOK_FLAGS = int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
# Of `recv_into`, a fifth of the price of `receive` less: for what was not announced (`send`).
# Descriptors that come along are closed.
BARE = int(socket.MSG_DONTWAIT)
_LOST_FLAGS = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_TRUNCATED = int(socket.MSG_TRUNC)
_FULL_ERRORS = frozenset({errno.EAGAIN, errno.EWOULDBLOCK})
_SHORT_ERRORS = frozenset({
    errno.ENOBUFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS, errno.ENOSPC})
_BUFFER_BYTES = 4 * 1024 * 1024

Received = tuple[memoryview, list[int]]


class ChannelClosed(Exception):
    """The other end hung up."""


class Malformed(ChannelClosed):
    """The other end sent what cannot be read: its messages are lost, so the channel ends."""


def receive_buffer() -> memoryview:
    """Room for any datagram. Takes memory only as far as datagrams reach into it: a `bytearray`
    is zeroed, and its page faults are a good part of a worker's start."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return memoryview(mmap.mmap(-1, RECEIVE_BYTES, flags=private))


def enlarge_buffers(sock: socket.socket) -> None:
    """Ask for much; the kernel gives what the host allows. The default is enough to work."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)


def send(
    sock: socket.socket, data: bytes, descriptors: Sequence[int] = (),
    note: list[Any] | None = None, announcement: bytes = b"",
) -> int:
    """Send one datagram: SENT, FULL, SHORT or GONE. Descriptors are duplicated to the receiver.

    Something is appended to `note` in the same step as it is sent: whatever a signal handler raises
    then, it is known that it was. In front of a content in memory goes `announcement`, if there is
    one; several times, if what follows could not be sent at once.
    """
    try:
        if len(data) > DATAGRAM_MAX_BYTES:
            return _send_in_memory(sock, data, descriptors, note, announcement)
        if descriptors:
            _send_with(sock, data, descriptors, note)
        else:
            if note is None:
                sock.send(data, _SEND_FLAGS)
            else:  # one call into C, between whose parts no Python code can run
                note.extend(map(sock.send, (data,), SEND_FLAGS))
        return SENT
    except OSError as error:
        if error.errno == errno.EMSGSIZE:  # a host with less room than any default
            return _send_in_memory(sock, data, descriptors, note, announcement)
        return _outcome(error)


def _send_in_memory(
    sock: socket.socket, data: bytes, descriptors: Sequence[int], note: list[Any] | None,
    announcement: bytes,
) -> int:
    try:
        fd = os.memfd_create("hpcray-message", os.MFD_CLOEXEC)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view):]
            if announcement:
                sock.send(announcement, _SEND_FLAGS)
            head = bytes((_IN_MEMORY,)) + len(data).to_bytes(8, "little")
            _send_with(sock, head, (fd, *descriptors), note)
        finally:
            os.close(fd)
    except OSError as error:
        return _outcome(error)
    return SENT


def _send_with(
    sock: socket.socket, data: bytes, descriptors: Sequence[int], note: list[Any] | None
) -> None:
    # Not `socket.send_fds`: it ignores the flags it is given.
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
    (note if note is not None else []).extend(
        map(sock.sendmsg, ([data],), ([rights],), SEND_FLAGS))


def _outcome(error: OSError) -> int:
    if error.errno is None:
        raise error  # not the system's: a signal handler's, such as a TimeoutError
    if error.errno in _FULL_ERRORS:
        return FULL
    if error.errno in _SHORT_ERRORS:
        return SHORT
    return GONE


def receive(sock: socket.socket, buffer: memoryview) -> Received | None:
    """The content of one datagram, and the descriptors that came with it; None: there is none now.

    The content may lie in `buffer`: decode it before the next call.

    Raises:
      ChannelClosed: the other end has hung up.
      Malformed: a datagram came that is too long, or has lost its descriptors.
    """
    try:
        taken = sock.recvmsg_into([buffer], _ANCILLARY_BYTES, _LOOK_FLAGS)
    except BlockingIOError:
        return None
    except OSError as error:
        raise ChannelClosed(str(error)) from None
    nbytes, ancillary, flags, _ = taken
    # The common case of `content`, written out.
    if not (ancillary or flags & _LOST_FLAGS) and nbytes and buffer[0] != _IN_MEMORY:
        return buffer[:nbytes], _NO_DESCRIPTORS
    data, descriptors, spent = content(taken, buffer)
    if spent >= 0:
        os.close(spent)
    return data, descriptors


def received(sock: socket.socket, buffer: memoryview) -> Iterator[Any]:
    """Endless: each step of it takes one datagram from the socket, and gives what is for `content`.
    Such a step is no call to Python, behind which a signal handler might raise something:
    `for taken in received: break` takes and notes it, or does neither.

    Raises, at each step:
      BlockingIOError: there is nothing.
      OSError: the other end has hung up.
    """
    return map(
        sock.recvmsg_into, repeat([buffer]), repeat(_ANCILLARY_BYTES), repeat(_LOOK_FLAGS))


def sent(sock: socket.socket, slot: list[bytes]) -> Iterator[int]:
    """As `received`: each step sends what is in `slot` by then. It is short, and does not wait.

    Raises, at each step:
      OSError: it was not sent.
    """
    look: Callable[[], Any] = partial(getitem, slot, 0)
    return map(sock.send, iter(look, None), repeat(_SEND_FLAGS))


def content(taken: tuple[Any, ...], buffer: memoryview) -> tuple[memoryview, list[int], int]:
    """The second half of `receive`; and a descriptor (-1: none) to be closed when that is noted.

    Until then it can be done again, if a signal handler has raised something meanwhile.
    """
    nbytes, ancillary, flags, _ = taken
    if not (ancillary or flags & _LOST_FLAGS) and nbytes and buffer[0] != _IN_MEMORY:
        return buffer[:nbytes], _NO_DESCRIPTORS, -1
    if nbytes == 0:
        raise ChannelClosed("the other end closed the connection")
    descriptors = _descriptors(ancillary) if ancillary else []
    if flags & _LOST_FLAGS:
        close_all(descriptors)
        if flags & _TRUNCATED:
            raise Malformed(f"a datagram of more than {len(buffer):,} B came")
        raise Malformed("this process has no file descriptor left for what it was sent; raise the "
                        "limit (ulimit -n) or close files")
    if buffer[0] != _IN_MEMORY:
        return buffer[:nbytes], descriptors, -1
    try:
        return _from_memory(buffer[:nbytes], descriptors), descriptors[1:], descriptors[0]
    except (Malformed, OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # a signal handler's, such as a TimeoutError
        close_all(descriptors)
        raise Malformed(f"a message in memory could not be read: {error}") from None


def close_all(descriptors: Iterable[int]) -> None:
    for fd in descriptors:
        os.close(fd)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found: list[int] = []
    for _level, _kind, data in ancillary:
        received = array.array("i")
        received.frombytes(data[: len(data) - len(data) % 4])
        found.extend(received)
    return found


def _from_memory(head: memoryview, descriptors: list[int]) -> memoryview:
    """Read, not mapped: whoever sent it could still make it shorter."""
    if len(head) != 9 or not descriptors:
        raise Malformed("a datagram came that says it has a descriptor, and has none")
    fd = descriptors[0]
    nbytes = int.from_bytes(head[1:], "little")
    if nbytes > MESSAGE_MAX_BYTES + DATAGRAM_MAX_BYTES or os.fstat(fd).st_size != nbytes:
        raise Malformed(f"a datagram came that says it has {nbytes:,} B, and has not")
    data = bytearray(nbytes)
    view = memoryview(data)
    position = 0
    while position < nbytes:
        count = os.preadv(fd, [view[position:]], position)
        if not count:
            raise Malformed("a message became shorter while it was read")
        position += count
    return view
