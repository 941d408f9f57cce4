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


__all__ = ["RuntimeEnv"]
