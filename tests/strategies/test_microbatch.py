"""What of a batch is split, and what the first batch shows of that."""

from __future__ import annotations

import doctest
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bharat import HybridStrategy
from lightning_bharat.strategies import microbatch
from lightning_bharat.strategies.microbatch import MicrobatchError, batch_size, doubt, split
from tests.ranks import RanksFailed, run_ranks


def test_docstrings_are_true() -> None:
    assert doctest.testmod(microbatch).failed == 0


def test_what_is_as_long_as_the_batch_is_split() -> None:
    batch = {"x": torch.arange(12).view(6, 2), "names": [*"abcdef"], "scale": torch.ones(()), "table": torch.ones(3, 2)}
    parts = split((batch, 5), 3)
    assert len(parts) == 3
    for i, (part, number) in enumerate(parts):
        assert number == 5 and part["scale"] is batch["scale"] and part["table"] is batch["table"]
        assert torch.equal(part["x"], batch["x"][2 * i : 2 * i + 2])
        assert part["names"] == batch["names"][2 * i : 2 * i + 2]
    assert split(batch, 1)[0] is batch


def test_a_batch_without_samples() -> None:
    with pytest.raises(MicrobatchError, match="no tensor with a batch dimension"):
        batch_size({"scale": torch.ones(()), "many": 3})


def test_doubt() -> None:
    assert not doubt({"x": torch.ones(4, 8), "y": torch.ones(4)})
    assert "[8, 8] and one of [8]" in doubt({"x": torch.ones(8, 8), "y": torch.ones(8)})


class Weighted(L.LightningModule):
    """Weighs channels (``by="channel"``) or rows of a batch of as many of both."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, weights = batch
        x = x * (weights if self.by == "channel" else weights[:, None])
        for layer in self.layers:
            x = layer(x)
        self.log("loss", loss := x.square().mean())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def _fit(by: str, stages: int) -> float:
    L.seed_everything(1, verbose=False)
    batch = torch.rand(8, 8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    strategy = HybridStrategy(pipeline_parallel_size=2) if stages > 1 else "auto"
    trainer = L.Trainer(
        strategy=strategy, devices=stages, accelerator="cpu", max_steps=3, precision="64-true", **options
    )
    trainer.fit(Weighted(by), DataLoader([batch] * 3, batch_size=None))
    return float(trainer.callback_metrics["loss"])


def test_as_many_rows_as_channels() -> None:
    expected = run_ranks(_fit, 1, "row", 1)[0]
    assert run_ranks(_fit, 2, "row", 2) == [pytest.approx(expected, rel=1e-12)] * 2
    with pytest.raises(RanksFailed, match=r"on a part of a batch: .*which was split with it"):
        run_ranks(_fit, 2, "channel", 2)
