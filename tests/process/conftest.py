"""`start`: start a job, with its end and its traces guaranteed. See jobs.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .jobs import Job, Start


@pytest.fixture
def start() -> Iterator[Start]:
    jobs: list[Job] = []

    def start(*args: str, **options: object) -> Job:
        jobs.append(Job(*args, **options))  # type: ignore[arg-type]
        return jobs[-1]

    yield start
    for job in jobs:
        job.close()
