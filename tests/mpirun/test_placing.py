"""Where tasks and actors run, over real ranks: labels per rank, preferences, spreading, affinities,
priorities."""

from __future__ import annotations

from ..process.jobs import Start
from .test_objects_between_ranks import HEAD

# Every rank of a bare launch comes by here, so each can be told its own labels.
LABELS = """
import os
me = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0"))
os.environ["HPCRAY_LABELS"] = ("zone=a", '{"zone": "b", "gpu": "yes"}')[int(me)]
"""


def test_placing_on_two_ranks(start: Start):
    job = start(LABELS + HEAD + """
from hpcray.util.scheduling_strategies import (
    DoesNotExist, Exists, In, NodeLabelSchedulingStrategy as Labels)

@ray.remote(num_cpus=1)
def rank(seconds=0.0):
    time.sleep(seconds)
    return ray.get_runtime_context().get_rank()

@ray.remote(num_cpus=1)
class Actor:
    def rank(self):
        return ray.get_runtime_context().get_rank()

start(num_cpus=4, labels={"tier": "fast"})
labels = [n["Labels"] for n in sorted(ray.nodes(), key=lambda n: n["Rank"])]
assert [one["zone"] for one in labels] == ["a", "b"], labels
assert [one["ray.io/node-id"] for one in labels] == ids
assert [one["tier"] for one in labels] == ["fast", "fast"]

def ranks(count=8, seconds=0.0, **options):
    return ray.get([rank.options(**options).remote(seconds) for _ in range(count)], timeout=30)

def all_free():
    while ray.available_resources().get("CPU") != 8:
        time.sleep(0.01)

def home(**options):
    actor = Actor.options(**options).remote()
    return ray.get(actor.rank.remote(), timeout=30)

for expected, options in (
    (0, {"label_selector": {"zone": "a"}}), (1, {"label_selector": {"zone": "!a"}}),
    (1, {"label_selector": {"zone": "in(b,c)", "tier": "fast"}}),
    (1, {"scheduling_strategy": Labels({"gpu": Exists()})}),
    (0, {"scheduling_strategy": Labels({"gpu": DoesNotExist()})}),
    (1, {"scheduling_strategy": Labels({"tier": Exists()}, soft={"gpu": Exists()})}),
):
    assert set(ranks(**options) if "soft" not in str(options) else ranks(3, **options)) == {
        expected}, options
    assert home(**options) == expected, options
    all_free()
# Alternatives: the first that there is, and not where the second one is at hand.
for first, second, expected in (("b", "a", 1), ("x", "a", 0), ("x", "b", 1)):
    options = {"label_selector": {"zone": first},
               "fallback_strategy": [{"label_selector": {"zone": second}}]}
    assert set(ranks(3, **options)) == {expected}, (first, second)
    assert home(**options) == expected, (first, second)
    all_free()
few = ranks(3, 0.05, scheduling_strategy=Labels(None, soft={"zone": In("b")}))
assert few == [1] * 3, few
assert set(ranks(16, 0.1, scheduling_strategy=Labels(None, soft={"zone": In("b")}))) == {0, 1}
nowhere = rank.options(label_selector={"zone": "c"}).remote()
assert ray.wait([nowhere], timeout=0.2)[0] == []
ray.cancel(nowhere)
print("labels", flush=True)

together = ranks(4, 0.3, scheduling_strategy="SPREAD")
assert sorted(together) == [0, 0, 1, 1], together
alone = [ranks(1, scheduling_strategy="SPREAD")[0] for _ in range(6)]
assert sorted(alone) == [0, 0, 0, 1, 1, 1], alone
many = ranks(400, 0.002, scheduling_strategy="SPREAD")
assert min(many.count(0), many.count(1)) > 40, many
all_free()  # node 0 has heard so: actors are spread over the nodes it knows to have room
actors = [Actor.options(scheduling_strategy="SPREAD").remote() for _ in range(4)]
where = sorted(ray.get([a.rank.remote() for a in actors], timeout=30))
assert where == [0, 0, 1, 1], where
del actors
all_free()
print("spread", flush=True)

@ray.remote(num_cpus=4, max_retries=0)
def fill(name):
    open(mark(name), "w").close()
    while not os.path.exists(mark("go")):
        time.sleep(0.005)

full = [fill.options(scheduling_strategy=on[1]).remote("full")]
while not os.path.exists(mark("full")):
    time.sleep(0.005)
assert ranks(3, scheduling_strategy=On(ids[1], True, _spill_on_unavailable=True)) == [0] * 3
assert home(scheduling_strategy=On(ids[1], True, _spill_on_unavailable=True)) == 0
strict = On(ids[1], False, _fail_on_unavailable=True)
for ask, error in ((lambda: ranks(1, scheduling_strategy=strict), "TaskUnschedulableError"),
                   (lambda: home(scheduling_strategy=strict), "ActorUnschedulableError"),
                   (lambda: ranks(1, num_cpus=9, scheduling_strategy=on[1]),
                    "TaskUnschedulableError")):
    try:
        print("no error", ask())
    except ray.exceptions.RayError as found:
        assert type(found).__name__ == error, found
assert ranks(1, scheduling_strategy=On("0" * 54 + "63", True)) in ([0], [1])
print("affinity", flush=True)

@ray.remote(num_cpus=4, max_retries=0)
def note(number):
    with open(mark("order"), "a") as file:
        file.write(f"{number} ")
    time.sleep(0.02)

order = [0, 2, -1, 0, 2, 1]
full += [note.options(priority=p, scheduling_strategy=on[1]).remote(p) for p in order]
# What one rank tells another arrives in order: when this has run, the others wait there.
ranks(1, num_cpus=0, scheduling_strategy=on[1])
open(mark("go"), "w").close()
ray.get(full, timeout=30)
assert open(mark("order")).read().split() == [str(p) for p in sorted(order, reverse=True)]
print("priority", flush=True)
""", ranks=2, bare=True)
    output = job.finish(timeout_s=90)
    for done in ("labels", "spread", "affinity", "priority"):
        assert f"{done}\n" in output, output


def test_equal_tasks_start_in_the_order_of_their_submission(start: Start):
    job = start(HEAD + """
@ray.remote
def work(i):
    began = time.time()
    time.sleep(0.1)
    return began, i

start(num_cpus=1)
ray.get([work.remote(-1) for _ in range(4)])  # both ranks have workers
order = [i for _, i in sorted(ray.get([work.remote(i) for i in range(40)]))]
# Two begin at a time, one on each rank.
assert all(abs(i - place) <= 2 for place, i in enumerate(order)), order
print("in order")
""", ranks=2)
    assert "in order" in job.finish()
