"""What a task finds around it: the environment and the placement group that its parent hands on,
and `runtime_env`, whose directories go where it goes.

    working_dir, py_modules --pack--> zip --put, once per job and content--> objects
    Template.packages --> a worker unpacks them, once per node (worker/environment.py)

Children inherit: what a task does not say of itself is as its parent has it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from hpcray import options as options_
from hpcray.client import context
from hpcray.exceptions import RuntimeEnvSetupError
from hpcray.protocol.messages import PY_MODULE, WORKING_DIR

if TYPE_CHECKING:
    from hpcray.client.client import Client

Packages = tuple[tuple[int, bytes], ...]  # (WORKING_DIR or PY_MODULE, object id)

# Ray's limit; more belongs on the shared file system or into objects.
MAX_BYTES = 512 * 1024 * 1024
_NEVER = (".git", "__pycache__")
# The date of every file in a package, so that equal directories make equal packages.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def with_parents(client: Client, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the whole environment of a child: its own over its parent's.

    Raises:
      RuntimeEnvSetupError: a directory cannot be packed.
    """
    parent = context.current()
    own = options.get("runtime_env") or {}
    if not own and not parent.env_vars and not parent.packages:
        return dict(options)
    packages = [item for item in parent.packages
                if item[0] != WORKING_DIR or "working_dir" not in own]
    if "py_modules" in own:
        packages = [item for item in packages if item[0] != PY_MODULE]
    env_vars = {**dict(parent.env_vars), **(own.get("env_vars") or {})}
    return {**options, "runtime_env": {"env_vars": env_vars},
            "_packages": (*packages, *packages_of(client, own))}


def inherited(client: Client, options: options_.Options) -> options_.Options:
    """The options with what the running task hands on: its environment, and its group if that
    captures children, or if the child says so."""
    parent = context.current()
    if parent.env_vars or parent.packages or options.get("runtime_env"):
        options = with_parents(client, options)
    if not parent.group_id:
        return options
    given = options.get("scheduling_strategy")
    if given is None:
        group = options.get("placement_group", "default")
        index = options_.value_of(options, "placement_group_bundle_index")
        captures = options.get("placement_group_capture_child_tasks")
    elif hasattr(given, "placement_group"):
        group, index = given.placement_group, given.placement_group_bundle_index
        captures = given.placement_group_capture_child_tasks
    else:
        return options
    # Only now: most programs never load them.
    from hpcray.bundles import Bundles, from_facts
    from hpcray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    if captures is None:  # its own children, too: as its parent
        captures = parent.captures
    if group == "default" and captures:
        found = client.request("placement_groups", {"group": parent.group_id})
        group = Bundles(*from_facts(found[0])) if found else None
    if group in (None, "default"):
        return options
    strategy = PlacementGroupSchedulingStrategy(group, index, captures)
    return {**options, "placement_group": "default", "scheduling_strategy": strategy}


def packages_of(client: Client, runtime_env: Mapping[str, Any]) -> Packages:
    """Pack and put what a checked runtime_env names."""
    excludes = tuple(runtime_env.get("excludes") or ())
    found: list[tuple[int, bytes]] = []
    if runtime_env.get("working_dir"):
        data = pack(runtime_env["working_dir"], excludes)
        found.append((WORKING_DIR, _put(client, data)))
    for module in runtime_env.get("py_modules") or ():
        found.append((PY_MODULE, _put(client, pack(module, excludes, folder=True))))
    return tuple(found)


def _put(client: Client, data: bytes) -> bytes:
    digest = blake2b(data, digest_size=16).digest()
    known = client.packages.get(digest)
    if known is None:
        ref = client.put(data)
        client.pin_for_job(ref.binary())
        known = client.packages[digest] = ref.binary()
    return known


def pack(path: str, excludes: tuple[str, ...] = (), *, folder: bool = False) -> bytes:
    """A directory (with `folder` under its own name), a Python file or a zip, as a zip.

    Raises:
      RuntimeEnvSetupError: it cannot be read, or is larger than MAX_BYTES.
    """
    import zipfile

    try:
        if os.path.isfile(path) and path.endswith((".zip", ".whl")):
            with open(path, "rb") as archive:
                data = archive.read()
            with zipfile.ZipFile(io.BytesIO(data)) as checked:
                _check_size(path, sum(entry.file_size for entry in checked.infolist()))
            return data
        out = io.BytesIO()
        prefix = os.path.basename(os.path.abspath(path)) if folder else ""
        files = _files(path, excludes) if os.path.isdir(path) else iter([(path, "")])
        total = 0
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for full, relative in files:
                total += os.path.getsize(full)
                _check_size(path, total)
                entry = zipfile.ZipInfo(os.path.join(prefix, relative) if relative else prefix,
                                        _EPOCH)
                entry.external_attr = (os.stat(full).st_mode & 0o777) << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                with open(full, "rb") as source:
                    archive.writestr(entry, source.read())
        return out.getvalue()
    except (OSError, zipfile.BadZipFile) as error:
        raise RuntimeEnvSetupError(f"runtime_env: {path} cannot be packed: {error}") from error


def _files(root: str, excludes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name not in _NEVER
                          and not _excluded(os.path.join(folder, name), root, excludes))
        for name in sorted(files):
            full = os.path.join(folder, name)
            if os.path.isfile(full) and not _excluded(full, root, excludes):
                yield full, os.path.relpath(full, root)


def _excluded(path: str, root: str, patterns: tuple[str, ...]) -> bool:
    relative = os.path.relpath(path, root)
    name = os.path.basename(path)
    return any(fnmatch(relative, p.strip("/")) or fnmatch(name, p.strip("/")) for p in patterns)


def _check_size(path: str, nbytes: int) -> None:
    if nbytes > MAX_BYTES:
        raise RuntimeEnvSetupError(
            f"runtime_env: {path} holds more than {MAX_BYTES >> 20} MiB; leave large files out "
            "(excludes=[...]), or put them on the shared file system")
