"""Norms, sums and extremes of gradients and weights in a person's hooks: those of the whole, where ranks hold pieces.

``torch.nn.utils.clip_grad_norm_``, Lightning's ``grad_norm`` and a plain ``p.grad.norm()`` are written for whole
tensors. On a tensor rank they would see a piece, without a word; on a data rank they give a ``DTensor`` that holds this
rank's part until it is redistributed, and ``item()`` does not do that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_bharat.strategies.precision import Divided, Groups, local_piece
from lightning_bharat.strategies.refusals import ModuleError

_HOOKS = ("on_after_backward", "on_before_optimizer_step")
_NORMS = {torch.Tensor.norm, torch.norm, torch.linalg.vector_norm, torch.linalg.norm, torch._foreach_norm}
_SUM, _MAX, _MIN = dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN
_OTHERS = {
    **dict.fromkeys((torch.Tensor.sum, torch.sum, torch.Tensor.mean, torch.mean), _SUM),
    **dict.fromkeys((torch.Tensor.max, torch.max, torch.Tensor.amax, torch.amax), _MAX),
    **dict.fromkeys((torch.Tensor.min, torch.min, torch.Tensor.amin, torch.amin), _MIN),
    **dict.fromkeys((torch.Tensor.any, torch.any), _MAX),
    **dict.fromkeys((torch.Tensor.all, torch.all), _MIN),
}
_MEANS = {torch.Tensor.mean, torch.mean}


def hooks_see_gradients(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether ``module`` or a callback has code of its own where gradients may be read. One that says by an attribute
    ``knows_pieces`` that it takes them for what they are does not count."""
    own = any(is_overridden(hook, module) for hook in (*_HOOKS, "configure_gradient_clipping"))
    callbacks = [c for c in trainer.callbacks if not getattr(c, "knows_pieces", False)]  # type: ignore[attr-defined]
    return own or any(is_overridden(hook, callback, pl.Callback) for hook in _HOOKS for callback in callbacks)


