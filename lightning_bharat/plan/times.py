"""How long a block takes: its forward pass, the gradient of its input, the gradients of its weights; measured on one
block of each kind, so that a model of any size needs the memory of one.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_bharat.plan.copies import copy_module
from lightning_bharat.plan.observe import Call, Observation

LONG_ENOUGH = 0.5  # seconds after which a kind of block is not measured again
REPEATS = 5


@dataclass(frozen=True)
class BlockTimes:
    """Of one block on one micro-batch.

    Attributes:
        forward, inputs, weights: seconds of the forward pass, and of both parts of the backward pass.
        kept: bytes that its backward pass needs from its forward pass, weights apart.
        sent: bytes of the hidden state.
    """

    forward: float
    inputs: float
    weights: float
    kept: int
    sent: int


def block_times(
    module: nn.Module,
    seen: Observation,
    device: torch.device,
    around: Callable[[], AbstractContextManager],
    change: Callable[[nn.Module], None] = lambda block: None,
) -> dict[str, BlockTimes]:
    """By kind of block, what a block takes on ``device``.

    Args:
        module: the whole model, real or on ``meta``; it is not changed.
        seen: a dry run of its step on a micro-batch.
        around: makes what a block runs in (autocast).
        change: of a block before it is measured (recomputation).
    """
    found = {}
    with torch.random.fork_rng(devices=[]):
        for kind, call in seen.calls.items():
            block = _real(module.get_submodule(seen.names[seen.kinds.index(kind)]), device).train()
            change(block)
            call = Call(*tree_map_only(Tensor, lambda x: _values(x, device), (call.args, call.kwargs)))
            found[kind] = _times(block, call, seen.hidden if seen.hidden is not None else 0, device, around)
    return found


def _times(
    block: nn.Module, call: Call, hidden: int | str, device: torch.device, around: Callable[[], AbstractContextManager]
) -> BlockTimes:
    weights = [p for p in block.parameters() if p.requires_grad]
    passes: list[tuple[float, ...]] = []  # forward, of the input; forward again, of all
    began = time.perf_counter()
    kept, sent = 0, 0
    while len(passes) <= REPEATS and (len(passes) < 3 or time.perf_counter() - began < LONG_ENOUGH):
        seconds: list[float] = []
        for also in ([], weights):
            again = copy.deepcopy(call)
            x: Tensor = again.args[hidden] if isinstance(hidden, int) else again.kwargs[hidden]
            x.requires_grad_()
            saved = _Kept(block)
            with around(), saved:
                forward, out = _timed(device, block, *again.args, **again.kwargs)
            out = _first(out)
            seeds = torch.ones_like(out)
            backward, _ = _timed(device, torch.autograd.grad, out, [x, *also], seeds, allow_unused=True)
            seconds += [forward, backward]
            kept, sent = max(saved.bytes, x.nbytes), x.nbytes
        passes.append(tuple(seconds))
    # the first one prepares; of the others the shortest, since all that disturbs makes them longer
    forward, inputs, again_forward, both = (min(pass_[i] for pass_ in passes[1:]) for i in range(4))
    return BlockTimes(min(forward, again_forward), inputs, max(both - inputs, 0.0), kept, sent)


def _timed(device: torch.device, run: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[float, Any]:
    _wait(device)
    began = time.perf_counter()
    out = run(*args, **kwargs)
    _wait(device)
    return time.perf_counter() - began, out


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _first(out: Any) -> Tensor:
    return next(x for x in tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad)


class _Kept(saved_tensors_hooks):
    """Counts the bytes that autograd keeps in here, weights and buffers of ``block`` apart."""

    def __init__(self, block: nn.Module) -> None:
        self._known = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}
        self.bytes = 0
        super().__init__(self._pack, lambda x: x)

    def _pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return x


def _real(block: nn.Module, device: torch.device) -> nn.Module:
    memo: dict[int, Any] = {}
    for tensor in (*block.parameters(), *block.buffers()):
        value = _values(tensor, device) if tensor.is_meta else tensor.detach().to(device, copy=True)
        memo[id(tensor)] = (
            nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
        )
    return copy_module(block, memo)


def _values(x: Tensor, device: torch.device) -> Tensor:
    """Plausible ones, of a size at which nothing overflows or is denormal."""
    if x.is_floating_point():
        scale = max(x.shape[-1], 1) ** -0.5 if x.ndim > 1 and isinstance(x, nn.Parameter) else 1.0
        return torch.randn(x.shape, device=device).mul_(scale).to(x.dtype)
    if x.dtype == torch.bool or not x.ndim:
        return torch.ones(x.shape, dtype=x.dtype, device=device)
    return torch.arange(x.shape[-1], device=device).to(x.dtype).expand(x.shape).clone()
