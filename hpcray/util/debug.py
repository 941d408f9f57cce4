"""`log_once`: say a thing one time, however often it happens. By process, as in Ray."""

import threading
import time

PERIOD_S = 60.0

_lock = threading.Lock()
_logged: set[str] = set()
_last_s = 0.0
_disabled = False
_periodic = False


def log_once(key: str) -> bool:
    """Whether this is the first time here that `key` is asked for.

    `enable_periodic_logging` makes every key new again once a minute; after
    `disable_log_once_globally` it is always False.
    """
    global _last_s
    with _lock:
        if _disabled:
            return False
        now_s = time.monotonic()
        if key not in _logged:
            _logged.add(key)
            _last_s = now_s
            return True
        if _periodic and now_s - _last_s > PERIOD_S:
            _logged.clear()
            _last_s = now_s
        return False


def disable_log_once_globally() -> None:
    """In this process."""
    global _disabled
    _disabled = True


def enable_periodic_logging() -> None:
    """In this process; also undoes `disable_log_once_globally`."""
    global _disabled, _periodic
    _disabled = False
    _periodic = True


def reset_log_once(key: str | None = None) -> None:
    """Forget that `key` was asked for; all keys if None."""
    with _lock:
        if key is None:
            _logged.clear()
        else:
            _logged.discard(key)


__all__ = ["disable_log_once_globally", "enable_periodic_logging", "log_once", "reset_log_once"]
