"""The scripts of `slurm/` in a real Slurm: results, places, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .conftest import Submit

TWO = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=400")
THREE = ("--nodes=3", "--ntasks-per-node=1", "--cpus-per-task=2", "--mem=400")

HEAD = """
import os, sys
import hpcray as ray
from hpcray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

@ray.remote(num_cpus=0)
def square(x):
    return x * x, os.environ.get("SLURMD_NODENAME"), os.environ.get("CUDA_VISIBLE_DEVICES")

ray.init()
nodes = sorted(ray.nodes(), key=lambda node: node["Rank"])
found = ray.get([square.options(scheduling_strategy=On(node["NodeID"], soft=False)).remote(i)
                 for i in range(10) for node in nodes])
print("args", sys.argv[1:], "sum", sum(value for value, _, _ in found), flush=True)
print("places", *sorted({(i % len(nodes), place) for i, (_, place, _) in enumerate(found)}))
print("cpus", ray.cluster_resources()["CPU"], "gpus", ray.cluster_resources().get("GPU"))
"""


@pytest.mark.parametrize("mpirun", [False, True])
def test_several_nodes(submit: Submit, mpirun: bool):
    """The driver is on the first node; each rank's workers see the node they are on."""
    job = submit(HEAD, "a", "b c", options=THREE, HPCRAY_USE_MPIRUN=str(int(mpirun)))
    output = job.finish()
    assert "args ['a', 'b c'] sum 855" in output
    assert "places (0, 'n1') (1, 'n2') (2, 'n3')" in re.sub(r"'n\d+'", _numbered(), output)
    assert "cpus 6.0" in output, "--cpus-per-task on every node"


def _numbered() -> object:
    """Replaces the names of nodes by n1, n2, ... in the order of their first use."""
    names: dict[str, str] = {}
    return lambda match: names.setdefault(match[0], f"'n{len(names) + 1}'")


def test_one_node(submit: Submit):
    job = submit(HEAD, "a", template="single_node.sbatch",
                 options=("--cpus-per-task=2", "--mem=400"))
    output = job.finish()
    assert "args ['a'] sum 285" in output and "cpus 2.0" in output


def test_gpus(submit: Submit):
    """On one node: all of these are of one host, and ranks of one host share its GPUs."""
    job = submit(HEAD + """
@ray.remote(num_cpus=0, num_gpus=1)
class Holds:
    def device(self):
        return os.environ["CUDA_VISIBLE_DEVICES"]

actors = [Holds.remote() for _ in range(2)]
print("devices", *sorted(ray.get([a.device.remote() for a in actors])))
""", template="gpu_sweep.sbatch", options=(*TWO, "--nodes=1", "--gpus-per-node=2"))
    output = job.finish()
    assert "gpus 2.0" in output and "devices 0 1" in output


def test_two_jobs_at_once(submit: Submit, tmp_path: Path):
    """Each goes on when the other runs as well."""
    wait = """
import time
mine, other = sys.argv[1:]
open(mine, "w").close()
while not os.path.exists(other):
    time.sleep(0.01)
print("both", sum(ray.get([square.remote(i) for i in range(10)])[i][0] for i in range(10)))
"""
    names = [str(tmp_path / "first"), str(tmp_path / "second")]
    jobs = [submit(HEAD + wait, *order, options=TWO) for order in (names, names[::-1])]
    for job in jobs:
        assert "both 285" in job.finish()


def test_a_kind_of_pmi_that_this_mpi_does_not_know(submit: Submit, mpi_kind: str):
    """Each task would be a job of its own: every rank ends, and says what there is instead."""
    if mpi_kind != "pmix":
        pytest.skip("MPICH refuses PMIx by itself, in MPI_Init")
    job = submit("import hpcray as ray\nray.init()\nprint('went on')\n", options=TWO,
                 HPCRAY_SRUN_MPI="pmi2")
    output = job.finish(state="FAILED")
    assert "went on" not in output
    for said in ("srun started 2 ranks", "a job of 1 rank", "--mpi=pmi2", "`srun --mpi=pmix`",
                 "offers pmix, "):
        assert said in output
