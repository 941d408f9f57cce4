"""Ray's class for a `runtime_env`, which may as well be written as a plain dict."""

from __future__ import annotations

from typing import Any

from hpcray.config import check_runtime_env


class RuntimeEnv(dict[str, Any]):
    """`RuntimeEnv(env_vars={...})`, wherever a `runtime_env` is taken. Fields that are None are as
    if not given; paths are meant from where this is written.

    Raises:
      NotImplementedError: for the fields of Ray's that hpcray does not have.
      TypeError, ValueError: a field that cannot be.
    """

    def __init__(self, **fields: Any) -> None:
        given = {name: value for name, value in fields.items() if value is not None}
        super().__init__(check_runtime_env(given))

    @classmethod
    def _checked(cls, fields: dict[str, Any]) -> RuntimeEnv:
        """Of fields that are as they should be."""
        made = cls()
        made.update(fields)
        return made

    def to_dict(self) -> dict[str, Any]:
        """A plain dict of the fields."""
        return dict(self)


class RuntimeEnvConfig(dict[str, Any]):
    """How a `runtime_env` is set up: `RuntimeEnv(config=RuntimeEnvConfig(...))`.

    Checked, and without effect: hpcray unpacks the job's own packages before the first task that
    needs them, and downloads nothing.

    Args:
      setup_timeout_seconds: a positive integer, or -1.
      log_files: accepted.
    """

    def __init__(
        self, setup_timeout_seconds: int = 600, eager_install: bool = True,
        log_files: list[str] | None = None,
    ) -> None:
        if not isinstance(setup_timeout_seconds, int):
            raise TypeError(f"setup_timeout_seconds must be an int, not {setup_timeout_seconds!r}")
        if setup_timeout_seconds <= 0 and setup_timeout_seconds != -1:
            raise ValueError("setup_timeout_seconds must be above 0, or -1 for no limit, not "
                             f"{setup_timeout_seconds}")
        if not isinstance(eager_install, bool):
            raise TypeError(f"eager_install must be a bool, not {eager_install!r}")
        super().__init__(setup_timeout_seconds=setup_timeout_seconds, eager_install=eager_install,
                         log_files=list(log_files or ()))

    def to_dict(self) -> dict[str, Any]:
        """A plain dict of the fields."""
        return dict(self)


__all__ = ["RuntimeEnv", "RuntimeEnvConfig"]
