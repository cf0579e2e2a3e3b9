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
    "changing lengths": ("lengths", {"last": 2}),
    "a frozen stage": ("frozen", {}),
    "each reduction": ("sums", {"steps": 8}),
    "value clipping": ("deep", {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "ragged labels": ("deep", {"ragged": True}),
    "one row at the end": ("deep", {"last": 2, "batch": 6}),
    "a layer that nothing uses": ("unused", {"accumulate_grad_batches": 2}),
}


def _all(strategy: dict[str, Any] | None) -> dict[str, Result]:
    return {name: fit(MODULES[module], strategy, **options) for name, (module, options) in CASES.items()}


@cache
def _one_process() -> dict[str, Result]:
    return run_ranks(_all, 1, None)[0]


@pytest.mark.parametrize("schedule", ["1F1B", "InterleavedZeroBubble"])
def test_each_alone(schedule: str) -> None:
    for results in run_ranks(_all, 2, {**STAGES, "schedule": schedule}, timeout=60):
        for name, found in results.items():
            assert_equal(found, _one_process()[name])


def _on_eight(strategy: dict[str, Any] | None) -> Result:
    return fit("deep", strategy, 6, gradient_clip_val=0.3, accumulate_grad_batches=3, last=2)


def test_data_2_tensor_2_pipeline_2() -> None:
    expected = run_ranks(_on_eight, 1, None)[0]
    for found in run_ranks(_on_eight, 8, ON_EIGHT, timeout=90):
        assert_equal(found, expected)


def _weighted(strategy: dict[str, Any] | None, accumulate: int) -> Result:
    options = {"ragged": True, "batch": 8 if strategy else 8 * accumulate}
    if strategy:
        options |= {"accumulate_grad_batches": accumulate, "batches": 4 * accumulate}
    return fit("deep", strategy, **options)


def test_copies_of_divided_weights_on_each_stage() -> None:
    for copies, ranks in ((2, 4), (2, 8)):
        for found in run_ranks(fit, ranks, Deep, {**STAGES, "replicate_size": copies}, 4, timeout=60):
            assert_equal(found, _once_deep())


@cache
def _once_deep() -> Result:
    return fit(Deep, None, 4)


@pytest.mark.parametrize("layout", [(2, STAGES), (4, STAGES), (4, ON_EIGHT)], ids=["pipeline", "data", "tensor"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_token_weighted(layout: tuple[int, dict[str, Any]], accumulate: int) -> None:
    """Weights are those of one process that sees each window as one batch."""
    ranks, strategy = layout
    expected = run_ranks(_weighted, 1, None, accumulate)[0]
    for found in run_ranks(_weighted, ranks, {**strategy, "token_weighted": True}, accumulate):
        for name, weight in expected.weights.items():
            torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e-7, msg=name)


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


def _evaluate_here(strategy: dict[str, Any] | None, ranks: int, data: int) -> tuple[Any, ...]:
    return _evaluate(strategy, ranks, data, int(os.environ["RANK"]) % data)


@pytest.mark.parametrize(("ranks", "strategy"), [(2, STAGES), (2, {**STAGES, "schedule": "DualPipeV"}), (4, STAGES)])
def test_validate_test_and_predict(ranks: int, strategy: dict[str, Any]) -> None:
    """Every rank of a pipeline gets what the last stage has predicted."""
    validated, tested, rows = run_ranks(_evaluate_here, 1, None, 1, 1)[0]
    found = run_ranks(_evaluate_here, ranks, strategy, ranks, ranks // 2)
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


def _noisy(options: dict[str, Any]) -> tuple[Result, list[Tensor]]:
    made = Noisy()
    return fit(lambda: made, {**STAGES, **options}, 6), made.masks


def test_random_numbers_are_those_of_the_micro_batch_on_all_stages() -> None:
    """Recomputation changes nothing."""
    runs = [run_ranks(_noisy, 2, options) for options in ({}, {"activation_checkpointing": "full"})]
    (first, masks), (last, also) = runs[0]
    assert len(masks) == 6 * 4 + 4 and all(torch.equal(a, b) for a, b in zip(masks, also, strict=True))
    assert len({tuple(mask.tolist()) for mask in masks}) > 8
    assert_equal(first, last)
    assert_equal(runs[1][0][0], first)
