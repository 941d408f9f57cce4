"""From a driver to its node: the one place that starts, parks and ends nodes.

    single    driver --spawn--> node                      ended by shutdown()
    mpi       rank 0: driver --spawn--> node (does MPI_Init in the rank's name)
              others: exec'd into keepers, which spawn    parked by shutdown(), ended at exit
              their nodes and say how they died

Everything a node is to know before it starts goes in its environment; what `init` says goes with
the driver's Hello, because with `hpcray run` the nodes are up before the script runs.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from hpcray.client.uncaught import Uncaught
from hpcray.config import SETUP_HOOK
from hpcray.exceptions import LaunchError
from hpcray.launch.identity import (
    Launch,
    identity_fds,
    is_identity,
    read_launch,
    slurm_step,
    strip_identity,
)
from hpcray.launch.keeper import how_it_ended
from hpcray.launch.progress import cpu_progress, is_stopped
from hpcray.launch.script import working_directory
from hpcray.launch.terminal import hide_false_terminals
from hpcray.transport.patience import Patience

if TYPE_CHECKING:
    from hpcray.client.client import Client
    from hpcray.client.imports import Imports
    from hpcray.config import InitConfig

# While the node ends its workers, its peers and MPI, it is looked at this often. It has limits of
# its own for whatever it waits for; it is killed if it is stopped or sleeps on beyond all of them.
_LOOK_S = 0.5
_STOPPED_S = 5.0
_ASLEEP_S = 150.0
_HUNG_S = 0.5
# From the end of its socket to the end of a process.
_ENDED_S = 1.0
# A start that takes longer says what it waits for.
_PATIENCE_S = 10.0


class _Node:
    """The node this driver started."""

    def __init__(self, launch: Launch, process: subprocess.Popen[bytes], sock: socket.socket):
        self.launch = launch
        self.process = process
        self.socket = sock
        self.in_use = False


_node: _Node | None = None
_session_count = 0
_uncaught = Uncaught()
# Variables that differed from those of this process's start in any session: nodes that are parked
# may have them from an earlier one.
_changed: set[bytes] = set()


def start_early() -> None:
    """Start this rank's node before the script runs (`hpcray run` on rank 0, or without MPI)."""
    launch = read_launch(os.environ)
    if launch.rank != 0:
        become_node()
    if launch.mode == "mpi":
        _start(launch, {})


def become_node() -> NoReturn:
    """Turn this process into its rank's node (and the node's keeper). Nothing of the script runs
    afterwards."""
    sys.stdout.flush()
    sys.stderr.flush()
    environ = dict(os.environ)
    _add_package_path(environ)
    keeper = os.path.join(os.path.dirname(os.path.abspath(__file__)), "keeper.py")
    launch = read_launch(environ)
    step = slurm_step(environ) if launch.launcher == "srun" else None
    told = [str(launch.rank), step or "-", *map(str, identity_fds(environ))]
    os.execve(sys.executable, [sys.executable, "-I", "-S", keeper, *told], environ)


def _add_package_path(environ: dict[str, str]) -> None:
    # The package has to be found by the new interpreter, however this one found it.
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    known = environ.get("PYTHONPATH", "")
    if root not in known.split(os.pathsep):
        environ["PYTHONPATH"] = root + (os.pathsep + known if known else "")


def _start(launch: Launch, extra: dict[str, str]) -> _Node:
    global _node
    environ = {**os.environ, **extra}
    _add_package_path(environ)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kept = [theirs.fileno(), *identity_fds(os.environ)]
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "hpcray.node", "--driver-fd", str(theirs.fileno())],
            env=environ, stdin=subprocess.DEVNULL, pass_fds=kept, start_new_session=True)
    except OSError as error:
        ours.close()
        raise LaunchError(f"the node's process could not be started: {error}") from error
    finally:
        theirs.close()
    if launch.mode == "mpi":
        _lose_identity()
        hide_false_terminals()
    _node = _Node(launch, process, ours)
    atexit.register(_end_node_at_exit)
    return _node


def _lose_identity() -> None:
    """The node is this rank now: `from mpi4py import MPI` in the script gets a world of its own."""
    for fd in identity_fds(os.environ):
        with contextlib.suppress(OSError):
            os.close(fd)
    clean = strip_identity(os.environ)
    for name in [name for name in os.environ if name not in clean]:
        del os.environ[name]


