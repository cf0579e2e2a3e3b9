"""Options and batches of all kinds under a pipeline: one process in float64 to 1e-9."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_bharat import HybridStrategy
from tests.modules import Batch, Result, Rows, Trained, assert_equal, fit
from tests.plan.models import FusedBlock, Nano
from tests.ranks import run_ranks
from tests.strategies.together import Run, Together

STAGES: dict[str, Any] = {"pipeline_parallel_size": 2}
ON_EIGHT = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}


class Deep(Trained):
    rows_of = "deep"

    def __init__(self) -> None:
        super().__init__("deep")


class Lengths(Deep):
    """Batches of other lengths one after the other, as padding to the longest row makes them."""

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        time = 32 - 4 * (int(batch["rows"][0]) // 8 % 4)  # by its first row
        return {name: x[:, :time] if x.ndim > 1 else x for name, x in batch.items()}


class Frozen(Deep):
    """The first stage does not train."""

    def __init__(self) -> None:
        super().__init__()
        for part in (self.model.token, self.model.position, self.model.layers[0], self.model.layers[1]):
            part.requires_grad_(False)


class Sums(Deep):
    """Logs in each way."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        first = batch["labels"][:, 0].double()
        self.log("sum", first.sum(), reduce_fx="sum", on_step=False, on_epoch=True, sync_dist=True)
        self.log("max", first.max(), reduce_fx="max", on_step=False, on_epoch=True, sync_dist=True)
        self.log("min", first.min(), reduce_fx="min", on_step=False, on_epoch=True, sync_dist=True)
        self.log("mean", first.mean(), on_step=False, on_epoch=True, sync_dist=True, batch_size=len(first))
        self.log_dict({"both": loss.detach()}, on_step=True, on_epoch=True, sync_dist=True)
        return loss


class Unused(Deep):
    """Has a layer that no step reaches: without a gradient, it must not decay either."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = torch.nn.Linear(3, 3)


MODULES = {"deep": Deep, "lengths": Lengths, "frozen": Frozen, "sums": Sums, "unused": Unused}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "changing lengths": ("lengths", {"last": 2, "steps": 6}),
    "a frozen stage": ("frozen", {"steps": 6}),
    "each reduction": ("sums", {"steps": 8}),
    "value clipping": ("deep", {"steps": 6, "gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "ragged labels": ("deep", {"steps": 6, "ragged": True}),
    "one row at the end": ("deep", {"last": 2, "batch": 6, "steps": 6}),
    "a layer that nothing uses": ("unused", {"steps": 4, "accumulate_grad_batches": 2}),
}


def alone(schedule: str) -> Together:
    strategy = {**STAGES, "schedule": schedule}
    return Together(2, {name: Run(MODULES[module], strategy, options) for name, (module, options) in CASES.items()})


SCHEDULES = {schedule: alone(schedule) for schedule in ("1F1B", "InterleavedZeroBubble")}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", CASES)
def test_each_alone(name: str, schedule: str) -> None:
    SCHEDULES[schedule].check(name)


def by_tokens(strategy: dict[str, Any], accumulate: int) -> Run:
    """One process sees each window as one batch."""
    options = {"accumulate_grad_batches": accumulate, "batches": 4 * accumulate}
    kept = {"ragged": True, "steps": 6}
    return Run("deep", {**strategy, "token_weighted": True}, {**kept, **options}, {**kept, "batch": 8 * accumulate})


COPIES = {**STAGES, "replicate_size": 2}
ON_TWO = Together(2, {f"pipeline {n}": by_tokens(STAGES, n) for n in (1, 2)})
ON_FOUR = Together(
    4,
    {f"data {n}": by_tokens(STAGES, n) for n in (1, 2)}
    | {f"tensor {n}": by_tokens(ON_EIGHT, n) for n in (1, 2)}
    | {"copies": Run("deep", COPIES, {"steps": 4})},
)
ALL = {"steps": 5, "gradient_clip_val": 0.3, "accumulate_grad_batches": 3, "last": 2}
EIGHT = Together(8, {"all": Run("deep", ON_EIGHT, ALL), "copies": Run("deep", COPIES, {"steps": 4})})


def test_data_2_tensor_2_pipeline_2() -> None:
    EIGHT.check("all")


@pytest.mark.parametrize("on", [ON_FOUR, EIGHT], ids=["4", "8"])
def test_copies_of_divided_weights_on_each_stage(on: Together) -> None:
    on.check("copies")


@pytest.mark.parametrize(
    ("name", "on"), [(name, on) for on in (ON_TWO, ON_FOUR) for name in on.runs if name != "copies"]
)
def test_token_weighted(name: str, on: Together) -> None:
    """Weights are those of one process that sees each window as one batch."""
    for found in on.found(name):
        for key, weight in on.whole(name).weights.items():
            torch.testing.assert_close(found.weights[key], weight, rtol=0, atol=1e-7, msg=key)


class Evaluated(L.LightningModule):
    """Returns what it predicts."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Nano(depth=4)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return {"rows": batch["rows"], "logits": self.model(batch["ids"])}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        logits = self.model(batch["ids"]).flatten(0, 1)
        self.log(
            "val", F.cross_entropy(logits, batch["labels"].flatten()), sync_dist=True, batch_size=len(batch["rows"])
        )

    test_step = validation_step


