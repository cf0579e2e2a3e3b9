"""What the ranks of a run come to, and when: written by them, read by who started them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

STRUCK_AFTER = 7  # steps

Moment = tuple[float, int, str]


class Moments(Callback):
    """Writes down what rank 0 comes to, and strikes rank 1."""

    def __init__(self, folder: Path, signum: int, count: int, last: int) -> None:
        self.folder, self.signum, self.count, self.last = folder, signum, count, last
        self.attempt, self.rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
        self.steps = 0
        self.note("script")

    def note(self, what: str) -> None:
        if self.rank == 0 or what == "struck":
            with (self.folder / "moments").open("a") as file:
                file.write(json.dumps([time.monotonic(), self.attempt, what]) + "\n")

    def on_train_start(self, *_: Any) -> None:
        self.note("loaded")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps += 1
        if self.steps == 1:
            self.note("step")
        if self.steps == self.last:
            trainer.should_stop = True
        if self.steps != STRUCK_AFTER or self.rank != 1:
            return
        if (self.folder / "moments").read_text().count("struck") < self.count:
            self.note("struck")
            os.kill(os.getpid(), self.signum)


def read(moments: Path) -> list[Moment]:
    """What ranks have written; the last line may not be whole yet."""
    lines = moments.read_text().split("\n")[:-1] if moments.exists() else []
    return [tuple(json.loads(line)) for line in lines]
