"""The worker pool with a real zygote and real workers."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcray.node.pool import (
    PoolEvent,
    WorkerHandle,
    WorkerPool,
    ZygoteGoneError,
    ZygoteLost,
)
from hpcray.protocol.sizes import DATAGRAM_MAX_BYTES
from hpcray.transport.datagrams import FULL, SENT
from hpcray.worker.zygote_messages import Exited, Forked, ForkRefused, Preloaded, Ready

TARGETS = str(Path(__file__).parent.parent / "worker")
LIMIT_S = 30


def descriptors() -> dict[str, str]:
    links = {}
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        if os.path.lexists(path):  # The listing's own is closed again.
            links[name] = os.readlink(path)
    return links


def wait_readable(fd: Any, limit_s: float = LIMIT_S) -> None:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    assert poller.poll(limit_s * 1000), "nothing came"


def wait_gone(pid: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        wait_readable(pidfd)
    finally:
        os.close(pidfd)


def hear(handle: WorkerHandle) -> Any:
    wait_readable(handle.client_socket)
    return msgspec.msgpack.decode(handle.client_socket.recv(1 << 18))


class Driver:
    """Plays the node's loop: polls, collects events."""

    def __init__(self, pool: WorkerPool) -> None:
        self.pool = pool
        self.events: list[PoolEvent] = []

    def until(self, enough: Callable[[list[PoolEvent]], bool]) -> None:
        deadline_s = time.monotonic() + LIMIT_S
        while not enough(self.events):
            assert time.monotonic() < deadline_s, self.events[-5:]
            if self.pool.fileno() >= 0:
                poller = select.poll()
                writing = select.POLLOUT if self.pool.wants_write else 0
                poller.register(self.pool, select.POLLIN | writing)
                poller.poll(1000)
            self.events += self.pool.read_zygote()

    def wait_for(self, kind: type, number: int | None = None) -> Any:
        def matching(events: list[PoolEvent]) -> list[PoolEvent]:
            return [
                event
                for event in events
                if isinstance(event, kind) and number in (None, getattr(event, "number", None))
            ]

        self.until(lambda events: bool(matching(events)))
        return matching(self.events)[0]

    def count(self, kind: type) -> int:
        return sum(isinstance(event, kind) for event in self.events)


@pytest.fixture
def driver() -> Iterator[Driver]:
    before = descriptors()
    pool = WorkerPool(os.environ, target="zygote_targets:prepare", sys_path=[TARGETS, *sys.path])
    zygote_pid = pool.zygote_pid
    yield Driver(pool)
    pool.close(4)
    pool.close(4)
    assert descriptors() == before
    wait_gone(zygote_pid)


def test_tasks_reach_a_worker_and_answers_return(driver: Driver) -> None:
    handle = driver.pool.start(1, {"do": "echo"})
    assert driver.pool.send_task(1, b"before the fork") == SENT
    assert hear(handle) == "up"
    assert hear(handle) == b"before the fork"
    assert driver.pool.send_task(1, b"exit") == SENT
    exited = driver.wait_for(Exited)
    assert (exited.number, exited.exit_code) == (1, 0)
    assert driver.wait_for(Forked).pid == exited.pid == handle.pid
    driver.pool.forget(1)
    with pytest.raises(KeyError):
        driver.pool.forget(1)


def test_a_full_channel_says_so_and_everything_can_be_taken_back(driver: Driver) -> None:
    driver.pool.start(1, {"do": "stubborn"})
    sent = 0
    while (outcome := driver.pool.send_task(1, b"%06d" % sent + bytes(2000))) == SENT:
        sent += 1
    assert outcome == FULL
    assert sent > 10
    taken = driver.pool.take_back(1)
    assert [int(datagram[:6]) for datagram in taken] == list(range(sent))
    assert driver.pool.take_back(1) == []
    assert driver.pool.send_task(1, b"again") == SENT
    with pytest.raises(ValueError, match="empty"):
        driver.pool.send_task(1, b"")


