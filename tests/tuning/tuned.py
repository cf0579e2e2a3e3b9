"""What the tests tune: a small module with repeated blocks, its rows always in one order, and objectives."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F

from tests.modules import Rows


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Tuned(L.LightningModule):
    """Learns four sums of eight numbers.

    Args:
        trouble: what happens in the third step: ``"error"``, ``"memory"``, ``"nan"``, ``"kill"`` (once, here).
    """

    def __init__(
        self, lr: float = 0.05, width: int = 8, depth: int = 2, trouble: str = "", seconds: float = 0.0
    ) -> None:
        super().__init__()
        self.lr, self.trouble, self.seconds = lr, trouble, seconds
        self.embed, self.blocks = nn.Linear(8, width), nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.mse_loss(self(batch["x"].to(self.dtype)), batch["y"].to(self.dtype))

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        time.sleep(self.seconds)
        if self.trouble and self.global_step == 2:
            self.come_into_trouble()
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def come_into_trouble(self) -> None:
        if self.trouble == "error":
            raise ValueError("a bug of its own")
        if self.trouble == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if self.trouble == "kill" and not (mark := Path("killed")).exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        value = self.loss(batch) * (float("nan") if self.trouble == "nan" else 1.0)
        self.log("val_loss", value, sync_dist=True, batch_size=len(batch["rows"]))
        self.log("size", float(sum(p.numel() for p in self.parameters())))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Data(L.LightningDataModule):
    """Batches of ``batch`` rows over all ranks; with ``data=2`` each of two ranks has its half of each."""

    def __init__(self, batch: int = 8, batches: int = 2, data: int = 1) -> None:
        super().__init__()
        self.batch, self.batches, self.data = batch, batches, data

    def train_dataloader(self) -> Rows:
        assert self.trainer is not None
        rank = self.trainer.global_rank if self.data > 1 else 0
        return Rows("stack", self.batch, self.batches, self.data, rank, False)

    val_dataloader = train_dataloader


def config(folder: Path, **trainer: Any) -> Path:
    """A LightningCLI config of both."""
    import yaml

    options = {
        "model": {"class_path": "tests.tuning.tuned.Tuned"},
        "data": {"class_path": "tests.tuning.tuned.Data"},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "precision": "64-true",
            "max_epochs": 3,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
            **trainer,
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def parabola(trial: Any) -> float:
    return (trial.suggest_float("x", -1, 1) - 0.3) ** 2 + trial.suggest_int("n", 1, 3)


def of_all_ranks(trial: Any) -> float:
    """Each rank's own values, compared by a collective."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    x = trial.suggest_float("x", -1, 1)
    for step in range(4):
        trial.report(x + step, step)
        pruned = trial.should_prune()
        seen: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(seen, (x, trial.suggest_categorical("c", ["a", "b"]), pruned))
        assert len(set(seen)) == 1, seen
        if pruned:
            import optuna

            raise optuna.TrialPruned
    dist.destroy_process_group()
    return x


def of_unlike_ranks(trial: Any) -> float:
    rank = int(os.environ["RANK"])
    return trial.suggest_float("x" if rank == 0 else "y", 0, 1)


def of_a_talkative_rank(trial: Any) -> float:
    trial.suggest_float("x", 0, 1)
    return trial.suggest_float("y", 0, 1) if os.environ["RANK"] == "1" else 0.0


def values_of(study: Any) -> Sequence[Any]:
    return [(t.number, t.state.name, t.value) for t in study.trials]
