"""What a study found and what it cost, from its trials alone: the facts of a report, without pictures or words.

Any Optuna study will do. What :func:`lightning_bharat.tuning.tune` notes beside a trial (how it ended, seconds, memory,
cores) is used where it is there and of the kind that it should be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lightning_bharat.reports.study_coverage import Coverage
from lightning_bharat.reports.study_resources import Use

_INFEASIBLE = "infeasible"


@dataclass(frozen=True)
class Row:
    """One trial, as a report tells it.

    Attributes:
        number: of the trial.
        state: complete, pruned, fail, running or waiting.
        values: one for each objective; empty: none was told.
        params: by name.
        end: how it ended, in a sentence.
        seconds: of its run; ``None``: not known.
        peak_memory_bytes: of its largest rank; ``None``: not known.
        steps, tokens: that it trained; ``None``: not known.
        retry_of: the trial whose work it went on with.
        parent: the trial whose weights it took over (population-based training).
        seed, code, data, where, config: as they were noted, else ``None``.
        violated: the constraints after the trial that it broke.
    """

    number: int
    state: str
    values: tuple[float, ...]
    params: Mapping[str, Any]
    end: str
    seconds: float | None
    peak_memory_bytes: int | None
    steps: int | None
    tokens: int | None
    retry_of: int | None
    parent: int | None
    seed: int | None
    code: str | None
    data: str | None
    where: Mapping[str, Any] | None
    config: str | None
    violated: tuple[str, ...]

    @classmethod
    def of(cls, trial: FrozenTrial) -> Row:
        """From a trial of Optuna's."""
        noted, state = trial.user_attrs, trial.state.name.lower()
        seconds = _as(noted.get("seconds"), float)
        if seconds is None and trial.duration is not None:
            seconds = trial.duration.total_seconds()
        where = noted.get("where")
        return cls(
            number=trial.number,
            state=state,
            values=tuple(trial.values or ()),
            params=trial.params,
            end=str(noted.get("end") or state),
            seconds=seconds,
            code=_code(noted.get("code")),
            data=None if noted.get("data") is None else str(noted["data"]),
            where=where if isinstance(where, Mapping) else None,
            config=None if noted.get("config") is None else str(noted["config"]),
            violated=tuple(name for name, value in trial.constraints.items() if not value <= 0),
            **{name: _as(noted.get(name), int) for name in _WHOLE},
        )

    @property
    def infeasible(self) -> bool:
        """It was refused by a constraint before it ran."""
        return self.state == "fail" and self.end.startswith(_INFEASIBLE)

    @property
    def cause(self) -> str:
        """Of its failure, without what differs from one failure to the next; empty: it did not fail."""
        if self.state != "fail":
            return ""
        if self.infeasible:
            return self.end  # the constraint is the cause
        if self.end == "fail":
            return "not said"
        first, _, rest = self.end.partition(":")
        kind = rest.strip().partition(":")[0]
        return f"error: {kind}" if first == "error" and kind else first


@dataclass(frozen=True)
class StudyReport:
    """Of a study.

    Attributes:
        study: the study, or a copy in memory.
        name: of the study.
        objectives: their names; ``value``, or ``value 0``, ``value 1`` and so on where none were given.
        directions: ``minimize`` or ``maximize``, for each objective.
        rows: a trial each, in order.
        best: numbers of the best trial, or of all on the Pareto front; empty: none is complete and feasible.
        coverage: of the search space.
        use: of cores, devices and ranks over time.
    """

    study: optuna.Study
    name: str
    objectives: tuple[str, ...]
    directions: tuple[str, ...]
    rows: tuple[Row, ...]
    best: tuple[int, ...]
    coverage: Coverage
    use: Use

    @classmethod
    def of(cls, study: optuna.Study) -> StudyReport:
        """Read a study. Nothing is written to it."""
        trials = study.get_trials(deepcopy=False)
        count = len(study.directions)
        names = study.metric_names or (["value"] if count == 1 else [f"value {i}" for i in range(count)])
        rows = tuple(Row.of(trial) for trial in trials)
        ran = [trial for trial, row in zip(trials, rows, strict=True) if trial.params and not row.infeasible]
        return cls(
            study=study,
            name=study.study_name,
            objectives=tuple(map(str, names)),
            directions=tuple(d.name.lower() for d in study.directions),
            rows=rows,
            best=tuple(sorted(trial.number for trial in _best(study, trials))),
            coverage=Coverage.of([(trial.params, trial.distributions) for trial in ran]),
            use=Use.of(trials),
        )

    @property
    def states(self) -> Counter[str]:
        """How many trials of each state; those refused by a constraint are ``infeasible``."""
        return Counter(_INFEASIBLE if row.infeasible else row.state for row in self.rows)

    @property
    def infeasible_share(self) -> float | None:
        """Of all suggested points, those that a constraint refused before they ran; ``None``: there are no points."""
        asked = [row for row in self.rows if row.state != "waiting"]
        return sum(row.infeasible for row in asked) / len(asked) if asked else None

    @property
    def violated_share(self) -> float | None:
        """Of complete trials, those that broke a constraint after they ran; ``None``: none is complete."""
        complete = [row for row in self.rows if row.state == "complete"]
        return sum(bool(row.violated) for row in complete) / len(complete) if complete else None

    @property
    def causes(self) -> Counter[str]:
        """How many failures of each cause, infeasible points included."""
        return Counter(row.cause for row in self.rows if row.cause)

    @property
    def params(self) -> tuple[str, ...]:
        """Names of all parameters that any trial has, in the order in which they appear."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.params))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: a number that is not finite becomes a string."""
        return plain(
            {
                "study": self.name,
                "objectives": dict(zip(self.objectives, self.directions, strict=True)),
                "best": self.best,
                "states": self.states,
                "infeasible_share": self.infeasible_share,
                "violated_share": self.violated_share,
                "causes": self.causes,
                "coverage": self.coverage.as_dict(),
                "use": self.use.as_dict(),
                "trials": [vars(row) for row in self.rows],
            }
        )


def plain(value: Any) -> Any:
    """``value`` as JSON knows it."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return value if isfinite(value) else str(value)
    return value if value is None or isinstance(value, (str, int)) else str(value)


def _best(study: optuna.Study, trials: Sequence[FrozenTrial]) -> Sequence[FrozenTrial]:
    """Of the complete ones that keep all constraints."""
    if len(study.directions) > 1:
        # Optuna's own, which leaves trials out that break a constraint
        return [t for t in study.best_trials if all(c <= 0 for c in t.constraints.values())]
    feasible = [
        t for t in trials if t.state == TrialState.COMPLETE and t.values and all(c <= 0 for c in t.constraints.values())
    ]
    sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
    return [min(feasible, key=lambda trial: sign * trial.values[0])] if feasible else []


_WHOLE = ("peak_memory_bytes", "steps", "tokens", "retry_of", "parent", "seed")


def _as(value: Any, kind: Callable[[Any], Any]) -> Any:
    """A number as it should be; ``None`` for what other people's studies may have under the same name."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
        return None
    return kind(value)


def _code(noted: Any) -> str | None:
    if isinstance(noted, Mapping) and noted.get("commit"):
        return str(noted["commit"])[:12] + (" and changes" if noted.get("dirty") else "")
    return None if noted is None or isinstance(noted, Mapping) else str(noted)
