"""Transfer from earlier studies: much is saved where they are related, the base goes on alone where they are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.samplers import RandomSampler, TPESampler

from lightning_bharat.tuning.acquisition import standardized
from lightning_bharat.tuning.transfer import TransferSampler

Objective = Callable[[optuna.Trial], float]


def bowl(*centre: float, names: str = "xyzw", high: float = 1.0) -> Objective:
    """The square of the distance to ``centre``."""

    def objective(trial: optuna.Trial) -> float:
        at = [trial.suggest_float(name, 0, high) for name in names[: len(centre)]]
        return float(sum((a - c) ** 2 for a, c in zip(at, centre, strict=True)))

    return objective


def study(objective: Objective, trials: int, sampler: Any = None, direction: str = "minimize") -> optuna.Study:
    made = optuna.create_study(sampler=sampler or RandomSampler(seed=1), direction=direction)
    made.optimize(objective, n_trials=trials)
    return made


def points(of: optuna.Study) -> list[dict[str, Any]]:
    return [trial.params for trial in of.trials]


def test_a_related_study_on_another_scale_saves_half_of_the_trials() -> None:
    target, better = bowl(0.3, 0.6, 0.4, 0.7), 0
    for seed in range(2):
        source = study(lambda trial: 1e6 * bowl(0.35, 0.55, 0.45, 0.65)(trial) ** 3, 40, TPESampler(seed=50 + seed))
        cold = study(target, 30, TPESampler(seed=seed)).best_value
        warm = study(target, 15, TransferSampler([source], seed=seed))
        better += warm.best_value <= cold
    assert better == 2


def test_a_study_whose_best_was_the_highest_is_turned_around() -> None:
    source = study(lambda trial: -bowl(0.3, 0.7)(trial), 40, direction="maximize")
    sampler = TransferSampler([source], seed=0)
    target = study(lambda trial: -bowl(0.3, 0.7)(trial), 12, sampler, direction="maximize")
    assert target.trials[0].params == source.best_params
    assert next(iter(sampler.weights(target).values())) > 0.2
    turned = study(bowl(0.3, 0.7), 12, TransferSampler([source], seed=0))
    assert turned.best_value < 0.01


def test_after_the_seeds_an_unrelated_study_leaves_the_base_alone() -> None:
    draws = np.random.RandomState(0)
    noise = study(lambda trial: draws.rand() + 0 * bowl(0.3, 0.6)(trial), 40)
    against = study(lambda trial: -bowl(0.3, 0.6)(trial), 40)
    sampler = TransferSampler([noise, against], base=RandomSampler(seed=5), seed=0, seeds=2)
    target = study(bowl(0.3, 0.6), 20, sampler)
    assert set(sampler.weights(target).values()) == {0.0}
    alone = study(bowl(0.3, 0.6), 18, RandomSampler(seed=5))
    first, second, third, *others = points(target)
    assert [first, third] == [noise.best_params, against.best_params]
    assert [second, *others] == points(alone)


def test_of_two_sources_the_related_one_has_the_weight() -> None:
    related, other = study(bowl(0.3, 0.6), 40), study(bowl(1.0, 0.0), 40, RandomSampler(seed=2))
    sampler = TransferSampler([other, related], seed=0)
    target = study(bowl(0.25, 0.6), 25, sampler)
    weights = sampler.weights(target)
    assert weights[related.study_name] > 0.3
    assert weights[other.study_name] == 0
    assert target.best_value < 1e-3


def test_the_same_seed_gives_the_same_trials_also_when_the_study_goes_on_in_a_new_process() -> None:
    source = study(bowl(0.3, 0.6), 30)
    whole = study(bowl(0.35, 0.6), 20, TransferSampler([source], seed=7))
    other = study(bowl(0.35, 0.6), 20, TransferSampler([source], seed=8))
    assert points(whole) != points(other)
    resumed = optuna.create_study(sampler=TransferSampler([source], seed=7))
    resumed.add_trials(whole.trials[:12])
    resumed.optimize(bowl(0.35, 0.6), n_trials=8)
    assert points(whole) == points(resumed)


def test_other_ranges_are_clipped_and_choices_that_are_gone_are_not_proposed() -> None:
    def wide(trial: optuna.Trial) -> float:
        act = trial.suggest_categorical("act", ["tanh", "relu"])
        depth = trial.suggest_int("depth", 1, 9)
        return (trial.suggest_float("lr", 1e-6, 10, log=True) - 5) ** 2 + (act == "relu") + (9 - depth)

    seen = []

    def narrow(trial: optuna.Trial) -> float:
        act = trial.suggest_categorical("act", ["relu", "gelu"])
        lr, depth = trial.suggest_float("lr", 1e-3, 1, log=True), trial.suggest_int("depth", 2, 6, step=2)
        name = trial.suggest_float("new", 0, 1)
        seen.append((act, lr, depth))
        return (lr - 5) ** 2 + (act == "relu") + (9 - depth) + name

    source = study(wide, 40)
    target = study(narrow, 20, TransferSampler([source], seed=0))
    assert seen[0][1:] == (1.0, 6) if source.best_params["lr"] > 1 else seen[0][2] == 6
    assert all(act in ("relu", "gelu") and 1e-3 <= lr <= 1 and depth in (2, 4, 6) for act, lr, depth in seen)
    assert target.best_trial.params["act"] == "gelu"


def test_a_number_is_not_matched_with_a_choice_of_the_same_name() -> None:
    source = study(lambda trial: float(trial.suggest_categorical("x", [0.0, 0.5, 1.0])), 20)
    sampler = TransferSampler([source], seed=0)
    target = study(bowl(0.3), 12, sampler)
    assert set(sampler.weights(target).values()) == {0.0}


def branching(best: float) -> Objective:
    def objective(trial: optuna.Trial) -> float:
        if trial.suggest_categorical("moe", [False, True]):
            return (trial.suggest_float("experts", 0, 1) - best) ** 2
        return 1 + (trial.suggest_float("width", 0, 1) - 0.5) ** 2

    return objective


def test_conditional_parameters_are_matched_by_name() -> None:
    source, found = study(branching(0.7), 50), []
    for seed in range(2):
        sampler = TransferSampler([source], seed=seed)
        target = study(branching(0.75), 18, sampler)
        assert next(iter(sampler.weights(target).values())) > 0.3
        found.append(target.best_value)
    assert min(found) < 1e-4  # 0.05 away from the source's best point it would be 0.0025


def test_runs_that_blew_up_count_as_far_ones_and_many_equal_best_ones_hide_no_difference() -> None:
    blown, far = standardized([1.0, 2.0, 3.0, 5.0, 1e9]), standardized([1.0, 2.0, 3.0, 5.0, 5.0])
    np.testing.assert_allclose(blown, far)
    assert list(np.sign(standardized([0.1, 0.1, 0.1, 0.9]))) == [-1, -1, -1, 1]


def test_running_trials_are_not_proposed_again() -> None:
    source = study(bowl(0.3, 0.6), 40)
    target = study(bowl(0.3, 0.6), 10, TransferSampler([source], seed=0))
    asked = [
        target.ask(
            {"x": optuna.distributions.FloatDistribution(0, 1), "y": optuna.distributions.FloatDistribution(0, 1)}
        )
        for _ in range(4)
    ]
    places = np.array([[trial.params["x"], trial.params["y"]] for trial in asked])
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1)[np.triu_indices(4, 1)]
    assert apart.min() > 1e-4


def test_failed_pruned_and_infeasible_trials_teach_nothing() -> None:
    source = study(bowl(0.3, 0.6), 20)
    best = source.best_params
    distributions = source.best_trial.distributions
    trap = {"x": 1.0, "y": 0.0}
    for state in (optuna.trial.TrialState.FAIL, optuna.trial.TrialState.PRUNED):
        source.add_trial(optuna.create_trial(state=state, params=trap, distributions=distributions))
    bad = source.ask(distributions)
    bad.set_constraint("memory", 1.0)
    source.tell(bad, -100.0)
    source.add_trial(optuna.create_trial(value=float("-inf"), params=trap, distributions=distributions))
    assert study(bowl(0.3, 0.6), 1, TransferSampler([source], seed=0)).trials[0].params == best


def test_what_it_can_not_use_is_refused() -> None:
    source = study(bowl(0.3), 5)
    for nothing in ([], source):
        with pytest.raises(ValueError, match="write a list of earlier studies"):
            TransferSampler(nothing)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"sources\[1\]: the study .* has no complete trial"):
        TransferSampler([source, optuna.create_study()])
    two = optuna.create_study(directions=["minimize", "minimize"], sampler=TransferSampler([source]))
    with pytest.raises(ValueError, match="ranks trials by one objective and the study has 2"):
        two.ask()


def test_an_enqueued_point_is_run_as_it_is_and_the_best_of_the_source_comes_after_it() -> None:
    source = study(bowl(0.3, 0.6), 20)
    target = optuna.create_study(sampler=TransferSampler([source], seed=0))
    target.enqueue_trial({"x": 0.9, "y": 0.1})
    target.enqueue_trial({"x": 0.8})
    target.optimize(bowl(0.3, 0.6), n_trials=3)
    first, second, third = (trial.params for trial in target.trials)
    assert first == {"x": 0.9, "y": 0.1} and second["x"] == 0.8
    assert third == source.best_params
