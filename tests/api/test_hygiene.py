"""What a task changes in its process does not reach the next task there."""

from __future__ import annotations

import os

import pytest

puts_back = pytest.mark.ray_differs("Ray puts nothing back")


def look():
    """What a task finds around it, in its process (the last one)."""
    import os
    import signal
    import sys

    mask = os.umask(0o22)
    os.umask(mask)
    print("seen", flush=True)
    handlers = [signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGALRM, signal.SIGTERM)]
    return (os.getcwd(), dict(os.environ), mask, list(map(str, handlers)),
            signal.getitimer(signal.ITIMER_REAL), sys.stdout.closed, sys.stderr.closed,
            sys.stdout is sys.__stdout__, sys.stdout.fileno(), sys.stderr.fileno(), os.getpid())


def chdir():
    import os

    os.chdir("/")


def fchdir():
    import os

    fd = os.open("/", os.O_RDONLY)
    os.fchdir(fd)
    os.close(fd)


def into_a_directory_that_is_removed():
    import os
    import tempfile

    path = tempfile.mkdtemp()
    os.chdir(path)
    os.rmdir(path)


def variables():
    import os

    os.environ["OF_A_TASK"] = "1"
    os.environ.setdefault("OF_A_TASK_TOO", "1")
    os.environb[b"IN_BYTES"] = b"\xff"
    os.environ["PATH"] += ":/x"
    del os.environ["HOME"]
    os.environ |= {"TZ": "Asia/Tokyo"}


def variables_that_fail():
    import os

    os.environ["OF_A_TASK"] = "1"
    raise ValueError


def umask():
    import os

    os.umask(0o77)


def handlers():
    import signal
    from signal import signal as handle

    handle(signal.SIGUSR1, lambda *_: None)
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(100)


def close_stdout():
    import sys

    sys.stdout.close()


def close_buffers():
    import sys

    sys.stdout.buffer.close()
    sys.stderr.buffer.close()


def replace_streams():
    import io
    import sys

    sys.stdout = sys.__stdout__ = io.StringIO()
    sys.stderr = None


@puts_back
@pytest.mark.parametrize("change", [
    chdir, fchdir, into_a_directory_that_is_removed, variables, variables_that_fail, umask,
    handlers, close_stdout, close_buffers, replace_streams], ids=lambda f: f.__name__)
def test_a_change_does_not_reach_the_next_task(cluster, change):
    ray = cluster(num_cpus=1)
    seen = ray.remote(look)
    before = ray.get(seen.remote())
    for _ in range(2):
        ref = ray.remote(max_retries=0)(change).remote()
        after = seen.remote()  # in one datagram with it, perhaps
        try:
            ray.get(ref)
        except ValueError:
            assert change is variables_that_fail
        assert ray.get(after) == before, "the same process, as it was"


@puts_back
def test_printing_goes_on_after_a_task_closed_stdout(run_driver):
    output = run_driver("""
        ray.init(num_cpus=1, **INIT)

        @ray.remote
        def close():
            import sys
            print("before")
            sys.stdout.close()
            sys.stderr.close()

        @ray.remote
        def say():
            import sys
            print("after, ünï")
            print("and of errors", file=sys.stderr)

        ray.get(close.remote())
        ray.get(say.remote())
        ray.shutdown()
    """, log_to_driver=True)
    both = output.stdout + output.stderr
    assert "before" in both and "after, ünï" in both and "and of errors" in both


def test_the_calls_of_an_actor_share_what_they_change(ray):
    @ray.remote
    class Actor:
        def change(self):
            import os

            os.chdir("/")
            os.environ["OF_AN_ACTOR"] = "1"

        def look(self):
            import os

            return os.getcwd(), os.environ["OF_AN_ACTOR"]

    actor = Actor.remote()
    ray.get(actor.change.remote())
    assert ray.get(actor.look.remote()) == ("/", "1")


@puts_back
def test_an_actor_begins_as_a_task_does(cluster):
    ray = cluster(num_cpus=1)
    ray.get(ray.remote(variables).remote())
    actor = ray.remote(type("Actor", (), {"look": lambda self: look()[1]})).remote()
    assert "OF_A_TASK" not in ray.get(actor.look.remote())


@puts_back
def test_functions_that_take_notes_are_themselves(ray):
    """They pickle by name, and the library finds them where it looks."""
    import os
    import signal

    functions = os.chdir, os.umask, signal.signal

    @ray.remote
    def same(*given):
        return [one is mine for one, mine in zip(given, functions, strict=True)], (
            os.chdir in os.supports_fd), os.chdir, type(os.environ | {})

    assert ray.get(same.remote(*functions)) == ([True] * 3, True, os.chdir, dict)


# --- what people see of it ------------------------------------------------------------------------


def shown(pid="self"):
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read().replace(b"\0", b" ").strip().decode()


def test_a_process_has_the_name_of_its_task(ray, eventually):
    """`ps` and `top` show it; the environment that others read in /proc stays there."""
    @ray.remote
    def work():
        with open("/proc/self/environ", "rb") as file:
            return shown(), os.getpid(), b"PATH=" in file.read()

    title, pid, has_environment = ray.get(work.remote())
    assert (title, has_environment) == ("ray::work", True)
    eventually(lambda: shown(pid) == "ray::IDLE")
    assert ray.get(work.remote())[0] == "ray::work", "the same function again"
    assert ray.get(work.options(name="other").remote())[0] == "ray::other"


def test_a_process_has_the_name_of_its_actor(ray, eventually):
    @ray.remote
    class Actor:
        def pid(self):
            return os.getpid()

    actor = Actor.remote()
    pid = ray.get(actor.pid.remote())
    eventually(lambda: shown(pid) == "ray::Actor")
