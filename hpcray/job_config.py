"""What a job is asked for, as one object: `init(job_config=JobConfig(...))`. Under Ray's names."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ENCODINGS = ("TEXT", "JSON")


@dataclass
class LoggingConfig:
    """How the root logger of the driver and of every worker writes its lines.

    Attributes:
      encoding: "TEXT", or "JSON": an object per line.
      log_level: the root logger's.
      additional_log_standard_attrs: of `logging.LogRecord`, shown besides the usual ones.

    Raises:
      ValueError: an encoding, level or attribute that there is not.
    """

    encoding: str = "TEXT"
    log_level: str = "INFO"
    additional_log_standard_attrs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise ValueError(f"encoding={self.encoding!r}: it is one of {', '.join(ENCODINGS)}")
        if self.log_level not in logging.getLevelNamesMapping():
            raise ValueError(f"log_level={self.log_level!r} is no level of logging: "
                             f"{', '.join(logging.getLevelNamesMapping())}")
        known = vars(logging.makeLogRecord({}))
        for name in self.additional_log_standard_attrs:
            if name not in known:
                raise ValueError(f"{name!r} is no attribute of a logging.LogRecord: "
                                 f"{', '.join(sorted(known))}")

    def fields(self) -> dict[str, Any]:
        """As `init` hands them to every process."""
        return {"encoding": self.encoding, "log_level": self.log_level,
                "additional": list(self.additional_log_standard_attrs)}


class JobConfig:
    """`init(job_config=...)`: what `init(namespace=, runtime_env=)` say, as one object. What `init`
    itself is given wins.

    Args:
      ray_namespace: of named actors; None: one of the job's own.
      metadata: kept here, for whoever asks this object.
      default_actor_lifetime: "non_detached"; others are refused.

    Raises:
      NotImplementedError: for what hpcray does not have.
    """

    def __init__(
        self, jvm_options: Sequence[str] | None = None,
        code_search_path: Sequence[str] | None = None,
        runtime_env: Mapping[str, Any] | None = None, _client_job: bool = False,
        metadata: Mapping[str, Any] | None = None, ray_namespace: str | None = None,
        default_actor_lifetime: str = "non_detached",
        _disable_job_level_lineage_reconstruction: bool = False,
        _py_driver_sys_path: Sequence[str] | None = None,
    ) -> None:
        if jvm_options or code_search_path:
            raise NotImplementedError(
                "jvm_options and code_search_path are for tasks in other languages, which hpcray "
                "does not have; for Python there is runtime_env={'py_modules': [...]}")
        self.jvm_options: list[str] = []
        self.code_search_path: list[str] = []
        self.metadata = dict(metadata or {})
        self.runtime_env: dict[str, Any] | None = None
        self.ray_namespace = ray_namespace
        self.set_runtime_env(runtime_env)
        self.set_default_actor_lifetime(default_actor_lifetime)

    def set_metadata(self, key: str, value: str) -> None:
        self.metadata[key] = value

    def set_runtime_env(
        self, runtime_env: Mapping[str, Any] | None, validate: bool = False
    ) -> None:
        """`validate`: say now, and not at `init`, what is wrong with it."""
        if validate and runtime_env is not None:
            from hpcray.runtime_env import RuntimeEnv

            runtime_env = RuntimeEnv(**runtime_env)
        self.runtime_env = None if runtime_env is None else dict(runtime_env)

    def set_ray_namespace(self, ray_namespace: str) -> None:
        self.ray_namespace = ray_namespace

    def set_default_actor_lifetime(self, default_actor_lifetime: str) -> None:
        """Raises NotImplementedError for "detached", ValueError for what is no lifetime."""
        if default_actor_lifetime == "detached":
            raise NotImplementedError(
                "default_actor_lifetime='detached' is not supported: give lifetime='detached' to "
                "the actors that should live without a handle")
        if default_actor_lifetime != "non_detached":
            raise ValueError(f"default_actor_lifetime={default_actor_lifetime!r}: it is "
                             "'non_detached' or 'detached'")
        self.default_actor_lifetime = default_actor_lifetime

    def __repr__(self) -> str:
        return f"JobConfig({vars(self)})"


__all__ = ["JobConfig", "LoggingConfig"]
