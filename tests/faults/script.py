"""What each rank of a chaos run trains: ``python script.py FOLDER LAYOUT STEPS FAULTS``, under ``bharat launch``.

A rank that is to fail sends itself the signal, from a thread, some time after it has come to the phase in question: so
the moment is anywhere in the work of that phase.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_bharat import HybridStrategy
from lightning_bharat.callbacks import FaultTolerantCheckpoint
from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.checkpoints.whole import checkpoints_in
from tests.strategies.test_resume import Gpt

SAVE_EVERY = 3  # steps


@dataclass(frozen=True)
class Fault:
    """A signal that a rank gets.

    Attributes:
        attempt: in which.
        rank: which.
        phase: "start-up", "load", "compute" or "save".
        step: of the last two, the one at which it comes.
        delay: seconds after that phase's begin.
        signum: SIGKILL or SIGSTOP.
    """

    attempt: int
    rank: int
    phase: str
    step: int
    delay: float
    signum: int


class Faults(Callback):
    """Lets this rank fail as planned, and writes down what happens."""

    def __init__(self, folder: Path, faults: list[Fault]) -> None:
        self.folder = folder
        self.rank, self.attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        self.mine = [fault for fault in faults if (fault.rank, fault.attempt) == (self.rank, self.attempt)]

    def reach(self, phase: str, step: int = 0) -> None:
        for fault in self.mine:
            if fault.phase == phase and fault.step == step:
                threading.Thread(target=self._strike, args=(fault,), daemon=True).start()

    def _strike(self, fault: Fault) -> None:
        time.sleep(fault.delay)
        self.write("struck", [fault.attempt, fault.rank, fault.phase, fault.signum])
        os.kill(os.getpid(), fault.signum)

    def write(self, name: str, what: Any) -> None:
        """A line, in one call of the kernel."""
        descriptor = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(descriptor, (json.dumps(what) + "\n").encode())
        os.close(descriptor)

    def on_load_checkpoint(self, *_: Any) -> None:
        self.reach("load")

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        if self.rank == 0:
            self.write("begun", [self.attempt, trainer.global_step])

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.reach("compute", trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.rank == 0:
            self.write("losses", [trainer.global_step, float(trainer.callback_metrics["loss"]).hex()])

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self.reach("save", trainer.global_step)


def newest(folder: Path) -> Path | None:
    """Of the checkpoints that have appeared, that of the last step."""
    found = checkpoints_in(folder) if folder.is_dir() else []
    return max(found, key=lambda path: Manifest.read(path).step, default=None)


def main(folder: Path, layout: list[int], steps: int, faults: list[Fault]) -> None:
    watching = Faults(folder, faults)
    watching.reach("start-up")
    saved = newest(folder / "saved")
    if watching.rank == 0:
        watching.write("found", [watching.attempt, Manifest.read(saved).step if saved else 0])
    L.seed_everything(1, verbose=False)
    keep = FaultTolerantCheckpoint(folder / "saved", "{step}", every_n_train_steps=SAVE_EVERY, save_top_k=-1)
    trainer = L.Trainer(
        strategy=HybridStrategy(*layout),
        devices=int(os.environ["WORLD_SIZE"]),
        accelerator="cpu",
        precision="64-true",
        max_steps=steps,
        gradient_clip_val=0.5,
        callbacks=[watching, keep],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Gpt(), ckpt_path="last")
    if watching.rank == 0:
        watching.write("ended", trainer.global_step)


if __name__ == "__main__":
    where, sizes, count, plan = sys.argv[1:]
    main(Path(where), json.loads(sizes), int(count), [Fault(**each) for each in json.loads(plan)])
