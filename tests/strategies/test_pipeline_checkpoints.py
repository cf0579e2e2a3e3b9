"""Checkpoints of stages: parameters that several of them hold, averages, and buffers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

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
