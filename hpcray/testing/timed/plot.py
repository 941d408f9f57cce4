"""What came of a simulated run, in a picture: who was busy when. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from hpcray.testing.timed.report import Report

_BINS = 200
_NEEDS = "--plot needs matplotlib: pip install matplotlib"


class PlotError(Exception):
    """No picture can be made."""


def check() -> None:
    """Raises PlotError: matplotlib is missing. To be asked before the run and not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PlotError(_NEEDS) from None


def shares(
    spans: Iterable[Sequence[float]], began_s: float, length_s: float, of: int = 1
) -> list[float]:
    """By equal parts of the run: the share of each that `of` processes were busy. `spans`: begin
    and length of what each of them did, in turn."""
    width_s = length_s / _BINS
    busy_s = [0.0] * _BINS
    for one in spans:
        for index in range(0, len(one), 2):
            from_s = max(one[index] - began_s, 0.0)
            to_s = min(one[index] - began_s + one[index + 1], length_s)
            number = int(from_s / width_s)
            while from_s < to_s and number < _BINS:
                until_s = min((number + 1) * width_s, to_s)
                busy_s[number] += max(until_s - from_s, 0.0)
                from_s = until_s
                number += 1
    return [seconds / (width_s * of) for seconds in busy_s]


def plot(report: Report, path: Path) -> None:
    """Write the picture; its kind by the end of its name (.png, .svg, .pdf).

    Raises:
      PlotError: it cannot be written, or matplotlib is missing.
    """
    check()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cluster = report.cluster
    began_s, length_s = cluster.began_s, report.makespan_s
    times_s = [(number + 0.5) * length_s / _BINS for number in range(_BINS)]
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)

    def draw(axes: object, label: str, values: list[float]) -> None:
        axes.plot(times_s, [100 * value for value in values], label=label)  # type: ignore[attr-defined]

    worked = cluster.runs.spans
    assert worked is not None, "recorded runs only"
    draw(above, f"{report.slots:,} " + ("actors" if report.work.actors else "CPUs"),
         shares([worked], began_s, length_s, report.slots))
    draw(below, "driver", shares(_spans(report.driver), began_s, length_s))
    draw(below, "node 0", shares(_spans(report.node0), began_s, length_s))
    if report.others is not None:
        draw(below, f"{len(report.others.usages):,} other nodes, mean", shares(
            _spans(report.others), began_s, length_s, len(report.others.usages)))
    above.set_title(next(report.lines()), fontsize="small")
    above.set_ylabel("running tasks, %")
    below.set_ylabel("busy, %")
    below.set_xlabel("time, s")
    for axes in (above, below):
        axes.set_ylim(0, 105)
        axes.legend(loc="lower right", fontsize="small")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise PlotError(f"{path} cannot be written: {error}") from None


def _spans(account: object) -> list[Sequence[float]]:
    return [usage.spans for usage in account.usages.values()]  # type: ignore[attr-defined]
