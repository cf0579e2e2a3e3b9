"""``strategy="bharat_deepspeed"``: Lightning's DeepSpeedStrategy on every accelerator, with one process's steps."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies import DeepSpeedStrategy as LightningsStrategy
from torch import Tensor
from torch.optim import Optimizer

from lightning_bharat.checkpoints import directory
from lightning_bharat.checkpoints.document import as_plain
from lightning_bharat.checkpoints.errors import CheckpointError, together
from lightning_bharat.checkpoints.opened import content_of
from lightning_bharat.checkpoints.positions import take_position, with_positions
from lightning_bharat.checkpoints.told import gathered
from lightning_bharat.plan.layout import Layout
from lightning_bharat.strategies import _deepspeed, _lightning_deepspeed, _lightning_loops, deepspeed_state
from lightning_bharat.strategies.deepspeed_config import DeepSpeedConfig
from lightning_bharat.strategies.ends_together import EndsTogether


class DeepSpeedStrategy(EndsTogether, LightningsStrategy):
    """DeepSpeed's ZeRO on data ranks: optimizer states (stage 1), gradients too (2) and parameters too (3) divided.

    Other than Lightning's own it runs on the CPU (over gloo, without a compiler), takes the steps that one process
    takes with accumulated batches, refuses a config that contradicts the Trainer, and ends all ranks when one fails.

    Args:
        stage: of ZeRO, 0 to 3; ``None``: what ``config`` says, else 2.
        config: DeepSpeed's, a dict or the path of a JSON file. What it leaves out comes from the arguments and the
            Trainer; ``"auto"`` stands for the same.
        arguments: the others of Lightning's strategy, such as ``offload_optimizer`` and ``offload_parameters``.

    Raises:
        ModuleNotFoundError: DeepSpeed is not installed.
        ConfigError: the config and the arguments say two things.
        TypeError: an argument that there is not; names the nearest.
    """

    strategy_name = "bharat_deepspeed"

    def __init__(
        self,
        stage: int | None = None,
        config: str | os.PathLike | Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        _deepspeed.deepspeed()
        self._settings = DeepSpeedConfig(stage, config, arguments)
        # Those that have become a part of the config are not looked at again. The command line reads names from here.
        super().__init__(config=self._settings.values, **arguments)

    # ---- setting up

    def setup_environment(self) -> None:
        _deepspeed.use_device(self.root_device)
        _deepspeed.use_no_compiler()
        DDPStrategy.setup_environment(self)  # Lightning's DeepSpeedStrategy asks for CUDA here
        self.watch_errors()

    def setup_distributed(self) -> None:
        _lightning_deepspeed.meet_by_deepspeed(self)

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        trained = [p for p in model.parameters() if p.requires_grad]
        return _deepspeed.engine(
            model=model,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            model_parameters=trained,
            config=self.config,
        )

    def _initialize_deepspeed_inference(self, model: Any) -> None:
        self.model, _ = _deepspeed.engine(
            model=model, optimizer=None, lr_scheduler=None, model_parameters=[], config=self._settings.for_inference()
        )

    def _format_config(self) -> None:
        precision = self.precision_plugin.precision
        self._settings.complete(self._module().trainer, self.world_size, precision)
        _lightning_deepspeed.add_precision(self._settings.values, precision, self)

    def _init_config_if_needed(self) -> None:
        self._format_config()  # each run has a Trainer of its own

    # ---- steps

    @property
    def handles_gradient_accumulation(self) -> bool:
        """DeepSpeed is told when to step, by Lightning's loop: also after the last batch of an epoch."""
        return False

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module()
        if module.automatic_optimization:
            self.deepspeed_engine.set_gradient_accumulation_boundary(not _lightning_loops.accumulates(module.trainer))
        return super().training_step(*args, **kwargs)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Nothing to do: an engine that is at no boundary exchanges what its stage needs and no more."""
        yield

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        # The loop has divided the loss by the accumulated batches already.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    # ---- checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: DeepSpeed's engine writes the weights."""
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: DeepSpeed's engine writes it."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write DeepSpeed's directory to ``filepath`` (rank 0's counts), which appears when it is whole. All ranks must
        call it.

        Raises:
            CheckpointError: on every rank: the disk, or an object that couldn't be read back, by its key.
        """
        if storage_options is not None:
            raise CheckpointError(f"storage_options={storage_options!r}: checkpoints are written to file systems only")
        path = directory.local_path(self.broadcast(filepath))
        rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        rest = gathered(with_positions(rest, Layout(data=self.world_size)))
        rest = together(lambda: as_plain(rest))
        with directory.new_directory(path) as staging:
            super().save_checkpoint(rest, staging)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Open a checkpoint of DeepSpeed, of ``bharat_hybrid``, or a plain ``.ckpt``. All ranks must call it.

        Raises:
            CheckpointError: on every rank: missing, damaged, or not safe to read (``weights_only=False`` is refused).
        """
        if weights_only is False:
            raise CheckpointError("weights_only=False runs code from the checkpoint; leave it out")
        path = directory.local_path(self.broadcast(checkpoint_path))
        checkpoint = together(lambda: content_of(path))
        take_position(checkpoint, Layout(data=self.world_size), self.global_rank)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give the engine the weights, by full names. All ranks must call it."""
        optimizer = self.optimizers[0] if self.optimizers else None
        deepspeed_state.fill_weights(self._module(), optimizer, checkpoint["state_dict"], strict)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands over what :meth:`load_checkpoint` has opened."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give the engine the optimizer's state, by full names. All ranks must call it.

        Raises:
            CheckpointError: on every rank: another number of optimizers than one, other groups, parameters or shapes.
        """
        saved = checkpoint["optimizer_states"]
        if len(saved) != 1:
            raise CheckpointError(f"the checkpoint has {len(saved)} optimizers, and DeepSpeed steps one")
        deepspeed_state.fill_optimizer(self._module(), self.optimizers[0], saved[0])

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint; a process killed meanwhile leaves no half one."""
        if self.is_global_zero:
            directory.remove(directory.local_path(filepath))

    def _module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def __repr__(self) -> str:
        return f"DeepSpeedStrategy(stage={self._settings.stage})"
