"""A study that goes on with another metric, direction or population is refused: Optuna mixes them without a word."""

from __future__ import annotations

import optuna
import pytest

from lightning_bharat.commands.project import BadInput
from lightning_bharat.tuning.population import Population
from lightning_bharat.tuning.same_study import agree

HOW = Population(4, 1, factors=[0.5, 2])
BEGUN = (["minimize"], ["val_loss"], HOW)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ((["maximize"], ["val_loss"], HOW), r"has mode=\['min'\], and this call mode=\['max'\]"),
        ((["minimize", "minimize"], ["val_loss"], HOW), r"this call mode=\['min', 'min'\]"),
        ((["minimize"], ["val_acc"], HOW), r"has monitor=\['val_loss'\], and this call monitor=\['val_acc'\]"),
        ((["minimize"], ["val_loss"], None), "this call population=None: write the same to go on with it"),
        ((["minimize"], ["val_loss"], Population(4, 2, factors=[0.5, 2])), "'interval': 2"),
    ],
)
def test_what_differs_is_refused(asked: tuple, says: str) -> None:
    study = optuna.create_study()
    agree(study, *BEGUN)
    agree(study, ["minimize"], ["val_loss"], Population(4, 1, factors=(0.5, 2)))
    with pytest.raises(BadInput, match=says):
        agree(study, *asked)
    agree(study, *BEGUN)


def test_a_refused_call_leaves_no_mark_in_a_study_without_trials() -> None:
    study = optuna.create_study()
    with pytest.raises(BadInput, match="mode"):
        agree(study, ["maximize"], ["val_acc"], None)
    agree(study, *BEGUN)


def test_a_study_that_optuna_made_by_itself_says_only_its_directions() -> None:
    study = optuna.create_study(direction="maximize")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    agree(study, ["maximize"], ["val_acc"], None)
    with pytest.raises(BadInput, match="population=None, and this call population="):
        agree(study, ["maximize"], ["val_acc"], HOW)
    with pytest.raises(BadInput, match="mode"):
        agree(study, ["minimize"], ["val_acc"], None)


def test_a_population_that_was_begun_before_an_option_was_there_goes_on() -> None:
    study = optuna.create_study()
    agree(study, *BEGUN)
    asked = study.user_attrs["asked"]
    del asked["population"]["explorer"]
    study.set_user_attr("asked", asked)
    agree(study, *BEGUN)
    with pytest.raises(BadInput, match="'explorer': 'pbt'.*'explorer': 'pb2'"):
        agree(study, ["minimize"], ["val_loss"], Population(4, 1, factors=[0.5, 2], explorer="pb2"))
