"""The pictures of a study's report: Optuna's own where it has them, and why one can't be drawn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from math import isfinite
from typing import Any

import optuna
import optuna.visualization as draw
import plotly.graph_objects as go
from optuna.trial import FrozenTrial

from lightning_bharat.reports.study import StudyReport
from lightning_bharat.reports.study_coverage import Coverage
from lightning_bharat.reports.study_resources import Use
from lightning_bharat.tuning.pareto import reference_point


@dataclass(frozen=True)
class Picture:
    """Of a report.

    Attributes:
        figure: what is drawn; ``None``: nothing is.
        why: it can't be drawn.
    """

    figure: go.Figure | None
    why: str = ""

    def json(self) -> str:
        """The figure, safe inside of a page's ``<script>``."""
        assert self.figure is not None
        text: str = self.figure.to_json()
        return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def history(report: StudyReport) -> list[Picture]:
    """Values by trial, with the best so far: one picture an objective."""
    return [
        _drawn(partial(draw.plot_optimization_history, report.study, **target, target_name=name))
        for name, target in _objectives(report)
    ]


def intermediate(report: StudyReport) -> list[Picture]:
    """What trials reported while they ran."""
    if len(report.objectives) > 1:
        return [Picture(None, "a study of several objectives has no intermediate values")]
    return [_drawn(lambda: draw.plot_intermediate_values(report.study))]


def parallel_coordinates(report: StudyReport) -> list[Picture]:
    """A line a trial through all parameters."""
    return [
        _drawn(partial(draw.plot_parallel_coordinate, report.study, **target, target_name=name))
        for name, target in _objectives(report)
    ]


def slices(report: StudyReport) -> list[Picture]:
    """Values over each parameter alone."""
    return [
        _drawn(partial(draw.plot_slice, report.study, **target, target_name=name))
        for name, target in _objectives(report)
    ]


def importance(found: dict[str, float], objective: str) -> Picture:
    """Bars of shares of 1."""
    names = list(reversed(found))
    bars = go.Bar(x=[found[name] for name in names], y=names, orientation="h")
    return Picture(_titled(go.Figure(bars), f"Importance for {objective}", "share", ""))


def pareto_front(report: StudyReport) -> list[Picture]:
    """Of two or three objectives."""
    if len(report.objectives) > 3:
        return [Picture(None, f"{len(report.objectives)} objectives: only two or three can be drawn; see the table")]
    return [_drawn(lambda: draw.plot_pareto_front(report.study, target_names=list(report.objectives)))]


def hypervolume(report: StudyReport) -> tuple[Picture, list[float] | None]:
    """The volume between the front so far and the reference point, by trial; and that point."""
    try:
        reference = reference_point(report.study)
    except ValueError:
        return Picture(None, "no trial that keeps its limits is complete with finite values"), None
    return _drawn(lambda: draw.plot_hypervolume_history(report.study, reference)), reference


def coverage(found: Coverage) -> list[Picture]:
    """Shares of boxes, beside random points."""
    if not found.single:
        return [Picture(None, "no trial has a parameter with a range")]
    names = list(found.single)
    figure = go.Figure(
        [
            go.Bar(name="trials", x=names, y=[found.single[name].hit for name in names]),
            go.Bar(name="as many random points", x=names, y=[found.single[name].random for name in names]),
        ]
    )
    return [Picture(_titled(figure, "Share of cells hit, each parameter alone", "", "share"))]


def use(found: Use) -> list[Picture]:
    """What was busy, over time."""
    if not found.seconds:
        return [Picture(None, "no trial has run for any time")]
    at = [datetime.fromtimestamp(t) for t in found.times]
    lines = [
        go.Scatter(name=kind, x=at, y=list(counts), mode="lines", line_shape="hv")
        for kind, counts in found.busy.items()
    ]
    return [Picture(_titled(go.Figure(lines), "Busy at a time", "", "how many"))]


def importances(report: StudyReport) -> list[tuple[str, dict[str, float], str]]:
    """For each objective: its name, shares of 1 by parameter in descending order, and why there are none.

    Optuna's default measure (PED-ANOVA: S. Watanabe et al., IJCAI 2023), which needs at least two complete trials whose
    values are finite.
    """
    found: list[tuple[str, dict[str, float], str]] = []
    for i, name in enumerate(report.objectives):
        values = {row.values[i] for row in report.rows if row.state == "complete" and isfinite(row.values[i])}
        if len(values) < 2:
            found.append((name, {}, "it takes complete trials with at least two different finite values"))
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # trials without finite values are left out, which is said above
                shares = optuna.importance.get_param_importances(_finite(report.study, i), target=_value_of(i))
        except Exception as error:  # a measure of Optuna's that fails must not take the report with it
            found.append((name, {}, f"Optuna: {error}"))
            continue
        known = {key: float(share) for key, share in shares.items() if isfinite(share)}
        found.append((name, known, "" if known else "no parameter differs between complete trials"))
    return found


def _finite(study: optuna.Study, objective: int) -> optuna.Study:
    """The complete trials whose value of ``objective`` is finite."""
    kept = optuna.create_study(directions=study.directions)
    kept.add_trials(t for t in study.get_trials(deepcopy=False) if t.values and isfinite(t.values[objective]))
    return kept


def _objectives(report: StudyReport) -> Sequence[tuple[str, dict[str, Any]]]:
    """Names, and the argument that asks Optuna for one of several objectives."""
    if len(report.objectives) == 1:
        return [(report.objectives[0], {})]
    return [(name, {"target": _value_of(i)}) for i, name in enumerate(report.objectives)]


def _value_of(objective: int) -> Callable[[FrozenTrial], float]:
    return lambda trial: trial.values[objective]


def _drawn(make: Callable[[], go.Figure]) -> Picture:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            figure = make()
    except Exception as error:  # a picture of Optuna's that fails must not take the report with it
        return Picture(None, f"Optuna: {error}")
    return Picture(figure) if figure.data else Picture(None, "no trial has what it takes")


def _titled(figure: go.Figure, title: str, x: str, y: str) -> go.Figure:
    return figure.update_layout(title=title, xaxis_title=x, yaxis_title=y)
