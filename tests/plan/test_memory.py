"""Bytes per rank from shapes alone, against what ranks of the strategy really hold."""

from __future__ import annotations

import copy
import os

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bharat import HybridStrategy
from lightning_bharat.commands.layout import fullest
from lightning_bharat.plan.elsewhere import is_elsewhere
from lightning_bharat.plan.find import find_plan
from lightning_bharat.plan.layout import Layout
from lightning_bharat.plan.memory import FirstOf, memory_per_rank, optimizer_state
from lightning_bharat.strategies.data import local
from lightning_bharat.strategies.tensor import cut_module
from tests.plan.models import VOCABULARY, Nano
from tests.ranks import run_ranks


class Small(L.LightningModule):
    """A decoder with a frozen embedding of positions, so that not everything has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Nano(width=48, depth=3)
        self.net.position.weight.requires_grad_(False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[0].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(p for p in self.parameters() if p.requires_grad)


class Count(L.Callback):
    """Bytes of this rank, from the tensors themselves."""

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: object) -> None:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        self.gradients = sum(_bytes(g) for g in gradients)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.parameters = sum(_bytes(p) for p in module.parameters() if not is_elsewhere(p))
        states = trainer.optimizers[0].state.values()
        self.optimizer = sum(_bytes(t) for state in states for t in state.values())


def _bytes(tensor: Tensor) -> int:
    return local(tensor).numel() * tensor.element_size()


def held(data: int, tensor: int, pipeline: int) -> tuple[int, int, int]:
    count = Count()
    trainer = L.Trainer(
        strategy=HybridStrategy(data, tensor, pipeline),
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        max_steps=2,
        callbacks=[count],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Small(), DataLoader(TensorDataset(torch.randint(VOCABULARY, (16, 8))), batch_size=2))
    return count.parameters, count.gradients, count.optimizer


@pytest.mark.parametrize(
    ("data", "tensor", "pipeline"), [(2, 1, 1), (1, 2, 1), (2, 2, 1), (3, 1, 1), (1, 1, 2), (2, 1, 2), (1, 2, 2)]
)
def test_the_fullest_rank_holds_what_was_computed(data: int, tensor: int, pipeline: int) -> None:
    with torch.device("meta"):
        module = Small()
    batch = [torch.zeros(2, 8, dtype=torch.long)]
    plan = find_plan(module, lambda copied, b: copied.training_step(b, 0), batch, tensor)
    if tensor > 1:
        cut_module(module, plan, FirstOf(tensor))
    state = optimizer_state([module.configure_optimizers()])
    memory = fullest(module, plan, Layout(data=data, tensor=tensor, pipeline=pipeline), state)
    ranks = run_ranks(held, data * tensor * pipeline, data, tensor, pipeline)
    assert max(ranks, key=sum) == (memory.parameters, memory.gradients, memory.optimizer)


def test_gathered_is_the_largest_block_and_what_is_outside_of_blocks() -> None:
    with torch.device("meta"):
        net = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4), nn.Linear(8, 8)]), "head": nn.Linear(2, 2)})
    blocks = ["blocks.0", "blocks.1"]
    assert memory_per_rank(net, blocks, 2, {}).gathered == 4 * (8 * 8 + 8 + 2 * 2 + 2)
    assert memory_per_rank(net, blocks, 1, {}).gathered == 0
    assert memory_per_rank(net, [], 2, {}).gathered == 4 * sum(p.numel() for p in net.parameters())


def test_states_that_are_not_shaped_as_the_parameter_are_whole() -> None:
    layer = nn.Linear(6, 5, bias=False)
    factored = torch.optim.Adafactor(layer.parameters())
    memory = memory_per_rank(layer, [], 2, optimizer_state([factored]))
    assert memory.parameters == memory.gradients == 3 * 6 * 4
    assert memory.optimizer == 4 * (5 + 6 + 1)  # row and column means, a step


def test_layouts_agree_with_their_sizes() -> None:
    layer = nn.Linear(8, 16)
    whole = memory_per_rank(layer, [], 1, {})
    assert whole.total == 2 * 4 * (8 * 16 + 16)
    assert (
        memory_per_rank(copy.deepcopy(layer), [], Layout(data=8, replicate=2).data // 2, {}).parameters
        == whole.parameters // 4
    )
