"""The process that the launcher knows as a rank above 0: it starts the node, and waits.

    launcher --starts--> keeper of rank r --spawns--> node r      (on rank 0 the driver does that)

Why it exists: when a node is killed (out of memory, a batch limit, a person), nobody else can say
which rank it was. The launcher ends all others within milliseconds, by SIGKILL with MPICH, and
MPI tells nobody. The keeper is the one process that sees its node's end and is not yet killed.

A signal for the job goes on to the node as SIGTERM; a keeper that is killed takes its node along
(PR_SET_PDEATHSIG, `node/__main__.py`). It ends as its node did, by the same signal, because
launchers that survive the loss of a rank tell a signal from a status.

Run as a file and not as a module (`launch.start`): importing the package would cost every rank a
tenth of a second and 20 MB, so this imports the standard library only, and is told what it needs:

    python -I -S .../keeper.py RANK STEP DESCRIPTOR...

STEP is the job step to end, `-` if the launcher ends all ranks with the first one. `srun` does not
(`--kill-on-bad-exit` is off unless the site says otherwise), and the others would wait for ever.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
from types import FrameType
from typing import NoReturn


def main() -> NoReturn:
    rank, step = int(sys.argv[1]), sys.argv[2]
    descriptors = [int(text) for text in sys.argv[3:]]
    told = False
    node: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        if node is not None:
            node.terminate()

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)  # the driver's affair; not inherited, unlike SIG_IGN
    # The descriptor to the process manager stays open here too: hydra takes its end for the end of
    # the rank, and would kill this process before it could say anything.
    node = subprocess.Popen(
        [sys.executable, "-P", "-m", "hpcray.node", "--keeper-pid", str(os.getpid())],
        pass_fds=descriptors, start_new_session=True)
    if told:
        node.terminate()
    status = node.wait()
    if status >= 0:
        os._exit(status)
    if not told:
        print(f"hpcray: {how_it_ended(rank, node.pid, -status)}; the job ends, as it cannot go on "
              "without a rank", file=sys.stderr, flush=True)
        if step != "-":
            with contextlib.suppress(OSError):
                subprocess.run(["scancel", step], check=False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # one core file is enough
    if -status not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
    os._exit(128 - status)


def how_it_ended(rank: int, pid: int, number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    why = " (the out-of-memory killer, a batch limit or a person)" if number == 9 else ""
    return f"rank {rank} (pid {pid} on {socket.gethostname()}) was killed by {name}{why}"


if __name__ == "__main__":
    main()
