"""What this rank may use: CPUs, GPUs, memory, and where each number came from.

                         the host                                      this rank
    CPUs      affinity mask, cpuset, cgroup quota, Slurm --> lowest --> its share
    GPUs      visible-devices variables, Slurm, driver ---> first ---> its share
    memory    MemTotal, every cgroup limit, Slurm --------> lowest --> its share

Ranks that share a host divide it, the remainder to the lowest local ranks (RS-1: the shares of
all local ranks add up to the host, unless the minimum of one CPU each says otherwise). A bound
that is already this rank's own (srun's mask, GPUs bound per task) is not divided again. What the
user says explicitly is taken as said.

Never `os.cpu_count()`: it counts the machine, and a job often owns a slice of it.

Files are read below one `root`, so tests bring trees of machines we do not have. Nothing here
imports CuPy or starts MPI; the one thing that acts is `widen_affinity`.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpcray.launch.cgroups import Bound, Cgroups, lowest, parse_cpu_list, read_text
from hpcray.launch.identity import Launch, expand_tasks_per_node, slurm_step
from hpcray.protocol.messages import Gpus

# Set to 1 by users who bind ranks on purpose (`mpirun --map-by socket:PE=12`).
KEEP_BINDING_VARIABLE = "HPCRAY_KEEP_BINDING"

# How far up the process tree the launcher may be: a rank behind a few wrapper scripts.
_MAX_ANCESTORS = 16

# The first that is set names the devices.
_DEVICE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "PALS_RANKID")


GpuNames = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class HostResources:
    """This rank's share of its host.

    Attributes:
      gpus: all that this process sees, other ranks of its host perhaps as well: `share_gpus`.
      shm_bytes: the size of /dev/shm, which the MPI library needs; our own segments are memfds,
        which do not count against it.
      accelerator: the model of its GPUs as Ray names it ("H100"); "" if there are none, or nobody
        says.
      sources: for each number ("cpus", "gpus", "memory"), in words, what decided it.
    """

    cpus: int
    gpus: Gpus
    memory_bytes: int
    shm_bytes: int
    node_ip: str
    hostname: str
    accelerator: str
    sources: dict[str, str] = field(hash=False)


def detect_resources(
    environ: Mapping[str, str],
    *,
    local_size: int = 1,
    local_rank: int = 0,
    num_cpus: int | None = None,
    memory_bytes: int | None = None,
    mask: Iterable[int] | None = None,
    root: Path = Path("/"),
) -> HostResources:
    """Measure the host and take this rank's share.

    Call it with the environment as the launcher left it, before `strip_identity`: whether a limit
    is per task or per host is read from there. `mask` is the affinity mask, this thread's own by
    default; outside Slurm call `widen_affinity` first.

    Raises:
      ValueError: a local rank that is not below local_size.
    """
    if not 0 <= local_rank < local_size:
        raise ValueError(f"local_rank {local_rank} is not one of {local_size} local ranks")
    cpu_mask = frozenset(os.sched_getaffinity(0) if mask is None else mask)
    cgroups = Cgroups(root)
    host = _Share(local_rank, local_size)
    cpus = _explicit(num_cpus) or _cpus(environ, cpu_mask, cgroups, host)
    memory = _explicit(memory_bytes) or _memory(environ, cpu_mask, cgroups, host, root)
    gpus, gpu_source = _gpus(environ, root)
    return HostResources(
        cpus=cpus.value,
        gpus=gpus,
        memory_bytes=memory.value,
        shm_bytes=_filesystem_bytes(root / "dev/shm"),
        node_ip=node_ip(),
        hostname=socket.gethostname(),
        accelerator=_accelerator(root) if gpus.ids else "",
        sources={"cpus": cpus.source, "gpus": gpu_source, "memory": memory.source},
    )


def share_gpus(ranks: Sequence[tuple[str, Gpus]], wanted: int | None = None) -> list[GpuNames]:
    """The GPUs of every rank, by host and what it sees there.

    Ranks of a host that see the same GPUs share them, in the order of the ranks. One that sees
    others has those: a wrapper script has chosen for it.

    Args:
      wanted: `init(num_gpus=)`. One rank alone may count GPUs that are not there, as in Ray, as
        long as no variable names what there is; they get numbers.

    Returns:
      Names, as text if a variable names them, else numbers.

    Raises:
      ValueError: a rank is to have more than its share.
    """
    groups: dict[object, list[int]] = {}
    hosts: dict[str, list[int]] = {}
    for rank, (host, gpus) in enumerate(ranks):
        groups.setdefault((host, rank if gpus.own else gpus.ids), []).append(rank)
        hosts.setdefault(host, []).append(rank)
    found: list[GpuNames] = [()] * len(ranks)
    for group in groups.values():
        for index, rank in enumerate(group):
            host, gpus = ranks[rank]
            sizes = [divide(len(gpus.ids), len(group), part) for part in range(index + 1)]
            share = gpus.ids[sum(sizes[:-1]):sum(sizes)]
            count = len(share) if wanted is None else wanted
            if count > len(share):
                if gpus.named or (gpus.ids and len(group) > 1):
                    by = gpus.variable if gpus.named else "the GPU driver"
                    raise ValueError(
                        f"num_gpus={count}, but rank {rank} on {host} has {len(share)}: {by} names "
                        f"{len(gpus.ids)} there, for {len(group)} rank{'s'[:len(group) > 1]}")
                first = hosts[host].index(rank) * count
                share = tuple(map(str, range(first, first + count)))
            found[rank] = share[:count] if gpus.named else tuple(map(int, share[:count]))
    return found


def divide(total: int, parts: int, index: int, *, minimum: int = 0) -> int:
    """The share of part `index`, the remainder going to the low ones (RS-1)."""
    return max(minimum, total // parts + (1 if index < total % parts else 0))


def widen_affinity(
    launch: Launch, environ: Mapping[str, str], root: Path = Path("/")
) -> frozenset[int]:
    """Undo the launcher's binding of this thread; return the mask it then has.

    `mpirun` by default binds each rank to one core, which would leave the rest of the host to
    nobody. The mask to go back to is the launcher's own (a daemon of mpirun, the nearest ancestor
    that is not a rank): that keeps a `taskset` or a Slurm step around the whole mpirun, which
    asking for every CPU would undo. Where it cannot be read, ask for every CPU, which the kernel
    cuts to the cpuset.

    Changes nothing for a single process, under srun (its mask is the allocation), or with
    HPCRAY_KEEP_BINDING=1. Threads that exist already keep their mask: call it first.
    """
    current = frozenset(os.sched_getaffinity(0))
    if launch.launcher != "mpirun" or environ.get(KEEP_BINDING_VARIABLE) == "1":
        return current
    wanted = launcher_mask(root) or frozenset(range(os.sysconf("SC_NPROCESSORS_CONF")))
    if not wanted <= current:
        try:
            # Exactly the launcher's: a CPU outside of it is one the launcher had no right to give.
            os.sched_setaffinity(0, wanted)
        except OSError:
            return current  # a sandbox may forbid it; what we have is what we use
    return frozenset(os.sched_getaffinity(0))


def launcher_mask(root: Path = Path("/")) -> frozenset[int] | None:
    """The affinity mask of the nearest ancestor that is no rank; None if it cannot be read."""
    pid = os.getppid()
    for _ in range(_MAX_ANCESTORS):
        if pid <= 1:
            return None  # the launcher is in another PID namespace, or gone
        try:
            names = (root / f"proc/{pid}/environ").read_bytes().split(b"\0")
            status = (root / f"proc/{pid}/status").read_text()
        except OSError:
            return None
        if not any(n.startswith(tuple(f"{v}=".encode() for v in _RANK_VARIABLES)) for n in names):
            allowed = re.search(r"^Cpus_allowed_list:\s*(\S+)", status, re.MULTILINE)
            return frozenset(parse_cpu_list(allowed[1])) if allowed else None
        parent = re.search(r"^PPid:\s*(\d+)", status, re.MULTILINE)
        pid = int(parent[1]) if parent else 0
    return None


def node_ip() -> str:
    """The address other hosts reach this one by, as far as the routing table knows."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Connecting a datagram socket sends nothing; it only picks the outgoing interface.
            probe.connect(("10.255.255.255", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"  # no route: one host


@dataclass(frozen=True, slots=True)
class _Share:
    """This rank among those on its host."""

    index: int
    parts: int

    def of(self, whole: Bound, minimum: int = 0) -> Bound:
        if self.parts == 1:
            return whole
        value = divide(whole.value, self.parts, self.index, minimum=minimum)
        return Bound(value, f"{whole.source} ({whole.value} over {self.parts} ranks on this host)")


def _explicit(value: int | None) -> Bound | None:
    return None if value is None else Bound(value, "given by the user")


def _cpus(
    environ: Mapping[str, str], mask: frozenset[int], cgroups: Cgroups, host: _Share
) -> Bound:
    own_mask = Bound(len(mask), "affinity mask")
    if environ.get(KEEP_BINDING_VARIABLE) == "1":
        return Bound(len(mask), f"affinity mask, kept by {KEEP_BINDING_VARIABLE}=1")
    whole = [] if (quota := cgroups.cpu_quota()) is None else [quota]
    cpuset = cgroups.cpuset()
    if cpuset is not None:
        whole.append(Bound(len(cpuset[0]), cpuset[1]))
    slurm = _slurm_cpus_on_node(environ)
    # Under Slurm the mask may be this task's alone, so it bounds the share and is not divided.
    whole.append(slurm or own_mask)
    own = [host.of(lowest(whole) or own_mask, minimum=1)]
    if slurm is not None:
        own.append(own_mask)
        per_task = _count(environ, "SLURM_CPUS_PER_TASK")
        if per_task is not None and _is_srun_task(environ):
            own.append(Bound(per_task, "SLURM_CPUS_PER_TASK"))
    return lowest(own) or own_mask


def _slurm_cpus_on_node(environ: Mapping[str, str]) -> Bound | None:
    count = _count(environ, "SLURM_CPUS_ON_NODE")
    if count is not None:
        return Bound(count, "SLURM_CPUS_ON_NODE")
    counts = list(expand_tasks_per_node(environ.get("SLURM_JOB_CPUS_PER_NODE", "")))
    node = _count(environ, "SLURM_NODEID") or 0
    if node < len(counts) and counts[node] > 0:
        return Bound(counts[node], "SLURM_JOB_CPUS_PER_NODE")
    return None


def _memory(
    environ: Mapping[str, str], mask: frozenset[int], cgroups: Cgroups, host: _Share, root: Path
) -> Bound:
    meminfo = re.search(r"^MemTotal:\s*(\d+) kB", read_text(root / "proc/meminfo"), re.MULTILINE)
    # Without /proc there is still a machine; 1 GiB keeps a budget of zero from failing later.
    bounds = [Bound(int(meminfo[1]) * 1024, "MemTotal") if meminfo else Bound(1 << 30, "a guess")]
    if (limit := cgroups.memory()) is not None:
        bounds.append(limit)
    per_node = _slurm_bytes(environ, "SLURM_MEM_PER_NODE")
    per_cpu = _slurm_bytes(environ, "SLURM_MEM_PER_CPU")
    if per_node is not None:
        bounds.append(Bound(per_node, "SLURM_MEM_PER_NODE"))
    elif per_cpu is not None:
        cpus = _slurm_cpus_on_node(environ) or Bound(len(mask), "affinity mask")
        bounds.append(Bound(per_cpu * cpus.value, f"SLURM_MEM_PER_CPU x {cpus.source}"))
    return host.of(lowest(bounds) or bounds[0], minimum=1)


def _gpus(environ: Mapping[str, str], root: Path) -> tuple[Gpus, str]:
    """What this process sees, and what named it. No device is an ordinary answer."""
    ids, source = _visible(environ, _devices(root), root)
    variable = next((name for name in _DEVICE_VARIABLES if name in environ), "")
    default = "HIP_VISIBLE_DEVICES" if _amd(root) and not _nvidia(root) else _DEVICE_VARIABLES[0]
    own = bool(ids) and _gpus_bound_per_task(environ)
    return Gpus(ids, variable or default, bool(variable), own), (
        f"{source}, bound to this task by Slurm" if own else source)


def _visible(
    environ: Mapping[str, str], present: tuple[str, ...], root: Path
) -> tuple[tuple[str, ...], str]:
    """The devices this process could use were it alone on the host: the first that speaks wins."""
    for name in _DEVICE_VARIABLES:
        if name in environ:
            return _visible_devices(environ[name]), name
    for name in ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        count = len(_visible_devices(environ.get(name, "")))
        if count:
            # Physical numbers of the whole host; under a device cgroup CUDA counts from 0.
            return tuple(map(str, range(min(count, len(present) or count)))), name
    if not present:
        return (), "no GPU driver in /proc or /sys"
    return present, "NVIDIA driver" if _nvidia(root) else "AMD driver"


def _visible_devices(text: str) -> tuple[str, ...]:
    """The devices of such a variable; like CUDA, stop at the first that is none (-1, NoDevFiles).

    Slurm also writes ranges ("0-3"). UUIDs and MIG names pass as they are.
    """
    ids: list[str] = []
    for part in (p.strip() for p in text.split(",")):
        if re.fullmatch(r"\d+(-\d+)?", part):
            ids += map(str, parse_cpu_list(part))
        elif part.startswith(("GPU-", "MIG-")):
            ids.append(part)
        else:
            break
    return tuple(ids)


def _devices(root: Path) -> tuple[str, ...]:
    """Ids of the devices the drivers show, counted from 0 as CUDA and HIP do."""
    return tuple(map(str, range(_nvidia(root) or _amd(root))))


def _nvidia(root: Path) -> int:
    count = len(_list(root / "proc/driver/nvidia/gpus"))
    # A container may show the host's /proc but has device files only for what it was given.
    files = sum(re.fullmatch(r"nvidia\d+", name) is not None for name in _list(root / "dev"))
    return min(count, files) if files else count


def _accelerator(root: Path) -> str:
    """What the NVIDIA driver calls the first GPU, as Ray shortens it: "NVIDIA A100-SXM4-80GB" is
    an A100. AMD's drivers have no name for people."""
    gpus = root / "proc/driver/nvidia/gpus"
    for entry in _list(gpus):
        information = read_text(gpus / entry / "information")
        model = re.search(r"^Model:[ \t]*(\S.*)$", information, re.MULTILINE)
        if model is None:
            continue
        words = [word for word in model[1].split() if word not in _MAKERS]
        if words and words[0] == "RTX":  # a family: its number belongs to the name
            number = next((i for i, word in enumerate(words) if word[0].isdigit()), 0)
            return "-".join(words[: number + 1])
        return words[0].split("-")[0] if words else ""
    return ""


_MAKERS = ("NVIDIA", "Tesla", "Quadro", "GeForce")


def _amd(root: Path) -> int:
    nodes = root / "sys/class/kfd/kfd/topology/nodes"
    # CPUs are nodes of this topology too, with a gpu_id of 0.
    return sum(read_text(nodes / n / "gpu_id").strip() not in ("", "0") for n in _list(nodes))


def _gpus_bound_per_task(environ: Mapping[str, str]) -> bool:
    if not _is_srun_task(environ):
        return False
    bind = environ.get("SLURM_GPU_BIND", environ.get("SLURM_TRES_BIND", "none"))
    return (
        "SLURM_GPUS_PER_TASK" in environ
        or "gpu" in environ.get("SLURM_TRES_PER_TASK", "")
        or not bind.endswith("none")
    )


def _is_srun_task(environ: Mapping[str, str]) -> bool:
    """Whether srun started this very rank, and not the daemon of an mpirun around it."""
    if "OMPI_COMM_WORLD_RANK" in environ or "MPI_LOCALRANKID" in environ:
        return False
    return slurm_step(environ) is not None


def _slurm_bytes(environ: Mapping[str, str], name: str) -> int | None:
    """Slurm's memory values are MiB unless they carry a letter; 0 means all of the host."""
    match = re.fullmatch(r"(\d+)([KMGT]?)", environ.get(name, ""))
    if match is None or int(match[1]) == 0:
        return None
    shift = {"K": 10, "": 20, "M": 20, "G": 30, "T": 40}[match[2]]
    return int(match[1]) << shift


def _count(environ: Mapping[str, str], name: str) -> int | None:
    value = environ.get(name, "")
    return int(value) if value.isdigit() and int(value) > 0 else None


def _filesystem_bytes(path: Path) -> int:
    try:
        status = os.statvfs(path)
    except OSError:
        return 0
    return status.f_frsize * status.f_blocks


def _list(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []
