"""Entering a task's runtime environment: unpack its packages, once per node, and live there.

A worker that has entered one stays in it for good: what it has imported cannot be taken back. The
dispatcher gives it tasks of the same environment only.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import zipfile
from typing import TYPE_CHECKING

from hpcray import exceptions
from hpcray.protocol.messages import WORKING_DIR, Template

if TYPE_CHECKING:
    from hpcray.client.client import Client


def enter(client: Client, folder: str, template: Template) -> None:
    """Change to the working directory and make the modules importable.

    Args:
      folder: this node's directory for packages; whoever comes first makes it.

    Raises:
      RuntimeEnvSetupError: a package cannot be unpacked.
    """
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
    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *([known] if known else [])])


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
