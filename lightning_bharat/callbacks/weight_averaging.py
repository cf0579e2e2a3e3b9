"""Averaged weights for validation and at the end of training, also where the weights are cut over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim.swa_utils import get_ema_avg_fn

from lightning_bharat.callbacks.averages import Averages, Many, One
from lightning_bharat.checkpoints.weights import first_names
from lightning_bharat.strategies.checkpoint import ShardedCheckpoints


class WeightAveraging(Callback):
    """Keeps a running average of the weights, validates with it, and leaves it in the module when training ends.

    A drop-in for Lightning's callback of that name, which averages a copy of the whole module: here each rank averages
    the pieces that it holds, under ``bharat_hybrid``, on one process and under DDP. Checkpoints have the same form as
    Lightning's: ``state_dict`` are the averages, and ``current_model_state`` the weights that train on. They are
    resumed on any layout, and by Lightning's own callback on one process.

    Different on purpose: as long as nothing has been averaged, validation and the end of training use the weights as
    they are (Lightning's puts the *initial* weights in their place). Buffers that are not floating point take the
    current value, and elements that never change stay as they are (Lightning's turns a mask's infinities into NaN). A
    checkpoint that is saved while the averages are in the module has both the right way round.

    Args:
        device: where to keep the averages, for example ``"cpu"``; ``None``: where the weights are.
        use_buffers: average floating-point buffers as well; ``False`` copies them.
        avg_fn: (average, weight, number of weights averaged) -> new average. It sees pieces of tensors, so it must work
            element by element. ``None``: each of the weights counts the same (stochastic weight averaging).
        multi_avg_fn: the same for lists of tensors, whose averages it changes in place.

    Raises:
        ValueError: ``avg_fn`` and ``multi_avg_fn`` are both given.
        MisconfigurationException: under a strategy of Lightning's that cuts modules in its own way.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        avg_fn: One | None = None,
        multi_avg_fn: Many | None = None,
    ) -> None:
        if avg_fn is not None and multi_avg_fn is not None:
            raise ValueError("avg_fn and multi_avg_fn are both given; leave one of them out")
        self.device = None if device is None else torch.device(device)
        self.use_buffers, self.avg_fn, self.multi_avg_fn = use_buffers, avg_fn, multi_avg_fn
        self._averages: Averages | None = None
        self._updated_at_step, self._updated_at_epoch = 0, -1

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to take in the weights; asked after each optimizer step and each epoch. Override it to choose.

        Args:
            step_idx: of the optimizer step that has just been done, from 0; ``None`` at the end of an epoch.
            epoch_idx: of the epoch that ends, from 0; ``None`` after a step.
        """
        return step_idx is not None

    # ---- training

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
            raise MisconfigurationException(
                f"{type(self).__name__} does not know how {type(trainer.strategy).__name__} cuts a module; "
                'write strategy="bharat_hybrid" or "ddp"'
            )
        if stage == "fit":
            self._averages = None
            self._updated_at_step, self._updated_at_epoch = trainer.global_step, -1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._averages is not None:  # loaded before the strategy moved and converted the module
            self._averages.follow(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step > self._updated_at_step and self.should_update(step_idx=step - 1):
            self._update(pl_module)
            self._updated_at_step = step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch
        if epoch > self._updated_at_epoch and self.should_update(epoch_idx=epoch):
            self._update(pl_module)
            self._updated_at_epoch = epoch

    def _update(self, module: pl.LightningModule) -> None:
        if self._averages is None:
            self._averages = Averages(module, self.device)
        else:
            self._averages.update(module, self.avg_fn, self.multi_avg_fn, self.use_buffers)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show_averages(pl_module)

    # ---- validation within training (what is evaluated later, or from a checkpoint, has the averages as its weights)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._show_averages(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self._averages is not None and self._averages.exchanged:
            self._averages.exchange(pl_module)

    def _show_averages(self, module: pl.LightningModule) -> None:
        if self._averages is not None and not self._averages.exchanged:
            self._averages.exchange(module)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {"latest_update_step": self._updated_at_step, "latest_update_epoch": self._updated_at_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._updated_at_step = state_dict["latest_update_step"]
        self._updated_at_epoch = state_dict.get("latest_update_epoch", -1)  # Lightning's callback does not save it

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the averages into ``state_dict`` and the weights that train into ``current_model_state``."""
        if self._averages is None:
            return
        shown, kept = checkpoint["state_dict"], _in_checkpoint(trainer, self._averages.tensors)
        averaged, current = (shown, kept) if self._averages.exchanged else (kept, shown)
        checkpoint |= {
            "state_dict": averaged,
            "current_model_state": current,
            "averaging_state": {"n_averaged": torch.tensor(self._averages.count)},
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The module has the averages by now, from ``state_dict``: keep them, and load the weights that train."""
        self._averages = None
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if "current_model_state" not in checkpoint:
            rank_zero_info(f"The checkpoint has no averages: {type(self).__name__} begins with its weights")
            return
        if count := int(checkpoint["averaging_state"]["n_averaged"]):
            self._averages = Averages(pl_module, self.device, count)
        current = {"state_dict": checkpoint["current_model_state"]}
        trainer.strategy.load_model_state_dict(current, strict=pl_module.strict_loading)


class EMAWeightAveraging(WeightAveraging):
    """Exponential moving average of the weights: ``decay`` × average + (1 - ``decay``) × weights.

    Args:
        device, use_buffers: as in :class:`WeightAveraging`.
        decay: share of the old average that stays at each update, from 0 to 1.
        update_every_n_steps: update after each optimizer step whose index (from 0) it divides.
        update_starting_at_step: index of the first step to update after; ``None``: from the start.
        update_starting_at_epoch: also update at the end of each epoch from this one on; ``None``: never.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
    ) -> None:
        super().__init__(device, use_buffers, avg_fn=get_ema_avg_fn(decay))
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if step_idx is not None:
            begun = self.update_starting_at_step is None or step_idx >= self.update_starting_at_step
            return begun and self.update_every_n_steps > 0 and step_idx % self.update_every_n_steps == 0
        start = self.update_starting_at_epoch
        return epoch_idx is not None and start is not None and epoch_idx >= start


def _in_checkpoint(trainer: pl.Trainer, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The module's state with ``tensors`` in the place of its own, as the strategy puts a state into a checkpoint."""
    module, strategy = trainer.lightning_module, trainer.strategy
    firsts = first_names(module)
    state = {name: tensors.get(firsts.get(name, name), value) for name, value in module.state_dict().items()}
    return strategy.in_checkpoint(state) if isinstance(strategy, ShardedCheckpoints) else state
