"""What processes of one node say to each other past their node: calls, and values.

    caller --SubmitCall(worker)--> node        first: the node knows before anybody else
           --Run-----------------> worker      through the actor's own task channel, whose other
                                               end the node has given us (ActorChannel)
    worker --Done(sent_to)----------> node        again the node first
           --Value---------------> caller      through its own channel (ChannelOf)
    both   --CausalHeader-----------> node        in front of what they say next: that all this was
                                               sent, and whom they have heard: what those had said
                                               to the node before comes first

The node is on the way to every process, but need not be on the way between two of them: who waits
for one call is woken twice instead of four times. Nothing else changes: the node keeps the
records, and sends itself what could not be sent (ValuesUnsent, CallUnsent), or may not have been
when its sender died.

NB-2  a call that takes this way overtakes no other on that actor that this process could know of.

Every earlier call of its own is over. And since it submitted one through the node that is over, too
(by then all the calls known of before had been handed to the actor), it has heard nothing from
anybody who may know of others (`heard_count`). A value says if its sender cannot: if it has heard
and said nothing since it answered us last (`Value.sender_saw_nothing_new`).

    ActorLink    any --called--> [ last: that call; none_open: there was none that was not over ]
                     <---over--- [ last == b"" ]   its value has come
    may call itself: none_open, and heard_then == heard_count: nothing was heard since the last one
                     through the node left

Used with the client's lock held.
"""

from __future__ import annotations

import socket
from typing import Any, Protocol

from hpcray.protocol import ids, messages, values
from hpcray.protocol.messages import (
    CallUnsent,
    CausalHeader,
    Done,
    Run,
    Stop,
    SubmitCall,
    Value,
    ValuesUnsent,
)
from hpcray.protocol.sizes import DATAGRAM_MAX_BYTES, parts

_SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
# A larger call is the node's affair.
_CALL_BYTES = 16 * 1024
# Actors whose channel a process keeps: each is a descriptor.
_ACTORS_MAX = 64
_NOBODY = -2
# Before we have heard how our latest call on an actor ended: no call has this id.
_UNKNOWN = b"?"


class Wire(Protocol):
    """A socket, or what stands for one."""

    def send(self, data: bytes, flags: int, /) -> int: ...

    def close(self) -> None: ...


class ActorLink:
    """An actor of this node that this process may call itself."""

    __slots__ = ("channel", "none_open", "last", "heard_then", "worker")

    def __init__(self, worker: int, channel: Wire) -> None:
        self.worker = worker
        self.channel = channel
        self.last = _UNKNOWN  # the latest call, until its value has come
        self.none_open = False  # before it there was none that was not over
        self.heard_then = -1

    def called(self, task_id: bytes) -> None:
        self.none_open = not self.last
        self.last = task_id

    def over(self, task_id: bytes, value: bytes | None) -> None:
        # An error may have come without that the call was sent, and before earlier ones.
        if self.last == task_id and value is not None and value[0] < values.ERROR:
            self.last = b""


