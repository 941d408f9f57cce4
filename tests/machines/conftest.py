"""Hypothesis runs the same examples every time; `HPCRAY_HYPOTHESIS=explore` looks for new ones.

A failure prints the blob that repeats it.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci", derandomize=True, max_examples=60, stateful_step_count=40, deadline=None,
    print_blob=True, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "explore", max_examples=2000, stateful_step_count=80, deadline=None, print_blob=True,
    database=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HPCRAY_HYPOTHESIS", "ci"))