def _evaluate(strategy: dict[str, Any] | None, ranks: int, data: int, rank: int) -> tuple[Any, ...]:
    L.seed_everything(3, verbose=False)
    module = Evaluated()
    trainer = L.Trainer(
        strategy="auto" if strategy is None else HybridStrategy(**strategy),
        devices=ranks,
        accelerator="cpu",
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    loaders = [Rows("deep", 8, 2, data, rank, False), Rows("deep", 4, 3, data, rank, False)]
    validated = trainer.validate(module, loaders, verbose=False)
    tested = trainer.test(module, loaders[0], verbose=False)
    predicted = trainer.predict(module, DataLoader(list(loaders[0]), batch_size=None))
    return validated, tested, {int(r): x for p in predicted for r, x in zip(p["rows"], p["logits"], strict=True)}


EVALUATED: dict[int, dict[str, dict[str, Any]]] = {
    2: {"1F1B": STAGES, "DualPipeV": {**STAGES, "schedule": "DualPipeV"}},
    4: {"data": STAGES},
}


@cache
def _evaluated(ranks: int) -> list[dict[str, tuple[Any, ...]]]:
    return run_ranks(
        _evaluate_here, ranks, EVALUATED.get(ranks, {"whole": None}), ranks, max(ranks // 2, 1), timeout=60
    )


def _evaluate_here(strategies: dict[str, Any], ranks: int, data: int) -> dict[str, tuple[Any, ...]]:
    rank = int(os.environ["RANK"]) % data
    return {name: _evaluate(strategy, ranks, data, rank) for name, strategy in strategies.items()}


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, names in EVALUATED.items() for name in names])
def test_validate_test_and_predict(ranks: int, name: str) -> None:
    """Every rank of a pipeline gets what the last stage has predicted."""
    validated, tested, rows = _evaluated(1)[0]["whole"]
    found = [of_rank[name] for of_rank in _evaluated(ranks)]
    for mine, also, some in found:
        assert mine == [pytest.approx(values, rel=1e-9) for values in validated]
        assert also == [pytest.approx(values, rel=1e-9) for values in tested]
        for row, logits in some.items():
            torch.testing.assert_close(logits, rows[row], rtol=0, atol=1e-9)
    assert {row for *_, some in found for row in some} == set(rows)


class _Noisy(FusedBlock):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


class Noisy(Trained):
    """Dropout before and in blocks; keeps the masks before them, which are drawn on every stage."""

    rows_of = "deep"

    def __init__(self) -> None:
        super().__init__()
        self.model = Nano(_Noisy, depth=4)
        self.masks: list[Tensor] = []

    def loss(self, batch: Batch) -> Tensor:
        self.masks.append(F.dropout(torch.ones(4), 0.5))
        return super().loss(batch)


def _noisy() -> list[tuple[Result, list[Tensor]]]:
    """Without recomputation and with it."""
    found = []
    for options in ({}, {"activation_checkpointing": "full"}):
        L.seed_everything(7, verbose=False)
        made = Noisy()
        found.append((fit(lambda made=made: made, {**STAGES, **options}, 6), made.masks))
    return found


def test_random_numbers_are_those_of_the_micro_batch_on_all_stages() -> None:
    """Recomputation changes nothing."""
    first_rank, last_rank = run_ranks(_noisy, 2)
    (first, masks), (last, also) = first_rank[0], last_rank[0]
    assert len(masks) == 6 * 4 + 4 and all(torch.equal(a, b) for a, b in zip(masks, also, strict=True))
    assert len({tuple(mask.tolist()) for mask in masks}) > 8
    assert_equal(first, last)
    assert_equal(first_rank[1][0], first)
