"""What the README and the page on launching promise to a newcomer is so."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpcray.config import ENVIRONMENT, OTHER_VARIABLES

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
LAUNCHING = (ROOT / "docs" / "launching.md").read_text()

# First words of a row of the README's table -> row of the benchmark.
ROWS = {
    "`init` until": "init", "tasks, one": "tasks_sync", "tasks, 1,000": "tasks_async",
    "calls of an actor, one": "actor_sync", "calls of an actor, 1,000": "actor_async",
    "actors started": "actor_starts", "`get` of": "get_small", "`put` of": "put_100mb",
}


def test_the_first_page_is_one_page() -> None:
    assert len(README.splitlines()) <= 170


def test_measured_speeds_are_those_in_the_stored_results() -> None:
    stored = json.loads((ROOT / "benchmarks" / "results" / "hpcray-ray-2core.json").read_text())
    results = {row["name"]: row for row in stored["rows"]}
    table = re.findall(r"^\| (.+?) \| ([\d,.]+) \| ([\d,.]+) \| ([\d.]+) \|$", README, flags=re.M)
    assert len(table) == len(ROWS)
    for title, *shown in table:
        name = next(name for words, name in ROWS.items() if title.startswith(words))
        row = results[name]
        measured = (row["a"]["value"], row["b"]["value"], row["ratio"])
        for text, value in zip(shown, measured, strict=True):
            digits = len(text.partition(".")[2])
            assert abs(float(text.replace(",", "")) - value) <= 0.51 * 10**-digits, (title, text)
    assert f"Ray {stored['versions'][1]['ray']}" in README


@pytest.mark.parametrize("page", [README, LAUNCHING], ids=["README", "launching"])
def test_its_programs_run(page: str, tmp_path: Path) -> None:
    programs = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
    assert programs
    for program in programs:
        (tmp_path / "first.py").write_text(program)
        done = subprocess.run(
            [sys.executable, "first.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60,
            env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
        expected = re.search(r"# (\[.*\])$", program, flags=re.M)
        if expected is not None:
            assert done.stdout.strip() == expected[1]
        assert bool(done.stdout) == ("print(" in program)


def test_the_picture_of_the_demo_shows_what_it_prints() -> None:
    picture = re.findall(r"^```text\n(.*?)^```", README, flags=re.M | re.S)[0]
    source = (ROOT / "examples" / "pendulum_sweep.py").read_text()
    for heading in re.findall(r"[┃] ([^┃]+?) (?=┃)", picture):
        assert f'"{heading.strip()}"' in source, heading
    for words in ("Sweep: ", " episodes in ", "One worker alone: ", " Speed-up: ",
                  "Half-way the worker with pid ", "Its episode ran again in another one: all "):
        assert words in picture and words in source, words


def test_every_variable_is_explained() -> None:
    rows = re.findall(r"^\| `(HPCRAY_\w+)` \| (.+) \|$", LAUNCHING, flags=re.M)
    assert dict(rows) == {**ENVIRONMENT, **OTHER_VARIABLES}


def test_files_of_the_first_page_are_in_the_source_distribution() -> None:
    """Tests read them, so a source distribution without one has failing tests."""
    text = (ROOT / "pyproject.toml").read_text()
    included = re.search(r"targets\.sdist\]\ninclude = \[(.*?)\]", text, flags=re.S)
    assert included is not None
    names = set(re.findall(r'"/([^"]+)"', included[1]))
    tops = {path.split("/")[0] for page in (README, LAUNCHING)
            for path in re.findall(r"`([\w.]+(?:/[\w./-]*)?)`", page)}
    assert {top for top in tops if (ROOT / top).exists() and not top.startswith(".venv")} <= names
    assert {path.name for path in ROOT.glob("*.md")} <= names
