"""Loaders on many ranks: they end together, tensor ranks get the same batches and draw the same random numbers."""

from __future__ import annotations

import os
import random
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from lightning_bharat import HybridStrategy
from lightning_bharat.strategies.loaders import LoaderError
from tests.ranks import RanksFailed, run_ranks

TENSOR = {"tensor_parallel_size": 2}


def rank() -> int:
    return int(os.environ["RANK"])


class Vectors(L.LightningModule):
    """Counts the steps of each kind, and keeps what the rows say they are."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 4))
        self.steps = {"train": 0, "val": 0, "test": 0, "predict": 0}
        self.rows: list[list[float]] = []

    def _step(self, kind: str, batch: Any) -> Tensor:
        self.steps[kind] += 1
        x = batch["x"] if isinstance(batch, dict) else batch
        self.rows.append(x[:, 0].tolist())
        return F.mse_loss(self.net(x), torch.ones_like(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._step("train", batch)
        self.log("loss", loss, sync_dist=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val", self._step("val", batch), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", self._step("test", batch), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step("predict", batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(strategy: dict[str, Any], **options: Any) -> L.Trainer:
    return L.Trainer(
        strategy=HybridStrategy(**strategy),
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        **{
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **options,
        },
    )


class Counted:
    """A loader of a class of one's own, with a length."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.full((2, 4), float(i)) for i in range(self.batches))


class Stream(IterableDataset):
    """Rows without a known length."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.full((4,), float(i // 2)) for i in range(2 * self.batches))


class SaysMore(Stream):
    """Says that it has more than it gives."""

    def __len__(self) -> int:
        return 2 * 9


def loader(kind: str, batches: int) -> Any:
    if kind == "counted":
        return Counted(batches)
    if kind == "stream":
        return DataLoader(Stream(batches), batch_size=2)
    if kind == "says more":
        return DataLoader(SaysMore(batches), batch_size=2)
    return DataLoader([torch.ones(4)] * 2 * batches, batch_size=2)


def uneven(kind: str, strategy: dict[str, Any]) -> tuple[dict[str, int], list[str], str]:
    """Rank 0 has five batches, rank 1 three."""
    batches = 3 if rank() else 5
    module, run = Vectors(), trainer(strategy, use_distributed_sampler=False, accumulate_grad_batches=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run.fit(module, loader(kind, batches), [loader(kind, batches), loader(kind, 4)])
        run.test(module, loader(kind, batches), verbose=False)
    assert run.global_step == 2 * (1 if kind == "says more" else 2)
    with pytest.raises(LoaderError) as refused:
        run.predict(module, loader(kind, batches))
    words = [str(w.message) for w in said if "all ranks stop after 3" in str(w.message)]
    return module.steps, words, str(refused.value)


@pytest.mark.parametrize("kind", ["counted", "stream", "says more", "sized"])
def test_data_ranks_stop_together_and_say_so_and_predictions_are_never_left_out(kind: str) -> None:
    results = run_ranks(uneven, 2, kind, {})
    for steps, _, refusal in results:
        assert steps["train"] == 2 * 3 and steps["test"] == 3
        # Lightning validates and steps early with a batch that it takes for the last one, by the length.
        assert steps["val"] == (0 if kind == "says more" else 2 * (3 + 4))
        assert "3 batches on rank 1 (data 1) and" in refusal and "predictions would be missing" in refusal
    assert results[0][1] and not results[1][1]  # said by one rank


def empty_on_one(kind: str) -> dict[str, int]:
    module = Vectors()
    trainer({}, use_distributed_sampler=False).fit(module, loader(kind, 0 if rank() else 5))
    return module.steps


def test_no_batch_on_one_rank_is_refused_where_it_is_known_and_else_ends_at_once() -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(empty_on_one, 2, "sized")
    for outcome in failed.value.outcomes:
        assert outcome.error == "LoaderError"
        assert "DataLoader has no batch on rank 1 (data 1) and 5 on rank 0 (data 0); give each data" in outcome.message
    assert [steps["train"] for steps in run_ranks(empty_on_one, 2, "stream")] == [0, 0]


class Numbered(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((4,), float(index))


class DividedByRank(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        return (torch.full((4,), float(i)) for i in range(dist.get_rank(), 16, dist.get_world_size()))


class OtherKeys(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for i in range(16):
            yield {"x": torch.full((4,), float(i)), **({"extra": torch.ones(1)} if dist.get_rank() else {})}


def divided_by_rank(kind: str, stage: str) -> None:
    by_rank = DistributedSampler(Numbered(), num_replicas=int(os.environ["WORLD_SIZE"]), rank=rank(), shuffle=False)
    wrong: dict[str, Callable[[], DataLoader]] = {
        "sampler": lambda: DataLoader(Numbered(), batch_size=2, sampler=by_rank),
        "dataset": lambda: DataLoader(DividedByRank(), batch_size=2),
        "keys": lambda: DataLoader(OtherKeys(), batch_size=2),
    }
    module, run = Vectors(), trainer(TENSOR, use_distributed_sampler=False)
    right = DataLoader(Numbered(), batch_size=2)
    run.fit(module, *((wrong[kind](),) if stage == "train" else (right, wrong[kind]())))


@pytest.mark.parametrize(
    ("kind", "stage", "ranks"), [("sampler", "train", 2), ("dataset", "val", 4), ("keys", "train", 2)]
)
def test_tensor_ranks_with_other_batches_are_refused(kind: str, stage: str, ranks: int) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(divided_by_rank, ranks, kind, stage)
    assert {outcome.error for outcome in failed.value.outcomes} <= {"LoaderError", "PeerError", None}
    words = next(o.message for o in failed.value.outcomes if o.error == "LoaderError")
    assert re.search("batch 0 of DataLoader is not the same on the 2 tensor ranks of data rank [01],", words)
    assert "use trainer.distributed_sampler_kwargs" in words


class Augmented(Dataset):
    """Draws from all three generators, as an augmentation does."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, random.random(), np.random.rand(), float(torch.rand(()))])


