"""The items of generator tasks, on their way from the worker to who submitted the task. Pure.

    worker --Yield--> executor --TaskYield--> home --Yielded, StreamEnded--> consumer
    worker <-StreamRoom- executor <-TaskRoom- home <-StreamTaken, StreamDropped- consumer

Each item is an object of its own, homed with the task: return 0 is the task's outcome, item `i` is
return `i + 1`. It is held for the consumer from its arrival; the consumer takes it or, by dropping
the stream, lets go of all it has not taken. A task that runs again yields its items again: those
that came already are dropped, whichever attempt they are from.

Only a task with a window waits for its consumer, and it is told how much was taken.

Invariants, checked by `validate`:

ST-1  a stream is in `records` until its task is over and its consumer has dropped it.
ST-2  the consumer of a stream that is not dropped is a client of this node.
"""

from __future__ import annotations

from hpcray.node.directory import Directory
from hpcray.node.memory import NodeMemory
from hpcray.node.outbox import Outbox
from hpcray.node.records import ClientRecord, TaskRecord
from hpcray.node.tables import Tables
from hpcray.protocol import ids
from hpcray.protocol.messages import (
    HandedOver,
    Located,
    PeerReturn,
    Return,
    StreamDropped,
    StreamEnded,
    StreamRoom,
    StreamTaken,
    TaskRoom,
    TaskYield,
    Yield,
    Yielded,
)

# A value up to this size is told with the item: most consumers get it at once.
_TOLD_BYTES = 1024
# Nobody consumes any more: the task need not wait.
_ALL = 2**62


class StreamRecord:
    __slots__ = ("consumer", "count", "taken")

    def __init__(self, consumer: int) -> None:
        self.consumer = consumer  # client number; -1: dropped
        self.count = 0  # items that have arrived
        self.taken = 0 if consumer >= 0 else _ALL


