"""`python script.py`: how a job ends, in good order and in every other way."""

from __future__ import annotations

import os
import signal

import pytest

from .jobs import Start

HEAD = """
import os, signal, sys, time
import hpcray as ray

@ray.remote
def echo(x):
    return x

@ray.remote
def block(started):
    open(started, "w").close()
    while True:
        time.sleep(0.05)

def until(path):
    while not os.path.exists(path):
        time.sleep(0.005)
"""

# A driver that waits for a task that never ends.
PENDING = HEAD + """
ray.init()
mark = os.path.join(os.environ["TMPDIR"], "started")
ref = block.remote(mark)
until(mark)
print("pending", flush=True)
ray.get(ref)
print("not reached")
"""


@pytest.mark.parametrize(("ending", "status"), [
    ("", 0), ("sys.exit(3)", 3), ("os._exit(4)", 4), ("raise ValueError('mine')", 1),
    ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ("ray.shutdown(); sys.exit('said')", 1),
    ("ray.get(ray.remote(lambda: 1 / 0).remote())", 1),
])
def test_the_script_s_end_is_the_job_s(start: Start, ending: str, status: int):
    job = start(HEAD + f"""
assert __name__ == "__main__" and sys.argv[1:] == ["a", "-n", "b c"], sys.argv
ray.init()
assert ray.get(echo.remote(1)) == 1
print("here", flush=True)
{ending}
""", "a", "-n", "b c")
    job.expect("here")
    output = job.finish(status=status)
    assert output.count("Traceback") <= 1 if "ray.get" not in ending else "ZeroDivision" in output
    if "mine" in ending:
        assert output.count("ValueError: mine") == 1


def test_many_sessions_in_one_script(start: Start):
    job = start(HEAD + """
for i in range(4):
    ray.init(num_cpus=1 + i % 2)
    assert ray.get([echo.remote(i) for _ in range(20)]) == [i] * 20
    assert ray.cluster_resources()["CPU"] == 1 + i % 2
    ray.shutdown()
    assert not ray.is_initialized()
print(len(os.listdir("/proc/self/fd")))
""")
    job.finish()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_a_signal_to_the_driver(start: Start, number: int):
    job = start(PENDING)
    job.expect("pending")
    job.kill("launcher", number=number)
    output = job.finish(status=-number)
    assert ("KeyboardInterrupt" in output) == (number == signal.SIGINT)
    assert "connection to the node" not in output


def test_ctrl_c_at_a_terminal(start: Start):
    """The terminal sends it to the whole foreground group."""
    job = start(PENDING, pty=True)
    job.expect("pending")
    job.say("\x03")
    output = job.finish(status=-signal.SIGINT)
    assert output.count("KeyboardInterrupt") == 1


def test_ctrl_c_that_is_caught_leaves_the_session_usable(start: Start):
    job = start(PENDING.replace('print("pending", flush=True)\nray.get(ref)\n', """
try:
    print("pending", flush=True)  # from here on the test may press Ctrl-C
    ray.get(ref)
except KeyboardInterrupt:
    print("caught", ray.get(echo.remote(7)), flush=True)
    sys.exit(5)
"""), pty=True, HPCRAY_NUM_CPUS="2")
    job.expect("pending")
    job.say("\x03")
    job.expect("caught 7")
    job.finish(status=5)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_the_node_dies(start: Start, number: int):
    """The driver's get raises; the job does not hang, and one line says why."""
    job = start(PENDING.replace("ray.get(ref)\n", """
try:
    ray.get(ref)
except ray.exceptions.RaySystemError as error:
    print("raised", type(error).__name__, flush=True)
    raise
"""))
    job.expect("pending")
    job.kill("node", number=number)
    output = job.finish(status=1)
    assert "raised RaySystemError" in output
    said = [line for line in output.splitlines() if line.startswith("hpcray: ")]
    assert len(said) == 1 and "node" in said[0], output