def unseeded(workers: int, seed: bool) -> tuple[list[list[float]], dict[str, Tensor]]:
    random.seed(rank()), np.random.seed(rank()), torch.manual_seed(rank())
    if seed:
        L.seed_everything(3, workers=True, verbose=False)
    module = Vectors(dropout=0.5)
    run = trainer({"tensor_parallel_size": 2})
    run.fit(module, DataLoader(Augmented(), batch_size=2, shuffle=True, num_workers=workers))
    whole = {n: p.detach() for n, p in module.named_parameters() if n not in run.strategy.slices}  # type: ignore[attr-defined]
    return module.rows, whole


@pytest.mark.parametrize(("workers", "seed"), [(0, False), (2, False), (2, True)])
def test_tensor_ranks_draw_the_same_numbers_whatever_their_seeds_were(workers: int, seed: bool) -> None:
    (rows, weights), (other_rows, other_weights) = run_ranks(unseeded, 2, workers, seed)
    assert rows == other_rows and len(rows) == 2 * 8
    assert weights and all(torch.equal(weight, other_weights[name]) for name, weight in weights.items())


def empty(strategy: dict[str, Any]) -> int:
    run = trainer(strategy)
    run.fit(Vectors(), DataLoader([], batch_size=2))
    return run.global_step


def test_an_empty_dataset_trains_nothing_and_is_no_plan() -> None:
    assert run_ranks(empty, 2, {}) == [0, 0]
    with pytest.raises(RanksFailed, match="the dataset is empty: there is no batch to observe a step with"):
        run_ranks(empty, 2, TENSOR)


def one_pass(strategy: dict[str, Any]) -> None:
    trainer(strategy).fit(Vectors(), iter([torch.ones(2, 4)] * 4))


def test_a_loader_that_can_be_gone_through_once_is_refused_where_it_must_be_looked_at() -> None:
    run_ranks(one_pass, 2, {})
    with pytest.raises(RanksFailed, match="gone through once only.*give an object whose __iter__ starts anew"):
        run_ranks(one_pass, 2, TENSOR)
