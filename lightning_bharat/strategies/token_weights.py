"""Every valid label counts the same, on whatever rank and in whatever micro-batch it is.

Without this, data ranks and accumulated batches average means: a rank with few valid labels weighs as much as one with
many. :class:`TokenWeights` watches the one mean cross entropy of a training step, counts its valid labels and weighs
this rank's loss by them, such that after each backward pass the gradients are the mean over all labels of all data
ranks since the last optimizer step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_bharat.strategies._torch import (
    innermost_function_mode,
    is_recomputed,
    without_innermost_function_mode,
)
from lightning_bharat.strategies.data import local


class TokenWeightError(ValueError):
    """A training step whose labels can't be counted; the message says what it must do."""


class _Watch(TorchFunctionMode):
    """Computes mean losses over labels as sum / count, and keeps both. Without any valid label the loss is 0.

    Attributes:
        counts: with the node of the loss in autograd's graph, the number of labels that it is a mean over.
        every: the number of labels of each mean, also of those without a graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[tuple[Node, Tensor]] = []
        self.every: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            return self._mean(func, _cross_entropy_arguments, args, kwargs)
        if func is F.linear_cross_entropy:
            return self._mean(func, _linear_cross_entropy_arguments, args, kwargs)
        if func is F.nll_loss:
            return self._mean(func, _nll_loss_arguments, args, kwargs)
        return func(*args, **kwargs)

    def _mean(self, func: Callable, names: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        called = names(*args, **kwargs)
        if called["reduction"] != "mean" or called.get("reduce") is False or called.get("size_average") is False:
            return func(*args, **kwargs)
        if is_recomputed():
            raise TokenWeightError(
                f"token_weighted=True counts labels in {func.__name__}, and can't in one that torch.utils.checkpoint "
                "computes again; call it outside of checkpoint(...), or write token_weighted=False and weigh losses in "
                "the step"
            )
        count = _count(called["input"], called["target"], called["weight"], called["ignore_index"])
        summed = {"size_average", "reduce", "reduction"}
        losses = func(**{name: value for name, value in called.items() if name not in summed}, reduction="none")
        wide = torch.promote_types(losses.dtype, torch.float32)
        mean = (losses.sum(dtype=wide) / count.to(wide).clamp(min=torch.finfo(wide).tiny)).to(losses.dtype)
        self.every.append(count.detach())
        if mean.grad_fn is not None:
            self.counts.append((mean.grad_fn, count.detach()))
        return mean


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


def _linear_cross_entropy_arguments(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> dict[str, Any]:
    return {**locals(), "ignore_index": -100 if ignore_index is None else ignore_index}


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


def _not_counted(found: str) -> TokenWeightError:
    return TokenWeightError(
        "token_weighted=True counts labels where the training step calls cross_entropy, linear_cross_entropy or "
        f"nll_loss with reduction='mean', and {found}. Differentiate one such mean in a step (times a constant), "
        "without other terms, or write token_weighted=False and weigh losses in the step"
    )


# What autograd calls the functions that leave a multiple of a number a multiple of it.
_MULTIPLES = re.compile(
    "(Mul|Div|Neg|Add|Sub|ToCopy|Clone|View|UnsafeView|Alias|Squeeze|Unsqueeze|Reshape|Expand|Sum|Mean)"
    r"(Alias)?Backward\d*"
)


def _reached(loss: Tensor, nodes: Collection[Node]) -> Node | None:
    """Of ``nodes`` the one of which ``loss`` is a constant multiple (plus a constant); ``None`` if it is none's."""
    here = loss.grad_fn
    while here is not None and here not in nodes:
        ahead = [node for node, _ in here.next_functions]
        varying = [node for node in ahead if node is not None]
        inverse = here.name().startswith("Div") and ahead[0] is None
        if len(varying) != 1 or inverse or not _MULTIPLES.fullmatch(here.name()):
            return None
        here = varying[0]
    return here


@dataclass
class Labels:
    """Valid labels in a step.

    Attributes:
        number: of the one mean cross entropy in the step; ``None`` if there is not exactly one.
        alone: whether the loss is that mean, times a constant.
    """

    number: float | None = None
    alone: bool = False


