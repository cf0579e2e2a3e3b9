"""Schedulers and what Lightning lets a module override around a step, on each layout: one process to 1e-9."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.optim import AdamW, lr_scheduler

from tests.modules import Batch, fit
from tests.ranks import RanksFailed, run_ranks
from tests.strategies.layouts import LAYOUTS, Case, Layers, check, places
from tests.strategies.odd import OnVectors


class Rates(OnVectors):
    """Logs the rate of each step.

    Args:
        make: what ``configure_optimizers`` returns, from an optimizer.
    """

    def __init__(self, make: Callable[[Any], Any] = lambda optimizer: optimizer) -> None:
        super().__init__(Layers())
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(AdamW(self.parameters(), lr=1e-2, eps=1e-4))

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self.seen += [(group["lr"], 0.0) for group in self.trainer.optimizers[0].param_groups]


def scheduled(make: Callable[[Any], Any], **options: Any) -> Case:
    """By Lightning's dictionary with ``options``, which would have them by epoch."""
    return Case(
        lambda: Rates(
            lambda optimizer: {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), **options}}
        ),
        both=False,
    )


class Plateau(Rates):
    """Stepped by itself."""

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(metric) if metric is not None else scheduler.step()
        self.seen.append((0.0 if metric is None else float(metric), 0.0))


class OwnStep(Rates):
    """Warms up in its ``optimizer_step``."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1, (self.global_step + 1) / 3)
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)

    def backward(self, loss: Tensor) -> None:
        (loss * 2).backward()


class StepsSeldom(Rates):
    """Steps in every other batch, by an override; other gradients add up."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if batch_idx % 2 == 0:
            optimizer.zero_grad()


class TwoBackward(Rates):
    def backward(self, loss: Tensor) -> None:
        loss.backward(retain_graph=True)
        (loss * 0.5).backward()


class Dictionary(Rates):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "rows": batch["x"].sum(), "words": "kept"}

    def on_train_batch_end(self, outputs: Any, *args: Any) -> None:
        super().on_train_batch_end(outputs, *args)
        assert outputs["words"] == "kept"


class Skips(Rates):
    """On rank ``on`` a step has no loss."""

    def __init__(self, on: int) -> None:
        super().__init__()
        self.on = on

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 and self.global_rank == self.on else loss


class NoOptimizer(Rates):
    def configure_optimizers(self) -> Any:
        return None


def warm_then_cosine(optimizer: Any) -> Any:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(optimizer, 4)]
    return lr_scheduler.SequentialLR(optimizer, parts, [2])


def plateau(optimizer: Any) -> Any:
    return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)


LONGER = {"steps": -1, "max_epochs": 3, "batches": 2}
CASES = {
    "by step": scheduled(warm_then_cosine, interval="step"),
    "by epoch": scheduled(lambda o: lr_scheduler.StepLR(o, 1, 0.5)),
    "frequency": scheduled(lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.7**n), interval="step", frequency=2),
    "one cycle": scheduled(lambda o: lr_scheduler.OneCycleLR(o, 3e-2, total_steps=6), interval="step"),
    "plateau": Case(
        lambda: Plateau(lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": plateau(o), "monitor": "val"}}), LONGER
    ),
    "plateau of a step": Case(
        lambda: Rates(
            lambda o: {
                "optimizer": o,
                "lr_scheduler": {"scheduler": plateau(o), "monitor": "loss", "interval": "step"},
            }
        )
    ),
    "list": Case(lambda: Rates(lambda o: [o]), both=False),
    "lists": Case(lambda: Rates(lambda o: ([o], [lr_scheduler.ExponentialLR(o, 0.5)])), LONGER, both=False),
    "lists of dictionaries": Case(
        lambda: Rates(lambda o: ([o], [{"scheduler": lr_scheduler.ExponentialLR(o, 0.5), "interval": "step"}])),
        both=False,
    ),
    "dictionary": Case(lambda: Rates(lambda o: {"optimizer": o}), both=False),
    "list of dictionaries": Case(
        lambda: Rates(lambda o: ({"optimizer": o, "lr_scheduler": lr_scheduler.ExponentialLR(o, 0.5)},)),
        both=False,
    ),
    "none": Case(NoOptimizer, {"steps": -1, "max_epochs": 1}),
    "own step": Case(OwnStep),
    "steps seldom": Case(StepsSeldom),
    "two backward": Case(TwoBackward),
    "returns a dictionary": Case(Dictionary, both=False),
    "accumulates more": Case(
        Rates,
        {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})], "gradient_clip_val": 0.2, **LONGER, "batches": 3},
    ),
}


@pytest.mark.parametrize(("name", "layout"), places(CASES))
def test_as_on_one_process(name: str, layout: str) -> None:
    check(CASES, name, layout)


def skips(strategy: dict[str, Any], on: int) -> None:
    fit(lambda: Skips(on), strategy, steps=3)


@pytest.mark.parametrize("on", [0, 1])
@pytest.mark.parametrize("layout", ["data 2", "tensor 2"])
def test_a_step_without_a_loss_on_one_rank_ends_all(layout: str, on: int) -> None:
    """In Lightning's words, which allows it on one process alone."""
    with pytest.raises(RanksFailed, match="Skipping the `training_step` by returning None") as failed:
        run_ranks(skips, 2, LAYOUTS[layout][1], on)
    assert {outcome.error for outcome in failed.value.outcomes} == {"RuntimeError", "PeerError"}
    assert failed.value.outcomes[on].error == "RuntimeError"
