"""A loader that reads files, with workers by DataLoaderTuner and as it is."""

from __future__ import annotations

import os
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.paired import Interval, is_void, orders, paired_ratio
from lightning_bharat.callbacks import DataLoaderTuner

SAMPLES, SIDE, BATCH, EPOCHS = 160, 256, 8, 6
STEP_SECONDS = 0.03  # of the device
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Pictures(Dataset[Tensor]):
    """Compressed files of one picture each; a sample is its middle as floats."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        pixels = np.frombuffer(zlib.decompress(self.files[index].read_bytes()), dtype=np.uint8)
        picture = pixels.reshape(SIDE, SIDE, 3)[16:-16, 16:-16].astype(np.float32)
        return torch.from_numpy((picture - picture.mean()) / (picture.std() + 1)).mean((0, 1))


def write_pictures(folder: Path) -> None:
    """Smooth noise, which zlib packs to about a third."""
    draw = np.random.default_rng(0)
    for number in range(SAMPLES):
        pixels = np.cumsum(draw.integers(0, 3, (SIDE, SIDE, 3)), axis=1).astype(np.uint8)
        (folder / f"{number:04}.z").write_bytes(zlib.compress(pixels.tobytes(), level=1))


class Device(L.LightningModule):
    """A step takes as long as the device does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch: Tensor) -> Tensor:
        time.sleep(STEP_SECONDS)
        return self.layer(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class Epochs(L.Callback):
    """Seconds of a step in each epoch, with all that is between its first and its last."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._ends = time.perf_counter()

    def on_train_start(self, *_: Any) -> None:
        self._ends = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        now = time.perf_counter()
        self.seconds.append((now - self._ends) / trainer.num_training_batches)
        self._ends = now


@dataclass(frozen=True)
class Run:
    """Of one fit: seconds of a step in the last epoch, the share of its waiting in the first and the last, and the
    setting that it ended with."""

    step: float
    wait_before: float
    wait_after: float
    workers: int
    prefetch_factor: int | None


def fit(folder: Path, tunes: bool) -> Run:
    """Train for some epochs."""
    tuner, epochs, shares = DataLoaderTuner(0.02 if tunes else 1.0), Epochs(), []
    loader = DataLoader(Pictures(folder), batch_size=BATCH, shuffle=True)

    class Shares(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            shares.append(float(trainer.callback_metrics["input_wait"]))

    # One number an epoch: the steps of a window of the log are those of the epoch.
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=1,
        callbacks=[tuner, epochs, Shares()],
        log_every_n_steps=SAMPLES // BATCH,
        default_root_dir=tempfile.gettempdir(),
        **QUIET,
    )
    trainer.fit(Device(), loader)
    return Run(epochs.seconds[-1], shares[0], shares[-1], loader.num_workers, loader.prefetch_factor)


@dataclass(frozen=True)
class Result:
    """Medians over rounds, and ratios of a step's time."""

    rounds: int
    cores: int
    default_ms: float
    tuned_ms: float
    wait_before: float
    wait_after: float
    ratio: Interval
    null: Interval

    @property
    def verdict(self) -> str:
        """``"met"``, ``"missed"`` or ``"void"``."""
        return "void" if is_void(self.null) else "met" if self.ratio.high < 1 else "missed"


def workers(rounds: int) -> tuple[Result, list[Run]]:
    """Measure the tuner."""
    runs: dict[str, list[Run]] = {"default": [], "tuned": [], "null": []}
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder))
        for order in orders(list(runs), rounds):
            for name in order:
                runs[name].append(fit(Path(folder), name == "tuned"))
    steps = {name: [run.step for run in each] for name, each in runs.items()}
    tuned = runs["tuned"]
    return Result(
        rounds,
        len(os.sched_getaffinity(0)),
        1e3 * median(steps["default"]),
        1e3 * median(steps["tuned"]),
        median(run.wait_before for run in tuned),
        median(run.wait_after for run in tuned),
        paired_ratio(steps["tuned"], steps["default"]),
        paired_ratio(steps["null"], steps["default"]),
    ), tuned
