"""`OptunaPruning`: one decision for all ranks, and a pruned fit is booked as pruned by itself.

The trials of `bharat tune` under every layout are in `tests/tuning/test_tune.py`.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import lightning as L
import optuna
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from optuna.exceptions import StorageInternalError
from optuna.pruners import BasePruner, NopPruner, ThresholdPruner
from optuna.storages import InMemoryStorage
from optuna.trial import FixedTrial

from lightning_bharat.callbacks import OptunaPruning
from lightning_bharat.tuning import tune
from lightning_bharat.tuning.remote_trial import RemoteTrial
from tests.ranks import run_ranks

optuna.logging.set_verbosity(optuna.logging.ERROR)

# What `run_ranks` says to Lightning: ranks that are started otherwise do without.
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID")


class Counting(BoringModel):
    """Its ``val_loss`` is the optimizer step, so that a report says when it was made."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.global_step * self.factor, sync_dist=True)
        self.log("val_acc", 0.0)


class Silent(Counting):
    """Logs nothing."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


class Witness(L.Callback):
    """Writes what it sees on each rank to a folder; stands behind the other callbacks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.write(trainer, f"step {trainer.global_step}")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.write(trainer, "teardown")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.write(trainer, repr(exception))

    def write(self, trainer: L.Trainer, line: str) -> None:
        with open(self.folder / f"rank{trainer.global_rank}", "a") as file:
            print(line, file=file)

    def of(self, rank: int) -> list[str]:
        return (self.folder / f"rank{rank}").read_text().splitlines()


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    """Two steps an epoch, four epochs, one validation at each epoch's end."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 4,
        "limit_train_batches": 2,
        "limit_val_batches": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def study_of(pruner: BasePruner | None = None, **options: Any) -> optuna.Study:
    return optuna.create_study(pruner=pruner or ThresholdPruner(upper=3), **options)


def fit(trial: Any, *callbacks: L.Callback, module: Any = None, ckpt_path: Any = None, **options: Any) -> float:
    """An objective that knows nothing of pruning but the callback in its list."""
    loop = trainer(OptunaPruning(trial), *callbacks, **options)
    loop.fit(module or Counting(), ckpt_path=ckpt_path)
    return loop.callback_metrics["val_loss"].item()


def booked(study: optuna.Study) -> list[tuple[str, dict[int, float]]]:
    return [(trial.state.name, trial.intermediate_values) for trial in study.trials]


def test_a_pruned_fit_is_booked_by_itself_and_all_hooks_run(tmp_path: Path) -> None:
    """Also where the trainer asks for at least so many epochs and steps, which it asks for afterwards as before."""
    study, least, witness = study_of(), {"min_epochs": 3, "min_steps": 100}, Witness(tmp_path)
    loops = []

    def objective(trial: optuna.Trial) -> float:
        loops.append(trainer(OptunaPruning(trial), witness, **least))  # type: ignore[arg-type]
        loops[-1].fit(Counting())
        raise AssertionError("not reached")

    study.optimize(objective, n_trials=1)
    assert booked(study) == [("PRUNED", {0: 2, 1: 4})]
    assert witness.of(0) == ["step 4", "teardown", "TrialPruned('Pruned at step 1.')"]
    assert (loops[0].min_epochs, loops[0].min_steps) == (3, 100)
    study.optimize(lambda trial: fit(trial, module=Counting(0.1), min_epochs=2), n_trials=1)
    assert [trial.state.name for trial in study.trials] == ["PRUNED", "COMPLETE"]


def test_a_step_is_a_validation_and_the_sanity_check_is_none() -> None:
    study = study_of()
    options = {"limit_train_batches": 4, "val_check_interval": 2, "num_sanity_val_steps": 2}
    study.optimize(lambda trial: fit(trial, **options), n_trials=1)
    study.optimize(lambda trial: fit(trial, check_val_every_n_epoch=2), n_trials=1)
    assert booked(study) == [("PRUNED", {0: 2, 1: 4}), ("PRUNED", {0: 4})]  # the first in the middle of an epoch


def test_nan_is_reported_and_pruned() -> None:
    study = study_of(ThresholdPruner(upper=1e9))
    study.optimize(lambda trial: fit(trial, module=Counting(float("nan"))), n_trials=1)
    [(state, values)] = booked(study)
    assert state == "PRUNED" and str(values) == "{0: nan}"


TWICE = {"val_check_interval": 2, "limit_train_batches": 4}


@pytest.mark.parametrize(
    ("when", "validations"),
    [
        ({"every_n_train_steps": 4}, {}),  # before the validation of that step, which a resumed fit leaves out
        ({"every_n_train_steps": 4}, TWICE),
        ({"save_on_train_epoch_end": True}, TWICE),
        ({"save_on_train_epoch_end": False}, {}),
    ],
    ids=["steps", "steps, two validations", "epoch", "validation"],
)
def test_a_resumed_fit_goes_on_with_the_steps(
    tmp_path: Path, when: dict[str, Any], validations: dict[str, Any]
) -> None:
    study = study_of(NopPruner())
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **when)
    study.optimize(lambda trial: fit(trial, save, **validations), n_trials=1)
    study.optimize(lambda trial: fit(trial, ckpt_path=tmp_path / "step=4.ckpt", **validations), n_trials=1)
    whole, rest = (trial.intermediate_values for trial in study.trials)
    first = min(rest)
    assert first > 0 and rest == {step: value for step, value in whole.items() if step >= first}
    assert whole[first - 1] <= 4 <= whole[first]


@pytest.mark.parametrize(
    ("study", "wrap", "error", "words"),
    [
        ({"directions": ["minimize", "minimize"]}, None, ValueError, "trial.set_constraint"),
        ({}, lambda trial: trial.study, TypeError, "write OptunaPruning"),
        ({}, lambda trial: "val_loss", TypeError, "write OptunaPruning"),
    ],
)
def test_what_can_not_be_pruned_is_refused(study: dict[str, Any], wrap: Any, error: type, words: str) -> None:
    trial = optuna.create_study(**study).ask()
    with pytest.raises(error, match=words):
        OptunaPruning(wrap(trial) if wrap else trial)


def test_a_metric_that_is_not_there() -> None:
    trial = study_of().ask()
    with pytest.raises(ValueError, match=r"monitor='val_los' .* there are val_acc, val_loss. .* monitor='val_loss'"):
        trainer(OptunaPruning(trial, "val_los")).fit(Counting())
    with pytest.raises(ValueError, match=r"no metric is there at all. .* self.log\('val_loss'"):
        trainer(OptunaPruning(trial)).fit(Silent())


@pytest.mark.parametrize("trial", [None, FixedTrial({})])
def test_outside_a_study_it_does_nothing_and_says_so_once(trial: Any, caplog: pytest.LogCaptureFixture) -> None:
    callback = OptunaPruning(trial, "no such metric")
    caplog.set_level(logging.INFO, "lightning.pytorch")  # a command in another test has made it silent
    for _ in range(2):
        trainer(callback).fit(Counting())
    assert caplog.text.count("OptunaPruning does nothing") == 1


class Failing(InMemoryStorage):
    """Refuses the second report."""

    def set_trial_intermediate_value(self, trial_id: int, step: int, value: float) -> None:
        if step == 1:
            raise StorageInternalError("the disk is full")
        super().set_trial_intermediate_value(trial_id, step, value)


def in_children(folder: Path) -> list[Any]:
    """Studies of this process, whose fits run on two children each."""
    for name in OF_A_RANK:
        os.environ.pop(name, None)
    # The tests' server has imported a library that counts devices, after which Lightning forks no more, even on CPUs.
    torch.cuda._is_in_bad_fork = lambda: False  # type: ignore[method-assign]
    options = {"strategy": "ddp_fork", "devices": 2}
    study, broken = study_of(), study_of(storage=Failing())
    study.optimize(lambda trial: fit(trial, Witness(folder), **options), n_trials=1)
    with pytest.raises(Exception, match="the disk is full"):
        broken.optimize(lambda trial: fit(trial, **options), n_trials=1)
    return [*booked(study), *booked(broken)]


def test_ranks_that_are_children(tmp_path: Path) -> None:
    """They have copies of the trial: the study in memory knows what they reported, and that they were pruned."""
    assert run_ranks(in_children, 1, tmp_path, timeout=90)[0] == [("PRUNED", {0: 2, 1: 4}), ("FAIL", {})]
    assert [Witness(tmp_path).of(rank)[:2] for rank in range(2)] == [["step 4", "teardown"]] * 2


class Cut(RemoteTrial):
    """A trial of `bharat tune` whose controller can't keep the second report."""

    def report(self, value: float, step: int) -> None:
        if step == 1:
            raise StorageInternalError("the disk is full")

    def should_prune(self) -> bool:
        return False


