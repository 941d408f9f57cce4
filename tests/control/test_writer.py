"""The writer against a real server: written once, late rather than lost, and never blocking."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpcray.control import connection, schema
from hpcray.control import sidecar as sidecar_room
from hpcray.control.address import ControlAddress
from hpcray.control.reader import ControlReader
from hpcray.control.schema import ActorRecord, BadSeal, FunctionRecord, JobRecord, NodeRecord
from hpcray.control.sidecar import Sidecar, configuration, new_password, start_sidecar
from hpcray.control.writer import ControlWriter, ControlWriterStatistics

pytestmark = pytest.mark.skipif(sidecar_room.find_server() is None, reason="no server to start")

JOB = b"\0\0\0\7"
SECRET = b"s" * 32
NODE = NodeRecord("host0", 123, {"CPU": 4.0})


@pytest.fixture
def writer(sidecar: Sidecar) -> Iterator[ControlWriter]:
    started = ControlWriter(sidecar.address, JOB, SECRET)
    yield started
    started.close(0.0)


def next_report(writer: ControlWriter, timeout_s: float = 20.0) -> str:
    assert select.select([writer], [], [], timeout_s)[0], writer.statistics()
    lines = writer.reports()
    assert len(lines) == 1, lines
    return lines[0]


def await_state(writer: ControlWriter,
                holds: Callable[[ControlWriterStatistics], bool]) -> ControlWriterStatistics:
    """The writer has no event for "stored": the node does not need one. So look, with a bound."""
    deadline_s = time.monotonic() + 20
    while not holds(writer.statistics()):
        assert time.monotonic() < deadline_s, writer.statistics()
        time.sleep(0.002)
    return writer.statistics()


def await_lineage(writer: ControlWriter, number: int) -> None:
    await_state(writer, lambda _: writer.lineage_acknowledged >= number)


@contextmanager
def server_again(sidecar: Sidecar) -> Iterator[None]:
    """A second server at the address of one that was killed."""
    server = subprocess.Popen([sidecar.server, "-"], stdin=subprocess.PIPE,
                              stdout=subprocess.DEVNULL, cwd=sidecar.directory)
    assert server.stdin is not None
    with server.stdin as stdin:
        stdin.write(configuration(sidecar.address, sidecar.directory, 1 << 28))
    try:
        yield
    finally:
        server.kill()
        server.wait()


def write_everything(writer: ControlWriter) -> None:
    writer.write_job_started(JobRecord(1e9, "host0", 42, "train.py", "ada"))
    writer.write_node(0, NODE)
    writer.write_node(1, NodeRecord("host1", 5, {"GPU": 0.5}))
    writer.write_node(1, NodeRecord("host1", 5, {"GPU": 0.5}, "dead"))
    writer.write_function(b"f" * 16, "small", b"pickled")
    writer.write_function(b"g" * 16, "big", b"x" * (schema.FUNCTION_BLOB_LIMIT_BYTES + 1))
    writer.write_actor(b"a" * 16, ActorRecord("pending", "Counter"))
    writer.write_actor(b"a" * 16, ActorRecord("alive", "Counter", "counter", 1, 77, 2))
    writer.write_named_actor("team/one", "counter", b"a" * 16)
    writer.write_named_actor("", "gone", b"b" * 16)
    writer.remove_named_actor("", "gone")
    for rank in (0, 1):
        for number in range(10):
            writer.write_lineage(rank, b"%d-%d" % (rank, number))
    writer.write_event("node dead", 0, 1e9 + 1, {"rank": 1, "why": "test"})


def test_everything_written_is_read(sidecar: Sidecar, writer: ControlWriter) -> None:
    write_everything(writer)
    assert writer.close(10)
    with ControlReader(sidecar.address, JOB) as reader:
        assert reader.jobs() == [JOB.hex()]
        assert reader.job() == JobRecord(1e9, "host0", 42, "train.py", "ada")
        assert reader.nodes() == {0: NODE, 1: NodeRecord("host1", 5, {"GPU": 0.5}, "dead")}
        big = schema.FUNCTION_BLOB_LIMIT_BYTES + 1
        assert reader.functions()[b"g" * 16] == FunctionRecord("big", big)
        assert reader.function_blob(b"g" * 16, SECRET) is None
        assert reader.function_blob(b"f" * 16, SECRET) == b"pickled"
        assert reader.actors() == {b"a" * 16: ActorRecord("alive", "Counter", "counter", 1, 77, 2)}
        assert reader.named_actors() == {("team/one", "counter"): b"a" * 16}
        assert [(e.kind, e.facts["why"]) for e in reader.events()] == [("node dead", "test")]
        assert reader.lineage_counts() == {0: 10, 1: 10}
        assert list(reader.lineage(1, SECRET)) == [b"1-%d" % n for n in range(10)]
    assert writer.statistics().round_trips <= 5


def test_every_key_in_redis_is_in_the_table(sidecar: Sidecar, writer: ControlWriter) -> None:
    write_everything(writer)
    assert writer.close(10)
    known = {spec.key(*() if spec is schema.JOBS else (JOB,), rank=rank): spec
             for spec in schema.SCHEMA
             for rank in ((0, 1) if spec is schema.LINEAGE else (None,))}
    with connection.client(sidecar.address) as client:
        for key in client.keys("*"):
            assert client.type(key).decode() == known[key].type.value
            if known[key] is not schema.JOBS:
                assert 0 < client.ttl(key) <= schema.SILENT_JOB_KEPT_S, "it would stay for ever"


def test_a_finished_job_is_kept_for_a_while(sidecar: Sidecar, writer: ControlWriter) -> None:
    write_everything(writer)
    writer.write_job_finished("succeeded", 2e9, ranks=[0, 1])
    assert writer.close(10)
    with ControlReader(sidecar.address, JOB) as reader:
        job = reader.job()
        assert job is not None and (job.status, job.finished_at_s) == ("succeeded", 2e9)
        assert reader.lineage_counts() == {0: 0, 1: 0}
    with connection.client(sidecar.address) as client:
        for spec in (schema.JOB, schema.NODES, schema.FUNCTIONS, schema.EVENTS):
            assert 0 < client.ttl(spec.key(JOB)) <= schema.FINISHED_JOB_KEPT_S


def test_tampering_is_refused(sidecar: Sidecar, writer: ControlWriter) -> None:
    write_everything(writer)
    assert writer.close(10)
    functions, lineage = schema.FUNCTIONS.key(JOB), schema.LINEAGE.key(JOB, rank=0)
    with (connection.client(sidecar.address) as client,
          ControlReader(sidecar.address, JOB) as reader):
        client.hset(functions, b"h" * 16, client.hget(functions, b"f" * 16))
        with pytest.raises(BadSeal):
            reader.function_blob(b"h" * 16, SECRET)
        client.xadd(lineage, {"n": 1, "d": b"\x91\xc4\x04evil" + b"\0" * 16})
        got = reader.lineage(0, SECRET)
        with pytest.raises(BadSeal):
            list(got)


def test_killed_while_writing_it_reports_once_and_comes_back(sidecar: Sidecar) -> None:
    writer = ControlWriter(sidecar.address, JOB, SECRET)
    await_lineage(writer, writer.write_lineage(0, b"before"))
    stop = threading.Event()
    failures: list[BaseException] = []

    def keep_writing() -> None:
        try:
            while not stop.wait(0.001):
                writer.write_node(0, NODE)
                writer.write_actor(b"a" * 16, ActorRecord("alive", "A"))
                writer.write_lineage(0, b"x" * 100)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=keep_writing)
    thread.start()
    try:
        os.kill(sidecar.pid, signal.SIGKILL)
        report = next_report(writer)
        assert report.startswith(f"control store lost: {sidecar.address}: ")
        assert sidecar.address.password not in report
        assert not select.select([writer], [], [], 0.3)[0], "one loss, one report"
        with server_again(sidecar):
            assert next_report(writer).startswith("control store back after ")
            stop.set()
            thread.join(10)
            assert writer.close(10), writer.statistics()
            with ControlReader(sidecar.address, JOB) as reader:
                assert reader.nodes() == {0: NODE}
                assert reader.actors()[b"a" * 16].state == "alive"
                assert reader.lineage_counts()[0] > 0
    finally:
        stop.set()
        thread.join(10)
        writer.close(0)
    assert failures == [] and writer.statistics().losses == 1


def test_while_it_is_away_only_old_lineage_and_events_go(sidecar: Sidecar) -> None:
    writer = ControlWriter(sidecar.address, JOB, SECRET, buffer_limit_bytes=100_000)
    await_state(writer, lambda s: s.connected)
    os.kill(sidecar.pid, signal.SIGKILL)
    writer.write_event("notices", 0, 0.0)
    assert "lost" in next_report(writer)
    for number in range(200):
        writer.write_actor(b"%016d" % number, ActorRecord("pending", "A"))
        writer.write_actor(b"%016d" % number, ActorRecord("alive", "A"))
    facts_bytes = writer.statistics().queued_bytes
    for number in range(1000):
        last = writer.write_lineage(0, b"%0500d" % number)
        assert writer.statistics().queued_bytes <= max(100_000, facts_bytes)
    writer.write_node(0, NODE)
    with server_again(sidecar):
        report = next_report(writer)
        dropped = writer.statistics().dropped_lineage
        assert 0 < dropped < 1000 and f"{dropped} lineage batches" in report
        await_lineage(writer, last)
        assert not writer.close(10), "dropping is not storing everything"
        with ControlReader(sidecar.address, JOB) as reader:
            assert len(reader.actors()) == 200
            assert {actor.state for actor in reader.actors().values()} == {"alive"}
            kept = [int(batch) for batch in reader.lineage(0, SECRET)]
            assert kept == list(range(dropped, 1000)), "the oldest went, the rest is in order"


def test_facts_take_memory_by_thing_not_by_change(base: Path) -> None:
    nowhere = ControlAddress(unix_path=str(base / "nobody"))
    writer = ControlWriter(nowhere, JOB, SECRET)
    for _ in range(10_000):
        writer.write_node(0, NODE)
    assert writer.statistics().queued_bytes < 1000
    assert writer.reports() == [], "a store that is still starting is not a lost one"
    started_s = time.monotonic()
    assert not writer.close(0.05)
    assert time.monotonic() - started_s < 3.0


def test_a_wrong_password_is_reported_at_once(sidecar: Sidecar) -> None:
    wrong = ControlAddress(unix_path=sidecar.address.unix_path, password="guess")
    writer = ControlWriter(wrong, JOB, SECRET)
    try:
        assert "lost" in next_report(writer)
    finally:
        writer.close(0)


def test_a_stopped_server_is_a_lost_one(
    sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "ANSWER_TIMEOUT_S", 0.2)
    writer = ControlWriter(sidecar.address, JOB, SECRET)
    await_state(writer, lambda s: s.connected)
    os.kill(sidecar.pid, signal.SIGSTOP)
    try:
        writer.write_node(0, NODE)
        assert "lost" in next_report(writer)
        started_s = time.monotonic()
        assert not writer.close(0.1)
        assert time.monotonic() - started_s < 3.0
    finally:
        os.kill(sidecar.pid, signal.SIGCONT)


@contextmanager
def answer_lost_once(real: str, path: str) -> Iterator[threading.Event]:
    """A proxy at `path` that cuts the line once, after Redis acted and before it could say so.

    It arms when the event is set, and then eats the next answer.
    """
    armed, done = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()

    def serve(near: socket.socket) -> None:
        with near, socket.socket(socket.AF_UNIX) as far:
            far.connect(real)
            while not done.is_set():
                for ready in select.select([near, far], [], [], 0.05)[0]:
                    data = ready.recv(1 << 20)
                    if not data:
                        return
                    if ready is far and armed.is_set():
                        armed.clear()
                        return
                    (near if ready is far else far).sendall(data)

    def accept() -> None:
        while not done.is_set():
            if select.select([listener], [], [], 0.05)[0]:
                threads.append(threading.Thread(target=serve, args=(listener.accept()[0],)))
                threads[-1].start()

    threads.append(threading.Thread(target=accept))
    threads[0].start()
    try:
        yield armed
    finally:
        done.set()
        for thread in threads:
            thread.join(10)
        listener.close()
        os.unlink(path)


def test_an_answer_that_got_lost_stores_nothing_twice(sidecar: Sidecar, base: Path) -> None:
    """CW-2."""
    path = str(base / "proxy")
    with answer_lost_once(sidecar.address.unix_path, path) as armed:
        address = ControlAddress(unix_path=path, password=sidecar.address.password)
        writer = ControlWriter(address, JOB, SECRET)
        writer.write_node(0, NODE)
        await_lineage(writer, writer.write_lineage(0, b"first"))
        armed.set()
        writer.write_event("once", 0, 0.0)
        await_lineage(writer, writer.write_lineage(0, b"second"))
        assert not armed.is_set()
        assert writer.close(10)
        assert (writer.statistics().losses, writer.statistics().refused_commands) == (1, 0)
    with ControlReader(sidecar.address, JOB) as reader:
        assert list(reader.lineage(0, SECRET)) == [b"first", b"second"]
        assert [event.kind for event in reader.events()] == ["once"]


def test_a_full_store_gives_up_lineage_before_facts(base: Path) -> None:
    sidecar = start_sidecar(base, new_password(), maxmemory_bytes=8 << 20)
    writer = ControlWriter(sidecar.address, JOB, SECRET)
    try:
        for _ in range(60):
            await_lineage(writer, writer.write_lineage(0, os.urandom(256 << 10)))
        writer.write_node(0, NODE)
        assert writer.close(10)
        reports = writer.reports()
        assert "maxmemory" in reports[0] and "back" in reports[1]
        with ControlReader(sidecar.address, JOB) as reader:
            assert reader.nodes() == {0: NODE}
            assert 0 < reader.lineage_counts()[0] < 60
    finally:
        writer.close(0)
        sidecar.stop()


def test_lineage_stays_within_its_budget(sidecar: Sidecar) -> None:
    writer = ControlWriter(sidecar.address, JOB, SECRET, lineage_budget_bytes=1 << 20)
    writer.write_node(0, NODE)
    for number in range(64):  # one entry each, because each is awaited
        await_lineage(writer, writer.write_lineage(0, b"%d" % number + b" " * 65536))
    assert writer.close(10)
    with ControlReader(sidecar.address, JOB) as reader:
        kept = [int(batch) for batch in reader.lineage(0, SECRET)]
        # Redis trims whole blocks, so a little more than the budget may stay.
        assert 15 <= len(kept) <= 32 and kept == list(range(64 - len(kept), 64))


def test_lineage_longer_than_a_page_is_read_in_order(
    sidecar: Sidecar, writer: ControlWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpcray.control.reader.PAGE", 3)
    for number in range(10):
        await_lineage(writer, writer.write_lineage(0, b"%d" % number))
    with ControlReader(sidecar.address, JOB) as reader:
        assert [int(batch) for batch in reader.lineage(0, SECRET)] == list(range(10))


def test_200_000_appends_are_cheap(sidecar: Sidecar, writer: ControlWriter) -> None:
    """Bounds ten times what was measured (1.1 us, 17 commands): they catch a wrong order only."""
    batch = b"x" * 100
    await_state(writer, lambda s: s.connected)
    started_cpu_s = time.thread_time()
    for _ in range(200_000):
        number = writer.write_lineage(0, batch)
    cpu_s = time.thread_time() - started_cpu_s
    await_lineage(writer, number)
    statistics = writer.statistics()
    print(f"{cpu_s / 0.2:.2f} us of CPU an append, {statistics.commands} commands, "
          f"{statistics.round_trips} round trips", file=sys.stderr)
    assert statistics.dropped_lineage == 0
    assert statistics.commands < 2000
    assert cpu_s < 2.2


def test_an_idle_writer_costs_nothing(sidecar: Sidecar, writer: ControlWriter) -> None:
    await_lineage(writer, writer.write_lineage(0, b"x"))
    time.sleep(0.05)  # its last interval
    native = writer._thread.native_id

    def switches() -> int:
        text = Path(f"/proc/self/task/{native}/status").read_text()
        return sum(int(line.split()[1]) for line in text.splitlines() if "ctxt_switches" in line)

    before = switches()
    time.sleep(0.5)
    assert switches() == before, "the thread woke up with nothing to do"


def test_close_twice_and_descriptors(sidecar: Sidecar) -> None:
    first = ControlWriter(sidecar.address, JOB, SECRET)  # imports the client
    assert first.close(10)
    before = sorted(os.listdir("/proc/self/fd"))
    writer = ControlWriter(sidecar.address, JOB, SECRET)
    assert writer.close(10) and writer.close(10)
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert not writer._thread.is_alive()
