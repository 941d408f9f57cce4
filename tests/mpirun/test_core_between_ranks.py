"""Environments, names, cancelling, errors, deaths and limits of what runs on another rank."""

from __future__ import annotations

from ..process.jobs import Start
from . import test_objects_between_ranks

HEAD = test_objects_between_ranks.HEAD + """
WAIT_S = 20

def until(condition):
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)

def add(name):
    with open(mark(name), "a") as file:
        file.write(".")

def count(name):
    return os.path.getsize(mark(name)) if os.path.exists(mark(name)) else 0

def my_rank():
    return ray.get_runtime_context().get_rank()

def failure(kind, ref):
    try:
        value = ray.get(ref, timeout=WAIT_S)
    except kind as error:
        return error
    raise AssertionError(f"{value!r} instead of {kind.__name__}")

@ray.remote
def echo(value=None):
    return value
"""


def test_environments_and_names(start: Start):
    job = start(HEAD + """
import shutil
from hpcray.util import list_named_actors

def look():
    import env_helper
    import env_package
    with open("sub/data.bin", "rb") as data:
        return my_rank(), env_helper.VALUE, env_package.NAME, data.read(), os.environ["OF_TASK"]

@ray.remote
def parent(rank):
    return my_rank(), ray.get(ray.remote(look).options(scheduling_strategy=on[rank]).remote())

@ray.remote
def packs(rank):
    # A directory that only this task knows, for a child on the other rank.
    write(mark("third"), "third", b"3")
    child = ray.remote(look).options(
        scheduling_strategy=on[rank], runtime_env={"working_dir": mark("third")}).remote()
    shutil.rmtree(mark("third"))
    return ray.get(child)

@ray.remote
class Lives:
    def look(self):
        return look()

@ray.remote
def bare():
    try:
        import env_helper
    except ImportError:
        return "OF_TASK" in os.environ, os.path.exists("sub/data.bin")

def write(folder, value, data):
    os.makedirs(os.path.join(folder, "sub"))
    with open(os.path.join(folder, "env_helper.py"), "w") as module:
        module.write(f"VALUE = {value!r}")
    with open(os.path.join(folder, "sub", "data.bin"), "wb") as file:
        file.write(data)

start(num_cpus=2)
DATA = np.random.default_rng(1).bytes(300_000)  # neither inline nor smaller when packed
write(mark("first"), "first", DATA)
write(mark("second"), "second", b"2")
os.makedirs(mark("lib/env_package"))
with open(mark("lib/env_package/__init__.py"), "w") as module:
    module.write("NAME = 'package'")
envs = [{"working_dir": mark(name), "py_modules": [mark("lib/env_package")],
         "env_vars": {"OF_TASK": name}} for name in ("first", "second")]
tasks = [ray.remote(look).options(runtime_env=env, scheduling_strategy=on[1]) for env in envs]
parents = [parent.options(runtime_env=envs[0], scheduling_strategy=s) for s in on]
lives = Lives.options(runtime_env=envs[0], scheduling_strategy=on[1]).remote()
refs = [tasks[0].remote(), tasks[1].remote(), tasks[0].remote(), lives.look.remote()]
nested = [parents[1].remote(0), parents[0].remote(1)]
other = packs.options(runtime_env=envs[0], scheduling_strategy=on[1]).remote(0)
for name in ("first", "second", "lib"):
    shutil.rmtree(mark(name))  # what is there comes from the packages
first, second = (1, "first", "package", DATA, "first"), (1, "second", "package", b"2", "second")
assert ray.get(refs, timeout=WAIT_S) == [first, second, first, first]
assert ray.get(nested, timeout=WAIT_S) == [(1, (0, *first[1:])), (0, first)]
assert ray.get(other, timeout=WAIT_S) == (0, "third", "package", b"3", "first")
for strategy in on:
    assert ray.get(bare.options(scheduling_strategy=strategy).remote()) == (False, False)
print("environments", flush=True)

@ray.remote(num_cpus=0)
class Counter:
    def __init__(self):
        add("made")
        self.value = 0
    def add(self):
        self.value += 1
        return self.value, my_rank()
    def pid(self):
        return os.getpid()

@ray.remote
def find(name, refused):
    handles = [ray.get_actor(name), Counter.options(name=name, get_if_exists=True).remote()]
    try:
        Counter.options(name=name).remote()
        raise AssertionError(f"{name} was taken twice")
    except ValueError as error:
        assert name in str(error), error
    try:
        ray.get_actor(refused)
        raise AssertionError(f"{refused} was found")
    except ValueError:
        pass
    return my_rank(), [ray.get(h.add.remote()) for h in handles], sorted(list_named_actors())

@ray.remote
def make(name, rank):
    actor = Counter.options(name=name, scheduling_strategy=on[rank]).remote()
    return [actor]

@ray.remote
def one_of_all():
    actor = Counter.options(name="shared", get_if_exists=True, lifetime="detached",
                            scheduling_strategy=on[my_rank()]).remote()
    return ray.get(actor.pid.remote())

counter = Counter.options(name="there", scheduling_strategy=on[1]).remote()
found = find.options(scheduling_strategy=on[1]).remote("there", "nobody")
assert ray.get(found, timeout=WAIT_S) == (1, [(1, 1), (2, 1)], ["there"])
[made] = ray.get(make.options(scheduling_strategy=on[1]).remote("here", 0), timeout=WAIT_S)
assert ray.get_actor("here") == made
found = find.options(scheduling_strategy=on[1]).remote("here", "nobody")
assert ray.get(found, timeout=WAIT_S) == (1, [(1, 0), (2, 0)], ["here", "there"])
assert find.__wrapped__("there", "nobody")[1:] == ([(3, 1), (4, 1)], ["here", "there"])
assert count("made") == 2
pids = ray.get([one_of_all.options(scheduling_strategy=on[i % 2]).remote() for i in range(20)],
               timeout=WAIT_S)
assert len(set(pids)) == 1 and count("made") == 3, (pids, count("made"))
ray.kill(counter)
until(lambda: sorted(list_named_actors()) == ["here", "shared"])
again = Counter.options(name="there", scheduling_strategy=on[0]).remote()
found = find.options(scheduling_strategy=on[1]).remote("there", "nobody")
assert ray.get(found, timeout=WAIT_S)[1] == [(1, 0), (2, 0)]
print("names", flush=True)
""", ranks=2)
    output = job.finish(timeout_s=60)
    assert [line for line in ("environments", "names") if f"{line}\n" not in output] == []


