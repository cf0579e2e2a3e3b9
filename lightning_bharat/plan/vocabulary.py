"""Logits that stay divided along the vocabulary until something needs them whole.

The head's output on each tensor rank is a :class:`VocabularyShard`: it looks like the whole logits, knows how to
reshape, cast and scale itself and how to compute a cross entropy over pieces: one maximum and one sum are exchanged,
never the logits (the idea is Megatron-LM's vocabulary-parallel cross entropy). Whatever else is asked of it gathers
first, so a person's step stays right, only not as lean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from lightning_bharat.plan.exchange import Peers, join

_gathers: ContextVar[list[str] | None] = ContextVar("gathers", default=None)


@contextmanager
def watch_gathers() -> Iterator[list[str]]:
    """Collect the names of the functions that needed gathered logits."""
    names: list[str] = []
    token = _gathers.set(names)
    try:
        yield names
    finally:
        _gathers.reset(token)


class VocabularyShard(Tensor):
    """Logits of shape (..., vocabulary) of which this rank holds ``local``, its piece of the last dimension."""

    local: Tensor
    peers: Peers

    @staticmethod
    def __new__(cls, local: Tensor, peers: Peers) -> VocabularyShard:
        shape = (*local.shape[:-1], local.shape[-1] * peers.size)
        self = Tensor._make_wrapper_subclass(
            cls, shape, dtype=local.dtype, device=local.device, requires_grad=local.requires_grad
        )
        self.local, self.peers = local, peers
        return self

    def gathered(self) -> Tensor:
        """The whole logits, on all peers. Every peer must call it."""
        return join(self.local, self.peers, -1)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"VocabularyShard({tuple(self.shape)}, piece {self.peers.rank} of {self.peers.size})"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _LOOKS:
                return func(*args, **kwargs)
            handler = _HANDLERS.get(func)
            if handler is not None:
                out = handler(func, *args, **kwargs)
                if out is not NotImplemented:
                    return out
            if (names := _gathers.get()) is not None:
                names.append(getattr(func, "__name__", str(func)))
            args, kwargs = tree_map_only(VocabularyShard, VocabularyShard.gathered, (args, kwargs))
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func} reached divided logits below torch's functions; call logits.gathered() first")


# What can be answered without looking at a value.
_LOOKS = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
    Tensor.__len__,
    torch.is_floating_point,
    torch.numel,
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "ndim", "dtype", "device", "requires_grad", "layout", "is_cuda", "is_leaf", "is_sparse")
    ),
}


def _reshape(func: Callable, x: VocabularyShard, *args: Any, **kwargs: Any) -> Any:
    shape = func(torch.empty(x.shape, device="meta"), *args, **kwargs).shape
    if not shape or shape[-1] != x.shape[-1]:
        return NotImplemented
    return VocabularyShard(x.local.reshape(*shape[:-1], x.local.shape[-1]), x.peers)


def _elementwise(func: Callable, x: Any, *args: Any, **kwargs: Any) -> Any:
    others = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    if not isinstance(x, VocabularyShard) or any(isinstance(o, VocabularyShard) or o.ndim for o in others):
        return NotImplemented
    out = func(x.local, *args, **kwargs)
    if out.dtype.itemsize < x.dtype.itemsize:  # rounded logits: a sum over pieces would round in another place
        return NotImplemented
    return VocabularyShard(out, x.peers)


def _index(func: Callable, x: VocabularyShard, index: Any) -> Any:
    items = index if isinstance(index, tuple) else (index,)
    whole = isinstance(items[-1], slice) and items[-1] == slice(None)
    dims = sum(i.ndim if isinstance(i, Tensor) and i.dtype == torch.bool else i is not None for i in items)
    has_ellipsis = any(i is Ellipsis for i in items)
    untouched = whole or items[-1] is Ellipsis or (not has_ellipsis and dims < x.ndim)
    return VocabularyShard(x.local[index], x.peers) if untouched else NotImplemented


class _CrossEntropy(torch.autograd.Function):
    """Loss of each row of (rows, piece of the vocabulary) logits; 0 where the target is ignored."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, target: Tensor, peers: Peers, ignore: int, smoothing: float) -> Tensor:
        size = local.shape[-1]
        top = peers.all_max(local.amax(-1))
        exp = (local - top[:, None]).exp()
        inside = target - peers.rank * size
        mine = (inside >= 0) & (inside < size)
        inside = inside.clamp(0, size - 1)
        picked = local.gather(1, inside[:, None])[:, 0] * mine
        total, picked, everything = peers.all_reduce(torch.stack([exp.sum(-1), picked, local.sum(-1)]))
        valid = target != ignore
        log_total = top + total.log()
        mean = everything / (size * peers.size)
        loss = (1 - smoothing) * (log_total - picked) + smoothing * (log_total - mean)
        ctx.save_for_backward(exp.div_(total[:, None]), inside, mine, valid)
        ctx.smoothing, ctx.vocabulary = smoothing, size * peers.size
        return loss * valid

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        probability, inside, mine, valid = ctx.saved_tensors
        out = probability - ctx.smoothing / ctx.vocabulary
        out.scatter_add_(1, inside[:, None], (ctx.smoothing - 1) * mine.to(out.dtype)[:, None])
        return out * (grad * valid)[:, None], None, None, None, None


def _cross_entropy(
    func: Callable,
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    plain = isinstance(input, VocabularyShard) and input.ndim == 2 and not target.is_floating_point()
    if not plain or weight is not None or size_average is not None or reduce is not None:
        return NotImplemented
    valid = target != ignore_index
    bounds = (target >= 0) & (target < input.shape[-1])
    torch._assert_async((bounds | ~valid).all(), f"a target is outside the vocabulary of {input.shape[-1]}")
    local = input.local
    if local.dtype in (torch.bfloat16, torch.float16):
        local = local.float()
    loss = _CrossEntropy.apply(local, target, input.peers, ignore_index, label_smoothing)
    if reduction == "mean":
        loss = loss.sum() / valid.sum()
    elif reduction == "sum":
        loss = loss.sum()
    return loss if torch.is_autocast_enabled(loss.device.type) else loss.to(input.dtype)


_HANDLERS: dict[Callable, Callable] = {
    F.cross_entropy: _cross_entropy,
    Tensor.__getitem__: _index,
    **dict.fromkeys(
        (Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten, Tensor.unsqueeze, Tensor.squeeze),
        _reshape,
    ),
    **dict.fromkeys(
        (
            *(Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.to, Tensor.type),
            *(Tensor.contiguous, Tensor.detach, torch.detach, torch.tanh, Tensor.tanh),
            *(Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.div, Tensor.__truediv__, torch.mul, torch.div),
        ),
        _elementwise,
    ),
}
