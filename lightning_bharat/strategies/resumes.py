"""What a run must find in a checkpoint to go on as if it had not been stopped, beyond weights and optimizer states."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.trainer.states import TrainerFn

from lightning_bharat.checkpoints.directory import local_path
from lightning_bharat.checkpoints.errors import together
from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.checkpoints.stored import is_checkpoint
from lightning_bharat.strategies import _lightning_loops, _lightning_resume, accumulated
from lightning_bharat.strategies.callbacks import resume_callbacks
from lightning_bharat.strategies.checkpoint import ShardedCheckpoints
from lightning_bharat.strategies.connection import ConnectedStrategy
from lightning_bharat.strategies.ends_together import EndsTogether
from lightning_bharat.strategies.first_loss import FirstLoss
from lightning_bharat.strategies.global_batch import KeepsBatch
from lightning_bharat.strategies.goes_on import GoesOn
from lightning_bharat.strategies.loaders import TogetherLoaders
from lightning_bharat.strategies.placed import begin_epoch
from lightning_bharat.strategies.relayout import ChangesLayout
from lightning_bharat.strategies.unfinished import Unfinished

if TYPE_CHECKING:
    from lightning_bharat.strategies.token_weights import TokenWeights


class ResumesRuns(EndsTogether, ChangesLayout, KeepsBatch, ShardedCheckpoints, TogetherLoaders, ConnectedStrategy):
    """Its checkpoints have that too: values of an epoch that is not over,
    gradients of a window that is not, places in the order of the data, and the loss by which a run is known again."""

    _tokens: TokenWeights | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unfinished, self._first_loss = Unfinished(), FirstLoss()
        self._accumulated: dict[str, Any] | None = None  # gradients that the run goes on with

    def follow_loops(self) -> None:
        """In the setup of a fit."""
        GoesOn(self._module().trainer, self.random_states, self._unfinished, self.root_device)

    def to_go_on(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        module = self._module()
        if _lightning_resume.in_validation(module.trainer):
            checkpoint = _lightning_resume.before_validation(module.trainer, checkpoint)
        checkpoint = super().to_go_on(checkpoint)
        if module.trainer.state.fn == TrainerFn.FITTING:
            checkpoint = self._unfinished.with_state(checkpoint, module.trainer, self.layout)
        if not _lightning_loops.in_window(module.trainer):
            return checkpoint
        if refused := self._without_gradients():
            return {**checkpoint, accumulated.GRADIENTS: {"refused": refused}}
        found = accumulated.of_window(module, self.slices, self.layout, self.global_rank)
        return {**checkpoint, accumulated.GRADIENTS: found}

    def _without_gradients(self) -> str:
        """Why those of a window that has begun are not in checkpoints; "" if they are."""
        if self.layout.pipeline > 1:
            return "stages of a pipeline have others"
        if self._tokens is not None:
            return "token_weighted=True weighs them with the next ones"
        return "" if self.save_distributed_checkpoint else "a plain .ckpt has none"

    def facts(self, path: Path) -> dict[str, Any]:
        found, first = super().facts(path), self._first_loss
        found |= {"parent": first.newest, "samples": self._samples()}
        found["loss"] = None if first.last is None else float(first.last)
        if self._left is None:
            first.save(found["id"], path)
        return found

    def _samples(self) -> int | None:
        """That all data ranks have trained on, since the first step and with the batches of now."""
        sizes = [batches["size"] for batches in self.batches()]
        if len(sizes) != 1 or sizes[0] is None or self.batches_in_tokens():
            return None
        return _lightning_loops.trained_batches(self._module().trainer) * sizes[0] * self.layout.data

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        path = local_path(checkpoint_path)
        if self.is_global_zero and is_checkpoint(path):
            self._first_loss.read(path, Manifest.read(path), self.layout)
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        resume_callbacks(self._module(), self.optimizers)
        super().load_optimizer_state_dict(checkpoint)
        self._accumulated = checkpoint.get(accumulated.GRADIENTS)
        accumulated.refuse(self._accumulated)
        if self._left is None:  # else Lightning keeps it
            self._unfinished.read(checkpoint, self.layout, self.global_rank)
        _lightning_resume.leave_finished_epoch(self._module().trainer)
        _lightning_resume.load_positions(self._module().trainer, begin_epoch)
        self.go_on()

    def on_train_start(self) -> None:
        super().on_train_start()
        self.random_states.run_starts(self.root_device)
        self._unfinished.run_starts(self._module().trainer)
        if self._accumulated is not None:  # not before: Lightning clears gradients when a run begins
            saved, self._accumulated = self._accumulated, None
            take_up = partial(accumulated.take_up, saved, self._module(), self.slices, self.layout, self.global_rank)
            together(take_up)

    def batch_trained(self, out: Any) -> None:
        """A batch was trained on, and ``out`` is what the step has returned."""
        if self.is_global_zero:
            trainer = self._module().trainer
            self._first_loss.step(out, trainer.global_step, Path(trainer.default_root_dir))