class WholeNorms(TorchFunctionMode):
    """In here, functions that reduce all of a parameter or gradient, or all of what was made of it element by element,
    to one number look at the whole of it.

    All ranks must call them alike.

    Args:
        parameters: as optimizers know them, when asked.
        groups_of: the groups over which a parameter is cut, beyond what its ``DTensor`` says.
        norms_only: leave sums and the like alone: a step makes them of many other tensors.
        refuse: raise instead: the stages of a pipeline hold different parameters.
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[Tensor]],
        groups_of: Groups,
        norms_only: bool = False,
        refuse: bool = False,
    ) -> None:
        super().__init__()
        self._parameters, self._groups_of = parameters, groups_of
        self._norms_only, self._refuse = norms_only, refuse
        self._owners: dict[tuple[int, int], Tensor] = {}
        self._made_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._known: Divided = {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        several = func is torch._foreach_norm
        if func in _NORMS:
            whole = len(args) <= 2 and kwargs.get("dim") is None
        else:
            whole = not self._norms_only and func in _OTHERS and len(args) == 1 and not kwargs.keys() - {"dtype"}
        if not whole or not args:
            return self._followed(func(*args, **kwargs), args)
        tensors = list(args[0]) if several else [args[0]]
        pieces = [self._piece(x) for x in tensors]
        if not any(groups is not None for _, groups in pieces):
            return func(*args, **kwargs)
        if self._refuse:
            raise ModuleError(
                f"{func.__name__} of a gradient or weight: each stage of a pipeline has others. "
                "self.trainer.strategy.grad_norm() is the norm of all gradients, and self.clip_gradients clips by it"
            )
        order = _order(args, kwargs) if func in _NORMS else None
        found = _reduced(func, pieces, order, args[1:], kwargs)
        if func in _MEANS:
            found = [total / self._count(x) for total, x in zip(found, tensors, strict=True)]
        return found if several else found[0]

    def _piece(self, x: Tensor) -> tuple[Tensor, list[dist.ProcessGroup] | None]:
        """What this rank holds of ``x``, and the groups that hold the rest; ``None`` if it is an ordinary tensor."""
        if not isinstance(x, Tensor) or x.grad_fn is not None:
            return x, None
        owner = self._owner(x)
        if owner is None and not isinstance(x, DTensor):
            return x, None
        local, groups = local_piece(x, self._known)
        return local, [*groups, *(self._groups_of(owner) if owner is not None else ())]

    def _count(self, x: Tensor) -> int:
        """Elements of the whole."""
        owner = self._owner(x)
        cut = self._groups_of(owner) if owner is not None else []
        return x.numel() * next((group.size() for group in cut), 1)

    def _followed(self, out: Any, args: tuple) -> Any:
        """``out``; remembered, if it has an element for each of a piece."""
        if not self._norms_only and isinstance(out, Tensor) and out.ndim and out.grad_fn is None:
            for x in args:
                if isinstance(x, Tensor) and x.shape == out.shape and (owner := self._owner(x)) is not None:
                    self._made_of[out] = owner
                    break
        return out

    def _owner(self, x: Tensor) -> Tensor | None:
        """The parameter that ``x`` is, whose gradient it is, or of which it was made."""
        if x in self._made_of:
            return self._made_of[x]
        place = _place(x)
        if place not in self._owners and (self._norms_only or not self._owners):
            # In a step gradients are new ones after each backward pass.
            self._owners = {_place(t): p for p in self._parameters() for t in (p, p.grad) if t is not None}
        owner = self._owners.get(place)
        if owner is not None and place not in (_place(owner), owner.grad is not None and _place(owner.grad)):
            return None
        return owner


def _place(x: Tensor) -> tuple[int, int]:
    """Where its memory is; views of all of it are there too."""
    local = x.to_local() if isinstance(x, DTensor) else x
    return local.data_ptr(), local.numel()


def _order(args: tuple, kwargs: dict[str, Any]) -> float:
    given = args[1] if len(args) > 1 else kwargs.get("p", kwargs.get("ord"))
    return 2.0 if given in (None, "fro") else float(given)


def _reduced(
    func: Callable, pieces: Sequence[tuple[Tensor, list | None]], order: float | None, rest: tuple, kwargs: dict
) -> list[Tensor]:
    """``func`` of each whole tensor, from the pieces of all ranks; for a mean the sum."""
    operation = _OTHERS[func] if order is None else {inf: _MAX, -inf: _MIN}.get(order, _SUM)
    power = order if order and operation == _SUM else None
    found = []
    for piece, _ in pieces:
        if piece.numel() == 0:
            empty = {_SUM: 0.0, _MAX: -inf if order is None else 0.0, _MIN: inf}[operation]
            value = piece.new_full((), empty)
        elif order is not None:
            value = torch.linalg.vector_norm(piece, order, dtype=kwargs.get("dtype"))
        else:
            value = piece.sum(**kwargs) if func in _MEANS else func(piece, *rest, **kwargs)
        found.append(value.detach().pow(power) if power else value.detach())
    dtypes = [value.dtype for value in found]  # gloo and NCCL exchange no booleans
    found = [value.byte() if value.dtype == torch.bool else value for value in found]
    _over_ranks(found, [groups or [] for _, groups in pieces], operation)
    whole = [value.pow(1 / power) if power else value for value in found]
    return [value.to(dtype) for value, dtype in zip(whole, dtypes, strict=True)]


def _over_ranks(values: list[Tensor], groups: list[list[dist.ProcessGroup]], operation: Any) -> None:
    """Combine in place; one exchange for all values of a group and type."""
    for group in dict.fromkeys(group for each in groups for group in each):
        for dtype in dict.fromkeys(value.dtype for value in values):
            inside = [i for i, each in enumerate(groups) if group in each and values[i].dtype == dtype]
            if inside:
                packed = torch.stack([values[i] for i in inside])
                dist.all_reduce(packed, operation, group=group)
                for i, value in zip(inside, packed.unbind(), strict=True):
                    values[i] = value
