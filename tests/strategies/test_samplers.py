"""Who sees which rows: with Lightning's samplers and a person's own, in each epoch, and when a run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from tests.ranks import run_ranks
from tests.strategies.watched import LAYOUTS, ONE, Numbered, Place, Watched

ROWS, BATCH, EPOCHS = 24, 8, 3


class Backwards(Sampler[int]):
    """A person's own."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        return iter(reversed(range(self.rows)))


class Stream(IterableDataset):
    """The rows one after the other, to whoever asks."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(Numbered(ROWS).__getitem__, range(ROWS))


class DividedStream(Stream):
    """Each data rank its rows."""

    def __init__(self) -> None:
        self.trainer: L.Trainer | None = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        kwargs = getattr(self.trainer, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
        return map(Numbered(ROWS).__getitem__, range(kwargs["rank"], ROWS, kwargs["num_replicas"]))


def loader(kind: str, at: Place) -> DataLoader:
    rows, batch = Numbered(ROWS), BATCH // at.data
    if kind == "batch sampler":
        return DataLoader(rows, batch_sampler=BatchSampler(SequentialSampler(rows), batch, drop_last=False))
    if kind == "stream":
        return DataLoader(Stream(), batch)
    if kind == "divided stream":
        return DataLoader(DividedStream(), batch)
    samplers: dict[str, Any] = {
        "own sampler": lambda: Backwards(ROWS),
        "own distributed sampler": lambda: DistributedSampler(rows, at.data, at.data_rank, seed=3),
        "weighted": lambda: WeightedRandomSampler(torch.arange(ROWS).double().tolist(), ROWS),
        "random": lambda: RandomSampler(rows),
    }
    if kind in samplers:
        return DataLoader(rows, batch, sampler=samplers[kind]())
    return DataLoader(rows, batch, shuffle=kind == "shuffled")


class Gives(Watched):
    """Makes its loader itself: only then can Lightning divide one that has a batch sampler."""

    def __init__(self, kind: str, at: Place) -> None:
        super().__init__()
        self.kind, self.at = kind, [at]

    def train_dataloader(self) -> DataLoader:
        made = loader(self.kind, self.at[0])
        if isinstance(made.dataset, DividedStream):
            made.dataset.trainer = self.trainer
        return made


def rows_of(module: Watched, kind: str = "train") -> list[list[int]]:
    """By epoch."""
    epochs: dict[int, list[int]] = {}
    for name, epoch, *_, rows in module.calls:
        if name == kind:
            epochs.setdefault(epoch, []).extend(rows)
    return list(epochs.values())


def seen(layout: str, folder: str, kinds: list[str], divides: bool) -> dict[str, list[list[int]]]:
    at, found = Place(layout, folder), {}
    for kind in kinds:
        module = at.module(Gives, kind, at)
        trainer = at.trainer(max_epochs=EPOCHS, use_distributed_sampler=divides)
        trainer.fit(module)
        found[kind] = rows_of(module)
        if not at.is_one:
            at.known(trainer)
    return found


def shares(layout: str, folder: Path, kinds: list[str], divides: bool) -> dict[str, list[list[list[int]]]]:
    """By kind and data rank the rows of each epoch; tensor ranks of a data rank must have seen the same."""
    ranks, strategy = LAYOUTS[layout]
    tensor = strategy.get("tensor_parallel_size", 1)
    found = run_ranks(seen, ranks, layout, str(folder), kinds, divides)
    for first in range(0, ranks, tensor):
        assert all(found[first] == peer for peer in found[first : first + tensor])
    return {kind: [rank[kind] for rank in found[::tensor]] for kind in kinds}


@pytest.mark.parametrize("layout", ["data", "both"])
def test_lightning_gives_each_data_rank_its_rows(layout: str, tmp_path: Path) -> None:
    kinds = ["shuffled", "in order", "random", "own sampler", "batch sampler", "own distributed sampler", "weighted"]
    for kind, ranks in shares(layout, tmp_path, [*kinds, "divided stream"], divides=True).items():
        for epoch in range(EPOCHS):
            together = [row for rank in ranks for row in rank[epoch]]
            if kind == "weighted":
                assert len(together) == ROWS and 0 not in together
            else:
                assert sorted(together) == list(range(ROWS)), kind
        orders = {tuple(epoch) for epoch in ranks[0]}
        assert len(orders) == (1 if kind == "divided stream" else EPOCHS), kind


@pytest.mark.parametrize("layout", ["data", "both"])
def test_without_it_ranks_see_what_their_loader_gives(layout: str, tmp_path: Path) -> None:
    kinds = ["in order", "own sampler", "batch sampler", "stream"]
    for kind, ranks in shares(layout, tmp_path, kinds, divides=False).items():
        whole = list(range(ROWS))[:: -1 if kind == "own sampler" else 1]
        assert ranks == [[whole] * EPOCHS] * len(ranks)
    (drawn,) = shares(layout, tmp_path, ["weighted"], divides=False).values()
    assert all(rank == drawn[0] for rank in drawn)  # seed_everything made generators equal
    for rank in shares(layout, tmp_path, ["own distributed sampler"], divides=False)["own distributed sampler"]:
        assert len({tuple(epoch) for epoch in rank}) == EPOCHS


def resumed(layout: str, folder: str) -> tuple[list[list[int]], list[list[int]]]:
    at = Place(layout, folder)
    runs = []
    for ckpt in (None, f"{folder}/{layout}.ckpt"):
        module, trainer = at.module(), at.trainer(max_epochs=1 if ckpt is None else EPOCHS)
        trainer.fit(module, DataLoader(Numbered(ROWS), BATCH // at.data, shuffle=True), ckpt_path=ckpt)
        if ckpt is None:
            trainer.save_checkpoint(f"{folder}/{layout}.ckpt")
            trainer.fit_loop.max_epochs = EPOCHS
            trainer.fit(module, DataLoader(Numbered(ROWS), BATCH // at.data, shuffle=True))
        runs.append(rows_of(module))
    return runs[0], runs[1]


@pytest.mark.parametrize("layout", ["data", "both"])
def test_a_run_that_goes_on_sees_the_epochs_that_are_left(layout: str, tmp_path: Path) -> None:
    for whole, after in run_ranks(resumed, LAYOUTS[layout][0], layout, str(tmp_path)):
        assert len(whole) == EPOCHS and after == whole[1:]


class Plans(Watched):
    """Makes a schedule as long as the run."""

    def configure_optimizers(self) -> Any:
        self.steps = self.trainer.estimated_stepping_batches
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=int(self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def estimated(layout: str, folder: str) -> list[tuple[float, int]]:
    at, found = Place(layout, folder), []
    for options in ({}, {"accumulate_grad_batches": 2}, {"max_steps": 4}, {"limit_train_batches": 2}):
        module, trainer = at.module(Plans), at.trainer(**options)
        trainer.fit(module, DataLoader(Numbered(22), BATCH // at.data, shuffle=True))
        found.append((module.steps, trainer.global_step))
        if not at.is_one:
            at.known(trainer)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_estimated_by_the_batches_of_a_data_rank(layout: str, tmp_path: Path) -> None:
    (one,) = run_ranks(estimated, 1, ONE, str(tmp_path))
    assert one == [(6, 6), (4, 4), (4, 4), (4, 4)]
    assert run_ranks(estimated, LAYOUTS[layout][0], layout, str(tmp_path)) == [one] * LAYOUTS[layout][0]
