"""Datagrams over real sockets: any size, with descriptors, full, short and broken."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcray.protocol.sizes import DATAGRAM_MAX_BYTES, MESSAGE_MAX_BYTES, RECEIVE_BYTES
from hpcray.transport import datagrams
from hpcray.transport.datagrams import FULL, GONE, SENT, SHORT, ChannelClosed, Malformed

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        yield near, far


@pytest.fixture(scope="module")
def buffer() -> memoryview:
    return datagrams.receive_buffer()


def open_count() -> int:
    return len(os.listdir("/proc/self/fd"))


def identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


sizes_ = st.sampled_from([
    1, 9, 5000, *(DATAGRAM_MAX_BYTES + n for n in (-1, 0, 1)),
    *(RECEIVE_BYTES + n for n in (-1, 0, 1)), 1 << 20])
chosen = st.lists(st.tuples(sizes_, st.integers(0, 3), st.integers(0, 255)), max_size=12)


# 0: as many bytes as the kernel gives; 1: as few (about 4.6 kB).
@pytest.mark.parametrize("send_buffer_bytes", [0, 208 * 1024, 1])
@given(messages=chosen)
@settings(deadline=None, max_examples=25)
def test_what_was_sent_arrives_once_whole_and_in_order(
    buffer: memoryview, send_buffer_bytes: int, messages: list[tuple[int, int, int]]
) -> None:
    before = open_count()
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        if send_buffer_bytes:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes // 2)
        else:
            datagrams.enlarge_buffers(near)
        received = []

        def take() -> bool:
            got = datagrams.receive(far, buffer)
            if got is None:
                return False
            data, descriptors = got
            received.append((bytes(data), [identity(fd) for fd in descriptors]))
            for fd in descriptors:
                os.close(fd)
            return True

        sent = []
        for nbytes, count, first in messages:
            # 0xC1 begins no msgpack value: it is the mark of a message in memory.
            data = bytes([first if first != 0xC1 else 0]) + os.urandom(nbytes - 1)
            lent = [os.memfd_create("test") for _ in range(count)]
            while (outcome := datagrams.send(near, data, lent)) == FULL:
                assert take(), "a full socket has something in it"
            assert outcome == SENT
            sent.append((data, [identity(fd) for fd in lent]))
            for fd in lent:
                os.close(fd)
        while take():
            pass
    assert received == sent
    assert open_count() == before


def test_a_closed_end_is_gone_and_says_so(pair: Pair, buffer: memoryview) -> None:
    near, far = pair
    assert datagrams.send(near, b"last") == SENT
    near.close()
    received = datagrams.receive(far, buffer)
    assert received is not None and bytes(received[0]) == b"last"
    with pytest.raises(ChannelClosed, match="the other end closed"):
        datagrams.receive(far, buffer)
    for nbytes in (10, DATAGRAM_MAX_BYTES + 1):
        assert datagrams.send(far, bytes(nbytes)) == GONE


def test_out_of_descriptors_a_large_message_has_to_wait(
    pair: Pair, buffer: memoryview, few_descriptors: Callable[[int], None]
) -> None:
    near, far = pair
    few_descriptors(0)
    data = os.urandom(DATAGRAM_MAX_BYTES + 1)
    assert datagrams.send(near, data) == SHORT
    assert datagrams.send(near, b"small") == SENT
    received = datagrams.receive(far, buffer)
    assert received is not None and bytes(received[0]) == b"small"


def test_out_of_descriptors_a_receiver_says_what_it_lost(
    pair: Pair, buffer: memoryview, few_descriptors: Callable[[int], None]
) -> None:
    near, far = pair
    assert datagrams.send(near, bytes(DATAGRAM_MAX_BYTES + 1)) == SENT
    few_descriptors(0)
    with pytest.raises(Malformed, match="ulimit -n"):
        datagrams.receive(far, buffer)


def head(nbytes: int) -> bytes:
    return b"\xc1" + nbytes.to_bytes(8, "little")


@pytest.mark.parametrize(("datagram", "content", "why"), [
    (bytes(RECEIVE_BYTES + 1), None, "a datagram of more than"),
    (head(10), None, "says it has a descriptor"),
    (b"\xc1", None, "says it has a descriptor"),
    (head(10) + b"x", b"0123456789", "says it has a descriptor"),
    (head(10), b"012345678", "says it has 10 B, and has not"),
    (head(10), b"0123456789a", "says it has 10 B, and has not"),
    (head(MESSAGE_MAX_BYTES * 2), b"", "and has not"),
    (head((1 << 64) - 1), b"", "and has not"),
])
def test_what_no_sender_makes_is_malformed_and_leaves_nothing(
    pair: Pair, buffer: memoryview, datagram: bytes, content: bytes | None, why: str
) -> None:
    near, far = pair
    datagrams.enlarge_buffers(near)
    if len(datagram) > near.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) - 32:
        pytest.skip("this host's sockets take no such datagram")
    before = open_count()
    descriptors = []
    if content is not None:
        # A second one, which nobody would take.
        descriptors = [os.memfd_create("test"), os.dup(0)]
        os.write(descriptors[0], content)
    near.sendmsg([datagram], [(
        socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors
        else [])
    for fd in descriptors:
        os.close(fd)
    with pytest.raises(Malformed, match=why):
        datagrams.receive(far, buffer)
    assert open_count() == before


def test_a_descriptor_that_is_no_memory_is_malformed(pair: Pair, buffer: memoryview) -> None:
    near, far = pair
    before = open_count()
    read_fd, write_fd = os.pipe()
    socket.send_fds(near, [head(0)], [read_fd])
    socket.send_fds(near, [head(10)], [read_fd])
    os.close(read_fd)
    os.close(write_fd)
    received = datagrams.receive(far, buffer)
    assert received is not None and not received[0], "an empty one is read without looking"
    with pytest.raises(Malformed):
        datagrams.receive(far, buffer)
    assert open_count() == before


@given(datagram=st.binary(min_size=1, max_size=200), count=st.integers(0, 20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_datagram_is_received_or_malformed(
    pair: Pair, buffer: memoryview, datagram: bytes, count: int
) -> None:
    near, far = pair
    before = open_count()
    socket.send_fds(near, [datagram], [0] * count)
    try:
        received = datagrams.receive(far, buffer)
    except Malformed:
        pass
    else:
        assert received is not None
        for fd in received[1]:
            os.close(fd)
    assert open_count() == before
