"""Simulated tests repeat from their seed: HPCRAY_SEED shifts all of them, to look for more."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def seed_shift() -> int:
    return int(os.environ.get("HPCRAY_SEED", "0"))
