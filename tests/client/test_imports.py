"""Which imports of a driver its nodes repeat, and in what order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[2] + "/site-packages", sys.argv[2]]
import json
import own
from hpcray.client.imports import Imports
imports = Imports()
print(*imports.news())
print(*imports.news())
import late
print(*imports.news())
"""


def test_installed_modules_in_the_order_of_their_imports(tmp_path: Path) -> None:
    """A module that only works behind what its importer does first stays behind its importer."""
    installed = tmp_path / "site-packages"
    (installed / "package" / "inner").mkdir(parents=True)
    for name, source in {
        "first.py": "",
        "late.py": "",
        "lazy.py": "import sys\nsys.modules['alias'] = sys.modules['first']",
        "package/__init__.py": "",
        "package/outer.py": "import sys\nsys.ready = True\nimport package.inner.needy, lazy",
        "package/inner/__init__.py": "",
        "package/inner/needy.py": "import sys\nsys.ready",
        "mpi4py.py": "",
    }.items():
        (installed / name).write_text(source)
    (tmp_path / "own.py").write_text("import first, package.outer, mpi4py")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT), str(tmp_path)], capture_output=True, text=True,
        timeout=30, check=True)
    at_first, again, later = done.stdout.split("\n")[:3]
    # What site has imported itself may come before.
    names = [name for name in at_first.split()
             if name.partition(".")[0] in ("first", "package", "lazy", "alias", "own", "mpi4py")]
    assert names == [
        "first", "package", "package.outer", "package.inner", "package.inner.needy", "lazy"]
    assert (again, later) == ("", "late")
