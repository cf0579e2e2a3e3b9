"""A run that goes on with other data ranks: the same rows in each step, in the same order, by ordinary loaders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from tests.ranks import run_ranks

ROWS, STOP = 48, 4  # of 6 batches of 8 rows


class Module(L.LightningModule):
    """Writes down the rows of each step, and its loss."""

    def __init__(self, batch: int, workers: int = 0, own_sampler: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(2)])
        self.batch, self.workers, self.own_sampler = batch, workers, own_sampler
        self.seen: list[tuple[int, list[int], float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = batch[:, :4]
        for layer in self.layers:
            x = x + layer(x)
        loss = (x - batch[:, :4].roll(1, 1)).square().mean()
        rows = self.all_gather(batch[:, 4]).flatten().long().sort().values
        every = self.trainer.strategy.reduce(loss.detach())
        self.seen.append((batch_idx, rows.tolist(), float(every)))
        return loss

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == 12  # the loader is made before the checkpoint is read
        return torch.optim.AdamW(self.parameters(), lr=0.02)

    def train_dataloader(self) -> Any:
        rows = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        rows[:, 4] = torch.arange(ROWS)
        sampler = None
        if self.own_sampler:
            sampler = DistributedSampler(rows, seed=1, **self.trainer.distributed_sampler_kwargs)  # type: ignore[arg-type]
        return DataLoader(rows, batch_size=self.batch, sampler=sampler, num_workers=self.workers)


def fit(module: Module, folder: str, ckpt: str | None = None, sharded: bool = True) -> list[Any]:
    from lightning_bharat.strategies.hybrid import HybridStrategy

    keep: Any = ModelCheckpoint(folder, "{step}", every_n_train_steps=STOP, save_top_k=-1)
    trainer = L.Trainer(
        strategy=HybridStrategy(save_distributed_checkpoint=sharded),
        devices=int(os.environ["WORLD_SIZE"]),
        accelerator="cpu",
        precision="64-true",
        max_epochs=2,
        callbacks=[keep],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=ckpt)
    return module.seen


def runs(folder: str, batches: dict[str, tuple[int, str | None]]) -> dict[str, Any]:
    """By name, fits with this batch size from this checkpoint; their checkpoints are in ``folder/name``."""
    found = {}
    for name, (batch, ckpt) in batches.items():
        L.seed_everything(1, verbose=False)
        module = Module(batch, workers=2 * ("workers" in name), own_sampler="sampler" in name)
        found[name] = fit(module, f"{folder}/{name}", ckpt and f"{folder}/{ckpt}.ckpt", "plain" not in name)
    return found


def test_the_same_rows_with_other_data_ranks(tmp_path: Path) -> None:
    (one,) = run_ranks(runs, 1, str(tmp_path), {"whole": (8, None), "plain": (8, None)})
    whole = one["whole"]
    assert [rows for _, rows, _ in whole[:6]] != [rows for _, rows, _ in whole[6:]], "another order in each epoch"
    rest = {
        "by itself": (8, "whole/step=4"),  # the batch size of the one rank, as it is in the config
        "of a plain file": (8, "plain/step=4"),
        "as written": (4, "whole/step=4"),  # what keeps it is written there
        "workers": (8, "whole/step=4"),
        "sampler": (8, "whole/step=4"),
    }
    for rank in run_ranks(runs, 2, str(tmp_path), rest, timeout=60):
        for name, seen in rank.items():
            assert [(i, rows) for i, rows, _ in seen] == [(i, rows) for i, rows, _ in whole[STOP:]], name
            assert [loss for *_, loss in seen] == pytest.approx([loss for *_, loss in whole[STOP:]], abs=1e-9), name
    (back,) = run_ranks(runs, 1, str(tmp_path), {"back": (8, "by itself/step=8")})
    assert back["back"] == [(i, rows, pytest.approx(loss, abs=1e-9)) for i, rows, loss in whole[8:]]


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    from lightning_bharat.strategies.global_batch import Batches
    from lightning_bharat.strategies.loaders import LoaderError

    before = Batches(given=8, size=8, data=3)
    assert [before.on(data, 8) for data in (1, 2, 6)] == [24, 12, 4]
    assert before.on(5, 7) == 7, "another size is taken as it is"
    with pytest.raises(LoaderError, match="global batch of 24, can't be divided over 5 data ranks; take 1, 2, 3, 4, 6"):
        before.on(5, 8)