def test_a_name_looked_up_elsewhere_while_its_owner_drops_it(start: Start):
    """Made on either rank, placed on the other, asked for by both: each handle can be called."""
    job = start(HEAD + """
from hpcray.util import list_named_actors

@ray.remote(num_cpus=0)
class Lock:
    def acquire(self, number):
        return number

@ray.remote(num_cpus=1)
def loop(rounds, rank):
    for number in range(rounds):
        lock = Lock.options(name="lock", get_if_exists=True, scheduling_strategy=on[rank]).remote()
        assert ray.get(lock.acquire.remote(number), timeout=WAIT_S) == number
        del lock

@ray.remote(num_cpus=1)
def look(rounds):
    found = 0
    for number in range(rounds):
        try:
            lock = ray.get_actor("lock")
        except ValueError:
            continue
        assert ray.get(lock.acquire.remote(number), timeout=WAIT_S) == number
        found += 1
        del lock
    return found

start(num_cpus=2)
others = [loop.options(scheduling_strategy=on[1]).remote(20, 0),
          look.options(scheduling_strategy=on[1]).remote(60)]
loop.__wrapped__(20, 1)
ray.get(others, timeout=2 * WAIT_S)
until(lambda: not list_named_actors())
print("looped", flush=True)
""", ranks=2)
    assert "looped\n" in job.finish(timeout_s=90)


