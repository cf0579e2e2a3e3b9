"""A module that writes down which sequences it was trained on, and fits of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_bharat.datamodules import TokenDataModule
from tests.data.texts import write_corpus

SEQUENCE = 32


def data(folder: Path, batch_size: int = 8, sequence_length: int = SEQUENCE, **options: Any) -> TokenDataModule:
    """The corpus of the tests, prepared in ``folder``: about 20 steps of 8 sequences."""
    corpus = folder / "texts.jsonl"
    if not corpus.exists():
        write_corpus(corpus, count=90)
    return TokenDataModule(
        folder / "prepared",
        str(corpus),
        vocab_size=400,
        sequence_length=sequence_length,
        batch_size=batch_size,
        **options,
    )


class Recorder(L.LightningModule):
    """One weight; ``seen`` is, for each batch, the epoch, the batch's number in it and the sequences' beginnings."""

    def __init__(self, reads_steps_early: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, int, tuple[tuple[int, ...], ...]]] = []
        self.validated: list[tuple[int, ...]] = []
        self.reads_steps_early = reads_steps_early

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch_idx, beginnings(batch)))
        return self.weight.sum() * batch["labels"].float().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validated.extend(beginnings(batch))
        self.log("labels", batch["labels"].double().mean(), sync_dist=True)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> tuple[tuple[int, ...], ...]:
        return beginnings(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.reads_steps_early:  # as schedules do; Lightning then makes the loader before it loads states
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


def beginnings(batch: dict[str, Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row[:8].tolist()) for row in batch["input_ids"])


def trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(**{"accelerator": "cpu", "max_epochs": 3, "enable_checkpointing": False, **quiet, **options})
