"""What asking for the state of a job can raise."""

from __future__ import annotations

from hpcray.exceptions import RayError


class RayStateApiException(RayError):
    """The question cannot be answered: no such column, a limit too high, no answer in time."""


__all__ = ["RayStateApiException"]