def test_cancelling_from_another_rank(start: Start):
    job = start(HEAD + """
import asyncio

@ray.remote(num_cpus=1)
def spin(name):
    try:
        add(f"{name}.begun")
        while True:
            time.sleep(0.01)
    except KeyboardInterrupt:
        add(f"{name}.interrupted")
        raise

@ray.remote(num_cpus=1)
def note(name, *others):
    add(name)

@ray.remote(num_cpus=0)
def cancel(refs):
    ray.cancel(refs[0])

@ray.remote(num_cpus=0)
def parent(name, rank):
    return ray.get(spin.options(scheduling_strategy=on[rank]).remote(name))

@ray.remote(num_cpus=0)
def pid_of_spin(name):
    with open(mark(f"{name}.pid"), "w") as file:
        file.write(str(os.getpid()))
    add(f"{name}.begun")
    while True:
        time.sleep(0.01)

@ray.remote(num_cpus=0)
class Sync:
    def hold(self):
        add("hold")
        until(lambda: count("go"))
    def note(self):
        add("noted call")

@ray.remote(num_cpus=0)
class Async:
    async def wait(self):
        add("wait.begun")
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            add("wait.cancelled")
            raise

Cancelled = ray.exceptions.TaskCancelledError

def begun(task, name, *args):
    ref = task.remote(name, *args)
    until(lambda: count(f"{name}.begun"))
    return ref

def passed_there():
    # What one rank tells another arrives in order: when this has run, what was sent is there.
    ray.get(echo.options(num_cpus=0, scheduling_strategy=on[1]).remote(), timeout=WAIT_S)

start(num_cpus=1)
spins = [spin.options(scheduling_strategy=s) for s in on]
running = begun(spins[1], "plain")
queued = note.options(scheduling_strategy=on[1]).remote("queued")
late = note.options(scheduling_strategy=on[0]).remote("late", running)
passed_there()
for waiting in (queued, late):
    ray.cancel(waiting)
    failure(Cancelled, waiting)
assert count("plain.interrupted") == 0 and ray.wait([running], timeout=0)[0] == []
ray.cancel(running)
failure(Cancelled, running)
assert count("plain.interrupted") == 1
# The only CPU there is free again.
ray.get(note.options(scheduling_strategy=on[1]).remote("after"), timeout=WAIT_S)
assert (count("queued"), count("late"), count("after")) == (0, 0, 1)
print("running and waiting", flush=True)

for rank in (0, 1):
    for canceller in (0, 1):
        name = f"{rank} by {canceller}"
        running = begun(spins[rank], name)
        ray.get(cancel.options(scheduling_strategy=on[canceller]).remote([running]),
                timeout=WAIT_S)
        failure(Cancelled, running)
        assert count(f"{name}.interrupted") == 1, name
print("by others", flush=True)

for rank in (0, 1):
    name = f"child on {rank}"
    running = begun(parent.options(scheduling_strategy=on[1 - rank]), name, rank)
    ray.cancel(running)
    failure(Cancelled, running)
    until(lambda: count(f"{name}.interrupted") == 1)
print("children", flush=True)

running = begun(pid_of_spin.options(scheduling_strategy=on[1]), "forced")
with open(mark("forced.pid")) as file:
    pid = int(file.read())
assert os.path.exists(f"/proc/{pid}")
ray.cancel(running, force=True)
failure((Cancelled, ray.exceptions.WorkerCrashedError), running)
until(lambda: not os.path.exists(f"/proc/{pid}"))
assert ray.get(echo.options(scheduling_strategy=on[1]).remote(5), timeout=WAIT_S) == 5
assert count("forced.begun") == 1
print("force", flush=True)

actor = Sync.options(scheduling_strategy=on[1]).remote()
held, waiting = actor.hold.remote(), actor.note.remote()
until(lambda: count("hold"))
ray.cancel(waiting)
passed_there()
add("go")
failure(Cancelled, waiting)
assert ray.get(held, timeout=WAIT_S) is None and count("noted call") == 0
ray.get(actor.note.remote(), timeout=WAIT_S)
actor = Async.options(scheduling_strategy=on[1]).remote()
running = actor.wait.remote()
until(lambda: count("wait.begun"))
ray.cancel(running)
failure(Cancelled, running)
until(lambda: count("wait.cancelled"))
assert count("noted call") == 1
print("calls", flush=True)
""", ranks=2)
    output = job.finish(timeout_s=60)
    for line in ("running and waiting", "by others", "children", "force", "calls"):
        assert f"{line}\n" in output, output


