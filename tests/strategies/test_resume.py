"""Stopped in the middle of an epoch on one layout, resumed on another: the losses of the run that wasn't stopped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from lightning_bharat.commands import checkpoint as commands
from lightning_bharat.plan.layout import Layout
from tests.ranks import RanksFailed, run_ranks

ROWS, BATCH, STOP, END = 48, 8, 4, 9  # 6 batches an epoch; stopped in the first, ended in the second
LAYOUTS = {"one": Layout(), "data": Layout(data=2), "tensor": Layout(tensor=2), "both": Layout(data=2, tensor=2)}
STAGED = {
    "pipeline": Layout(pipeline=2),
    "data × pipeline": Layout(data=2, pipeline=2),
    "tensor × pipeline": Layout(tensor=2, pipeline=2),
}


class Block(nn.Module):
    """As a person writes it: fused qkv, ``self.heads``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        q, k, v = (t.view(batch, time, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, time, -1))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


class Gpt(L.LightningModule):
    def __init__(self, vocabulary: int = 32, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(12, width) * 0.1)
        self.blocks = nn.ModuleList([Block(width, 4) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.losses: list[float] = []

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        loss = cross_entropy(self(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        self.log("loss", loss, sync_dist=True, prog_bar=False)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.losses.append(float(self.trainer.callback_metrics["loss"]))

    def configure_optimizers(self) -> Any:
        decay = [p for p in self.parameters() if p.ndim > 1]
        rest = [p for p in self.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest}], lr=0.02)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> Rows:
        return Rows(**(self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}))


class Rows:
    """Batches of :data:`BATCH` rows over all data ranks, in an order that depends on the epoch; knows its position."""

    def __init__(self, num_replicas: int, rank: int) -> None:
        self.ranks, self.rank = num_replicas, rank
        self.rows = torch.randint(32, (ROWS, 10), generator=torch.Generator().manual_seed(0))
        self.epoch, self.at = -1, 0
        self.resumed = False

    def __len__(self) -> int:
        return ROWS // BATCH

    def __iter__(self) -> Iterator[Tensor]:
        if not self.resumed:
            self.epoch, self.at = self.epoch + 1, 0
        self.resumed = False
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(self.epoch))
        while self.at < len(self):
            batch = order[self.at * BATCH : (self.at + 1) * BATCH]
            self.at += 1
            yield self.rows[batch[self.rank :: self.ranks]]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.at, self.resumed = state["epoch"], state["at"], True


def fit(
    layout: Layout,
    folder: str,
    ckpt: str | None = None,
    sharded: bool = True,
    steps: int = END,
    plain: bool = False,
    width: int = 16,
) -> list[float]:
    """Train for ``steps`` steps, saving after :data:`STOP`; the losses of all steps."""
    from lightning_bharat.strategies.hybrid import HybridStrategy

    L.seed_everything(1, verbose=False)
    module = Gpt(width=width)
    if plain:
        module.double()  # Lightning loads a checkpoint before it makes the module float64, and would lose bits
    keep: Callback = ModelCheckpoint(folder, "{step}", every_n_train_steps=STOP, save_top_k=-1)
    hybrid = HybridStrategy(layout.data, layout.tensor, layout.pipeline, save_distributed_checkpoint=sharded)
    trainer = L.Trainer(
        strategy="auto" if plain else hybrid,
        devices=int(os.environ["WORLD_SIZE"]),
        accelerator="cpu",
        precision="64-true",
        max_steps=steps,
        gradient_clip_val=0.5,
        callbacks=[keep],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=ckpt)
    return module.losses


PAIRS = [
    ("data", "tensor"),
    ("both", "one"),
    ("one", "both"),
    ("tensor", "data"),
    ("pipeline", "one"),
    ("data", "pipeline"),
    ("tensor × pipeline", "both"),
    ("both", "data × pipeline"),
    ("data × pipeline", "tensor × pipeline"),
    ("pipeline", "pipeline"),
]
PLAIN = "plain Lightning"
# What is saved in the middle: the layout and whether each rank writes its part. All on as many ranks in one start.
SAVED: dict[str, tuple[str, bool]] = {
    **{name: (name, True) for name in (*LAYOUTS, *STAGED)},
    **{f"{name}, gathered": (name, False) for name in ("both", "tensor × pipeline")},
    PLAIN: (PLAIN, True),
}
# What is resumed, and on which layout.
RESUMED: list[tuple[str, str]] = [
    *PAIRS,
    (PLAIN, "both"),
    *((first, then) for first in SAVED if first.endswith("gathered") for then in (PLAIN, "data")),
]


