"""Entering a task's runtime environment: set its variables, unpack its packages, see its GPUs.

A worker that has entered one stays in it for good: what it has imported, and what its libraries
have read from the environment, cannot be taken back. The dispatcher gives it tasks of the same
environment and the same GPUs only.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hpcray import exceptions
from hpcray.config import expanded
from hpcray.protocol.messages import WORKING_DIR, Template
from hpcray.worker import own_process, zygote

if TYPE_CHECKING:
    from hpcray.client.client import Client


def enter(client: Client, folder: str, template: Template) -> None:
    """Set the variables, change to the working directory and make the modules importable.

    Args:
      folder: this node's directory for packages; whoever comes first makes it.

    Raises:
      RuntimeEnvSetupError: a package cannot be unpacked.
    """
    os.environ.update(expanded(dict(template.env_vars)))
    if not own_process.BLAS_VARIABLES.isdisjoint(dict(template.env_vars)):
        # Of libraries that are loaded already.
        own_process.limit_threads(own_process.thread_limits())
    if not template.packages:
        return
    try:
        _make_private(folder)
        paths: list[str] = []
        for kind, object_id in template.packages:
            path = _unpacked(client, folder, object_id)
            if kind == WORKING_DIR:
                os.chdir(path)
                paths.insert(0, path)
            else:
                paths.append(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise exceptions.RuntimeEnvSetupError(
            f"the runtime_env of {template.name} cannot be set up in {folder}: {error}") from error
    sys.path[:0] = paths
    _forget_preloaded(paths)
    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *([known] if known else [])])


def _forget_preloaded(paths: list[str]) -> None:
    """What the packages bring is imported from there, and not found as the driver has it."""
    brought = {entry.partition(".")[0] for path in paths for entry in os.listdir(path)}
    for name in zygote.preloaded:
        if name.partition(".")[0] in brought:
            sys.modules.pop(name, None)


def set_up(hook: bytes | str) -> None:
    """Call the job's `worker_process_setup_hook`: a pickled function, or the name of one.

    Raises:
      RuntimeEnvSetupError: it cannot be found, or raised.
    """
    try:
        if isinstance(hook, bytes):
            function = pickle.loads(hook)
        else:
            module, _, name = hook.rpartition(".")
            function = getattr(importlib.import_module(module), name)
        function()
    except Exception as error:
        what = hook if isinstance(hook, str) else "the function given"
        raise exceptions.RuntimeEnvSetupError(
            f"worker_process_setup_hook ({what}) failed: {type(error).__name__}: {error}"
        ) from error


# Variables by which libraries choose devices. Slurm sets several of them alike.
_DEVICE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
# Ray's way to say that the program chooses by itself.
_LEFT_ALONE = "RAY_EXPERIMENTAL_NOSET_"


def see_devices(gpus: Mapping[str, Any], devices: Sequence[int]) -> tuple[int | str, ...]:
    """Make these GPUs the visible ones; their names, as `get_gpu_ids` has them.

    Args:
      gpus: of the node: {"variable": what names devices, "ids": their names}.
      devices: positions in "ids".
    """
    chosen = tuple(gpus["ids"][index] for index in devices)
    named_in = os.environ.get(gpus["variable"])
    for name in _DEVICE_VARIABLES:
        alike = named_in is not None and os.environ.get(name) == named_in
        if (name == gpus["variable"] or alike) and not os.environ.get(_LEFT_ALONE + name):
            os.environ[name] = ",".join(map(str, chosen))
    return chosen


def _make_private(folder: str) -> None:
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        found = os.lstat(folder)
        if found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise PermissionError(f"{folder} is somebody else's") from None


def _unpacked(client: Client, folder: str, object_id: bytes) -> str:
    path = os.path.join(folder, object_id.hex())
    if os.path.isdir(path):
        return path
    data = client.get([client.intern(object_id)], None)[0]
    mine = f"{path}.{os.getpid()}"
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            archive.extract(entry, mine)
            mode = entry.external_attr >> 16 & 0o777
            if mode and not entry.is_dir():
                os.chmod(os.path.join(mine, entry.filename), mode | 0o400)
    os.makedirs(mine, exist_ok=True)  # an empty one
    try:
        os.rename(mine, path)
    except OSError:
        shutil.rmtree(mine, ignore_errors=True)  # another worker was first
    return path
