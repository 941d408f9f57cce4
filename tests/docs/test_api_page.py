"""docs/api.md is what docs/make_api.py writes, and its tables know every public name and option."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def make_api() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_api"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_name_and_option_has_a_test(make_api: ModuleType) -> None:
    problems = make_api.problems()
    assert not problems, "\n".join(["", *problems])


def test_the_page_is_what_the_program_writes(make_api: ModuleType) -> None:
    assert make_api.PAGE.read_text() == make_api.render(), "run: python docs/make_api.py"


def test_a_name_without_an_entry_is_told(
    make_api: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(make_api.TESTS, "hpcray.put")
    monkeypatch.delitem(make_api.OPTION_TESTS, "num_cpus")
    monkeypatch.setitem(make_api.TESTS, "hpcray.get", "api/test_put.py#no_such_word")
    monkeypatch.setitem(make_api.TESTS, "hpcray.spoon", "api/test_put.py")
    first, second, third, fourth = sorted(make_api.problems())
    assert "hpcray.spoon" in first and "take it off" in first
    assert 'hpcray.put": "<file' in second
    assert "does not mention no_such_word" in third or "num_cpus" in third
    assert "num_cpus" in fourth or "does not mention no_such_word" in fourth


def test_every_name_of_a_module_is_there(make_api: ModuleType) -> None:
    import hpcray
    from hpcray import exceptions

    names = {name.full for name in make_api.public_names()}
    for name in hpcray.__all__:
        if callable(getattr(hpcray, name)) and name != "ObjectID":
            assert f"hpcray.{name}" in names, name
    for name, value in vars(exceptions).items():
        if isinstance(value, type) and value.__module__ == exceptions.__name__ and name[0] != "_":
            assert f"hpcray.exceptions.{value.__name__}" in names, name
