"""Sockets that are full, because the other end does not read: nobody waits for ever."""

from __future__ import annotations

import signal
import time

import pytest

from .jobs import Start

HEAD = """
import faulthandler, os, sys, threading, time
import hpcray as ray
faulthandler.dump_traceback_later(60, exit=True)

@ray.remote
def same(x, *more):
    return x

@ray.remote(num_cpus=0)
class Log:
    def __init__(self):
        self.calls = []
    def add(self, n, payload=b""):
        self.calls.append(n)
        return n
    def all(self):
        return self.calls

ray.init(num_cpus=2)
log = Log.remote()
ray.get([log.add.remote(-1), same.remote(0)])
"""


@pytest.mark.parametrize("threads", [1, 4])
def test_a_node_that_stops_reading(start: Start, threads: int):
    """Megabytes are submitted meanwhile; when it goes on, all of it is done, in order."""
    job = start(HEAD + f"""
THREADS, CALLS = {threads}, {1200 // threads}
found, sent = {{}}, []
def submit(me):
    refs = []
    for n in range(me * 10_000, me * 10_000 + CALLS):
        refs.append(log.add.remote(n, bytes(15_000)))
        if n % 3 == 0:
            refs.append(ray.put(n))
        elif n % 3 == 1:
            refs.append(same.remote(n, bytes(5_000)))
        else:
            refs.append(ray.put((n, bytes(20_000))))
        sent.append(n)
    found[me] = ray.get(refs, timeout=50)
threads = [threading.Thread(target=submit, args=(me,)) for me in range(THREADS)]
print("ready", flush=True)
sys.stdin.readline()
for thread in threads:
    thread.start()
before = -1
while len(sent) > before:  # until the socket is full, and nothing moves any more
    before = len(sent)
    time.sleep(0.3)
assert before < THREADS * CALLS, "the socket was never full"
print("stuck", before, flush=True)
for thread in threads:
    thread.join()
for me in range(THREADS):
    wanted = []
    for n in range(me * 10_000, me * 10_000 + CALLS):
        wanted += [n, (n, bytes(20_000)) if n % 3 == 2 else n]
    assert found[me] == wanted
calls = ray.get(log.all.remote())
assert len(calls) == THREADS * CALLS + 1
for me in range(THREADS):
    mine = [n for n in calls if n // 10_000 == me]
    assert mine == list(range(me * 10_000, me * 10_000 + CALLS))
print("all done", flush=True)
""", pty=True)
    job.expect("ready")
    job.kill("node", number=signal.SIGSTOP)
    job.say("\n")
    job.expect("stuck")
    job.kill("node", number=signal.SIGCONT)
    job.expect("all done", timeout_s=60)
    job.finish()


def test_interrupted_at_a_full_socket(start: Start):
    """Ctrl-C while a call waits for room: it raises, and the session stays whole."""
    job = start(HEAD + """
refs, interrupts, n = [], 0, 0
def tell():
    for told in range(3):
        before = -1
        while n > before or interrupts < told:
            before = n
            time.sleep(0.3)
        print("stuck", told, flush=True)
print("ready", flush=True)
sys.stdin.readline()
threading.Thread(target=tell, daemon=True).start()
while interrupts < 3:
    try:
        while True:
            n += 1
            refs.append((log.add.remote(n, bytes(15_000)), n))
    except KeyboardInterrupt:
        interrupts += 1
        print("interrupted", flush=True)
for ref, value in refs:
    assert ray.get(ref, timeout=30) == value
calls = ray.get(log.all.remote())
assert calls == sorted(set(calls))
assert {n for _, n in refs} <= set(calls)
print("all done", flush=True)
""", pty=True)
    job.expect("ready")
    job.kill("node", number=signal.SIGSTOP)
    job.say("\n")
    for told in range(3):
        job.expect(f"stuck {told}")
        job.say("\x03")
        job.expect("interrupted")
    job.kill("node", number=signal.SIGCONT)
    job.expect("all done", timeout_s=40)
    job.finish()


def test_a_driver_that_does_not_read(start: Start):
    """Results flood it while it is stopped; it has them all when it goes on."""
    job = start(HEAD + """
@ray.remote
def noted(n, path):
    with open(path, "ab") as file:
        file.write(b".")
    return n, bytes(3_000)

path = os.path.join(os.environ["TMPDIR"], "ran")
refs = [noted.remote(n, path) for n in range(2_000)]
futures = [ref.future() for ref in refs]
print("waiting", flush=True)
done, _ = ray.wait(refs, num_returns=len(refs), timeout=50)
assert len(done) == len(refs)
assert ray.get(refs, timeout=20) == [(n, bytes(3_000)) for n in range(2_000)]
assert [future.result(timeout=20)[0] for future in futures] == list(range(2_000))
print("all done", flush=True)
""")
    job.expect("waiting")
    job.kill("driver", number=signal.SIGSTOP)
    ran = job.directory / "ran"
    deadline_s = time.monotonic() + 30
    while not ran.exists() or ran.stat().st_size < 2_000:
        assert time.monotonic() < deadline_s, "the workers wait for the driver"
        time.sleep(0.02)
    job.kill("driver", number=signal.SIGCONT)
    job.expect("all done", timeout_s=50)
    job.finish()


@pytest.mark.parametrize("size", [10, 20_000])
def test_workers_that_flood(start: Start, size: int):
    """Yields, puts and calls faster than anybody takes them, in both directions at once."""
    job = start(HEAD + f"""
SIZE = {size}

@ray.remote(num_returns="streaming")
def flood(count):
    for n in range(count):
        yield n, bytes(SIZE)

@ray.remote
def busy(count):
    refs = [ray.put((n, bytes(SIZE))) for n in range(count)]
    calls = [log.add.remote(n, bytes(SIZE)) for n in range(count)]
    assert ray.get(calls) == list(range(count))
    return [value[0] for value in ray.get(refs)] == list(range(count))

streams = [flood.remote(1_500), flood.remote(1_500)]
busy_ones = [busy.remote(500), busy.remote(500)]
back = [log.add.remote(n, bytes(SIZE)) for n in range(1_000)]
assert ray.get(busy_ones, timeout=40) == [True, True]
for stream in streams:
    assert [ray.get(ref)[0] for ref in stream] == list(range(1_500))
assert ray.get(back, timeout=20) == list(range(1_000))
print("all done", flush=True)
""")
    job.expect("all done", timeout_s=60)
    job.finish()