def connect(config: InitConfig, on_output: Callable[[Any], None]) -> Client:
    """Connect this driver to its node, starting it if need be. `on_output` shows what workers
    print, and what the runtime tells while the job starts.

    Raises:
      LaunchError: what went wrong and what to do. On ranks other than 0 it does not return.
      ValueError: the nodes have fewer GPUs than the job is to have.
    """
    global _session_count
    from hpcray.client.client import Client
    from hpcray.client.imports import Imports

    _uncaught.install()
    node = _node
    if node is not None and node.process.poll() is not None:
        _discard()
        if node.launch.mode == "mpi":
            raise LaunchError(
                f"the node of this rank has ended (status {node.process.returncode}); under an "
                "MPI launcher it cannot be started again: restart the job")
        node = None
    if node is None:
        launch = read_launch(os.environ)
        if launch.mode == "mpi":
            _refuse_initialised_mpi()
            if launch.rank != 0:
                become_node()
        extra = {"HPCRAY_START_TIMEOUT_S": f"{config.start_timeout_s:g}"}
        if "HPCRAY_PRELOAD" in os.environ:
            extra["HPCRAY_PRELOAD"] = ""  # it goes with the Hello, which follows at once
        if config.redis_url:
            extra["HPCRAY_REDIS_URL"] = config.redis_url
        node = _start(launch, extra)
    # Jobs of one driver have numbers of their own, so that a ref of an earlier one is recognised.
    _session_count += 1
    imports = Imports() if config.preload == "auto" else None
    client = Client(is_driver=True, imports=imports)
    client.open(node.socket.dup())
    _uncaught.is_told = client.link.has_told
    _uncaught.under_launcher = node.launch.mode == "mpi"
    client.on_output(on_output)
    client.link.autopsy = partial(_autopsy, node.process, node.launch.rank)
    try:
        with _late_ranks_told(node.launch):
            client.start(config.start_timeout_s + 5, _for_node(config, imports))
    except LaunchError:
        client.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.process.wait(0.5)
        status = node.process.returncode
        _end_node()
        if status is not None:
            raise LaunchError(
                f"the node could not start: it ended with status {status}, see its messages above"
            ) from None
        raise
    except BaseException:
        client.close()
        _end_node()
        raise
    if "refused" in client.session:
        client.close()
        if node.launch.mode == "single":
            _end_node()
        raise ValueError(client.session["refused"])
    node.in_use = True
    # A driver that only computes or sleeps shows what workers print, and that it lost its node.
    client.link.catch_interrupts()
    client.watch_always()
    from hpcray.protocol import ids

    client.begin_task(ids.driver_task_id(client.rank, client.job_id), 0)
    return client


def _autopsy(process: subprocess.Popen[bytes], rank: int) -> str:
    """How the node has ended, for whoever finds its socket closed. That is a moment before."""
    try:
        status = process.wait(_ENDED_S)
    except subprocess.TimeoutExpired:
        return ""
    if status < 0:
        return f". The node of {how_it_ended(rank, process.pid, -status)}"
    return f". The node ended with status {status}; its last words are above" if status else ""


@contextlib.contextmanager
def _late_ranks_told(launch: Launch) -> Iterator[None]:
    """While the node starts: after some seconds say what it waits for. The node itself cannot, as
    MPI_Init returns only when the last rank has come."""
    told = threading.Timer(_PATIENCE_S, lambda: print(
        f"hpcray: the start has taken {_PATIENCE_S:g} s so far: rank 0 waits until "
        f"all {launch.size} ranks of the job have come (their hosts may be slow to start Python).",
        file=sys.stderr, flush=True))
    told.daemon = True
    if launch.size > 1:
        told.start()
    try:
        yield
    finally:
        told.cancel()


def _for_node(config: InitConfig, imports: Imports | None) -> dict[str, Any]:
    environment = dict(config.runtime_env)
    hook = environment.get(SETUP_HOOK)
    if callable(hook):
        from hpcray.client.serialization import dump_function

        environment[SETUP_HOOK] = getattr(hook, "__name__", type(hook).__name__)  # for people
        hook = dump_function(hook)
    data: dict[str, Any] = msgspec.to_builtins(
        msgspec.structs.replace(config, runtime_env=environment))
    data["setup_hook"] = hook
    data.pop("redis_url", None)
    data["session"] = _session_count
    data["cwd"] = cwd = working_directory()
    data["sys_path"] = [os.path.join(cwd, entry) for entry in sys.path]
    data["environ"] = _changed_environment()
    data["modules"] = config.preload if imports is None else imports.news()
    data["script"] = sys.argv[0] if sys.argv else ""
    return data


