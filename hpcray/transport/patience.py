"""How long to wait for others who may be slow, stopped or dead. Pure; no clock.

A limit of wall-clock time cannot tell a dead process from a loaded machine. So a limit here is of
*no progress*: whatever moves starts it anew. And time counts only while we ourselves run: a
process that was kept from running for a minute (a loaded machine, Ctrl-Z) has not seen anybody be
silent for a minute.
"""

from __future__ import annotations

# One look counts for at most this part of the limit, however long ago the last look was. So a
# limit takes at least this many looks; arbitrary, but one late look must never use it up.
_LOOKS = 10


class Patience:
    """Runs out after `limit_s` in which `progress` stayed the same; look every `look_s`."""

    __slots__ = ("_last_s", "_progress", "limit_s", "waited_s")

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.waited_s = 0.0
        self._last_s: float | None = None
        self._progress: object = None

    @property
    def look_s(self) -> float:
        return self.limit_s / _LOOKS

    def look(self, now_s: float, progress: object) -> bool:
        """Whether it has run out. `progress` is anything that differs once something has moved."""
        if self._last_s is None or progress != self._progress:
            self.waited_s = 0.0
        else:
            self.waited_s += min(now_s - self._last_s, self.look_s)
        self._last_s = now_s
        self._progress = progress
        return self.waited_s >= self.limit_s
