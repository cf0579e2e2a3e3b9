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


@dataclass(frozen=True)
class Spread:
    """Experts over expert ranks, and those of one over the ranks that have the same.

    Attributes:
        names: of their parameters.
        ranks: expert ranks.
        copies: ranks that have the same experts, and divide them.
    """

    names: Collection[str]
    ranks: int
    copies: int


def memory_per_rank(
    module: nn.Module,
    blocks: Iterable[str],
    shards: int,
    state: State,
    held: Collection[str] | None = None,
    spread: Spread | None = None,
) -> Memory:
    """Bytes on the fullest of ``shards`` data ranks.

    Args:
        module: as one tensor rank holds it (``cut_module`` with :class:`FirstOf`), with all experts, on ``meta`` or
            not.
        blocks: names of the blocks, each of which FSDP2 gathers by itself.
        shards: data ranks that share each parameter: ``layout.data // layout.replicate``.
        state: what the optimizers keep for each parameter, from :func:`optimizer_state`.
        held: names of the parameters of a pipeline stage, which are gathered together; ``None``: all.
        spread: of its experts, if they are.
    """
    found = {name: p for name, p in module.named_parameters() if held is None or name in held}
    whole: dict[Tensor, int] = {p: whole_bytes(name, p, spread) for name, p in found.items()}
    if held is None and spread and spread.copies == 1:  # nobody else has them: they stay out of FSDP2
        whole |= {p: 0 for name, p in found.items() if name in spread.names}
    gathered = _gathered(module, tuple(blocks), whole) if held is None else sum(whole.values())
    parts = (of_parameter(name, p, shards, state, spread) for name, p in found.items())
    return together(parts, gathered if shards > 1 or spread else 0)


def whole_bytes(name: str, parameter: Tensor, spread: Spread | None = None) -> int:
    """Bytes of a parameter that is whole over data ranks; of a rank's own experts."""
    return parameter.numel() * parameter.itemsize // (spread.ranks if spread and name in spread.names else 1)


def of_parameter(name: str, parameter: Tensor, shards: int, state: State, spread: Spread | None = None) -> Memory:
    """Bytes of one parameter on the fullest of ``shards`` data ranks."""
    ranks = 1
    if spread and name in spread.names:
        ranks, shards = spread.ranks, spread.copies
    own = _on_fullest(parameter, parameter.shape, shards, ranks)
    kept = sum(_on_fullest(t, parameter.shape, shards, ranks) for t in state.get(parameter, ()))
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


def _on_fullest(tensor: Tensor, whole: torch.Size, shards: int, ranks: int = 1) -> int:
    """Bytes of ``tensor`` on the first data rank: cut along dimension 0 where it is shaped as the parameter is."""
    if tensor.shape != whole or not tensor.ndim:
        return tensor.numel() * tensor.itemsize
    rows = -(-tensor.shape[0] // ranks // shards)  # as torch.chunk: the first ranks hold most
    return rows * prod(tensor.shape[1:]) * tensor.itemsize


def _gathered(module: nn.Module, blocks: Sequence[str], whole: Mapping[Tensor, int]) -> int:
    in_blocks = [set(module.get_submodule(name).parameters()) for name in blocks]
    inside = set().union(*in_blocks)
    outside = sum(size for p, size in whole.items() if p not in inside)
    return outside + max((sum(whole[p] for p in block) for block in in_blocks), default=0)
