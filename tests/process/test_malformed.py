"""What cannot be read or handled costs who sent it its connection, and nobody else."""

from __future__ import annotations

import pytest

from .jobs import Start

HEAD = """
import os, socket, sys
import hpcray as ray
from hpcray.protocol import messages as m

def say(datagram):
    '''On every channel of this process.'''
    for name in os.listdir("/proc/self/fd"):
        try:
            sock = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        if sock.family == socket.AF_UNIX and sock.type == socket.SOCK_SEQPACKET:
            try:
                sock.send(datagram, socket.MSG_DONTWAIT)
            except OSError:
                pass  # the same one again, and what was said has been heard
        sock.close()

DATAGRAMS = {
    "no msgpack": b"\\xc0",
    "no such message": b"\\x91\\x92\\x7f\\x00",
    "no content": b"\\xc1" + bytes(8),
    "no such task": m.encode([m.SubmitTask(bytes(24), bytes(16), b"")]),
    "no such segment": m.encode([m.SegmentOpen(12345)]),
    "no such place": m.encode([m.PutLocated(bytes(28), m.Located(12345, 0, 10))]),
    "no such segment returned": m.encode([m.SegmentReturn(12345)]),
}
"""


def test_a_worker_is_ended_and_the_job_goes_on(start: Start) -> None:
    job = start(HEAD + """
import time

@ray.remote(max_retries=0)
def broken(name):
    say(DATAGRAMS[name])
    time.sleep(60)

@ray.remote
def double(x):
    return 2 * x

for name in DATAGRAMS:
    try:
        print(name, "->", ray.get(broken.remote(name)))
    except ray.exceptions.WorkerCrashedError as error:
        print(name, "->", error)
    assert ray.get(double.remote(21)) == 42
print("done", flush=True)
""")
    output = job.finish()
    answers = [line for line in output.splitlines() if " -> " in line]
    assert len(answers) == 7, output
    assert all("was ended: it sent what cannot be" in answer for answer in answers), output
    assert "done" in output


@pytest.mark.parametrize("name", ["no msgpack", "no content", "no such task"])
def test_a_driver_s_job_ends_in_order(start: Start, name: str) -> None:
    job = start(HEAD + f"""
@ray.remote
def double(x):
    return 2 * x

ray.init()
assert ray.get(double.remote(21)) == 42
say(DATAGRAMS[{name!r}])
try:
    while True:
        ray.get(double.remote(21))
except ray.exceptions.RaySystemError as error:
    print("over:", error, flush=True)
""")
    output = job.finish()
    assert "over:" in output
    assert "the driver is disconnected and the job ends: it sent what cannot be" in output
