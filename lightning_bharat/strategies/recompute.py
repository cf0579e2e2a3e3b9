"""Activation checkpointing of blocks: what a forward pass computed is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_bharat.plan.copies import without_cache
from lightning_bharat.plan.watch import EXPENSIVE
from lightning_bharat.strategies._torch import version


def _policy(ctx: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


class _Buffers:
    """What a block's forward pass changes of its buffers (statistics, counts), it must not change again."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._changing: set[tuple[nn.Module, str]] | None = None  # not known before the first pass

    def watch(self) -> tuple[list, dict]:
        """Before a pass: what :meth:`look` compares with, and values to recompute with."""
        places = [(owner, name) for owner in self._block.modules() for name in owner._buffers]
        found = [(owner, name, b, version(b)) for owner, name in places if (b := owner._buffers[name]) is not None]
        kept = [i for i in found if self._changing is None or i[:2] in self._changing]
        return found, {(owner, name): buffer.clone() for owner, name, buffer, _ in kept}

    def look(self, found: list) -> None:
        """After a pass."""
        changed = {(o, name) for o, name, b, v in found if o._buffers[name] is not b or version(b) != v}
        self._changing = changed | (self._changing or set())

    @contextmanager
    def as_before(self, values: dict) -> Iterator[None]:
        """Recompute with the buffers as they were before the pass; afterwards they are as they are now."""
        now = {}
        for owner, name in self._changing or ():
            if (owner, name) in values:
                now[owner, name], owner._buffers[name] = owner._buffers[name], values[owner, name].clone()
        try:
            yield
        finally:
            for (owner, name), buffer in now.items():
                owner._buffers[name] = buffer


def recompute(block: nn.Module, mode: str) -> None:
    """Make ``block`` recompute: all of it (``"full"``), or all but matrix products and attention (``"selective"``).

    Only ``block.forward`` of this instance is replaced, so that parameters keep their names.
    """
    forward, buffers = block.forward, _Buffers(block)

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        found, values = buffers.watch()
        dtype = torch.get_default_dtype()

        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            selective = mode == "selective"
            first, again = (
                create_selective_checkpoint_contexts(_policy) if selective else (nullcontext(), nullcontext())
            )
            return first, _all(buffers.as_before(values), _default(dtype), again)

        out = checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **without_cache(kwargs))
        buffers.look(found)
        return out

    # Where a module around it is compiled, that goes on inside of it.
    block.forward = torch.compiler.disable(checkpointed, recursive=False)


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """The type of new tensors, which Lightning's plugins set for steps and not for backward passes."""
    now = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(now)


@contextmanager
def _all(*managers: AbstractContextManager) -> Iterator[None]:
    with ExitStack() as stack:
        for manager in managers:
            stack.enter_context(manager)
        yield
