"""Freezing and thawing of weights that are cut: the same training as on one process, also resumed after the thaw."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint
from torch import nn
from torch.optim import Optimizer

from lightning_bharat.plan.layout import Layout
from lightning_bharat.strategies.hybrid import HybridStrategy
from tests.modules import Rows, Trained, whole
from tests.ranks import run_ranks

EPOCHS, BATCHES = 4, 3
LAYOUTS = {"data": Layout(data=2), "tensor": Layout(tensor=2), "both": Layout(data=2, tensor=2)}


class Split(Trained):
    """Named as BackboneFinetuning wants it; only the head trains at first."""

    def __init__(self) -> None:
        super().__init__()
        self.double()  # plain Lightning loads a checkpoint before it makes the module float64

    @property
    def backbone(self) -> nn.Module:
        return self.model.layers

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)


class Thaw(BaseFinetuning):
    """As a person writes it: another block trains from each epoch on."""

    def freeze_before_training(self, module: L.LightningModule) -> None:
        self.freeze(module.model.layers)

    def finetune_function(self, module: L.LightningModule, epoch: int, optimizer: Optimizer) -> None:
        if 1 <= epoch <= len(module.model.layers):
            self.unfreeze_and_add_param_group(module.model.layers[-epoch], optimizer, lr=5e-3)


CALLBACKS = {
    "BackboneFinetuning": lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.1),
    "BaseFinetuning": Thaw,
}


def fit(name: str, layout: Layout | None, folder: str | None = None, ckpt: str | None = None) -> dict[str, Any]:
    L.seed_everything(7, verbose=False)
    hybrid = layout and HybridStrategy(layout.data, layout.tensor)
    layout = layout or Layout()
    callbacks = [CALLBACKS[name]()]
    if folder is not None:
        callbacks.append(
            ModelCheckpoint(folder, "{epoch}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True)
        )
    trainer = L.Trainer(
        strategy=hybrid or "auto",
        devices=layout.devices,
        accelerator="cpu",
        precision="64-true",
        max_epochs=EPOCHS,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Split()
    trainer.fit(
        module,
        Rows("nano", 8, BATCHES, layout.data, int(os.environ.get("RANK", 0)) // layout.tensor, False),
        ckpt_path=ckpt,
    )
    return {
        "losses": [loss for loss, _ in module.seen],
        "weights": {name: whole(module, name, p) for name, p in module.named_parameters()},
        "groups": [(len(g["params"]), g["lr"]) for g in trainer.optimizers[0].param_groups],
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(expected["losses"][-len(found["losses"]) :], abs=1e-9)
    assert [n for n, _ in found["groups"]] == [n for n, _ in expected["groups"]]
    for (_, rate), (_, other) in zip(found["groups"], expected["groups"], strict=True):
        assert rate == pytest.approx(other)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-7, msg=name)


@pytest.fixture(scope="module", params=list(CALLBACKS))
def run(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """A callback's name, and its run of plain Lightning on one process."""
    return request.param, run_ranks(fit, 1, request.param, None)[0]


@pytest.fixture(scope="module")
def saved(run: tuple, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The checkpoints of each epoch on two data ranks, and what these found."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(fit, 2, run[0], LAYOUTS["data"], str(folder))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_thaws_as_one_process(run: tuple, saved: tuple, layout: str) -> None:
    found = saved[1] if layout == "data" else run_ranks(fit, LAYOUTS[layout].devices, run[0], LAYOUTS[layout])
    for rank in found:
        assert_same(rank, run[1])


def resumed(name: str, paths: list[str]) -> list[dict[str, Any]]:
    return [fit(name, LAYOUTS["tensor"], None, path) for path in paths]


def test_resumed_before_and_after_the_thaw(run: tuple, saved: tuple) -> None:
    epochs = (0, 1)
    for rank in run_ranks(resumed, 2, run[0], [str(saved[0] / f"epoch={epoch}.ckpt") for epoch in epochs]):
        for epoch, found in zip(epochs, rank, strict=True):
            assert len(found["losses"]) == (EPOCHS - 1 - epoch) * BATCHES
            assert_same(found, run[1])
