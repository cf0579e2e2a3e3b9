"""A small run that writes what each step was like, for faults that end and start its processes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import Callback

from tests.strategies.test_resume import Gpt


class Done(NamedTuple):
    """A step: when, in which start of the run, on how many ranks, and the loss of all their rows."""

    at: float
    start: int
    ranks: int
    step: int
    loss: float


class Steps(Callback):
    """Rank 0 writes each step; then all wait for ``seconds``."""

    def __init__(self, folder: Path, seconds: float = 0.1) -> None:
        self.folder, self.seconds = folder, seconds

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        loss = float(trainer.callback_metrics["loss"])
        if trainer.is_global_zero:
            starts = os.environ.get("SLURM_RESTART_COUNT") or os.environ.get("TORCHELASTIC_RESTART_COUNT") or "0"
            done = Done(time.monotonic(), int(starts), trainer.world_size, trainer.global_step, loss)
            with (self.folder / "steps").open("a") as file:
                file.write(json.dumps(done) + "\n")
        time.sleep(self.seconds)


def steps(folder: Path) -> list[Done]:
    """What :class:`Steps` has written."""
    path = folder / "steps"
    return [Done(*json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def fit(folder: Path, callbacks: list[Callback], steps: int, **options: Any) -> list[float]:
    """The losses of all steps that this process has made; without callbacks it begins anew and saves nothing."""
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        precision="64-true",
        max_steps=steps,
        default_root_dir=folder,
        callbacks=callbacks,
        enable_checkpointing=bool(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    module = Gpt()
    trainer.fit(module, ckpt_path="last" if callbacks else None)
    return module.losses
