"""Checkpoints of stages: parameters that several of them hold, averages, and buffers."""

from __future__ import annotations

import time
from functools import cache
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


# Tied embedding and head on both ends; a value that all stages read.
CASES = {f"{module}, {kept}": (module, kept) for module in ("gpt2", "shared") for kept in ("weights", "averages")}
RESUMED = {"pipeline": STAGES, "tensor": {"tensor_parallel_size": 2}}


def _saving(name: str, strategy: dict[str, Any] | None, folder: Path, ckpt: Path | None = None) -> Result:
    module, kept = CASES[name]
    keep = [ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)]
    average = [ours.EMAWeightAveraging(decay=0.8)] if kept == "averages" else []
    ckpt_path = str(ckpt) if ckpt else None
    return fit(module, strategy, 8, enable_checkpointing=True, callbacks=[*keep, *average], ckpt=ckpt_path)


def _save_all(strategy: dict[str, Any] | None, folder: Path) -> dict[str, Result]:
    return {name: _saving(name, strategy, folder / name) for name in CASES}


def _resume_all(folder: Path) -> dict[tuple[str, str], Result]:
    return {
        (name, then): _saving(name, strategy, folder / f"{name}, {then}", folder / name / "step=4.ckpt")
        for name in CASES
        for then, strategy in RESUMED.items()
    }


@cache
def _one_process(folder: Path) -> dict[str, Result]:
    return run_ranks(_save_all, 1, None, folder / "one", timeout=60)[0]


@cache
def _on_stages(folder: Path) -> list[dict[str, Result]]:
    return run_ranks(_save_all, 2, STAGES, folder, timeout=60)


@cache
def _resumed(folder: Path) -> list[dict[tuple[str, str], Result]]:
    return run_ranks(_resume_all, 2, folder, timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


@pytest.mark.parametrize("name", CASES)
def test_resumed_and_exported(folder: Path, tmp_path: Path, name: str) -> None:
    expected = _one_process(folder)[name]
    for found in _on_stages(folder):
        _same_weights(found[name], expected)
    for again in _resumed(folder):
        for then in RESUMED:
            _same_weights(again[name, then], expected)
    commands.export(folder / name / "step=8.ckpt", tmp_path / "out")
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
