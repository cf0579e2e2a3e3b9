"""A running job changes its layout: losses, weights and logged values of the run that didn't."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_bharat.checkpoints.weights import whole_state
from lightning_bharat.plan.layout import Layout, LayoutError
from tests.datamodules.recorder import data as corpus
from tests.ranks import RanksFailed, run_ranks
from tests.strategies.test_resume import Gpt

ROWS = 48
Changes = dict[int, Layout]


class Watched(Gpt):
    """Batches of ``batch`` rows a data rank by an ordinary DataLoader; logs by steps and epochs, and validates.

    Attributes:
        logged: of each epoch what callbacks see at its end.
        frozen: is in no checkpoint of a person's.
    """

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.mean = MeanMetric().set_dtype(torch.float64)
        self.logged: list[dict[str, float]] = []
        self.hooks: list[str] = []
        self.rows = torch.randint(32, (ROWS, 10), generator=torch.Generator().manual_seed(0))
        self.norm.requires_grad_(False)
        torch.nn.init.normal_(self.norm.weight)

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(ids, batch_idx)
        self.log("mean", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log("sum", ids[:, 0].double().sum(), on_step=False, on_epoch=True, sync_dist=True, reduce_fx="sum")
        self.log("most", ids[:, 0].double().max(), on_step=False, on_epoch=True, sync_dist=True, reduce_fx="max")
        self.mean.update(loss.detach(), len(ids))
        self.log("metric", self.mean, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, ids: Tensor, batch_idx: int) -> None:
        self.log("val", self(ids).logsumexp(-1).mean(), sync_dist=True)

    def on_train_epoch_start(self) -> None:
        self.hooks.append("epoch starts")

    def on_validation_end(self) -> None:
        self.hooks.append(f"validated after {self.global_step}")

    def on_train_epoch_end(self) -> None:
        names = ("mean", "sum", "most", "metric", "val")
        metrics = self.trainer.callback_metrics
        self.logged.append({name: float(metrics[name]) for name in names if name in metrics})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        del checkpoint["state_dict"]["norm.weight"]

    @property
    def strict_loading(self) -> bool:
        return False

    def train_dataloader(self) -> Any:
        return DataLoader(self.rows, batch_size=self.batch)

    def val_dataloader(self) -> Any:
        return DataLoader(self.rows[:16], batch_size=4)


class Change(Callback):
    """``changes``: by the number of optimizer steps in which it is asked for."""

    def __init__(self, changes: Changes) -> None:
        self.changes = changes
        self.layouts: list[str] = []
        self.held: list[weakref.ref] = []
        self.left = 0  # parameters of an earlier layout that are still in memory
        self.batches = 0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        strategy: Any = trainer.strategy
        if self.layouts and self.layouts[-1] != str(strategy.layout):
            gc.collect()
            self.left += sum(old() is not None for old in self.held)
        self.held = [weakref.ref(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
        self.layouts.append(str(strategy.layout))
        if layout := self.changes.pop(trainer.global_step, None):
            strategy.relayout(layout)

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["batches"] == self.batches


def fit(
    module: Any, layout: Layout, folder: str, changes: Changes, more: Any = (), data: Any = None, **options: Any
) -> dict[str, Any]:
    from lightning_bharat.strategies.hybrid import HybridStrategy

    change = Change(dict(changes))
    sizes = (layout.data, layout.tensor, layout.pipeline, layout.context, layout.expert)
    trainer = L.Trainer(
        strategy=HybridStrategy(*sizes),
        devices=int(os.environ["WORLD_SIZE"]),
        accelerator="cpu",
        precision="64-true",
        gradient_clip_val=0.5,
        callbacks=[change, *more],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, datamodule=data)
    strategy: Any = trainer.strategy
    state = whole_state(module, strategy.slices, strategy.tensor_group, True, module.state_dict(), strategy.stages)
    weights = {name: value.double().norm().item() for name, value in state.items()}
    assert change.left == 0
    return {"losses": module.losses, "weights": weights, "layouts": change.layouts, "module": vars(module)}


def watched(layout: Layout, folder: str, changes: Changes, accumulate: int = 1) -> dict[str, Any]:
    L.seed_everything(1, verbose=False)
    module = Watched(batch=8 // layout.data)
    options = {"max_epochs": 2, "accumulate_grad_batches": accumulate, "val_check_interval": 2}
    found = fit(module, layout, folder, changes, **options)
    kept = found.pop("module")
    return {**found, "logged": kept["logged"], "hooks": kept["hooks"]}


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-9)
    assert found["weights"] == pytest.approx(expected["weights"], abs=1e-9)
    assert found["hooks"] == expected["hooks"]
    for epoch, wanted in zip(found["logged"], expected["logged"], strict=True):
        assert epoch == pytest.approx(wanted, abs=1e-7)  # torchmetrics rounds to float32 on its way


def test_two_ranks_through_three_layouts(tmp_path: Path) -> None:
    """Losses, weights, means over an epoch and metrics; in the middle of an epoch, where it is validated, and where it
    would end."""
    (whole,) = run_ranks(watched, 1, Layout(), str(tmp_path), {})
    changes = {1: Layout(tensor=2), 3: Layout(pipeline=2), 5: Layout(data=2)}
    for found in run_ranks(watched, 2, Layout(data=2), str(tmp_path), changes, timeout=60):
        same(found, whole)
        names = ["data", "data", "tensor", "tensor", *["pipeline"] * 3, *["data"] * 5]
        assert found["layouts"] == [f"Layout({name}=2)" for name in names]
    assert not list(tmp_path.iterdir())


def test_four_ranks_in_the_middle_of_an_accumulation(tmp_path: Path) -> None:
    (whole,) = run_ranks(watched, 1, Layout(), str(tmp_path), {}, 3)
    changes = {0: Layout(tensor=2, pipeline=2), 2: Layout(data=2, context=2)}
    for found in run_ranks(watched, 4, Layout(data=2, tensor=2), str(tmp_path), changes, 3, timeout=90):
        same(found, whole)
        names = ["data=2, tensor=2"] * 3 + ["tensor=2, pipeline=2"] * 6 + ["data=2, context=2"] * 3
        assert found["layouts"] == [f"Layout({name})" for name in names]


class Words(Gpt):
    """Of a TokenDataModule."""

    def __init__(self) -> None:
        super().__init__(vocabulary=512)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch["input_ids"][:, :10], batch_idx)


def words(layout: Layout, folder: str, changes: Changes) -> list[float]:
    L.seed_everything(1, verbose=False)
    options = {"max_steps": 30, "limit_val_batches": 0, "data": corpus(Path(folder), 8 // layout.data)}
    return fit(Words(), layout, folder, changes, **options)["losses"]


def test_tokens_in_their_order(tmp_path: Path) -> None:
    (whole,) = run_ranks(words, 1, Layout(), str(tmp_path), {}, timeout=60)
    assert len(whole) == 30, "into the second epoch"
    changes = {5: Layout(tensor=2), 18: Layout(data=2)}
    for losses in run_ranks(words, 2, Layout(data=2), str(tmp_path), changes, timeout=60):
        assert losses == pytest.approx(whole, abs=1e-9)


class Asks(Callback):
    """Asks for layouts that can't be, and lets training go on."""

    def __init__(self) -> None:
        self.words: dict[str, str] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        wanted = {
            "ranks": Layout(data=4),
            "differ": Layout(pipeline=2) if trainer.global_rank else Layout(tensor=2),
            "data": Layout(data=2),
        }
        self.words |= {name: self.ask(trainer, layout) for name, layout in wanted.items()}

    def ask(self, trainer: L.Trainer, layout: Layout) -> str:
        strategy: Any = trainer.strategy
        try:
            strategy.relayout(layout)
        except LayoutError as error:
            return str(error)
        return ""


