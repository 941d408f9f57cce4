"""The object directory: every object this node knows, who counts on it, and where it is. Pure.

For objects whose home is this node it is the truth; for others it is what this node holds of
them: its own uses, a copy, and the duty to tell the home.

    PENDING  nobody has made it yet
               a value is made, put, or told by its home --> READY
               a copy has come here --> READY
               the last ref is gone --> FREED
    READY    its value, or where it is, is known
               a value is made, put, or told by its home --> READY
               a copy has come here --> READY
               the last ref is gone --> FREED
    FREED    no ref is left; the record stays while a view or a pull uses its memory
               the last ref is gone --> FREED

It is absent when nobody uses it any more.

Invariants, checked by `validate`:

OD-1  count == uses by local clients, tasks and containing objects (as told by them).
OD-2  a home record without holds, local or remote, is absent, or FREED with pins.
OD-3  a range of shared memory is released exactly once, when its object is freed and unpinned.
OD-4  a foreign record with holds by clients has told its home (`extra.added`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcray.node.holders import Holders
from hpcray.node.membership import Membership
from hpcray.node.memory import NodeMemory
from hpcray.node.outbox import Outbox, StartPull
from hpcray.node.records import (
    FREED,
    OBJECT_FREED,
    OBJECT_MADE,
    OBJECT_PULLED,
    PENDING,
    READY,
    UNKNOWN_OBJECT,
    WAIT_LOCAL,
    WAIT_VALUE,
    ClientRecord,
    ObjectExtra,
    ObjectRecord,
    TaskRecord,
    in_store,
    is_here,
)
from hpcray.node.states import move
from hpcray.node.tables import Tables, unwired
from hpcray.protocol import ids, values
from hpcray.protocol.messages import (
    CopyAdded,
    FreeCopies,
    Located,
    ObjectReady,
    PeerReturn,
    PullRefused,
    PullRequest,
    Ready,
    Remote,
    Return,
    Value,
    ValueAt,
    Want,
)

HOME = ids.HOME
_IDS_PER_MESSAGE = 2000
# Inline values of this size and less cost about as much as their record: not counted.
_COUNTED_BYTES = 1024


class Directory:
    def __init__(
        self, tables: Tables, outbox: Outbox, membership: Membership, memory: NodeMemory
    ) -> None:
        self._clients = tables.clients
        self._outbox = outbox
        self._memory = memory
        self._rank = tables.rank
        self.is_home = membership.is_home
        self._home_of = membership.home_of
        self._served = membership.served  # is_home without a call
        self.records = tables.objects
        self.holders: Holders = Holders(outbox, membership.home_of)
        # Bytes of inline values that are worth counting.
        self.inline_bytes = 0
        # Clients' messages of this turn, coalesced: who became ready for whom.
        self._ready: dict[tuple[int, bool], list[bytes]] = {}
        self._wants: dict[int, list[bytes]] = {}
        self._frees: dict[int, list[bytes]] = {}
        # Handovers of refs inside results: number -> joined ids held until HandedOver.
        self._handovers: dict[int, bytes] = {}
        self._handover_count = 0
        # Ports: an object that a task waits for is ready (somewhere), or has come here; it cannot
        # be brought here now, for this reason; no handle of an actor is left, by its creation
        # object.
        self.dependency_ready: Callable[[TaskRecord, ObjectRecord], None] = unwired
        self.dependency_refused: Callable[[TaskRecord, ObjectRecord, bytes], None] = unwired
        self.creation_freed: Callable[[bytes], None] = unwired

    # --- records and counts -----------------------------------------------------------------------

    def record(self, object_id: bytes) -> ObjectRecord:
        """The record, made if absent.

        An absent record of ours was freed: the caller's ref cannot be counted any more (it was
        made from raw bytes, or hpcray miscounted), so its value is that error.
        """
        record = self.records.get(object_id)
        if record is None:
            record = self.records[object_id] = ObjectRecord(object_id)
            if object_id[HOME] in self._served:
                record.story = UNKNOWN_OBJECT
                record.state = READY
                record.value = freed_value(object_id)
        return record

    def created(self, object_id: bytes) -> ObjectRecord:
        """A new object of this home, with one hold (its maker's)."""
        record = self.records.get(object_id)
        if record is None:
            record = self.records[object_id] = ObjectRecord(object_id, 1)
        else:
            record.count += 1
        return record

    def hold(self, object_id: bytes) -> ObjectRecord:
        """One more local use."""
        record = self.records.get(object_id)
        if record is None:
            record = self.record(object_id)
        record.count += 1
        return record

    def hold_all(self, joined: bytes) -> None:
        for object_id in ids.split_ids(joined):
            self.hold(object_id)

    def release(self, object_id: bytes) -> None:
        """One use less; frees, or tells the home, when it was the last."""
        record = self.records.get(object_id)
        if record is None:
            return
        record.count -= 1
        if record.count <= 0:
            self._unheld(record)

    def release_all(self, joined: bytes) -> None:
        for object_id in ids.split_ids(joined):
            self.release(object_id)

    def announce(self, record: ObjectRecord) -> int:
        """Make the home count this node as a holder; the barrier of what relies on it, or 0."""
        if record.object_id[HOME] in self._served:
            return 0
        extra = record.more()
        if extra.added:
            return self.holders.barrier  # another process's add may be on its way still
        extra.added = True
        return self.holders.add(record.object_id)

    def _unheld(self, record: ObjectRecord) -> None:
        object_id = record.object_id
        extra = record.extra
        if object_id[HOME] in self._served:
            if extra is not None and extra.holders:
                return
            self._free(record)
            return
        if extra is not None and extra.added:
            extra.added = False
            self.holders.drop(object_id)
        # The copy stays until the home says so (the home counts on it); a bare record goes.
        # A client that gave up waiting and dropped its ref still gets its answer: it may meet the
        # ref again, and would not ask twice.
        if (not in_store(record) and not record.pins and not (extra and extra.pulling)
                and not self._is_awaited(record)):
            del self.records[object_id]

    def _is_awaited(self, record: ObjectRecord) -> bool:
        waiters = record.waiters
        if waiters is None:
            return False
        clients = self._clients
        return any(code >> 2 in clients
                   for code in (waiters if type(waiters) is list else (waiters,)))

    def _free(self, record: ObjectRecord) -> None:
        """No ref is left anywhere."""
        object_id = record.object_id
        extra = record.extra
        if extra is not None:
            if extra.contained:
                contained, extra.contained = extra.contained, b""
                self.release_all(contained)
            if extra.copies:
                for rank in extra.copies:
                    if rank != self._rank:
                        self._frees.setdefault(rank, []).append(object_id)
                extra.copies = None
            if extra.wanters:  # who asked has dropped it since: there will be no other answer
                for rank in extra.wanters:
                    self._outbox.peers[rank].append(
                        ObjectReady(object_id, freed_value(object_id)))
                extra.wanters = None
        if object_id[:8] == b"\0\0\0\0\0\0\0\0" and ids.is_creation_object(object_id):
            self.creation_freed(object_id)
        if record.value is not None and len(record.value) > _COUNTED_BYTES:
            self.inline_bytes -= len(record.value)
            record.value = None
        if extra is None and not record.pins and record.location is None:
            self.records.pop(object_id, None)  # most are so
        else:
            self._let_go(record)

    def _let_go(self, record: ObjectRecord) -> None:
        """Nobody needs the copy here: it goes, once no view or pull uses it (OD-3)."""
        if record.pins or (record.extra is not None and record.extra.pulling):
            move(record, OBJECT_FREED)
            return
        if self.records.pop(record.object_id, None) is not None and record.location is not None:
            self._memory.free(record.location)
            record.location = None

    # --- becoming ready ---------------------------------------------------------------------------

    def resolve_inline(self, object_id: bytes, value: bytes, told: int = -1) -> None:
        """The common case: one small value without refs; client `told` needs no answer."""
        record = self.records.get(object_id)
        if record is None or record.state is not PENDING:
            return  # nobody waits any more, or an earlier attempt delivered
        story = record.story = record.story[OBJECT_MADE]  # move
        record.state = story.state
        record.value = value
        if len(value) > _COUNTED_BYTES:
            self.inline_bytes += len(value)
        if told >= 0:
            self._answered(record, told)
        if record.waiters is not None or record.extra is not None:
            self._announce_ready(record)

    @staticmethod
    def _answered(record: ObjectRecord, client: int) -> None:
        waiters = record.waiters
        code = client * 4 + WAIT_VALUE
        if type(waiters) is list:
            if code in waiters:
                waiters.remove(code)
        elif waiters == code:
            record.waiters = None

    def put_inline(self, object_id: bytes, value: bytes, contained: bytes) -> None:
        """A small value that a client here has put."""
        record = self.created(object_id)
        record.value = value
        move(record, OBJECT_MADE)
        if len(value) > _COUNTED_BYTES:
            self.inline_bytes += len(value)
        if contained:
            self.hold_all(contained)
            record.more().contained = contained

    def resolve_return(self, object_id: bytes, returned: Return) -> None:
        """A value made by a worker of this node, for an object homed here."""
        if type(returned.value) is Located:
            self.resolve_located(object_id, returned.value, returned.contained)
        else:
            record = self.records.get(object_id)
            if record is None or record.state is not PENDING:
                return
            if returned.contained:
                self.hold_all(returned.contained)
                record.more().contained = returned.contained
            assert isinstance(returned.value, bytes)
            self.resolve_inline(object_id, returned.value)

    def resolve_located(self, object_id: bytes, location: Located, contained: bytes = b"") -> None:
        """A value in this node's shared memory, for an object homed here."""
        self._memory.used(location)
        record = self.records.get(object_id)
        if record is None or record.state is not PENDING:
            self._memory.free(location)
            return
        record.location = location
        record.nbytes = location.nbytes
        move(record, OBJECT_MADE)
        extra = record.more()
        extra.copies = [self._rank]
        if contained:
            self.hold_all(contained)
            extra.contained = contained
        self._announce_ready(record)

    def resolve_peer_return(self, object_id: bytes, returned: PeerReturn, rank: int) -> int:
        """A value made on another rank, for an object homed here; the barrier of its inner refs."""
        record = self.records.get(object_id)
        if record is None or record.state is not PENDING:
            if returned.nbytes:
                self._frees.setdefault(rank, []).append(object_id)
            return 0
        barrier = 0
        if returned.contained:
            for inner in ids.split_ids(returned.contained):
                barrier = max(barrier, self.announce(self.hold(inner)))
            record.more().contained = returned.contained
        if not returned.nbytes:
            self.resolve_inline(object_id, returned.value)
            return barrier
        move(record, OBJECT_MADE)
        record.nbytes = returned.nbytes
        record.more().copies = [rank]
        self._announce_ready(record)
        return barrier

    def spare_copy(self, object_id: bytes, rank: int) -> None:
        """`rank` has made a copy of an object that is there already, or gone."""
        record = self.records.get(object_id)
        copies = record.extra.copies if record is not None and record.extra is not None else None
        if not copies:
            self._frees.setdefault(rank, []).append(object_id)
        elif rank not in copies:
            copies.append(rank)

    def keep_foreign(self, object_id: bytes, location: Located, *, failed: bool = False) -> None:
        """A worker here made a large value, or error, homed elsewhere: this node has the copy."""
        self._memory.used(location)
        record = self.records.get(object_id)
        if record is None:
            record = self.records[object_id] = ObjectRecord(object_id)
        if in_store(record):
            self._memory.free(location)  # an earlier attempt's copy is as good
            return
        record.location = location
        record.nbytes = location.nbytes
        move(record, OBJECT_MADE)
        if failed:
            record.more().failed = True
        if record.extra is not None or record.waiters is not None:
            self._announce_ready(record)

    def object_ready(self, object_id: bytes, value: bytes | Remote) -> None:
        """A home answers our Want."""
        record = self.records.get(object_id)
        if record is None:
            return
        extra = record.more()
        extra.wanted = False
        if type(value) is Remote:
            extra.sources = value.ranks
            extra.failed = value.failed
            record.nbytes = value.nbytes
            if record.state is PENDING:
                move(record, OBJECT_MADE)
        else:
            if record.value is not None:
                return
            assert isinstance(value, bytes)
            record.value = value
            move(record, OBJECT_MADE)
        self._announce_ready(record)
        if record.count <= 0 and not self.is_home(object_id):
            self._unheld(record)  # it was kept for those who waited

    def _announce_ready(self, record: ObjectRecord) -> None:
        waiters = record.waiters
        if waiters is not None:
            record.waiters = None
            if type(waiters) is list:
                for code in waiters:
                    self._serve(record, code)
            else:
                self._serve(record, waiters)
        extra = record.extra
        if extra is None:
            return
        if extra.wanters:
            wanters, extra.wanters = extra.wanters, None
            for rank in wanters:
                self._tell(record, rank)
        if extra.dependents:
            dependents, extra.dependents = extra.dependents, None
            for task in dependents:
                self.dependency_ready(task, record)

    # --- clients that wait ------------------------------------------------------------------------

    def get(self, client: int, joined: bytes, how: int) -> None:
        code = client * 4 + how
        records = self.records
        served = self._served
        for object_id in ids.split_ids(joined):
            record = records.get(object_id)
            if record is None:
                record = self.record(object_id)
            if record.state is PENDING:
                if record.waiters is None:
                    record.waiters = code
                else:
                    self._enqueue(record, code)
                if object_id[HOME] not in served:
                    self.want(record)
            else:
                self._serve(record, code)

    def _enqueue(self, record: ObjectRecord, code: int) -> None:
        waiters = record.waiters
        if waiters is None:
            record.waiters = code
        elif type(waiters) is list:
            waiters.append(code)
        else:
            record.waiters = [waiters, code]

    def sole_waiter(self, object_id: bytes) -> int:
        """The client that alone waits for the value of a pending object; -1: none, or others too"""
        record = self.records.get(object_id)
        if record is None:
            return -1
        waiters = record.waiters
        return waiters >> 2 if type(waiters) is int and waiters & 3 == WAIT_VALUE else -1

    def answer_unsent(self, told: list[tuple[int, bytes]]) -> None:
        """The worker that was to send these values has not, or may not have. Twice is harmless."""
        for client, object_id in told:
            record = self.records.get(object_id)
            if record is not None and client in self._clients:
                self._serve(record, client * 4 + WAIT_VALUE)

    def _serve(self, record: ObjectRecord, code: int) -> None:
        """A ready object and a client that waits for it."""
        client, how = code >> 2, code & 3
        value = record.value
        if how == WAIT_VALUE:
            if value is not None:
                self._outbox.clients[client].append(Value(record.object_id, value))
                return
            if client not in self._clients:
                return  # it died while it waited
            if record.location is not None:
                self.pin(record, client)
                failed = record.extra is not None and record.extra.failed
                self._outbox.clients[client].append(
                    ValueAt(record.object_id, record.location, failed))
                return
        elif how != WAIT_LOCAL or is_here(record):
            self._ready.setdefault((client, how == WAIT_LOCAL), []).append(record.object_id)
            return
        self._enqueue(record, code)
        self.pull(record)

    def forget_client(self, client: ClientRecord) -> None:
        """A process is gone: its refs and pins lapse."""
        for object_id, count in client.pins.items():
            self.unpin(object_id, count)
        client.pins.clear()
        for object_id in client.held:
            self.release(object_id)
        client.held.clear()
        # Its waits would be answered into the void: they are skipped by the loop.

    # --- pins -------------------------------------------------------------------------------------

    def pin(self, record: ObjectRecord, client: int) -> None:
        record.pins += 1
        pins = self._clients[client].pins
        pins[record.object_id] = pins.get(record.object_id, 0) + 1

    def client_unpinned(self, client: ClientRecord, object_id: bytes, count: int = 1) -> None:
        have = client.pins.get(object_id, 0)
        count = min(count, have)
        if count == have:
            client.pins.pop(object_id, None)
        else:
            client.pins[object_id] = have - count
        if count:
            self.unpin(object_id, count)

    def unpin(self, object_id: bytes, count: int = 1) -> None:
        record = self.records.get(object_id)
        if record is None:
            return
        record.pins -= count
        if record.pins <= 0 and record.state is FREED:
            self._let_go(record)
        elif record.pins <= 0 and record.count <= 0 and not self.is_home(object_id):
            self._unheld(record)

    # --- other nodes ------------------------------------------------------------------------------

    def want(self, record: ObjectRecord) -> None:
        """Ask the home of a foreign object to say when it is ready."""
        object_id = record.object_id
        if object_id[HOME] in self._served:
            return
        extra = record.more()
        if not extra.wanted:
            extra.wanted = True
            self._wants.setdefault(self._home_of(object_id), []).append(object_id)

    def wanted_by(self, rank: int, joined: bytes) -> None:
        for object_id in ids.split_ids(joined):
            record = self.records.get(object_id)
            if record is None:  # asked by a process that has died since, or miscounted
                self._outbox.peers[rank].append(ObjectReady(object_id, freed_value(object_id)))
            elif record.state is PENDING:
                extra = record.more()
                if extra.wanters is None:
                    extra.wanters = []
                extra.wanters.append(rank)
            else:
                self._tell(record, rank)

    def _tell(self, record: ObjectRecord, rank: int) -> None:
        value: bytes | Remote
        if record.value is not None:
            value = record.value
        else:
            extra = record.more()
            value = Remote(record.nbytes, tuple(extra.copies or ()), extra.failed)
        self._outbox.peers[rank].append(ObjectReady(record.object_id, value))

    def holder_added(self, rank: int, joined: bytes) -> None:
        for object_id in ids.split_ids(joined):
            extra = self.record(object_id).more()
            if extra.holders is None:
                extra.holders = []
            extra.holders.append(rank)

    def holder_dropped(self, rank: int, joined: bytes) -> None:
        for object_id in ids.split_ids(joined):
            record = self.records.get(object_id)
            if record is None or record.extra is None or not record.extra.holders:
                continue
            holders = record.extra.holders
            if rank in holders:
                holders.remove(rank)
            if not holders and record.count <= 0:
                self._free(record)

    def hold_for(self, object_id: bytes, rank: int) -> None:
        """Of an object homed here, whose maker lives: count `rank`, as if it had announced a hold;
        there it says `held_for_us`."""
        record = self.records.get(object_id)
        if record is None:  # freed, but its maker is at work: it is pending again
            record = self.records[object_id] = ObjectRecord(object_id)
        if rank == self._rank:
            record.count += 1
            return
        extra = record.more()
        if extra.holders is None:
            extra.holders = []
        extra.holders.append(rank)

    def held_for_us(self, object_id: bytes) -> None:
        """The home has counted us already (`hold_for`): a local use, with nothing to announce."""
        if object_id[HOME] in self._served:
            return
        extra = self.hold(object_id).more()
        if extra.added:
            self.holders.drop(object_id)  # once is enough
        else:
            extra.added = True

    def hand_over(self, joined: bytes, to_rank: int) -> int:
        """Hold refs inside a result on their way to `to_rank`; the number to be answered (0: none).

        Refs homed at the receiver need nothing: our own drop follows in the same channel.
        """
        foreign = b"".join(i for i in ids.split_ids(joined) if self._home_of(i) != to_rank)
        if not foreign:
            return 0
        self.hold_all(foreign)
        self._handover_count += 1
        self._handovers[self._handover_count] = foreign
        return self._handover_count

    def handed_over(self, number: int) -> None:
        self.release_all(self._handovers.pop(number, b""))

    # --- copies -----------------------------------------------------------------------------------

    def is_local(self, record: ObjectRecord) -> bool:
        return is_here(record)

    def pull(self, record: ObjectRecord) -> None:
        """Bring a copy here; whoever waits on the record hears of it."""
        extra = record.more()
        if extra.pulling:
            return
        sources = extra.copies if self.is_home(record.object_id) else extra.sources
        if not sources:
            self.want(record)
            return
        extra.pulling = True
        # Which copy: spread readers over them by something all of them differ in.
        source = sources[self._rank % len(sources)]
        self._outbox.actions.append(StartPull(record.object_id, source, record.nbytes))

    def pulled(self, object_id: bytes, location: Located) -> None:
        """The copy is here, in the node's own segment (accounted when it was allocated)."""
        record = self.records.get(object_id)
        if record is None:
            self._memory.free(location)
            return
        extra = record.more()
        extra.pulling = False
        record.location = location
        if record.state is FREED:
            self._let_go(record)
            return
        move(record, OBJECT_PULLED)
        if self.is_home(object_id):
            if extra.copies is None:
                extra.copies = []
            extra.copies.append(self._rank)
        else:
            self._outbox.peers[self._home_of(object_id)].append(CopyAdded(object_id))
        self._announce_ready(record)

    def pull_failed(
        self, object_id: bytes, failure: values.Failure | None, source: int = -1
    ) -> None:
        """Refused by the source (take another, or ask the home again), or no memory here."""
        record = self.records.get(object_id)
        if record is None:
            return
        extra = record.more()
        extra.pulling = False
        if record.state is FREED:
            self._let_go(record)
        elif (record.count <= 0 and not self.is_home(object_id)
                and not self._is_awaited(record)):
            self._unheld(record)  # who wanted it is gone: nobody here may ask for it any more
        elif failure is not None:
            self._refuse(record, values.pack_failure(failure))
        elif self.is_home(object_id) and extra.copies and extra.copies != [source]:
            if source in extra.copies:
                extra.copies.remove(source)
            self.pull(record)
        elif self.is_home(object_id):
            lost = values.Failure("ObjectLostError", "its copy is gone", object_id.hex())
            record.value = values.pack_failure(lost)
            self._announce_ready(record)
        else:
            extra.sources = ()
            extra.wanted = False
            self.want(record)

    def _refuse(self, record: ObjectRecord, error: bytes) -> None:
        """Tell those who wait here for a copy that there is no room for it now. The object itself
        is as it was: other nodes have it, and whoever asks next has it pulled again."""
        waiters, record.waiters = record.waiters, None
        for code in waiters if type(waiters) is list else () if waiters is None else (waiters,):
            if code & 3 == WAIT_VALUE:
                self._outbox.clients[code >> 2].append(Value(record.object_id, error))
            else:  # it is there, if not here: what a `get` meets is the error
                self._ready.setdefault(
                    (code >> 2, code & 3 == WAIT_LOCAL), []).append(record.object_id)
        extra = record.more()
        dependents, extra.dependents = extra.dependents, None
        for task in dependents or ():
            self.dependency_refused(task, record, error)

    def pull_asked(self, rank: int, message: PullRequest) -> Located | None:
        """Pin and return where to send from; None: refused."""
        record = self.records.get(message.object_id)
        if record is None or record.location is None:
            self._outbox.peers[rank].append(PullRefused(message.object_id, message.transfer))
            return None
        record.pins += 1
        return record.location

    def copy_added(self, rank: int, object_id: bytes) -> None:
        record = self.records.get(object_id)
        if record is None or record.state is FREED:
            self._frees.setdefault(rank, []).append(object_id)
            return
        extra = record.more()
        if extra.copies is None:
            extra.copies = []
        extra.copies.append(rank)

    def free_copies(self, joined: bytes) -> None:
        """The home says: nobody needs our copies any more."""
        for object_id in ids.split_ids(joined):
            record = self.records.get(object_id)
            if record is not None:
                self._let_go(record)

    # --- a node that is lost ----------------------------------------------------------------------

    def node_lost(self, rank: int, _reason: str) -> None:
        """What it held, had and asked for does not count any more."""
        self.holders.node_lost(rank)
        self._wants.pop(rank, None)
        self._frees.pop(rank, None)
        for record in list(self.records.values()):
            extra = record.extra
            if extra is None:
                continue
            for ranks in (extra.wanters, extra.copies, extra.holders):
                while ranks and rank in ranks:
                    ranks.remove(rank)
            extra.sources = tuple(source for source in extra.sources if source != rank)
            if record.count <= 0 and extra.holders == [] and self.is_home(record.object_id):
                self._unheld(record)  # it was the last to hold it

    # --- end of turn ------------------------------------------------------------------------------

    def end_turn(self) -> None:
        outbox = self._outbox
        if self._ready:
            ready, self._ready = self._ready, {}
            for (client, local), found in ready.items():
                for start in range(0, len(found), _IDS_PER_MESSAGE):
                    outbox.clients[client].append(
                        Ready(b"".join(found[start : start + _IDS_PER_MESSAGE]), local))
        if self._wants:
            wants, self._wants = self._wants, {}
            self._to_peers(wants, Want)
        if self._frees:
            frees, self._frees = self._frees, {}
            self._to_peers(frees, FreeCopies)
        if self.holders.adds or self.holders.drops:
            self.holders.end_turn()

    def _to_peers(self, table: dict[int, list[bytes]], message: Callable[[bytes], Any]) -> None:
        for rank, found in table.items():
            for start in range(0, len(found), _IDS_PER_MESSAGE):
                self._outbox.peers[rank].append(
                    message(b"".join(found[start : start + _IDS_PER_MESSAGE])))

    def validate(self) -> None:
        """Check OD-2 and what can be seen of OD-3 and OD-4. Slow: for tests."""
        for object_id, record in self.records.items():
            assert record.object_id == object_id
            assert record.pins >= 0, record
            extra = record.extra or ObjectExtra()
            if record.state is FREED:
                assert record.pins or extra.pulling, record
            elif self.is_home(object_id):
                assert record.count > 0 or extra.holders, record
            assert record.count >= 0, record


def freed_value(object_id: bytes) -> bytes:
    return values.pack_failure(values.Failure(
        "ReferenceCountingAssertionError", "it was freed when its last counted ref went away",
        object_id.hex()))
