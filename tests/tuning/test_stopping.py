"""A study ends for a reason that its trials give, also after a restart."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import optuna
import pytest
from optuna import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_bharat.tuning.stopping import NoImprovement, TimeLimit, TokenLimit, make_rules, time_running, why_stop

START = datetime(2026, 1, 1)


def study(*values: float | None, directions: tuple[str, ...] = ("minimize",)) -> Study:
    """With trials of these values; None: pruned."""
    made = optuna.create_study(directions=directions)
    for value in values:
        several = value if isinstance(value, tuple) else (value,)
        made.add_trial(create_trial(values=several) if value is not None else create_trial(state=TrialState.PRUNED))
    return made


def ran(start: float, until: float | None, state: TrialState = TrialState.COMPLETE, **attrs: Any) -> FrozenTrial:
    return FrozenTrial(
        number=0,
        trial_id=0,
        state=state,
        value=1.0 if state == TrialState.COMPLETE else None,
        datetime_start=START + timedelta(seconds=start),
        datetime_complete=None if until is None else START + timedelta(seconds=until),
        params={},
        distributions={},
        user_attrs=attrs,
        system_attrs={},
        intermediate_values={},
    )


def test_no_improvement() -> None:
    rule = NoImprovement(3)
    assert rule.reason(study(3, 2, 2, 2)) is None
    assert rule.reason(study(3, 2, 2, None, 2.5)) == "none of the last 3 trials was better than trial 1"
    assert rule.reason(study(3, 2, 2, 2, 1.9)) is None
    assert NoImprovement(3, 0.2).reason(study(3, 2, 2, 2, 1.9)) is not None
    assert rule.reason(study(1, 2, 2, 2, directions=("maximize",))) is None
    assert rule.reason(study(2, 1, 1, 1, directions=("maximize",))) is not None
    assert rule.reason(study(None, None, None)) == "none of the last 3 trials was better than nothing at all"
    assert rule.reason(study()) is None


def test_a_trial_that_breaks_a_limit_is_no_better_one() -> None:
    made = study(3, 2, 2)
    trial = made.ask()
    trial.set_constraint("memory", 0.1)
    made.tell(trial, 0.5)
    assert NoImprovement(2).reason(made) is not None


def test_progress_in_any_objective_is_progress() -> None:
    two = ("minimize", "maximize")
    assert NoImprovement(2).reason(study((1, 1), (2, 2), (3, 3), directions=two)) is None
    assert NoImprovement(2).reason(study((1, 3), (2, 2), (1, 3), directions=two)) is not None
    with pytest.raises(ValueError, match="min_delta has no meaning for 2 objectives"):
        NoImprovement(2, 0.1).reason(study((1, 1), directions=two))


def test_time_in_which_trials_ran_once_and_without_pauses() -> None:
    assert time_running([ran(0, 10), ran(5, 12), ran(100, 101)]) == 13
    assert time_running([ran(0, 10), ran(20, None, TrialState.RUNNING)], START + timedelta(seconds=25)) == 15
    # Found dead a day later: what it said itself counts.
    killed = {"end": "killed: rank 1 ended by SIGKILL"}
    assert time_running([ran(0, 86400, TrialState.FAIL, **killed, seconds=7.0)]) == 7
    assert time_running([ran(0, 86400, TrialState.FAIL, **killed)]) == 0
    assert time_running([ran(0, 4, TrialState.FAIL, end="error: ValueError: x")]) == 4


def test_time_limit() -> None:
    made = study()
    made.add_trial(ran(0, 4000))
    assert TimeLimit("1 h").reason(made) == "trials ran for 4000 s, of 3600 s allowed"
    assert TimeLimit(4001).reason(made) is None


def test_token_limit() -> None:
    made = study()
    made.add_trial(create_trial(value=1.0, user_attrs={"tokens": 600}))
    made.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"tokens": 300}))
    made.add_trial(create_trial(state=TrialState.FAIL))
    assert TokenLimit(901).reason(made) is None
    assert TokenLimit(900).reason(made) == "trials saw 900 tokens, of 900 allowed"
    with pytest.raises(ValueError, match="trial 0 counted no tokens"):
        TokenLimit(900).reason(study(1.0))


def test_rules_by_name() -> None:
    given = [{"name": "no_improvement", "trials": 2}, TimeLimit(5), {"name": "tokens", "tokens": 1e9}]
    assert make_rules(given) == [NoImprovement(2), TimeLimit(5), TokenLimit(1e9)]
    assert make_rules(None) == []
    assert why_stop(study(1, 1, 1), make_rules(given[0])) == "none of the last 2 trials was better than trial 0"
    assert why_stop(study(1, 0.5, 0.4), make_rules(given[0])) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"name": "no_improvment", "trials": 2}, 'Did you mean "no_improvement"?'),
        ({"name": "no_improvement"}, 'needs trials: write {"name": "no_improvement", "trials": ...}'),
        ({"name": "time", "seconds": "5 parsecs"}, "one of the units"),
        ({"name": "time", "seconds": 0}, "more than 0 seconds"),
        ({"name": "tokens", "tokens": -1}, "more than 0 tokens"),
        ({"name": "no_improvement", "trials": 0}, "at least one trial"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(given: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_rules(given)
