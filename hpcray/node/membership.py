"""Which nodes a job has, which it has lost, and which node is the living home of an id. Pure.

Nothing but this reads the rank inside an id. Others ask `is_home` (or look into `served`, where it
must be quick) and `home_of`. So a node can take over the ids of one that is lost by being named
their home here, in one place.

    (unknown) --Joined--> living --PeerLost--> lost

Invariants, checked by `validate`:

ME-1  a node is living or lost, and not both; this node is living.
ME-2  every home that is named is living, and this node serves exactly the ids whose home it is.
"""

from __future__ import annotations

from collections.abc import Callable

from hpcray.node.tables import Tables
from hpcray.protocol import ids
from hpcray.protocol.messages import Joined


class Membership:
    def __init__(self, tables: Tables) -> None:
        self._rank = tables.rank
        self.living = tables.nodes
        self.lost: dict[int, str] = {}  # and why
        # Grows whenever a node joins or is lost: what was counted before may not hold any more.
        self.epoch = 0
        # The ranks inside ids (`id[ids.HOME]`) whose home is this node.
        self.served = {ids.home_tag(tables.rank)}
        self._homes = {ids.home_tag(tables.rank): tables.rank}
        # Who hears that a node is lost (rank, why), in this order.
        self.on_lost: list[Callable[[int, str], None]] = []

    def joined(self, node: Joined) -> None:
        """A node of the job, this one too."""
        self.living[node.rank] = node
        self.lost.pop(node.rank, None)
        self._homes[ids.home_tag(node.rank)] = node.rank
        self.epoch += 1

    def lose(self, rank: int, reason: str) -> None:
        """It is gone for good, and everybody hears of it. Once."""
        if rank in self.lost or rank == self._rank:
            return
        self.living.pop(rank, None)
        self.lost[rank] = reason
        self._homes.pop(ids.home_tag(rank), None)
        self.epoch += 1
        for hear in self.on_lost:
            hear(rank, reason)

    def is_home(self, object_id: bytes) -> bool:
        return object_id[ids.HOME] in self.served

    def home_of(self, object_id: bytes) -> int:
        """The rank to ask about an object, or a task. One that is lost is named as well: what is
        sent there goes nowhere."""
        home = self._homes.get(object_id[ids.HOME])
        return ids.home_of_object(object_id) if home is None else home

    def home_of_actor(self, actor_id: bytes) -> int:
        return self.home_of(ids.creation_task_id(actor_id))

    def validate(self) -> None:
        assert not set(self.living) & set(self.lost), "ME-1"
        assert self._rank not in self.lost, "ME-1"
        assert not set(self._homes.values()) & set(self.lost), "ME-2"
        assert self.served == {tag for tag, rank in self._homes.items() if rank == self._rank}, (
            "ME-2")
