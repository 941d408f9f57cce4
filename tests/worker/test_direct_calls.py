"""What processes say past their node: `client/direct_calls.py` over real sockets."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from hpcray.client.direct_calls import ActorLink, DirectCalls
from hpcray.protocol import ids, messages, values
from hpcray.protocol.messages import (
    CallUnsent,
    CausalHeader,
    Done,
    Run,
    SubmitCall,
    Value,
    ValuesUnsent,
)

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


def duplicate(end: socket.socket) -> socket.socket:
    return socket.socket(fileno=os.dup(end.fileno()))


def known(ends: tuple[socket.socket, socket.socket]) -> DirectCalls:
    direct = DirectCalls()
    direct.number = 4
    direct.introduce(7, duplicate(ends[0]))
    return direct


def received(end: socket.socket, decode: Any = messages.decode_to_client) -> list[Any]:
    found: list[Any] = []
    while True:
        try:
            found += decode(end.recv(1 << 20, FLAGS))
        except BlockingIOError:
            return found


# --- values ---------------------------------------------------------------------------------------


def test_values_leave_together_behind_their_outcomes(ends):
    direct = known(ends)
    outcomes = [outcome(1), outcome(2)]
    for done in outcomes:
        direct.answer(7, done, 0)
        assert done.sent_to == 7
    assert direct.waiting and received(ends[1]) == []
    outbox: list[Any] = []
    direct.send(outbox, 12)
    assert not direct.waiting and outbox == []
    assert [(v.object_id, v.value, v.sender, v.sent) for v in received(ends[1])] == [
        (done.task_id + ids.FIRST_RETURN, b"value", 4, 12) for done in outcomes]
    direct.close()


def test_the_node_hears_of_it_once_and_first(ends):
    direct = known(ends)
    direct.answer(7, outcome(1), 0)
    outbox: list[Any] = [outcome(2)]
    direct.report(outbox)
    assert len(outbox) == 1, "nothing has been sent yet"
    direct.send([], 1)
    direct.on_value(Value(b"", b"", 9, 30))
    direct.on_value(Value(b"", b"", 9, 31))
    direct.on_runs([Run(b"", b"", 0, b"", sender=2, sent=5)])
    direct.on_runs([Run(b"", b"", 0, b"", sender=9, sent=29)])  # read late
    direct.report(outbox)
    direct.report(outbox)
    assert outbox[0] == CausalHeader(True, ((9, 31), (2, 5)))
    assert [type(m) for m in outbox] == [CausalHeader, Done]
    direct.close()


def test_somebody_unknown_is_left_to_the_node():
    direct = DirectCalls()
    done = outcome(1)
    direct.answer(3, done, 0)
    assert done.sent_to == -1 and not direct.waiting


def test_a_full_channel_is_left_to_the_node(ends):
    direct = known(ends)
    for number in range(200):
        direct.answer(7, outcome(number, bytes(90_000)), 0)
    outbox: list[Any] = []
    direct.send(outbox, 1)
    [untold] = outbox
    assert type(untold) is ValuesUnsent and untold.client == 7
    assert len(ids.split_ids(untold.ids)) == 200
    assert 0 < len(received(ends[1])) < 200, "some were sent: they come twice"
    direct.close()


def test_one_that_has_ended_is_forgotten(ends):
    direct = known(ends)
    ends[1].close()
    direct.answer(7, outcome(1), 0)
    outbox: list[Any] = []
    direct.send(outbox, 1)
    assert outbox == []
    done = outcome(2)
    direct.answer(7, done, 0)
    assert done.sent_to == -1, "the next value is the node's to send"


class Struck:
    """A channel during whose first send a signal handler of the program raises."""

    def __init__(self, behind: socket.socket, error: BaseException) -> None:
        self._behind = behind
        self._error: BaseException | None = error

    def send(self, data: bytes, flags: int) -> int:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._behind.send(data, flags)

    def close(self) -> None:
        self._behind.close()


@pytest.mark.parametrize("error", [TimeoutError("late"), RuntimeError("late")])
def test_a_handler_that_raises_costs_no_value(ends, error):
    direct = known(ends)
    direct.introduce(5, Struck(duplicate(ends[0]), error))
    direct.answer(5, outcome(1), 0)
    direct.answer(7, outcome(2), 0)
    outbox: list[Any] = []
    with pytest.raises(type(error), match="late"):
        direct.send(outbox, 3)
    assert direct.waiting
    direct.send(outbox, 3)
    assert not direct.waiting and outbox == []
    assert [v.object_id[0] for v in received(ends[1])] == [1, 2]
    direct.close()


def test_a_value_says_whether_its_sender_can_know_of_others(ends):
    direct = known(ends)
    direct.introduce(8, duplicate(ends[0]))
    told: list[bool] = []

    def answer(client: int, children: int = 0) -> bool:
        direct.answer(client, outcome(1), children)
        direct.send([], 1)
        return received(ends[1])[0].sender_saw_nothing_new

    def called_by(client: int, count: int = 1) -> None:
        direct.on_runs([Run(b"", b"", 0, b"", reply_to=client)] * count)

    told.append(answer(7))  # it has not answered 7 before
    called_by(7)
    told.append(answer(7))  # saw nothing new
    called_by(8)
    called_by(7)
    told.append(answer(7))
    called_by(7)
    told.append(answer(8))
    called_by(8, 2)  # one of them may be anybody's
    told.append(answer(8))
    called_by(8)
    told.append(answer(8))  # saw nothing new
    called_by(8)
    told.append(answer(8, children=1))
    direct.on_value(Value(b"", b"", 3, 1))
    told.append(answer(8, children=1))
    direct.on_value(Value(b"", b"", 3, 1, True))
    told.append(answer(8, children=1))  # saw nothing new
    direct.heard_count += 1  # the node has told us something
    told.append(answer(8, children=1))
    assert told == [False, True, False, False, False, True, False, False, True, False]
    direct.close()


# --- calls ----------------------------------------------------------------------------------------

ACTOR = b"actor"
OK, ERROR = bytes((0,)), bytes((values.ERROR,))


class Caller:
    """A process that calls one actor and waits for each call; `decide` says which way it goes."""

    def __init__(self, end: socket.socket) -> None:
        self.direct = DirectCalls()
        self.direct.number = 4
        self.direct.introduce_actor(ACTOR, 3, duplicate(end))
        self.link: ActorLink = self.direct.actors[ACTOR]
        self.outbox: list[Any] = []
        self._count = 0

    def submit(self, args: bytes = b"", refs: bytes = b"") -> bytes:
        self._count += 1
        task_id = self._count.to_bytes(24, "little")
        self.outbox.append(SubmitCall(task_id, b"template", ACTOR, args, refs))
        self.link.called(task_id)
        return task_id

    def decide(self, task_id: bytes) -> bool:
        link = self.direct.called(self.outbox, task_id + ids.FIRST_RETURN)
        assert link is self.link
        went = self.direct.call(link, self.outbox)
        self.outbox.clear()
        if went:
            self.direct.send(self.outbox, 20)
        return went

    def ask(self, value: bytes = OK, **how: bytes) -> bool:
        """A call, waited for: whether it went past the node."""
        task_id = self.submit(**how)
        went = self.decide(task_id)
        self.link.over(task_id, value)
        return went


@pytest.fixture
def caller(ends):
    made = Caller(ends[0])
    yield made
    made.direct.close()


def test_the_second_of_two_awaited_calls_goes_past_the_node(caller, ends):
    assert [caller.ask() for _ in range(4)] == [False, True, True, True]
    runs = received(ends[1], messages.decode_to_worker)
    assert [(r.task_id[0], r.reply_to, r.sender, r.sent, r.actor_id) for r in runs] == [
        (number, 4, 4, 20, ACTOR) for number in (2, 3, 4)]


def test_a_call_behind_one_that_is_not_over_goes_through_the_node(caller):
    caller.ask()
    caller.submit()
    assert [caller.ask() for _ in range(3)] == [False, True, True]


def test_an_error_does_not_say_that_earlier_calls_were_sent(caller):
    caller.ask()
    assert [caller.ask(ERROR), caller.ask(), caller.ask()] == [True, False, True]


def test_what_is_heard_sends_the_next_call_through_the_node(caller):
    caller.ask()
    def told_by_the_node():
        caller.direct.heard_count += 1

    for hear in (told_by_the_node, lambda: caller.direct.on_runs([messages.Stop()]),
                 lambda: caller.direct.on_value(Value(b"", b"", 3, 1))):
        assert caller.ask()
        hear()
        assert not caller.ask()
    caller.direct.on_value(Value(b"", b"", 3, 1, True))  # saw nothing new
    assert caller.ask()


def test_what_is_heard_while_a_call_is_out_counts_as_well(caller):
    task_id = caller.submit()
    assert not caller.decide(task_id)
    caller.direct.heard_count += 1
    caller.link.over(task_id, OK)
    assert [caller.ask(), caller.ask()] == [False, True]


def test_refs_and_large_arguments_go_through_the_node(caller):
    caller.ask()
    assert not caller.ask(refs=bytes(28))
    assert not caller.ask(args=bytes(20_000))
    assert caller.ask()


def test_only_the_last_thing_to_be_sent_can_be_called(caller):
    task_id = caller.submit()
    assert caller.direct.called([], task_id + ids.FIRST_RETURN) is None
    assert caller.direct.called(caller.outbox, ids.return_id(task_id, 1)) is None
    caller.outbox.append(ValuesUnsent(1, b""))
    assert caller.direct.called(caller.outbox, task_id + ids.FIRST_RETURN) is None


def test_a_full_actor_is_left_to_the_node(caller, ends):
    caller.ask()
    with pytest.raises(BlockingIOError):
        while True:
            ends[0].send(bytes(90_000), FLAGS)
    task_id = caller.submit()
    assert caller.decide(task_id)
    assert caller.outbox == [CallUnsent(task_id)]


def test_an_actor_that_has_ended_is_left_to_the_node(caller, ends):
    caller.ask()
    ends[1].close()
    assert caller.ask()
    assert caller.outbox == []
    caller.direct.forget(3)
    assert not caller.direct.actors


def test_descriptors_are_closed_and_bounded(ends):
    before = set(os.listdir("/proc/self/fd"))
    direct = known(ends)
    direct.introduce(7, duplicate(ends[0]))  # anew: the old one goes
    direct.introduce(8, duplicate(ends[0]))
    for number in range(100):
        direct.introduce_actor(bytes((number,)), number, duplicate(ends[0]))
    assert len(direct.actors) == 64
    direct.introduce_actor(b"\0", 0, duplicate(ends[0]))  # it was restarted
    direct.forget(8)
    direct.forget(8)
    direct.forget(5)
    assert len(direct.actors) == 62
    direct.close()
    assert set(os.listdir("/proc/self/fd")) == before
