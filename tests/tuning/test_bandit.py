"""A population whose copies are explored by Ray's PB2: what it learns from, and that the study alone says it."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_bharat.cli import main
from lightning_bharat.commands.project import BadInput
from lightning_bharat.tuning import SearchSpace, When
from lightning_bharat.tuning.for_population import bandit_for
from lightning_bharat.tuning.improvements import Improvements
from lightning_bharat.tuning.members import Members
from lightning_bharat.tuning.population import Population
from lightning_bharat.tuning.storage import open_storage
from tests.ranks import server
from tests.tuning import tuned

try:
    from ray.tune.schedulers import pb2
except ImportError:
    pb2 = None

needs_ray = pytest.mark.skipif(pb2 is None, reason="Ray is not installed: pip install 'lightning-bharat[ray]'")
LR = FloatDistribution(1e-4, 1.0, log=True)
SPACE = SearchSpace({"lr": LR, "kind": CategoricalDistribution(["a", "b", "c"])})


def generation(study: Study, member: int, of: int, value: float | None, parent: int | None, **params: Any) -> int:
    """Adds one that has ended; returns its trial's number. ``None``: it failed."""
    attrs = {"member": member, "generation": of} | ({} if parent is None else {"parent": parent})
    distributions: dict[str, BaseDistribution] = {"lr": LR}
    state = TrialState.FAIL if value is None else TrialState.COMPLETE
    study.add_trial(
        create_trial(state=state, value=value, params=params, distributions=distributions, user_attrs=attrs)
    )
    return len(study.trials) - 1


@pytest.mark.parametrize(("direction", "sign"), [("minimize", 1), ("maximize", -1)])
def test_what_generations_have_shown(direction: str, sign: int) -> None:
    """Gains of an epoch, the larger the better; of like points the mean; a failure or an explosion is a bad one."""
    study = optuna.create_study(direction=direction)
    for member, value in enumerate((5.0, 6.0, float("inf"))):
        generation(study, member, 0, sign * value, None, lr=1e-4)
    generation(study, 0, 1, sign * 3.0, 0, lr=1e-2)
    generation(study, 1, 1, sign * 1e9, 0, lr=1.0)
    generation(study, 2, 1, None, 0, lr=0.1)
    generation(study, 3, 1, sign * 2.0, 0, lr=1e-2)
    generation(study, 4, 1, sign * 2.0, 2, lr=1e-2)  # from a metric that is no number
    generation(study, 0, 2, sign * 2.5, 3, lr=1e-2)  # the last one, of one epoch
    how = Population(4, 2)
    shown = Improvements(study, {"lr": LR}, lambda of: how.end(of, 5))
    seen, gains = shown.of(study.trials)
    worst = 2 * 0.75 - 1.5  # as far below the median as the best is above it
    assert [[*row[:2], round(row[2], 6)] for row in seen.tolist()] == [
        [4.0, -5.0, 0.5],
        [4.0, -5.0, 0.75],
        [4.0, -5.0, 1.0],
        [5.0, -3.0, 0.5],
    ]
    assert gains.tolist() == [1.25, worst, worst, 0.5]
    assert shown.begins(study.trials[8]) == (5.0, -3.0) and shown.begins(study.trials[0]) is None


@pytest.mark.skipif(pb2 is not None, reason="Ray is installed")
def test_ray_is_asked_for_in_words() -> None:
    says = r"""explorer="pb2" is that of Ray.*pip install 'lightning-bharat\[ray\]'; or write explorer="pbt"$"""
    with pytest.raises(BadInput, match=says):
        bandit_for(Population(4, 1, explorer="pb2"), SPACE)


@pytest.mark.parametrize("explore", [None, ["kind"], ["only", "one"]])
def test_a_space_without_numbers_that_all_points_have_is_refused(explore: list[str] | None) -> None:
    kind, one = CategoricalDistribution(["a", "b"]), FloatDistribution(1, 1)
    space = SearchSpace({"kind": kind, "one": one, "only": When("kind == 'b'", LR)})
    with pytest.raises(BadInput, match='explorer="pb2" chooses numbers that all points have, and of .*"pbt"'):
        bandit_for(Population(4, 1, explorer="pb2", explore=explore), space)


# ---- with Ray's own


@needs_ray
def test_what_we_touch_of_ray_is_there() -> None:
    """Ray may move it with any release; then `_ray.py` needs a change."""
    asked = ["Xraw", "yraw", "current", "newpoint", "bounds", "num_f"]
    assert list(inspect.signature(pb2._select_config).parameters) == asked


@needs_ray
def test_it_proposes_where_the_metric_gained_most() -> None:
    """And not right beside what is tried already; by the seed alone, whatever NumPy's own generator does."""
    from lightning_bharat.tuning._ray import next_point

    x = np.linspace(0, 1, 8)
    seen, gains = np.column_stack([np.repeat([1.0, 2.0], 4), np.zeros(8), x]), -((x - 0.7) ** 2)
    begins = np.array([2.0, 0.0])
    [first] = next_point(seen, gains, None, begins, seed=1)
    assert abs(first - 0.7) < 0.15
    np.random.seed(5)
    assert next_point(seen, gains, None, begins, seed=1).tolist() == [first]
    assert np.random.randint(1 << 30) == np.random.RandomState(5).randint(1 << 30)
    seen, gains = np.column_stack([np.linspace(1, 2, 5), np.zeros(5), x[:5] * 0.7]), np.array([0, 0.1, 0.2, 0.25, 0.3])
    [alone] = next_point(seen, gains, None, begins, seed=1)  # beyond all that was seen
    [beside] = next_point(seen, gains, np.array([[alone]]), begins, seed=1)
    assert abs(alone - beside) > 0.2


