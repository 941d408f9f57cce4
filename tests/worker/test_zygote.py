"""The zygote as a process: raw datagrams in and out, no pool in between."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hpcray.node.pool import spawn_zygote
from hpcray.worker import zygote
from hpcray.worker.zygote import Exited, Forked, ForkRefused, Ready

HERE = str(Path(__file__).parent)
LIMIT_S = 20


def wait_readable(fd: Any, limit_s: float = LIMIT_S) -> None:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    assert poller.poll(limit_s * 1000), "nothing came"


def wait_gone(pids: list[int]) -> None:
    """Until none of these processes runs (zombies of other parents do not count)."""
    deadline_s = time.monotonic() + LIMIT_S
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            wait_readable(pidfd, deadline_s - time.monotonic())
        finally:
            os.close(pidfd)


class RawZygote:
    """The node's side by hand."""

    def __init__(self, **options: Any) -> None:
        environ = {**os.environ, **options.pop("environ", {})}
        environ.pop("PYTHONUNBUFFERED", None)  # Buffering is what one of the tests looks at.
        options.setdefault("target", "zygote_targets:run")
        self.socket, self.process = spawn_zygote(environ, sys_path=[HERE, *sys.path], **options)

    def event(self) -> zygote.Event:
        wait_readable(self.socket)
        event: zygote.Event = msgspec.msgpack.decode(self.socket.recv(65536), type=zygote.Event)
        return event

    def request(self, request: zygote.Request, descriptors: tuple[int, ...] = ()) -> None:
        socket.send_fds(self.socket, [msgspec.msgpack.encode(request)], list(descriptors))

    def fork(self, number: int, **settings: Any) -> Worker:
        worker = Worker()
        encoded = msgspec.msgpack.encode(settings)
        self.request(zygote.ForkRequest(number, encoded), worker.far_descriptors())
        worker.close_far()
        return worker

    def close(self) -> None:
        self.socket.close()
        self.process.wait(LIMIT_S)


