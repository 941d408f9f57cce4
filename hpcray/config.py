"""What `init` was asked for, checked, as one value that travels to every process that needs it.

    arguments of init()  -->  HPCRAY_* environment  -->  defaults       (the first that speaks wins)

Knows nothing of machines: `None` means "find out", and the launcher does. Every mistake is
reported here, before anything is started, and names the argument or variable at fault.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

import msgspec

from hpcray.protocol import words
from hpcray.protocol.labels import check_labels, parse_labels

# The least that shared memory comes in: a page.
_STORE_BYTES = 4096

# Every variable read here: the arguments of `init` that have one.
ENVIRONMENT = {
    "HPCRAY_NUM_CPUS": "CPUs of each node",
    "HPCRAY_NUM_GPUS": "GPUs of each node",
    "HPCRAY_OBJECT_STORE_BYTES": "shared memory each node may use for objects",
    "HPCRAY_MEMORY_BYTES": "the `memory` resource of each node",
    "HPCRAY_LABELS": "labels of a node, read on every rank: JSON, or zone=a,tier=fast",
    "HPCRAY_NAMESPACE": "namespace of named actors",
    "HPCRAY_LOG_TO_DRIVER": "0: what workers print does not reach the driver's terminal",
    "HPCRAY_COLOR_PREFIX": "of what workers print, on a terminal; 0: none, 1: one for each pid",
    "HPCRAY_DEDUP_LOGS": "0: lines of workers that differ only in numbers are all shown",
    "HPCRAY_DEDUP_LOGS_AGG_WINDOW_S": "after how many seconds such lines are counted: 5",
    "HPCRAY_DEDUP_LOGS_ALLOW_REGEX": "lines that are always shown",
    "HPCRAY_DEDUP_LOGS_SKIP_REGEX": "lines that are never shown",
    "HPCRAY_PRELOAD": "modules each node imports once for all its workers, separated by commas; "
                      "auto: what the driver has imported",
    "HPCRAY_REDIS_URL": "an existing control store instead of our own",
    "HPCRAY_START_TIMEOUT_S": "how long the start may take",
}

# These are Ray's as well: RAY_... is read if HPCRAY_... is not set.
_ALSO_RAYS = {"HPCRAY_LOG_TO_DRIVER", "HPCRAY_COLOR_PREFIX",
              *(name for name in ENVIRONMENT if name.startswith("HPCRAY_DEDUP_LOGS"))}

# Those that others read; the last four by the templates in `slurm/` and by benchmarks.
OTHER_VARIABLES = {
    "HPCRAY_MPIRUN": "the mpirun of `hpcray run -n`",
    "HPCRAY_MPIRUN_ARGS": "what `hpcray run -n` adds to the command line of mpirun",
    "HPCRAY_KEEP_BINDING": "1: a rank keeps to the cores that mpirun bound it to",
    "HPCRAY_END_TIMEOUT_S": "how long a node may take to end after its driver or launcher has: 60",
    "HPCRAY_POLL": "busy: a node never sleeps while it waits for MPI",
    "HPCRAY_MAP_PEERS": "0: ranks of one host copy objects by MPI, not by shared memory",
    "HPCRAY_LAUNCH_ID": "set by `hpcray run -n`",
    "HPCRAY_FT": "set by `hpcray run -n N --ft`",
    "HPCRAY_VENV": "the environment that the Slurm templates activate",
    "HPCRAY_USE_MPIRUN": "1: slurm/multi_node.sbatch uses mpirun, not srun",
    "HPCRAY_SRUN_MPI": "what the Slurm templates give to srun --mpi",
    "HPCRAY_AS_RAY_ANY_VERSION": "1: --as-ray takes a version of ray that was not tested",
    "HPCRAY_RAY_PYTHON": "the Python that has Ray, for benchmarks/compare.py",
}


class InitConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Plain data: JSON and msgpack carry it. Amounts are per node; None: detected there."""

    num_cpus: float | None = None
    num_gpus: float | None = None
    resources: dict[str, float] = {}
    object_store_memory_bytes: int | None = None
    memory_bytes: int | None = None
    namespace: str = ""
    log_to_driver: bool = True
    log_rules: dict[str, Any] = {}  # which lines fold: `hpcray.observe.logs.LogRules`
    color_prefix: str = ""
    preload: list[str] | Literal["auto"] = []  # "auto": what the driver has imported
    as_ray: bool = False  # `import ray` gives hpcray, on all nodes
    logging: dict[str, Any] = {}  # fields of a LoggingConfig; {}: workers' loggers are left alone
    runtime_env: dict[str, Any] = {}  # as `check_runtime_env` returns it
    labels: dict[str, str] = {}
    redis_url: str = ""  # may hold a password: never print it, print `public_redis_url`
    start_timeout_s: float = 300.0

    @property
    def public_redis_url(self) -> str:
        return without_password(self.redis_url)

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{name}={(self.public_redis_url if name == 'redis_url' else getattr(self, name))!r}"
            for name in self.__struct_fields__
        )
        return f"InitConfig({shown})"

    __str__ = __repr__

    def __rich_repr__(self) -> Any:
        for name in self.__struct_fields__:
            yield name, self.public_redis_url if name == "redis_url" else getattr(self, name)


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """A sentence for each HPCRAY_* variable that is set and that nobody reads. Most are typos."""
    known = [*ENVIRONMENT, *OTHER_VARIABLES]
    return [
        f"the environment has {name}, which hpcray does not know and ignores."
        f"{words.did_you_mean(name, known, prefix='HPCRAY_')}"
        for name in sorted(environ)
        if name.startswith("HPCRAY_") and name not in known
        and not name.startswith("HPCRAY_TEST_")]


