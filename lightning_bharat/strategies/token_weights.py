"""Every valid label counts the same, on whatever rank and in whatever micro-batch it is.

Without this, data ranks and accumulated batches average means: a rank with few valid labels weighs as much as one with
many. :class:`TokenWeights` watches the one mean cross entropy of a training step, counts its valid labels and weighs
this rank's loss by them, such that after each backward pass the gradients are the mean over all labels of all data
ranks since the last optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_bharat.strategies.data import local


class TokenWeightError(ValueError):
    """A training step whose labels can't be counted; the message says what it must do."""


class _Watch(TorchFunctionMode):
    """Computes mean losses over labels as sum / count, and keeps the counts. Without any valid label the loss is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            return self._mean(func, _cross_entropy_arguments, args, kwargs)
        if func is F.nll_loss:
            return self._mean(func, _nll_loss_arguments, args, kwargs)
        return func(*args, **kwargs)

    def _mean(self, func: Callable, names: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        called = names(*args, **kwargs)
        if called["reduction"] != "mean" or called.get("reduce") is False or called.get("size_average") is False:
            return func(*args, **kwargs)
        count = _count(called["input"], called["target"], called["weight"], called["ignore_index"])
        self.counts.append(count.detach())
        losses = func(
            **{k: v for k, v in called.items() if k not in ("size_average", "reduce")} | {"reduction": "none"}
        )
        wide = torch.promote_types(losses.dtype, torch.float32)
        return (losses.sum(dtype=wide) / count.to(wide).clamp(min=torch.finfo(wide).tiny)).to(losses.dtype)


def _cross_entropy_arguments(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> dict[str, Any]:
    return locals()


def _nll_loss_arguments(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> dict[str, Any]:
    return locals()


def _count(input: Tensor, target: Tensor, weight: Tensor | None, ignore: int) -> Tensor:
    """What the mean divides by: valid labels, or the sum of their class weights; rows if targets are probabilities."""
    if target.is_floating_point():
        rows = input.numel() // input.shape[1 if input.ndim > 1 else 0]
        return torch.tensor(float(rows), dtype=torch.float64, device=target.device)
    valid = target != ignore
    if weight is None:
        return valid.sum(dtype=torch.float64)
    return (weight[target.masked_fill(~valid, 0)] * valid).sum(dtype=torch.float64)


class TokenWeights:
    """Weighs losses and gradients of one accumulation window after another.

    Args:
        group: the data ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._count: Tensor | None = None
        self._seen: Tensor | None = None  # labels of this window in earlier backward passes, over all data ranks

    def watch(self, step: Callable[[], Any]) -> Any:
        """Call ``step``, a training step.

        Returns:
            What it returns; its loss stays the mean over this rank's labels.

        Raises:
            TokenWeightError: it does not call a mean ``cross_entropy`` (or ``nll_loss``) exactly once.
        """
        watch = _Watch()
        with watch:
            out = step()
        if out is not None and len(watch.counts) != 1:
            raise TokenWeightError(
                "token_weighted=True: the training step calls cross_entropy(reduction='mean') "
                f"{len(watch.counts)} times, and it must call it exactly once: labels are counted there. Compute the "
                "loss of a batch in one call, or write token_weighted=False and weigh it in the step"
            )
        self._count = watch.counts[0] if watch.counts else None
        return out

    @torch.no_grad()
    def weigh(self, loss: Tensor, divided_by: int, parameters: Iterable[Tensor]) -> Tensor:
        """Before a backward pass: rescale the gradients that are there, and return ``loss`` with its weight.

        Args:
            loss: of this rank's batch, divided by ``divided_by``.
            divided_by: Lightning's 1 / accumulate_grad_batches, which is undone.
            parameters: whose gradients the pass adds to; averaged over the data ranks.

        Raises:
            TokenWeightError: there was no training step since the last pass.
        """
        if self._count is None:
            raise TokenWeightError(
                "token_weighted=True: a second backward pass in one training step; "
                "write token_weighted=False and weigh the losses in the step"
            )
        mine, self._count = self._count, None
        everyone = mine.clone()
        dist.all_reduce(everyone, group=self.group)
        grads = [local(p.grad) for p in parameters if p.grad is not None]
        seen = self._seen if grads else None
        total = everyone if seen is None else seen + everyone
        safe = total.clamp(min=torch.finfo(total.dtype).tiny)
        if seen is not None:
            share = seen / safe
            for grad in grads:
                grad.mul_(share.to(grad.dtype))
        self._seen = total
        weight = mine * dist.get_world_size(self.group) * divided_by / safe
        with torch.enable_grad():
            return loss * weight.to(loss.dtype)

    def stepped(self) -> None:
        """An optimizer stepped: a new window begins."""
        self._seen = None
