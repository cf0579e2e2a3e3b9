"""The first batch after a resume has the loss that followed the checkpoint, or a warning says that it has not."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_bharat import events
from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.strategies.first_loss import LOSSES
from tests.ranks import run_ranks


class Module(L.LightningModule):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.part, self.slope = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), slope

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (self.part(batch) - self.slope * batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: str, steps: int, ckpt: str | None = None, slope: float = 1.0) -> list[str]:
    """Train, saving after each second step; the warnings about a first loss."""
    from lightning_bharat.strategies.hybrid import HybridStrategy

    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(
        strategy=HybridStrategy(),
        devices=int(os.environ["WORLD_SIZE"]),
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(f"{folder}/kept", "{step}", every_n_train_steps=2, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data: Any = torch.utils.data.DataLoader(torch.linspace(0, 1, 160).view(40, 4), 2, shuffle=True)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.fit(Module(slope), data, ckpt_path=ckpt)
    return [str(w.message) for w in found if "The first batch after checkpoint" in str(w.message)]


def test_another_program_is_found_by_its_first_loss(tmp_path: Path) -> None:
    run, again, other = (str(tmp_path / name) for name in ("run", "run/again", "run/other"))
    checkpoint = str(tmp_path / "run" / "kept" / "step=2.ckpt")
    run_ranks(fit, 2, run, 5)
    assert len((tmp_path / "run" / "kept" / LOSSES).read_text().splitlines()) == 2
    assert run_ranks(fit, 2, again, 5, checkpoint) == [[], []]
    assert events.read(Path(again)) == []
    (warned, _) = run_ranks(fit, 2, other, 5, checkpoint, 0.9)
    (told,) = [event for event in events.read(Path(other)) if event["kind"] == "other_loss"]
    assert len(warned) == 1 and repr(told["loss"]) in warned[0] and told["checkpoint"] in warned[0]
    assert run_ranks(fit, 1, str(tmp_path / "run" / "one"), 3, checkpoint) == [[]], "other rows on another layout"

    first, second = (Manifest.read(tmp_path / "run" / "kept" / f"step={n}.ckpt") for n in (2, 4))
    assert len(first.id) == 32 and first.parent == "" and second.parent == first.id
    assert (first.samples, second.samples) == (8, 16) and first.loss is not None
    assert (first.epoch, first.batch, second.batch) == (0, 2, 4)
    continued = Manifest.read(tmp_path / "run" / "again" / "kept" / "step=4.ckpt")
    assert continued.parent == first.id and continued.id != second.id
    assert continued.loss == pytest.approx(second.loss, abs=0)
