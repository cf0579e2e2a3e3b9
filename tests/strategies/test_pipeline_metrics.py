"""torchmetrics, early stopping and what else a step keeps, under a pipeline: as on one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.regression import SpearmanCorrCoef

from tests.modules import Batch, Result, Trained, assert_equal, fit
from tests.plan.models import VOCABULARY
from tests.ranks import RanksFailed, run_ranks

STEP = ("accuracy", "accuracy_step")
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [{}, {"schedule": "ZBVZeroBubble"}],
    4: [{}, {"tensor_parallel_size": 2}],
}


class Measured(Trained):
    """Logs metric objects in each way; keeps what it logged at each step."""

    rows_of = "deep"

    def __init__(self) -> None:
        super().__init__("deep")
        self.accuracy = MulticlassAccuracy(VOCABULARY, average="micro")
        self.both = MetricCollection([MulticlassAccuracy(VOCABULARY), MulticlassF1Score(VOCABULARY)], prefix="val_")
        self.rank = SpearmanCorrCoef()  # keeps all values in lists
        self.mean = MeanMetric().set_dtype(torch.float64)
        self.kept: list[dict[str, float]] = []

    def loss(self, batch: Batch) -> Tensor:
        logits = self.model(batch["ids"])
        self.found = logits.flatten(0, 1).detach(), batch["labels"].flatten()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.accuracy(*self.found)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        logits, labels = self.found
        self.both.update(logits, labels)
        self.rank.update(logits[:, 0].float(), labels.float())
        self.mean.update(logits.mean(), weight=len(labels))
        self.log_dict(self.both)
        self.log("rank", self.rank)

    def on_validation_epoch_end(self) -> None:
        self.log("mean", self.mean.compute())
        self.mean.reset()

    def on_train_batch_end(self, *_: Any) -> None:
        super().on_train_batch_end(*_)
        self.kept.append({k: float(v) for k, v in self.trainer.callback_metrics.items()})


def _fits(strategies: list[dict[str, Any] | None]) -> list[tuple[Result, Any]]:
    return [_fit(strategy) for strategy in strategies]


def _fit(strategy: dict[str, Any] | None) -> tuple[Result, Any]:
    L.seed_everything(7, verbose=False)
    made = Measured()
    return fit(lambda: made, strategy, 10, last=2), made.kept


def test_metrics() -> None:
    ((expected, kept),) = run_ranks(_fits, 1, [None])[0]
    assert {"accuracy_step", "accuracy_epoch", "val_MulticlassF1Score", "rank", "mean"} <= expected.metrics.keys()
    for ranks, layouts in LAYOUTS.items():
        for of_rank in run_ranks(_fits, ranks, [{"pipeline_parallel_size": 2, **options} for options in layouts]):
            for options, (found, also) in zip(layouts, of_rank, strict=True):
                # without sync a data rank shows its own, on any layout
                local = STEP if ranks == 4 and not options else ()
                assert_equal(_without(found, local), _without(expected, local))
                for mine, whole in zip(also, kept, strict=True):
                    assert _less(mine, local) == pytest.approx(_less(whole, local), rel=1e-6)


def _less(values: dict[str, float], names: Sequence[str]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name not in names}


def _without(result: Result, names: Sequence[str]) -> Result:
    return Result(result, metrics=_less(result.metrics, names))


def _stopped(strategy: dict[str, Any] | None) -> tuple[Result, int]:
    stop = EarlyStopping("rank", patience=1, mode="max", min_delta=1.0)
    L.seed_everything(7, verbose=False)
    made = Measured()
    return fit(lambda: made, strategy, 100, callbacks=[stop], max_epochs=5), stop.stopped_epoch


def test_early_stopping_by_a_metric() -> None:
    expected, epoch = run_ranks(_stopped, 1, None)[0]
    assert epoch == 1
    for found, stopped in run_ranks(_stopped, 4, {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}):
        assert stopped == epoch
        assert_equal(found, expected)


class Keeps(Trained):
    """As Lightning's docs show it: outputs are kept in a list, batches are counted."""

    rows_of = "deep"

    def __init__(self, metric: Metric | None = None, counts: bool = False) -> None:
        super().__init__("deep")
        self.losses: list[Tensor] = []
        self.batches = 0
        self.register_buffer("rows", torch.zeros((), dtype=torch.int64))
        self.counts, self.metric = counts, metric or MeanMetric()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.batches += 1
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())
        if self.counts:
            self.rows += len(batch["rows"])
        return loss


def _keeps(strategy: dict[str, Any] | None) -> tuple[Result, int, int]:
    made = Keeps()
    return fit(lambda: made, strategy, 4), made.batches, len(made.losses)


def test_proofs_leave_nothing_behind() -> None:
    """A step runs once for each micro-batch, and no further."""
    expected, *_ = run_ranks(_keeps, 1, None)[0]
    first, last = run_ranks(_keeps, 2, {"pipeline_parallel_size": 2})
    assert first[1:] == (4 * 4, 0)
    assert last[1:] == (4 * 4, 4 * 4)
    assert_equal(last[0], expected)


def _refused(strategy: dict[str, Any], case: str) -> None:
    metrics = {"on step": MeanMetric(dist_sync_on_step=True), "own": MeanMetric(dist_sync_fn=lambda x, group: [x])}
    fit(lambda: Keeps(metrics.get(case), case == "counts"), strategy, 4)


WORDS = {
    "on step": "metric: dist_sync_on_step=True: under a pipeline the last stage alone updates metrics; leave it out",
    "own": "leave out dist_sync_fn",
    "counts": "can't lie on different stages: the buffer rows changes in the training step",
}


@pytest.mark.parametrize("case", WORDS)
def test_what_a_stage_would_do_wrong_is_refused(case: str) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(_refused, 2, {"pipeline_parallel_size": 2}, case)
    assert any(WORDS[case] in outcome.message for outcome in failed.value.outcomes), str(failed.value)