def without_password(url: str) -> str:
    """The URL as it may be shown. One that cannot be parsed is not shown at all."""
    if not url:
        return ""
    try:
        parts = urlsplit(url)
        if parts.password is None:
            return url
    except ValueError:
        return "(not a URL)"
    user_host = parts.netloc.rpartition("@")
    user = user_host[0].partition(":")[0]
    return urlunsplit(parts._replace(netloc=f"{user}:***@{user_host[2]}"))


def make_config(
    *,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    resources: Mapping[str, float] | None = None,
    object_store_memory_bytes: int | None = None,
    memory_bytes: int | None = None,
    namespace: str | None = None,
    log_to_driver: bool | None = None,
    preload: Sequence[str] | None = None,
    as_ray: bool = False,
    runtime_env: Mapping[str, Any] | None = None,
    labels: Mapping[str, str] | None = None,
    redis_url: str | None = None,
    logging: Mapping[str, Any] | None = None,
    start_timeout_s: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> InitConfig:
    """The checked configuration; `environment` is `os.environ` unless a test says otherwise.

    Raises:
      TypeError, ValueError: naming the argument or the variable at fault.
    """
    found = _Environment(os.environ if environment is None else environment)
    if namespace is not None:
        check_namespace(namespace)
    if redis_url is None:
        redis_url = found.text("HPCRAY_REDIS_URL")
    if preload is None:  # Ray's libraries take seconds to import
        preload = found.words("HPCRAY_PRELOAD") or ("auto" if as_ray else [])
    return InitConfig(
        num_cpus=_amount("num_cpus", num_cpus, found.number("HPCRAY_NUM_CPUS")),
        num_gpus=_amount("num_gpus", num_gpus, found.number("HPCRAY_NUM_GPUS")),
        resources=check_node_resources(resources),
        object_store_memory_bytes=_size("object_store_memory", object_store_memory_bytes,
                                        found.integer("HPCRAY_OBJECT_STORE_BYTES"), _STORE_BYTES),
        memory_bytes=_size("memory", memory_bytes, found.integer("HPCRAY_MEMORY_BYTES")),
        namespace=found.text("HPCRAY_NAMESPACE") if namespace is None else namespace,
        log_to_driver=(found.flag("HPCRAY_LOG_TO_DRIVER", True)
                       if log_to_driver is None else bool(log_to_driver)),
        log_rules=_log_rules(found),
        color_prefix=found.text("HPCRAY_COLOR_PREFIX"),
        preload=_modules(preload),
        as_ray=as_ray,
        runtime_env=check_runtime_env(runtime_env),
        labels=_labels(labels, found.text("HPCRAY_LABELS")),
        redis_url=redis_url,
        logging=dict(logging or {}),
        start_timeout_s=_seconds("start_timeout_s", start_timeout_s,
                                 found.number("HPCRAY_START_TIMEOUT_S"), 300.0),
    )


def _log_rules(found: _Environment) -> dict[str, Any]:
    rules: dict[str, Any] = {}
    if not found.flag("HPCRAY_DEDUP_LOGS", True):
        rules["enabled"] = False
    window_s = found.number("HPCRAY_DEDUP_LOGS_AGG_WINDOW_S")
    if window_s is not None:
        rules["window_s"] = window_s
    for rule, name in (("keep", "HPCRAY_DEDUP_LOGS_ALLOW_REGEX"),
                       ("skip", "HPCRAY_DEDUP_LOGS_SKIP_REGEX")):
        try:
            re.compile(pattern := found.text(name))
        except re.error as error:
            raise ValueError(f"{name}={pattern!r} in the environment is no regular expression: "
                             f"{error}") from None
        if pattern:
            rules[rule] = pattern
    return rules


def check_runtime_env(runtime_env: Mapping[str, Any] | None) -> dict[str, Any]:
    """A runtime_env reduced to what it says, with absolute paths: env_vars, working_dir,
    py_modules, excludes, worker_process_setup_hook.

    Raises:
      NotImplementedError: for the fields of Ray's that hpcray does not have.
      TypeError, ValueError: a field that cannot be.
    """
    if runtime_env is None:
        return {}
    if not isinstance(runtime_env, Mapping):
        raise TypeError(f"runtime_env must be a dict, not {type(runtime_env).__name__}")
    others = sorted(str(key) for key in runtime_env if key not in _RUNTIME_ENV)
    if others:
        raise NotImplementedError(
            f"runtime_env supports {', '.join(_RUNTIME_ENV)} only, not "
            f"{', '.join(map(repr, others))}: workers use the driver's Python; install packages "
            "into its environment before the job")
    checked: dict[str, Any] = {}
    if (how := runtime_env.get("config")) is not None:
        if not isinstance(how, Mapping):
            raise TypeError("runtime_env['config'] must be a RuntimeEnvConfig or a dict, not "
                            f"{type(how).__name__}")
        check_setup(**how)
    if len(runtime_env) > ("env_vars" in runtime_env):
        checked = _check_directories(runtime_env)
    env_vars = runtime_env.get("env_vars")
    if env_vars is None:
        return checked
    if not isinstance(env_vars, Mapping):
        raise TypeError(f"runtime_env['env_vars'] must be a dict, not {type(env_vars).__name__}")
    for key, value in env_vars.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(
                f"runtime_env['env_vars'] maps str to str; {key!r}: {value!r} does not")
        if not key or "=" in key or "\0" in key or "\0" in value:
            raise ValueError(f"runtime_env['env_vars']: {key!r} cannot name or hold a variable")
    return {**checked, "env_vars": dict(env_vars)} if env_vars else checked


def check_setup(
    setup_timeout_seconds: int = 600, eager_install: bool = True,
    log_files: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The fields of a RuntimeEnvConfig.

    Raises:
      TypeError, ValueError: one that cannot be, or that there is not.
    """
    if not isinstance(setup_timeout_seconds, int):
        raise TypeError(f"setup_timeout_seconds must be an int, not {setup_timeout_seconds!r}")
    if setup_timeout_seconds <= 0 and setup_timeout_seconds != -1:
        raise ValueError("setup_timeout_seconds must be above 0, or -1 for no limit, not "
                         f"{setup_timeout_seconds}")
    if not isinstance(eager_install, bool):
        raise TypeError(f"eager_install must be a bool, not {eager_install!r}")
    return {"setup_timeout_seconds": setup_timeout_seconds, "eager_install": eager_install,
            "log_files": list(log_files or ())}


def expanded(env_vars: Mapping[str, str]) -> dict[str, str]:
    """Their values with ${NAME} replaced by what this process has; by nothing if it has not. $NAME,
    too, but that stays if there is none (as in Ray)."""
    return {name: re.sub(r"\$\{\w+\}", "", os.path.expandvars(value))
            for name, value in env_vars.items()}


# Of the job: what every worker calls before its first task, a function or "module.function".
SETUP_HOOK = "worker_process_setup_hook"
# "config" says how the others are set up, and has no effect (`hpcray.runtime_env`).
_RUNTIME_ENV = ("env_vars", "working_dir", "py_modules", "excludes", "config", SETUP_HOOK)


def _check_directories(runtime_env: Mapping[str, Any]) -> dict[str, Any]:
    """The fields other than env_vars, with absolute paths.

    Raises:
      TypeError, ValueError: not a directory (or zip), or not on this machine.
    """
    checked: dict[str, Any] = {}
    hook = runtime_env.get(SETUP_HOOK)
    if hook is not None:
        named = isinstance(hook, str) and all(map(str.isidentifier, hook.split("."))) and (
            "." in hook)
        if not (named or callable(hook)):
            raise TypeError(f"runtime_env[{SETUP_HOOK!r}] must be a function or the name of one, "
                            f"'module.function', not {hook!r}")
        checked[SETUP_HOOK] = hook
    working_dir = runtime_env.get("working_dir")
    if working_dir is not None:
        checked["working_dir"] = _path("working_dir", working_dir, (".zip",))
    modules = runtime_env.get("py_modules")
    if modules is not None:
        if not isinstance(modules, (list, tuple)):
            raise TypeError(f"runtime_env['py_modules'] must be a list, not {modules!r}")
        checked["py_modules"] = [
            _path("py_modules", _module_path(module), (".zip", ".whl", ".py"))
            for module in modules]
    excludes = runtime_env.get("excludes")
    if excludes is not None:
        if not isinstance(excludes, (list, tuple)) or not all(
            isinstance(pattern, str) for pattern in excludes
        ):
            raise TypeError(f"runtime_env['excludes'] must be a list of patterns, not {excludes!r}")
        checked["excludes"] = list(excludes)
    return checked


def _module_path(module: Any) -> Any:
    if not isinstance(module, ModuleType):
        return module
    paths = list(getattr(module, "__path__", ())) or [module.__file__]
    return paths[0]


def _path(field: str, path: Any, files: tuple[str, ...]) -> str:
    if isinstance(path, os.PathLike):
        path = os.fspath(path)
    if not isinstance(path, str):
        raise TypeError(f"runtime_env[{field!r}] takes paths, not {path!r}")
    if "://" in path:
        raise ValueError(f"runtime_env[{field!r}]: {path!r} is remote; copy it to a directory that "
                         "this machine can read")
    full = os.path.abspath(os.path.expanduser(path))
    if not (os.path.isdir(full) or (os.path.isfile(full) and full.endswith(files))):
        kinds = ", ".join(("a directory", *(f"a {suffix} file" for suffix in files)))
        raise ValueError(f"runtime_env[{field!r}]: {full} is none of {kinds}")
    return full


def check_namespace(namespace: object) -> str:
    if not isinstance(namespace, str):
        raise TypeError(f"namespace must be None or a string, not {type(namespace).__name__}")
    if not namespace:
        raise ValueError("the namespace may not be empty; leave it out for the job's own")
    return namespace


def check_node_resources(resources: Mapping[str, float] | None) -> dict[str, float]:
    """Custom resources of a node."""
    if resources is None:
        return {}
    if not isinstance(resources, Mapping):
        raise TypeError(f"resources must be a dict, not {type(resources).__name__}")
    for reserved, instead in _RESERVED.items():
        if reserved in resources:
            raise ValueError(f"resources may not name {reserved!r}: use {instead}")
    checked = {}
    for name, amount in resources.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"a resource is named by a non-empty string, not {name!r}")
        check_resource_name(name)
        value = _amount(f"resources[{name!r}]", amount, None)
        if value is not None:
            checked[name] = value
    return checked


def check_resource_name(name: str) -> None:
    """Names that the runtime gives to parts of placement groups and to conditions on labels."""
    if "@" in name or name[0] in "?~":
        raise ValueError(f"a resource cannot be named {name!r}: '@', and '?' or '~' in front, are "
                         "the runtime's own")


_RESERVED = {
    "CPU": "num_cpus", "GPU": "num_gpus", "memory": "_memory",
    "object_store_memory": "object_store_memory",
}


def _labels(labels: Mapping[str, str] | None, of_this_rank: str) -> dict[str, str]:
    """Those of every node. What the environment says of this one its node reads; here it is only
    checked, where a mistake can be told."""
    try:
        parse_labels(of_this_rank)
    except (TypeError, ValueError) as error:
        raise ValueError(f"HPCRAY_LABELS in the environment: {error}") from None
    if labels is None:
        return {}
    if not isinstance(labels, Mapping):
        raise TypeError(f"labels must map str to str, not {labels!r}")
    return check_labels(labels)


def _amount(name: str, given: object, fallback: float | None) -> float | None:
    if given is None:
        return fallback
    if not isinstance(given, (int, float)):
        raise TypeError(f"{name} must be a number, not {given!r}")
    if not math.isfinite(given) or given < 0:
        raise ValueError(f"{name} must be a finite number >= 0, not {given!r}")
    return float(given)


def _modules(preload: object) -> list[str] | Literal["auto"]:
    if preload == "auto" or preload == ["auto"]:
        return "auto"
    if isinstance(preload, str) or not isinstance(preload, Sequence) or not all(
        isinstance(module, str) and module for module in preload
    ):
        raise TypeError(f'preload must be a list of module names, or "auto", not {preload!r}')
    return list(preload)


def _size(name: str, given: object, fallback: int | None, minimum: int = 1) -> int | None:
    value = fallback if given is None else given
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 2e9 is what people write
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number of bytes, not {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum} bytes, not {value!r}")
    return value


def _seconds(name: str, given: float | None, fallback: float | None, default: float) -> float:
    value = _amount(name, given, fallback)
    if value is None:
        return default
    if value <= 0:
        raise ValueError(f"{name} must be positive, not {value!r}")
    return value


class _Environment:
    """HPCRAY_* variables. An empty one counts as unset, as shells make it hard to unset."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables

    def text(self, name: str) -> str:
        text = self._variables.get(name, "").strip()
        if not text and name in _ALSO_RAYS:
            text = self._variables.get(name.removeprefix("HPC"), "").strip()
        return text

    def words(self, name: str) -> list[str]:
        return [word.strip() for word in self.text(name).split(",") if word.strip()]

    def number(self, name: str) -> float | None:
        text = self.text(name)
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"{name}={text!r} in the environment is not a number") from None
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{name}={text!r} in the environment must be finite and >= 0")
        return value

    def integer(self, name: str) -> int | None:
        try:
            value = self.number(name)
        except ValueError as error:
            raise ValueError(f"{error} of bytes; 8 GB are 8e9") from None
        if value is None:
            return None
        if value < 1 or not value.is_integer():
            raise ValueError(f"{name}={self.text(name)!r} in the environment must be a positive "
                             "whole number of bytes")
        return int(value)

    def flag(self, name: str, default: bool) -> bool:
        text = self.text(name).lower()
        if not text:
            return default
        if text in ("1", "true", "yes", "on"):
            return True
        if text in ("0", "false", "no", "off"):
            return False
        raise ValueError(f"{name}={text!r} in the environment is neither 1 nor 0")
