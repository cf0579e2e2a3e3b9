"""What a dry run answers where a step asks for values, which fake tensors have none of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_bharat.plan.experts import CutExperts, find_experts


def _one(x: Tensor, *_: Any) -> Any:
    return 1.0 if x.is_floating_point() else True if x.dtype == torch.bool else 1


def _ones(shape: torch.Size) -> Any:
    return [_ones(shape[1:]) for _ in range(shape[0])] if shape else 1


# A person's step may look at values ("log(loss.item())"): in the dry run each is a one.
VALUES: dict[str, Callable] = {
    "item": _one,
    "__bool__": lambda x: True,
    "__int__": lambda x: 1,
    "__index__": lambda x: 1,
    "__float__": lambda x: 1.0,
    "__format__": lambda x, spec="": format(_one(x), spec),
    "tolist": lambda x: _ones(x.shape),
}


class Answers(TorchFunctionMode):
    """Answers questions for values with ones; in experts, for how many tokens each has, with an even load.

    Args:
        module: that runs while this is entered; hooks follow which of its experts do.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()
        self.choices: list[int] = []  # of the experts that run, how many came in
        self.handles: list[Any] = []
        for part in _experts(module) if module is not None else ():
            self.handles += [
                part.register_forward_pre_hook(self._enter, with_kwargs=True),
                part.register_forward_hook(lambda *_: self._leave()),
            ]

    def _enter(self, part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        whole = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and not x.is_floating_point())
        self.choices.append(next((x.numel() for x in whole), 0))

    def _leave(self) -> None:
        self.choices.pop()

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in VALUES and args and isinstance(args[0], Tensor):
            counts = name == "tolist" and self.choices and args[0].ndim and not args[0].is_floating_point()
            return _even(self.choices[-1], args[0].shape) if counts else VALUES[name](*args)
        return func(*args, **(kwargs or {}))


def _experts(module: nn.Module) -> list[nn.Module]:
    spread = [part for part in module.modules() if isinstance(part, CutExperts)]
    return list(dict.fromkeys([*spread, *(module.get_submodule(found.name) for found in find_experts(module))]))


def _even(total: int, shape: torch.Size) -> Any:
    """``total`` over the last dimension.

    >>> _even(5, torch.Size([3])), _even(4, torch.Size([2, 2]))
    ([2, 2, 1], [[2, 2], [2, 2]])
    """
    if len(shape) > 1:
        return [_even(total, shape[1:]) for _ in range(shape[0])]
    each, more = divmod(total, shape[0])
    return [each + (i < more) for i in range(shape[0])]
