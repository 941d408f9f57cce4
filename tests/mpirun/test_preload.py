"""What the driver has imported is imported by every node, once."""

from __future__ import annotations

import pytest

from ..process.jobs import Start

LOOK = """
import pandas
import hpcray as ray
from hpcray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

@ray.remote(num_cpus=0)
class Look:
    def modules(self):
        import sys
        return [name for name in ("pandas", "iniconfig") if name in sys.modules]

ray.init(num_cpus=1, preload="auto")
nodes = [On(node["NodeID"], soft=False) for node in ray.nodes()]
assert len(nodes) == 2
for node in nodes:
    look = Look.options(scheduling_strategy=node).remote()
    assert ray.get(look.modules.remote()) == ["pandas"]

import iniconfig  # meanwhile

@ray.remote(num_cpus=0)
class Later:
    def modules(self):
        import sys
        return [name for name in ("pandas", "iniconfig") if name in sys.modules]

for node in nodes:  # one more than there are workers
    actors = [Later.options(scheduling_strategy=node).remote() for _ in range(4)]
    assert ray.get(actors[-1].modules.remote()) == ["pandas", "iniconfig"]
print("all right")
"""


@pytest.mark.parametrize("bare", [False, True])
def test_on_every_node(start: Start, bare: bool):
    pytest.importorskip("pandas")
    job = start(LOOK, ranks=2, bare=bare)
    assert "all right" in job.finish(timeout_s=60)
