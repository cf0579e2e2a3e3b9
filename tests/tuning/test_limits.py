"""Limits become constraints, and a sampler learns from trials that failed by one."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna import Study
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from lightning_bharat.tuning.limits import OUT_OF_MEMORY, PEAK_MEMORY, Limit, quantity, set_constraints
from lightning_bharat.tuning.memory_of_failures import remembered
from lightning_bharat.tuning.pruners import make_pruner
from lightning_bharat.tuning.samplers import make_sampler

MEMORY = 0.4  # of a model of width * depth


def study(name: str = "random", seed: int = 0, storage: BaseStorage | None = None) -> Study:
    options = {"population_size": 8} if name == "nsga2" else {}
    sampler = make_sampler({"name": name, **options}, seed)
    return optuna.create_study(
        sampler=sampler, storage=storage or InMemoryStorage(), study_name="s", load_if_exists=True
    )


def out_of_memory(of: Study, trials: int, limits: list[Limit] | None) -> list[bool]:
    """Run trials of which the best ones need too much; returns which ran out. ``limits``: None says nothing of it."""
    out = []
    for _ in range(trials):
        trial = of.ask()
        width, depth = trial.suggest_float("width", 0, 1), trial.suggest_float("depth", 0, 1)
        needs = width * depth
        out.append(needs > MEMORY)
        if limits is not None:
            set_constraints(trial, limits, {PEAK_MEMORY: min(needs, MEMORY)}, out_of_memory=out[-1])
        of.tell(trial, **({"state": TrialState.FAIL} if out[-1] else {"values": 2 - width - depth}))
    return out


@pytest.mark.parametrize("limits", [[], [Limit(PEAK_MEMORY, MEMORY)]], ids=["no limit", "limit"])
@pytest.mark.parametrize(("name", "trials", "seeds"), [("tpe", 40, 3), ("gp", 16, 1), ("cmaes", 150, 3)])
def test_a_region_that_runs_out_of_memory_is_left(name: str, trials: int, seeds: int, limits: list[Limit]) -> None:
    learned = sum(sum(out_of_memory(study(name, seed), trials, limits)[10:]) for seed in range(seeds))
    ignored = sum(sum(out_of_memory(study(name, seed), trials, None)[10:]) for seed in range(seeds))
    assert learned < (0.5 if name != "cmaes" else 0.85) * ignored


def test_hyperband_hides_no_failures() -> None:
    """Its study gives a bracket by `get_trials`, and samplers read all: with a mixture NSGA-II met trials without
    values."""
    pruner = make_pruner({"name": "hyperband", "min_resource": 1, "max_resource": 9})
    tried = optuna.create_study(study_name="s", pruner=pruner)
    for number in range(12):
        trial = tried.ask()
        trial.report(1.0, 1)
        trial.should_prune()  # makes the brackets
        set_constraints(trial, [], {}, out_of_memory=number == 0)
        tried.tell(trial, **({"values": 1.0} if number else {"state": TrialState.FAIL}))
    brackets = [optuna.pruners._filter_study(tried, trial) for trial in tried.trials]
    assert len(brackets[0].get_trials()) < 12
    for bracket in brackets:
        assert [trial.state.name for trial in remembered(bracket).trials] == ["COMPLETE"] * 12


def test_the_trial_stays_failed_and_is_never_the_best() -> None:
    tried = study("tpe")
    out = out_of_memory(tried, 30, [])
    assert [trial.state == TrialState.FAIL for trial in tried.trials] == out
    assert tried.best_trial.state == TrialState.COMPLETE


def test_it_is_learned_across_a_restart(tmp_path: Path) -> None:
    """From the storage alone: the points after it are those of a study without a restart."""

    def journal(name: str) -> BaseStorage:
        return JournalStorage(JournalFileBackend(str(tmp_path / name)))

    whole = study("tpe", 1, journal("whole"))
    out_of_memory(whole, 24, [])
    out_of_memory(study("tpe", 1, journal("parts")), 16, [])
    again = study("tpe", 1, journal("parts"))
    out_of_memory(again, 8, [])
    assert [trial.params for trial in again.trials] == [trial.params for trial in whole.trials]


def test_what_a_sampler_sees() -> None:
    tried = study()
    for values, constraints in ((1.0, {}), (3.0, {"b": -0.5, "a": -0.1}), (None, {OUT_OF_MEMORY: 1.0}), (None, {})):
        trial = tried.ask()
        for name, value in constraints.items():
            trial.set_constraint(name, value)
        tried.tell(trial, **({"values": values} if values else {"state": TrialState.FAIL}))
    seen = remembered(tried).trials
    assert [(trial.state.name, trial.values) for trial in seen] == [
        ("COMPLETE", [1.0]),
        ("COMPLETE", [3.0]),
        ("COMPLETE", [3.0]),  # ran out of memory: as bad as the worst, and beyond a limit
        ("FAIL", None),  # failed by no limit: nothing is learned from it
    ]
    assert [list(trial.constraints.items()) for trial in seen[:3]] == [
        [("a", -0.1), ("b", -0.5), (OUT_OF_MEMORY, -1.0)],
        [("a", -0.1), ("b", -0.5), (OUT_OF_MEMORY, -1.0)],
        [("a", -0.1), ("b", -0.5), (OUT_OF_MEMORY, 1.0)],
    ]
    assert [trial.state.name for trial in tried.trials] == ["COMPLETE", "COMPLETE", "FAIL", "FAIL"]
    assert tried.trials[0].constraints == {}
    ranked = remembered(tried, ranked=True).trials
    assert [trial.values for trial in ranked[:3]] == [[1.0], [3.0], [7.0]]


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_cma_es_takes_what_breaks_a_limit_for_worse_than_all_else(direction: str) -> None:
    tried = optuna.create_study(direction=direction)
    for value, over in ((5.0, -1.0), (-2.0, -1.0), (9.0, 0.1), (-9.0, 0.2)):
        trial = tried.ask()
        trial.set_constraint("latency", over)
        tried.tell(trial, value)
    values = [trial.values[0] for trial in remembered(tried, ranked=True).trials]
    sign = 1 if direction == "minimize" else -1
    assert values[:2] == [5.0, -2.0]
    assert max(sign * 5, sign * -2) < sign * values[2] < sign * values[3]


def test_a_study_without_limits_is_seen_as_it_is() -> None:
    tried = study()
    out_of_memory(tried, 3, None)
    assert remembered(tried) is tried


def test_limits_are_shares_so_that_bytes_and_seconds_add_up() -> None:
    tried = study()
    trial = tried.ask()
    measured = {PEAK_MEMORY: 3 * 2**30, "latency": 0.04, "parameters": 1e6, "other": None}
    set_constraints(trial, [Limit(PEAK_MEMORY, "2 GiB"), Limit("latency", "50 ms"), Limit("parameters", 1e6)], measured)
    assert trial.constraints == pytest.approx({PEAK_MEMORY: 0.5, "latency": -0.2, "parameters": 0.0})
    tried.tell(trial, 1.0)
    with pytest.raises(ValueError, match="No feasible trials"):
        _ = tried.best_trial


def test_out_of_memory_breaks_the_memorys_limit_whatever_was_measured() -> None:
    limits = [Limit(PEAK_MEMORY, "1 GiB"), Limit("latency", "1 s")]
    for measured, excess in ((None, 0.1), (2**29, 0.1), (2**31, 1.0)):
        trial = study().ask()
        set_constraints(trial, limits, {PEAK_MEMORY: measured}, out_of_memory=True)
        assert trial.constraints == pytest.approx({PEAK_MEMORY: excess})
    trial = study().ask()
    set_constraints(trial, limits[1:], {}, out_of_memory=True)
    assert trial.constraints == {OUT_OF_MEMORY: 1.0}


@pytest.mark.parametrize(
    ("text", "number"),
    [("2 GiB", 2**31), ("2GB", 2e9), ("50 ms", 0.05), ("1.5e3", 1500), ("2 h", 7200), (3, 3), ("1_000 kB", 1e6)],
)
def test_quantities(text: str | float, number: float) -> None:
    assert quantity(text) == pytest.approx(number)


@pytest.mark.parametrize("text", ["2 gib", "GiB", "", "1 2", "0 s", "-3", "nan", float("inf")])
def test_what_is_no_quantity_is_refused(text: str | float) -> None:
    with pytest.raises(ValueError, match="expected a number"):
        Limit("latency", text)


def test_a_limit_of_which_nothing_was_measured_is_refused() -> None:
    with pytest.raises(ValueError, match=r"""Limit\('latencyy'\): .* Did you mean "latency"\? It has latency"""):
        set_constraints(study().ask(), [Limit("latencyy", 1)], {"latency": 0.5})
