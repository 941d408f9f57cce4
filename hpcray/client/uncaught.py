"""How an exception of a driver that nobody catches is shown: the program's frames, not ours.

An error that says that the job was ended from outside is not shown at all: the node has told that
once, and the program is not at fault. Under a launcher an interrupt gets a sentence as well, like
every other end that is not the program's own.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


class Uncaught:
    """Wraps the hooks that print, whatever they are."""

    def __init__(self) -> None:
        # Whether people have been told of it already.
        self.is_told: Callable[[BaseException], bool] = lambda error: False
        self.under_launcher = False
        self._hook: Any = None
        self._hook_of_threads: Any = None
        self._shown: BaseException | None = None

    def install(self) -> None:
        """Again at every session: the program may have set hooks of its own. Those may call ours of
        an earlier session, so each of ours knows which one it has replaced."""
        if sys.excepthook is not self._hook:
            self._hook = sys.excepthook = partial(self._show, sys.excepthook)
        if threading.excepthook is not self._hook_of_threads:
            self._hook_of_threads = partial(self._show_of_thread, threading.excepthook)
            threading.excepthook = self._hook_of_threads

    def remove(self) -> None:
        """The session is over; what the program has set on top of ours stays."""
        hook: Any = sys.excepthook
        if hook is self._hook:
            sys.excepthook = hook.args[0]
        hook = threading.excepthook
        if hook is self._hook_of_threads:
            threading.excepthook = hook.args[0]

    def _show(
        self, replaced: Callable[..., Any], kind: type[BaseException], error: BaseException,
        trace: TracebackType | None,
    ) -> None:
        if self._shown is error:  # by ours of a later session
            replaced(kind, error, trace)
            return
        if self.is_told(error):
            return
        self._shown = error
        cut(error)
        replaced(kind, error, trace)
        if self.under_launcher and kind is KeyboardInterrupt:
            print("hpcray: the job ends: it was interrupted (Ctrl-C or a SIGINT)",
                  file=sys.stderr, flush=True)

    def _show_of_thread(
        self, replaced: Callable[..., Any], arguments: threading.ExceptHookArgs
    ) -> None:
        error = arguments.exc_value
        if error is not None:
            if self.is_told(error):
                return
            cut(error)
        replaced(arguments)


def cut(error: BaseException | None) -> None:
    """Take our frames from the end of its traceback, and from those of what led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        last, trace = None, error.__traceback__
        while trace is not None:
            if not trace.tb_frame.f_code.co_filename.startswith(_PACKAGE):
                last = trace
            trace = trace.tb_next
        if last is not None:
            last.tb_next = None
        error = error.__cause__ or error.__context__