def without_a_storage() -> str:
    with pytest.raises(StorageInternalError) as raised:
        fit(Cut(0, {}, {}), strategy="ddp", devices=2)
    return str(raised.value)


def test_what_rank_0_can_not_report_is_raised_on_all_ranks() -> None:
    assert run_ranks(without_a_storage, 2) == ["the disk is full"] * 2


def study_on_each() -> tuple[str, int]:
    """What a script does that ``torchrun`` or Lightning's ``ddp`` starts."""
    study = study_of(NopPruner())
    with pytest.raises(MisconfigurationException) as refused:
        study.optimize(lambda trial: fit(trial, strategy="ddp", devices=2), n_trials=4)
    return str(refused.value), len(study.trials)


def test_a_study_on_each_rank_is_refused() -> None:
    for words, trials in run_ranks(study_on_each, 2):
        assert trials == 1 and "lightning_bharat.tuning.tune(objective" in words and "ddp_fork" in words


def of_a_trial(trial: Any) -> float:
    """For `tune`: it goes on after a pruned fit, and asks for more."""
    value = fit(trial, strategy="ddp", devices=2)
    return value + trial.suggest_float("x", 0, 1)


def test_an_objective_on_two_ranks(tmp_path: Path) -> None:
    """The trial is pruned though the objective returns a value; its ranks may ask for more when a fit has ended."""
    study = tune(of_a_trial, n_trials=1, ranks=2, pruner=ThresholdPruner(upper=3), folder=tmp_path, max_retries=0)
    assert booked(study) == [("PRUNED", {0: 2, 1: 4})]
    assert study.trials[0].user_attrs["end"] == "pruned at step 1" and "x" in study.trials[0].params
