"""Values on their way past the node: `client/answers.py` over real sockets."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from hpcray.client.answers import Answers
from hpcray.protocol import ids, messages
from hpcray.protocol.messages import Done, Told, Untold

FLAGS = socket.MSG_DONTWAIT


@pytest.fixture
def ends():
    """(the node's end of a client's channel, the client's own)"""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield pair
    for end in pair:
        end.close()


def outcome(number: int, value: bytes = b"value") -> Done:
    return Done(bytes((number,)) * 24, 0, 5, value)


def known(ends: tuple[socket.socket, socket.socket]) -> Answers:
    answers = Answers()
    answers.introduce(7, os.dup(ends[0].fileno()))
    return answers


def received(end: socket.socket) -> list[Any]:
    found: list[Any] = []
    while True:
        try:
            found += messages.decode_to_client(end.recv(1 << 20, FLAGS))
        except BlockingIOError:
            return found


def test_values_leave_together_behind_their_outcomes(ends):
    answers = known(ends)
    outcomes = [outcome(1), outcome(2)]
    for done in outcomes:
        answers.add(7, done)
        assert done.told == 7
    assert answers.waiting and received(ends[1]) == []
    outbox: list[Any] = []
    answers.send(outbox)
    assert not answers.waiting and outbox == []
    assert [(v.object_id, v.value) for v in received(ends[1])] == [
        (done.task_id + ids.FIRST_RETURN, b"value") for done in outcomes]
    answers.close()


def test_the_node_hears_of_it_once_and_first(ends):
    answers = known(ends)
    answers.add(7, outcome(1))
    outbox: list[Any] = [outcome(2)]
    answers.confirm(outbox)
    assert len(outbox) == 1, "nothing has been sent yet"
    answers.send([])
    answers.confirm(outbox)
    answers.confirm(outbox)
    assert [type(m) for m in outbox] == [Told, Done]
    answers.close()


def test_somebody_unknown_is_left_to_the_node():
    answers = Answers()
    done = outcome(1)
    answers.add(3, done)
    assert done.told == -1 and not answers.waiting


def test_a_full_channel_is_left_to_the_node(ends):
    answers = known(ends)
    for number in range(200):
        answers.add(7, outcome(number, bytes(90_000)))
    outbox: list[Any] = []
    answers.send(outbox)
    [untold] = outbox
    assert type(untold) is Untold and untold.client == 7
    assert len(ids.split_ids(untold.ids)) == 200
    assert 0 < len(received(ends[1])) < 200, "some were sent: they come twice"
    answers.close()


def test_one_that_has_ended_is_forgotten(ends):
    answers = known(ends)
    ends[1].close()
    answers.add(7, outcome(1))
    outbox: list[Any] = []
    answers.send(outbox)
    assert outbox == []
    done = outcome(2)
    answers.add(7, done)
    assert done.told == -1, "the next value is the node's to send"


def test_descriptors_are_closed(ends):
    before = set(os.listdir("/proc/self/fd"))
    answers = known(ends)
    answers.introduce(7, os.dup(ends[0].fileno()))  # anew: the old one goes
    answers.introduce(8, os.dup(ends[0].fileno()))
    answers.forget(8)
    answers.forget(8)
    answers.close()
    assert set(os.listdir("/proc/self/fd")) == before
