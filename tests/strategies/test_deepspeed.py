"""``strategy="bharat_deepspeed"`` on real ranks: the losses of one process in every stage of ZeRO.

DeepSpeed keeps float32 copies of what it divides, so nothing can be compared in float64. An import of DeepSpeed and the
first engine take seconds, a fit a fraction of one: each rank runs many fits.
"""

from __future__ import annotations

import os
from typing import Any

import lightning as L
import pytest
import torch

from lightning_bharat import DeepSpeedStrategy
from tests.modules import Rows, Trained
from tests.ranks import run_ranks

ACCUMULATED = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.3}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stage 0": ({"stage": 0}, {}),
    "stage 1": ({"stage": 1}, {}),
    "stage 2": ({"stage": 2}, {}),
    "stage 3": ({"stage": 3}, {}),
    "optimizer offloaded": ({"stage": 2, "offload_optimizer": True}, {}),
    "all offloaded": ({"stage": 3, "offload_optimizer": True, "offload_parameters": True}, {}),
    "bf16, stage 2": ({"stage": 2}, {"precision": "bf16-mixed"}),
    "bf16, stage 3": ({"stage": 3}, {"precision": "bf16-true"}),
}


class Losses(Trained):
    """Keeps the loss of each batch; gradients belong to DeepSpeed."""

    def on_before_optimizer_step(self, optimizer: Any) -> None: ...


def fit(strategy: dict[str, Any] | None, steps: int = 10, ckpt: str | None = None, **options: Any) -> L.Trainer:
    """Train on the ranks that call it: 8 batches an epoch, of which three are accumulated, so that the last step of an
    epoch has two."""
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    L.seed_everything(7, verbose=False)
    trainer = L.Trainer(
        strategy="auto" if strategy is None else DeepSpeedStrategy(**strategy),
        accelerator="cpu",
        devices=ranks,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**ACCUMULATED, **options},
    )
    trainer.fit(Losses("nano"), Rows("nano", 8, 8, ranks, rank, False), ckpt_path=ckpt)
    return trainer


def seen(trainer: L.Trainer) -> list[float]:
    return [loss for loss, _ in trainer.lightning_module.seen]


def losses_of_one() -> list[float]:
    return seen(fit(None))


def losses_of_cases() -> dict[str, list[float]]:
    torch.manual_seed(0)
    return {name: seen(fit(strategy, **options)) for name, (strategy, options) in CASES.items()}


@pytest.fixture(scope="module")
def cases() -> dict[str, list[float]]:
    without_a_compiler = {"PATH": ""}
    return run_ranks(losses_of_cases, 2, timeout=100, env=without_a_compiler)[0]


@pytest.fixture(scope="module")
def whole() -> list[float]:
    return run_ranks(losses_of_one, 1)[0]


@pytest.mark.parametrize("name", CASES)
def test_losses_of_one_process(name: str, cases: dict[str, list[float]], whole: list[float]) -> None:
    assert len(cases[name]) == len(whole) == 27  # batches of ten steps
    apart = max(abs(a / b - 1) for a, b in zip(cases[name], whole, strict=True))
    if name.startswith("bf16"):
        assert 1e-6 < apart < 3e-2
    else:
        assert apart < 1e-5
