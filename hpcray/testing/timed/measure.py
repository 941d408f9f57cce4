"""What things cost on this computer, for the simulator: real machines and real processes, briefly.

    machines    simulated programs, with a stopwatch around every message that a machine handles,
                every message it encodes and every end of a turn
    sockets     one process with itself, and with another one
    MPI         two ranks under mpirun (this module run as a program)
    a job       a driver, its node and two workers, in a process of its own

The machines' costs add up to less than what a real node takes: caches are warm, and nothing else
runs in between. `NodeCosts.factor` is the quotient, by a program of empty tasks that both run.

All but latencies is processor time: other programs on the computer do harm, but little.
"""

from __future__ import annotations

import json
import os
import platform
import select
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import msgspec

from hpcray.client import link
from hpcray.node import dispatch
from hpcray.node.machine import Machine
from hpcray.protocol import messages
from hpcray.testing.timed import costs as c
from hpcray.testing.timed import stopwatch
from hpcray.testing.timed.cluster import TimedCluster, no_collector
from hpcray.testing.timed.node import Node
from hpcray.testing.timed.workload import Workload
from hpcray.transport import datagrams

# Only what is simulated while costs are measured goes by these.
ROUGH = c.Costs(
    {}, c.NodeCosts(
        1.0, 1e-5, 1e-6, 2e-6, 2e-6, 3e-6, 4e-6, 4e-6, {c.OTHER: 3e-6}, {c.OTHER: 5e-7}),
    c.ClientCosts(8e-6, 3e-6, 7e-6, 4e-6, 6e-6, 5e-3), c.WireCosts(2e-5, 3e-6, 5e9))
_SLOWEST = 50  # of so many, one is left out
_FEW = 20  # of so few, the one in the middle counts
_SMALL_BYTES = 200
_LARGE_BYTES = 200 * 1024
_JOB_ROUNDS = 5
_JOB_ACTORS = 20
_TIMEOUT_S = 120.0


class MeasureError(Exception):
    """Some cost cannot be measured here."""


def quiet(samples: Iterable[float]) -> float:
    """Of what also waits for other processes: what nine of ten take longer than."""
    return statistics.quantiles(samples, n=10)[0]


