"""The door between user threads and the node, over a real socket whose other end is the test."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
from collections import deque
from typing import Any

import pytest

from hpcray.client.core import Core
from hpcray.client.link import Link
from hpcray.client.references import ReferenceTable
from hpcray.client.store import Store
from hpcray.client.waiters import Waiter
from hpcray.exceptions import RaySystemError
from hpcray.protocol import messages as m
from hpcray.testing.clients import reference_kinds
from hpcray.transport import datagrams

FLAGS = socket.MSG_DONTWAIT


class Ends:
    def __init__(self) -> None:
        ours, self.node = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        dropped: deque[bytes] = deque()
        self.core = Core(
            refs=ReferenceTable(reference_kinds(dropped)[0], dropped), store=Store,
            wire=lambda fd: socket.socket(fileno=fd))
        self.link = Link(self.core)
        self.link.open(ours)

    def say(self, *batch: Any) -> None:
        self.node.send(m.encode(list(batch)))

    def heard(self) -> list[Any]:
        found: list[Any] = []
        while True:
            try:
                found += m.decode_to_node(self.node.recv(1 << 20, FLAGS))
            except BlockingIOError:
                return found

    def ask(self, number: int) -> tuple[int, Waiter]:
        with self.link as link:
            found = self.core.requests.ask(f"question {number}", None, [])
            link.flush()
            return found


@pytest.fixture
def ends():
    both = Ends()
    yield both
    both.link.close("the test is over")
    both.node.close()


def test_whoever_reads_wakes_all_whose_answers_have_come(ends):
    answers = {}

    def wait(number: int) -> None:
        request, waiter = ends.ask(number)
        with ends.link as link:
            link.wait(waiter, None)
        answers[number] = (request, waiter.result[0].result)

    threads = [threading.Thread(target=wait, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    asked: list[Any] = []
    while len(asked) < 16:
        asked += ends.heard()
    for request in reversed(asked):  # the one that reads is answered when it comes
        ends.say(m.Reply(request.request, request.name))
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert {n: text for n, (_, text) in answers.items()} == {
        n: f"question {n}" for n in range(16)}


def test_the_collector_is_off_inside_and_as_it_was_outside(ends):
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            with ends.link:
                assert not gc.isenabled()
            assert gc.isenabled() is enabled
        finally:
            gc.enable()


def test_a_handler_that_calls_from_inside_is_refused(ends):
    caught = []

    def handler(*_: Any) -> None:
        try:
            with ends.link:
                pass
        except RuntimeError as error:
            caught.append(str(error))

    collect = ends.core.collect

    def interrupted(*args: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGUSR2)
        return collect(*args, **options)

    ends.core.collect = interrupted
    ends.core.requests.ask("something", None, [])
    before = signal.signal(signal.SIGUSR2, handler)
    try:
        assert ends.link.flush_lingering()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert len(caught) == 1 and "signal handler" in caught[0]
    with ends.link:
        pass  # it is usable still
    assert len(ends.heard()) == 1


def test_a_lock_that_a_raising_handler_has_left_taken_is_repaired(ends):
    ends.link.enter()  # as if it had struck at the first step of `leave`
    with ends.link:
        pass
    assert not ends.link.mine


def test_ctrl_c_strikes_as_the_thread_leaves(ends):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ends.link.catch_interrupts()
        reached = False
        with pytest.raises(KeyboardInterrupt):
            with ends.link:
                signal.raise_signal(signal.SIGINT)
                reached = True
        assert reached
        ends.link.close("over")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_a_wait_and_loses_nothing(ends):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ends.link.catch_interrupts()
        _, waiter = ends.ask(1)
        [request] = ends.heard()
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt), ends.link as link:
            link.wait(waiter, None)
        ends.say(m.Reply(request.request, "still there"))
        with ends.link as link:
            assert link.wait(waiter, time.monotonic() + 10)
        assert waiter.result[0].result == "still there"
    finally:
        ends.link.close("over")
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_raises_an_error_of_the_system_ends_a_wait(ends):
    """TimeoutError is an OSError; it is the program's, and not the socket's."""
    def handler(*_: Any) -> None:
        raise TimeoutError("the program's own")

    before = signal.signal(signal.SIGUSR2, handler)
    try:
        _, waiter = ends.ask(1)
        [request] = ends.heard()
        for deadline_s in (None, time.monotonic() + 60):
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR2)).start()
            with pytest.raises(TimeoutError, match="own"), ends.link as link:
                link.wait(waiter, deadline_s)
        ends.say(m.Reply(request.request, "still there"))
        with ends.link as link:
            assert link.wait(waiter, time.monotonic() + 10)
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_what_was_taken_when_a_handler_raised_is_handled_before_more_is_taken(ends):
    """Both would lie in the same buffer."""
    asked = [ends.ask(1), ends.ask(2)]
    first, second = ends.heard()
    ends.say(m.Reply(first.request, "first" * 100))
    with ends.link as link:
        assert link._look()  # and here it had raised
    ends.say(m.Reply(second.request, "second"))
    with ends.link as link:
        for _, waiter in reversed(asked):
            assert link.wait(waiter, None)
    assert [w.result[0].result for _, w in asked] == ["first" * 100, "second"]


def test_a_workers_notes_are_taken_in_their_order_and_before_what_is_said_later(ends):
    run = m.Run(b"t" * 24, b"template", 0, m.NO_ARGS, sender=7, sent=3)
    ends.core.notes.append([run])
    ends.core.notes.append((m.Done(run.task_id, 0, 1, b"value"), -1))
    assert not ends.core.outbox
    ends.ask(1)
    meanwhile, done, request = ends.heard()
    assert meanwhile.heard == ((7, 3),)
    assert done.task_id == run.task_id and request.name == "question 1"
    assert not ends.core.notes


def test_a_note_that_was_interrupted_is_taken_once_more(ends):
    class Interrupt(BaseException):
        pass

    def raising(*_: Any) -> None:
        raise Interrupt

    hear = ends.core.direct.on_runs
    ends.core.direct.on_runs = raising
    ends.core.notes.append([m.Stop()])
    ends.core.notes.append((m.Done(b"t" * 24, 0, 1, b"value"), -1))
    with pytest.raises(Interrupt), ends.link:
        pass
    assert not ends.link.mine and gc.isenabled()
    ends.core.direct.on_runs = hear
    with ends.link as link:
        link.flush()
    assert [message.task_id for message in ends.heard()] == [b"t" * 24]


def test_a_full_socket_is_waited_for_while_others_read_nothing(ends):
    """The node reads whatever it does; here it begins late."""
    count = 400
    sent = threading.Event()

    def flood() -> None:
        for number in range(count):
            with ends.link as link:
                ends.core.requests.ask("x" * 100_000, number, [])
                link.flush()
        sent.set()

    thread = threading.Thread(target=flood)
    thread.start()
    assert not sent.wait(0.3), "the socket takes it all: the test shows nothing"
    seen: list[Any] = []
    while len(seen) < count:
        seen += ends.heard()
    thread.join(10)
    assert [message.arguments for message in seen] == list(range(count))


def test_a_message_larger_than_a_datagram_arrives_whole(ends):
    with ends.link as link:
        ends.core.requests.ask("large", b"x" * 5_000_000, [])
        ends.core.requests.ask("small", b"y", [])
        link.flush()
    buffer = datagrams.receive_buffer()
    found: list[Any] = []
    while (received := datagrams.receive(ends.node, buffer)) is not None:
        found.append([(r.name, len(r.arguments)) for r in m.decode_to_node(received[0])])
    assert found == [[], [("large", 5_000_000)], [("small", 1)]], "in memory, and announced"


def test_closing_ends_the_waits_of_other_threads(ends):
    raised = []

    def wait() -> None:
        try:
            with ends.link as link:
                link.wait(Waiter(1), None)
        except RaySystemError as error:
            raised.append(str(error))

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(ends.link._sleepers) < 2 or not ends.link._reader:
        time.sleep(0.001)
    ends.link.close("it was shut down")
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert len(raised) == 3 and all("it was shut down" in text for text in raised)


def test_a_datagram_that_cannot_be_read_ends_the_channel_and_says_so(ends):
    """Its messages are lost. What came along with it is closed."""
    read_fd, write_fd = os.pipe()
    socket.send_fds(ends.node, [b"\x91\x05"], [write_fd])
    os.close(write_fd)
    ends.say(m.Reply(1, "behind it"))
    with pytest.raises(RaySystemError, match="cannot be read"), ends.link as link:
        link.wait(Waiter(1), None)
    with ends.link as link:
        assert link._taken is None
        assert not link.read_idle()
    assert os.read(read_fd, 1) == b""  # nobody has its other end
    os.close(read_fd)


@pytest.mark.parametrize("place", ["before", "behind"])
def test_a_handler_that_raises_while_a_large_message_is_read_loses_nothing(
    ends, monkeypatch, place
):
    """Its content is in a file, which is closed when it cannot be needed again."""
    def handler(*_: Any) -> None:
        raise TimeoutError("the program's own")

    def interrupted(*arguments: Any) -> int:
        monkeypatch.setattr(os, "preadv", preadv)
        if place == "before":
            signal.raise_signal(signal.SIGUSR2)
        count = preadv(*arguments)
        signal.raise_signal(signal.SIGUSR2)
        return count

    preadv = os.preadv
    _, waiter = ends.ask(1)
    [request] = ends.heard()
    assert datagrams.send(
        ends.node, m.encode([m.Reply(request.request, b"x" * 5_000_000)])) == datagrams.SENT
    open_before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "preadv", interrupted)
    before = signal.signal(signal.SIGUSR2, handler)
    try:
        with pytest.raises(TimeoutError, match="own"), ends.link as link:
            link.wait(waiter, None)
        with ends.link as link:
            assert link.wait(waiter, None)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert waiter.result[0].result == b"x" * 5_000_000
    assert len(os.listdir("/proc/self/fd")) == open_before


@pytest.mark.parametrize("ask", ["want", "watch", "want_result"])
def test_a_question_that_a_handler_has_interrupted_is_asked_again(ends, monkeypatch, ask):
    class Interrupt(BaseException):
        pass

    def raising(*_: Any) -> None:
        raise Interrupt

    core = ends.core
    ref = core.refs.fresh(b"i" * 28)
    core.refs.new_holds[ref._id] = None
    question = {
        "want": lambda: core.objects.want([ref._id]),
        "watch": lambda: core.objects.watch([ref._id], 1),
        "want_result": lambda: core.want_result(ref._id),
    }[ask]
    with monkeypatch.context() as patch:
        patch.setattr(core.refs, "tell_holds", raising)
        with pytest.raises(Interrupt), ends.link:
            question()
    with ends.link as link:
        question()
        question()
        link.flush()
    assert sum(type(message) in (m.Get, m.Watch) for message in ends.heard()) == 1
