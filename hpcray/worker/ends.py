"""Ends of a worker other than its node's Stop: SIGTERM, and a fork that leaves its task function.

What must not go in: the end of an actor (hosting.py), which its own code may ask for.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence

from hpcray.client import references

# What the worker does at a SIGTERM that is not its job's end; unset once it does it.
_terminate: Callable[[], None] | None = None


def end_in_good_order(number: int, _frame: object) -> None:
    """SIGTERM, by which a job ends its workers; then the signal does its work. Whoever takes longer
    than the zygote's grace is killed."""
    global _terminate
    if _terminate is not None:
        terminate, _terminate = _terminate, None  # a second signal waits for nothing
        terminate()
        return
    signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(BaseException):
        end_user_code()
    os.kill(os.getpid(), number)


# A process that user code forks ends by SIGTERM as any other, from its first moment. Python forgets
# a signal that comes before it has set itself up in the child: so none comes until then.
_signals = threading.local()


def _before_fork() -> None:
    _signals.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _signals.blocked)


def _after_fork_in_child() -> None:
    if signal.getsignal(signal.SIGTERM) is end_in_good_order:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _after_fork()


def take_over_forks() -> None:
    """From now on, of the processes that user code forks. Once per worker."""
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def on_terminate(end: Callable[[], None], ending: Sequence[int]) -> None:
    """What a SIGTERM does from now on, unless it is the end of the job (`ending[0]`)."""
    global _terminate

    def terminate() -> None:
        if ending[0]:
            end_in_good_order(signal.SIGTERM, None)
        else:
            end()

    _terminate = terminate


def leave_if_forked(error: BaseException | None = None) -> None:
    """A child that user code has forked leaves its task function: it ends here. The outcome is
    its parent's to report."""
    if not references.in_fork:
        return
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif error is not None:
        traceback.print_exception(error)
        code = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def end_user_code() -> None:
    """What the end of an interpreter would do for user code, for one that ends by `os._exit`."""
    atexit._run_exitfuncs()
    # A world that a task has opened: mpi4py ends it where no Python code runs any more, and
    # Open MPI leaves its file in /dev/shm if nobody does.
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
