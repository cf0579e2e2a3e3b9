"""Activation checkpointing of blocks: what a forward pass computed is computed again in the backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

MODES = (None, "full", "selective")

# Expensive to compute: "selective" keeps their results.
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def _policy(ctx: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _without_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face's blocks without their key-value cache, which would grow again in the recomputation."""
    empty = {name: None for name in ("cache", "past_key_values", "layer_past") if name in kwargs}
    return {**kwargs, **empty, **({"use_cache": False} if "use_cache" in kwargs else {})}  # type: ignore[dict-item]


def recompute(block: nn.Module, mode: str) -> None:
    """Make ``block`` recompute: all of it (``"full"``), or all but matrix products and attention (``"selective"``).

    Only ``block.forward`` of this instance is replaced, so that parameters keep their names.
    """
    forward = block.forward
    extra: dict[str, Any] = {}
    if mode == "selective":
        extra["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **extra, **_without_cache(kwargs))

    block.forward = checkpointed
