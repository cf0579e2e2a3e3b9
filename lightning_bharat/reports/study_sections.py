"""The sections of a study's report, the same for the page and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_bharat.reports import study_figures as figures
from lightning_bharat.reports.study import Row, StudyReport
from lightning_bharat.reports.study_figures import Picture


@dataclass
class Section:
    """Of a report. All text is plain: who writes it out escapes it.

    Attributes:
        title: of the section.
        text: paragraphs.
        head, rows: of a table; empty: there is none.
        pictures: in order.
    """

    title: str
    text: list[str] = field(default_factory=list)
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    pictures: Sequence[Picture] = ()


def sections(report: StudyReport) -> list[Section]:
    """All of them, in order."""
    several = len(report.objectives) > 1
    return [
        _summary(report),
        Section("History", pictures=figures.history(report)),
        Section("Intermediate values", pictures=figures.intermediate(report)),
        _importance(report),
        Section("Parallel coordinates", pictures=figures.parallel_coordinates(report)),
        Section("Slices", pictures=figures.slices(report)),
        *([_front(report)] if several else []),
        _coverage(report),
        _use(report),
        _failures(report),
        _trials(report),
    ]


def _summary(report: StudyReport) -> Section:
    aims = ", ".join(f"{d} {name}" for name, d in zip(report.objectives, report.directions, strict=True))
    states = ", ".join(f"{count} {state}" for state, count in report.states.items())
    facts = [
        ["aim", aims],
        ["trials", f"{len(report.rows)}" + (f": {states}" if states else "")],
        ["best", "; ".join(_best_words(report.rows[number]) for number in report.best[:1]) or "none yet"],
        ["points refused by a constraint", share(report.infeasible_share)],
        ["complete trials that broke a constraint", share(report.violated_share)],
        ["time", seconds(report.use.seconds)],
    ]
    if len(report.objectives) > 1:
        facts[2] = ["on the Pareto front", str(len(report.best))]
    return Section("Summary", head=["", ""], rows=facts)


def _best_words(row: Row) -> str:
    given = ", ".join(f"{name} = {number(value)}" for name, value in row.params.items())
    return f"trial {row.number}: {', '.join(map(number, row.values))}" + (f" with {given}" if given else "")


def _importance(report: StudyReport) -> Section:
    section = Section("Importance", ["Optuna's default measure: shares of 1 over the parameters."])
    pictures, rows = [], []
    for objective, found, why in figures.importances(report):
        if not found:
            pictures.append(Picture(None, f"{objective}: {why}"))
            continue
        pictures.append(figures.importance(found, objective))
        rows += [[objective, name, share(value)] for name, value in found.items()]
    section.pictures, section.rows = pictures, rows
    section.head = ["objective", "parameter", "importance"] if rows else ()
    return section


def _front(report: StudyReport) -> Section:
    curve, reference = figures.hypervolume(report)
    text = []
    if reference is not None:
        point = ", ".join(map(number, reference))
        text = [f"Hypervolume from the reference point ({point}): a tenth of the range beyond the worst values."]
        if curve.figure is not None:
            text.append(f"It is {number(float(curve.figure.data[0].y[-1]))} after all trials.")
    rows = [[str(n), *map(number, report.rows[n].values), _params(report.rows[n])] for n in report.best]
    head = ["trial", *report.objectives, "parameters"] if rows else ()
    return Section("Pareto front", text, head, rows, [*figures.pareto_front(report), curve])


def _coverage(report: StudyReport) -> Section:
    found = report.coverage
    text = [
        "The space is cut into 2^k cells by halving one parameter after another, in the scale that it is sampled in "
        "(Sobol's property A); k as large as there are trials for. Random points leave many cells empty, too."
    ]
    if found.joint is not None:
        joint = found.joint
        text.append(
            f"All parameters that every trial has: {joint.trials} trials hit {share(joint.hit)} of {joint.cells} "
            f"cells; as many random points hit {share(joint.random)} on average."
        )
    rows = [[name, str(s.trials), str(s.cells), share(s.hit), share(s.random)] for name, s in found.single.items()]
    head = ["parameter", "trials", "cells", "hit", "random points"] if rows else ()
    return Section("Coverage", text, head, rows, figures.coverage(found))


def _use(report: StudyReport) -> Section:
    found = report.use
    text = []
    if found.seconds:
        text = [
            f"{seconds(found.seconds)} from the first trial's start; no trial ran for {seconds(found.nothing_ran)}."
        ]
    if found.busy and "cores" not in found.busy:
        text.append("Cores and devices of trials were not noted.")
    rows = [[kind, str(found.capacity[kind]), share(found.idle(kind))] for kind in found.busy]
    return Section("Use of resources", text, ["", "at most", "idle"] if rows else (), rows, figures.use(found))


def _failures(report: StudyReport) -> Section:
    rows = [[cause, str(count)] for cause, count in report.causes.most_common()]
    return Section("Failures", [] if rows else ["None."], ["cause", "trials"] if rows else (), rows)


def _trials(report: StudyReport) -> Section:
    """All trials; a column that no trial has anything for is left out."""
    if not report.rows:
        return Section("Trials", ["None yet."])
    columns: dict[str, list[str]] = {
        "trial": [str(row.number) for row in report.rows],
        "state": [row.state for row in report.rows],
    }
    for i, name in enumerate(report.objectives):
        columns[name] = [number(row.values[i]) if row.values else "" for row in report.rows]
    columns["parameters"] = [_params(row) for row in report.rows]
    columns["end"] = [row.end if row.end != row.state else "" for row in report.rows]
    columns["time"] = [seconds(row.seconds) for row in report.rows]
    columns["peak memory"] = [size(row.peak_memory_bytes) for row in report.rows]
    for name in ("steps", "tokens", "retry_of", "parent", "seed", "code", "data", "config"):
        columns[name] = ["" if (value := getattr(row, name)) is None else str(value) for row in report.rows]
    columns["broken constraints"] = [", ".join(row.violated) for row in report.rows]
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    return Section("Trials", [], list(kept), list(zip(*kept.values(), strict=True)))


def _params(row: Row) -> str:
    return ", ".join(f"{name} = {number(value)}" for name, value in row.params.items())


def number(value: Any) -> str:
    """Six digits of a number; anything else as it is."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def share(value: float | None) -> str:
    """Of 1, in per cent."""
    return "" if value is None else f"{value:.1%}"


def seconds(value: float | None) -> str:
    """With the unit that is read easily."""
    if value is None:
        return ""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if value >= 2 * length:
            return f"{value / length:.1f} {unit}"
    return f"{value:.3g} s"


def size(value: int | None) -> str:
    """Bytes in MiB."""
    return "" if value is None else f"{value / 2**20:.0f} MiB"
