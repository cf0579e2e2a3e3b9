"""Each point of a grid once, whatever happens to the study."""

from __future__ import annotations

from collections import Counter

import optuna
import pytest
from optuna import Study, Trial
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import TrialState

from lightning_bharat.tuning.grid import ATTEMPTS, grid_of
from lightning_bharat.tuning.samplers import make_sampler
from lightning_bharat.tuning.stopping import why_stop

SPACE = {"x": IntDistribution(0, 2), "y": CategoricalDistribution(["a", "b"])}


def study(storage: BaseStorage, seed: int | None = 0, space: dict | None = None) -> Study:
    sampler = make_sampler("grid", seed, space or SPACE)
    return optuna.create_study(study_name="s", storage=storage, sampler=sampler, load_if_exists=True)


def objective(trial: Trial) -> float:
    return trial.suggest_int("x", 0, 2) + (trial.suggest_categorical("y", ["a", "b"]) == "a")


def done(of: Study) -> Counter:
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    return Counter((trial.params["x"], trial.params["y"]) for trial in of.get_trials(states=states))


ALL = {(x, y): 1 for x in range(3) for y in "ab"}


def test_the_order_is_that_of_the_space_or_of_the_seed() -> None:
    in_order = study(InMemoryStorage(), None)
    in_order.optimize(objective, n_trials=100)
    assert [tuple(trial.params.values()) for trial in in_order.trials] == list(ALL)
    shuffled = study(InMemoryStorage(), 1)
    shuffled.optimize(objective, n_trials=100)
    assert done(shuffled) == ALL
    assert [tuple(trial.params.values()) for trial in shuffled.trials] != list(ALL)


def test_a_killed_study_goes_on_with_any_seed_and_evaluates_each_point_once() -> None:
    storage = InMemoryStorage()
    study(storage, 0).optimize(objective, n_trials=2)
    killed = study(storage, 0)
    trial = killed.ask()
    objective(trial)  # the controller is killed here: the next one finds the trial running, and ends it
    goes_on = study(storage, 5)
    goes_on.tell(trial.number, state=TrialState.FAIL)
    goes_on.optimize(objective, n_trials=100)
    assert done(goes_on) == ALL
    assert len(goes_on.trials) == 7


def test_ask_and_tell_ends_in_words() -> None:
    asked = study(InMemoryStorage())
    while why_stop(asked, []) is None:
        trial = asked.ask()
        asked.tell(trial, objective(trial))
    assert done(asked) == ALL
    assert why_stop(asked, []) == "each point of the grid has a trial"
    with pytest.raises(ValueError, match="all of the 6 points of the grid have a trial"):
        asked.ask()
    assert not asked.get_trials(states=(TrialState.RUNNING,))


def test_workers_share_the_points_and_a_killed_ones_point_comes_back() -> None:
    shared = study(InMemoryStorage())
    trials = [shared.ask() for _ in range(6)]
    assert why_stop(shared, []) is not None
    shared.tell(trials[0], state=TrialState.FAIL)
    assert why_stop(shared, []) is None
    trials[0] = shared.ask()
    for trial in trials:
        shared.tell(trial, objective(trial))
    assert done(shared) == ALL


def test_two_controllers_that_ask_by_turns_never_share_a_point() -> None:
    storage = InMemoryStorage()
    controllers = [study(storage, seed) for seed in (0, 0)]
    trials = [(one, one.ask()) for one in controllers * 3]
    for one, trial in trials:
        one.tell(trial, objective(trial))
    assert done(controllers[0]) == ALL


def test_a_retry_with_the_points_values_counts_and_a_point_that_kills_is_given_up() -> None:
    retried = study(InMemoryStorage())
    trial = retried.ask()
    objective(trial)
    retried.tell(trial, state=TrialState.FAIL)
    retried.enqueue_trial(trial.params, user_attrs={"retry_of": trial.number})
    retried.optimize(objective, n_trials=100)
    assert done(retried) == ALL

    deadly = study(InMemoryStorage(), None)
    while why_stop(deadly, []) is None:
        trial = deadly.ask()
        value = objective(trial)
        if trial.params == {"x": 0, "y": "a"}:
            trial.set_user_attr("end", "killed: rank 0 ended by SIGKILL")
            deadly.tell(trial, state=TrialState.FAIL)
        else:
            deadly.tell(trial, value)
    assert len(deadly.trials) == 5 + ATTEMPTS
    assert done(deadly) == {point: 1 for point in ALL if point != (0, "a")}


def test_a_point_that_fails_by_itself_is_done() -> None:
    failing = study(InMemoryStorage(), None)
    trial = failing.ask()
    objective(trial)
    trial.set_user_attr("end", "infeasible: x >= 1")
    failing.tell(trial, state=TrialState.FAIL)
    failing.optimize(objective, n_trials=100)
    assert len(failing.trials) == 6


def test_a_grid_that_grew_keeps_what_is_done() -> None:
    storage = InMemoryStorage()
    study(storage).optimize(objective, n_trials=100)
    grown = study(storage, space={"x": [0, 1, 2, 3], "y": ["a", "b"]})

    def objective_to_three(trial: Trial) -> float:
        return trial.suggest_int("x", 0, 3) + (trial.suggest_categorical("y", ["a", "b"]) == "a")

    grown.optimize(objective_to_three, n_trials=100)
    assert done(grown) == {**ALL, (3, "a"): 1, (3, "b"): 1}


def test_what_a_space_says_becomes_values() -> None:
    space = {
        "i": IntDistribution(2, 10, step=4),
        "f": FloatDistribution(0, 1, step=0.25),
        "c": CategoricalDistribution([None, "a"]),
        "given": [3, 1],
    }
    assert grid_of(space) == {"i": [2, 6, 10], "f": [0, 0.25, 0.5, 0.75, 1], "c": [None, "a"], "given": [3, 1]}


def test_what_is_no_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="lr is a range without steps"):
        make_sampler("grid", 0, {"lr": FloatDistribution(0, 1)})
    with pytest.raises(ValueError, match="needs the space"):
        make_sampler("grid", 0)
    with pytest.raises(ValueError, match=r"1000000 points \(a 1000 × b 1000\)"):
        make_sampler("grid", 0, {"a": range(1000), "b": range(1000)})
    with pytest.raises(ValueError, match=r"a has the value \[1\]"):
        make_sampler("grid", 0, {"a": [[1]]})

    class Conditional:
        def grid(self) -> dict:
            raise ValueError("model.experts depends on model.moe")

    with pytest.raises(ValueError, match="depends on"):
        make_sampler("grid", 0, Conditional())
    with pytest.raises(ValueError, match="the grid has no 'z'"):
        study(InMemoryStorage()).optimize(lambda trial: trial.suggest_float("z", 0, 1), n_trials=1)
    with pytest.raises(ValueError, match="the grid has x=0, and the trial takes"):
        study(InMemoryStorage(), None).optimize(lambda trial: trial.suggest_int("x", 1, 2), n_trials=1)
