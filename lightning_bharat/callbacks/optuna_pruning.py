"""Ends a trial of Optuna that promises nothing: on all ranks at the same step, and the study hears of it."""

from __future__ import annotations

import difflib
import pickle
import uuid
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_bharat.callbacks import trial_kind
from lightning_bharat.callbacks.last_word import LastWord
from lightning_bharat.strategies._lightning import fits_in_children
from lightning_bharat.strategies._lightning_loops import validation_is_due

SHOWN = 8  # names in a message


class OptunaPruning(pl.Callback):
    """Reports a metric to an Optuna trial after each validation, and stops training where the study's pruner says so.

    Rank 0 reports and asks, and one broadcast carries the answer: all ranks stop at the same step, or raise the same
    error. ``fit`` then ends as after an early stop, with all hooks, also where ``min_epochs`` or ``min_steps`` ask for
    more. In ``study.optimize``, ``fit`` raises ``optuna.TrialPruned`` in the process that has the study, so there is
    nothing to call afterwards. A trial of ``bharat tune`` or ``tune`` is marked on all ranks
    (``trial.note_pruned(step)``), and nothing is raised: it is booked as pruned whatever an objective returns.

    A step is a validation, counted from 0, since Optuna's pruners assume that steps begin at 0 and compare trials at
    equal steps. Optimizer steps are not equal where trials differ in batch size or accumulation, and epochs are not
    different where one has several validations. With one validation at the end of each epoch it is the epoch. A
    checkpoint keeps the count.

    The arguments are those of optuna-integration's ``PyTorchLightningPruningCallback``.

    Args:
        trial: what ``study.optimize`` gives to the objective. ``None``: the trial of ``bharat tune`` that this process
            is a rank of; where there is none, nothing is done, which is said once.
        monitor: name of a logged metric. Rank 0's value counts. NaN is reported too; Optuna's pruners end such a trial
            as soon as they may end any.

    Raises:
        TypeError: ``trial`` is none of Optuna's.
        ValueError: its study has several objectives; in training, on all ranks: there is no metric ``monitor``.
        MisconfigurationException: when ``fit`` begins, on all ranks: each of them has a ``study.optimize`` of its own.
    """

    def __init__(self, trial: Any = None, monitor: str = "val_loss") -> None:
        trial_kind.check(trial)
        self._given, self.monitor = trial, monitor
        self._trial: Any = None
        self._active = self._said = self._due = False
        self._validations = 0
        self._reports: list[tuple[float, int]] = []  # of this fit
        self._pruned_at: int | None = None
        self._least: tuple[Any, Any] | None = None  # min_epochs and min_steps, while they are put aside
        self._name = uuid.uuid4().hex
        _here[self._name] = self

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != TrainerFn.FITTING:
            return
        self._trial = self._own_trial()
        mine = trial_kind.refusal(self._trial, trainer), self._trial is not None
        refused, self._active = trainer.strategy.broadcast(mine)
        if refused:
            raise MisconfigurationException(refused)
        self._reports, self._pruned_at, self._due = [], None, False
        if trainer.global_step == 0:  # else this trainer goes on
            self._validations = 0
        if not self._active and not self._said:
            self._said = True
            rank_zero_info("OptunaPruning does nothing: this run is no trial of a study")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._active and self._validations and trial_kind.is_remote(self._trial):
            self._trial.note_resumed(self._validations)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._due = self._active and validation_is_due(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        is_of_fit = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not (self._active and is_of_fit) or self._pruned_at is not None:
            return
        metrics = trainer.callback_metrics  # on all ranks: what is computed by looking is computed by all
        step, self._validations, self._due = self._validations, self._validations + 1, False
        mine: tuple[str, Any] = self._decide(metrics, step) if trainer.is_global_zero else ("waits", None)
        kind, payload = trainer.strategy.broadcast(mine)
        if kind == "error":
            raise payload
        if not trainer.is_global_zero and trial_kind.is_remote(self._trial):
            self._trial.should_prune()  # as rank 0: the ranks of an objective must ask the same
        self._reports.append((payload, step))
        if kind == "prune":
            self._stop(trainer, step)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != TrainerFn.FITTING or not self._active:
            return
        self._put_back(trainer)
        if fits_in_children(trainer):
            news = _arrived, (self._name, self._reports, self._pruned_at)
            trainer.state = LastWord(trainer.state, self._leave, news)
        elif trial_kind.is_of_study(self._trial):
            trainer.state = LastWord(trainer.state, self._end)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._put_back(trainer)
        if isinstance(trainer.state, LastWord):
            trainer.state.cancel()

    def state_dict(self) -> dict[str, Any]:
        # Lightning skips the validation that follows the step of a checkpoint when it goes on from that.
        return {"validations": self._validations + self._due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]

    def _own_trial(self) -> Any:
        trial = trial_kind.current() if self._given is None else self._given
        return None if trial_kind.is_replayed(trial) else trial

    def _decide(self, metrics: Mapping[str, Any], step: int) -> tuple[str, Any]:
        """``("prune" or "go on", value)``, or ``("error", exception)``: what is raised on one rank alone leaves the
        others waiting."""
        try:
            if self.monitor not in metrics:
                raise ValueError(_no_metric(self.monitor, list(metrics)))
            value = float(metrics[self.monitor])
            _report(self._trial, value, step)
            return ("prune" if self._trial.should_prune() else "go on"), value
        except NotImplementedError:
            return "error", ValueError(trial_kind.several_objectives(self._trial))
        except Exception as error:
            return "error", _portable(error)

    def _stop(self, trainer: pl.Trainer, step: int) -> None:
        self._pruned_at = step
        loop = trainer.fit_loop
        self._least = loop.min_epochs, loop.epoch_loop.min_steps
        loop.min_epochs, loop.epoch_loop.min_steps = None, None  # with them Lightning would go on
        trainer.should_stop = True
        if trial_kind.is_remote(self._trial):
            self._trial.note_pruned(step)

    def _put_back(self, trainer: pl.Trainer) -> None:
        if self._least is not None:
            trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = self._least
            self._least = None

    def _end(self, state: LastWord) -> None:
        if self._pruned_at is not None:
            _raise_pruned(self._pruned_at)

    def _leave(self, state: LastWord) -> None:
        if self._pruned_at is not None:
            state.fn = None  # weights that nobody will ask for need not be written for the other process

    def take(self, reports: Sequence[tuple[float, int]], pruned_at: int | None) -> None:
        """What the ranks that this process has started did with its trial.

        Raises:
            optuna.TrialPruned: they stopped, and the study is in this process.
        """
        trial = self._own_trial()
        if trial_kind.is_remote(trial):
            if pruned_at is not None:
                trial.note_pruned(pruned_at)
            return
        known = next(t.intermediate_values for t in trial.study.get_trials(deepcopy=False) if t.number == trial.number)
        for value, step in reports:
            if step not in known:  # a storage in memory: what a child wrote is in the child
                _report(trial, value, step)
                trial.should_prune()  # for what a pruner notes of a trial
        if pruned_at is not None:
            _raise_pruned(pruned_at)


# The callbacks of this process: their copies in the ranks that it has started send back what they did.
_here: WeakValueDictionary[str, OptunaPruning] = WeakValueDictionary()


def _arrived(name: str, reports: Sequence[tuple[float, int]], pruned_at: int | None) -> None:
    if (callback := _here.get(name)) is not None:
        callback.take(reports, pruned_at)


def _report(trial: Any, value: float, step: int) -> None:
    with warnings.catch_warnings():  # a fit of the same trial once more says again what is known
        warnings.filterwarnings("ignore", "The reported value is ignored because this `step`")
        trial.report(value, step)


def _raise_pruned(step: int) -> NoReturn:
    from optuna import TrialPruned

    raise TrialPruned(f"Pruned at step {step}.")


def _portable(error: Exception) -> Exception:
    """``error``, or another with its words where it can't be sent to other ranks."""
    with suppress(Exception):
        copy = pickle.loads(pickle.dumps(error))  # made here
        if (type(copy), str(copy)) == (type(error), str(error)):
            return error
    other = RuntimeError(f"{type(error).__name__}: {error}")
    other.__cause__ = error
    return other


def _no_metric(monitor: str, names: list[str]) -> str:
    near = difflib.get_close_matches(monitor, names, 1, 0.3)
    there = f"there are {', '.join(sorted(names)[:SHOWN])}" if names else "no metric is there at all"
    write = f"write monitor={near[0]!r}" if near else f"log it in validation_step by self.log({monitor!r}, ...)"
    return f"OptunaPruning: monitor={monitor!r} has no value after validation; {there}. Perhaps {write}"
