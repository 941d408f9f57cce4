"""Which descriptors the loop watches, and who handles each. A thin dress over epoll."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Callable
from typing import Any

READ = select.EPOLLIN
WRITE = select.EPOLLOUT


class Watcher:
    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], Any]] = {}

    def watch(self, fd: int, handler: Callable[[int], Any], mask: int = READ) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, mask)

    def change(self, fd: int, mask: int) -> None:
        self._epoll.modify(fd, mask)

    def unwatch(self, fd: int) -> None:
        """Idempotent, and no error for a descriptor that is closed already."""
        if self._handlers.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def watches(self, fd: int) -> bool:
        return fd in self._handlers

    def handle(self, wait_s: float) -> bool:
        """Wait at most `wait_s`, run the handlers of what is ready; whether there was anything."""
        if 0.0 < wait_s < 0.001:
            # epoll alone knows milliseconds only; it can itself be waited for by the microsecond.
            select.select((self._epoll,), (), (), wait_s)
            wait_s = 0.0
        events = self._epoll.poll(wait_s)
        handlers = self._handlers
        for fd, _ in events:
            handler = handlers.get(fd)  # an earlier handler of this round may have unwatched it
            if handler is not None:
                handler(fd)
        return bool(events)

    def close(self) -> None:
        self._epoll.close()
