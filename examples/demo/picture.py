"""The hybrid run's losses over those of one process, as a picture."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.demo.curves import Comparison, Series

ONE, FIRST, SECOND = "#c9b458", "#1f4e79", "#a63d40"  # apart in grey, too


def draw(shown: Comparison, first: str, second: str) -> Figure:
    """Losses above, their differences below.

    Args:
        shown: the two runs.
        first, second: names of the layouts before and after the change.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    losses, apart = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _lines(losses, shown, first, second)
    losses.set_ylabel("loss")
    losses.legend(frameon=False)
    differences = {step: max(value, 1e-16) for step, value in shown.differences().items()}  # a logarithm of 0 is none
    apart.semilogy(*_xy(differences), color="#555555", linewidth=0.8)
    apart.set(ylabel="difference", xlabel="optimizer step")
    for axes in (losses, apart):
        axes.axvline(shown.changed - 0.5, color="#888888", linestyle=":")
        axes.spines[["top", "right"]].set_visible(False)
    losses.annotate(
        f"{first}  →  {second}",
        (shown.changed - 0.5, 1),
        (0, -4),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="center",
        va="top",
        backgroundcolor="white",
    )
    return figure


def _lines(axes: Axes, shown: Comparison, first: str, second: str) -> None:
    axes.plot(*_xy(shown.single.training), color=ONE, linewidth=5, label="one process")
    axes.plot(*_xy(shown.single.validation), "o", color=ONE, markersize=10)
    for name, color, own in (
        (first, FIRST, lambda step: step < shown.changed),
        (second, SECOND, lambda step: step >= shown.changed),
    ):
        training, validation = (
            {step: value for step, value in series.items() if own(step)}
            for series in (shown.hybrid.training, shown.hybrid.validation)
        )
        axes.plot(*_xy(training), color=color, linewidth=1.2, label=name)
        axes.plot(*_xy(validation), "o", color=color, markersize=5, label=f"{name}, validation")


def _xy(series: Series) -> tuple[list[int], list[float]]:
    steps = sorted(series)
    return steps, [series[step] for step in steps]
