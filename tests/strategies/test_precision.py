"""Each precision of Lightning's on each layout, and a loss scaler that decides alike on all ranks."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.plugins.precision import (
    BitsandbytesPrecision,
    DeepSpeedPrecision,
    FSDPPrecision,
    TransformerEnginePrecision,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor

from lightning_bharat import HybridStrategy
from lightning_bharat.plan.elsewhere import is_elsewhere
from tests.modules import Result, Rows, Trained, fit, grad_norm
from tests.ranks import run_ranks

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data 2": (2, {}),
    "tensor 2": (2, {"tensor_parallel_size": 2}),
    "data 2 × tensor 2": (4, {"tensor_parallel_size": 2}),
    "data 2 × pipeline 2": (4, {"pipeline_parallel_size": 2}),
}
MODELS = ("nano", "qwen3")
SHORT: dict[str, Any] = {"limit_val_batches": 1}  # what validation finds is not compared here


def plugin(name: str) -> Precision:
    """As an object. On the CPU Lightning gives "16-mixed" in no other way."""
    if name.endswith("mixed"):
        return MixedPrecision(name, "cpu", GradScaler("cpu", 1024.0) if name == "16-mixed" else None)  # type: ignore[arg-type]
    return DoublePrecision() if name == "64-true" else HalfPrecision(name)  # type: ignore[arg-type]


def by_plugin(name: str) -> dict[str, Any]:
    return {"precision": None, "plugins": [plugin(name)]}


def trained(strategy: dict[str, Any] | None, precision: str) -> dict[str, Result]:
    options = by_plugin(precision) if precision == "16-mixed" else {"precision": precision}
    if precision == "16-true":  # squares of gradients are zero in it, so that Adam's steps are as long as eps lets them
        options["optimizer"] = {"lr": 1e-4}
    models = MODELS if int(os.environ["WORLD_SIZE"]) < 4 else MODELS[1:]  # many ranks on few cores are slow
    return {model: fit(model, strategy, steps=6, gradient_clip_val=0.5, **SHORT, **options) for model in models}


HALF = ("bf16-true", "16-true", "bf16-mixed", "16-mixed")


def in_each(strategy: dict[str, Any] | None, precisions: list[str]) -> dict[str, dict[str, Result]]:
    return {precision: trained(strategy, precision) for precision in precisions}


@cache
def one_process() -> dict[str, dict[str, Result]]:
    return run_ranks(in_each, 1, None, ["64-true", "32-true", *HALF])[0]


@cache
def runs_on(layout: str) -> list[dict[str, dict[str, Result]]]:
    """What each rank found, by precision and model."""
    ranks, strategy = LAYOUTS[layout]
    return run_ranks(in_each, ranks, strategy, ["32-true", *HALF], timeout=90)


def seen(run: Result) -> Tensor:
    """(steps, 2): losses and norms."""
    return torch.tensor(run.seen, dtype=torch.float64)


def weights(run: Result) -> Tensor:
    return torch.cat([weight.double().flatten() for weight in run.weights.values()])


def error(found: Tensor, exact: Tensor) -> float:
    """Root mean square."""
    return (found - exact).pow(2).mean().sqrt().item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_is_one_process(layout: str) -> None:
    for results in runs_on(layout):
        for model, found in results["32-true"].items():
            expected = one_process()["32-true"][model]
            torch.testing.assert_close(seen(found)[:, 0], seen(expected)[:, 0], rtol=1e-5, atol=0)
            torch.testing.assert_close(seen(found)[:, 1], seen(expected)[:, 1], rtol=1e-4, atol=0)
            torch.testing.assert_close(weights(found), weights(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_rounds_as_on_one_process(layout: str, precision: str) -> None:
    """By their distance to float64. Two tensor ranks round three times where one process does once: their partial sums,
    and the sum of them."""
    for results in runs_on(layout):
        for model, found in results[precision].items():
            one, exact = one_process()[precision][model], one_process()["64-true"][model]
            kept = {weight.dtype for weight in found.weights.values()}
            assert kept == {{"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, torch.float32)}
            assert error(seen(found)[:, 0], seen(exact)[:, 0]) <= 3 * error(seen(one)[:, 0], seen(exact)[:, 0])
            assert error(seen(found)[:, 1], seen(exact)[:, 1]) <= 3 * error(seen(one)[:, 1], seen(exact)[:, 1])
            assert error(weights(found), weights(exact)) <= 3 * error(weights(one), weights(exact))


def as_objects_and_as_words(strategy: dict[str, Any]) -> None:
    for name in ("64-true", "bf16-true", "16-true", "bf16-mixed"):
        made, words = (fit("nano", strategy, steps=2, **given) for given in (by_plugin(name), {"precision": name}))
        assert made.seen == words.seen, name
        assert all(torch.equal(made.weights[n], w) for n, w in words.weights.items()), name


def test_plugins_given_as_objects() -> None:
    run_ranks(as_objects_and_as_words, 2, {"tensor_parallel_size": 2})


# ---- the scaler

BAD = 3  # the step in which one rank finds an infinite gradient


class Overflows(Trained):
    """On rank ``on`` one element of one gradient is infinite in one step. Keeps the scale after each step.

    Attributes:
        scales: after each step.
        clipped: norm of the gradients after clipping, by step.
        changed: whether each step changed this rank's weights.
    """

    def __init__(self, on: int, optimizer: dict[str, Any] | None = None, manual: bool = False) -> None:
        super().__init__("nano", optimizer)
        self.automatic_optimization = not manual
        self.on = on
        self.scales: list[float] = []
        self.clipped: list[float] = []
        self.changed: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def on_after_backward(self) -> None:
        if self.trainer.fit_loop.total_batch_idx == BAD and self.global_rank == self.on:
            found = (layer.up.weight.grad for layer in self.model.layers)  # cut, and divided; one stage has some
            grad = next(grad for grad in found if grad is not None)
            (grad.to_local() if isinstance(grad, DTensor) else grad)[-1, 0] = torch.inf

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        self.clipped.append(grad_norm(self))

    def _digest(self) -> float:
        here = (p for p in self.parameters() if not is_elsewhere(p))
        return sum(p.detach().double().abs().sum().item() for p in map(_local, here))

    def on_train_batch_start(self, *_: Any) -> None:
        self.before = self._digest()

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self.changed.append(self._digest() != self.before)
        self.scales.append(self.trainer.precision_plugin.scaler.get_scale())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


Overflowed = tuple[list[float], list[bool], Tensor, dict[str, float]]
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    # batches a step, the module's options
    "plain": (1, {}),
    "accumulated": (2, {}),
    "manual": (1, {"manual": True}),
    "fused": (1, {"optimizer": {"fused": True}}),
}


def overflowing(strategy: dict[str, Any] | None, ranks: list[int], names: list[str]) -> dict[str, list[Overflowed]]:
    return {name: [overflowed(strategy, on, *CASES[name]) for on in ranks] for name in names}


def overflowed(strategy: dict[str, Any] | None, on: int, accumulate: int, options: dict[str, Any]) -> Overflowed:
    L.seed_everything(7, verbose=False)
    made = Overflows(on, **options)
    scaled = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", 1024.0, growth_interval=2))
    loop: dict[str, Any] = {"plugins": [scaled], "precision": None, "accumulate_grad_batches": accumulate}
    if not options:  # an optimizer that unscales by itself can't be clipped, and by hand nothing is
        loop["gradient_clip_val"] = 0.25
    run = fit(lambda: made, strategy, steps=7 // accumulate, **SHORT, **loop)
    sums = {name: weight.double().sum().item() for name, weight in run.weights.items()}
    return made.scales, made.changed, torch.tensor([*sum(run.seen, ()), *made.clipped]), sums


@cache
def overflows_of_one() -> dict[str, list[Overflowed]]:
    return run_ranks(overflowing, 1, None, [0], list(CASES))[0]


@cache
def overflows_on(layout: str) -> list[dict[str, list[Overflowed]]]:
    ranks, strategy = LAYOUTS[layout]
    names = list(CASES) if layout == "data 2 × tensor 2" else ["plain"]
    return run_ranks(overflowing, ranks, strategy, [0, ranks - 1], names, timeout=60)


@pytest.mark.parametrize(
    ("layout", "name"),
    [*((layout, "plain") for layout in LAYOUTS), *(("data 2 × tensor 2", name) for name in CASES if name != "plain")],
)
def test_no_rank_steps_where_one_can_not(layout: str, name: str) -> None:
    accumulate, _ = CASES[name]
    scales, changed, numbers, _ = overflows_of_one()[name][0]
    assert scales[BAD] == scales[BAD - 1] / 2
    assert not changed[BAD] and all(changed[accumulate - 1 : BAD : accumulate])
    results = [rank[name] for rank in overflows_on(layout)]
    for found in (found for rank in results for found in rank):
        assert found[:2] == (scales, changed)
        torch.testing.assert_close(found[2], numbers, rtol=2e-2, atol=0, equal_nan=True)
    assert all(found[3] == first[3] for rank in results for found, first in zip(rank, results[0], strict=True))


def clipped(strategy: dict[str, Any]) -> list[float]:
    made = Overflows(-1)
    fit(lambda: made, strategy, steps=4, gradient_clip_val=0.25, **by_plugin("16-mixed"))
    return made.clipped


def test_what_is_clipped_is_unscaled() -> None:
    for norms in run_ranks(clipped, 4, {"tensor_parallel_size": 2}):
        assert norms == pytest.approx([0.25] * 4, rel=1e-4)


def saved_and_loaded(path: Path) -> tuple[float, float]:
    def trainer(scale: float, steps: int) -> L.Trainer:
        scaled = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", scale, growth_interval=1))
        return L.Trainer(
            strategy=HybridStrategy(), devices=2, accelerator="cpu", plugins=[scaled], max_steps=steps, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip

    rows = Rows("nano", 8, 4, 2, int(os.environ["RANK"]), False)
    first, second = trainer(2.0, 3), trainer(64.0, 4)
    first.fit(Trained(), rows)
    first.save_checkpoint(path / "saved")
    second.fit(Trained(), rows, ckpt_path=path / "saved")
    return first.precision_plugin.scaler.get_scale(), second.precision_plugin.scaler.get_scale()


def test_the_scale_is_in_checkpoints(tmp_path: Path) -> None:
    assert run_ranks(saved_and_loaded, 2, tmp_path) == [(16.0, 32.0)] * 2


# ---- refusals

# FSDPPrecision and DeepSpeedPrecision leave the rounding to Lightning's strategies: a module would silently train in
# float32. The others replace linears. Some constructors ask for packages that are not here.
OTHERS = [BitsandbytesPrecision, DeepSpeedPrecision, FSDPPrecision, TransformerEnginePrecision]


@pytest.mark.parametrize("kind", OTHERS)
def test_plugins_of_other_strategies_are_refused(kind: type[Precision]) -> None:
    with pytest.raises(MisconfigurationException, match=f"{kind.__name__}.*bf16-mixed"):
        HybridStrategy().precision_plugin = kind.__new__(kind)


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="'8-true' is invalid.*bf16-mixed"):
        L.Trainer(strategy="bharat_hybrid", precision="8-true", accelerator="cpu")  # type: ignore[arg-type]
