"""What workers print, on its way to the driver's terminal. Thin.

    worker's pipe --> its node --PeerOutput--> node 0 --> LogFolder --> Output --> driver
                      marks                              folds
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from hpcray.node.actor_records import class_name
from hpcray.node.connections import Connections
from hpcray.node.machine import Machine
from hpcray.node.records import DRIVER
from hpcray.observe.logs import Line, LogFolder, LogRules, LogSource
from hpcray.protocol.marks import Marks
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
        self._marks: dict[tuple[int, str], Marks] = {}
        self._addresses: list[str] = []
        # When the folder wants to be asked again; None: nothing is held back.
        self.deadline_s: float | None = None

    def begin(self, addresses: Sequence[str], rules: dict[str, Any]) -> None:
        """Of a job: the address of each rank's host, and what folds."""
        self._addresses = ["" if here == addresses[0] else here for here in addresses]
        self._folder = LogFolder(time.monotonic(), LogRules(**rules))

    def read(self, machine: Machine | None, number: int, stream: str, fd: int) -> bool | None:
        """Pass on one chunk; False when there is no more for now, None at the end."""
        try:
            chunk = os.read(fd, _READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            chunk = b""
        guess, pid = self._describe(machine, number)
        if not chunk:
            marks = self._marks.pop((number, stream), None)
            if marks is not None and (rest := marks.rest()):
                self._pass_on(guess, pid, stream, rest)
            return None
        marks = self._marks.get((number, stream))
        if marks is None:
            marks = self._marks[number, stream] = Marks()
        for name, piece in marks.split(chunk):
            self._pass_on(guess if name is None else name, pid, stream, piece)
        return True

    def forget(self, number: int) -> None:
        """Of a worker that is gone; its pipes may live on in processes that it has started."""
        for stream in ("stdout", "stderr"):
            self._marks.pop((number, stream), None)

    def from_peer(self, rank: int, message: PeerOutput) -> None:
        stream = "stderr" if message.stream else "stdout"
        address = self._addresses[rank] if rank < len(self._addresses) else ""
        self._feed(LogSource(message.name, message.pid, rank, stream, address), message.chunk)

    def _pass_on(self, name: str, pid: int, stream: str, chunk: bytes) -> None:
        if self._rank == 0:
            self._feed(LogSource(name, pid, 0, stream), chunk)
        else:
            self._to_node0(PeerOutput(name, pid, int(stream == "stderr"), chunk))

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
            self._print("", [text], error=True)
        else:
            self._to_node0(Notice(text))

    def _describe(self, machine: Machine | None, number: int) -> tuple[str, int]:
        worker = machine.dispatcher.workers.get(number) if machine is not None else None
        if machine is None or worker is None:
            return "worker", 0
        hosted = machine.tables.hosted.get(worker.actor_id) if worker.actor_id else None
        if hosted is not None:
            return class_name(hosted.template).split(".")[-1], worker.pid
        if worker.datagrams:
            return worker.datagrams[0][0].template.name.split(".")[-1], worker.pid
        last_id = self._connections.last_template.get(number, b"")
        last = machine.tasks.templates.get(last_id)
        return "worker" if last is None else last.name.split(".")[-1], worker.pid

    def _show(self, lines: list[Line]) -> None:
        self.deadline_s = self._folder.next_deadline_s()
        for source, of_source in groupby(lines, lambda line: line[0]):
            self._print(source.prefix, [text for _, text in of_source],
                        error=source.stream == "stderr")

    def _print(self, prefix: str, lines: list[str], *, error: bool) -> None:
        if DRIVER in self._connections.clients:
            for start in range(0, len(lines), _LINES_PER_MESSAGE):
                chosen = tuple(lines[start : start + _LINES_PER_MESSAGE])
                self._connections.send(DRIVER, [Output(prefix, chosen, error)])
        else:
            for line in lines:
                print(prefix + line, file=sys.stderr, flush=True)
