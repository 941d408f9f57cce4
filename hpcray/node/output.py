"""What workers print, on its way to the driver's terminal. Thin.

    worker's pipe --> its node --PeerOutput--> node 0 --> LogFolder --> Output --> driver
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from hpcray.node.actors import class_name
from hpcray.node.connections import Connections
from hpcray.node.machine import Machine
from hpcray.node.records import DRIVER
from hpcray.observe.logs import LogFolder, LogSource
from hpcray.protocol.messages import Notice, Output, PeerOutput

_READ_BYTES = 64 * 1024
_LINES_PER_MESSAGE = 64


class WorkerOutput:
    def __init__(
        self, rank: int, connections: Connections, to_node0: Callable[[Any], None]
    ) -> None:
        self._rank = rank
        self._connections = connections
        self._to_node0 = to_node0
        self._folder = LogFolder(time.monotonic())
        # When the folder wants to be asked again; None: nothing is held back.
        self.deadline_s: float | None = None

    def read(self, machine: Machine | None, number: int, stream: str, fd: int) -> bool | None:
        """Pass on one chunk; False when there is no more for now, None at the end."""
        try:
            chunk = os.read(fd, _READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            chunk = b""
        if not chunk:
            return None
        name, pid = self._describe(machine, number)
        if self._rank == 0:
            self._feed(LogSource(name, pid, 0, stream), chunk)
        else:
            self._to_node0(PeerOutput(name, pid, int(stream == "stderr"), chunk))
        return True

    def from_peer(self, rank: int, message: PeerOutput) -> None:
        stream = "stderr" if message.stream else "stdout"
        self._feed(LogSource(message.name, message.pid, rank, stream), message.chunk)

    def _feed(self, source: LogSource, chunk: bytes) -> None:
        self._show(self._folder.feed(source, chunk, time.monotonic()))

    def tick(self, now_s: float) -> None:
        if self.deadline_s is not None and now_s >= self.deadline_s:
            self._show(self._folder.tick(now_s))

    def flush(self) -> None:
        self._show(self._folder.flush())

    def notice(self, text: str) -> None:
        """A line of our own."""
        if self._rank == 0:
            self._print([text])
        else:
            self._to_node0(Notice(text))

    def _describe(self, machine: Machine | None, number: int) -> tuple[str, int]:
        worker = machine.dispatcher.workers.get(number) if machine is not None else None
        if machine is None or worker is None:
            return "worker", 0
        hosted = machine.actors.hosted.get(worker.actor_id) if worker.actor_id else None
        if hosted is not None:
            return class_name(hosted.template).split(".")[-1], worker.pid
        if worker.datagrams:
            return worker.datagrams[0][0].template.name.split(".")[-1], worker.pid
        last_id = self._connections.last_template.get(number, b"")
        last = machine.tasks.templates.get(last_id)
        return "worker" if last is None else last.name.split(".")[-1], worker.pid

    def _show(self, lines: list[str]) -> None:
        self.deadline_s = self._folder.next_deadline_s()
        self._print(lines)

    def _print(self, lines: list[str]) -> None:
        if DRIVER in self._connections.clients:
            for start in range(0, len(lines), _LINES_PER_MESSAGE):
                chosen = tuple(lines[start : start + _LINES_PER_MESSAGE])
                self._connections.send(DRIVER, [Output(chosen)])
        else:
            for line in lines:
                print(line, file=sys.stderr, flush=True)
