"""A run that was stopped and goes on ends with the weights, bit for bit, of one that was not stopped.

Dropout and random augmentation draw in every step, in this process and in workers; a checkpoint is written in the
middle of an epoch, in the middle of a window of accumulated batches, during validation and at an epoch's end.
"""

from __future__ import annotations

import os
import random
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import xxhash
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from lightning_bharat.datamodules import TokenDataModule
from lightning_bharat.strategies.accumulated import GradientError
from tests import modules
from tests.data.texts import write_corpus
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore")

BATCHES, EPOCHS, WINDOW = 4, 3, 2
LOADERS = {"plain": 0, "workers": 2, "litdata": 2, "packed": 0}
# A place to save at: the hook, the epoch, and the batch in it.
PLACES = {
    "middle": ("on_train_batch_end", 1, 1),
    "window": ("on_train_batch_end", 1, 2),
    "validation": ("on_validation_batch_end", 1, 0),
    "validated": ("on_validation_end", 1, None),
    "end": ("on_train_epoch_end", 1, None),
}


class Augmented(Dataset):
    """Rows that are another number each time that they are read, by all three generators."""

    def __len__(self) -> int:
        return 67

    def __getitem__(self, index: int) -> Tensor:
        noise = torch.randn(8) + float(np.random.random()) + random.random()
        return torch.full((8,), index / 67) + 0.1 * noise


class Module(L.LightningModule):
    def __init__(self, loader: str, folder: str, dropout: float) -> None:
        super().__init__()
        self.loader, self.folder = loader, folder
        self.first = nn.Embedding(400, 8) if loader == "packed" else nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Dropout(dropout), nn.GELU()) for _ in range(2)])
        self.head = nn.Linear(8, 8)
        self.mean = MeanMetric()

    def loss(self, batch: Any) -> Tensor:
        x = batch["input_ids"] if isinstance(batch, dict) else batch
        h = self.first(x)
        for block in self.blocks:
            h = h + block(h)
        return (self.head(h) - (1.0 if isinstance(batch, dict) else x)).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.mean(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("own", loss, on_step=False, on_epoch=True)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        if self.loader == "packed":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.7, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val"}}
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> Any:
        workers = LOADERS[self.loader]
        if self.loader == "litdata":
            from litdata import StreamingDataLoader, StreamingDataset

            rows = StreamingDataset(f"{self.folder}/rows", shuffle=True, seed=3, drop_last=True)
            return StreamingDataLoader(rows, batch_size=4, num_workers=workers)
        return DataLoader(Augmented(), 4, shuffle=True, num_workers=workers)

    def val_dataloader(self) -> Any:
        return DataLoader(torch.linspace(0, 1, 8 * 24).view(24, 8), 4)


class Logged(DummyLogger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, metrics))


class SaveAt(L.Callback):
    """Saves at :data:`PLACES`, each once."""

    def __init__(self, folder: Path) -> None:
        for hook in {hook for hook, *_ in PLACES.values()}:
            setattr(self, hook, self._saver(hook, folder))

    def _saver(self, hook: str, folder: Path) -> Any:
        def save(trainer: L.Trainer, module: Any, outputs: Any = None, batch: Any = None, index: Any = None, *_: Any):
            for name, place in PLACES.items():
                if place == (hook, trainer.current_epoch, index) and not trainer.sanity_checking:
                    trainer.save_checkpoint(folder / name)

        return save


