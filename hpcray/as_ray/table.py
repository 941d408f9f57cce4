"""What every module of `ray` is under hpcray, as data; and which versions of Ray are tested.

The longest entry that is a prefix of a module's name counts. A module that no entry names is
hpcray's own of the same name, if there is one; else `hpcray/absent.py` says what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ROOT, SERVED, OURS, STUB, SAME = "root", "served", "ours", "stub", "same"

# Series of Ray whose Tune and RLlib run here; others are refused unless asked for.
TESTED = ("2.60", "2.49")
RECOMMENDED = "2.60.0"

# Set where they are not, before Ray's files are read.
STARTUP_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0"}

_PRIVATE = "hpcray.as_ray.private"

# Pure Python files of the installed ray, with everything below them.
_SERVED = (
    "ray.tune", "ray.air", "ray.train", "ray.rllib", "ray.widgets", "ray._common",
    "ray._private.accelerators", "ray._private.dict", "ray._private.inspect_util",
    "ray._private.label_utils", "ray._private.log", "ray._private.ray_constants",
    "ray._private.thirdparty", "ray._private.arrow_utils", "ray.util.common", "ray.util.timer",
    "ray.util.tpu",
)

# Ray's name -> ours, where ours is not the same.
_OURS = {
    "ray._private": _PRIVATE,
    "ray._private.worker": f"{_PRIVATE}.worker",
    "ray._private.services": f"{_PRIVATE}.services",
    "ray._private.state": f"{_PRIVATE}.state",
    "ray._private.utils": f"{_PRIVATE}.utils",
    "ray._private.client_mode_hook": f"{_PRIVATE}.client_mode_hook",
    "ray._private.ray_logging": f"{_PRIVATE}.ray_logging",
    "ray._private.auto_init_hook": f"{_PRIVATE}.client_mode_hook",
    "ray._raylet": f"{_PRIVATE}.raylet",
    "ray.util.client": f"{_PRIVATE}.client",
    "ray.data": f"{_PRIVATE}.data",
    "ray.data.context": f"{_PRIVATE}.data",
    "ray._common.usage.usage_lib": f"{_PRIVATE}.usage",
}

# Names that Ray's libraries want of modules of ours, which have them under the switch only; STUB:
# it can be imported, and is refused when used.
EXTRA_NAMES = {
    "ray.cloudpickle": {"dumps_debug": f"{_PRIVATE}.names:dumps_debug"},
    "ray.util": {
        "client": f"{_PRIVATE}.client",
        "DeveloperAPI": "hpcray.util.annotations:DeveloperAPI",
        "PublicAPI": "hpcray.util.annotations:PublicAPI",
    },
    "ray.util.annotations": {"_mark_annotated": f"{_PRIVATE}.names:mark_annotated"},
    "ray.util.debug": {"Suspect": STUB, "_test_some_code_for_memory_leaks": STUB},
    "ray.util.iter": {"_NextValueNotReady": f"{_PRIVATE}.names:NextValueNotReady"},
    "ray.util.placement_group": {
        "_valid_resource_shape": f"{_PRIVATE}.names:valid_resource_shape"},
    "ray.util.scheduling_strategies": {
        "SchedulingStrategyT": f"{_PRIVATE}.names:SchedulingStrategyT"},
}

# Importable, and refused when used.
STUBS: dict[str, Sequence[str]] = {
    "ray.core": ("*",),
    "ray.core.generated": ("*",),
    "ray.dashboard": ("*",),
    "ray.autoscaler": ("*",),
    "ray._private.event": ("*",),
    "ray._private.test_utils": ("*",),
    "ray._private.internal_api": ("memory_summary",),
    "ray.data.block": ("Block", "BlockAccessor", "BlockMetadata"),
    "ray.data.collate_fn": ("*",),
    "ray.data.extensions": ("*",),
    "ray.data.iterator": ("DataIterator", "_IterableFromIterator"),
    "ray.data.preprocessor": ("Preprocessor",),
    "ray.data.preprocessors": ("*",),
    "ray.data.util": ("*",),
    "ray.data._internal": ("*",),
}

# Names of `ray.data` itself that can be imported, and are refused when used.
DATA_STUBS = frozenset({
    "Datasource", "ExecutionOptions", "ReadTask", "from_items", "from_numpy", "from_pandas",
    "range", "read_csv", "read_datasource", "read_json", "read_parquet",
})

# Attributes of `ray` itself that hpcray has not: "module:attribute".
ROOT_NAMES = {"LOCAL_MODE": f"{_PRIVATE}.worker:LOCAL_MODE"}

# Modules that `ray.X` finds although nothing has imported them.
ROOT_MODULES = frozenset({"_private", "_raylet", "data", "autoscaler"})

_EXTRAS = {"rllib": "rllib", "tune": "tune", "train": "train"}


def _entries() -> dict[str, tuple[str, Any]]:
    found: dict[str, tuple[str, Any]] = dict.fromkeys(_SERVED, (SERVED, None))
    found.update({name: (STUB, names) for name, names in STUBS.items()})
    found.update({name: (OURS, ours) for name, ours in _OURS.items()})
    return found


_ENTRIES = _entries()


def kind_of(fullname: str) -> tuple[str, Any]:
    """(kind, what goes with it) of a module below `ray`; of SAME, whether it is below an entry."""
    if fullname == "ray":
        return ROOT, None
    prefix = fullname
    below = False
    while prefix != "ray":
        entry = _ENTRIES.get(prefix)
        # What is ours is that module only, not what is below it; so is a list of stubs.
        if entry is not None and (prefix == fullname or not (
                entry[0] == OURS or (entry[0] == STUB and "*" not in entry[1]))):
            return entry
        below = below or entry is not None
        prefix = prefix.rpartition(".")[0]
    return SAME, below


def extra_of(fullname: str) -> str:
    """The extra of the ray package that a library needs."""
    return _EXTRAS.get(fullname.split(".")[1], "tune")