def test_the_node_dies_and_a_fork_of_a_worker_lives_on(start: Start):
    """The worker could write into the driver's channel; its fork must not keep that open."""
    job = start(HEAD + """
@ray.remote
class Forks:
    def ping(self):
        pass
    def known(self):
        from hpcray.client.process import current_client
        return list(current_client().core.direct._clients)
    def fork(self, driver):
        if os.fork() == 0:
            os.setsid()
            while os.path.exists(f"/proc/{driver}"):
                time.sleep(0.02)
            os._exit(0)

@ray.remote
def never():
    time.sleep(600)

ray.init(num_cpus=2)
forks = Forks.remote()
while ray.get(forks.known.remote()) != [0]:
    ray.get(forks.ping.remote())
ray.get(forks.fork.remote(os.getpid()))
print("forked", flush=True)
ray.get(never.remote())
""")
    job.expect("forked")
    job.kill("node")
    job.finish(status=1)


def test_after_the_node_died_a_new_session_starts(start: Start):
    job = start(HEAD + """
ray.init()
print("up", flush=True)
sys.stdin.readline()
try:
    ray.get(echo.remote(1))
    print("no error")
except ray.exceptions.RaySystemError:
    ray.shutdown()
ray.init()
print("again", ray.get(echo.remote(2)))
""", pty=True)
    job.expect("up")
    job.kill("node")
    job.say("\n")
    job.expect("again 2")
    job.finish()


def test_a_driver_that_only_computes_notices_the_lost_node(start: Start):
    job = start(HEAD + """
ray.init()
print("up", flush=True)
sys.stdin.readline()
print("idle end", flush=True)
""", pty=True)
    job.expect("up")
    job.kill("node")
    job.expect(r"the connection to the node is gone: .* The node of rank 0 \(pid \d+ on \S+\) "
               r"was killed by SIGKILL \(the out-of-memory killer")
    job.say("\n")
    job.expect("idle end")
    job.finish()


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_killed_worker_costs_a_retry(start: Start, name: str):
    job = start(HEAD + f"""
@ray.remote
def once(path):
    if not os.path.exists(path):
        open(path, "w").close()
        print("last words", flush=True)
        os.kill(os.getpid(), signal.{name})
    return "retried"
ray.init()
print(ray.get(once.remote(os.path.join(os.environ["TMPDIR"], "once"))), flush=True)
""")
    output = job.finish()
    assert "last words" in output and "retried" in output


def test_a_warning_to_every_process_is_the_driver_s_affair(start: Start):
    """A batch system sends it (`--signal=USR1@60`) to whatever belongs to the job."""
    job = start(HEAD + """
warned = []
signal.signal(signal.SIGUSR1, lambda *_: warned.append(1))
ray.init(num_cpus=2)
ref = block.remote(os.path.join(os.environ["TMPDIR"], "mark"))
until(os.path.join(os.environ["TMPDIR"], "mark"))
print("up", flush=True)
while not warned:
    ray.wait([ref], timeout=0.1)
print("saved", ray.get(echo.remote(7)), ray.wait([ref], timeout=0), flush=True)
""", HPCRAY_NUM_CPUS="2")
    job.expect("up")
    members = sorted(job.members(), key=lambda member: member.role == "driver")
    assert {"node", "zygote", "worker", "guard", "server"} <= {member.role for member in members}
    for member in members:
        os.kill(member.pid, signal.SIGUSR1)
    job.expect(r"saved 7 \(\[\], \[ObjectRef")
    output = job.finish()
    assert "killed" not in output and "died" not in output


def test_a_killed_zygote_is_replaced(start: Start):
    job = start(HEAD + """
@ray.remote
def slow(path):
    first = not os.path.exists(path)
    open(path, "w").close()
    while first:
        time.sleep(0.01)
    return "retried"
ray.init()
mark = os.path.join(os.environ["TMPDIR"], "once")
ref = slow.remote(mark)
until(mark)
print("running", flush=True)
print(ray.get(ref), ray.get([echo.remote(i) for i in range(5)]), flush=True)
""")
    job.expect("running")
    job.kill("zygote")
    job.expect(r"retried \[0, 1, 2, 3, 4\]")
    output = job.finish()
    assert output.count("starting a new one") == 1
    assert "dies as it starts" not in output, "it did not"


