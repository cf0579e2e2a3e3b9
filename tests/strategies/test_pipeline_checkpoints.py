"""Checkpoints of stages: parameters that several of them hold, averages, and buffers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_bharat import callbacks as ours
from lightning_bharat.commands import checkpoint as commands
from tests.modules import Result, fit
from tests.ranks import run_ranks

STAGES = {"pipeline_parallel_size": 2}


def _saving(module: str, strategy: dict[str, Any] | None, folder: str, averaged: bool, ckpt: str | None) -> Result:
    keep = [ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)]
    average = [ours.EMAWeightAveraging(decay=0.8)] if averaged else []
    return fit(module, strategy, 8, enable_checkpointing=True, callbacks=[*keep, *average], ckpt=ckpt)


@pytest.mark.parametrize("module", ["gpt2", "shared"])
@pytest.mark.parametrize("averaged", [False, True], ids=["weights", "averages"])
def test_resumed_and_exported(tmp_path: Path, module: str, averaged: bool) -> None:
    """Tied embedding and head on both ends; a value that all stages read."""
    expected = run_ranks(_saving, 1, module, None, str(tmp_path / "one"), averaged, None)[0]
    for found in run_ranks(_saving, 2, module, STAGES, str(tmp_path / "stages"), averaged, None):
        _same_weights(found, expected)
    path = tmp_path / "stages" / "step=4.ckpt"
    for strategy in (STAGES, {"tensor_parallel_size": 2}):
        for found in run_ranks(_saving, 2, module, strategy, str(tmp_path / "again"), averaged, str(path)):
            _same_weights(found, expected)
    commands.export(tmp_path / "stages" / "step=8.ckpt", tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(value.isnan().any() for value in exported.values())


def _same_weights(found: Result, expected: Result) -> None:
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e-9, msg=name)


class Late(nn.Module):
    """Takes time that no operation shows."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.weight = seconds, nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return x * self.weight


class Dear(L.LightningModule):
    """Its first block takes twice as long as all others together."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Late(0.06 if i == 0 else 0.01) for i in range(4))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x = batch["x"]
        for block in self.blocks:
            x = block(x)
        return x.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def _dear(folder: str, ckpt: str | None) -> str:
    module: Any = Dear()
    module.rows_of = "stack"
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
    made = fit(lambda: module, STAGES, 6 if ckpt else 3, enable_checkpointing=True, callbacks=[keep], ckpt=ckpt)
    return made.explain


def test_a_resumed_run_is_cut_by_what_was_measured(tmp_path: Path) -> None:
    for explain in run_ranks(_dear, 2, str(tmp_path), None):
        assert "schedule 1F1B: blocks 0-1 | 2-3" in explain
    for explain in run_ranks(_dear, 2, str(tmp_path / "again"), str(tmp_path / "step=3.ckpt")):
        assert "schedule 1F1B: blocks 0 (" in explain and "| 1-3 (" in explain
