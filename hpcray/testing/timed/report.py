"""What came of a simulated run, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from hpcray.node.machine import Machine
from hpcray.protocol import messages
from hpcray.testing.timed import stopwatch
from hpcray.testing.timed.clock import Usage, World
from hpcray.testing.timed.cluster import TimedCluster
from hpcray.testing.timed.node import Node

# Who is busy for more of the makespan than this is what limits it.
SATURATED = 0.9
# A share of node 0's counted time by which its measured one may differ for other reasons.
_GROWN = 1.5


class ClockedNode(Node):
    """A node with a clock on its machine: the processor time of its code where it is simulated."""

    def _handle_datagram(self, number: int, datagram: bytes) -> None:
        began_s = stopwatch.now()
        batch = messages.decode_to_node(datagram)
        self._clocked(began_s)
        self._count_received(batch)
        began_s = stopwatch.now()
        self.machine.client_messages(number, batch)
        self._clocked(began_s)

    def _handle_payload(self, rank: int, payload: bytes) -> list[Any]:
        began_s = stopwatch.now()
        batch = messages.decode_to_peer(payload)
        self._clocked(began_s)
        self._count_received(batch)
        began_s = stopwatch.now()
        self.machine.peer_messages(rank, batch)
        self._clocked(began_s)
        return batch

    def _end_turn(self, machine: Machine, now_s: float) -> None:
        began_s = stopwatch.now()
        super()._end_turn(machine, now_s)
        self._clocked(began_s)

    def _clocked(self, began_s: float) -> None:
        self.usage.clocked_s += stopwatch.since(began_s)


class ClockGovernedNode(ClockedNode):
    """One whose time goes by that clock, and not by counting: no run is like another, but what
    costs more in a larger cluster does."""

    _before_s = 0.0

    def step(self, now_s: float) -> None:
        self._before_s = self.usage.clocked_s
        super().step(now_s)

    def _machine_part(self) -> float:
        return self.usage.clocked_s - self._before_s


class Row(NamedTuple):
    """Something that nodes did: how often in the mean and at most, and how long in the mean."""

    mean: float
    most: int
    seconds: float


class Account:
    """Several processes of a kind: what they did, in the mean, and the one that did most."""

    def __init__(self, name: str, usages: dict[int, Usage], makespan_s: float) -> None:
        """`usages`: by rank."""
        self.name = name
        self.usages = usages
        self.makespan_s = makespan_s

    @property
    def mean_busy(self) -> float:
        """As a share of the makespan."""
        return self._mean([usage.busy_s for usage in self.usages.values()]) / self.makespan_s

    @property
    def most_busy(self) -> float:
        return max(usage.busy_s for usage in self.usages.values()) / self.makespan_s

    @property
    def saturated(self) -> int:
        return sum(u.busy_s > SATURATED * self.makespan_s for u in self.usages.values())

    def _mean(self, values: Sequence[float]) -> float:
        return sum(values) / len(values)

    def rows(self, world: World) -> dict[str, Row]:
        """All that nodes did, each once: together it is what they were busy with."""
        costs = world.costs.node
        usages = self.usages.values()
        found: dict[str, Row] = {}

        def row(name: str, counts: list[int], each_s: float) -> None:
            mean = self._mean(counts)
            found[name] = Row(mean, max(counts), mean * each_s)

        turn_s = costs.turn_s + (costs.poll_s if world.size > 1 else 0.0)
        row("turns", [u.turns for u in usages], turn_s)
        row("datagrams received", [u.datagrams_received for u in usages],
            costs.datagram_received_s)
        row("datagrams sent", [u.datagrams_sent for u in usages], costs.datagram_sent_s)
        row("frames received", [u.frames_received for u in usages], costs.frame_received_s)
        row("frames sent", [u.frames_sent for u in usages], costs.frame_sent_s)
        row("messages decided", [u.decided for u in usages], costs.decided_s * costs.factor)
        for direction, prices in (("received", world.received_prices), ("sent", world.sent_prices)):
            of = [getattr(u, direction) for u in usages]
            for kind in sorted({kind for one in of for kind in one}, key=lambda k: k.__name__):
                row(f"{kind.__name__} {direction}", [one.get(kind, 0) for one in of],
                    prices[kind] * costs.factor)
        return found


class Report:
    """Of a cluster that has run."""

    def __init__(self, cluster: TimedCluster) -> None:
        self.cluster = cluster
        self.work = work = cluster.work
        self.makespan_s = makespan_s = cluster.makespan_s
        self.ideal_s = work.ideal_s()
        self.slots = work.actors or work.nodes * work.cpus
        self.cpus_busy = cluster.runs.worked_s / (self.slots * makespan_s)
        self.driver = Account("the driver", {0: cluster.driver.usage}, makespan_s)
        self.node0 = Account("node 0", {0: cluster.nodes[0].usage}, makespan_s)
        self.others = None
        if work.nodes > 1:
            self.others = Account(
                "other nodes", {n.rank: n.usage for n in cluster.nodes[1:]}, makespan_s)

    @property
    def by_clock(self) -> bool:
        return isinstance(self.cluster.nodes[0], ClockGovernedNode)

    @property
    def tasks_per_s(self) -> float:
        return self.work.tasks / self.makespan_s

    @property
    def saturated(self) -> list[str]:
        """Whoever is busy for nearly all of the makespan, in words."""
        found = [f"{account.name} ({_percent(account.most_busy)})"
                 for account in (self.driver, self.node0) if account.saturated]
        if self.others is not None and self.others.saturated:
            found.append(f"{self.others.saturated:,} of the other nodes "
                         f"(up to {_percent(self.others.most_busy)})")
        if self.cpus_busy > SATURATED:
            found.append(f"the {self._slots()} with the tasks themselves "
                         f"({_percent(self.cpus_busy)})")
        return found

    def _slots(self) -> str:
        return f"{self.slots:,} " + ("actors" if self.work.actors else "CPUs")

    def lines(self) -> Iterator[str]:
        yield from self._head()
        yield from self._table()
        yield ""
        if self.saturated:
            yield f"Saturated: {', '.join(self.saturated)}."
        else:
            yield (f"Nothing is busy for {_percent(SATURATED)} of the makespan: the rest of it "
                   "waits for messages, for the last tasks, or for workers that start.")
        yield from self._doubts()

    def _head(self) -> Iterator[str]:
        work = self.work
        what = f"{work.tasks:,} tasks of {work.task_s * 1000:g} ms"
        if work.actors:
            what = f"{work.tasks:,} calls of {work.task_s * 1000:g} ms on {work.actors:,} actors"
        who = f"submitted on {work.homes:,} nodes" if work.homes else "from one driver"
        nodes = "1 node" if work.nodes == 1 else f"{work.nodes:,} nodes"
        yield f"{nodes} with {work.cpus} CPUs, {what}, {who}; seed {work.seed}"
        yield ""
        ideal = ""
        if self.ideal_s:
            ideal = (f"   ideal {_seconds(self.ideal_s)}   "
                     f"{self.makespan_s / self.ideal_s:.2f} times that")
        yield f"makespan   {_seconds(self.makespan_s)}{ideal}"
        yield f"rate       {self.tasks_per_s:,.0f} tasks/s"
        least, most = min(self.cluster.runs.tasks_of), max(self.cluster.runs.tasks_of)
        yield f"tasks      {least:,} to {most:,} on a node"

    def _table(self) -> Iterator[str]:
        yield f"busy       {_percent(self.cpus_busy):>6}  the {self._slots()}, with tasks"
        yield f"           {_percent(self.driver.mean_busy):>6}  the driver"
        yield f"           {_percent(self.node0.mean_busy):>6}  node 0"
        if self.others is not None:
            yield (f"           {_percent(self.others.mean_busy):>6}  another node in the mean, "
                   f"and at most {_percent(self.others.most_busy)}")
        yield ""
        world = self.cluster.world
        mine = self.node0.rows(world)
        theirs = {} if self.others is None else self.others.rows(world)
        names = sorted({*mine, *theirs}, key=lambda name: -max(
            rows[name].seconds for rows in (mine, theirs) if name in rows))
        nothing = Row(0, 0, 0.0)
        if self.by_clock:
            yield "(by counting, where the makespan goes by the clock)"
        head = f"{'':26}{'node 0':>10}{'busy':>8}"
        yield head + (f"{'others: mean':>16}{'max':>10}{'busy':>8}" if theirs else "")
        for name in names:
            row = mine.get(name, nothing)
            line = f"{name:26}{row.most:>10,}{self._share(row):>8}"
            if theirs:
                row = theirs.get(name, nothing)
                line += f"{_number(row.mean):>16}{row.most:>10,}{self._share(row):>8}"
            yield line
        yield "(busy: as a share of the makespan. Of Get, Hold and Drop the objects are counted.)"

    def _share(self, row: Row) -> str:
        return f"{row.seconds / self.makespan_s * 100:.1f} %"

    def _doubts(self) -> Iterator[str]:
        """What speaks against these figures."""
        world = self.cluster.world
        if world.unknown_kinds:
            yield (f"No cost is known of {', '.join(sorted(world.unknown_kinds))}: each is counted "
                   "as a mean message. Measure again (--measure).")
        for notice in world.notices:
            yield notice
        head = self.cluster.nodes[0]
        if isinstance(head, ClockedNode):
            usage = head.usage
            counted_s = usage.counted_s + usage.turns * world.costs.node.turn_s
            yield (f"Clock: node 0's own code took {_seconds(usage.clocked_s)} on this computer "
                   f"for what is counted as {_seconds(counted_s)}.")
            if usage.clocked_s > _GROWN * counted_s and not self.by_clock:
                yield ("So this computer is slower than the one whose costs are used (--measure), "
                       "or a message costs more in a cluster of this size (--clock shows what "
                       "that means).")


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %" if share > 0.0995 or not share else f"{share * 100:.1f} %"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{seconds * 1000:.3g} ms"


def _number(mean: float) -> str:
    return f"{mean:,.0f}" if mean >= 100 or mean == int(mean) else f"{mean:,.1f}"