@contextmanager
def counted_labels(loss_of: Callable[[Any], Tensor]) -> Iterator[Callable[[Any], Labels]]:
    """Count in here the valid labels of a step; the function that it yields tells those of what the step returned."""
    watch = _Watch()

    def labels(out: Any) -> Labels:
        number = float(watch.every[0]) if len(watch.every) == 1 else None
        return Labels(number, number is not None and _reached(loss_of(out), dict(watch.counts)) is not None)

    with watch:
        yield labels


@contextmanager
def uncounted() -> Iterator[None]:
    """What runs in here makes no loss, and is spared the look at every function."""
    if not isinstance(innermost_function_mode(), _Watch):
        yield
        return
    with without_innermost_function_mode():
        yield


class TokenWeights:
    """Weighs losses and gradients of one accumulation window after another.

    Args:
        group: the data ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._counts: list[tuple[Node, Tensor]] = []
        self._weighed = False  # whether this step's loss was
        self._seen: Tensor | None = None  # labels of this window in earlier backward passes, over all data ranks
        self._passes = 0  # backward passes in this window

    def watch(self, step: Callable[[], Any]) -> Any:
        """Call ``step``, a training step; it may differentiate its losses itself.

        Returns:
            What it returns; its loss stays the mean over this rank's labels.
        """
        watch = _Watch()
        self._counts, self._weighed = watch.counts, False
        with watch:
            return step()

    @torch.no_grad()
    def weigh(self, loss: Tensor, divided_by: int | None, parameters: Iterable[Tensor]) -> Tensor:
        """Before a backward pass: rescale the gradients that are there, and return ``loss`` with its weight.

        Args:
            loss: of this rank's batch, divided by ``divided_by``.
            divided_by: Lightning's 1 / accumulate_grad_batches, which is undone. ``None``: the step differentiates its
                losses itself, and the sum over a window's passes stays a sum, of as many equal means.
            parameters: whose gradients the pass adds to; averaged over the data ranks.

        Raises:
            TokenWeightError: ``loss`` is not the mean over labels of a ``cross_entropy`` in this step, or not the first
                that the step differentiates.
        """
        weight = self._weigh(self._count_of(loss), divided_by, [p.grad for p in parameters])
        with torch.enable_grad():
            return loss * weight.to(loss.dtype)

    @torch.no_grad()
    def weigh_counted(
        self, labels: Labels, divided_by: int, gradients: Iterable[Tensor | None], device: torch.device
    ) -> float:
        """As :meth:`weigh`, for a batch whose gradients were made of micro-batches.

        Args:
            labels: of the batch.
            divided_by: what its gradients were divided by, which is undone.
            gradients: of earlier passes, to rescale.

        Returns:
            By what the batch's gradients are to be multiplied.

        Raises:
            TokenWeightError: they could not be counted.
        """
        if not labels.alone:
            raise _not_counted("its loss is not one" if labels.number is not None else "there is not exactly one")
        return float(
            self._weigh(torch.tensor(labels.number, dtype=torch.float64, device=device), divided_by, gradients)
        )

    def _weigh(self, mine: Tensor, divided_by: int | None, gradients: Iterable[Tensor | None]) -> Tensor:
        everyone = mine.clone()
        dist.all_reduce(everyone, group=self.group)
        grads = [local(grad) for grad in gradients if grad is not None]
        if not grads or self._seen is None:
            self._seen, self._passes = torch.zeros_like(everyone), 0
        total = self._seen + everyone
        per_label = 1 / total.clamp(min=torch.finfo(total.dtype).tiny)
        if self._passes:
            more = 1.0 if divided_by else (self._passes + 1) / self._passes
            share = self._seen * per_label * more
            for grad in grads:
                grad.mul_(share.to(grad.dtype))
        self._seen, self._passes = total, self._passes + 1
        return mine * dist.get_world_size(self.group) * (divided_by or self._passes) * per_label

    def _count_of(self, loss: Tensor) -> Tensor:
        counts = dict(self._counts)
        node = _reached(loss, counts)
        if self._weighed or node is None:
            found = "its loss is not a multiple of that" if counts else "there is none"
            if self._weighed:
                found = "this is the step's second backward pass"
            raise _not_counted(found)
        self._weighed = True
        return counts[node]

    def stepped(self) -> None:
        """An optimizer stepped: a new window begins."""
        self._seen = None
