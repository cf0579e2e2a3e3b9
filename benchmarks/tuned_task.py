"""What `benchmarks.tuning` tunes: a small network, as a config for us and as an objective for others, and its moments.

Moments are lines of a file that the environment names: when a study asked and told, and when a trial took its first
step. The clock is one for all processes of the machine.
"""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

MOMENTS = "BHARAT_BENCHMARK_MOMENTS"  # variable with the file's name
LOW, HIGH = 1e-3, 0.3  # of the learning rate, on a logarithmic scale
SEED = 11  # of data and first weights
_BATCH, _BATCHES = 64, 250  # rows of a step, steps of an epoch
_QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Net(L.LightningModule):
    """A network of three layers that is to guess the largest of eight sums."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.global_step == 0:
            note("step")
        return F.cross_entropy(self.layers(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.layers(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class Rows(L.LightningDataModule):
    """Rows drawn from a seed, the last batch for validation."""

    def setup(self, stage: str) -> None:
        draw = torch.Generator().manual_seed(SEED)
        x = torch.randn(_BATCH * (_BATCHES + 1), 64, generator=draw)
        self.rows = x, (x @ torch.randn(64, 8, generator=draw)).argmax(1)
        self.cut = _BATCH * _BATCHES

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*(each[: self.cut] for each in self.rows)), _BATCH, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*(each[self.cut :] for each in self.rows)), _BATCH)


def config(folder: Path, epochs: int) -> Path:
    """Write the config of a fit; 0 epochs: it ends after four steps."""
    options = {
        "seed_everything": SEED,
        "model": {"class_path": "benchmarks.tuned_task.Net"},
        "data": {"class_path": "benchmarks.tuned_task.Rows"},
        "trainer": {**_QUIET, **_length(epochs)},
    }
    path = folder / f"epochs-{epochs}.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def fit(lr: float, epochs: int) -> float:
    """The same fit in this process; its last ``val_loss``."""
    L.seed_everything(SEED, verbose=False)
    trainer = L.Trainer(**_QUIET, **_length(epochs))
    trainer.fit(Net(lr), datamodule=Rows())
    return float(trainer.callback_metrics["val_loss"])


def _length(epochs: int) -> dict[str, Any]:
    return {"max_epochs": epochs} if epochs else {"max_epochs": 1, "limit_train_batches": 4}


def note(what: str) -> None:
    """That it is now."""
    file = os.open(os.environ[MOMENTS], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, json.dumps([time.monotonic(), what]).encode() + b"\n")
    os.close(file)


def moments(path: Path, what: str) -> list[float]:
    """When it was, in order."""
    lines = map(json.loads, path.read_text().splitlines())
    return sorted(at for at, each in lines if each == what)


def quiet() -> None:
    """No remarks of Lightning's between the lines of a benchmark."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