class Streams:
    def __init__(
        self, tables: Tables, outbox: Outbox, memory: NodeMemory, directory: Directory
    ) -> None:
        self._clients = tables.clients
        self._tasks = tables.tasks
        self._outbox = outbox
        self._memory = memory
        self._directory = directory
        self._rank = tables.rank
        # Streams of tasks homed here, from their first item, end or drop.
        self.records: dict[bytes, StreamRecord] = {}

    # --- at the executor --------------------------------------------------------------------------

    def yielded(self, client: ClientRecord, message: Yield) -> None:
        """A worker of this node made an item."""
        task = self._tasks.get(message.task_id)
        returned = message.returned
        if task is None or task.worker != client.number:
            if type(returned.value) is Located:
                self._memory.used(returned.value)
                self._memory.free(returned.value)
            return
        if task.home == self._rank:
            self._arrived_here(task, message.index, returned)
            return
        directory = self._directory
        object_id = ids.return_id(task.task_id, message.index + 1)
        if type(returned.value) is Located:
            directory.keep_foreign(object_id, returned.value)
            passed = PeerReturn(b"", returned.value.nbytes, returned.contained)
        else:
            assert isinstance(returned.value, bytes)
            passed = PeerReturn(returned.value, 0, returned.contained)
        contained = returned.contained
        handover = directory.hand_over(contained, task.home) if contained else 0
        directory.holders.release(
            client.add_barrier, task.home,
            TaskYield(task.task_id, message.index, passed, handover))

    def room(self, message: TaskRoom) -> None:
        """The home says how much was taken."""
        task = self._tasks.get(message.task_id)
        if task is not None and task.worker >= 0:
            self._outbox.clients[task.worker].append(StreamRoom(task.task_id, message.taken))

    # --- items, at the home -----------------------------------------------------------------------

    def _arrived_here(self, task: TaskRecord, index: int, returned: Return) -> None:
        object_id = ids.return_id(task.task_id, index + 1)
        if self._expect(task, index):
            self._directory.resolve_return(object_id, returned)
            self._tell(task.task_id, index)
        elif type(returned.value) is Located:
            self._memory.used(returned.value)
            self._memory.free(returned.value)

    def peer_yielded(self, rank: int, message: TaskYield) -> None:
        directory = self._directory
        task = self._tasks.get(message.task_id)
        object_id = ids.return_id(message.task_id, message.index + 1)
        barrier = 0
        if task is not None and self._expect(task, message.index):
            barrier = directory.resolve_peer_return(object_id, message.returned, rank)
            self._tell(task.task_id, message.index)
        elif message.returned.nbytes:
            directory.spare_copy(object_id, rank)
        if message.handover:
            directory.holders.release(barrier, rank, HandedOver(message.handover))

    def _expect(self, task: TaskRecord, index: int) -> bool:
        """Whether this item is the next one; then it is held for the consumer, if there is one."""
        stream = self._of(task)
        if index == 0 and stream.taken:
            self._tell_room(task, stream)  # it has just begun, and knows of nothing taken
        if index != stream.count:
            return False
        stream.count += 1
        if stream.consumer >= 0:
            object_id = ids.return_id(task.task_id, index + 1)
            self._directory.created(object_id)
            self._clients[stream.consumer].held.add(object_id)
        return True

    def _tell(self, task_id: bytes, index: int) -> None:
        consumer = self.records[task_id].consumer
        if consumer < 0:
            return
        record = self._directory.records[ids.return_id(task_id, index + 1)]
        value = record.value
        if value is None or len(value) > _TOLD_BYTES:
            value = b""
        self._outbox.clients[consumer].append(Yielded(task_id, index, value))

    def _of(self, task: TaskRecord) -> StreamRecord:
        stream = self.records.get(task.task_id)
        if stream is None:
            # A number may name another process by now: one that does not know the stream drops it.
            consumer = task.client if task.client in self._clients else -1
            stream = self.records[task.task_id] = StreamRecord(consumer)
        return stream

    # --- the end, at the home ---------------------------------------------------------------------

    def failed(self, task: TaskRecord, error: bytes) -> None:
        """The error is the last item."""
        stream = self._of(task)
        index = stream.count
        if self._expect(task, index):
            self._directory.resolve_inline(ids.return_id(task.task_id, index + 1), error)
            self._tell(task.task_id, index)

    def ended(self, task: TaskRecord) -> None:
        """The task is over and no longer in the tasks' records."""
        stream = self._of(task)
        if stream.consumer < 0:
            del self.records[task.task_id]
        else:
            self._outbox.clients[stream.consumer].append(StreamEnded(task.task_id))

    # --- the consumer -----------------------------------------------------------------------------

    def taken(self, message: StreamTaken) -> None:
        stream = self.records.get(message.task_id)
        task = self._tasks.get(message.task_id)
        if stream is not None and task is not None:
            stream.taken = message.taken
            self._tell_room(task, stream)

    def dropped(self, client: ClientRecord, message: StreamDropped) -> None:
        """Nobody will take the items from `taken` on. The task goes on: it may have effects."""
        task = self._tasks.get(message.task_id)
        stream = self.records.get(message.task_id)
        if stream is None:
            if task is None:
                return
            stream = self._of(task)
        for index in range(message.taken, stream.count):
            object_id = ids.return_id(message.task_id, index + 1)
            if object_id in client.held:
                client.held.remove(object_id)
                self._directory.release(object_id)
        self._abandon(message.task_id, stream)

    def client_gone(self, number: int) -> None:
        """Its refs have lapsed already."""
        for task_id, stream in list(self.records.items()):
            if stream.consumer == number:
                self._abandon(task_id, stream)

    def _abandon(self, task_id: bytes, stream: StreamRecord) -> None:
        stream.consumer = -1
        stream.taken = _ALL
        task = self._tasks.get(task_id)
        if task is None:
            del self.records[task_id]
        else:
            self._tell_room(task, stream)

    def _tell_room(self, task: TaskRecord, stream: StreamRecord) -> None:
        if not task.template.stream_window:
            return
        if task.worker >= 0:
            self._outbox.clients[task.worker].append(StreamRoom(task.task_id, stream.taken))
        elif task.rank not in (-1, self._rank):
            self._outbox.peers[task.rank].append(TaskRoom(task.task_id, stream.taken))

    def validate(self) -> None:
        for task_id, stream in self.records.items():
            assert stream.consumer >= 0 or task_id in self._tasks, "ST-1"
            assert stream.consumer < 0 or stream.consumer in self._clients, "ST-2"