def members(space: SearchSpace, generations: int = 3, seed: int = 0, **how: Any) -> Members:
    """A controller of a population of four."""
    population = Population(4, 1, **{"mode": "sync", "explorer": "pb2", **how})
    return Members(population, space, Path("nowhere"), generations, seed, bandit_for(population, space))


def trained(space: SearchSpace, backwards: bool = False, kills: bool = False, **how: Any) -> list[FrozenTrial]:
    """A population whose trainings gain the more, the nearer a learning rate is to 0.1; member 1 fails once."""
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    metric: dict[int | None, float] = {None: 0.0}
    one = members(space, **how)
    while batch := _asked(one, study):
        for trial in reversed(batch) if backwards else batch:
            attrs, gain = trial.user_attrs, math.exp(-((math.log10(trial.params["lr"]) + 1) ** 2))
            metric[trial.number] = metric[attrs.get("parent")] + gain
            fails = (attrs["member"], attrs["generation"]) == (1, 1)
            study.tell(trial, **({"state": TrialState.FAIL} if fails else {"values": metric[trial.number]}))
            one = members(space, **how) if kills else one
    return study.trials


def _asked(one: Members, study: Study) -> list[optuna.Trial]:
    """All that can run now."""
    batch = []
    while trial := one.next(study):
        batch.append(trial)
    return batch


def points(trials: list[FrozenTrial]) -> list[Any]:
    return [(trial.params, trial.user_attrs) for trial in trials]


@needs_ray
def test_a_population_is_the_same_after_kills_and_in_any_order() -> None:
    """In each generation the poorest is copied, and explored by what came before; so is one that failed."""
    trials = trained(SPACE, generations=4)
    assert points(trials) == points(trained(SPACE, generations=4, backwards=True, kills=True))
    said = [(t.user_attrs["generation"], t.user_attrs["explored_by"]) for t in trials if "explored_by" in t.user_attrs]
    early = (1, "pbt: too few generations have shown an improvement yet")
    assert said[0] == early and {by for of, by in said if of > 1} == {"pb2"} and len(said) == 4


@needs_ray
def test_proposals_stay_in_the_space() -> None:
    """Numbers on their steps and in their ranges; the rest as without a bandit; constraints hold."""
    space = SearchSpace(
        {
            "lr": LR,
            "half": FloatDistribution(0, 2, step=0.5),
            "depth": IntDistribution(2, 10, step=4),
            "kind": CategoricalDistribution(["a", "b", "c"]),
            "only": When("kind == 'b'", FloatDistribution(0, 1)),
        },
        ["lr * depth <= 0.4"],
    )
    trials = trained(space, generations=4, mode="async")
    by_number = {trial.number: trial for trial in trials}
    chosen = [trial for trial in trials if trial.user_attrs.get("explored_by") == "pb2"]
    assert len(chosen) >= 2
    for trial in chosen:
        params, donor = trial.params, by_number[trial.user_attrs["parent"]].params
        assert space.violated(params) is None and ("only" in params) == (params["kind"] == "b")
        assert 1e-4 <= params["lr"] <= 1 and params["half"] % 0.5 == 0 and params["depth"] in (2, 6, 10)
        assert abs("abc".index(params["kind"]) - "abc".index(donor["kind"])) <= 2


@needs_ray
def test_without_a_solution_of_rays_a_copy_is_explored_as_by_pbt(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_bharat.tuning import bandit

    def fails(*args: Any) -> Any:
        raise np.linalg.LinAlgError("2-th leading minor not positive definite")

    monkeypatch.setattr(bandit, "next_point", fails)
    said = {trial.user_attrs.get("explored_by") for trial in trained(SPACE)}
    assert "pbt: Ray's model has no solution: 2-th leading minor not positive definite" in said and "pb2" not in said


@needs_ray
def test_the_command_explores_by_pb2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On real checkpoints: what is proposed is set behind the donor's."""
    server.warm_up()
    monkeypatch.chdir(tmp_path)
    tuned.config(tmp_path, max_epochs=3)
    Path("space.yaml").write_text("model.lr: {low: 1.0e-4, high: 0.3, log: true}\n")
    how = json.dumps({"size": 3, "interval": 1, "mode": "sync"})
    model = "--model.class_path=tests.tuning.populated.Written"
    words = ["tune", "--config=config.yaml", "--space=space.yaml", f"--population={how}", "--seed=1", model]
    assert main([*words, "--population.explorer=pb2"]) == 0
    study = optuna.load_study(study_name="config", storage=open_storage(Path("runs/config")))
    [trial] = [trial for trial in study.trials if trial.user_attrs.get("explored_by") == "pb2"]
    written = json.loads(Path(f"runs/config/trials/{trial.number:04d}/rank0.json").read_text())
    assert {lr for _, lr, _ in written["steps"]} == {trial.params["model.lr"]}
    assert trial.params["model.lr"] not in {other.params["model.lr"] for other in study.trials if other != trial}