class DirectCalls:
    def __init__(self) -> None:
        self.number = -1  # ours, among the clients of the node
        self.actors: dict[bytes, ActorLink] = {}
        self._clients: dict[int, Wire] = {}
        self._values: dict[int, list[tuple[Done, bool]]] = {}
        self._call: tuple[ActorLink, SubmitCall] | None = None
        self.waiting = False  # something to be sent past the node
        # What `report` has to say: something was, and whom we have heard.
        self.sent = False
        self.heard: dict[int, int] = {}
        self.heard_count = 0  # counts what this process has heard that somebody did
        self._from_partner = 0  # of these, calls of whom it answered last
        # Whom, and what it had heard of others and how many children it had made then.
        self._answered = (_NOBODY, 0, 0)

    # --- acquaintances ----------------------------------------------------------------------------

    def introduce(self, client: int, channel: Wire) -> None:
        """A client that we may answer."""
        self._forget_client(client)
        self._clients[client] = channel

    def introduce_actor(self, actor_id: bytes, worker: int, channel: Wire) -> None:
        """An actor that we may call."""
        known = self.actors.pop(actor_id, None)
        if known is not None:
            known.channel.close()
        if len(self.actors) < _ACTORS_MAX:
            self.actors[actor_id] = ActorLink(worker, channel)
        else:
            channel.close()

    def forget(self, number: int) -> None:
        """That process has ended."""
        self._forget_client(number)
        for actor_id, link in list(self.actors.items()):
            if link.worker == number:
                link.channel.close()
                del self.actors[actor_id]

    def _forget_client(self, client: int) -> None:
        channel = self._clients.pop(client, None)
        if channel is not None:
            channel.close()

    def close(self) -> None:
        for channel in self._clients.values():
            channel.close()
        for link in self.actors.values():
            link.channel.close()
        self._clients.clear()
        self.actors.clear()

    # --- what we hear -----------------------------------------------------------------------------

    def _hear(self, number: int, sent: int) -> None:
        # Its calls and its values come by different channels: which is read first says nothing.
        if sent > self.heard.get(number, 0):
            self.heard[number] = sent

    def on_value(self, value: Value) -> None:
        """A neighbour has sent it."""
        self._hear(value.sender, value.sent)
        if not value.sender_saw_nothing_new:
            self.heard_count += 1

    def on_runs(self, batch: list[Run | Stop]) -> None:
        """One datagram of the task channel."""
        self.heard_count += 1
        first = batch[0]
        if type(first) is not Run:
            return
        if first.sender >= 0:
            self._hear(first.sender, first.sent)
        if first.reply_to == self._answered[0] and len(batch) == 1:
            self._from_partner += 1

    # --- what we send -----------------------------------------------------------------------------

    def answer(self, client: int, done: Done, children: int) -> None:
        """Send the value behind its outcome, which says so; unless that client is not known yet.

        `children`: how many tasks, calls and objects this process has made until now.
        """
        if client in self._clients:
            done.sent_to = client
            state = (client, self.heard_count - self._from_partner, children)
            self._values.setdefault(client, []).append((done, state == self._answered))
            self._answered = state
            self.waiting = True

    def called(self, outbox: list[Any], object_id: bytes) -> ActorLink | None:
        """The actor whose call is the last thing to be sent, if that call makes this object."""
        message = outbox[-1] if outbox else None
        if type(message) is SubmitCall and object_id == message.task_id + ids.FIRST_RETURN:
            return self.actors.get(message.actor_id)
        return None

    def call(self, link: ActorLink, outbox: list[Any]) -> bool:
        """Send that call, which we wait for, behind what tells the node of it; if it may go so."""
        message: SubmitCall = outbox[-1]
        if link.last != message.task_id:
            return False
        if (link.none_open and link.heard_then == self.heard_count and self._call is None
                and not message.refs and len(message.args) <= _CALL_BYTES):
            message.worker = link.worker
            self._call = (link, message)
            self.waiting = True
            return True
        link.heard_then = self.heard_count
        return False

    def report(self, outbox: list[Any]) -> None:
        """Before anything is sent to the node."""
        if self.sent or self.heard:
            outbox.insert(0, CausalHeader(self.sent, tuple(self.heard.items())))
            self.sent = False
            self.heard.clear()

    def send(self, outbox: list[Any], sent: int) -> None:
        """After what speaks of it was sent, in `sent` datagrams until now; into `outbox` what could
        not be."""
        if self._call is not None:
            (link, call), self._call = self._call, None
            datagram = messages.encode([Run(
                call.task_id, call.template_id, 0, call.args, (), call.actor_id, (), b"",
                self.number, self.number, sent)])
            try:
                link.channel.send(datagram, _SEND_FLAGS)
            except BlockingIOError:
                outbox.append(CallUnsent(call.task_id))
            except OSError as error:
                if error.errno is None:  # a signal handler's, behind the call: it was sent
                    self.sent = True
                    raise
                # its worker has ended: the node, which knows of the call, sees to it
        if self._values:
            self._send_values(outbox, sent)
        self.waiting = False
        self.sent = True

    def _send_values(self, outbox: list[Any], sent: int) -> None:
        # They stay until they are sent: a signal handler of the program may raise in the middle.
        while self._values:
            client, outcomes = next(iter(self._values.items()))
            channel = self._clients.get(client)
            if channel is None:
                del self._values[client]  # that process has ended
                continue
            batch = [
                Value(done.task_id + ids.FIRST_RETURN, done.value, self.number, sent, nothing_new)
                for done, nothing_new in outcomes]
            try:
                encoded = messages.encode(batch)
                if len(encoded) <= DATAGRAM_MAX_BYTES:
                    channel.send(encoded, _SEND_FLAGS)
                else:
                    for datagram in parts(batch, messages.encode):
                        channel.send(datagram, _SEND_FLAGS)
            except BlockingIOError:
                # Some of them may have been: a value that comes twice is no harm.
                outbox.append(ValuesUnsent(client, b"".join(value.object_id for value in batch)))
            except OSError as error:
                if error.errno is None:
                    raise  # a signal handler's
                self._forget_client(client)
            del self._values[client]