def _changed_environment() -> dict[bytes, bytes | None]:
    """What this process has changed in the environment that it was started with (None: removed).

    Every rank has an environment of its own: the launcher sets CUDA_VISIBLE_DEVICES, TMPDIR or
    SLURMD_NODENAME per host. So the driver hands on what the program did, and not what it found.
    """
    try:
        with open("/proc/self/environ", "rb") as file:
            entries = file.read().split(b"\0")
    except OSError:
        return {}
    started = dict(entry.split(b"=", 1) for entry in entries if b"=" in entry)
    _changed.update(
        name for name in started.keys() | os.environb.keys()
        if started.get(name) != os.environb.get(name)
        and name != b"HPCRAY_REDIS_URL" and not is_identity(os.fsdecode(name)))
    return {name: os.environb.get(name) for name in _changed}


def _refuse_initialised_mpi() -> None:
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        raise LaunchError(
            "MPI is initialised in this process already, so hpcray's node cannot take its rank. "
            "Start the job as `mpirun -n N hpcray run script.py`, or import mpi4py.MPI only after "
            "init().")


class _Watch:
    """Whether a node that is to end still gets there. No limit of time: a machine may be loaded."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stopped = Patience(_STOPPED_S)
        self._asleep = Patience(_ASLEEP_S)

    def is_stuck(self) -> bool:
        now_s = time.monotonic()
        progress = cpu_progress(self._pid)
        stopped = self._stopped.look(now_s, progress) and is_stopped(self._pid)
        return self._asleep.look(now_s, progress) or stopped


def disconnect(client: Client, status: int, *, for_good: bool) -> None:
    """End the driver's job. A node under MPI is parked for the next `connect`, if there may be one.
    """
    node = _node
    park = node is not None and node.launch.mode == "mpi" and client.lost is None and not for_good
    watch = _Watch(0 if node is None else node.process.pid)
    ended = client.end_job(status, park=park, look_s=_LOOK_S, is_stuck=watch.is_stuck)
    client.close()
    _uncaught.remove()
    if node is None:
        return
    node.in_use = False
    if not park or not ended:
        # One that did not end the job hangs: it has had its chance.
        _end_node(None if ended else _HUNG_S)


def _end_node(limit_s: float | None = None) -> None:
    """End the node and wait for it, at exit or after `disconnect`; kill it if it hangs.

    `limit_s`: kill it if it is not gone by then, whatever it does.
    """
    node = _node
    if node is None:
        return
    _discard()
    from hpcray.protocol import messages

    watch = _Watch(node.process.pid)
    try:
        with contextlib.suppress(OSError):
            node.socket.send(messages.encode([messages.EndJob(0, False)]), socket.MSG_DONTWAIT)
            node.socket.shutdown(socket.SHUT_RD)  # it must not wait for us to read what it says
        while True:
            try:
                node.process.wait(_LOOK_S if limit_s is None else limit_s)
                break
            except subprocess.TimeoutExpired:
                if limit_s is None and not watch.is_stuck():
                    continue
            print(f"hpcray: the node (pid {node.process.pid}) is stopped or hangs, and does not "
                  "end: killing it", file=sys.stderr)
            node.process.kill()
            node.process.wait()
            break
    except KeyboardInterrupt:
        # A second Ctrl-C while we wait: the node sees the closed socket and ends by itself.
        node.socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.process.wait(_STOPPED_S)
        raise
    finally:
        node.socket.close()


def _end_node_at_exit() -> None:
    with contextlib.suppress(KeyboardInterrupt):  # the interpreter would show our frames
        _end_node()


def _discard() -> None:
    global _node
    _node = None
    atexit.unregister(_end_node_at_exit)


def _forget_in_fork() -> None:
    # A fork of the driver must not end its parent's node.
    global _node
    if _node is not None:
        atexit.unregister(_end_node_at_exit)
        _node = None


os.register_at_fork(after_in_child=_forget_in_fork)
