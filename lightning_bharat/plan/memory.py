"""Bytes that a rank holds under a layout, from shapes alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_bharat.plan.exchange import OnePeer

State = Mapping[Tensor, Sequence[Tensor]]


class FirstOf(OnePeer):
    """The first of ``size`` tensor ranks, for cutting a module on ``meta``, which exchanges nothing."""

    def __init__(self, size: int) -> None:
        self.size = size


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank.

    Attributes:
        parameters, gradients: of what the rank holds; frozen parameters have no gradient.
        optimizer: the optimizers' states after a step.
        gathered: what is whole over data ranks while the largest block runs: that block, and the parameters outside
            blocks, which are gathered as one. 0 on one data rank.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int

    @property
    def total(self) -> int:
        """All of it. Activations are not in it."""
        return self.parameters + self.gradients + self.optimizer + self.gathered


def memory_per_rank(
    module: nn.Module, blocks: Iterable[str], shards: int, state: State, held: Collection[str] | None = None
) -> Memory:
    """Bytes on the fullest of ``shards`` data ranks.

    Args:
        module: as one tensor rank holds it (``cut_module`` with :class:`FirstOf`), on ``meta`` or not.
        blocks: names of the blocks, each of which FSDP2 gathers by itself.
        shards: data ranks that share each parameter: ``layout.data // layout.replicate``.
        state: what the optimizers keep for each parameter, from :func:`optimizer_state`.
        held: names of the parameters of a pipeline stage, which are gathered together; ``None``: all.
    """
    names = tuple(blocks)
    parameters = [p for name, p in module.named_parameters() if held is None or name in held]
    gathered = _gathered(module, names) if held is None else sum(p.numel() * p.itemsize for p in parameters)
    return together((of_parameter(p, shards, state) for p in parameters), gathered if shards > 1 else 0)


def of_parameter(parameter: Tensor, shards: int, state: State) -> Memory:
    """Bytes of one parameter on the fullest of ``shards`` data ranks."""
    own = _on_fullest(parameter, parameter.shape, shards)
    kept = sum(_on_fullest(t, parameter.shape, shards) for t in state.get(parameter, ()))
    return Memory(own, own if parameter.requires_grad else 0, kept, 0)


def together(parts: Iterable[Memory], gathered: int = 0) -> Memory:
    """The bytes of several parameters, and those that are gathered of them."""
    every = list(parts)
    return Memory(
        parameters=sum(part.parameters for part in every),
        gradients=sum(part.gradients for part in every),
        optimizer=sum(part.optimizer for part in every),
        gathered=gathered,
    )


def optimizer_state(optimizers: Iterable[Optimizer]) -> State:
    """The tensors that optimizers keep for each parameter, by one step with zero gradients.

    Meant for optimizers of a module on ``meta``, where a step computes nothing. What the optimizer or its parameters
    held before is changed.

    Raises:
        Exception: the optimizer can't step there (it needs a closure, or values); whatever it raised.
    """
    found: dict[Tensor, list[Tensor]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        for parameter, state in optimizer.state.items():
            found.setdefault(parameter, []).extend(t for t in tree_leaves(state) if isinstance(t, Tensor))
    return found


def _on_fullest(tensor: Tensor, whole: torch.Size, shards: int) -> int:
    """Bytes of ``tensor`` on the first data rank: cut along dimension 0 where it is shaped as the parameter is."""
    if tensor.shape != whole or not tensor.ndim:
        return tensor.numel() * tensor.itemsize
    rows = -(-tensor.shape[0] // shards)  # as torch.chunk: the first ranks hold most
    return rows * prod(tensor.shape[1:]) * tensor.itemsize


def _gathered(module: nn.Module, blocks: Sequence[str]) -> int:
    in_blocks = [{p: p.numel() * p.itemsize for p in module.get_submodule(name).parameters()} for name in blocks]
    inside = {p for sizes in in_blocks for p in sizes}
    outside = sum(p.numel() * p.itemsize for p in module.parameters() if p not in inside)
    return outside + max((sum(sizes.values()) for sizes in in_blocks), default=0)
