"""Which homes know that this node holds refs, and what must wait until they do. Pure.

A node tells an object's home when it becomes a holder (HolderAdd, acknowledged) and when it
stops (HolderDrop). Each acknowledgement says whose it is, and of which turn; a node that is lost
owes none. What lets go of a hold somewhere else must not overtake an add on its way
to a third node: it waits for the acknowledgements of the adds before it.

HO-1  a HolderDrop, and a report that ends the sender's hold on refs kept here, leaves only
      when every HolderAdd queued before it has been acknowledged.

    add(x) --> [adds of this turn] --end of turn--> HolderAdd --> outstanding --HolderAdded--> gone
    release(message) --> waits for the newest add before it --> sent
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from hpcray.node.outbox import Outbox
from hpcray.protocol.messages import HolderAdd, HolderDrop

# 2,000 ids make 56 kB: far below a datagram's or frame's limit.
_IDS_PER_MESSAGE = 2000


class Holders:
    def __init__(self, outbox: Outbox, home_of: Callable[[bytes], int]) -> None:
        self._outbox = outbox
        self._home_of = home_of
        self.adds: dict[int, list[bytes]] = {}
        self.drops: dict[int, list[bytes]] = {}
        # Barriers are turn numbers; `_turn` is the last turn that sent adds.
        self._turn = 0
        # Per rank: the turn of each HolderAdd not acknowledged, oldest first.
        self._unacked: dict[int, deque[int]] = {}
        # Turn -> acknowledgements it still lacks; in order of turns.
        self._outstanding: dict[int, int] = {}
        self._lost: set[int] = set()  # nobody there counts anything any more
        # (barrier, rank, message), in order.
        self._waiting: deque[tuple[int, int, Any]] = deque()

    def add(self, object_id: bytes) -> int:
        """Announce a hold at the end of this turn; the barrier to wait for."""
        self.adds.setdefault(self._home_of(object_id), []).append(object_id)
        return self._turn + 1

    def drop(self, object_id: bytes) -> None:
        self.drops.setdefault(self._home_of(object_id), []).append(object_id)

    @property
    def barrier(self) -> int:
        """Behind every add until now; 0: all are acknowledged."""
        if self.adds:
            return self._turn + 1
        return self._turn if self._outstanding else 0

    def release_last(self, rank: int, message: Any) -> None:
        """Of a process that is dead: whatever it held, the homes know of it first."""
        self.release(self.barrier, rank, message)

    def release(self, barrier: int, rank: int, message: Any) -> None:
        """Send `message` to `rank` once every add up to `barrier` is acknowledged."""
        if rank in self._lost:
            return
        if self._must_wait(barrier):
            self._waiting.append((barrier, rank, message))
        else:
            self._outbox.peers[rank].append(message)

    def _must_wait(self, barrier: int) -> bool:
        if barrier > self._turn:
            return True  # its adds leave at the end of this turn
        return bool(self._outstanding) and next(iter(self._outstanding)) <= barrier

    def acknowledged(self, rank: int, turn: int) -> None:
        """A HolderAdded of the adds of `turn` came from `rank`."""
        unacked = self._unacked.get(rank)
        if not unacked or unacked[0] != turn:
            return  # of a node that was given up meanwhile
        unacked.popleft()
        self._settled(turn)

    def _settled(self, turn: int) -> None:
        """One HolderAdd of this turn is acknowledged, or nobody will."""
        self._outstanding[turn] -= 1
        if not self._outstanding[turn]:
            del self._outstanding[turn]
            self._retry()

    def _retry(self) -> None:
        waiting, self._waiting = self._waiting, deque()
        for barrier, to_rank, message in waiting:
            self.release(barrier, to_rank, message)

    def node_lost(self, rank: int) -> None:
        """It will acknowledge nothing: what waits for that alone goes on."""
        self._lost.add(rank)
        self.drops.pop(rank, None)
        for turn in self._unacked.pop(rank, ()):
            self._settled(turn)

    def end_turn(self) -> None:
        """Send this turn's adds, then its drops (which wait for all adds so far)."""
        if self.adds:
            self._turn += 1
            for rank, found in self.adds.items():
                if rank in self._lost:
                    continue
                for start in range(0, len(found), _IDS_PER_MESSAGE):
                    joined = b"".join(found[start : start + _IDS_PER_MESSAGE])
                    self._outbox.peers[rank].append(HolderAdd(joined, self._turn))
                    self._unacked.setdefault(rank, deque()).append(self._turn)
                    self._outstanding[self._turn] = self._outstanding.get(self._turn, 0) + 1
            self.adds = {}
            if not self._outstanding:  # all were for nodes that are lost
                self._retry()
        if self.drops:
            drops, self.drops = self.drops, {}
            for rank, found in drops.items():
                for start in range(0, len(found), _IDS_PER_MESSAGE):
                    joined = b"".join(found[start : start + _IDS_PER_MESSAGE])
                    self.release(self._turn, rank, HolderDrop(joined))

    @property
    def idle(self) -> bool:
        return not (self.adds or self.drops or self._outstanding or self._waiting)
