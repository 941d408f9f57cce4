"""The worker's end of its task channel: what the node has it run, in the order it is to be run.

    socket --read--> queue --Worker.serve, HostedActor.serve--> run

While the queue is empty it is also here that the main thread waits.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable

import msgspec

from hpcray.client.client import Client
from hpcray.protocol import messages
from hpcray.protocol.messages import Run, Stop
from hpcray.transport import datagrams
from hpcray.transport.datagrams import ChannelClosed

# A worker without work is shown as idle after this.
_SHOWN_IDLE_MS = 1000


def _nothing() -> None:
    pass


class TaskChannel:
    def __init__(self, client: Client) -> None:
        """To be opened in the process that it is in."""
        self.queue: deque[Run | Stop] = deque()
        self.signalled = -1  # readable after a signal; see `wake_by_signals`
        self.on_idle: Callable[[], None] = _nothing  # there has been nothing to do for a second
        self._client = client
        self._link = client.link
        self._on_runs = client.on_runs
        self._buffer = datagrams.receive_buffer()
        self._poller = select.poll()

    def open(self, tasks: socket.socket) -> None:
        self.socket = tasks
        self._fd = tasks.fileno()
        self._poller.register(tasks, select.POLLIN)
        self._poller.register(self._link.socket, select.POLLIN)

    def wake_by_signals(self) -> None:
        """A signal that comes just before the main thread polls does not end the poll; this does.
        """
        self.signalled, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        self._poller.register(self.signalled, select.POLLIN)

    def take_signals(self) -> None:
        """Their handlers run by themselves, now that the main thread is awake."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.signalled, 4096)

    def read(self, wait: bool) -> int:
        """One datagram of the task channel into the queue; its size, 0 if there is none.

        While it waits it reads what the client channel brings (freed ranges, requests to give
        memory back): nobody else does in an idle worker.
        """
        if wait:
            link = self._link
            while True:
                ready = self._poller.poll(_SHOWN_IDLE_MS) or self._wait_idle()
                if ready[0][0] == self._fd or len(ready) > 1:
                    break
                if ready[0][0] == self.signalled:
                    self.take_signals()
                    continue
                if not link.read_idle() and link.lost is not None:
                    raise ChannelClosed(link.lost)
                self._client.flush()
        # The node may have taken it back in between: not a reason to block here.
        try:
            received = datagrams.receive(self.socket, self._buffer)
            if received is None:
                return 0
            data, _ = received
            batch = messages.decode_to_worker(data)
        except (datagrams.Malformed, msgspec.DecodeError) as error:
            print(f"hpcray: a worker ends: what its node sent cannot be read: {error}",
                  file=sys.stderr, flush=True)
            raise ChannelClosed(str(error)) from None
        self._on_runs(batch)
        self.queue.extend(batch)
        return len(data)

    def _wait_idle(self) -> list[tuple[int, int]]:
        self.on_idle()
        return self._poller.poll()
