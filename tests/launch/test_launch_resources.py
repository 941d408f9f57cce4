"""What a rank may use, on machines we do not have (trees of files) and on this one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcray.launch.cgroups import Cgroups, parse_cpu_list
from hpcray.launch.identity import SINGLE
from hpcray.launch.resources import detect_resources, divide, share_gpus, widen_affinity
from hpcray.protocol.messages import Gpus

GIB = 1 << 30
MASK_16 = range(16)


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def v2(tmp_path: Path) -> Path:
    """A systemd host with cgroup v2; the limits sit on different levels of the path."""
    return plant(tmp_path, {
        "proc/meminfo": "MemTotal:       134217728 kB\nMemFree: 1 kB\n",
        "proc/self/cgroup": "0::/user.slice/job.scope/step\n",
        "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n",
        "sys/fs/cgroup/cpuset.cpus.effective": "0-63\n",
        "sys/fs/cgroup/user.slice/cpu.max": "max 100000\n",
        "sys/fs/cgroup/user.slice/memory.max": "max\n",
        "sys/fs/cgroup/user.slice/job.scope/cpu.max": "450000 100000\n",
        "sys/fs/cgroup/user.slice/job.scope/memory.max": f"{64 * GIB}\n",
        "sys/fs/cgroup/user.slice/job.scope/memory.high": f"{48 * GIB}\n",
        "sys/fs/cgroup/user.slice/job.scope/cpuset.cpus.effective": "8-15\n",
        "sys/fs/cgroup/user.slice/job.scope/step/cpu.max": "max 100000\n",
        "sys/fs/cgroup/user.slice/job.scope/step/memory.max": "max\n",
    })


@pytest.fixture
def v1(tmp_path: Path) -> Path:
    """A container on cgroup v1: the mount shows the container's own part, /proc the host's path."""
    mounts = [
        f"{40 + i} 31 0:{30 + i} /docker/abc {at} ro - cgroup cgroup rw,{names}"
        for i, (at, names) in enumerate([
            ("/sys/fs/cgroup/cpu,cpuacct", "cpu,cpuacct"),
            ("/sys/fs/cgroup/cpuset", "cpuset"),
            ("/sys/fs/cgroup/memory", "memory"),
        ])
    ]
    return plant(tmp_path, {
        "proc/meminfo": "MemTotal:       16777216 kB\n",
        "proc/self/cgroup": "4:memory:/docker/abc/inner\n3:cpuset:/docker/abc\n"
                            "2:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n",
        "proc/self/mountinfo": "\n".join(mounts) + "\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpuset/cpuset.cpus": "0-1,4-5\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
        "sys/fs/cgroup/memory/inner/memory.limit_in_bytes": "9223372036854771712\n",
    })


def test_cgroup_v2_takes_the_tightest_level(v2: Path):
    cgroups = Cgroups(v2)
    assert cgroups.cpu_quota().value == 4  # 4.5, rounded down
    assert cgroups.cpuset()[0] == frozenset(range(8, 16))
    assert cgroups.memory().value == 48 * GIB
    found = detect_resources({}, mask=MASK_16, root=v2)
    assert (found.cpus, found.memory_bytes) == (4, 48 * GIB)
    assert "job.scope/cpu.max" in found.sources["cpus"]
    assert "memory.high" in found.sources["memory"]


def test_cgroup_v1_in_a_container(v1: Path):
    found = detect_resources({}, mask=MASK_16, root=v1)
    assert found.cpus == 1  # half a CPU still runs one task at a time
    assert found.memory_bytes == 4 * GIB
    assert Cgroups(v1).cpuset()[0] == {0, 1, 4, 5}


def test_cgroup_path_outside_of_the_mount(v1: Path):
    (v1 / "proc/self/cgroup").write_text("4:memory:/somewhere/else\n")
    assert Cgroups(v1).memory().value == 4 * GIB


def test_no_files_at_all(tmp_path: Path):
    found = detect_resources({}, mask=[0, 1, 2], root=tmp_path)
    assert (found.cpus, found.gpus.ids, found.shm_bytes) == (3, (), found.shm_bytes)
    assert found.memory_bytes >= 1


MEM_64 = {"proc/meminfo": f"MemTotal: {64 << 20} kB\n"}

# One host of 16 CPUs with 64 GiB, `mask` is what this rank is bound to.
SLURM_JOB = {"SLURM_JOB_ID": "1", "SLURM_CPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "4",
             "SLURM_MEM_PER_CPU": "2048"}
SRUN = SLURM_JOB | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}


@pytest.mark.parametrize(("environ", "mask", "ranks", "cpus", "source"), [
    ({}, 16, 1, 16, "affinity"),
    ({}, 16, 3, 6, "over 3 ranks"),
    ({}, 2, 4, 1, "over 4 ranks"),
    ({"HPCRAY_KEEP_BINDING": "1"}, 4, 3, 4, "HPCRAY_KEEP_BINDING"),
    (SLURM_JOB, 16, 1, 8, "SLURM_CPUS_ON_NODE"),  # python in a batch script on a shared node
    (SLURM_JOB | {"OMPI_COMM_WORLD_RANK": "0"}, 8, 1, 8, "SLURM_CPUS_ON_NODE"),
    (SRUN, 16, 1, 4, "SLURM_CPUS_PER_TASK"),
    (SRUN, 4, 2, 4, ""),  # bound by srun: not divided once more
    (SRUN, 8, 2, 4, ""),  # not bound: both see the step's 8
    ({"SLURM_JOB_CPUS_PER_NODE": "16(x2),12", "SLURM_NODEID": "2"}, 16, 1, 12, "PER_NODE"),
], ids=["alone", "shared", "crowded", "kept", "batch", "mpirun", "per-task", "srun-bound",
        "srun-unbound", "per-node"])
def test_cpus(tmp_path: Path, environ, mask, ranks, cpus, source):
    found = detect_resources(environ, local_size=ranks, mask=range(mask),
                             root=plant(tmp_path, MEM_64))
    assert found.cpus == cpus
    assert source in found.sources["cpus"]


@pytest.mark.parametrize(("environ", "gib"), [
    ({}, 64),
    ({"SLURM_MEM_PER_NODE": "8192"}, 8),
    ({"SLURM_MEM_PER_NODE": "0"}, 64),  # Slurm's word for all of it
    ({"SLURM_MEM_PER_NODE": "12G"}, 12),
    (SLURM_JOB, 16),
], ids=["host", "per-node", "all", "suffix", "per-cpu"])
def test_memory(tmp_path: Path, environ, gib):
    root = plant(tmp_path, MEM_64)
    assert detect_resources(environ, mask=MASK_16, root=root).memory_bytes == gib * GIB
    half = detect_resources(environ, local_size=2, local_rank=1, mask=MASK_16, root=root)
    assert half.memory_bytes == gib * GIB // 2


def nvidia(count: int, files: int | None = None) -> dict[str, str]:
    inventory = {f"proc/driver/nvidia/gpus/0000:{i:02x}:00.0/information": "" for i in range(count)}
    devices = {f"dev/nvidia{i}": "" for i in range(count if files is None else files)}
    return inventory | devices | {"dev/nvidiactl": ""}


@pytest.mark.parametrize(("files", "environ", "ranks", "ids"), [
    ({}, {}, 1, [""]),
    (nvidia(4), {}, 1, ["0 1 2 3"]),
    (nvidia(8, files=2), {}, 1, ["0 1"]),  # a container with two of the host's eight
    (nvidia(4), {"CUDA_VISIBLE_DEVICES": "2,3"}, 1, ["2 3"]),
    (nvidia(4), {"CUDA_VISIBLE_DEVICES": ""}, 1, [""]),
    (nvidia(4), {"CUDA_VISIBLE_DEVICES": "-1"}, 1, [""]),
    (nvidia(4), {"CUDA_VISIBLE_DEVICES": "1,-1,2"}, 1, ["1"]),
    (nvidia(4), {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 1, [""]),
    (nvidia(2), {"CUDA_VISIBLE_DEVICES": "GPU-aa, MIG-bb"}, 1, ["GPU-aa MIG-bb"]),
    (nvidia(4), {"SLURM_JOB_GPUS": "5-6"}, 1, ["0 1"]),
    (nvidia(4), {}, 3, ["0 1", "2", "3"]),
    (nvidia(2), {}, 4, ["0", "1", "", ""]),
    (nvidia(4), {"CUDA_VISIBLE_DEVICES": "3"}, 4, ["3", "", "", ""]),
    (nvidia(4), {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 2, ["0 1", "2 3"]),
    (nvidia(4), SRUN | {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, 4, ["0 1"] * 4),
    ({f"sys/class/kfd/kfd/topology/nodes/{i}/gpu_id": str(i and 900 + i) for i in range(3)},
     {}, 1, ["0 1"]),
], ids=str)
def test_gpus(tmp_path: Path, files, environ, ranks, ids):
    root = plant(tmp_path, files | MEM_64)
    found = [detect_resources(environ, local_size=ranks, local_rank=rank, mask=MASK_16, root=root)
             for rank in range(ranks)]
    shares = share_gpus([("host", one.gpus) for one in found])
    assert [" ".join(map(str, share)) for share in shares] == ids


TWO = ("GPU-a", "GPU-b")


@pytest.mark.parametrize(("ranks", "wanted", "names"), [
    ([("h", Gpus()), ("h", Gpus())], 2, [(0, 1), (2, 3)]),  # as many as it is told, none twice
    ([("h", Gpus()), ("i", Gpus())], 1, [(0,), (0,)]),
    ([("h", Gpus(("0", "1", "2")))] * 2, None, [(0, 1), (2,)]),
    ([("h", Gpus(("0", "1", "2")))] * 2, 1, [(0,), (2,)]),
    ([("h", Gpus(("0",)))], 3, [(0, 1, 2)]),  # as in Ray
    ([("h", Gpus(TWO, named=True))] * 2, None, [("GPU-a",), ("GPU-b",)]),
    ([("h", Gpus(TWO, named=True)), ("i", Gpus(TWO, named=True))], None, [TWO, TWO]),
    ([("h", Gpus((name,), named=True)) for name in "75"], None, [("7",), ("5",)]),  # a wrapper's
    ([("h", Gpus(("0",), named=True, own=True))] * 2, 1, [("0",), ("0",)]),
    ([("h", Gpus(("0",), named=True))] * 2, None, [("0",), ()]),
    ([("h", Gpus(TWO, named=True))], 3, "num_gpus=3, but rank 0 on h has 2: CUDA_VISIBLE_DEVICES "),
    ([("h", Gpus(("0", "1")))] * 2, 2, "num_gpus=2, but rank 0 on h has 1: the GPU driver "),
])
def test_ranks_share_the_gpus_of_their_host(ranks, wanted, names):
    if isinstance(names, str):
        with pytest.raises(ValueError, match=names):
            share_gpus(ranks, wanted)
    else:
        assert share_gpus(ranks, wanted) == names


def test_the_user_has_the_last_word(v2: Path):
    found = detect_resources({}, local_size=2, num_cpus=7, memory_bytes=GIB,
                             mask=MASK_16, root=v2)
    assert (found.cpus, found.memory_bytes) == (7, GIB)
    assert {found.sources["cpus"], found.sources["memory"]} == {"given by the user"}


def test_a_local_rank_out_of_range_is_refused():
    with pytest.raises(ValueError, match="local_rank 2"):
        detect_resources({}, local_size=2, local_rank=2)


@given(total=st.integers(0, 10_000), parts=st.integers(1, 512))
def test_shares_add_up_and_differ_by_one_at_most(total: int, parts: int):
    """RS-1."""
    shares = [divide(total, parts, index) for index in range(parts)]
    assert sum(shares) == total
    assert shares == sorted(shares, reverse=True)
    assert shares[0] - shares[-1] <= 1


@given(cpus=st.integers(1, 300), ranks=st.integers(1, 40))
def test_every_local_rank_gets_a_cpu(cpus: int, ranks: int):
    nowhere = Path("/nonexistent")
    found = [detect_resources({}, local_size=ranks, local_rank=rank, mask=range(cpus), root=nowhere)
             .cpus for rank in range(min(ranks, 3))]
    assert min(found) >= 1
    assert ranks > cpus or sum(found) <= cpus


@given(st.sets(st.integers(0, 200)))
def test_cpu_lists_come_back(cpus: set[int]):
    assert set(parse_cpu_list(",".join(map(str, sorted(cpus))))) == cpus
    assert list(parse_cpu_list("0-3,8")) == [0, 1, 2, 3, 8]


def test_this_machine():
    found = detect_resources(os.environ)
    assert 1 <= found.cpus <= len(os.sched_getaffinity(0))
    assert found.memory_bytes > 1 << 28
    assert found.hostname and found.node_ip.count(".") == 3


def test_a_single_process_keeps_its_mask():
    before = os.sched_getaffinity(0)
    assert widen_affinity(SINGLE, {}) == before == os.sched_getaffinity(0)


BOUND = """
import json, os, sys
from hpcray.launch.identity import read_launch
from hpcray.launch.resources import detect_resources, widen_affinity
launch = read_launch(os.environ)
kept = widen_affinity(launch, {"HPCRAY_KEEP_BINDING": "1"})
mask = widen_affinity(launch, os.environ)
cpus = detect_resources(os.environ, local_size=launch.local_size,
                        local_rank=launch.local_rank).cpus
