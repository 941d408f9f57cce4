"""What the driver has imported of installed packages: under `preload="auto"` nodes import it, too.

Not the user's own files: those change, and workers are to have them as they are. Not the standard
library: that costs little, and what of it a package needs comes with the package.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

_INSTALLED = tuple(f"{os.sep}{folder}{os.sep}" for folder in ("site-packages", "dist-packages"))
# The zygote has the one; and MPI, which starts with the import, is the nodes' alone.
_NEVER = ("hpcray", "mpi4py")


class Imports:
    """Tells each module once."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._count = 0

    def news(self) -> tuple[str, ...]:
        """Modules imported since the last call, in an order for importing them again.

        `sys.modules` has them in the order in which they were complete: what a module imports
        comes before it. To import that first would be another order than here, where the module
        had begun. So of each package (in the order of their first modules) the last comes first,
        behind the packages it is in.
        """
        if len(sys.modules) == self._count:
            return ()
        self._count = len(sys.modules)
        packages: dict[str, list[str]] = {}
        for name, module in list(sys.modules.items()):
            if name in self._seen:
                continue
            # Not by attribute: a lazy module would be imported by that.
            spec = module.__dict__.get("__spec__") if isinstance(module, ModuleType) else None
            if getattr(spec, "_initializing", False):
                continue  # it may fail yet
            self._seen.add(name)
            # Under another name it is somebody's alias, which its owner makes.
            if spec is None or spec.name != name or name.partition(".")[0] in _NEVER:
                continue
            if any(folder in (spec.origin or "") for folder in _INSTALLED):
                packages.setdefault(name.partition(".")[0], []).append(name)
        found: dict[str, None] = {}
        for names in packages.values():
            known = set(names)
            for name in reversed(names):
                above = (name[:at] for at, letter in enumerate(name) if letter == ".")
                found.update(dict.fromkeys([*(n for n in above if n in known), name]))
        return tuple(found)