def mean(samples: Iterable[float]) -> float:
    """Without the slowest; of a few the median."""
    found = sorted(samples)
    if len(found) < _FEW:
        return statistics.median(found)
    kept = found[: len(found) - len(found) // _SLOWEST]
    return sum(kept) / len(kept)


def measure(tasks: int = 3000, say: Callable[[str], None] = lambda text: None) -> c.Costs:
    """All costs. `tasks`: how long the simulated programs are, and a seventh of the job's.

    Raises:
      MeasureError: a program that is needed for it does not run here.
    """
    say("sockets")
    sockets = measure_sockets()
    say("MPI between two ranks")
    mpi = _run_mpi()
    say("a driver, a node and two workers")
    job_tasks = 7 * tasks
    job = _run_job(job_tasks)
    say("machines")
    node = measure_machines(tasks, sockets, mpi)
    client = c.ClientCosts(
        # But for datagrams, which are counted: of 48 submissions, and of 16 tasks.
        submit_s=max(job["submit_s"] - sockets["sent_s"] / link._BATCH_MESSAGES, 0.0),
        value_s=job["value_s"],
        task_s=max(job["worker_s"]
                   - (sockets["received_s"] + sockets["sent_s"]) / dispatch.BATCH_MAX, 0.0),
        datagram_received_s=sockets["received_s"], datagram_sent_s=sockets["sent_s"],
        start_s=job["start_s"])
    wire = c.WireCosts(sockets["local_s"], mpi["latency_s"], mpi["bytes_per_s"])
    measured = {
        "when": time.strftime("%Y-%m-%d"), "processor": _processor(),
        "python": platform.python_version(), "mpi": str(mpi["library"]),
        "system": f"{platform.system()} {platform.release()}"}
    found = c.Costs(measured, node, client, wire)
    modelled = TimedCluster(Workload(nodes=1, tasks=job_tasks, task_s=0.0), found)
    with no_collector():
        modelled.run()
    usage = modelled.nodes[0].usage
    rest_s = usage.busy_s - usage.counted_s
    factor = max(job["node_s"] * job_tasks - rest_s, 0.0) / usage.counted_s
    return msgspec.structs.replace(found, node=msgspec.structs.replace(node, factor=factor))


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip().replace('"', "'")
    except OSError:
        pass
    return platform.machine()


# --- machines -------------------------------------------------------------------------------------


class MeasuredNode(Node):
    """A node with a stopwatch around what its machine does."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.received_s: defaultdict[str, list[float]] = defaultdict(list)
        self.sent_s: defaultdict[str, list[float]] = defaultdict(list)
        # Of each end of a turn: how many messages it decided, and how long it took.
        self.ends_s: list[tuple[int, float]] = []
        self._end_s = 0.0

    def _handle_datagram(self, number: int, datagram: bytes) -> None:
        began_s = stopwatch.now()
        batch = messages.decode_to_node(datagram)
        self._handle_each(batch, stopwatch.since(began_s), self.machine.client_messages, number)

    def _handle_payload(self, rank: int, payload: bytes) -> list[Any]:
        began_s = stopwatch.now()
        batch = messages.decode_to_peer(payload)
        self._handle_each(batch, stopwatch.since(began_s), self.machine.peer_messages, rank)
        return batch

    def _handle_each(
        self, batch: list[Any], decoding_s: float, handle: Callable[[int, list[Any]], None],
        sender: int,
    ) -> None:
        """Messages of one kind that come together are handled together, as a real node does."""
        self._count_received(batch)
        share_s = decoding_s / len(batch)
        for kind, group in groupby(batch, type):
            some = list(group)
            began_s = stopwatch.now()
            handle(sender, some)
            each_s = stopwatch.since(began_s) / len(some) + share_s
            self.received_s[kind.__name__] += [each_s / c.weight(message) for message in some]

    def _decide(self, machine: Machine, now_s: float) -> None:
        before = self.usage.decided
        super()._decide(machine, now_s)
        self.ends_s.append((self.usage.decided - before, self._end_s))

    def _end_turn(self, machine: Machine, now_s: float) -> None:
        began_s = stopwatch.now()
        machine.end_turn(now_s)
        self._end_s = stopwatch.since(began_s)

    def _encode(self, batch: list[Any]) -> Iterable[bytes]:
        encoded = super()._encode(batch)
        began_s = stopwatch.now()
        messages.encode(batch)
        share_s = stopwatch.since(began_s) / len(batch)
        for message in batch:
            self.sent_s[type(message).__name__].append(share_s)
        return encoded


def programs(tasks: int) -> list[Workload]:
    """What is simulated for it: together they say everything that simulated programs can say."""
    return [
        Workload(nodes=1, tasks=tasks, task_s=0.0),
        Workload(nodes=8, tasks=tasks, task_s=0.0),
        Workload(nodes=8, tasks=tasks, task_s=0.005),
        Workload(nodes=8, tasks=tasks, task_s=0.0, homes=8),
        Workload(nodes=8, tasks=tasks, task_s=0.005, homes=2),
        Workload(nodes=8, tasks=tasks, task_s=0.002, homes=8, vary=1.0),
        Workload(nodes=8, tasks=tasks, task_s=0.001, actors=16),
    ]


def measure_machines(tasks: int, sockets: dict[str, float], mpi: dict[str, Any]) -> c.NodeCosts:
    received: defaultdict[str, list[float]] = defaultdict(list)
    sent: defaultdict[str, list[float]] = defaultdict(list)
    ends: list[tuple[int, float]] = []
    for work in programs(tasks):
        cluster = TimedCluster(work, ROUGH, node0=MeasuredNode)
        with no_collector():
            cluster.run()
        for node in cluster.nodes:
            assert isinstance(node, MeasuredNode)
            for kind, samples in node.received_s.items():
                received[kind] += samples
            for kind, samples in node.sent_s.items():
                sent[kind] += samples
            ends += node.ends_s
    received_s = {kind: mean(samples) for kind, samples in received.items()}
    sent_s = {kind: mean(samples) for kind, samples in sent.items()}
    received_s[c.OTHER] = statistics.mean(received_s.values())
    sent_s[c.OTHER] = statistics.mean(sent_s.values())
    idle_s = mean(seconds for count, seconds in ends if not count)
    # Of all messages together: most turns decide one, and most messages are of turns with many.
    decisive = sorted(((seconds - idle_s, count) for count, seconds in ends if count),
                      key=lambda turn: turn[0] / turn[1])
    del decisive[len(decisive) - len(decisive) // _SLOWEST :]
    per_message_s = sum(s for s, _ in decisive) / sum(count for _, count in decisive)
    return c.NodeCosts(
        factor=1.0, turn_s=idle_s + sockets["epoll_s"],
        poll_s=mpi["poll_s"], decided_s=max(per_message_s, 0.0),
        datagram_received_s=sockets["received_s"], datagram_sent_s=sockets["sent_s"],
        frame_received_s=mpi["received_s"], frame_sent_s=mpi["sent_s"],
        received_s=received_s, sent_s=sent_s)


# --- sockets --------------------------------------------------------------------------------------


def measure_sockets(rounds: int = 3000) -> dict[str, float]:
    """What a datagram costs who sends it and who receives it, and how long it takes to a process
    that sleeps; and one look by epoll."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        datagrams.enlarge_buffers(end)
    buffer = datagrams.receive_buffer()
    data = b"x" * _SMALL_BYTES
    sent, received = [], []
    for _ in range(rounds):
        began_s = stopwatch.now()
        datagrams.send(ours, data)
        sent.append(stopwatch.since(began_s))
        began_s = stopwatch.now()
        theirs.recv_into(buffer, 0, datagrams.BARE)
        received.append(stopwatch.since(began_s))
    with select.epoll() as watched:
        watched.register(theirs.fileno(), select.EPOLLIN)
        datagrams.send(ours, data)
        epolls = []
        for _ in range(rounds):
            began_s = stopwatch.now()
            watched.poll(0)
            epolls.append(stopwatch.since(began_s))
        theirs.recv_into(buffer, 0, datagrams.BARE)
    child = os.fork()
    if not child:
        try:
            ours.close()
            while datagrams.send(theirs, bytes(theirs.recv(4096)) or b"x") == datagrams.SENT:
                pass
        finally:
            os._exit(0)
    theirs.close()
    trips = []
    for _ in range(rounds):
        began_s = time.perf_counter()
        datagrams.send(ours, data)
        ours.recv_into(buffer)
        trips.append(time.perf_counter() - began_s)
    ours.close()
    os.waitpid(child, 0)
    sent_s, received_s = mean(sent), mean(received)
    return {"sent_s": sent_s, "received_s": received_s, "epoll_s": mean(epolls),
            "local_s": max(quiet(trips) / 2 - sent_s - received_s, 0.0)}


# --- MPI: this module as a program under mpirun ---------------------------------------------------


def _run_mpi() -> dict[str, Any]:
    from hpcray.exceptions import LaunchError
    from hpcray.launch.mpirun import plan_mpirun

    try:
        command, environ = plan_mpirun(
            2, [sys.executable, "-m", "hpcray.testing.timed.measure", "mpi"], os.environ)
    except LaunchError as error:
        raise MeasureError(f"what a message between nodes costs needs two ranks: {error}") from None
    return _run(command, environ)


def _run_job(tasks: int) -> dict[str, Any]:
    from hpcray.launch.identity import strip_identity

    return _run([sys.executable, "-m", "hpcray.testing.timed.measure", "job", str(tasks)],
                strip_identity(os.environ))


def _run(command: list[str], environ: dict[str, str]) -> dict[str, Any]:
    """The JSON that it prints in its last line."""
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True,
                              timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise MeasureError(f"`{' '.join(command)}` has not ended after {_TIMEOUT_S:g} s") from None
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise MeasureError(f"`{' '.join(command)}` fails with status {done.returncode}:\n"
                           f"{done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _mpi_program() -> None:
    from hpcray.transport import mpi

    transport = mpi.connect(mpi.start_mpi(_TIMEOUT_S), _TIMEOUT_S)
    found: dict[str, Any] = {"library": mpi.library()}
    small = _ping(transport, _SMALL_BYTES, 3000)
    large = _ping(transport, _LARGE_BYTES, 300)
    transport.close(_TIMEOUT_S)
    if transport.rank == 0:
        found |= {name: small[name] for name in ("sent_s", "received_s", "poll_s")}
        found["latency_s"] = max(small["one_way_s"] - small["sent_s"] - small["received_s"], 1e-7)
        found["bytes_per_s"] = (_LARGE_BYTES - _SMALL_BYTES) / max(
            large["one_way_s"] - small["one_way_s"], 1e-9)
        print(json.dumps(found), flush=True)


def _ping(transport: Any, nbytes: int, rounds: int) -> dict[str, float]:
    """Round trips of one payload between ranks 0 and 1, by the transport that nodes use."""
    from hpcray.transport.base import Received

    payload = b"x" * nbytes
    other = 1 - transport.rank
    sent: list[float] = []
    received: list[float] = []
    empty: list[float] = []
    trips: list[float] = []

    def send() -> None:
        began_s = stopwatch.now()
        transport.send(other, payload)
        transport.flush()
        sent.append(stopwatch.since(began_s))

    def receive() -> None:
        while True:
            began_s = stopwatch.now()
            events = transport.poll()
            (received if events else empty).append(stopwatch.since(began_s))
            if any(type(event) is Received for event in events):
                return
            os.sched_yield()  # the other rank may need this core

    for _ in range(rounds):
        began_s = time.perf_counter()
        if transport.rank == 0:
            send()
            receive()
        else:
            receive()
            send()
        trips.append(time.perf_counter() - began_s)
    return {"sent_s": mean(sent), "received_s": mean(received),
            "poll_s": statistics.median(empty), "one_way_s": quiet(trips) / 2}


# --- a job: this module as a program --------------------------------------------------------------


def _job_program(tasks: int) -> None:
    import psutil

    import hpcray as ray

    ray.init(num_cpus=2)

    @ray.remote
    def nothing() -> None:
        return None

    class Pinged:
        def ping(self) -> None:
            return None

    actor = ray.remote(num_cpus=0)(Pinged)
    processes = psutil.Process().children(recursive=True)
    node = next(p for p in processes if "hpcray.node" in " ".join(p.cmdline()))

    def cpu_s(of: Iterable[psutil.Process]) -> float:
        return sum(sum(p.cpu_times()[:2]) for p in of)

    ray.get([nothing.remote() for _ in range(2000)])
    workers = [p for p in node.children(recursive=True)
               if "ray::" in " ".join(p.cmdline()) or "hpcray" in " ".join(p.cmdline())]
    samples = defaultdict(list)
    for _ in range(_JOB_ROUNDS):
        before = (time.process_time(), cpu_s([node]), cpu_s(workers))
        refs = [nothing.remote() for _ in range(tasks)]
        submitted_s = time.process_time()
        ray.get(refs)
        got_s = time.process_time()
        samples["submit_s"].append((submitted_s - before[0]) / tasks)
        samples["value_s"].append((got_s - submitted_s) / tasks)
        samples["node_s"].append((cpu_s([node]) - before[1]) / tasks)
        samples["worker_s"].append((cpu_s(workers) - before[2]) / tasks)
        del refs
    began_s = time.perf_counter()
    actors = [actor.remote() for _ in range(_JOB_ACTORS)]
    ray.get([one.ping.remote() for one in actors])
    start_s = (time.perf_counter() - began_s) / _JOB_ACTORS
    found = {name: statistics.median(of) for name, of in samples.items()}
    ray.shutdown()
    print(json.dumps({**found, "start_s": start_s}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "mpi":
        _mpi_program()
    else:
        _job_program(int(sys.argv[2]))