class Unplaced(Watched):
    """Its loader can't say where it is."""

    def train_dataloader(self) -> Any:
        return Loop(self.rows)


class Loop:
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.rows.split(3)


class Twice(Watched):
    """Goes through its blocks twice, which no pipeline does."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions[: ids.shape[1]]
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return self.head(self.norm(x))


def asks(module: type[Watched], folder: str) -> dict[str, str]:
    asked, made = Asks(), module(3)
    fit(made, Layout(tensor=2), folder, {}, more=[asked], max_steps=2)
    assert len(made.losses) == 2
    return asked.words | {"after": asked.ask(made.trainer, Layout(data=2))}


def refusals(folder: str) -> dict[str, str]:
    return asks(Watched, folder) | {"loader": asks(Unplaced, folder)["data"]}


def test_what_can_not_be_is_refused_and_training_goes_on(tmp_path: Path) -> None:
    for words in run_ranks(refusals, 2, str(tmp_path), timeout=60):
        assert "it needs 4 ranks, and this run has 2; write sizes whose product is 2" in words["ranks"]
        assert "ranks ask for Layout(pipeline=2) and Layout(tensor=2)" in words["differ"]
        assert "a global batch of 3, can't be divided over 2 data ranks; take 1, 3 of them" in words["data"]
        assert "Loop has no state_dict and load_state_dict" in words["loader"]
        assert "there is no run of trainer.fit" in words["after"]


def test_a_cut_that_can_not_be_proven_ends_the_run_and_leaves_its_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(go_twice, 2, str(tmp_path), timeout=60)
    (path,) = tmp_path.iterdir()
    for outcome in failed.value.outcomes:
        assert "relayout(Layout(pipeline=2)): " in outcome.message
        assert f"go on from where it was left, in another layout: ckpt_path='{path}'" in outcome.message


def go_twice(folder: str) -> None:
    fit(Twice(4), Layout(data=2), folder, {0: Layout(pipeline=2)}, max_steps=2)
