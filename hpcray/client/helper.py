"""The client's helper thread: flushes what lingers and reads while nobody waits.

    asleep    watches the wake-up descriptor and, unless some thread reads, the socket
    armed     there was activity: every 2 ms send what lingers; after 20 ms of quiet, asleep

It never competes with a waiting thread for the socket: as long as one has read since the last
tick, the helper only ticks. Waking it costs a system call and a GIL switch, so `arm`
does so only when it sleeps.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable

from hpcray.client.link import Link
from hpcray.exceptions import RaySystemError

_TICK_MS = 2
_BUSY_TICK_MS = 5
_QUIET_S = 0.02
_READER_TICK_MS = 10
_DROPS_MS = 100


def _never() -> bool:
    return False


class Helper:
    def __init__(self, link: Link, *, is_driver: bool) -> None:
        self._link = link
        link.arm = self.arm
        link.wake = self.wake
        self._is_driver = is_driver
        # Futures are completed here; while some wait, the helper reads too.
        self.complete: Callable[[], None] = lambda: None
        self.has_futures: Callable[[], bool] = _never
        self._thread: threading.Thread | None = None
        self._wake_fd = -1
        self._stopping = False

    def start(self) -> None:
        if self._thread is None and not self._stopping:
            self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._thread = threading.Thread(target=self._run, name="hpcray-helper", daemon=True)
            self._thread.start()

    def arm(self) -> None:
        """Something lingers in the outbox."""
        if not self._link.armed:
            self._link.armed = True
            if self._thread is None:
                self.start()
            self.wake()

    def wake(self) -> None:
        if self._wake_fd >= 0:
            with contextlib.suppress(OSError):
                os.eventfd_write(self._wake_fd, 1)

    def stop(self) -> None:
        self._stopping = True
        self.wake()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            # It ends within a tick; a user callback running in it may take longer than we wait.
            thread.join(timeout=2)
        if self._wake_fd >= 0 and (thread is None or not thread.is_alive()):
            os.close(self._wake_fd)
            self._wake_fd = -1

    def _run(self) -> None:
        link = self._link
        both = select.poll()
        both.register(self._wake_fd, select.POLLIN)
        both.register(link.socket, select.POLLIN)
        wake_only = select.poll()
        wake_only.register(self._wake_fd, select.POLLIN)
        # A ref that dies while a driver idles must be told some time; a worker tells with results.
        asleep_ms = _DROPS_MS if self._is_driver else None
        quiet_since_s = time.monotonic()
        while not self._stopping and link.lost is None:
            try:
                # Futures need it, though a thread that waits may have read just now.
                if link.is_read(lately=not self.has_futures()):
                    # Whoever reads also sends: ticks only catch what it leaves behind.
                    events = wake_only.poll(_BUSY_TICK_MS if link.armed else _READER_TICK_MS)
                else:
                    events = both.poll(_TICK_MS if link.armed else asleep_ms)
                if events:
                    quiet_since_s = time.monotonic()
                    for descriptor, _ in events:
                        if descriptor == self._wake_fd:
                            with contextlib.suppress(BlockingIOError):
                                os.eventfd_read(self._wake_fd)
                        else:
                            link.read_idle()
                if link.flush_lingering():
                    quiet_since_s = time.monotonic()
                elif link.armed and time.monotonic() - quiet_since_s > _QUIET_S:
                    link.armed = False
                self.complete()
            except RaySystemError:
                break
            except OSError:
                continue  # no descriptor to send with: the next tick tries again
        # A lost node still completes the futures: with its error.
        if not self._stopping:
            self.complete()
