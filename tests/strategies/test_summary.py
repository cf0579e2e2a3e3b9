"""ModelSummary shows the module as the person wrote it, with all of its parameters, whatever a rank holds."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelSummary

from lightning_bharat.models import GPTConfig, GPTModule
from lightning_bharat.strategies.hybrid import HybridStrategy
from tests.ranks import run_ranks

CONFIG = GPTConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)


class Kept(ModelSummary):
    """Keeps what it would print."""

    def summarize(self, data: Any, total: int, trained: int, *_: Any, **__: Any) -> None:  # type: ignore[override]
        self.shown = dict(data), total, trained


def shown(tensor: int, lazy: bool, example: bool) -> Any:
    kept = Kept(max_depth=3)
    module = GPTModule(CONFIG, lazy=lazy)
    if example:
        module.example_input_array = torch.zeros(2, 8, dtype=torch.int64)
    rows = torch.arange(36).view(4, 9)
    batches = [{"input_ids": rows[:, :-1], "labels": rows[:, 1:]}]
    trainer = L.Trainer(
        strategy=HybridStrategy(tensor_parallel_size=tensor),
        devices=int(os.environ["WORLD_SIZE"]),
        accelerator="cpu",
        max_steps=1,
        callbacks=[kept],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert ("on meta" in trainer.strategy.choices["weights"]) == lazy
    assert (module.example_input_array is not None) == example
    return kept.shown if trainer.is_global_zero else None


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(("ranks", "tensor"), [(2, 1), (2, 2)])
def test_it_shows_the_whole_module(ranks: int, tensor: int, lazy: bool) -> None:
    whole = GPTModule(CONFIG)
    count = sum(p.numel() for p in whole.parameters())
    table, total, trained = run_ranks(shown, ranks, tensor, lazy, True)[0]
    assert total == trained == count
    types = dict(zip(table["Name"], table["Type"], strict=True))
    assert types["model.embed_tokens"] == "Embedding" and types["model.layers.0"] == "Block"
    assert ("Out sizes" in table) == (not lazy)
