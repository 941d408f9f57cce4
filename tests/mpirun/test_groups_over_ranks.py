"""Placement groups whose bundles lie on several ranks."""

from __future__ import annotations

from ..process.jobs import Start
from .test_objects_between_ranks import HEAD


def test_groups_over_two_ranks(start: Start):
    job = start(HEAD + """
from hpcray.util import placement_group, placement_group_table, remove_placement_group
from hpcray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as In

@ray.remote
def rank():
    return ray.get_runtime_context().get_rank()

@ray.remote(num_cpus=1)
class Actor:
    def rank(self):
        return ray.get_runtime_context().get_rank()

@ray.remote
def hold(path):
    open(path, "w").close()
    time.sleep(1000)

start(num_cpus=2)

def ranks_of(group):
    return [ids.index(node) for node in placement_group_table(group)["bundles_to_node_id"].values()]

spread = placement_group([{"CPU": 1}, {"CPU": 1}], strategy="STRICT_SPREAD")
assert spread.wait(20)
where = ranks_of(spread)
assert sorted(where) == [0, 1]
for index in (0, 1):
    strategy = In(spread, index)
    assert ray.get([rank.options(scheduling_strategy=strategy).remote() for _ in range(5)]) == (
        [where[index]] * 5)
    actor = Actor.options(scheduling_strategy=strategy).remote()
    assert ray.get(actor.rank.remote()) == where[index]
    del actor
print("spread", flush=True)
packed = placement_group([{"CPU": 1}, {"CPU": 1}], strategy="STRICT_PACK")
assert not packed.wait(0.3)  # each rank has one CPU left
inside = [hold.options(scheduling_strategy=In(spread, i), max_retries=0).remote(mark(f"in{i}"))
          for i in (0, 1)]
while not (os.path.exists(mark("in0")) and os.path.exists(mark("in1"))):
    time.sleep(0.005)
remove_placement_group(spread)
for ref in inside:
    try:
        ray.get(ref, timeout=20)
        print("no error")
    except ray.exceptions.TaskPlacementGroupRemoved:
        pass
assert packed.wait(20)
assert len(set(ranks_of(packed))) == 1
print("packed", flush=True)
late = rank.options(scheduling_strategy=In(spread)).remote()
try:
    ray.get(late, timeout=20)
    print("no error")
except ray.exceptions.TaskPlacementGroupRemoved:
    print("removed", flush=True)
remove_placement_group(packed)
while ray.available_resources().get("CPU") != 4:
    time.sleep(0.01)
print("all free", flush=True)
""", ranks=2)
    output = job.finish(timeout_s=60)
    assert output.split("\n")[:4] == ["spread", "packed", "removed", "all free"], output
