"""Text files to training, with stages beside it and one after another."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks.input_workers import QUIET, Device
from lightning_bharat.data.tokenizer import train_tokenizer
from lightning_bharat.datamodules import TextDataModule

COPIES, SEQUENCE, ROWS = 8, 128, 64


class Steps(L.Callback):
    """Counts steps, and keeps when the run began, before its first batch was made, and ended, and what steps took."""

    def __init__(self) -> None:
        self.count, self.training, self.began, self.ended = 0, 0.0, 0.0, 0.0

    def setup(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_train_batch_start(self, *_: Any) -> None:
        self._starts = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.ended = time.perf_counter()
        self.training += self.ended - self._starts
        self.count += 1


class Reader(Device):
    """The device's step on a batch of tokens."""

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return super().training_step(batch["input_ids"][:, :3].float())


def write_texts(folder: Path) -> None:
    """Python's help pages in documents of a few paragraphs, over and over, and a tokenizer of them beside."""
    from pydoc_data.topics import topics

    pages = [page[at : at + 2000] for page in topics.values() for at in range(0, len(page), 2000)]
    corpus = folder / "corpus"
    corpus.mkdir()
    for copy in range(COPIES):
        lines = (json.dumps(page[copy:]) for page in pages)
        (corpus / f"{copy:02}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    train_tokenizer(pages, 4096).save(str(folder / "tokenizer.json"))


def drop_tokens(sequence: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """A tenth of the inputs is replaced by the end of text."""
    ids = sequence["input_ids"]
    return {**sequence, "input_ids": ids.masked_fill(torch.rand(len(ids), generator=generator) < 0.1, 0)}


def read(folder: Path, beside: bool) -> tuple[float, dict[str, float]]:
    """Train for an epoch; returns seconds of a step, and each stage's share of the time."""
    data = TextDataModule(
        str(folder / "corpus"),
        str(folder),
        sequence_length=SEQUENCE,
        batch_size=ROWS,
        augment=drop_tokens,
        num_workers=int(beside),
    )
    steps = Steps()
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", devices=1, callbacks=[steps], **QUIET)
    trainer.fit(Reader(), data)
    loader = data._train
    assert loader is not None
    seconds = steps.ended - steps.began
    shares = {name: busy / seconds for name, busy in loader.busy.items()}
    return seconds / steps.count, {**shares, "train": steps.training / seconds}
