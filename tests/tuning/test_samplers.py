"""Samplers are found by name, suggest what a seed says, and are refused where Optuna would be wrong without a word."""

from __future__ import annotations

import optuna
import pytest
from optuna import Study, Trial
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import BaseStorage, InMemoryStorage

from lightning_bharat.tuning import _optuna
from lightning_bharat.tuning.samplers import SAMPLERS, make_sampler

MIXED = {
    "lr": FloatDistribution(1e-4, 1e-1, log=True),
    "width": IntDistribution(8, 64, step=8),
    "kind": CategoricalDistribution(["a", "b"]),
}
GRID = {"lr": [0.001, 0.01], "width": [8, 16], "kind": ["a", "b"]}


def mixed(trial: Trial) -> float:
    lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    width = trial.suggest_int("width", 8, 64, step=8)
    kind = trial.suggest_categorical("kind", ["a", "b"])
    return (lr - 0.01) ** 2 * 1e4 + (width - 32) ** 2 / 1e3 + (kind == "a")


def study(sampler: BaseSampler, storage: BaseStorage | None = None, objectives: int = 1) -> Study:
    return optuna.create_study(
        study_name="study",
        storage=storage or InMemoryStorage(),
        sampler=sampler,
        directions=["minimize"] * objectives,
        load_if_exists=True,
    )


def space_of(name: str) -> dict:
    return GRID if name == "grid" else MIXED


def sampler_of(name: str, seed: int) -> BaseSampler:
    options = {"gp": {"n_startup_trials": 5}, "tpe": {"n_startup_trials": 5}, "nsga2": {"population_size": 4}}
    options["nsga3"] = options["nsga2"]
    return make_sampler({"name": name, **options.get(name, {})}, seed, space_of(name))


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_a_study_goes_on_as_if_it_had_not_been_killed(name: str) -> None:
    """Every sampler on a mixed space; Optuna's own begin their random numbers anew, so points come a second time."""
    whole = study(sampler_of(name, 7))
    whole.optimize(mixed, n_trials=8)
    storage = InMemoryStorage()
    study(sampler_of(name, 7), storage).optimize(mixed, n_trials=6)
    goes_on = study(sampler_of(name, 7), storage)
    goes_on.optimize(mixed, n_trials=2)
    points = [trial.params for trial in whole.trials]
    assert [trial.params for trial in goes_on.trials] == points
    assert len({tuple(point.values()) for point in points}) > 5
    other = study(sampler_of(name, 8))
    other.optimize(mixed, n_trials=8)
    assert [trial.params for trial in other.trials] != points


def test_points_do_not_depend_on_which_of_two_workers_asks_first() -> None:
    def points(first_asks_first: bool) -> list[dict]:
        running = study(make_sampler("random", 3))
        trials = [running.ask(), running.ask()]
        for trial in trials if first_asks_first else trials[::-1]:
            running.tell(trial, mixed(trial))
        return [trial.params for trial in running.trials]

    assert points(True) == points(False)


def test_without_a_seed_points_are_others_each_time() -> None:
    found = []
    for _ in range(2):
        running = study(make_sampler("random"))
        running.optimize(mixed, n_trials=1)
        found.append(running.trials[0].params)
    assert found[0] != found[1]


def test_a_sampler_of_optunas_is_taken_as_it_is() -> None:
    mine = TPESampler(seed=1)
    assert make_sampler(mine) is mine


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("tpee", ValueError, 'sampler="tpee" is not one of grid, random, qmc, .* Did you mean "tpe"?'),
        ("sobol", ValueError, 'sampler="sobol" is not one of'),
        (3, TypeError, "sampler=3: expected one of grid"),
        ({"n_startup_trials": 5}, ValueError, "has no name"),
        ({"name": "tpe", "n_startup": 5}, ValueError, "no option 'n_startup'. Did you mean \"n_startup_trials\"?"),
        ({"name": "tpe", "seed": 5}, ValueError, "no option 'seed'"),
        ({"name": "random", "a": 5}, ValueError, "Its options: none"),
    ],
)
def test_what_is_not_known_is_refused_with_what_is(given: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make_sampler(given)  # type: ignore[arg-type]


def test_cma_es_is_refused_where_it_would_draw_at_random() -> None:
    with pytest.raises(ValueError, match="one objective, and there are 2"):
        make_sampler("cmaes", 0, MIXED, ("minimize", "maximize"))
    with pytest.raises(ValueError, match="kind are choices"):
        make_sampler("cmaes", 0, {"kind": MIXED["kind"]})
    with pytest.raises(ValueError, match="lr is the only one"):
        make_sampler("cmaes", 0, {"lr": MIXED["lr"], "kind": MIXED["kind"]})
    make_sampler("cmaes", 0, MIXED)


@pytest.mark.parametrize("name", ["tpe", "gp", "nsga2", "nsga3", "random"])
def test_several_objectives(name: str) -> None:
    options = {"population_size": 4} if name.startswith("nsga") else {}
    options |= {"n_startup_trials": 4} if name in ("tpe", "gp") else {}
    running = study(make_sampler({"name": name, **options}, 0, MIXED, ("minimize",) * 2), objectives=2)
    running.optimize(lambda trial: (mixed(trial), -trial.params["width"]), n_trials=6)
    assert running.best_trials


def test_a_population_that_never_breeds_is_said() -> None:
    with pytest.warns(
        UserWarning, match='draws its first 50 trials at random, and the study has 40.*"population_size": 8'
    ):
        make_sampler("nsga2", n_trials=40)


def test_what_we_touch_of_optuna_is_there() -> None:
    """Optuna may move it with any release; then `_optuna.py` needs a change."""
    running = study(make_sampler("random", 0))
    running.enqueue_trial({"lr": 0.01})
    trial = running.ask()
    trial.set_constraint("memory", 0.5)
    [frozen] = _optuna.all_trials(running)
    assert frozen.system_attrs[f"{_optuna.CONSTRAINT}memory"] == 0.5
    assert frozen.system_attrs[_optuna.FIXED] == {"lr": 0.01}
    _optuna.note(running, frozen, "note", [1])
    assert running.trials[0].system_attrs["note"] == [1]
    _optuna.give_up(running, frozen)
    assert running.trials[0].state.name == "FAIL"
