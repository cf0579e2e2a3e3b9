"""``torch.compile`` of blocks: one program for all that are alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_bharat.strategies._torch import no_compiler


def compile_arguments(asked: bool | Mapping[str, Any], recomputing: str | None, device: torch.device) -> dict[str, Any]:
    """What ``torch.compile`` gets.

    Args:
        asked: HybridStrategy's ``compile``.
        recomputing: its ``activation_checkpointing``.
        device: of the blocks.

    Raises:
        ValueError: blocks can't be compiled so here; says what to write.
    """
    given = dict(asked) if isinstance(asked, Mapping) else {}
    if recomputing == "selective":
        raise ValueError(
            f'compile={asked!r} with activation_checkpointing="selective": a compiled block chooses itself what it '
            'computes again in its backward pass; leave that out, or write activation_checkpointing="full" to keep '
            "nothing of a block"
        )
    needs_one = device.type == "cpu" and given.get("backend", "inductor") == "inductor"
    if needs_one and (problem := no_compiler()):
        raise ValueError(
            f"compile={asked!r}: on the CPU torch.compile makes C++ of a block, and there is no compiler for it "
            f'({problem}). Install g++, or write compile={{"backend": "aot_eager"}}, which needs none and is not faster'
        )
    return given


def compile_block(block: nn.Module, given: Mapping[str, Any]) -> None:
    """Let the ``forward`` of ``block`` run compiled, its hooks outside. Its parameters keep their names."""
    block.forward = torch.compile(block.forward, **given)
