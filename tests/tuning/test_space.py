"""Search spaces: what is suggested, what is refused and with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lightning_bharat.tuning import SearchSpace, When
from lightning_bharat.tuning.space import SpaceError
from lightning_bharat.tuning.space_yaml import of
from tests.tuning import tuned

MOE = {
    "model.experts": When("model.kind == 'moe'", IntDistribution(4, 16, step=4)),
    "model.capacity": When("model.kind == 'moe'", When("model.experts > 4", FloatDistribution(1.0, 2.0))),
    "model.kind": CategoricalDistribution(["dense", "moe"]),
}


def suggested(space: SearchSpace, values: dict[str, Any]) -> dict[str, Any]:
    return space.suggest(optuna.trial.FixedTrial(values))


def test_a_point_has_the_parameters_whose_conditions_hold() -> None:
    space = SearchSpace(MOE)
    every = {"model.kind": "moe", "model.experts": 8, "model.capacity": 1.5}
    assert suggested(space, every) == every
    assert suggested(space, {**every, "model.experts": 4}).keys() == {"model.kind", "model.experts"}
    assert suggested(space, {**every, "model.kind": "dense"}) == {"model.kind": "dense"}
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(lambda trial: len(space.suggest(trial)), n_trials=20)
    assert {len(trial.params) for trial in study.trials} == {1, 2, 3} or {1, 3} <= {len(t.params) for t in study.trials}


def test_a_constraint_that_names_a_missing_parameter_does_not_apply() -> None:
    space = SearchSpace(MOE, ["model.experts <= 8", "model.kind != 'none'"])
    assert space.violated({"model.kind": "dense"}) is None
    assert space.violated({"model.kind": "moe", "model.experts": 12}) == "model.experts <= 8"


def test_yaml(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        "parameters:\n"
        "  model.lr: {low: 1e-5, high: 1e-1, log: true}\n"
        "  model.moe: {choices: [true, false]}\n"
        "  model.experts: {low: 4, high: 16, step: 4, when: model.moe}\n"
        "  model.kind: [a, b, null]\n  model.eps: [1e-8, 1e-6]\n"
        "constraints:\n  - model.experts * model.lr < 1\n"
    )
    assert SearchSpace.from_yaml(path) == SearchSpace(
        {
            "model.lr": FloatDistribution(1e-5, 1e-1, log=True),
            "model.moe": CategoricalDistribution([True, False]),
            "model.experts": When("model.moe", IntDistribution(4, 16, step=4)),
            "model.kind": CategoricalDistribution(["a", "b", None]),
            "model.eps": CategoricalDistribution([1e-8, 1e-6]),
        },
        ["model.experts * model.lr < 1"],
    )


LR = {"low": 0.1, "high": 1.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected keys such as model.lr"),
        ({}, "without parameters"),
        ({"parameters": {"a.b": LR}, "constraint": []}, "write constraints"),
        ({"a.b": {"lo": 1, "high": 2}}, "a.b: lo is not known; write low"),
        ({"a.b": {"low": 1}}, "a.b: high is missing"),
        ({"a.b": 3}, "expected low and high, or choices"),
        ({"a.b": {"low": 2.0, "high": 1.0}}, "a.b: .*low"),
        ({"a.b": {"low": 0.0, "high": 1.0, "log": True}}, "a.b: .*low"),
        ({"a.b": {"low": 0.1, "high": 1.0, "log": True, "step": 0.1}}, "a.b: .*step"),
        ({"a.b": {"low": float("nan"), "high": 1.0}}, "a.b: low: expected a number"),
        ({"a.b": {"low": True, "high": 1.0}}, "a.b: low: expected a number"),
        ({"a.b": {**LR, "log": "yes"}}, "a.b: log: expected true or false"),
        ({"a.b": {"choices": []}}, "at least one value"),
        ({"a.b": {"choices": [[1]]}}, "is not a number, a text"),
        ({"a.b": {"choices": [1], "low": 1}}, "one or the other"),
        ({"a.b": {"choices": [1, True]}}, "True equals another one"),
        ({"a.b": {"low": 4, "high": 15, "step": 4}}, "a.b: .*15"),
        ({"a.b": LR, "a.init_args.b": LR}, "are one option"),
        ({"trainer.default_root_dir": ["a"]}, "a folder of its own"),
        ({"a.b": {**LR, "when": "a.c"}, "a.c": {**LR, "when": "a.b"}}, "go round in a circle"),
        ({"parameters": {"a.b": LR}, "constraints": ["a.b <"]}, "is no expression"),
        ({"parameters": {"a.b": LR}, "constraints": ["__import__('os').system('x')"]}, "a call is not allowed"),
        ({"a b": LR}, "is no option's key"),
    ],
)
def test_what_is_wrong_is_said(content: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        SearchSpace(*of(content))


def test_a_file_is_named_and_a_key_that_is_twice(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("a.b: {low: 1, high: 2}\na.b: {low: 1, high: 3}\n")
    with pytest.raises(SpaceError, match=r"space.yaml: a.b is there twice, the second time in line 2"):
        SearchSpace.from_yaml(path)
    path.write_text("a: [1\n")
    with pytest.raises(SpaceError, match="space.yaml: this is no YAML"):
        SearchSpace.from_yaml(path)


class Hinted:
    def __init__(
        self,
        rate: Annotated[float, FloatDistribution(1e-5, 1e-1, log=True)] = 1e-3,
        tied: bool = True,
        kind: Literal["a", "b"] = "a",
        width: int = 8,
    ) -> None: ...


def test_from_type_hints() -> None:
    assert SearchSpace.from_module(Hinted).distributions == {
        "model.rate": FloatDistribution(1e-5, 1e-1, log=True),
        "model.tied": CategoricalDistribution([False, True]),
        "model.kind": CategoricalDistribution(["a", "b"]),
    }
    with pytest.raises(SpaceError, match="write one, as in"):
        SearchSpace.from_module(tuned.Data, prefix="data")


def test_expressions_may_name_what_the_config_fixes(tmp_path: Path) -> None:
    words = [f"--config={tuned.config(tmp_path)}"]
    lr = When("model.depth == 2", FloatDistribution(0, 1))
    space = SearchSpace({"model.lr": lr, "model.width": IntDistribution(8, 16)}, ["model.width * model.depth <= 20"])
    with pytest.raises(SpaceError, match="names 'model.depth'"):
        suggested(space, {"model.lr": 0.5, "model.width": 8})
    space.check(words)
    assert suggested(space, {"model.lr": 0.5, "model.width": 8}).keys() == {"model.lr", "model.width"}
    assert space.violated({"model.width": 11}) is not None and space.violated({"model.width": 10}) is None


def test_a_class_comes_before_its_arguments(tmp_path: Path) -> None:
    words = [f"--config={tuned.config(tmp_path)}"]
    momentum = When("optimizer == 'SGD'", FloatDistribution(0.0, 0.9))
    both = {"optimizer.lr": FloatDistribution(1e-3, 1e-1), "optimizer.momentum": momentum}
    space = SearchSpace({**both, "optimizer": CategoricalDistribution(["Adam", "SGD"])})
    assert next(iter(space.distributions)) == "optimizer"
    SearchSpace({"optimizer.momentum": momentum, "optimizer": CategoricalDistribution(["Adam", "SGD"])}).check(words)


def test_a_grid_has_each_value() -> None:
    space = SearchSpace({"a.b": IntDistribution(1, 5, step=2), "a.c": FloatDistribution(0.0, 1.0, step=0.5)})
    assert space.grid() == {"a.b": [1, 3, 5], "a.c": [0.0, 0.5, 1.0]}
    assert SearchSpace({"a.b": FloatDistribution(0, 0.3, step=0.1)}).grid() == {"a.b": [0.0, 0.1, 0.2, 0.3]}
    with pytest.raises(SpaceError, match="has no steps"):
        SearchSpace({"a.b": FloatDistribution(0, 1)}).grid()
    with pytest.raises(SpaceError, match="has a condition"):
        SearchSpace(MOE).grid()


@pytest.mark.parametrize(
    ("parameters", "args", "message"),
    [
        (
            {"model.widht": IntDistribution(4, 8)},
            [],
            "model.widht is no option of this project; did you mean model.width",
        ),
        ({"model.width": FloatDistribution(4.5, 8)}, [], "model.width does not take 4.5"),
        ({"model.lr": IntDistribution(0, 1)}, [], "write 0.0 and 1.0"),
        ({"trainer.precision": CategoricalDistribution(["32-true", "33"])}, [], "trainer.precision does not take '33'"),
        ({"model.lr": FloatDistribution(0, 1)}, ["--model.lr=0.1"], "--model.lr sets it as well"),
        ({"model.lr": FloatDistribution(0, 1)}, ["--model.init_args.lr", "0.1"], "sets it as well"),
        ({"model.lr": When("model.widht > 8", FloatDistribution(0, 1))}, [], "nearest: model.width"),
        ({"model.lr": When("model.width > 8", FloatDistribution(0, 1))}, [], "can its condition hold"),
    ],
)
def test_a_space_that_does_not_suit_the_project(
    tmp_path: Path, parameters: dict[str, Any], args: list[str], message: str
) -> None:
    words = [f"--config={tuned.config(tmp_path)}", *args]
    SearchSpace({"model.depth": IntDistribution(1, 2), "data.batch": IntDistribution(4, 8)}).check(words)
    with pytest.raises(SpaceError, match=message):
        SearchSpace(parameters).check(words)
