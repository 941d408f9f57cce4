"""Copies of objects that this node brings here from others: room, requests, outcomes. Pure.

The directory says what to pull, and from whom; `node/transfers.py` moves the bytes and says how it
went. What that means is decided here:

    StartPull --no room in the node's segments--> one more segment, if the store grants it; else
                  StartPull again, every tick while room may come; else it has failed
              --a range was found--> PullRequest to the holder
                  --copied--> the directory has it, and the range with it
                  --the holder has no copy--> (the range is let go of) the directory asks elsewhere

Invariants, checked by `validate`:

PU-1  every pull that was begun ends once: it has arrived, or failed.
PU-2  a pull under way has a range of the node's own, and one that failed has none.
"""

from __future__ import annotations

from collections.abc import Callable

from hpcray.node.memory import NodeMemory
from hpcray.node.outbox import Outbox, StartPull
from hpcray.node.tables import Tables, unwired
from hpcray.objects.budget import SegmentGrant
from hpcray.protocol import values, words
from hpcray.protocol.messages import Located, PullEnded, PullRequest


class Pulls:
    def __init__(self, tables: Tables, outbox: Outbox, memory: NodeMemory) -> None:
        self._tables = tables
        self._outbox = outbox
        self._memory = memory
        # transfer -> (object, holder, where it goes)
        self._under_way: dict[int, tuple[bytes, int, Located]] = {}
        self._count = 0
        # Ports: the copy is here (object, where); it will not come: for a reason that would hold
        # for every copy, or (None) because this holder has none; a copy of ours was sent.
        self.arrived: Callable[[bytes, Located], None] = unwired
        self.failed: Callable[[bytes, values.Failure | None, int], None] = unwired
        self.sent: Callable[[bytes], None] = unwired

    # --- room -------------------------------------------------------------------------------------

    def no_range(self, pull: StartPull) -> SegmentGrant | None:
        """The node's own segments have no room for it: one to be created for it at once, or None
        (it will be started again, or has failed)."""
        granted = self._memory.grant_node(pull.nbytes)
        if granted is None:
            self._await_room(pull)
        return granted

    def no_segment(self, pull: StartPull, granted: SegmentGrant, reason: str) -> None:
        """It could not be created."""
        self._memory.close(granted.segment_id)
        self._await_room(pull, reason)

    def _await_room(self, pull: StartPull, short: str = "") -> None:
        """`short`: what else than memory is missing."""
        memory = self._memory
        if memory.await_room(pull, self._tables.now_s, in_any_case=bool(short)):
            return
        why = f"; {short}" if short else ""
        text = (f"an object of {words.size(pull.nbytes)} from rank {pull.rank} does not fit: "
                f"{words.size(memory.object_bytes)} of this node's object store of "
                f"{words.size(memory.budget.capacity_bytes)} are in use ({memory.contents()}){why}")
        self.failed(pull.object_id, values.Failure("ObjectStoreFullError", text), -1)

    # --- under way --------------------------------------------------------------------------------

    def next_transfer(self) -> int:
        """A number for the pull that is about to begin: its receives are posted under it first."""
        self._count += 1
        return self._count

    def begun(self, pull: StartPull, transfer: int, location: Located, *, mapped: bool) -> None:
        """A range is kept for it, and its receives are posted (unless `mapped`): ask the holder."""
        self._memory.has_room(pull)
        self._memory.used(location)
        self._under_way[transfer] = (pull.object_id, pull.rank, location)
        self._outbox.peers[pull.rank].append(PullRequest(pull.object_id, transfer, mapped))

    def not_mapped(self, transfer: int) -> None:
        """The holder's memory cannot be looked into: the same over MPI, receives are posted."""
        object_id, rank, _ = self._under_way[transfer]
        self._outbox.peers[rank].append(PullRequest(object_id, transfer))
        self._outbox.peers[rank].append(PullEnded(object_id))

    def copied(self, transfer: int, *, mapped: bool = False) -> None:
        object_id, rank, location = self._under_way.pop(transfer)
        if mapped:
            self._outbox.peers[rank].append(PullEnded(object_id))
        self.arrived(object_id, location)

    def cancelled(self, transfer: int) -> None:
        """The holder has no copy (any more), and nothing will be written into the range."""
        object_id, rank, location = self._under_way.pop(transfer)
        self._memory.free(location)
        self.failed(object_id, None, rank)

    @property
    def active(self) -> bool:
        return bool(self._under_way)

    def validate(self) -> None:
        for _, _, location in self._under_way.values():
            assert location.segment in self._memory.node_segments, "PU-2"