with open(os.path.join(sys.argv[1], str(launch.rank)), "w") as file:
    json.dump([sorted(kept), sorted(mask), sorted(os.sched_getaffinity(0)), cpus], file)
"""


@pytest.mark.mpirun
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs to bind to one")
@pytest.mark.parametrize("cpus", [1, 2])
def test_binding_is_undone_up_to_what_mpirun_itself_has(mpirun, python, tmp_path: Path, cpus: int):
    """mpirun on `cpus` CPUs binds each rank to one; the ranks get back those CPUs, not more."""
    allowed = sorted(os.sched_getaffinity(0))[:cpus]
    bind = "core:overload-allowed" if mpirun.family == "openmpi" else "core"
    start = (
        "import os, sys; from hpcray.launch.mpirun import *; from hpcray.launch import mpirun\n"
        f"os.sched_setaffinity(0, {allowed})\n"
        "found = find_mpirun(os.environ)\n"
        f"argv, env = command_line(found, 2, [sys.executable, '-c', {BOUND!r}, {str(tmp_path)!r}],"
        " os.environ, root=os.geteuid() == 0)\n"
        "at = next(i for i, a in enumerate(argv) if a.endswith('-bind-to'))\n"
        f"argv[at + 1] = {bind!r}\n"
        "os.execve(argv[0], argv, env)\n"
    )
    done = python("-c", start)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        kept, mask, after, share = json.loads((tmp_path / str(rank)).read_text())
        assert len(kept) == 1  # else this test would show nothing
        assert mask == after == allowed
        assert share == 1


@pytest.mark.parametrize(("model", "name"), [
    ("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A10G", "A10G"),
    ("NVIDIA A100-SXM4-80GB", "A100"), ("Tesla V100-SXM2-16GB", "V100"),
    ("NVIDIA GeForce RTX 3090", "RTX-3090"), ("NVIDIA RTX PRO 6000 Blackwell", "RTX-PRO-6000"),
    ("", ""),
])
def test_the_model_of_the_gpus(tmp_path: Path, model: str, name: str) -> None:
    files = {path: f"Model: \t\t {model}\nIRQ: 5\n" if path.endswith("information") else text
             for path, text in nvidia(2).items()}
    root = plant(tmp_path, files | MEM_64)
    assert detect_resources({}, mask=MASK_16, root=root).accelerator == name
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    assert detect_resources(hidden, mask=MASK_16, root=root).accelerator == ""
