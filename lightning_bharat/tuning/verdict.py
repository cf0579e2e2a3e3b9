"""How a trial ended, by how its ranks did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import TrialState

from lightning_bharat.cluster.outcome import RankOutcome
from lightning_bharat.health.out_of_memory import says_out_of_memory
from lightning_bharat.tuning.trial_run import Result


@dataclass(frozen=True)
class Verdict:
    """The end of a trial.

    Attributes:
        state: Optuna's.
        end: one sentence.
        values: of the metrics.
        record: attributes that its ranks measured.
        metrics: what was logged last, by name.
        machine: whether it was the machine's end, not the program's: another start may do better.
        memory: whether there was not enough memory for it.
        error: the type of the exception of the program that ended it, by name; else nothing.
    """

    state: TrialState
    end: str
    values: Sequence[float] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    machine: bool = False
    memory: bool = False
    error: str = ""

    @property
    def in_words(self) -> str:
        """One line for a person."""
        return ", ".join(f"{value:.6g}" for value in self.values) or self.end


def verdict(outcomes: Sequence[RankOutcome]) -> Verdict:
    """Of the ranks of a trial that is over."""
    if all(outcome.ok for outcome in outcomes):
        return _of_result(outcomes[0].value)
    first = min((outcome for outcome in outcomes if not outcome.ok), key=_by_cause)
    if first.error is not None and says_out_of_memory(first.error.rsplit(".", 1)[-1], first.message):
        return Verdict(TrialState.FAIL, f"out of memory: {_one_line(first)}", memory=True)
    if first.error is not None:
        return Verdict(TrialState.FAIL, f"error: {_one_line(first)}", error=first.error)
    return Verdict(TrialState.FAIL, f"killed: {first.summary()}", machine=True)


def _of_result(result: Result) -> Verdict:
    state, end, values = TrialState.COMPLETE, "complete", result.values
    if result.pruned_at is not None:
        state, end = TrialState.PRUNED, f"pruned at step {result.pruned_at}" if result.pruned_at >= 0 else "pruned"
    elif any(math.isnan(value) for value in values):
        state, end, values = TrialState.FAIL, f"the value is {', '.join(map(str, values))}", []
    return Verdict(state, end, values, result.record, result.metrics)


def _by_cause(outcome: RankOutcome) -> tuple[bool, bool, int]:
    """One that was killed before one that raised (its peers raise when it is gone), and those that hang last."""
    killed = outcome.error is None and (outcome.exit_code or 0) < 0
    return outcome.timed_out, not killed, outcome.rank


def _one_line(outcome: RankOutcome) -> str:
    line = next((line for line in outcome.message.splitlines() if line.strip()), "")
    return f"{outcome.error}: {line}".rstrip(": ")