def layout(name: str) -> Layout:
    return {**LAYOUTS, **STAGED, PLAIN: Layout()}[name]


def fits(jobs: dict[Any, dict[str, Any]]) -> dict[Any, list[float]]:
    return {key: fit(**options) for key, options in jobs.items()}


@cache
def saved(ranks: int, folder: Path) -> list[dict[str, list[float]]]:
    """Losses up to the checkpoint that each of :data:`SAVED` leaves in ``folder / name``, and of a whole run."""
    jobs = {
        name: {
            "layout": layout(on),
            "folder": str(folder / name),
            "sharded": sharded,
            "steps": STOP,
            "plain": on == PLAIN,
        }
        for name, (on, sharded) in SAVED.items()
        if layout(on).devices == ranks
    }
    if ranks == 1:
        jobs["whole"] = {"layout": Layout(), "folder": str(folder / "whole"), "plain": True}
    return run_ranks(fits, ranks, jobs, timeout=60)


@cache
def resumed(ranks: int, folder: Path) -> list[dict[tuple[str, str], list[float]]]:
    """Losses from there on of each of :data:`RESUMED`."""
    jobs = {
        (first, then): {
            "layout": layout(then),
            "folder": str(folder / f"{first} to {then}"),
            "ckpt": checkpoint(first, folder),
            "plain": then == PLAIN,
        }
        for first, then in RESUMED
        if layout(then).devices == ranks
    }
    return run_ranks(fits, ranks, jobs, timeout=60)


def checkpoint(name: str, folder: Path) -> str:
    saved(layout(SAVED[name][0]).devices, folder)
    return str(folder / name / f"step={STOP}.ckpt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[float]:
    """Losses of plain Lightning on one process, not stopped."""
    losses = saved(1, folder)[0]["whole"]
    assert len(losses) == END
    assert losses[-1] < losses[0]
    return losses


@pytest.mark.parametrize("name", SAVED)
def test_saving_changes_no_loss(folder: Path, whole: list[float], name: str) -> None:
    path, (on, sharded) = Path(checkpoint(name, folder)), SAVED[name]
    assert path.is_dir() == (sharded and on != PLAIN) and path.exists()
    for losses in saved(layout(on).devices, folder):
        assert losses[name] == pytest.approx(whole[:STOP], abs=1e-9)


@pytest.mark.parametrize(("first", "then"), RESUMED)
def test_resumed_on_another_layout(folder: Path, whole: list[float], first: str, then: str) -> None:
    for losses in resumed(layout(then).devices, folder):
        assert losses[first, then] == pytest.approx(whole[STOP:], abs=1e-9)


def test_a_gathered_ckpt_is_lightning_s(folder: Path) -> None:
    for name in SAVED:
        if name.endswith("gathered"):
            assert Gpt.load_from_checkpoint(checkpoint(name, folder)).hparams.width == 16


def test_another_model_s_checkpoint_ends_all_ranks_with_names(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(fit, 2, LAYOUTS["tensor"], str(tmp_path), checkpoint("data", folder), True, END, False, 24)
    for outcome in failed.value.outcomes:
        assert "checkpoint of another model" in outcome.message
        assert "blocks.0.down.bias is [16] in the checkpoint and [24] here" in outcome.message
        assert outcome.seconds < 25


def test_a_sharded_checkpoint_is_exported(folder: Path, tmp_path: Path) -> None:
    path = Path(checkpoint("both", folder))
    commands.export(path, tmp_path / "out")
    commands.convert(path, tmp_path / "whole.ckpt")
    module = Gpt().double()
    module.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    plain = Gpt.load_from_checkpoint(tmp_path / "whole.ckpt").double()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=0, atol=1e-6)
