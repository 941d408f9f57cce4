"""A real client whose node is a script: it records what it is sent and answers what it was told to.

What is tested in this folder is the face: what it refuses, and what it sends. Whether a cluster
does the right thing with that is tested end to end elsewhere.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hpcray.client import context, process
from hpcray.client.client import Client
from hpcray.protocol import ids, messages, values

JOB = ids.job_id(1)
JOB_KEY = b"k".hex() * 16


class ScriptedNode:
    """The other end of the client's socket, served by a thread until the client hangs up."""

    def __init__(self, sock: socket.socket, size: int) -> None:
        self._socket = sock
        self._size = size
        self._changed = threading.Condition()
        self.received: list[Any] = []
        self.job_key = JOB_KEY
        # Request name -> arguments -> result, or a Failure.
        self.answers: dict[str, Callable[[Any], Any]] = {"explain": lambda arguments: []}
        self.thread = threading.Thread(target=self._serve, name="scripted-node")
        self.thread.start()

    def _serve(self) -> None:
        while True:
            try:
                datagram = self._socket.recv(1 << 20)
            except OSError:
                break
            if not datagram:
                break
            for message in messages.decode_to_node(datagram):
                self._handle(message)
        self._socket.close()

    def _handle(self, message: Any) -> None:
        if isinstance(message, messages.Hello):
            self.send(messages.Welcome(JOB, 0, self._size, 1, {"job_key": JOB_KEY}))
        elif isinstance(message, messages.Request):
            result = self.answers[message.name](message.arguments)
            failed = isinstance(result, values.Failure)
            held = b""
            if message.name in ("reserve_name", "get_actor") and isinstance(result, dict):
                held = ids.creation_object_id(result["actor_id"])
            self.send(messages.Reply(message.request, None if failed else result,
                                     result if failed else None, held))
        with self._changed:
            self.received.append(message)
            self._changed.notify_all()

    def send(self, message: Any) -> None:
        self._socket.send(messages.encode([message]))

    def expect(self, kind: type, count: int = 1) -> list[Any]:
        """The messages of one kind, once there are at least `count`."""
        def found() -> list[Any]:
            return [m for m in self.received if isinstance(m, kind)]

        with self._changed:
            assert self._changed.wait_for(lambda: len(found()) >= count, timeout=10), self.received
            return found()


@pytest.fixture
def node() -> Iterator[ScriptedNode]:
    """A connected session of two nodes; this process is its driver, on rank 0."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    scripted = ScriptedNode(theirs, size=2)
    client = Client(is_driver=True)
    client.open(ours)
    client.start(timeout_s=10)
    driver = ids.driver_task_id(0, JOB)
    client.begin_task(driver, 0)
    context.set_process_context(context.TaskContext(task_id=driver, namespace="here"))
    process.set_client(client)
    try:
        yield scripted
    finally:
        process.set_client(None)
        context.set_process_context(context.TaskContext())
        client.close()
        scripted.thread.join(timeout=10)
        assert not scripted.thread.is_alive()


@pytest.fixture
def client(node: ScriptedNode) -> Client:
    return process.current_client()
