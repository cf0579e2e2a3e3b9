"""A LightningCLI project as a person has it: a package with a module and a datamodule, and a config."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

_MODULE = """
import lightning as L
import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = dropout

    def forward(self, x):
        h = F.gelu(self.up(self.norm(x)))
        return x + F.dropout(self.down(h), self.dropout, self.training)


class Model(L.LightningModule):
    def __init__(self, width: int = 8, depth: int = 2, dropout: float = 0.0, broken: bool = False):
        super().__init__()
        self.save_hyperparameters()
        self.embed, self.blocks = nn.Linear(4, width), nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.head = nn.Linear(width, 1)
        self.broken = broken

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).squeeze(-1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.mse_loss(self(x), y)
        if self.broken and torch.distributed.is_initialized():
            loss = loss * (1 + 1e-3 * torch.distributed.get_rank())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.mse_loss(self(batch[0]), batch[1]), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.mse_loss(self(batch[0]), batch[1]), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Buggy(Model):
    def training_step(self, batch, batch_idx):
        raise ValueError("a bug of its own")


class Huge(Model):
    def __init__(self):
        super().__init__()
        self.embed.unused = nn.Linear(10_000_000, 12_500_000, bias=False)


class OnMetaImpossible(Model):
    def __init__(self):
        super().__init__()
        self.rates = torch.arange(3.0).tolist()
"""

_DATA = """
import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset


class Data(L.LightningDataModule):
    def __init__(self, size: int = 32, batch_size: int = 4):
        super().__init__()
        x = torch.randn(size, 4, generator=torch.Generator().manual_seed(1))
        self.dataset, self.batch_size = TensorDataset(x, x.sum(-1)), batch_size

    def train_dataloader(self):
        return DataLoader(self.dataset, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.dataset, batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader
"""

_numbers = count()

QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


class Project:
    """Its folder, which is the working directory, and the words that name its classes."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.package = folder, f"project{next(_numbers)}"  # one name a test: modules stay imported
        (folder / self.package).mkdir()
        (folder / self.package / "model.py").write_text(_MODULE)
        (folder / self.package / "data.py").write_text(_DATA)
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(folder)

    @property
    def classes(self) -> list[str]:
        return ["--model", f"{self.package}.model.Model", "--data", f"{self.package}.data.Data"]
