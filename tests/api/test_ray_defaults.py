"""The defaults that docs/api.md ascribes to Ray are Ray's; checked where Ray is."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from .conftest import BACKEND

pytestmark = pytest.mark.skipif(BACKEND != "ray", reason="asks Ray itself")


def test_the_defaults_of_ray() -> None:
    from ray._common import ray_option_utils

    path = Path(__file__).resolve().parents[2] / "docs" / "make_api.py"
    spec = importlib.util.spec_from_file_location("make_api", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_api"] = module
    spec.loader.exec_module(module)
    for whom, options in (("t", ray_option_utils.task_options),
                          ("a", ray_option_utils.actor_options)):
        defaults = {name: option.default_value for name, option in options.items()}
        assert module.RAY_DEFAULTS[whom] == defaults