class Worker:
    """The near ends of one worker's channels."""

    def __init__(self) -> None:
        kind = (socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.task, self._task_far = socket.socketpair(*kind)
        self.client, self._client_far = socket.socketpair(*kind)
        self.stdout, self._stdout_far = os.pipe()
        self.stderr, self._stderr_far = os.pipe()

    def far_descriptors(self) -> tuple[int, ...]:
        far = (self._task_far.fileno(), self._client_far.fileno())
        return (*far, self._stdout_far, self._stderr_far)

    def close_far(self) -> None:
        self._task_far.close()
        self._client_far.close()
        os.close(self._stdout_far)
        os.close(self._stderr_far)

    def hear(self) -> Any:
        wait_readable(self.client)
        return msgspec.msgpack.decode(self.client.recv(1 << 18))

    def output(self, stream: int) -> str:
        """Until the end of the stream."""
        chunks = []
        while True:
            wait_readable(stream)
            chunk = os.read(stream, 1 << 16)
            if not chunk:
                return b"".join(chunks).decode()
            chunks.append(chunk)

    def close(self) -> None:
        self.task.close()
        self.client.close()
        os.close(self.stdout)
        os.close(self.stderr)


@pytest.fixture
def raw() -> Iterator[RawZygote]:
    descriptors = os.listdir("/proc/self/fd")
    node = RawZygote()
    assert isinstance(node.event(), Ready)
    yield node
    node.close()
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


def test_zygote_forks_and_reports_the_exit(raw: RawZygote) -> None:
    worker = raw.fork(3, do="leave", code=5)
    forked = raw.event()
    assert isinstance(forked, Forked)
    exited = raw.event()
    assert exited == Exited(3, forked.pid, 5 << 8)
    assert isinstance(exited, Exited)
    assert exited.exit_code == 5
    with open(f"/proc/{forked.pid}/stat") as stat:
        assert stat.read().rpartition(")")[2].split()[0] == "Z", "the pid stays reserved"
    raw.request(zygote.ReapRequest(3))
    wait_gone([forked.pid])
    worker.close()


def test_worker_is_a_process_of_its_own(raw: RawZygote, tmp_path: Path) -> None:
    path = [HERE, *sys.path]
    settings = {
        "do": "describe", "cwd": str(tmp_path), "sys_path": path,
        "environ": {b"NEW": b"this", b"TZ": b"UTC", b"HOME": None},
        "env_vars": {"TOP": "${NEW}!"}}
    workers = [raw.fork(3, do="describe"),
               *(raw.fork(n, blas_threads=n, **settings) for n in (1, 2))]
    plain, one, two = (worker.hear() for worker in workers)
    assert one["pid"] == one["session"] != two["pid"]
    assert one["descriptors"][:3] == [0, 1, 2]
    assert len(one["descriptors"]) == 5, "standard streams, task and client channel"
    assert one["stdin"] == "/dev/null"
    assert one["cwd"] == str(tmp_path)
    assert one["sys_path"] == path
    wanted = {**plain["environ"], "NEW": "this", "TZ": "UTC", "TOP": "this!"}
    del wanted["HOME"]
    assert {k: two["environ"].pop(k) for k in zygote.BLAS_VARIABLES} == dict.fromkeys(
        zygote.BLAS_VARIABLES, "2"
    )
    assert two["environ"] == wanted, "the zygote's own, changed"
    assert one["random"] != two["random"]
    assert one["numpy_random"] != two["numpy_random"]
    assert set(one["blas_threads"]) <= {1}
    assert set(two["blas_threads"]) <= {2}
    assert "Zygote" not in one["main"]
    assert all(one["signals"])
    assert one["private_kib"] < 16 * 1024, "the imports are shared"
    for worker in workers:
        worker.close()


def test_output_is_line_buffered_and_flushed_at_the_end(raw: RawZygote) -> None:
    worker = raw.fork(1, do="chatter")
    assert worker.hear() == "said"
    wait_readable(worker.stdout)
    assert os.read(worker.stdout, 100) == b"first line\n"
    wait_readable(worker.stderr)
    assert os.read(worker.stderr, 100) == b"to stderr\n"
    worker.task.send(b"go on")
    assert worker.output(worker.stdout) == "half"
    worker.close()


@pytest.mark.parametrize(
    ("behaviour", "stdout", "stderr"),
    [("fail", "", "RuntimeError: as asked\n"), ("quit_with_message", "buffered", "good bye\n")],
)
def test_worker_that_fails_says_why(
    raw: RawZygote, behaviour: str, stdout: str, stderr: str
) -> None:
    worker = raw.fork(1, do=behaviour)
    assert worker.output(worker.stderr).endswith(stderr)
    assert worker.output(worker.stdout) == stdout
    assert isinstance(raw.event(), Forked)
    exited = raw.event()
    assert isinstance(exited, Exited)
    assert exited.exit_code == 1
    worker.close()


def test_worker_killed_by_a_signal_is_told_from_one_that_exits(raw: RawZygote) -> None:
    worker = raw.fork(1, do="echo")
    assert worker.hear() == "up"
    forked = raw.event()
    assert isinstance(forked, Forked)
    os.kill(forked.pid, signal.SIGSEGV)
    exited = raw.event()
    assert isinstance(exited, Exited)
    assert exited.exit_code == -signal.SIGSEGV
    worker.close()


def test_preload_with_a_thread_is_named_and_nothing_forked() -> None:
    node = RawZygote(preload=["zygote_targets"], environ={"TEST_LEAK_A_THREAD": "1"})
    ready = node.event()
    assert isinstance(ready, Ready)
    assert ready.problems == ("preload zygote_targets started 1 threads",)
    worker = node.fork(1, do="echo")
    refused = node.event()
    assert isinstance(refused, ForkRefused)
    assert "2 threads" in refused.reason
    assert "zygote_targets" in refused.reason
    worker.close()
    node.close()


def test_missing_modules_are_problems_and_a_missing_target_a_refusal() -> None:
    node = RawZygote(preload=["no_such_module"], target="no_such_target:run")
    ready = node.event()
    assert isinstance(ready, Ready)
    assert len(ready.problems) == 2
    assert "preload no_such_module cannot be imported" in ready.problems[0]
    worker = node.fork(1, do="echo")
    refused = node.event()
    assert isinstance(refused, ForkRefused)
    assert "no_such_target" in refused.reason
    worker.close()
    node.close()


def test_end_of_node_ends_whole_sessions_and_unlinks_its_files(tmp_path: Path) -> None:
    node = RawZygote()
    assert isinstance(node.event(), Ready)
    leaked = tmp_path / "mpi_library_file"
    leaked.touch()
    kept = tmp_path / "somebody_elses"
    kept.touch()
    node.request(zygote.CleanupRequest((str(leaked), str(tmp_path / "never_made"))))
    family, stubborn = node.fork(1, do="family"), node.fork(2, do="stubborn")
    pids = family.hear()
    assert stubborn.hear() == "up"
    started_s = time.monotonic()
    node.close()
    assert node.process.returncode == 0
    wait_gone(pids)
    assert time.monotonic() - started_s < zygote.DEFAULT_GRACE_S + 5
    assert not leaked.exists()
    assert kept.exists()
    family.close()
    stubborn.close()


def test_orderly_stop_unlinks_nothing(tmp_path: Path) -> None:
    node = RawZygote()
    assert isinstance(node.event(), Ready)
    file = tmp_path / "in_use"
    file.touch()
    node.request(zygote.CleanupRequest((str(file),)))
    worker = node.fork(1, do="stubborn")
    assert worker.hear() == "up"
    node.request(zygote.StopRequest(0.0))
    node.process.wait(LIMIT_S)
    assert file.exists()
    node.close()
    worker.close()


def test_death_of_the_zygote_kills_its_workers(raw: RawZygote) -> None:
    worker = raw.fork(1, do="stubborn")
    assert worker.hear() == "up"
    forked = raw.event()
    assert isinstance(forked, Forked)
    raw.process.kill()
    wait_gone([forked.pid])
    worker.close()


def test_zygote_outlives_a_terminating_batch_system(raw: RawZygote) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        raw.process.send_signal(number)
    worker = raw.fork(1, do="leave", code=0)
    assert isinstance(raw.event(), Forked)
    worker.close()


def test_environment_for_imports_is_not_the_workers(raw: RawZygote) -> None:
    worker = raw.fork(1, do="describe")
    seen = worker.hear()["environ"]
    # threadpoolctl sets the last one.
    for name in (*zygote.BLAS_VARIABLES, "PYTHONPATH", "KMP_DUPLICATE_LIB_OK"):
        assert seen.get(name) == os.environ.get(name), name
    worker.close()


def test_module_is_light_for_the_node() -> None:
    code = (
        "import sys, hpcray.worker.zygote;"
        "sys.exit(bool({'numpy', 'ctypes', 'cloudpickle', 'argparse'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0
