"""A worker's environment is its own node's, with what the driver has changed on top."""

from __future__ import annotations

import pytest

from ..process.jobs import Start

# What a launcher sets per host, and what only one host has.
PER_HOST = ("sh", "-c", """
rank=${OMPI_COMM_WORLD_RANK-$PMI_RANK}
export SLURMD_NODENAME=node$rank SLURM_PROCID=$rank SLURM_LOCALID=0 HOSTNAME=host$rank TAKEN=$rank
export TMPDIR=$TMPDIR/of$rank ONLY_ON_$rank=here
mkdir -p $TMPDIR
exec "$@"
""", "sh")

LOOK = """
import os
import tempfile
import hpcray as ray
from hpcray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

os.environ["BY_DRIVER"] = "driver"
os.environb[b"RAW"] = b"\\xff"
os.environ.pop("TAKEN", None)
top = {"TOP": "<${SLURMD_NODENAME}>", "TMP_TOO": "$TMPDIR"}
ray.init(num_cpus=1, runtime_env={"env_vars": top})
os.environ["TOO_LATE"] = "1"

@ray.remote
def look():
    return dict(os.environ), tempfile.gettempdir()

for node in ray.nodes():
    rank = node["Rank"]
    strategy = On(node["NodeID"], soft=False)
    found, temporary = ray.get(look.options(scheduling_strategy=strategy).remote())
    assert found["SLURMD_NODENAME"] == f"node{rank}", found
    assert found["SLURM_PROCID"] == str(rank)
    assert found["SLURM_LOCALID"] == "0"
    assert found["HOSTNAME"] == f"host{rank}"
    assert found["TMPDIR"] == temporary and temporary.endswith(f"/of{rank}")
    assert [name for name in found if name.startswith("ONLY_ON_")] == [f"ONLY_ON_{rank}"]
    assert found["BY_DRIVER"] == "driver"
    assert os.fsencode(found["RAW"]) == b"\\xff"
    assert "TAKEN" not in found and "TOO_LATE" not in found
    assert found["TOP"] == f"<node{rank}>"
    assert found["TMP_TOO"] == temporary
    own = look.options(scheduling_strategy=strategy,
                       runtime_env={"env_vars": {"SLURMD_NODENAME": "mine", "BY_DRIVER": "task"}})
    found, _ = ray.get(own.remote())
    assert (found["SLURMD_NODENAME"], found["BY_DRIVER"]) == ("mine", "task")
ray.shutdown()
del os.environ["BY_DRIVER"]
os.environ["SECOND"] = "yes"
ray.init(num_cpus=1)
assert all("SECOND" in found and "BY_DRIVER" not in found
           for found, _ in ray.get([look.remote() for _ in range(4)]))
print("all right")
"""


@pytest.mark.parametrize("bare", [False, True])
def test_each_node_has_its_own(start: Start, bare: bool):
    job = start(LOOK, ranks=2, bare=bare, wrapper=PER_HOST)
    assert "all right" in job.finish()

GPUS = """
import os
import hpcray as ray
from hpcray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

ray.init(num_cpus=1{options})

@ray.remote
def see():
    return ray.get_gpu_ids(), os.environ.get("CUDA_VISIBLE_DEVICES")

for node in ray.nodes():
    strategy = On(node["NodeID"], soft=False)
    count = int(node["Resources"].get("GPU", 0))
    seen = ray.get([see.options(scheduling_strategy=strategy, num_gpus=wanted).remote()
                    for wanted in (0, count)])
    print("rank", node["Rank"], seen)
"""


@pytest.mark.parametrize(("options", "visible", "seen"), [
    ("", "7,5,3", [(["7", "5"], "7,5"), (["3"], "3")]),
    (", num_gpus=1", "7,5", [(["7"], "7"), (["5"], "5")]),
    (", num_gpus=2", None, [([0, 1], "0,1"), ([2, 3], "2,3")]),
])
def test_ranks_of_one_host_share_its_gpus(start: Start, options: str, visible: str | None, seen):
    wrapper = ("env", "-u", "CUDA_VISIBLE_DEVICES")
    if visible is not None:
        wrapper += (f"CUDA_VISIBLE_DEVICES={visible}",)
    output = start(GPUS.replace("{options}", options), ranks=2, wrapper=wrapper).finish()
    for rank, own in enumerate(seen):
        assert f"rank {rank} {[([], visible), own]}\n" in output


def test_more_gpus_than_a_rank_has_are_refused(start: Start):
    job = start("""
        import hpcray as ray
        try:
            ray.init(num_gpus=2)
        except ValueError as error:
            print("refused:", error)
        ray.init(num_gpus=1)
        print("then", ray.cluster_resources()["GPU"])
    """, ranks=2, wrapper=("env", "CUDA_VISIBLE_DEVICES=4,5,6"))
    output = job.finish()
    assert "refused: num_gpus=2, but rank 1 " in output and "then 2.0" in output