def test_errors_and_deaths(start: Start):
    job = start(HEAD + """
class Mine(ValueError):
    def __init__(self, code, *, hint):
        super().__init__(f"code {code}")
        self.code = code
        self.hint = hint

def raise_mine(code):
    try:
        {}["missing"]
    except KeyError as error:
        raise Mine(code, hint=[os.getpid()]) from error

@ray.remote
def fail(code):
    raise_mine(code)

@ray.remote
def relay(code, rank):
    return ray.get(fail.options(scheduling_strategy=on[rank]).remote(code))

@ray.remote
class Fails:
    def fail(self, code):
        raise_mine(code)
    def pid(self):
        return os.getpid()

def check(ref, rank, code, name):
    error = failure(Mine, ref)
    assert isinstance(error, ray.exceptions.RayTaskError)
    assert (error.code, error.rank, error.hint) == (code, rank, [error.pid])
    assert type(error.cause) is Mine and error.cause.code == code and error.cause.args == (
        f"code {code}",)
    lines = [f"hpcray::{name}()", f"rank={rank}", f"pid={error.pid}", "in raise_mine",
             "KeyError: 'missing'", "direct cause", f"Mine: code {code}"]
    assert [line for line in lines if line not in str(error)] == [], str(error)
    assert error.pid != os.getpid()
    return error

start(num_cpus=2)
there = fail.options(scheduling_strategy=on[1])
check(there.remote(1), 1, 1, "fail")
failed = there.remote(2)
passed_on = failure(Mine, echo.options(scheduling_strategy=on[0]).remote(failed))
assert passed_on.code == 2 and "rank=1" in str(passed_on), str(passed_on)
relayed = failure(Mine, relay.options(scheduling_strategy=on[1]).remote(3, 0))
assert relayed.code == 3
for part in ("hpcray::relay()", "rank=1", "hpcray::fail()", "rank=0"):
    assert part in str(relayed), str(relayed)
actor = Fails.options(scheduling_strategy=on[1]).remote()
error = check(actor.fail.remote(4), 1, 4, "Fails.fail")
assert error.pid == ray.get(actor.pid.remote(), timeout=WAIT_S)
print("errors", flush=True)

@ray.remote(num_cpus=0)
def wait_for(name):
    until(lambda: count(name))

@ray.remote
def fail_at_length(size):
    raise ValueError("x" * size)

@ray.remote
def first_of(refs):
    return len(failure(ValueError, refs).cause.args[0])

for size in (10, 1_000_000):  # inline, and in memory that the reader's node has to copy
    for failing, reading in ((0, 1), (1, 0), (1, 1)):
        name = f"slow {size} {failing} {reading}"
        slow = wait_for.options(scheduling_strategy=on[0]).remote(name)
        refs = [slow, fail_at_length.options(scheduling_strategy=on[failing]).remote(size)]
        found = ray.get(
            first_of.options(scheduling_strategy=on[reading]).remote(refs), timeout=WAIT_S)
        assert found == size
        assert ray.wait([slow], timeout=0)[1] == [slow]
        add(name)
        ray.get(slow, timeout=WAIT_S)
print("fails fast", flush=True)

@ray.remote
def succeeds_later(name):
    add(name)
    if count(name) < 3:
        raise ValueError("x" * 1_000_000)
    return "y" * 1_000_000

later = succeeds_later.options(
    scheduling_strategy=on[1], max_retries=2, retry_exceptions=True).remote("later")
reads = ray.remote(lambda refs: ray.get(refs[0])[0])
assert ray.get([reads.options(scheduling_strategy=s).remote([later]) for s in on],
               timeout=WAIT_S) == ["y", "y"]

@ray.remote
def attempt(name, good):
    add(name)
    if count(name) < good:
        raise Mine(count(name), hint=None)
    return count(name), my_rank()

def attempts(name, good, **options):
    return attempt.options(scheduling_strategy=on[1], **options).remote(name, good)

assert ray.get(attempts("third", 3, max_retries=2, retry_exceptions=True),
               timeout=WAIT_S) == (3, 1)
assert failure(Mine, attempts("never", 9, max_retries=2, retry_exceptions=True)).code == 3
assert failure(Mine, attempts("once", 9, max_retries=2)).code == 1
assert failure(Mine, attempts("other", 9, max_retries=2, retry_exceptions=[KeyError])).code == 1
assert failure(Mine, attempts("such", 9, max_retries=1, retry_exceptions=[ValueError])).code == 2
assert [count(name) for name in ("third", "never", "once", "other", "such")] == [3, 3, 1, 1, 2]
print("retries", flush=True)

@ray.remote(num_cpus=1)
class Mortal:
    def __init__(self, name):
        add(f"{name} made")
        self.calls = 0
    def call(self):
        self.calls += 1
        return self.calls, my_rank(), os.getpid()
    def die(self, name):
        add(name)
        os._exit(3)
    def die_once(self, name):
        add(name)
        if count(name) == 1:
            os._exit(3)
        return count(name), my_rank()

@ray.remote
def call(actor):
    return ray.get(actor.call.remote(), timeout=WAIT_S)

def when_up(actor):
    deadline_s = time.monotonic() + WAIT_S
    while True:
        try:
            return ray.get(actor.call.remote(), timeout=WAIT_S)
        except ray.exceptions.ActorUnavailableError:
            assert time.monotonic() < deadline_s

there = Mortal.options(scheduling_strategy=on[1])
Died = ray.exceptions.ActorDiedError
retried = there.options(max_restarts=1, max_task_retries=1).remote("retried")
_, rank, pid = ray.get(retried.call.remote(), timeout=WAIT_S)
assert rank == 1
assert ray.get(retried.die_once.remote("dies once"), timeout=WAIT_S) == (2, 1)
calls, rank, now = ray.get(call.options(scheduling_strategy=on[0]).remote(retried))
assert (calls, rank) == (1, 1) and now != pid, (calls, rank, now, pid)
assert count("retried made") == 2
assert "max_restarts=1 is used up" in str(failure(Died, retried.die.remote("used up")))
assert (count("used up"), count("retried made")) == (1, 2)
print("call sent again", flush=True)

restarted = there.options(max_restarts=1).remote("restarted")
_, rank, pid = ray.get(restarted.call.remote(), timeout=WAIT_S)
failure(ray.exceptions.RayActorError, restarted.die.remote("not again"))
calls, rank, now = when_up(restarted)
assert (calls, rank) == (1, 1) and now != pid, (calls, rank, now, pid)
assert (count("not again"), count("restarted made")) == (1, 2)
print("restarted", flush=True)

del restarted
mortal = there.remote("mortal")
calls = [mortal.call.remote(), mortal.die.remote("dies"), mortal.call.remote()]
assert ray.get(calls[0], timeout=WAIT_S)[:2] == (1, 1)
text = str(failure(Died, calls[1]))
assert "(rank 1) exited with status 3" in text, text
failure(Died, calls[2])
failure(Died, mortal.call.remote())
for strategy in on:
    failure(Died, call.options(scheduling_strategy=strategy).remote(mortal))
assert (count("dies"), count("mortal made")) == (1, 1)
print("died", flush=True)
""", ranks=2)
    output = job.finish(timeout_s=60)
    for line in ("errors", "fails fast", "retries", "call sent again", "restarted", "died"):
        assert f"{line}\n" in output, output


