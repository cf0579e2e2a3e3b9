"""Small models for the planner's tests, and the shares that it plans with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bharat.commands.counted import Cuts, counted
from lightning_bharat.models import GPT, GPTConfig
from lightning_bharat.plan.find import find_plan
from lightning_bharat.plan.find_context import find_context_cut
from lightning_bharat.plan.memory import State, optimizer_state
from lightning_bharat.plan.share import Share


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


class Stack(nn.Module):
    """Numbers of a batch, of shape (rows, 3), through two blocks to one number a row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def of_stack(model: Any, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def of_decoder(model: Any, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch).flatten(0, 1), batch.flatten())


def decoder(depth: int = 8) -> nn.Module:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    with torch.device("meta"):
        return GPT(GPTConfig(vocab_size=96, num_hidden_layers=depth, **sizes))


def mixture(depth: int = 8) -> nn.Module:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 32}
    with torch.device("meta"):
        return GPT(GPTConfig(vocab_size=96, num_hidden_layers=depth, num_experts=8, **sizes))


def of_adamw(module: nn.Module) -> State:
    return optimizer_state([torch.optim.AdamW(module.parameters())])


def share(
    tensor: int = 1, context: int = 1, depth: int = 8, time: int = 16, make: Callable[[int], nn.Module] = decoder
) -> Share:
    """Of a decoder, with AdamW."""
    module, batch = make(depth), torch.zeros(2, time, dtype=torch.long)
    sequence = find_context_cut(module, of_decoder, batch, context) if context > 1 else None
    cuts = Cuts(find_plan(module, of_decoder, batch, tensor), tensor, context, sequence, make is mixture)
    return counted(module, cuts, of_decoder, batch, None, of_adamw)


def shares(*tensor: int, contexts: Sequence[int] = (1,), **options: Any) -> dict[tuple[int, int], Share]:
    """By number of tensor and of context ranks."""
    return {(size, context): share(size, context, **options) for size in tensor for context in contexts}
