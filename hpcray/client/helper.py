"""The client's helper thread: flushes what lingers and reads while nobody waits.

    asleep    watches the wake-up descriptor and, unless some thread reads, the socket
    armed     there was activity: every 2 ms send what lingers; after 20 ms of quiet, asleep

It never competes with a waiting thread for the socket: as long as one has read within the
last 10 ms, the helper only ticks. Waking it costs a system call and a GIL switch, so `arm`
does so only when it sleeps.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcray.client.client import Client

_TICK_MS = 2
_BUSY_TICK_MS = 5
_QUIET_S = 0.02
_READER_TICK_MS = 10
_DROPS_MS = 100


class Helper:
    def __init__(self, client: Client) -> None:
        self._client = client
        self._thread: threading.Thread | None = None
        self._wake_fd = -1
        self._armed = False
        self._stopping = False
        self._pollers = threading.local()

    def start(self) -> None:
        if self._thread is None and not self._stopping:
            self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._thread = threading.Thread(target=self._run, name="hpcray-helper", daemon=True)
            self._thread.start()

    def arm(self) -> None:
        """Something lingers in the outbox."""
        if not self._armed:
            self._armed = True
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

    def poll_socket(self, sock: Any, timeout_s: float) -> bool:
        """Wait for input on the client's socket (by a waiting thread, not by the helper)."""
        poller = getattr(self._pollers, "poller", None)
        if poller is None:
            poller = self._pollers.poller = select.poll()
            poller.register(sock, select.POLLIN)
        return bool(poller.poll(min(timeout_s, 3600.0) * 1000 + 0.999))

    def _run(self) -> None:
        from hpcray.exceptions import RaySystemError

        client = self._client
        sock = client._channel.socket
        both = select.poll()
        both.register(self._wake_fd, select.POLLIN)
        both.register(sock, select.POLLIN)
        wake_only = select.poll()
        wake_only.register(self._wake_fd, select.POLLIN)
        # A ref that dies while a driver idles must be told some time; a worker tells with results.
        asleep_ms = _DROPS_MS if client.is_driver else None
        quiet_since_s = time.monotonic()
        while not self._stopping and client.lost is None:
            try:
                if client.being_read:
                    # Whoever reads also sends: ticks only catch what it leaves behind.
                    events = wake_only.poll(_BUSY_TICK_MS if self._armed else _READER_TICK_MS)
                else:
                    events = both.poll(_TICK_MS if self._armed else asleep_ms)
                if events:
                    quiet_since_s = time.monotonic()
                    for descriptor, _ in events:
                        if descriptor == self._wake_fd:
                            with contextlib.suppress(BlockingIOError):
                                os.eventfd_read(self._wake_fd)
                        else:
                            client.read_idle()
                if client.flush_lingering():
                    quiet_since_s = time.monotonic()
                elif self._armed and time.monotonic() - quiet_since_s > _QUIET_S:
                    self._armed = False
                client.futures.complete()
            except RaySystemError:
                break
        # A lost node still completes the futures: with its error.
        if not self._stopping:
            client.futures.complete()
