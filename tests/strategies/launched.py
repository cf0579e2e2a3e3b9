"""What each rank of tests/strategies/test_launch.py runs, in a process that a real launcher has started.

``python launched.py FOLDER DEVICES NODES TENSOR``: each rank writes what it saw to ``FOLDER/RANK.json``, and then its
last rank fails, in words that no line of source has.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from lightning_bharat import HybridStrategy

WORDS = "-".join(["sour", "grapes"])
ROWS, BATCH, STEPS = 16, 4, 3
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Module(L.LightningModule):
    """Keeps the mean loss over data ranks of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = batch
        for layer in self.layers:
            x = layer(x)
        loss = F.mse_loss(x, batch.roll(1, -1))
        self.log("loss", loss, sync_dist=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.losses.append(float(self.trainer.callback_metrics["loss"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-4)


class FailsOnOne(Module):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.global_rank == self.trainer.world_size - 1:
            print(f"failing at {time.monotonic()}", flush=True)
            raise LookupError(WORDS)
        return super().training_step(batch, batch_idx)


def fit(module: Module, strategy: Any, data: int = 1, **options: Any) -> L.Trainer:
    """Each step takes the next rows, a share of them on each data rank."""
    options |= {"accelerator": "cpu", "precision": "64-true", "max_steps": STEPS, "use_distributed_sampler": False}
    trainer = L.Trainer(strategy=strategy, **options, **QUIET)
    rows = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loader() -> DataLoader:
        share = trainer.distributed_sampler_kwargs if data > 1 else {"num_replicas": 1, "rank": 0}
        sampler: Any = DistributedSampler(rows, shuffle=False, **share)  # type: ignore[arg-type]
        return DataLoader(rows, batch_size=BATCH // data, sampler=sampler)  # type: ignore[arg-type]

    module.train_dataloader = loader  # type: ignore[method-assign]
    trainer.fit(module)
    return trainer


def in_one_process() -> list[float]:
    """The losses to compare with."""
    L.seed_everything(3, verbose=False)
    fit(module := Module(), "auto", devices=1)
    return module.losses


def everywhere(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def main(folder: str, devices: int, nodes: int, tensor: int) -> None:
    sizes = {"devices": devices, "num_nodes": nodes}
    strategy: Any = "bharat_hybrid" if tensor == 1 else HybridStrategy(tensor_parallel_size=tensor)
    L.seed_everything(3, verbose=False)
    trainer = fit(module := Module(), strategy, data=devices * nodes // tensor, **sizes)
    strategy = trainer.strategy
    here = {
        "environment": type(strategy.cluster_environment).__name__,
        "rank": trainer.global_rank,
        "local rank": trainer.local_rank,
        "node": trainer.node_rank,
        "name": strategy.layout.name(trainer.global_rank),
        "nodes of tensor peers": everywhere(trainer.node_rank, strategy.device_mesh.get_group("tensor_parallel")),
        "losses": module.losses,
    }
    if nodes > 1:
        here["across"] = across_nodes(devices * nodes, sizes)
    Path(folder, f"{trainer.global_rank}.json").write_text(json.dumps(here))
    fit(FailsOnOne(), HybridStrategy(tensor_parallel_size=tensor), data=devices * nodes // tensor, **sizes)


def across_nodes(tensor: int, sizes: dict[str, int]) -> dict[str, Any]:
    """One tensor rank for each process of all nodes."""
    L.seed_everything(3, verbose=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(module := Module(), HybridStrategy(tensor_parallel_size=tensor), **sizes)
    return {"losses": module.losses, "warnings": [str(w.message) for w in said if "node" in str(w.message)]}


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
