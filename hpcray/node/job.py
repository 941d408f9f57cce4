"""The life of a job at a node: who has come, what begins, why it ends, who waits for whom. Pure.

    JOINING  not all nodes are here, or the driver has not said what it wants
               node 0 says so --> RUNNING
               it is over, or cannot go on --> ENDING
    RUNNING  there is a machine, and clients are served
               it is over, or cannot go on --> ENDING
    ENDING   workers end, the journal is written, others are waited for
               all is ended, and the driver may come again --> PARKED
               all is ended, or node 0 says so --> LEFT
    PARKED   the job is over; the next init() of the same driver begins another
               node 0 says so --> RUNNING
               it is over, or cannot go on --> ENDING
               all is ended, or node 0 says so --> LEFT
    LEFT     the node ends
               all is ended, or node 0 says so --> LEFT

A job begins once all have Joined node 0 and the driver has said Hello: Begin, by a tree. It ends a
step at a time (`step`):

    own workers and journal ended --> rank r: Ended to node 0 --> PARKED, or until Leave --> LEFT
                                  --> node 0: all Ended --> JobEnded --> PARKED, or
                                      driver has read all --> Leave to all --> LEFT

Whoever gives no sign of life for a while at the end is left behind: limits are of no progress.

Invariants, checked by `validate`:

JL-1  a job runs in one epoch, and what was said in another is not heard in it.
JL-2  of an end that the driver did not ask for the first cause is told, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hpcray.launch.resources import share_gpus
from hpcray.node import beginning
from hpcray.node.states import Edge, State, Story, Table, move
from hpcray.node.tables import unwired
from hpcray.node.waiting import PATIENCE_S
from hpcray.protocol import ids, labels, messages, words
from hpcray.transport.patience import Patience

# A rank that gives no sign of life for so long at the end is left behind. After a failure the
# launcher is killing ranks already.
_SILENT_S = 10.0
_FAILED_SILENT_S = 2.0


class JobState(State):
    JOINING = 0, "not all nodes are here, or the driver has not said what it wants"
    RUNNING = 1, "there is a machine, and clients are served"
    ENDING = 2, "workers end, the journal is written, others are waited for"
    PARKED = 3, "the job is over; the next init() of the same driver begins another"
    LEFT = 4, "the node ends"


JOINING, RUNNING, ENDING, PARKED, LEFT = JobState

BEGUN = Edge("node 0 says so", (JOINING, PARKED), RUNNING)
ENDS = Edge("it is over, or cannot go on", (JOINING, RUNNING, PARKED), ENDING)
PARKS = Edge("all is ended, and the driver may come again", (ENDING,), PARKED)
LEAVES = Edge("all is ended, or node 0 says so", (ENDING, PARKED, LEFT), LEFT)
JOBS = Table("a job", JobState, (BEGUN, ENDS, PARKS, LEAVES))


class JobLife:
    def __init__(self, me: messages.Joined, size: int, job_key: bytes) -> None:
        self.rank = me.rank
        self.size = size
        self._me = me
        self._job_key = job_key
        self.state: JobState = JOINING
        self.story: Story = JOBS.story(JOINING)
        # What was sent in one job is not heard in the next: they have numbers.
        self.epoch = 0
        self._job_count = 0
        self.joined: dict[int, messages.Joined] = {}
        self.config: dict[str, Any] | None = None  # what the driver wants, once it has said so
        # Peers that were told to begin before us: (rank, epoch, messages).
        self._early: list[tuple[int, int, list[Any]]] = []
        # Ranks that have not joined are told of once.
        self._late_s: float | None = None
        # The end.
        self.park = False
        self._ended: set[int] = set()
        self._told_end = False
        self._stop_reason = ""
        self._patience: dict[int, Patience] = {}
        self._next_look_s = 0.0
        self.why = ""  # why it ends, if the driver did not say that it does
        self.exit_status = 0
        # Ranks that did not say within the time that they have ended: MPI_Finalize would wait.
        self.left_behind: tuple[int, ...] = ()
        # Ports: to a peer; to the driver; to the next nodes of the tree; a warning for people; the
        # last words of the job; who may have ended it; a secret of the nodes.
        self.to_peer: Callable[[int, Any], None] = unwired
        self.to_driver: Callable[[Any], None] = unwired
        self.pass_on: Callable[[messages.Begin], None] = unwired
        self.notice: Callable[[str], None] = unwired
        self.say_last: Callable[[str], None] = unwired
        self.who_ends: Callable[[], str] = unwired
        self.secret: Callable[[], bytes] = unwired
        self.control_address: Callable[[], bytes] = unwired
        # Ports: a job begins here, by these facts; messages for its machine; it ends here.
        self.begin: Callable[[bytes, dict[str, Any]], None] = unwired
        self.deliver: Callable[[int, list[Any]], None] = unwired
        self.end_here: Callable[[bool], None] = unwired

    # --- joining ----------------------------------------------------------------------------------

    def start(self, now_s: float) -> None:
        self._late_s = now_s + PATIENCE_S
        if self.rank == 0:
            self.joined[0] = self._me
            self._begin_if_complete()
        else:
            self.to_peer(0, self._me)

    def driver_wants(self, config: dict[str, Any]) -> None:
        self.config = config
        self._begin_if_complete()

    def tell_late(self, now_s: float) -> None:
        """The driver waits, and some rank has not joined: which. Once."""
        if (self.rank != 0 or self.state != JOINING or self.config is None
                or self._late_s is None or now_s <= self._late_s):
            return
        missing = [str(rank) for rank in range(self.size) if rank not in self.joined]
        if missing:
            self._late_s = math.inf
            self.notice(
                f"Warning: the job has waited for {PATIENCE_S:g} s for rank{'s'[:len(missing) > 1]}"
                f" {words.listed(missing, 8)} to join; {'they have' if missing[1:] else 'it has'} "
                "come through MPI_Init, and may be stopped or starting slowly.")

    def _begin_if_complete(self) -> None:
        """Node 0: everybody is here and the driver has said what it wants."""
        config = self.config
        if self.rank != 0 or config is None or len(self.joined) < self.size:
            return
        if self.state not in (JOINING, PARKED):
            return
        wanted = config.get("num_gpus")
        try:
            gpus = share_gpus([(n.host, n.gpus) for _, n in sorted(self.joined.items())],
                              None if wanted is None else int(wanted))
        except ValueError as error:
            # Nothing begins; the driver may try again.
            self.config = None
            self.to_driver(messages.Welcome(b"", self.rank, self.size, 0, {"refused": str(error)}))
            return
        self._job_count = max(self._job_count + 1, config.get("session", 1))
        job_id = ids.job_id(self._job_count)
        job_key = self._job_key.hex()
        nodes = [
            messages.Joined(
                n.rank, n.host, n.address, n.pid,
                tuple(sorted(_resources(
                    {**dict(n.resources), "GPU": len(gpus[n.rank]) * messages.UNIT},
                    config).items())),
                tuple(sorted({
                    **dict(n.labels), **(config.get("labels") or {}),
                    labels.NODE_ID: ids.node_id_hex(n.rank, job_key)}.items())))
            for _, n in sorted(self.joined.items())
        ]
        self._tell_capped(config)
        message = beginning.pack(job_id, {
            "job_key": job_key,
            "nodes": nodes,
            "environ": config.pop("environ", {}),
            "setup_hook": config.pop("setup_hook", None),
            "gpus": gpus,
            "modules": config.pop("modules", ()),
            "config": config,
            "control": self.control_address(),
            "secret": self.secret(),
        })
        self.epoch = self._job_count
        self.pass_on(message)
        self._begin(message)

    def _tell_capped(self, config: dict[str, Any]) -> None:
        """Which nodes have less memory than `init` wants their object stores to have."""
        wanted = config.get("object_store_memory_bytes") or 0
        less = {f"rank {n.rank} has {words.size(nbytes)}" for n in self.joined.values()
                if (nbytes := dict(n.resources)["memory"] // messages.UNIT) < wanted}
        if less:
            self.notice(
                f"Warning: object_store_memory is {words.size(wanted)}, more than the memory of a "
                f"node ({words.listed(sorted(less))}). The object store of such a node takes what "
                "its memory allows.")

    def _begin(self, message: messages.Begin) -> None:
        move(self, BEGUN)
        self.begin(message.job_id, beginning.unpack(message))
        early, self._early = self._early, []
        for rank, epoch, batch in early:
            self.on_peer(rank, epoch, batch)

    # --- what other nodes say ---------------------------------------------------------------------

    def on_peer(self, rank: int, epoch: int, batch: list[Any]) -> None:
        """Messages of a peer, in order, said in that epoch."""
        rest = []
        for message in batch:
            kind = type(message)
            if kind is messages.Joined:
                self.joined[message.rank] = message
                self._begin_if_complete()
            elif kind is messages.Begin:
                if self.state in (JOINING, PARKED):
                    self.epoch = epoch
                    self._begin(message)
                # Else node 0 has said meanwhile that all is over.
            elif kind is messages.Ending:
                if message.park and epoch > self.epoch:
                    rest.append(message)  # Begin comes by others, and later
                else:
                    self.end(park=message.park)
            elif kind is messages.Ended:
                self._ended.add(message.rank)
                if self.rank == 0 and self.state == RUNNING and epoch == self.epoch:
                    self._left(message)
            elif kind is messages.Leave:
                move(self, LEAVES)
            elif kind is messages.Notice and self.state != RUNNING:
                self.notice(message.text)
            else:
                rest.append(message)
        if not rest:
            return
        if self.state == RUNNING and epoch == self.epoch:
            self.deliver(rank, rest)  # JL-1
        elif epoch > self.epoch:
            self._early.append((rank, epoch, rest))

    def lost(self, rank: int, reason: str) -> bool:
        """A rank is gone. Whether there is a machine to hear of it, which says what follows."""
        self._ended.add(rank)
        if self.state != RUNNING:
            self.fail(f"rank {rank} is gone ({reason}) before the job had begun")
            return False
        return True

    def _left(self, message: messages.Ended) -> None:
        """It ended on its own: somebody told it to. If that was the launcher, it is telling all of
        us, and the driver is gone before we could say which of the ranks was the first."""
        self.fail(self._told_to_end(self.joined[message.rank], message.reason))

    def _told_to_end(self, node: messages.Joined, reason: str) -> str:
        who = "the node" if self.size == 1 else f"rank {node.rank}"
        return (f"{who} (pid {node.pid} on {node.host}) was told to end ({reason}), by "
                f"{self.who_ends()}")

    # --- why it ends ------------------------------------------------------------------------------

    def fail(self, why: str) -> None:
        """The job cannot go on."""
        self._tell_why(why)
        self.exit_status = 1
        self.end(park=False)

    def terminate(self, reason: str) -> None:
        """This node was told to end, by a signal."""
        self.exit_status = 143
        self._stop_reason = reason
        if self.rank == 0:
            self._tell_why(self._told_to_end(self._me, reason))
        self.end(park=False)

    def driver_gone(self, *, launched: bool) -> None:
        """It hung up. `launched`: by MPI's launcher. Without one its parent sees how it ended; else
        nobody says anything at Ctrl-C, at a time limit or at a SIGTERM: the launcher ends all ranks
        by signals."""
        if self.state != ENDING:
            self.exit_status = self.exit_status or 1  # it did not say that it ends
            if launched:
                self._tell_why("the driver has ended without shutdown(): it was killed, or ended "
                               f"by {self.who_ends()}")
        self.end(park=False)

    def _tell_why(self, why: str) -> None:
        """The job ends, and its driver did not say so. The first cause is told (JL-2), to people
        and not through the driver, which may be dying as well."""
        if self.state in (ENDING, LEFT) or self.why:
            return
        self.why = why
        self.say_last(f"the job ends: {why}")

    # --- the end ----------------------------------------------------------------------------------

    def end(self, *, park: bool) -> None:
        """Start ending: tell everybody, end the workers."""
        if self.state in (ENDING, LEFT):
            if not park:
                self.park = False
            return
        if self.state == PARKED and park:
            return  # node 0 said it twice
        move(self, ENDS)
        self.park = park
        self._told_end = False
        self._next_look_s = 0.0
        self._patience.clear()
        if self.rank == 0:
            for rank in range(1, self.size):
                self.to_peer(rank, messages.Ending(park))
        self.end_here(park)

    def step(
        self, now_s: float, *, own_end: bool, driver_reads: bool, heard: Callable[[int], Any]
    ) -> None:
        """Take the next step, if what it waits for is there.

        `own_end`: this node's workers are gone and its journal is written. `driver_reads`: the
        driver has not read all that it was told. `heard`: differs once a rank gave a sign of life.
        """
        if not own_end:
            return
        if self.rank != 0:
            self._ask_again(now_s, (0,), messages.Ended(self.rank, self._stop_reason), heard)
            if self.park and self.state == ENDING:
                move(self, PARKS)
            return
        missing = tuple(r for r in range(1, self.size) if r not in self._ended)
        if missing:
            self._ask_again(now_s, missing, messages.Ending(self.park), heard)
            return
        if not self._told_end:
            self._told_end = True
            self.to_driver(messages.JobEnded(self.why))
        if not self.park and driver_reads:
            return  # it is slow to print what it gets; its end would be seen
        self._ended.clear()
        self._early.clear()
        self.config = None
        if self.park:
            move(self, PARKS)
            return
        for rank in range(1, self.size):
            self.to_peer(rank, messages.Leave())
        move(self, LEAVES)

    def _ask_again(
        self, now_s: float, ranks: tuple[int, ...], message: Any, heard: Callable[[int], Any]
    ) -> None:
        """Say it to those we wait for: what they answer, be it an acknowledgement, is a sign of
        life. Without any, leave them behind."""
        if now_s < self._next_look_s:
            return
        limit_s = _FAILED_SILENT_S if self.exit_status else _SILENT_S
        self._next_look_s = now_s + Patience(limit_s).look_s
        silent = []
        for rank in ranks:
            patience = self._patience.setdefault(rank, Patience(limit_s))
            patience.limit_s = limit_s
            if patience.look(now_s, heard(rank)):
                silent.append(rank)
            else:
                self.to_peer(rank, message)
        if silent:
            self.left_behind = tuple(silent)
            self.to_driver(messages.JobEnded(self.why))
            move(self, LEAVES)

    def validate(self) -> None:
        assert self.state != RUNNING or self.epoch > 0, "JL-1"
        assert all(epoch > self.epoch for _, epoch, _ in self._early), "JL-1"
        assert not self.why or self.exit_status or self.rank != 0, "JL-2"


def _resources(detected: dict[str, int], config: dict[str, Any]) -> dict[str, int]:
    """What a node offers: what was found there, or what `init` says every node has."""
    result = dict(detected)
    for key, name in (("num_cpus", "CPU"), ("num_gpus", "GPU"), ("memory_bytes", "memory")):
        if config.get(key) is not None:
            result[name] = round(config[key] * messages.UNIT)
    # Of what the node has, whatever `init` says of the resource: a store that is larger than the
    # memory is ended by the kernel, and not by an error.
    memory_bytes = detected["memory"] // messages.UNIT
    store_bytes = config.get("object_store_memory_bytes") or int(memory_bytes * 0.3)
    result["object_store_memory"] = min(store_bytes, memory_bytes) * messages.UNIT
    for name, amount in (config.get("resources") or {}).items():
        result[name] = round(amount * messages.UNIT)
    return {name: amount for name, amount in result.items() if amount > 0}
