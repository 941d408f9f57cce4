"""Cancelling the task that a worker runs: KeyboardInterrupt in its main thread, and only there.

    node --CancelTask--> client channel     who reads it notes it in `cancelled`
         --a signal----> main thread        reads the channel now, and looks at `interruptible`

What an actor makes of a cancelled call is in hosting.py: its calls are not interrupted.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

from hpcray.client import references
from hpcray.client.client import Client
from hpcray.worker import surroundings
from hpcray.worker.own_process import INTERRUPT_SIGNAL

# An interrupt that a finaliser has swallowed comes again after this.
_AGAIN_S = 0.002


class Cancels:
    def __init__(self, client: Client) -> None:
        """To be opened in the process that it is in."""
        self.cancelled = client.cancelled
        # The task whose user code runs in the main thread: what a cancel may interrupt.
        self.interruptible = b""
        self.struck = b""  # the task that a cancel has interrupted, until it is over
        self._link = client.link
        self._main = threading.get_ident()
        client.link.check_interrupt = self._check_interrupt
        client.link.on_interrupt = self._read_cancels
        client.on_cancel(self._on_cancel)

    def open(self) -> None:
        surroundings.set_handler(INTERRUPT_SIGNAL, self._on_interrupt)
        self._unraisable = sys.unraisablehook
        sys.unraisablehook = self._on_unraisable

    def _on_interrupt(self, *_: Any) -> None:
        """The node rang: a CancelTask lies in the client channel. In the main thread, anywhere."""
        if references.in_fork:
            return
        if self._link.mine:
            self._link.interrupted = True  # looked at as this frame leaves the client
        else:
            self._read_cancels()

    def _on_cancel(self, task_id: bytes) -> None:
        """Another thread has read it, after the bell perhaps: it rings once more."""
        if task_id == self.interruptible and threading.get_ident() != self._main:
            os.kill(os.getpid(), INTERRUPT_SIGNAL)

    def _read_cancels(self) -> None:
        self._link.read_now()
        self._check_interrupt()

    def _check_interrupt(self) -> None:
        """Stop the running task if it is cancelled; one that is over is left alone."""
        task = self.interruptible
        if task and task in self.cancelled and threading.get_ident() == self._main:
            self.interruptible = b""  # once
            self.struck = task
            raise KeyboardInterrupt

    def _on_unraisable(self, unraisable: Any) -> None:
        """If a finaliser has swallowed the interrupt of a cancel, it comes again."""
        if (self.struck and unraisable.exc_type is KeyboardInterrupt
                and threading.get_ident() == self._main):
            self.interruptible = self.struck
            # Not from here: what it raised would be swallowed, too.
            again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), INTERRUPT_SIGNAL))
            again.daemon = True
            again.start()
        else:
            self._unraisable(unraisable)
