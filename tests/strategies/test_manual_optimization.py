"""Steps that optimize by hand, on each layout: what they do on one process, in float64 to 1e-9."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from tests.modules import Batch
from tests.plan.models import Nano
from tests.strategies.layouts import Case, Layers, check, places
from tests.strategies.odd import Odd, OnVectors


class ByHand(OnVectors):
    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__(Layers())
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-4)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def logged(self, batch: Batch) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, sync_dist=True)
        return loss


class One(ByHand):
    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.logged(batch))
        optimizer.step()
        self.lr_schedulers().step()


class StepsFirst(ByHand):
    """Steps with the gradients of the batch before, and reads weights after it."""

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        optimizer = self.optimizers()
        if batch_idx:
            optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        self.manual_backward(self.logged(batch))


class Accumulates(ByHand):
    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        optimizer = self.optimizers()
        self.manual_backward(self.logged(batch) / 2)
        if batch_idx % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.3, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()


class WithoutSync(Accumulates):
    """Leaves exchanges of gradients to the last batch, by Lightning's own means."""

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        optimizer = self.optimizers()
        with optimizer.toggle_model(sync_grad=bool(batch_idx % 2)):
            super().training_step(batch, batch_idx)


class Clips(ByHand):
    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.logged(batch))
        self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="value")
        optimizer.step()


class TorchClips(ByHand):
    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.logged(batch))
        self.log("norm", clip_grad_norm_(self.parameters(), 0.2))
        self.log("later", self.model.layers[0].up.weight.grad.norm())
        optimizer.step()


class TwoLosses(ByHand):
    """Two passes from one forward, and a third from another one."""

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        out = self.model(batch["x"])
        loss = F.mse_loss(out, batch["y"])
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(out.square().mean() * 0.1)
        self.manual_backward(self.loss(batch) * 0.5)
        self.log("loss", loss, sync_dist=True)
        optimizer.step()


class StepsTwice(ByHand):
    """Two forward, backward and optimizer steps in one."""

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(self.logged(batch))
            optimizer.step()


class Closure(ByHand):
    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            loss = self.logged(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


class InBlocks(Odd):
    """By hand through blocks that are gathered one at a time."""

    def __init__(self) -> None:
        super().__init__(Nano(width=16, depth=2))
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.log("loss", loss, sync_dist=True)
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(loss * 0.5)
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, gradient_clip_val=0.3)
        optimizer.step()
        self.lr_schedulers().step()


class Gan(OnVectors):
    """As in Lightning's documentation: two nets, two optimizers, one of them at a time."""

    def __init__(self, by: str) -> None:
        super().__init__(Layers())
        self.judge = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
        self.automatic_optimization, self.by = False, by

    def configure_optimizers(self) -> Any:
        nets = self.model, self.judge
        optimizers = [torch.optim.Adam(net.parameters(), lr=1e-2, betas=(0.5, 0.999), eps=1e-4) for net in nets]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) for optimizer in optimizers]

    def true(self, x: Tensor, is_true: bool) -> Tensor:
        found = self.judge(x)
        return F.binary_cross_entropy_with_logits(found, torch.full_like(found, float(is_true)))

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        first, second = self.optimizers()
        with self.only(first):
            loss = self.true(self.model(batch["x"]), True)
            self.log("loss", loss, sync_dist=True)
            self.step(first, loss)
        with self.only(second):
            loss = self.true(batch["y"], True) + self.true(self.model(batch["x"]).detach(), False)
            self.log("judge", loss, sync_dist=True)
            self.step(second, loss)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def only(self, optimizer: Any) -> Any:
        if self.by == "toggled_optimizer":
            return self.toggled_optimizer(optimizer)
        return optimizer.toggle_model() if self.by == "toggle_model" else _Toggled(self, optimizer)


class _Toggled:
    def __init__(self, module: Gan, optimizer: Any) -> None:
        self.module, self.optimizer = module, optimizer

    def __enter__(self) -> None:
        if self.module.by == "toggle":
            self.module.toggle_optimizer(self.optimizer)

    def __exit__(self, *_: object) -> None:
        if self.module.by == "toggle":
            self.module.untoggle_optimizer(self.optimizer)


class Alternating(Gan):
    """Every batch trains one of the nets."""

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        optimizer = self.optimizers()[batch_idx % 2]
        self.toggle_optimizer(optimizer)
        out = self.model(batch["x"])
        loss = self.true(out, True) if batch_idx % 2 == 0 else self.true(out, False) + self.true(batch["y"], True)
        self.log("loss", loss, sync_dist=True)
        self.step(optimizer, loss)
        self.untoggle_optimizer(optimizer)


CASES = {
    "one": Case(One),
    "steps first": Case(StepsFirst, both=False),
    "accumulates": Case(Accumulates),
    "without sync": Case(WithoutSync),
    "clips by value": Case(Clips, both=False),
    "clips by torch": Case(TorchClips),
    "two losses": Case(TwoLosses),
    "steps twice": Case(StepsTwice, both=False),
    "closure": Case(Closure, both=False),
    "in blocks": Case(InBlocks),
    "gan": Case(lambda: Gan(""), both=False),
    "gan toggle": Case(lambda: Gan("toggle")),
    "gan toggled": Case(lambda: Gan("toggled_optimizer"), both=False),
    "gan toggle_model": Case(lambda: Gan("toggle_model"), both=False),
    "alternating": Case(lambda: Alternating("toggle")),
}


@pytest.mark.parametrize(("name", "layout"), places(CASES))
def test_by_hand_as_on_one_process(name: str, layout: str) -> None:
    check(CASES, name, layout)
