"""Small models for the planner's tests, and the shares that it plans with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bharat.models import GPT, GPTConfig
from lightning_bharat.plan.estimate import Share
from lightning_bharat.plan.find import find_plan
from lightning_bharat.plan.memory import optimizer_state
from lightning_bharat.plan.work import CountingPeers, count_work
from lightning_bharat.strategies.tensor import cut_module


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


def shares(*tensor: int, depth: int = 8, time: int = 16) -> dict[int, Share]:
    """Of the decoder, with AdamW."""
    found, batch = {}, torch.zeros(2, time, dtype=torch.long)
    for size in tensor:
        module = decoder(depth)
        plan, peers = find_plan(module, of_decoder, batch, size), CountingPeers(size)
        if size > 1:
            cut_module(module, replace(plan, random=False), peers, sequence=True, loss=True)
        growth = count_work(module, plan.block_names(module), of_decoder, batch, None, peers)
        found[size] = Share(module, plan, optimizer_state([torch.optim.AdamW(module.parameters())]), growth)
    return found
