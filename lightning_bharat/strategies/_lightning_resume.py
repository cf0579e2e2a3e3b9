"""Private names of Lightning in a run that goes on: its checkpoint, and its next batch, epoch and validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_bharat.checkpoints.fetched import on_disk
from lightning_bharat.strategies._lightning_loops import around, training_loaders
from lightning_bharat.strategies._model_checkpoint import OpenModelCheckpoint


def keep_ckpt_path(trainer: pl.Trainer) -> None:
    """Let :func:`ckpt_path` know which checkpoint ``trainer`` goes on from, as soon as it has chosen one. ``"best"``
    may be one of an earlier process, and is none where training begins."""
    connector: Any = trainer._checkpoint_connector
    if "chosen" in vars(connector):
        return
    connector.chosen, choose = None, connector._select_ckpt_path

    def chosen(state_fn: TrainerFn, path: Any, *args: Any, **kwargs: Any) -> Any:
        callback = trainer.checkpoint_callback
        if path == "best" and isinstance(callback, OpenModelCheckpoint) and not callback.best_model_path:
            callback.find_best(trainer)
            if state_fn == TrainerFn.FITTING and not callback.best_model_path:
                rank_zero_warn('ckpt_path="best", and there is no best checkpoint yet: training begins anew')
                path = None
        connector.chosen = on_disk(choose(state_fn, path, *args, **kwargs), trainer.default_root_dir)
        return connector.chosen

    connector._select_ckpt_path = chosen


def ckpt_path(trainer: pl.Trainer) -> Any:
    """The checkpoint that will be read, as the strategy's setup may ask; ``trainer.ckpt_path`` is known later."""
    return getattr(trainer._checkpoint_connector, "chosen", None)


def follow_loops(trainer: pl.Trainer, follower: Any) -> None:
    """Call the methods of ``follower``, a :class:`~lightning_bharat.strategies.goes_on.GoesOn`, at what they name."""
    loop: Any = trainer.fit_loop
    epoch, validation = loop.epoch_loop, loop.epoch_loop.val_loop
    around(loop, "setup_data", after=follower.loaders_made, what="resume")
    around(loop, "on_advance_end", after=follower.epoch_ended, what="resume")

    def begun() -> None:
        batches = epoch.batch_progress.current.ready
        follower.epoch_begins(batches)
        if batches > 0:
            # Plateau schedulers see what was logged before, and what this epoch logs.
            loop._restarting = False

    def again() -> None:
        """A validation that was stopped is run from its first batch on."""
        total: Any = validation.batch_progress.total
        if validation.restarting:
            total.ready = total.started = total.processed = total.completed

    around(epoch, "on_run_start", after=begun, what="resume")
    around(validation, "reset", before=follower.validation_begins, after=again, what="resume")


def in_validation(trainer: pl.Trainer) -> bool:
    """Whether a validation in the middle of training has begun and not come to its last batch's end."""
    progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    finished = progress.is_last_batch and progress.current.completed == progress.current.ready
    return trainer.state.fn == TrainerFn.FITTING and trainer.validating and not finished


def before_validation(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Lightning's dict, saved :func:`in_validation`, such that this is run again from its first batch on.

    Lightning goes on behind the batch that it had come to, without what was logged before, and may count the one that
    follows as the last (its issue 19549).
    """
    progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    total: Any = progress.total
    before = total.completed - progress.current.completed
    # So one says that it is in the middle: one batch has been started more than were processed.
    middle = {"ready": before + 1, "started": before + 1, "processed": before, "completed": before}
    none = dict.fromkeys(middle, 0)
    key = "epoch_loop.val_loop.batch_progress"
    of_fit = {**checkpoint["loops"]["fit_loop"], key: {"total": middle, "current": none, "is_last_batch": False}}
    return {**checkpoint, "loops": {**checkpoint["loops"], "fit_loop": of_fit}}


def leave_finished_epoch(trainer: pl.Trainer) -> None:
    """Begin with the next epoch where the one of a checkpoint was through, also in a run that counts steps: Lightning
    would go on in it, call the hooks of its end again and count it twice. After the loops have read their state."""
    loop: Any = trainer.fit_loop
    now = loop.epoch_progress.current
    if loop.restarting and now.ready == now.started == now.processed and loop.epoch_loop.batch_progress.is_last_batch:
        loop._restarting = loop.epoch_loop.restarting = False


def load_positions(trainer: pl.Trainer, begin_epoch: Callable[[Any, int], None]) -> None:
    """Let training loaders that were made before the checkpoint was read (for ``trainer.estimated_stepping_batches``)
    know their epoch, by ``begin_epoch``, and read their positions, too. After the loops have read their state."""
    loop: Any = trainer.fit_loop
    if loop._data_fetcher is not None and loop._combined_loader_states_to_load:
        for loader in training_loaders(trainer):
            begin_epoch(loader, loop.epoch_progress.current.processed)
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)


def end_epoch(trainer: pl.Trainer) -> None:
    """Let plateau schedulers see the end of the epoch, where the checkpoint was written in its last hook: Lightning
    goes on with the next epoch, though they come after the hook."""
    loop = trainer.fit_loop
    if not (loop.restarted_on_epoch_end or loop.resumed_on_epoch_end):
        return
    looked_at = [config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    if looked_at and all(name in trainer.callback_metrics for name in looked_at):
        loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)


class LeftRun:
    """A run of ``fit`` that is left in the middle of an epoch, to go on from a checkpoint in the same process: what
    Lightning begins anew with each run is kept.

    Leaving ends the workers of its loaders, and Lightning's signal handlers.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        connector: Any = trainer._logger_connector
        self._connector = {
            name: getattr(connector, name)
            for name in (
                *("_callback_metrics", "_logged_metrics", "_progress_bar_metrics"),
                *("_first_loop_iter", "_current_fx"),
            )
        }
        self._logs_hparams, trainer.enable_autolog_hparams = trainer.enable_autolog_hparams, False  # they are logged
        trainer.fit_loop.teardown()
        trainer._signal_connector.teardown()
        loop: Any = trainer.fit_loop.epoch_loop
        self._results, loop._results = loop._results, type(loop._results)(training=True)

    def put_back(self, trainer: pl.Trainer) -> None:
        """After Lightning has cleared its own."""
        vars(trainer._logger_connector).update(self._connector)
        trainer.fit_loop.epoch_loop._results = self._results

    def go_on(self, trainer: pl.Trainer) -> None:
        """After the loops have read their state: let them go on with the next batch, as if they had not been left."""
        trainer.enable_autolog_hparams = self._logs_hparams
        made = trainer.fit_loop.epoch_loop

        def begun() -> None:
            # What Lightning does with the first batch of a run that was stopped has been done.
            made.restarting = False
            made.__dict__["bharat_around"]["on_run_start"].pop("restart")

        around(made, "on_run_start", after=begun, what="restart")