def in_precision(precision: str) -> dict[str, Any]:
    """Arguments of a Trainer. On the CPU Lightning takes bfloat16 for "16-mixed", unless it is given as a plugin."""
    if precision != "16-mixed":
        return {"precision": precision}
    scaler = torch.amp.GradScaler("cpu", 2.0**20, growth_interval=2)  # at first too much for float16: steps are skipped
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def fit(loader: str, precision: str, folder: str, ckpt: str | None, dropout: float = 0.3) -> dict[str, Any]:
    """Train, saving at :data:`PLACES` or going on from ``ckpt``; the digest of the weights, what was logged."""
    from lightning_bharat.strategies.hybrid import HybridStrategy

    L.seed_everything(1, workers=True, verbose=False)
    by_steps = precision == "bf16-mixed"  # Lightning goes on in another way where it counts steps
    module, logger, ranks = Module(loader, folder, dropout), Logged(), int(os.environ["WORLD_SIZE"])
    trainer = L.Trainer(
        strategy=HybridStrategy(checkpoint_compression="zstd" if by_steps else None),
        devices=ranks,
        accelerator="cpu",
        **in_precision(precision),
        max_epochs=-1 if by_steps else EPOCHS,
        max_steps=EPOCHS * BATCHES // WINDOW if by_steps else -1,
        limit_train_batches=BATCHES,
        limit_val_batches=2,
        accumulate_grad_batches=WINDOW,
        gradient_clip_val=0.5,
        callbacks=[] if ckpt else [SaveAt(saved_in(folder, loader, precision, ranks, dropout))],
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TokenDataModule(f"{folder}/prepared", sequence_length=16, batch_size=8 // ranks, val_fraction=0.2)
    trainer.fit(module, data if loader == "packed" else None, ckpt_path=ckpt)
    seen = xxhash.xxh3_64()
    for _, value in sorted(trainer.strategy.lightning_module_state_dict().items()):
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        seen.update(whole.detach().contiguous().view(torch.uint8).numpy().data)
    return {"weights": seen.hexdigest(), "logged": logger.rows, "step": trainer.global_step}


def saved_in(folder: Any, loader: str, precision: str, ranks: int, dropout: float = 0.3) -> Path:
    return Path(folder, f"{loader} {precision} {ranks} {dropout}")


def fits(folder: str, jobs: list[tuple[str, str]]) -> dict[Any, Any]:
    """Of each job the run that was not stopped, and one from each place."""
    found, ranks = {}, int(os.environ["WORLD_SIZE"])
    for job in jobs:
        found[(*job, None)] = fit(*job, folder, None)
        for place in PLACES:
            found[(*job, place)] = fit(*job, folder, str(saved_in(folder, *job, ranks) / place))
    return found


def write_rows(folder: Path) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder / "rows"), chunk_bytes=600)
    for i in range(90):
        writer[i] = torch.full((8,), i / 90)
    writer.done()
    writer.merge()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exact")
    write_corpus(folder / "texts.jsonl", count=90)
    TokenDataModule(folder / "prepared", str(folder / "texts.jsonl"), vocab_size=400, val_fraction=0.2).prepare_data()
    write_rows(folder)
    return folder


@cache
def found(ranks: int, precision: str, folder: Path) -> list[dict[Any, Any]]:
    jobs = [case[1:] for case in CASES if case[0] == ranks and case[2] == precision]
    return run_ranks(fits, ranks, str(folder), jobs, timeout=110)


CASES = [(2, loader, precision) for loader in LOADERS for precision in ("32-true", "bf16-mixed")]
CASES += [(2, "plain", "16-mixed")]
CASES += [(1, loader, "32-true") for loader in ("plain", "litdata")]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("ranks", "loader", "precision"), CASES)
def test_the_run_that_was_not_stopped(ranks: int, loader: str, precision: str, place: str, folder: Path) -> None:
    for of_rank in found(ranks, precision, folder):
        whole, resumed = of_rank[loader, precision, None], of_rank[loader, precision, place]
        assert resumed["step"] == whole["step"] == EPOCHS * BATCHES // WINDOW
        assert resumed["weights"] == whole["weights"]
        assert resumed["logged"] == whole["logged"][-len(resumed["logged"]) :]


def test_in_the_middle_of_a_window_on_another_number_of_data_ranks(folder: Path) -> None:
    args = ("packed", "32-true", str(folder))
    (one,), two = run_ranks(fit, 1, *args, None, 0.0), run_ranks(fit, 2, *args, None, 0.0)
    for before, after, whole in [(2, 1, one), (1, 2, two[0])]:
        place = str(saved_in(folder, *args[:2], before, 0.0) / "window")
        resumed = run_ranks(fit, after, *args, place, 0.0)[0]["logged"]
        for (step, row), (same_step, expected) in zip(resumed, whole["logged"][-len(resumed) :], strict=True):
            row = {name: value for name, value in row.items() if name not in ("mean", "own")}  # of other ranks
            assert step == same_step and row == pytest.approx({name: expected[name] for name in row}, rel=1e-4)


WITHOUT_GRADIENTS: dict[str, dict[str, Any]] = {
    "stages of a pipeline have others": {"pipeline_parallel_size": 2},
    "token_weighted=True weighs them with the next ones": {"token_weighted": True},
    "a plain .ckpt has none": {"save_distributed_checkpoint": False},
}


class SaveInWindow(L.Callback):
    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if index == 2:
            trainer.save_checkpoint(self.path)


def saved_in_window_and_resumed(folder: str) -> list[str]:
    """What is said to each of :data:`WITHOUT_GRADIENTS`."""
    said = []
    for number, strategy in enumerate(WITHOUT_GRADIENTS.values()):
        path = f"{folder}/{number}.ckpt"
        modules.fit("gpt", strategy, 2, accumulate_grad_batches=2, callbacks=[SaveInWindow(path)])
        with pytest.raises(GradientError) as refused:
            modules.fit("gpt", strategy, 4, ckpt=path, accumulate_grad_batches=2)
        said.append(str(refused.value))
    return said


def test_in_the_middle_of_a_window_without_its_gradients(tmp_path: Path) -> None:
    for said in run_ranks(saved_in_window_and_resumed, 2, str(tmp_path)):
        for why, words in zip(WITHOUT_GRADIENTS, said, strict=True):
            assert words.endswith(
                f"without its gradients: {why}. Go on from one that was written after an optimizer step"
            )
