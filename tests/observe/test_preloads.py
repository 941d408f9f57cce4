"""`hpcray doctor MODULE...`: which modules nodes can import in advance."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def doctor(folder: Path, *modules: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hpcray", "doctor", *modules], cwd=folder, text=True, timeout=60,
        capture_output=True, env={**os.environ, "PYTHONPATH": f"{ROOT}:{folder}"})


def test_each_module_has_a_line(tmp_path: Path) -> None:
    (tmp_path / "fit.py").touch()
    (tmp_path / "threaded.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()")
    done = doctor(tmp_path, "fit", "threaded", "no_such_module")
    assert done.returncode == 0, done.stderr
    fit, threaded, fix, missing, _, _, end = done.stdout.splitlines()
    assert fit.split() == "ok preload fit: imported once for all workers of a node".split()
    assert threaded.split() == "note preload threaded: it starts 1 thread".split()
    assert "workers that need it import it themselves" in fix
    assert "no_such_module: it cannot be imported" in missing
    assert end == "all well"


@pytest.mark.parametrize("option", ["-v", "--preload"])
def test_an_option_is_none(tmp_path: Path, option: str) -> None:
    done = doctor(tmp_path, option)
    assert done.returncode == 2
    assert "names of modules" in done.stderr
