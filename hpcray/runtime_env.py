"""Ray's class for a `runtime_env`, which may as well be written as a plain dict."""

from __future__ import annotations

import json
from typing import Any

from hpcray.config import check_runtime_env, check_setup


class RuntimeEnv(dict[str, Any]):
    """`RuntimeEnv(env_vars={...})`, wherever a `runtime_env` is taken. Fields that are None are as
    if not given; paths are meant from where this is written.

    Args:
      env_vars: variables of the process. `${NAME}` is replaced by what the node has.
      working_dir: a directory or `.zip` of this machine: tasks run in a copy of it.
      py_modules: directories, `.py`, `.zip` or `.whl` files, or modules, to be importable.
      excludes: patterns of names or paths that are left out of directories.
      worker_process_setup_hook: of the job: what each worker calls before its first task, a
        function without arguments or the name of one, "module.function".
      config: see `RuntimeEnvConfig`.

    Raises:
      NotImplementedError: for the fields of Ray's that hpcray does not have.
      TypeError, ValueError: a field that cannot be.
    """

    def __init__(self, *, _validate: bool = True, **fields: Any) -> None:
        given = {name: value for name, value in fields.items() if value is not None}
        super().__init__(check_runtime_env(given))

    @classmethod
    def _checked(cls, fields: dict[str, Any]) -> RuntimeEnv:
        """Of fields that are as they should be."""
        made = cls()
        made.update(fields)
        return made

    def __setitem__(self, field: str, value: Any) -> None:
        """Checked, as in the constructor; None takes the field away."""
        self.pop(field, None)
        if value is not None:
            for name, good in check_runtime_env({field: value}).items():
                super().__setitem__(name, good)

    set = __setitem__

    def env_vars(self) -> dict[str, str]:
        return dict(self.get("env_vars", {}))

    def working_dir(self) -> str | None:
        return self.get("working_dir")

    def has_working_dir(self) -> bool:
        return self.get("working_dir") is not None

    def py_modules(self) -> list[str]:
        return list(self.get("py_modules", ()))

    def has_conda(self) -> bool:
        """No: those who ask whether packages are installed get an answer."""
        return False

    has_pip = has_uv = has_conda

    def serialize(self) -> str:
        """As JSON. A function in it is its name."""
        return json.dumps(self, sort_keys=True, default=lambda value: value.__name__)

    @classmethod
    def deserialize(cls, serialized_runtime_env: str) -> RuntimeEnv:
        """What `serialize` wrote, checked anew."""
        return cls(**json.loads(serialized_runtime_env))

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
        super().__init__(check_setup(setup_timeout_seconds, eager_install, log_files))

    def to_dict(self) -> dict[str, Any]:
        """A plain dict of the fields."""
        return dict(self)


__all__ = ["RuntimeEnv", "RuntimeEnvConfig"]
