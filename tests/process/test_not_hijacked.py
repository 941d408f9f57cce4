"""The driver is the user's own process: debugger, profiler, event loop, threads, forks, stdin."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from .jobs import Start

HEAD = """
import os, signal, sys, threading, time
import hpcray as ray

@ray.remote
def echo(x):
    return x
"""


def test_a_debugger_in_the_driver(start: Start):
    job = start(HEAD + """
ray.init()
before = ray.get(echo.remote(1))
breakpoint()
print("after", ray.get(echo.remote(before + 1)))
""", pty=True)
    job.expect(r"\(Pdb\)")
    job.say("p 1+1\n")
    job.expect(r"^2\b")
    job.say("p ray.get(echo.remote(41)) + 1\n")
    job.expect(r"^42\b")
    job.say("c\n")
    job.expect("after 2")
    job.finish()


def test_under_a_profiler(start: Start):
    job = start(HEAD + "ray.init()\nassert ray.get(echo.remote(1)) == 1\n",
                program=("-m", "cProfile", "-s", "cumulative"))
    assert "function calls" in job.finish()


def test_standard_input_is_the_driver_s(start: Start):
    job = start(HEAD + "ray.init()\nprint(ray.get(echo.remote(sys.stdin.read())))\n",
                stdin="mine\n")
    assert "mine" in job.finish()


@pytest.mark.skipif(
    not (Path(sys.executable).parent / "ipython").exists(), reason="no IPython here")
def test_in_ipython(start: Start):
    job = start(HEAD + "ray.init()\nprint('ipython', ray.get(echo.remote(5)))\n",
                program=("-m", "IPython", "--simple-prompt", "--no-banner"))
    assert "ipython 5" in job.finish()


def test_in_an_interactive_interpreter(start: Start):
    job = start(HEAD + "ray.init()\n", program=("-i", "-q"), pty=True)
    job.expect(">>> ")
    job.say("ray.get(echo.remote('typed'))\n")
    job.expect("'typed'\n")
    job.say("1/0\n")
    job.expect("ZeroDivisionError")
    job.say("exit()\n")
    job.finish()


def test_event_loops_threads_and_signal_handlers(start: Start):
    """One driver does it all; `before` and `after` tell what init and shutdown changed."""
    job = start(HEAD + """
import asyncio
from concurrent.futures import ThreadPoolExecutor

def state():
    signals = [signal.getsignal(n) for n in range(1, 32) if n not in (9, 19)]
    return [signals, signal.set_wakeup_fd(-1), sys.stdout, os.getcwd(), sys.excepthook,
            threading.excepthook]

def handler(number, frame):
    pass

signal.signal(signal.SIGUSR1, handler)
before = state()
ray.init()
# Ctrl-C raises what it always did, but not while hpcray is in the middle of something.
during = state()
ours = during[0][signal.SIGINT - 1]
assert ours is not signal.default_int_handler and callable(ours)
during[0][signal.SIGINT - 1] = signal.default_int_handler
# An error that nobody catches is shown without our frames, by the hook that was there.
during[-2:] = before[-2:]
assert during == before
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    pass
else:
    raise AssertionError("no KeyboardInterrupt")

async def main():
    one = await echo.remote(1)
    many = await asyncio.gather(*[echo.remote(i) for i in range(50)])
    return one, sum(many)

assert asyncio.run(main()) == (1, sum(range(50)))
with ThreadPoolExecutor(8) as pool:
    got = list(pool.map(lambda i: ray.get(echo.remote(i)), range(200)))
assert got == list(range(200))
shared = echo.remote("shared")
with ThreadPoolExecutor(8) as pool:
    assert set(pool.map(lambda _: ray.get(shared), range(64))) == {"shared"}
signal.setitimer(signal.ITIMER_REAL, 0)
signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
assert ray.get([echo.remote(i) for i in range(10)]) == list(range(10))
ray.shutdown()
assert state() == before, (state(), before)
assert threading.active_count() == 1, threading.enumerate()
print("untouched")
""")
    assert "untouched" in job.finish()


def test_a_fork_in_a_task_ends_by_sigterm_from_its_first_moment(start: Start):
    """As `Pool.terminate` and `Process.terminate` rely on."""
    job = start(HEAD + """
import signal, threading

@ray.remote
def forks():
    ended = []
    def some():
        for _ in range(50):
            pid = os.fork()
            if pid == 0:
                time.sleep(5)
                os._exit(7)
            os.kill(pid, signal.SIGTERM)
            ended.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    some()
    thread = threading.Thread(target=some)
    thread.start()
    thread.join()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return ended, mask

ray.init()
ended, mask = ray.get(forks.remote())
assert ended == [-signal.SIGTERM] * 100, ended
assert not mask, mask
print("all")
""")
    assert "all" in job.finish()


def test_what_a_fork_is_sent_is_refused_where_it_is_used(start: Start):
    job = start(HEAD + """
import multiprocessing, warnings
warnings.simplefilter("ignore")

@ray.remote
class Actor:
    def ping(self):
        return "pong"

def use(what):
    try:
        return ray.get(what.ping.remote() if hasattr(what, "ping") else what)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

ray.init()
actor, ref = Actor.remote(), ray.put(1)
with multiprocessing.get_context("fork").Pool(1) as pool:
    print(pool.map(use, [actor, ref]))
assert ray.get(actor.ping.remote()) == "pong"
""")
    output = job.finish()
    assert output.count("RuntimeError: this ") == 2 and output.count("fork") == 2, output


def test_forks_of_the_driver_and_of_a_task(start: Start):
    job = start(HEAD + """
import gc, multiprocessing, warnings
import numpy as np
warnings.simplefilter("ignore")
fork = multiprocessing.get_context("fork")

def square(x):
    gc.collect()
    return x * x

def misuse(_):
    try:
        ray.get(echo.remote(1))
        return "no error"
    except Exception as error:
        return f"{type(error).__name__}: {error}"

@ray.remote
def forks():
    ref = ray.put(np.arange(100_000))
    with fork.Pool(2) as pool:  # a pool pickles by name: what the script defines is not there
        assert pool.map(abs, range(-20, 0)) == list(range(20, 0, -1))
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, misuse(0).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert int(ray.get(ref)[99_999]) == 99_999
    return os.read(read, 10_000).decode()

ray.init()
ref = ray.put(np.ones(200_000))
value = ray.get(ref)
with fork.Pool(2) as pool:
    assert pool.map(square, range(20)) == [x * x for x in range(20)]
    print("driver:", pool.map(misuse, [0])[0])
print("task:", ray.get(forks.remote()))
pid = os.fork()
if pid == 0:
    del ref, value
    gc.collect()
    sys.exit(0)          # through the interpreter's exit: its atexit handlers too
assert os.waitpid(pid, 0)[1] == 0
assert float(ray.get(ref).sum()) == 200_000.0
assert ray.get(echo.remote("still")) == "still"
print("done")
""")
    output = job.finish()
    for line in ("driver: RuntimeError: this process", "task: RuntimeError: this process", "done"):
        assert line in output
