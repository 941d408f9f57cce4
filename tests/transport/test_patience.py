"""Limits of no progress, on a clock that the test moves."""

from __future__ import annotations

from hpcray.transport.patience import Patience


def test_it_runs_out_when_nothing_moves() -> None:
    patience = Patience(10.0)
    looks = [patience.look(float(second), "same") for second in range(12)]
    assert looks == [False] * 10 + [True] * 2


def test_progress_starts_it_anew() -> None:
    patience = Patience(1.0)
    assert not any(patience.look(tick / 10, tick // 9) for tick in range(1000))


def test_a_looker_that_did_not_run_has_seen_nothing() -> None:
    """A minute in which we were stopped is no minute of somebody else's silence."""
    patience = Patience(10.0)
    assert not patience.look(0.0, "same")
    assert not patience.look(60.0, "same")
    assert patience.waited_s == 1.0
