"""Another layout in the middle of a run: all ranks stop behind a batch, and go on cut in another way.

What happens is a resume, without an end of the processes and of ``trainer.fit``: a checkpoint is written, the cut is
taken out of the module, and Lightning's own way from a checkpoint to the next batch is gone once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_bharat.checkpoints import stored
from lightning_bharat.checkpoints.directory import local_path
from lightning_bharat.checkpoints.stored import StoredTensor
from lightning_bharat.checkpoints.weights import LikeWeights
from lightning_bharat.plan.layout import Layout, LayoutError
from lightning_bharat.strategies import (
    _lightning_logged,
    _lightning_loops,
    _lightning_resume,
    already_cut,
    metric_states,
)
from lightning_bharat.strategies.ends_together import GoOn
from lightning_bharat.strategies.options import Options, sizes
from lightning_bharat.strategies.precision import forget_module
from lightning_bharat.strategies.preparation import Preparation
from lightning_bharat.strategies.scheduled_steps import ScheduledSteps

if TYPE_CHECKING:
    from lightning_bharat.strategies.global_batch import KeepsBatch as _Base
else:
    _Base = object

LEFT_OUT = "lightning_bharat_left_out"  # weights that hooks of the module keep out of its checkpoints


class ChangesLayout(_Base):
    """Mixed into a strategy whose module is cut by a :class:`Preparation`, before what writes its checkpoints."""

    options: Options
    save_distributed_checkpoint: bool
    _prepared: Preparation | None = None
    _pipeline: ScheduledSteps | None = None
    _wanted: Layout | None = None
    _left: _Left | None = None
    _steps = 0

    def relayout(self, layout: Layout) -> None:
        """Go on in another layout of the same ranks after the running step. All ranks must call it, in ``trainer.fit``,
        for instance in a callback's ``on_train_batch_end``.

        The change is made when the batch is through with all that belongs to it: its optimizer step (so with the last
        batch of an accumulation), hooks, validation. The last batch of an epoch is followed by another one first.

        Losses, weights and the states of optimizers, schedulers, loops, scaler and callbacks go on as without it; so do
        the order of the data and the global batch. The module stays the object that it is. Hooks are called as for a
        run that is resumed: ``setup``, ``configure_model``, ``configure_optimizers``, ``on_fit_start``,
        ``on_load_checkpoint``, ``on_train_start`` again.

        Args:
            layout: data × tensor × pipeline × context of it are this run's ranks. The one that there is already cuts
                the stages of a pipeline anew, by what they were measured to take.

        Raises:
            LayoutError: on all ranks, which go on in the old layout if the caller catches it: nothing was changed.
        """
        told: list[Any] = [layout]
        if dist.is_initialized():
            told = [None] * self.world_size
            dist.all_gather_object(told, layout)
        problem = _refused_by(self, layout) or (
            f"ranks ask for {' and '.join(sorted(set(map(str, told))))}; all must ask for one layout"
            if len(set(told)) > 1
            else ""
        )
        if problem:
            raise LayoutError(f"relayout({layout}): {problem}")
        self._wanted = layout if layout != self.layout or layout.pipeline > 1 else None

    def watch_steps(self) -> None:
        """Look after each batch whether to change."""
        trainer = self._current_trainer()
        self._steps, self._wanted = trainer.global_step, None  # a run before may have ended with a wish
        _lightning_loops.after_each_batch(trainer, self._batch_ended)

    def _batch_ended(self) -> None:
        trainer = self._current_trainer()
        stepped = trainer.global_step != self._steps
        self._steps = trainer.global_step
        if self._wanted is not None and stepped and not _ends(trainer):
            self._leave(self._wanted)

    def _leave(self, layout: Layout) -> None:
        trainer = self._current_trainer()
        path = local_path(trainer.default_root_dir) / f"relayout-step={trainer.global_step}.ckpt"
        form, self.save_distributed_checkpoint = self.save_distributed_checkpoint, True
        self._left = _Left(self.broadcast(path), layout, form, metric_states.save_all(trainer.lightning_module))
        _lightning_logged.share_logged(trainer, self.layout.data, layout.data)
        trainer.save_checkpoint(path)
        raise GoOn(str(self._left.path), self._undo)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if self._left is not None and self._left.run is None:
            whole: Mapping[str, Any] = self.lightning_module_state_dict()
            out = {name: value for name, value in whole.items() if name not in checkpoint["state_dict"]}
            checkpoint = {**checkpoint, LEFT_OUT: LikeWeights(out)}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _undo(self) -> None:
        """The module is whole again, without weights, and this strategy as before its first setup."""
        left, trainer, prepared = self._left, self._current_trainer(), self._prepared
        assert left is not None and prepared is not None
        self.save_distributed_checkpoint = left.form
        left.run = _lightning_resume.LeftRun(trainer)
        self.optimizers, self.lr_scheduler_configs = [], []
        if self._pipeline is not None:
            self._pipeline.pipeline.metrics.release()
        already_cut.forget(prepared.module)
        prepared.undo()
        self._prepared = self._pipeline = self._wanted = None
        forget_module(self.precision_plugin)
        self.choices = {}
        self.options = replace(self.options, **sizes(left.layout))
        self._layout = None
        rank_zero_info(f"Going on in {left.layout} after step {trainer.global_step}.")

    @property
    def first_weights(self) -> Any:
        """Where the module's weights begin, as the option ``weights`` says it."""
        if self._left is None:
            return self.options.weights
        checkpoint = stored.Checkpoint(self._left.path).load()
        both = {**checkpoint["state_dict"], **checkpoint[LEFT_OUT]}
        assert self.lightning_module is not None
        known = self.lightning_module.state_dict().keys()
        return {name: value for name, value in both.items() if name in known and isinstance(value, StoredTensor)}

    @contextmanager
    def changing(self) -> Iterator[None]:
        """In here the module is cut; what is found then is against the layout, and the checkpoint stays.

        Raises:
            LayoutError: on all ranks, in place of a refusal.
        """
        try:
            yield
        except ValueError as error:
            if self._left is None:
                raise
            raise LayoutError(
                f"relayout({self._left.layout}): {error}. The run can go on from where it was left, in another layout: "
                f"ckpt_path={str(self._left.path)!r}"
            ) from error

    def keep_run(self) -> None:
        """In the setup of a run that goes on: what Lightning has just begun anew is as it was."""
        if self._left is not None and self._left.run is not None:
            self._left.run.put_back(self._current_trainer())

    def go_on(self) -> None:
        """The loops have read their state."""
        if self._left is not None and self._left.run is not None:
            self._left.run.go_on(self._current_trainer())

    def on_train_start(self) -> None:
        super().on_train_start()
        if self._left is not None:
            left, self._left = self._left, None
            left.metrics_as_before()
            self.barrier()
            self.remove_checkpoint(left.path)

    def _current_trainer(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module.trainer


class _Left:
    """A run that is going on in another layout.

    Attributes:
        path: the checkpoint it goes on from.
        form: of the checkpoints that the run itself writes.
        run: what Lightning would begin anew.
        metrics_as_before: lets checkpoints have the states of metrics that they had.
    """

    run: _lightning_resume.LeftRun | None = None

    def __init__(self, path: Path, layout: Layout, form: bool, metrics_as_before: Callable[[], None]) -> None:
        self.path, self.layout, self.form = path, layout, form
        self.metrics_as_before = metrics_as_before


def _ends(trainer: Any) -> bool:
    """Whether no batch of this epoch follows."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    last = progress.is_last_batch or progress.current.ready >= trainer.num_training_batches
    return last or trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step


def _fits(trainer: Any) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and trainer.state.status == TrainerStatus.RUNNING


def _refused_by(strategy: ChangesLayout, layout: Layout) -> str:
    """Why ``layout`` can't be; "" if nothing is against it."""
    module, prepared = strategy.lightning_module, strategy._prepared
    if prepared is None or module is None or not _fits(module.trainer):
        return "there is no run of trainer.fit; write the sizes in HybridStrategy(...)"
    if layout.devices != strategy.world_size:
        return (
            f"it needs {layout.devices} ranks, and this run has {strategy.world_size}; write sizes whose product is "
            f"{strategy.world_size}, or end the run and resume it on {layout.devices} ranks"
        )
    if prepared.plan is None:
        return "configure_model has cut the module itself; leave the cuts to the strategy, or resume a run that it cut"
    if layout.pipeline > 1 and not module.automatic_optimization:
        return "the module optimizes by hand, which needs pipeline=1"
    if module.trainer.num_training_batches == 1:
        return "an epoch of one batch has no place inside where to change; end the run and resume it in the new layout"
    try:
        options = replace(strategy.options, **sizes(layout))
        options.layout(layout.devices, layout.devices, module, strategy.root_device, {})
        layout.check(prepared.plan)
    except ValueError as error:
        return str(error)
    return strategy.batches_refused(layout)
