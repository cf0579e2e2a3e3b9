"""Gradients in a person's hands: clipping, hooks that read them, some or all weights frozen, on each layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import grad_norm
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

from lightning_bharat.strategies.refusals import ModuleError
from tests.modules import Batch, fit
from tests.ranks import run_ranks
from tests.strategies.layouts import Case, Layers, check, places
from tests.strategies.odd import OnVectors


class Auto(OnVectors):
    """Named after what is in ``Layers``."""

    def __init__(self) -> None:
        super().__init__(Layers())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)


class OwnClipping(Auto):
    """Clips every second step, as Lightning's documentation writes it."""

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        if self.global_step % 2:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)


class TorchClips(Auto):
    """By torch's function, and logs what it returns."""

    norm_type: float = 2.0

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        norm = clip_grad_norm_(self.parameters(), 0.2, norm_type=self.norm_type)
        self.log("norm", norm)


class ByMaximum(TorchClips):
    norm_type = float("inf")


class EachNorm(TorchClips):
    """Clips each weight by its own norm, and block by block."""

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        for p in self.parameters():
            clip_grad_norm_(p, 0.1)
        for layer in self.model.layers:
            self.log("block", clip_grad_norm_(layer.parameters(), 0.1, foreach=False))


class Values(Auto):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        clip_grad_value_(self.parameters(), 0.01)


class LogsNorms(Auto):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        self.log_dict(grad_norm(self.model, norm_type=2))
        self.log("total", get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))


class LogsLater(Auto):
    def on_after_backward(self) -> None:
        self.log_dict(grad_norm(self, norm_type="inf"))
        for name, p in self.named_parameters():
            self.log(f"w/{name}", p.detach().norm())


class LogsOthers(Auto):
    """What people make of gradients for a plot."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        for name, p in self.named_parameters():
            self.log(f"{name}/mean", p.grad.abs().mean())
            self.log(f"{name}/most", p.grad.max() - torch.amin(p.grad))
            self.log(f"{name}/square", p.grad.pow(2).sum().item())
            self.log(f"{name}/ratio", (p.grad.norm(1) / (p.detach().norm() + 1)).sqrt())
            self.log(f"{name}/finite", float(torch.isfinite(p.grad).all()) + float((p.grad > 1e9).any()))
            self.log(f"{name}/positive", (p.grad.flatten() > 0).sum().float())
        square = sum(p.grad.detach().data.square().sum() for p in self.parameters())
        if square > 0.01:  # clipped by hand
            for p in self.parameters():
                p.grad = p.grad * (0.1 / square.sqrt())


class Scales(Auto):
    """Changes gradients, element by element."""

    def on_after_backward(self) -> None:
        for name, p in self.named_parameters():
            p.grad.mul_(0.5 if "norm" in name else 2.0)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for p in self.parameters():
            p.grad.nan_to_num_().clamp_(-0.05, 0.05)
        super().on_before_optimizer_step(optimizer)


class HeadOnly(Auto):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.model.head.requires_grad_(True)


class FrozenBlock(Auto):
    def __init__(self) -> None:
        super().__init__()
        self.model.layers[0].requires_grad_(False)
        self.model.layers[1].up.weight.requires_grad_(False)
        self.model.scale.requires_grad_(False)


class AllInOptimizer(FrozenBlock):
    """Gives it the frozen ones as well."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-4)


class Thaws(AllInOptimizer):
    """Block by block in mid-run."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 1:
            self.model.layers[0].requires_grad_(True)
        if self.global_step == 3:
            self.model.layers[0].up.requires_grad_(False)
            self.model.scale.requires_grad_(True)
            self.model.first.requires_grad_(False)


class ThawsInStep(AllInOptimizer):
    """In the middle of a step."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        if self.global_step == 2:
            self.model.requires_grad_(True)
        if self.global_step == 3:
            self.model.head.bias.requires_grad_(False)
        return super().training_step(batch, batch_idx)


class Unused(Auto):
    """A part that no step uses: it has no gradient, and no decay."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.model.layers[0].unused = nn.Linear(3, 3)
        self.model.layers[1].unused = nn.Linear(3, 3)


CASES = {
    "norm": Case(Auto, {"gradient_clip_val": 0.2}),
    "value": Case(Auto, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "own": Case(OwnClipping, {"gradient_clip_val": 0.2}),
    "torch clips": Case(TorchClips),
    "torch clips by the maximum": Case(ByMaximum),
    "torch clips each": Case(EachNorm),
    "torch clips values": Case(Values),
    "logs norms": Case(LogsNorms),
    "logs later": Case(LogsLater),
    "logs others": Case(LogsOthers),
    "scales": Case(Scales),
    "head only": Case(HeadOnly),
    "frozen block": Case(FrozenBlock),
    "all in optimizer": Case(AllInOptimizer),
    "thaws": Case(Thaws),
    "thaws in step": Case(ThawsInStep),
    "unused": Case(Unused),
    "accumulates": Case(Thaws, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2}),
}


@pytest.mark.parametrize(("name", "layout"), places(CASES))
def test_as_on_one_process(name: str, layout: str) -> None:
    check(CASES, name, layout)


def refused(strategy: dict[str, Any]) -> None:
    words = "each stage of a pipeline has others.*strategy.grad_norm.*clip_gradients"
    for module in (LogsNorms, TorchClips):
        with pytest.raises(ModuleError, match=words):
            fit(module, strategy, steps=1, batch=12, limit_val_batches=0)


def test_stages_of_a_pipeline_refuse_norms_of_what_they_hold() -> None:
    run_ranks(refused, 2, {"pipeline_parallel_size": 2})
