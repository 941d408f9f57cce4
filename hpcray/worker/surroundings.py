"""What a task finds around it in its process, and what is put back before the next one.

    task --os.chdir, os.umask, signal.signal, os.environ[...]--> noted in `changed`
         --sys.stdout, sys.stderr replaced---------------------> seen by comparison
    next task: nothing noted (as nearly always)? run.  Else `restore`, and run.

A worker runs many tasks, and none of them is to find what another one has left. Asking for the
directory, the handlers and the variables would cost 3 us for every task; so the functions that
change them take a note, and a task that changes nothing pays for one comparison.

An actor's calls share their process on purpose: nothing is put back between them.

Not put back: imported modules and `sys.path`, what C code changes past Python, descriptors 1 and 2
themselves, locale, limits, threads.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import contextlib
import functools
import os
import posix
import signal
import time
from collections.abc import Callable
from typing import Any

from hpcray.worker import output

_DIRECTORY, _VARIABLES, _MASK = "directory", "variables", "umask"

# What the running task has changed; names of the above, and numbers of signals.
changed: set[str | int] = set()
_handlers: dict[int, Any] = {}  # by signal: the one before the task's


def forget() -> None:
    """What was changed so far is not a task's doing."""
    changed.clear()
    _handlers.clear()


class Surroundings:
    """The state that every task of this process begins with: `settle` before the first one."""

    __slots__ = ("_directory", "_umask", "_variables")

    def settle(self) -> None:
        """As it is now it is to stay: an environment has been entered."""
        self._umask = os.umask(0o22)
        os.umask(self._umask)
        self._variables = os.environb._data.copy()  # type: ignore[attr-defined]  # of _Variables
        try:
            self._directory = os.getcwd()
        except OSError:
            self._directory = ""  # it has been removed
        forget()

    def restore(self) -> None:
        """Put back what was changed since `settle`."""
        if _DIRECTORY in changed:
            with contextlib.suppress(OSError):  # removed meanwhile
                os.chdir(self._directory)
        if _MASK in changed:
            os.umask(self._umask)
        if _VARIABLES in changed:
            self._restore_variables()
        while _handlers:
            number, handler = _handlers.popitem()
            if number == signal.SIGALRM:
                signal.setitimer(signal.ITIMER_REAL, 0)  # it would strike the next task
            set_handler(number, handler)
        changed.clear()
        output.restore()

    def _restore_variables(self) -> None:
        zone = os.environ.get("TZ")
        for name in os.environb.keys() - self._variables.keys():
            del os.environb[name]
        for variable, value in self._variables.items():
            if os.environb.get(variable) != value:
                os.environb[variable] = value
        if os.environ.get("TZ") != zone:
            time.tzset()


class _Variables(os._Environ[Any]):
    """os.environ, and os.environb, that note a change."""

    def __setitem__(self, key: Any, value: Any) -> None:
        changed.add(_VARIABLES)
        super().__setitem__(key, value)

    def __delitem__(self, key: Any) -> None:
        changed.add(_VARIABLES)
        super().__delitem__(key)


set_handler = _signal.signal  # without a note


@functools.wraps(_signal.signal)
def _signal_noted(number: int, handler: Any) -> Any:
    before = set_handler(number, handler)
    if before is not None:  # else it is not Python's, and cannot be set again
        _handlers.setdefault(int(number), before)
        changed.add(number)
    return before


def _noted(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def noted(*arguments: Any, **named: Any) -> Any:
        changed.add(what)
        return function(*arguments, **named)

    return noted


def take_notes() -> None:
    """From now on, changes of this process are noted. Once, by the zygote for all its workers."""
    os.environ.__class__ = os.environb.__class__ = _Variables
    # Where signal.signal looks it up, whoever has imported that from there.
    _signal.signal = _signal_noted
    for name, what in (("chdir", _DIRECTORY), ("fchdir", _DIRECTORY), ("umask", _MASK)):
        function = getattr(os, name)
        noted = _noted(function, what)
        setattr(os, name, noted)
        setattr(posix, name, noted)  # by which it is pickled
        if function in os.supports_fd:
            os.supports_fd.add(noted)