def test_a_killed_sidecar_is_reported_once(start: Start):
    job = start(HEAD + """
ray.init()
assert ray.get(echo.remote(1)) == 1
print("up", flush=True)
sys.stdin.readline()
for i in range(20):
    assert ray.get(echo.remote(i)) == i
print("went on", flush=True)
sys.stdin.readline()
""", pty=True)
    job.expect("up")
    job.kill("server")
    job.expect("Warning: control store died")
    job.say("\n")
    job.expect("went on")
    job.say("\n")
    output = job.finish()
    assert output.count("Warning:") == 1, output


@pytest.mark.parametrize("role", ["guard", "node", "driver"])
def test_no_order_of_deaths_leaves_anything(start: Start, role: str):
    """First the one, then the driver: all are gone."""
    job = start(PENDING)
    job.expect("pending")
    job.kill(role)
    if role != "driver" and job.process.poll() is None:
        os.kill(job.process.pid, signal.SIGKILL)
    job.finish(status=None)


def test_a_stopped_node_does_not_hold_the_driver(start: Start):
    """It is killed after a few seconds, with a line that says so."""
    job = start(PENDING.replace("ray.get(ref)\n", "sys.stdin.readline()\nsys.exit(3)\n"), pty=True)
    job.expect("pending")
    job.kill("node", number=signal.SIGSTOP)
    job.say("\n")
    job.expect("is stopped or hangs, and does not end: killing it", timeout_s=20)
    job.finish(status=3)


def test_a_node_that_hangs_does_not_outlive_its_driver(start: Start):
    job = start(PENDING, HPCRAY_END_TIMEOUT_S="1")
    job.expect("pending")
    job.kill("node", number=signal.SIGSTOP)
    job.kill("driver")
    output = job.finish(status=-signal.SIGKILL)
    assert "hangs: it has not ended 1 s after its driver has. It was killed" in output


@pytest.mark.parametrize("value", ["soon", "0", "inf"])
def test_a_limit_of_the_end_that_is_none(start: Start, value: str):
    output = start(HEAD + "ray.init()", HPCRAY_END_TIMEOUT_S=value).finish(status=1)
    assert f"HPCRAY_END_TIMEOUT_S={value} is not a number of seconds above 0" in output


def test_what_a_task_started_ends_with_the_job(start: Start):
    job = start(HEAD + """
@ray.remote
def leave():
    import subprocess
    return subprocess.Popen(["sleep", "1000"], start_new_session=False).pid
ray.init()
print("child", ray.get(leave.remote()), flush=True)
""")
    job.finish()


@pytest.mark.parametrize("when", ["import", "init"])
def test_an_error_before_the_session(start: Start, when: str):
    job = start({"import": "import hpcray\nraise SystemExit(9)",
                 "init": "import hpcray\nhpcray.init(num_cpus=-1)"}[when])
    job.finish(status=9 if when == "import" else 1)


def test_packages_go_with_a_killed_node(start: Start):
    """What workers have unpacked of a runtime_env is removed by the zygote."""
    job = start(HEAD + """
folder = os.path.join(os.environ["TMPDIR"], "mine")
os.mkdir(folder)
@ray.remote(runtime_env={"working_dir": folder})
def where():
    return os.getcwd()
ray.init()
print("unpacked in", ray.get(where.remote()), flush=True)
try:
    ray.get(ray.remote(time.sleep).remote(1000))
except ray.exceptions.RaySystemError:
    raise SystemExit(3)
""")
    job.expect("unpacked in .*hpcray-packages-")
    job.kill("node")
    job.finish(status=3)
    assert not [name for name in os.listdir(job.environ["TMPDIR"]) if "packages" in name]


def test_a_finaliser_at_the_interpreters_end_starts_no_new_session(start: Start):
    job = start("""
import gc
import hpcray as ray

ray.init(num_cpus=1)

@ray.remote
def f():
    return 1

class Last:
    def __init__(self):
        self.me, self.f = self, f  # a cycle: it waits for the collection at the end

    def __del__(self):
        try:
            self.f.remote()
        except RuntimeError as error:
            print(error, flush=True)

ray.get(f.remote())
ray.shutdown()
gc.collect()
Last()
""")
    assert "the interpreter ends" in job.finish()