@given(lengths=st.lists(
    st.sampled_from([1, 1000, *(DATAGRAM_MAX_BYTES + n for n in (-1, 0, 1)), 3_000_000]),
    max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None,
          max_examples=20)
def test_datagrams_of_any_size_are_taken_back_whole(driver: Driver, lengths: list[int]) -> None:
    if 1 not in driver.pool.numbers():
        driver.pool.start(1, {"do": "stubborn"})
    before = descriptors()
    sent = [bytes([65 + index]) * length for index, length in enumerate(lengths)]
    taken = []
    for datagram in sent:
        while driver.pool.send_task(1, datagram) == FULL:
            taken += driver.pool.take_back(1)
    assert taken + driver.pool.take_back(1) == sent
    assert descriptors() == before


def test_each_datagram_is_received_exactly_once_by_worker_or_node(driver: Driver) -> None:
    handle = driver.pool.start(1, {"do": "race"})
    taken: list[int] = []
    total = 60_000
    for number in range(total):
        while driver.pool.send_task(1, b"%d" % number) == FULL:
            taken += map(int, driver.pool.take_back(1))
        if number % 37 == 0:
            taken += map(int, driver.pool.take_back(1))
    while driver.pool.send_task(1, b"exit") == FULL:
        taken += map(int, driver.pool.take_back(1))
    packed = bytearray()
    while len(packed) < 8 or len(packed) < 8 + int.from_bytes(packed[:8], "little"):
        wait_readable(handle.stdout_fd)
        packed += os.read(handle.stdout_fd, 1 << 16)
    read_by_worker = msgspec.msgpack.decode(packed[8:], type=list[int])
    assert taken == sorted(taken), "the order is kept"
    assert read_by_worker == sorted(read_by_worker)
    assert sorted(taken + read_by_worker) == list(range(total))
    assert taken, "the node had no chance to race"
    assert read_by_worker, "the worker had no chance to race"


def test_datagrams_of_a_dead_worker_are_the_nodes(driver: Driver) -> None:
    handle = driver.pool.start(1, {"do": "stubborn"})
    assert hear(handle) == "up"
    driver.pool.send_task(1, b"one")
    driver.pool.kill(1)
    assert driver.wait_for(Exited).exit_code == -signal.SIGKILL
    driver.pool.send_task(1, b"two")
    assert driver.pool.take_back(1) == [b"one", b"two"]
    assert handle.client_socket.recv(100) == b"", "its client channel has ended"
    driver.pool.forget(1)


def test_two_hundred_rapid_forks_with_large_settings(driver: Driver) -> None:
    count = 200
    for number in range(count):  # 20 KB each: far more than the zygote's socket takes at once
        driver.pool.start(number, {"do": "leave", "code": number % 256, "extra": "x" * 20_000})
    assert driver.pool.wants_write
    driver.until(lambda _: driver.count(Exited) == count)
    assert driver.count(Forked) == count
    codes = {e.number: e.exit_code for e in driver.events if isinstance(e, Exited)}
    assert codes == {number: number % 256 for number in range(count)}
    for number in range(count):
        driver.pool.forget(number)
    assert driver.pool.numbers() == []


def test_settings_too_large_for_a_datagram_arrive(driver: Driver) -> None:
    handle = driver.pool.start(1, {"do": "describe", "extra": "x" * 3_000_000})
    answer = hear(handle)
    assert answer["extra"] == 3_000_000
    assert len(answer["descriptors"]) == 5


def test_kill_before_the_fork_takes_effect(driver: Driver) -> None:
    driver.pool.start(1, {"do": "stubborn"})
    driver.pool.kill(1)
    assert driver.wait_for(Exited).exit_code == -signal.SIGKILL
    driver.pool.forget(1)


def test_forget_ends_what_a_dead_worker_has_started(driver: Driver) -> None:
    handle = driver.pool.start(1, {"do": "family"})
    pid, near, far = hear(handle)
    driver.wait_for(Forked)
    os.kill(pid, signal.SIGKILL)  # The worker alone: its children live on.
    driver.wait_for(Exited)
    with pytest.raises(RuntimeError, match="alive"):
        driver.pool.start(2, {"do": "echo"})
        driver.pool.forget(2)
    driver.pool.forget(1)
    wait_gone(near)
    wait_gone(far)
    wait_gone(pid)


def test_output_arrives_on_the_pipes(driver: Driver) -> None:
    handle = driver.pool.start(1, {"do": "chatter"})
    assert hear(handle) == "said"
    wait_readable(handle.stdout_fd)
    assert os.read(handle.stdout_fd, 100).startswith(b"first line\n")
    assert os.read(handle.stderr_fd, 100) == b"to stderr\n"
    with pytest.raises(BlockingIOError):
        os.read(handle.stderr_fd, 100)


def test_close_does_not_wait_for_blocked_or_stubborn_workers(driver: Driver) -> None:
    flood = driver.pool.start(1, {"do": "flood"})
    stubborn = driver.pool.start(2, {"do": "stubborn"})
    family = driver.pool.start(3, {"do": "family"})
    wait_readable(flood.stdout_fd)
    assert hear(stubborn) == "up"
    pids = hear(family)
    started_s = time.monotonic()
    driver.pool.close(1.0)
    assert time.monotonic() - started_s < 5
    for pid in (*pids, flood.pid, stubborn.pid):
        if pid:
            wait_gone(pid)


def test_stopped_zygote_cannot_hold_up_the_end(driver: Driver) -> None:
    handle = driver.pool.start(1, {"do": "stubborn"})
    assert hear(handle) == "up"
    driver.wait_for(Forked)
    os.kill(driver.pool.zygote_pid, signal.SIGSTOP)
    driver.pool.close(0.2)
    wait_gone(handle.pid)


def test_dead_zygote_takes_its_workers_and_a_new_one_serves(driver: Driver) -> None:
    old = driver.pool.zygote_pid
    family = driver.pool.start(1, {"do": "family"})
    pids = hear(family)[:2]
    driver.wait_for(Forked)
    os.kill(old, signal.SIGSTOP)
    driver.pool.start(2, {"do": "echo"})  # Never read by the old zygote.
    os.kill(old, signal.SIGKILL)
    lost = driver.wait_for(ZygoteLost)
    assert lost == ZygoteLost((1, 2), -signal.SIGKILL)
    for pid in pids:
        wait_gone(pid)
    with pytest.raises(ZygoteGoneError, match="restart_zygote"):
        driver.pool.start(3, {"do": "echo"})
    driver.pool.send_task(2, b"unread")
    assert driver.pool.take_back(2) == [b"unread"]
    driver.pool.forget(1)
    driver.pool.restart_zygote()
    driver.pool.forget(2)
    handle = driver.pool.start(1, {"do": "echo"})
    assert hear(handle) == "up"
    with pytest.raises(RuntimeError, match="alive"):
        driver.pool.restart_zygote()


def test_dead_zygote_takes_what_is_being_forked(driver: Driver) -> None:
    """One look through /proc misses what is forked while it goes on."""
    for number in range(1, 6):
        assert hear(driver.pool.start(number, {"do": "breeder"})) == "up"
        driver.wait_for(Forked, number)
        os.kill(driver.pool.zygote_pid, signal.SIGKILL)
        driver.wait_for(ZygoteLost)
        driver.events.clear()
        driver.pool.forget(number)
        driver.pool.restart_zygote()
    # The look for what a test leaves behind does the rest.


def look(driver: Driver, number: int, *names: str) -> list[str]:
    """Which of these modules a new worker finds imported."""
    found: list[str] = hear(driver.pool.start(number, {"do": "look", "look_for": names}))[0]
    return found


def preload_settings(folder: Path, **sources: str) -> dict[str, Any]:
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    return {"sys_path": [str(folder), *sys.path]}


def test_a_new_zygote_preloads_again_but_what_was_unfit(driver: Driver, tmp_path: Path) -> None:
    count = tmp_path / "count"
    settings = preload_settings(
        tmp_path, fit="", unfit=f"open({str(count)!r}, 'a').write('.')\nimport os\nos.abort()")
    driver.pool.preload(["fit", "unfit"], settings, quiet=True)
    assert look(driver, 1, "fit", "unfit") == ["fit"]
    preloaded = driver.wait_for(Preloaded)
    assert [problem.module for problem in preloaded.problems] == ["unfit"]
    assert preloaded.quiet
    driver.wait_for(Ready)
    os.kill(driver.pool.zygote_pid, signal.SIGKILL)
    assert driver.wait_for(ZygoteLost).dropped == ()
    driver.pool.forget(1)
    driver.pool.restart_zygote()
    assert look(driver, 1, "fit", "unfit") == ["fit"]
    assert count.read_text() == ".", "once is enough"


def test_what_kills_the_zygote_itself_is_not_preloaded_again(
    driver: Driver, tmp_path: Path
) -> None:
    settings = preload_settings(
        tmp_path, fit="", harmless="",
        deadly="if open('/proc/self/comm').read() == 'hpcray:zygote\\n':\n"
               "    import os\n    os.abort()")
    driver.pool.start(1, {"do": "echo"})  # a zygote with workers imports by itself
    driver.pool.preload(["fit"], settings)
    driver.pool.preload(["harmless", "deadly"], settings)
    lost = driver.wait_for(ZygoteLost)
    assert lost.dropped == ("harmless", "deadly")
    assert lost.exit_code == -signal.SIGABRT
    driver.pool.restart_zygote()
    assert look(driver, 2, "fit", "harmless", "deadly") == ["fit"]


@pytest.mark.parametrize("victim", ["heir", "elder"])
def test_the_end_of_one_zygote_is_that_of_both(
    driver: Driver, tmp_path: Path, victim: str
) -> None:
    elder = driver.pool.zygote_pid
    driver.pool.preload(["fit"], preload_settings(tmp_path, fit=""))
    family = driver.pool.start(1, {"do": "family"})
    pids = hear(family)[:2]
    heir = driver.wait_for(Preloaded).pid
    assert heir == driver.pool.zygote_pid != elder
    os.kill({"heir": heir, "elder": elder}[victim], signal.SIGSEGV)
    assert driver.wait_for(ZygoteLost) == ZygoteLost((1,), -signal.SIGSEGV)
    for pid in (*pids, heir, elder):
        wait_gone(pid)
    driver.pool.restart_zygote()
    assert look(driver, 2, "fit") == ["fit"]


def test_a_list_too_large_for_a_datagram_is_preloaded(driver: Driver, tmp_path: Path) -> None:
    before = len(descriptors())
    settings = preload_settings(tmp_path, fit="")
    many = [f"fit.{'x' * 100}_{number}" for number in range(2000)]
    driver.pool.preload(["fit", *many], settings)
    preloaded = driver.wait_for(Preloaded)
    assert "is not a package" in preloaded.problems[-1].text
    assert look(driver, 1, "fit") == ["fit"]
    driver.wait_for(Forked)
    assert len(descriptors()) - before <= 5, "those of the worker"


def test_the_end_does_not_wait_for_an_import(driver: Driver, tmp_path: Path) -> None:
    """In the zygote itself, which hears nobody meanwhile."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    settings = preload_settings(
        tmp_path, slow=f"if open('/proc/self/comm').read() == 'hpcray:zygote\\n':\n"
                       f"    open({str(gate)!r}).read()")
    driver.pool.start(1, {"do": "echo"})
    driver.pool.send_task(1, b"exit")
    driver.wait_for(Exited)  # and is not forgotten: the zygote has to stay
    driver.pool.preload(["slow"], settings)
    with open(gate, "w"):
        started_s = time.monotonic()
        driver.pool.close(20)
        assert time.monotonic() - started_s < 10


def test_numbers_are_unique(driver: Driver) -> None:
    before = len(descriptors())
    driver.pool.start(1, {"do": "echo"})
    with pytest.raises(ValueError, match="exists already"):
        driver.pool.start(1, {"do": "echo"})
    assert len(descriptors()) - before <= 9


def test_settings_that_cannot_travel_leak_nothing(driver: Driver) -> None:
    driver.wait_for(Ready)
    before = descriptors()
    with pytest.raises(TypeError):
        driver.pool.start(1, {"do": object()})
    assert descriptors() == before


def test_refused_worker_can_be_forgotten() -> None:
    pool = WorkerPool(os.environ, target="nowhere:run")
    driver = Driver(pool)
    pool.start(1, {})
    refused = driver.wait_for(ForkRefused)
    assert "nowhere:run" in refused.reason
    pool.forget(1)
    pool.close(5)


def test_node_killed_with_workers_leaves_nothing(tmp_path: Path) -> None:
    """A whole node as a process, killed: EOF reaches the zygote."""
    folder = tmp_path / "packages"
    folder.mkdir()
    script = (
        "import os, signal, sys, msgspec\n"
        "from hpcray.node.pool import WorkerPool\n"
        "pool = WorkerPool(os.environ, target='zygote_targets:prepare',\n"
        "                  sys_path=[sys.argv[2], *sys.path])\n"
        "pool.set_cleanup_folder(sys.argv[1])\n"
        "client = pool.start(1, {'do': 'family'}).client_socket\n"
        "client.setblocking(True)\n"
        "pids = msgspec.msgpack.decode(client.recv(1000))\n"
        "print(pool.zygote_pid, *pids, flush=True)\n"
        "signal.pause()\n"
    )
    command = [sys.executable, "-c", script, str(folder), TARGETS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as node:
        try:
            assert node.stdout is not None
            wait_readable(node.stdout)
            pids = [int(word) for word in node.stdout.readline().split()]
        finally:
            node.kill()
    assert len(pids) == 4
    for pid in pids:
        wait_gone(pid)
    assert not folder.exists()