def test_limits_of_calls_and_captured_children(start: Start):
    job = start(HEAD + """
import threading
from hpcray.util import (
    get_current_placement_group, placement_group, placement_group_table, remove_placement_group)
from hpcray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as In

@ray.remote(num_cpus=0, concurrency_groups={"io": 2, "one": 1})
class Grouped:
    def __init__(self):
        self.lock = threading.Lock()
        self.inside = {"io": 0, "one": 0}
        self.most = dict(self.inside)

    def hold(self, group):
        with self.lock:
            self.inside[group] += 1
            self.most[group] = max(self.most[group], self.inside[group])
        add(group)
        until(lambda: count("go"))
        with self.lock:
            self.inside[group] -= 1

    @ray.method(concurrency_group="io")
    def io(self):
        self.hold("io")

    @ray.method(concurrency_group="one")
    def one(self):
        self.hold("one")

    def look(self):
        return my_rank(), self.inside, self.most

@ray.remote
def call(actor):
    return [actor.io.remote(), actor.one.remote()]

start(num_cpus=2)
grouped = Grouped.options(scheduling_strategy=on[1]).remote()
held = [grouped.io.remote() for _ in range(4)] + [grouped.one.remote() for _ in range(2)]
held += ray.get(call.options(scheduling_strategy=on[1]).remote(grouped), timeout=WAIT_S)
until(lambda: count("io") >= 2 and count("one") >= 1)
assert ray.wait(held, timeout=0.2)[0] == []
# The default group is free; the others are full and no more than that.
assert ray.get(grouped.look.remote(), timeout=WAIT_S) == (1, *[{"io": 2, "one": 1}] * 2)
moved = grouped.look.options(concurrency_group="one").remote()
assert ray.wait([moved], timeout=0.2)[0] == []
add("go")
ray.get(held, timeout=WAIT_S)
assert ray.get(moved, timeout=WAIT_S)[2] == {"io": 2, "one": 1}
assert (count("io"), count("one")) == (5, 3)
print("groups", flush=True)

@ray.remote(num_cpus=0, max_pending_calls=2)
class Limited:
    def hold(self):
        add("held")
        until(lambda: count("release"))
        return my_rank()
    def echo(self, value):
        return value

@ray.remote
def over(actor):
    refs = [actor.echo.remote(i) for i in range(2)]
    try:
        actor.echo.remote(2)
        return "no limit"
    except ray.exceptions.PendingCallsLimitExceeded:
        add("release")
        return ray.get(refs, timeout=WAIT_S)

limited = Limited.options(scheduling_strategy=on[1]).remote()
held = [limited.hold.remote() for _ in range(2)]
until(lambda: count("held"))
try:
    limited.hold.remote()
    print("no limit")
except ray.exceptions.PendingCallsLimitExceeded:
    pass
# Who calls has a count of its own.
found = ray.get(over.options(scheduling_strategy=on[1]).remote(limited), timeout=WAIT_S)
assert found == [0, 1], found
assert ray.get(held, timeout=WAIT_S) == [1, 1] and count("held") == 2
for value in range(5):
    assert ray.get(limited.echo.remote(value), timeout=WAIT_S) == value
print("pending", flush=True)

@ray.remote(num_cpus=1)
def where():
    return my_rank(), get_current_placement_group()

@ray.remote(num_cpus=1)
class Child:
    def where(self):
        return my_rank(), get_current_placement_group()

@ray.remote(num_cpus=1)
def parent():
    child = Child.remote()
    return my_rank(), ray.get([where.remote(), child.where.remote()], timeout=WAIT_S), ray.get(
        where.options(scheduling_strategy="DEFAULT").remote(), timeout=WAIT_S)

# Each takes a whole rank; what is on rank 1 stays.
groups = [placement_group([{"CPU": 2}]) for _ in range(2)]
assert all(group.wait(WAIT_S) for group in groups)
[on_0, on_1] = sorted(groups, key=lambda g: ids.index(
    placement_group_table(g)["bundles_to_node_id"][0]))
assert placement_group_table(on_1)["bundles_to_node_id"] == {0: ids[1]}
remove_placement_group(on_0)
until(lambda: ray.available_resources().get("CPU") == 2)
# Rank 1 has no CPU but those of the group: who is not captured runs on rank 0.
for captures, child in ((True, (1, on_1)), (None, (0, None)), (True, (1, on_1))):
    strategy = In(on_1, 0, placement_group_capture_child_tasks=captures)
    found = ray.get(parent.options(scheduling_strategy=strategy).remote(), timeout=WAIT_S)
    assert found == (1, [child, child], (0, None)), (captures, found)
print("captured", flush=True)
""", ranks=2)
    output = job.finish(timeout_s=60)
    assert "no limit" not in output
    for line in ("groups", "pending", "captured"):
        assert f"{line}\n" in output, output
