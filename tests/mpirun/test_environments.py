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
