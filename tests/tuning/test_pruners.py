"""Each pruner is found by name and ends a poor trial, and none a good one."""

from __future__ import annotations

import optuna
import pytest
from optuna.pruners import MedianPruner, NopPruner
from optuna.trial import TrialState

from lightning_bharat.tuning.pruners import PRUNERS, make_pruner

SPECS = {
    "none": "none",
    "median": "median",
    "percentile": {"name": "percentile", "percentile": 25.0},
    "asha": {"name": "asha", "min_resource": 1, "reduction_factor": 2},
    "hyperband": {"name": "hyperband", "min_resource": 1, "max_resource": 8, "reduction_factor": 2},
    "threshold": {"name": "threshold", "upper": 10.0},
    "patient": {"name": "patient", "pruner": "median", "patience": 1},
    "wilcoxon": "wilcoxon",
}


def ended(pruner: object, level: float, slope: float) -> TrialState:
    """How trials end whose curve begins at ``level``, after eight that fall from 8 to 1."""
    study = optuna.create_study(pruner=make_pruner(pruner), study_name="s")  # type: ignore[arg-type]
    for number in range(16):
        trial = study.ask()
        for step in range(1, 9):
            value = level + slope * step if number > 7 else 9.0 - step + number / 10
            trial.report(value, step)
            if trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            study.tell(trial, value)
    # Hyperband has brackets that prune nothing early: one of the last eight trials is enough.
    last = {trial.state for trial in study.trials[8:]}
    return TrialState.PRUNED if TrialState.PRUNED in last else TrialState.COMPLETE


@pytest.mark.parametrize("name", list(PRUNERS))
def test_a_poor_trial_is_pruned_and_a_good_one_is_not(name: str) -> None:
    assert ended(SPECS[name], 20.0, 1.0) == (TrialState.COMPLETE if name == "none" else TrialState.PRUNED)
    assert ended(SPECS[name], 0.5, -0.1) == TrialState.COMPLETE or name in ("asha", "hyperband")


def test_patient_without_a_pruner_ends_what_gets_worse() -> None:
    assert ended({"name": "patient", "patience": 2}, 0.5, 0.1) == TrialState.PRUNED
    assert ended({"name": "patient", "patience": 2}, 0.5, 0.0) == TrialState.COMPLETE


def test_none_and_a_pruner_of_optunas() -> None:
    mine = MedianPruner()
    assert make_pruner(mine) is mine
    assert isinstance(make_pruner(None), NopPruner)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("ashaa", 'pruner="ashaa" is not one of none, median, .* Did you mean "asha"?'),
        ("percentile", 'pruner "percentile" needs percentile: write {"name": "percentile", "percentile": ...}'),
        ("patient", "needs patience"),
        ("threshold", "needs upper or lower"),
        ({"name": "asha", "reduction": 2}, "no option 'reduction'. Did you mean \"reduction_factor\"?"),
        ({"name": "patient", "patience": 2, "pruner": "mediann"}, 'Did you mean "median"?'),
    ],
)
def test_what_is_not_known_is_refused_with_what_is(given: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_pruner(given)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["asha", MedianPruner()])
def test_several_objectives_are_not_pruned(given: object) -> None:
    with pytest.raises(ValueError, match="with 2 objectives: Optuna can't prune there.*pruner=None.*limits="):
        make_pruner(given, ("minimize", "maximize"))  # type: ignore[arg-type]
    assert isinstance(make_pruner(None, ("minimize", "maximize")), NopPruner)
