"""``strategy="bharat_deepspeed"``: Lightning's DeepSpeedStrategy on every accelerator, with one process's steps."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies import DeepSpeedStrategy as LightningsStrategy
from torch import Tensor
from torch.optim import Optimizer

from lightning_bharat.strategies import _deepspeed, _lightning
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
        super().__init__(config=self._settings.values, **self._settings.others)

    # ---- setting up

    def setup_environment(self) -> None:
        _deepspeed.use_device(self.root_device)
        _deepspeed.use_no_compiler()
        DDPStrategy.setup_environment(self)  # Lightning's DeepSpeedStrategy asks for CUDA here
        self.watch_errors()

    def setup_distributed(self) -> None:
        _lightning.meet_by_deepspeed(self)

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
        module = self.lightning_module
        assert module is not None
        precision = self.precision_plugin.precision
        self._settings.complete(module, self.world_size, precision)
        _lightning.add_precision(self._settings.values, precision, self)

    def _init_config_if_needed(self) -> None:
        self._format_config()  # each run has a Trainer of its own

    # ---- steps

    @property
    def handles_gradient_accumulation(self) -> bool:
        """DeepSpeed is told when to step, by Lightning's loop: also after the last batch of an epoch."""
        return False

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        module = self.lightning_module
        assert module is not None
        if module.automatic_optimization:
            self.deepspeed_engine.set_gradient_accumulation_boundary(not _lightning.accumulates(module.trainer))
        return super().training_step(*args, **kwargs)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Nothing to do: an engine that is at no boundary exchanges what its stage needs and no more."""
        yield

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        # The loop has divided the loss by the accumulated batches already.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def __repr__(self) -> str:
        return f"DeepSpeedStrategy(stage={self._settings.stage})"
