"""The batches of one optimizer step, run once more through the strategy, with nothing changed after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torchmetrics import Metric

from lightning_bharat.health import random_state
from lightning_bharat.strategies.again import again


class Kept(NamedTuple):
    """A batch of the window.

    Attributes:
        arguments: of the training step.
        states: of random generators before it.
        number: of the batch in the whole run; under a pipeline its random numbers depend on it.
    """

    arguments: tuple[Any, ...]
    states: tuple[Any, ...]
    number: int


class Replay:
    """Runs the training step and its backward pass again. All ranks must do it together.

    What a person's step changes besides its module's buffers and metrics (counters, lists) is changed once more.
    """

    def __init__(self, trainer: pl.Trainer, optimizer: Any) -> None:
        self.trainer, self._module, self._optimizer = trainer, trainer.lightning_module, optimizer
        self._device = trainer.strategy.root_device

    @contextmanager
    def run(self, window: list[Kept]) -> Iterator[list[Tensor]]:
        """Losses of the window's batches; gradients are in the parameters while the caller looks at them."""
        strategy, parameters = self.trainer.strategy, list(self._parameters())
        total = self.trainer.fit_loop.epoch_loop.batch_progress.total
        number = total.ready
        earlier = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            with random_state.unmoved(self._device), self._unchanged(), again(strategy, len(window)):
                losses = []
                for i, kept in enumerate(window):
                    random_state.put(kept.states, self._device)
                    total.ready = kept.number
                    blocks = isinstance(strategy, ParallelStrategy) and i < len(window) - 1
                    with strategy.block_backward_sync() if blocks else nullcontext():  # type: ignore[attr-defined]
                        losses.append(self._step(kept))
                yield losses
        finally:
            total.ready = number
            for parameter, gradient in zip(parameters, earlier, strict=True):
                parameter.grad = gradient

    def _step(self, kept: Kept) -> Tensor:
        strategy = self.trainer.strategy
        with torch.enable_grad():
            out = strategy.training_step(*kept.arguments)
            loss: Any = out["loss"] if isinstance(out, dict) else out
            if loss is None:
                return torch.zeros(())
            closure_loss = loss / self.trainer.accumulate_grad_batches
            strategy.backward(closure_loss, self._optimizer)
        return closure_loss.detach()

    def _parameters(self) -> Iterator[Tensor]:
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Buffers, metrics and logs are as before after it."""
        module = self._module
        buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
        metrics = [(m, {k: _copy(v) for k, v in m.metric_state.items()}) for m in _metrics(module)]
        module.__dict__["log"] = module.__dict__["log_dict"] = _nothing
        try:
            yield
        finally:
            del module.__dict__["log"], module.__dict__["log_dict"]
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            for metric, states in metrics:
                for name, state in states.items():
                    setattr(metric, name, state)


def _metrics(module: torch.nn.Module) -> list[Metric]:
    return [child for child in module.modules() if isinstance(child, Metric)]


def _copy(state: Any) -> Any:
    return [each.clone() for each in state] if isinstance(state, list) else state.clone()


def _nothing(*_: Any, **__: Any) -> None: ...
