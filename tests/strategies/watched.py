"""A small module that keeps what a trainer did with it, and the same scenario on one plain process and on a layout."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_bharat import HybridStrategy
from lightning_bharat.plan.model_plan import ModelPlan
from tests.modules import whole
from tests.plan.models import Stack
from tests.ranks import run_ranks

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data": (2, {}),
    "tensor": (2, {"tensor_parallel_size": 2}),
    "both": (4, {"tensor_parallel_size": 2}),
}
ONE = "one"


class Numbered(Dataset):
    """``count`` rows from the number ``first`` on; a row is made of its number alone."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.first + index
        x = torch.sin(torch.arange(1.0, 9.0, dtype=torch.float64) * (row + 1))
        return {"x": x, "y": x[:4].cos() * 2, "row": torch.tensor(row)}


@dataclass
class Place:
    """Where a scenario runs. Batch sizes are those of all data ranks together, rows come in order."""

    layout: str
    folder: str
    strategy: dict[str, Any] = field(init=False)
    ranks: int = field(init=False)
    plan: ModelPlan | None = None  # found once: seconds of proofs otherwise

    def __post_init__(self) -> None:
        self.ranks, self.strategy = LAYOUTS.get(self.layout, (1, {}))
        tensor = self.strategy.get("tensor_parallel_size", 1)
        self.data, self.data_rank = self.ranks // tensor, int(os.environ["RANK"]) // tensor

    @property
    def is_one(self) -> bool:
        return self.layout == ONE

    def known(self, trainer: L.Trainer) -> None:
        """Trainers from here on use the plan that this one has found."""
        self.plan = None if self.is_one else trainer.strategy.plan  # type: ignore[attr-defined]

    def trainer(self, **options: Any) -> L.Trainer:
        return L.Trainer(
            **{
                "strategy": "auto" if self.is_one else HybridStrategy(**self.strategy, plan=self.plan),
                "accelerator": "cpu",
                "devices": self.ranks,
                "precision": "64-true",
                "max_epochs": 2,
                "logger": False,
                "default_root_dir": self.folder,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                **options,
            }
        )

    def together(self, mine: dict[int, Any]) -> dict[int, Any]:
        """What all data ranks have, in order."""
        everyone: list[Any] = [mine]
        if not self.is_one:
            everyone = [None] * self.ranks
            dist.all_gather_object(everyone, mine)
        return dict(sorted((key, value) for part in everyone for key, value in part.items()))

    def module(self, kind: type[Watched] | None = None, *args: Any) -> Watched:
        L.seed_everything(7, verbose=False)
        return (kind or Watched)(*args)

    def train(self, rows: int = 22, batch: int = 8, first: int = 0) -> DataLoader:
        """Each data rank its share: Lightning would shuffle what it divides itself."""
        dataset = Numbered(rows, first)
        sampler = DistributedSampler(dataset, self.data, self.data_rank, shuffle=False)
        return DataLoader(dataset, batch_size=batch // self.data, sampler=sampler)

    def evaluate(self, rows: int = 14, batch: int = 8, first: int = 100) -> DataLoader:
        """Lightning gives each data rank its share."""
        return DataLoader(Numbered(rows, first), batch_size=batch // self.data)


class Watched(L.LightningModule):
    """Trains a stack of linears.

    Attributes:
        calls: of each step its kind, the epoch, the optimizer steps so far, the loader's number and the rows it saw.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model = Stack()
        self.calls: list[tuple[str, int, int, int, list[int]]] = []

    def parts(self, batch: Any) -> Iterator[dict[str, Tensor]]:
        """The batches of several loaders; ``None`` is one that has ended."""
        if batch is None:
            return
        if isinstance(batch, dict) and "row" in batch:
            yield batch
            return
        for part in batch.values() if isinstance(batch, dict) else batch:
            yield from self.parts(part)

    def note(self, kind: str, batch: Any, loader: int = 0) -> list[dict[str, Tensor]]:
        parts = list(self.parts(batch))
        rows = [int(row) for part in parts for row in part["row"]]
        self.calls.append((kind, self.current_epoch, self.global_step, loader, rows))
        return parts

    def loss(self, parts: list[dict[str, Tensor]]) -> Tensor:
        losses = [F.mse_loss(self.model(p["x"].to(self.dtype)), p["y"].to(self.dtype)) for p in parts]
        return torch.stack(losses).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(self.note("train", batch))
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True, batch_size=self.rows_of_last())
        return loss

    def rows_of_last(self) -> int:
        return len(self.calls[-1][4])

    def evaluate(self, kind: str, batch: Any, loader: int) -> None:
        loss = self.loss(self.note(kind, batch, loader))
        self.log(kind, loss, sync_dist=True, batch_size=self.rows_of_last())

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate("val", batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate("test", batch, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        self.note("predict", batch, dataloader_idx)
        return {"row": batch["row"], "out": self.model(batch["x"].to(self.dtype))}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-4)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


def left(trainer: L.Trainer, module: Watched) -> dict[str, Any]:
    """What can be compared after a run. All ranks must call it."""
    weights = {name: whole(module, name, p) for name, p in module.named_parameters()}
    return {
        "calls": module.calls,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "logged": {name: float(value) for name, value in trainer.logged_metrics.items()},
        "bar": {name: float(value) for name, value in trainer.progress_bar_metrics.items()},
        "counts": (trainer.current_epoch, trainer.global_step),
        "weights": {name: weight.double().norm().item() for name, weight in weights.items()},
    }


Scenario = Callable[[Place], Any]


def play(names: dict[str, Scenario], layout: str, folder: str) -> dict[str, Any]:
    """Run each scenario on the ranks that call it."""
    place = Place(layout, folder)
    return {name: scenario(place) for name, scenario in names.items()}


@cache
def results(where: str, layout: str, folder: str) -> list[dict[str, Any]]:
    """What each rank of ``layout`` found, of all scenarios that the test module ``where`` plays there."""
    ranks = 1 if layout == ONE else LAYOUTS[layout][0]
    return run_ranks(_play_all, ranks, where, layout, folder, timeout=100)


def _play_all(where: str, layout: str, folder: str) -> dict[str, Any]:
    module = import_module(where)
    names = module.PLAYED.get(layout, list(module.SCENARIOS))
    return play({name: module.SCENARIOS[name] for name in names}, layout, folder)


def check(where: str, scenario: str, layout: str, folder: Path) -> None:
    """Compare one of them with one process."""
    (one,) = results(where, ONE, str(folder))
    compare([rank[scenario] for rank in results(where, layout, str(folder))], one[scenario], layout)


def compare(found: list[Any], expected: Any, layout: str) -> None:
    """What ranks have is what one process has; of rows each data rank has its share, tensor peers the same."""
    ranks, strategy = LAYOUTS[layout]
    tensor = strategy.get("tensor_parallel_size", 1)
    for result in found:
        _same(_without(result), _without(expected), "")
    shares = [_calls(result) for result in found]
    for first in range(0, ranks, tensor):
        assert all(shares[first] == peer for peer in shares[first : first + tensor])
    mine = [[rows for *_, rows in share] for share in shares[::tensor]]
    together = [sorted(chain(*parts)) for parts in zip(*mine, strict=True)]
    assert together == [sorted(rows) for *_, rows in _calls(expected)]
    for steps in zip(*mine, strict=True):
        assert len({row for rows in steps for row in rows}) == sum(map(len, steps)), "a row on two data ranks"


def _calls(result: Any) -> list[tuple]:
    """All calls in it, in the order in which they stand there."""
    if isinstance(result, dict):
        return [
            call
            for name, value in result.items()
            for call in (value if name == "calls" else _calls(value) if isinstance(value, (dict, list)) else [])
        ]
    return [call for value in result for call in _calls(value)] if isinstance(result, list) else []


def _without(result: Any) -> Any:
    if isinstance(result, dict):
        return {k: [call[:4] for call in v] if k == "calls" else _without(v) for k, v in result.items()}
    return [_without(value) for value in result] if isinstance(result, list) else result


def _same(found: Any, expected: Any, where: str) -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for name, value in expected.items():
            _same(found[name], value, f"{where}/{name}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), (where, found, expected)
        for i, value in enumerate(expected):
            _same(found[i], value, f"{where}/{i}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12, nan_ok=True), where
    else:
        assert found == expected, where
