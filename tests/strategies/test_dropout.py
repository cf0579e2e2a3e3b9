"""Dropout on each layout: the share it keeps, masks that agree where ranks compute the same, and equal copies."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from tests.modules import PlacedRows, fit
from tests.ranks import run_ranks
from tests.strategies.layouts import Layers
from tests.strategies.odd import OnVectors

WIDTH = 32
RATE = 0.25


class Noisy(nn.Module):
    """A block that drops from its channels, which tensor ranks divide, and from the hidden state, which they share."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, WIDTH), nn.Linear(WIDTH, width)
        self.masks: dict[str, list[Tensor]] = {"inside": [], "hidden": []}

    def drop(self, x: Tensor, where: str) -> Tensor:
        dropped = F.dropout(x, RATE, self.training)
        if self.training and type(x) in (Tensor, DTensor):
            self.masks[where].append((dropped.detach() != 0) | (x.detach() == 0))
        return dropped

    def forward(self, x: Tensor) -> Tensor:
        inside = self.drop(F.softplus(self.up(x)), "inside")
        return x + self.drop(self.down(inside), "hidden")


class Drops(OnVectors):
    def __init__(self) -> None:
        super().__init__(Layers())
        self.model.layers = nn.ModuleList(Noisy(8) for _ in range(2))


def dropped(strategy: dict[str, Any]) -> dict[str, Any]:
    """What this rank dropped in each step, and digests of what it holds after ten."""
    made = Drops()
    fit(lambda: made, strategy, steps=10, batch=64, limit_val_batches=0)
    held = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in made.named_parameters()}
    return {
        "masks": {w: torch.stack([m for b in made.model.layers for m in b.masks[w]]) for w in ("inside", "hidden")},
        "held": {name: p.detach().clone() for name, p in held.items()},
        "cut": set(made.trainer.strategy.slices),
        "rank": int(os.environ["RANK"]),
    }


def assert_kept(mask: Tensor) -> None:
    """A share of 1 - RATE, within five standard deviations."""
    share, deviation = mask.double().mean().item(), (RATE * (1 - RATE) / mask.numel()) ** 0.5
    assert abs(share - (1 - RATE)) < 5 * deviation


def assert_apart(one: Tensor, other: Tensor) -> None:
    """Independent: they agree where both keep or both drop by chance."""
    expected = RATE**2 + (1 - RATE) ** 2
    assert abs((one == other).double().mean().item() - expected) < 5 * (0.25 / one.numel()) ** 0.5


def assert_steps_apart(masks: Tensor) -> None:
    assert_apart(masks[0::2], masks[1::2])


def test_data_ranks_drop_apart() -> None:
    first, second = run_ranks(dropped, 2, {})
    for where in ("inside", "hidden"):
        assert_kept(first["masks"][where])
        assert_apart(first["masks"][where], second["masks"][where])
        assert_steps_apart(first["masks"][where])


@pytest.mark.parametrize("sequence", [False, "auto"])
def test_tensor_ranks_drop_the_same_hidden_state_and_other_channels(sequence: Any) -> None:
    first, second = run_ranks(dropped, 2, {"tensor_parallel_size": 2, "sequence_parallel": sequence})
    assert "model.layers.0.up.weight" in first["cut"]
    assert first["masks"]["inside"].shape[-1] == WIDTH // 2
    assert_apart(first["masks"]["inside"], second["masks"]["inside"])
    assert torch.equal(first["masks"]["hidden"], second["masks"]["hidden"])
    for found in (first, second):
        for where in ("inside", "hidden"):
            assert_kept(found["masks"][where])
            assert_steps_apart(found["masks"][where])
    assert_same_copies(first, second)


def assert_same_copies(first: dict[str, Any], second: dict[str, Any], but: Any = None) -> None:
    """What is not cut is bit by bit the same."""
    for name, mine in first["held"].items():
        if name not in (first["cut"] if but is None else but):
            assert torch.equal(mine, second["held"][name]), name


def test_on_data_and_tensor_ranks() -> None:
    ranks = run_ranks(dropped, 4, {"tensor_parallel_size": 2})
    for data in (0, 2):
        assert torch.equal(ranks[data]["masks"]["hidden"], ranks[data + 1]["masks"]["hidden"])
        assert_apart(ranks[data]["masks"]["inside"], ranks[data + 1]["masks"]["inside"])
        assert_same_copies(ranks[data], ranks[data + 1])
    for where in ("inside", "hidden"):
        assert_apart(ranks[0]["masks"][where], ranks[2]["masks"][where])


def test_copies_of_shards_are_the_same_bit_by_bit() -> None:
    ranks = run_ranks(dropped, 4, {"replicate_size": 2})
    assert_same_copies(ranks[0], ranks[2], but=())
    assert_same_copies(ranks[1], ranks[3], but=())
    assert_apart(ranks[0]["masks"]["hidden"], ranks[2]["masks"]["hidden"])


def recomputed(strategy: dict[str, Any]) -> list[Tensor]:
    """What a block drops inside, in the forward pass and when it is computed again, of two steps."""
    made = Drops()
    fit(lambda: made, {**strategy, "activation_checkpointing": "full"}, steps=2, limit_val_batches=0)
    return made.model.layers[0].masks["inside"]


def test_recomputation_drops_the_same() -> None:
    for masks in run_ranks(recomputed, 4, {"tensor_parallel_size": 2}):
        first, again, second, once_more = masks
        assert torch.equal(first, again)
        assert torch.equal(second, once_more)
        assert not torch.equal(first, second)


def _losses(strategy: dict[str, Any], folder: str, ckpt: str | None) -> list[float]:
    """Of five epochs of two steps, or what is left of them; saves after each third step."""
    made = Drops()
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
    options = {"callbacks": [keep], "enable_checkpointing": True, "limit_val_batches": 0}
    random.seed(os.environ["RANK"])  # other numbers on each data rank
    fit(lambda: made, strategy, steps=10, batch=64, ckpt=ckpt, batches=2, rows_kind=PlacedRows, **options)
    return [*(loss for loss, _ in made.seen), random.random()]


@pytest.mark.parametrize("strategy", [{}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=str)
def test_a_run_that_goes_on_drops_what_it_would_have_dropped(strategy: dict[str, Any], tmp_path: Path) -> None:
    """Bit by bit, from the middle of an epoch and from its end."""
    whole = run_ranks(_losses, 2, strategy, str(tmp_path / "whole"), None)
    for step in (3, 6):
        saved = str(tmp_path / "whole" / f"step={step}.ckpt")
        for rank, again in enumerate(run_ranks(_losses, 2, strategy, str(tmp_path / "again"), saved)):
            assert again == whole[rank][step:]
