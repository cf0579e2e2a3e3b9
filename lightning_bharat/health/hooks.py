"""What is followed in one run of a step: the modules that run, and the numbers that pass through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@contextmanager
def after_each(module: nn.Module, ran: Callable[..., None]) -> Iterator[None]:
    """In here ``ran(name, module, args, kwargs, output)`` is called when a module below ``module`` has run."""
    handles = [
        child.register_forward_hook(partial(ran, name), with_kwargs=True)
        for name, child in module.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def floats(tree: Any) -> list[Tensor]:
    """The tensors of floating-point numbers in ``tree``, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
