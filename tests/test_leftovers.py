"""The leftovers check itself: it finds what is left, names it, ends it, and blames nobody else.

Each case is a real pytest in a process of its own, with this suite's conftest.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
HEAD = """
import os, subprocess, sys, pathlib, pytest
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
kept = []
"""
# Starts a child that outlives it: what a daemon does.
ORPHAN = "subprocess.run([sys.executable, '-c', 'import subprocess, sys;" \
    " subprocess.Popen(sys.argv[1:])', *SLEEP], check=True)"

Pytest = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.fixture
def inner_pytest(tmp_path: Path) -> Pytest:
    """Run a test module under the conftest, with a short grace; -> its outcome and output."""
    text = CONFTEST.read_text().replace("GRACE_S = 5.0", "GRACE_S = 0.3")
    (tmp_path / "conftest.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    leaves_behind(reason): x\n")

    def run(tests: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "test_inner.py").write_text(HEAD + tests)
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "test_inner.py"],
            cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
            env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # starts twice as fast
        )  # fmt: skip

    return run


@pytest.fixture
def shm_name() -> Iterator[str]:
    name = f"hpcray-test-{uuid.uuid4().hex}"
    yield name
    Path("/dev/shm", name).unlink(missing_ok=True)


def test_a_clean_module_passes(inner_pytest: Pytest) -> None:
    done = inner_pytest("def test_it(): subprocess.run([sys.executable, '-c', ''], check=True)")
    assert done.returncode == 0, done.stdout


def test_an_orphan_is_reported_by_its_test_and_killed(inner_pytest: Pytest) -> None:
    done = inner_pytest(f"def test_it(): {ORPHAN}\ndef test_next(): pass")
    assert "1 error" in done.stdout and "test_it left behind" in done.stdout, done.stdout
    pid = int(done.stdout.partition("  process ")[2].partition(",")[0])
    # The kill was sent; when the process is gone is up to the kernel and to its new parent.
    deadline_s = time.monotonic() + 10
    while (stat := Path(f"/proc/{pid}/stat")).exists() and " Z " not in stat.read_text():
        assert time.monotonic() < deadline_s, "it is still alive"
        time.sleep(0.01)


def test_a_living_child_is_reported_at_the_end_of_its_module(inner_pytest: Pytest) -> None:
    done = inner_pytest("def test_it(): kept.append(subprocess.Popen(SLEEP))\ndef test_b(): pass")
    assert "module test_inner.py left behind" in done.stdout, done.stdout
    assert "first seen after test_inner.py::test_it" in done.stdout, done.stdout


def test_a_cluster_of_a_module_fixture_is_not_blamed_on_its_tests(inner_pytest: Pytest) -> None:
    done = inner_pytest("""
@pytest.fixture(scope="module")
def cluster():
    with subprocess.Popen(SLEEP) as process:
        yield
        process.kill()
def test_it(cluster): pass
def test_b(cluster): pass
""")
    assert done.returncode == 0, done.stdout


def test_a_plain_fork_is_found(inner_pytest: Pytest) -> None:
    done = inner_pytest("""
def test_it():
    if os.fork() == 0:
        import time
        time.sleep(60)
""")
    assert "module test_inner.py left behind" in done.stdout, done.stdout


def test_a_zombie_is_found(inner_pytest: Pytest) -> None:
    done = inner_pytest("""
def test_it():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
""")
    assert "nobody has waited for it" in done.stdout, done.stdout


def test_a_descriptor_is_found(inner_pytest: Pytest) -> None:
    done = inner_pytest("def test_it(): kept.append(os.pipe())")
    assert "file descriptor" in done.stdout and "pipe:[" in done.stdout, done.stdout


def test_a_shared_memory_entry_is_found(inner_pytest: Pytest, shm_name: str) -> None:
    done = inner_pytest(f"def test_it(): pathlib.Path('/dev/shm/{shm_name}').write_text('x')")
    assert f"/dev/shm/{shm_name}" in done.stdout, done.stdout


def test_what_another_program_left_in_shared_memory_is_its_own(inner_pytest: Pytest) -> None:
    path = Path(f"/dev/shm/sem.{uuid.uuid4().hex}")
    try:
        done = inner_pytest(f"def test_it(): pathlib.Path('{path}').write_text('x')")
    finally:
        path.unlink(missing_ok=True)
    assert done.returncode == 0, done.stdout


def test_signals_that_were_ignored_when_pytest_started(inner_pytest: Pytest) -> None:
    """As in the background of a script (SIGINT, SIGQUIT), or under nohup (SIGHUP)."""
    numbers = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        done = inner_pytest("""
import signal
def test_it():
    for name in ("SIGINT", "SIGQUIT", "SIGHUP"):
        number = getattr(signal, name)
        os.kill(os.getpid(), number)  # we live on
        child = subprocess.Popen(SLEEP)
        child.send_signal(number)
        assert child.wait() == -number
""")
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert done.returncode == 0, done.stdout


def test_what_another_program_uses_in_shared_memory_is_its_own(
    inner_pytest: Pytest, shm_name: str
) -> None:
    # Not below the inner pytest: our own child creates the entry when the inner test asks it to.
    script = f"input(); f = open('/dev/shm/{shm_name}', 'w'); print('made', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", script], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    with other:
        assert other.stdin and other.stdout
        done = inner_pytest(f"""
def test_it():
    with open('/proc/{other.pid}/fd/0', 'w') as other:
        other.write('go' + chr(10))
    import time
    while not os.path.exists('/dev/shm/{shm_name}'):
        time.sleep(0.01)
""")
        other.kill()
    assert done.returncode == 0, done.stdout


def test_processes_of_another_pytest_are_not_blamed(inner_pytest: Pytest) -> None:
    # The outer pytest's child starts while the inner one runs, and has only the outer mark.
    reader, writer = os.pipe()
    script = f"import os, time; os.read({reader}, 1); os.fork(); os.fork(); time.sleep(60)"
    group = subprocess.Popen([sys.executable, "-c", script], pass_fds=[reader],
                             start_new_session=True)  # fmt: skip
    try:
        done = inner_pytest(f"""
def test_it():
    with open('/proc/{os.getpid()}/fd/{writer}', 'w') as other:
        other.write('x')
""")
        assert done.returncode == 0, done.stdout
    finally:
        os.killpg(group.pid, 9)
        group.wait()
        os.close(reader)
        os.close(writer)


def test_an_exempt_test_is_left_alone(inner_pytest: Pytest) -> None:
    done = inner_pytest(f"""
@pytest.mark.leaves_behind("on purpose")
def test_it():
    {ORPHAN}
""")
    assert done.returncode == 0, done.stdout
    # It is still ours, one level up: end it.
    for pid in (int(p) for p in os.listdir("/proc") if p.isdigit()):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            mine = os.environ["HPCRAY_TEST_SESSION"].encode()
            if b"time.sleep(60)" in command and mine in Path(f"/proc/{pid}/environ").read_bytes():
                os.kill(pid, 9)
        except OSError:
            continue


def test_an_exemption_needs_a_reason(inner_pytest: Pytest) -> None:
    done = inner_pytest("@pytest.mark.leaves_behind\ndef test_it(): pass")
    assert "needs a reason" in done.stdout + done.stderr, done.stdout
