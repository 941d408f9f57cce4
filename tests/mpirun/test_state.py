"""The state of a job of two ranks: rows of both, each task once."""

from __future__ import annotations

from ..process.jobs import Start

SCRIPT = """
import fcntl, os, time
import hpcray as ray
from hpcray.util import state
from hpcray.experimental import get_object_locations
from hpcray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

ray.init(num_cpus=2)
ids = [n["NodeID"] for n in sorted(ray.nodes(), key=lambda n: n["Rank"])]
on = [On(i, soft=False) for i in ids]
lock_path = os.path.join(os.environ["TMPDIR"], "lock")
lock = open(lock_path, "w")
fcntl.flock(lock, fcntl.LOCK_EX)

def eventually(condition):
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)

def enter():
    with open(lock_path) as file:
        fcntl.flock(file, fcntl.LOCK_SH)

@ray.remote
def held(x=None):
    enter()
    return os.getpid()

@ray.remote
class Actor:
    def pid(self):
        return os.getpid()

    def held(self):
        enter()

    def look(self):
        return sorted(n.node_id for n in state.list_nodes()), len(
            state.list_tasks(filters=[("name", "=", "there")]))

refs = [held.options(name="here", scheduling_strategy=on[0]).remote()]
refs += [held.options(name="there", scheduling_strategy=on[1]).remote() for _ in range(3)]
tasks = lambda name: sorted((t.state, t.node_id) for t in state.list_tasks(
    filters=[("name", "=", name)]))
eventually(lambda: tasks("here") == [("RUNNING", ids[0])])
eventually(lambda: [s for s, _ in tasks("there")] == [
    "PENDING_NODE_ASSIGNMENT", "RUNNING", "RUNNING"])
running = state.list_tasks(filters=[("state", "=", "running"), ("node_id", "=", ids[1])])
assert {t.name for t in running} == {"there"} and len({t.worker_pid for t in running}) == 2
assert all(t.parent_task_id for t in state.list_tasks(filters=[("name", "=", "there")]))
counts = state.summarize_tasks()["cluster"]["summary"]["held"]["state_counts"]
assert counts == {"RUNNING": 3, "PENDING_NODE_ASSIGNMENT": 1}, counts
assert len(state.list_tasks(limit=2)) == 2
assert state.get_task(refs[-1]).name == "there"
print("tasks", flush=True)

actor = Actor.options(num_cpus=0, scheduling_strategy=on[1]).remote()
pid = ray.get(actor.pid.remote())
[row] = state.list_actors()
assert (row.pid, row.node_id, row.state) == (pid, ids[1], "ALIVE"), row
assert ray.get(actor.look.remote()) == (sorted(ids), 3)
calls = [actor.held.remote() for _ in range(2)]
eventually(lambda: tasks("Actor.held") == [
    ("PENDING_ACTOR_TASK_ORDERING_OR_CONCURRENCY", ids[1]), ("RUNNING", ids[1])])
workers = state.list_workers()
assert {w.node_id for w in workers} == set(ids) and pid in {w.pid for w in workers}
assert [w.worker_type for w in workers].count("DRIVER") == 1
fcntl.flock(lock, fcntl.LOCK_UN)
ray.get(refs + calls)
counts = state.summarize_tasks()["cluster"]["summary"]["held"]["state_counts"]
assert counts == {"FINISHED": 4}, counts
print("actors", flush=True)

@ray.remote
def large():
    return bytes(1_000_000)

made = large.options(scheduling_strategy=on[1]).remote()
ray.wait([made], fetch_local=False)
assert get_object_locations([made])[made]["node_ids"] == [ids[1]]
ray.get(made)
eventually(lambda: sorted(get_object_locations([made])[made]["node_ids"]) == sorted(ids))
[row] = state.get_objects(made.hex())
assert row.object_size >= 1_000_000
ray.get([held.remote(i) for i in range(300)])
assert state.summarize_tasks()["cluster"]["summary"]["held"]["state_counts"] == {"FINISHED": 304}
print("objects", flush=True)
"""


def test_the_state_of_two_ranks(start: Start):
    job = start(SCRIPT, ranks=2)
    output = job.finish()
    assert [line for line in ("tasks", "actors", "objects") if line not in output] == []
