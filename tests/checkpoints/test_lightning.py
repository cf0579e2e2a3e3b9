"""Checkpoints through Lightning's Trainer, on one process and on two replicas, without any cut."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_bharat.checkpoints import CheckpointError
from lightning_bharat.plan.layout import Layout
from lightning_bharat.strategies.checkpoint import ShardedCheckpoints
from tests.ranks import run_ranks

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "precision": "64-true",
    "enable_checkpointing": False,
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


class One(ShardedCheckpoints, SingleDeviceStrategy):
    layout, plan, slices, tensor_group = Layout(), None, {}, None


class Two(ShardedCheckpoints, DDPStrategy):
    layout, plan, slices, tensor_group = Layout(data=2), None, {}, None


class Module(L.LightningModule):
    """Two optimizers, schedulers, tied weights, a buffer, a persistent metric, extra state, hooks with extras."""

    def __init__(self, width: int = 4, options: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.metric = MeanMetric()
        self.metric.persistent(True)
        self.automatic_optimization = False
        self.losses: list[float] = []
        self.extra = "new"

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": int(self.batches)}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.restored = state["seen"]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = (self.second(self.first(batch)) - 1).square().mean()
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            optimizer.step()
            scheduler.step()
        self.batches += 1
        self.metric.update(loss)
        self.losses.append(float(loss.detach()))
        self.log("seen", self.batches.double())

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        one = torch.optim.AdamW([{"params": [self.first.weight]}, {"params": [self.first.bias], "lr": 0.01}], lr=0.02)
        two = torch.optim.SGD([self.second.bias], lr=0.1, momentum=0.9)
        return [one, two], [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (one, two)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"extra": "kept", "tensor": torch.arange(3)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.extra = checkpoint["mine"]["extra"]
        assert torch.equal(checkpoint["mine"]["tensor"], torch.arange(3))


class Counting(Callback):
    count = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def batches() -> torch.utils.data.DataLoader:
    data = torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.utils.data.DataLoader(data, batch_size=4)


def fit(strategy: Any, epochs: int, ckpt: Any = None, callbacks: Any = (), **options: Any) -> tuple[L.Trainer, Module]:
    L.seed_everything(1, verbose=False)
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    callbacks = [Counting(), *callbacks]
    keeps = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    options = {**QUIET, "enable_checkpointing": keeps, **options}
    trainer = L.Trainer(strategy=strategy, devices=devices, max_epochs=epochs, callbacks=callbacks, **options)
    module = Module()
    trainer.fit(module, batches(), ckpt_path=ckpt)
    return trainer, module


def validate(module: Module, ckpt: Path) -> None:
    L.Trainer(strategy=One("cpu"), **QUIET).validate(module, batches(), ckpt_path=ckpt, verbose=False)


def state_of(module: Module, trainer: L.Trainer) -> dict[str, Any]:
    found = {k: v.clone() for k, v in module.state_dict().items() if isinstance(v, Tensor)}
    for i, optimizer in enumerate(trainer.optimizers):
        for number, state in optimizer.state_dict()["state"].items():
            found |= {f"{i} {number} {key}": torch.as_tensor(value).clone() for key, value in state.items()}
        found[f"{i} lr"] = torch.tensor([g["lr"] for g in optimizer.param_groups])
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=0, atol=1e-12, msg=key)


@pytest.mark.parametrize("sharded", [True, False])
def test_resume_equals_the_uninterrupted_run(tmp_path: Path, sharded: bool) -> None:
    one = One("cpu")
    one.save_distributed_checkpoint = sharded
    trainer, _ = fit(one, 1)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    assert path.is_dir() == sharded
    whole_trainer, whole = fit("auto", 2)
    trainer, module = fit(One("cpu"), 2, path)
    assert module.extra == "kept"
    assert module.restored == 16
    assert trainer.callbacks[0].count == 32
    assert module.second.weight is module.first.weight
    assert module.losses == pytest.approx(whole.losses[16:], abs=1e-12)
    same(state_of(whole, whole_trainer), state_of(module, trainer))


def test_plain_lightning_and_back(tmp_path: Path) -> None:
    trainer, _ = fit("auto", 1)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    whole_trainer, whole = fit("auto", 2)
    trainer, module = fit(One("cpu"), 2, tmp_path / "plain.ckpt")  # plain -> ours
    same(state_of(whole, whole_trainer), state_of(module, trainer))
    one = One("cpu")
    one.save_distributed_checkpoint = False
    trainer, _ = fit(one, 1)
    trainer.save_checkpoint(tmp_path / "ours.ckpt")
    # Lightning loads weights before it makes them float64: its own file has the same loss of bits
    whole_trainer, whole = fit("auto", 2, tmp_path / "plain.ckpt")
    trainer, module = fit("auto", 2, tmp_path / "ours.ckpt")  # ours -> plain
    same(state_of(whole, whole_trainer), state_of(module, trainer))
    loaded = Module.load_from_checkpoint(tmp_path / "ours.ckpt")
    assert loaded.hparams.width == 4


def test_best_last_and_top_k_are_directories(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="seen", save_top_k=2, save_last=True, filename="{epoch}", mode="max")
    trainer, module = fit(One("cpu"), 4, callbacks=[keep])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=2.ckpt", "epoch=3.ckpt", "last.ckpt"]
    assert all(path.is_dir() for path in tmp_path.iterdir())
    trainer.validate_loop.verbose = False
    trainer.validate(module, batches(), ckpt_path="best")
    assert module.restored == 64
    keep = ModelCheckpoint(tmp_path, monitor="seen", save_top_k=2, save_last=True, filename="{epoch}", mode="max")
    trainer, module = fit(One("cpu"), 5, "last", callbacks=[keep])
    assert module.restored == 64
    assert trainer.global_step == 5 * 16 * 2


def test_weights_alone(tmp_path: Path) -> None:
    trainer, _ = fit(One("cpu"), 1)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(KeyError, match="contains only the model"):
        fit(One("cpu"), 2, tmp_path / "weights.ckpt")


def test_strict_loading_is_the_module_s(tmp_path: Path) -> None:
    trainer, _ = fit(One("cpu"), 1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")

    def load(strict: bool) -> Module:
        module = Module()
        module.adapter = nn.Linear(2, 2)
        module.strict_loading = strict
        validate(module, tmp_path / "half.ckpt")
        return module

    with pytest.raises(CheckpointError, match=r"lacks adapter.bias, adapter.weight \(strict_loading = False"):
        load(True)
    assert int(load(False).batches) == 16


def test_a_module_that_saves_a_part_of_its_weights(tmp_path: Path) -> None:
    """As LoRA does: frozen weights are dropped in on_save_checkpoint, strict_loading is off."""

    class Part(Module):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            super().on_save_checkpoint(checkpoint)
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k == "second.bias"}

    L.seed_everything(1, verbose=False)
    module, trainer = Part(), L.Trainer(strategy=One("cpu"), max_epochs=1, **QUIET)
    trainer.fit(module, batches())
    trainer.save_checkpoint(tmp_path / "part.ckpt", weights_only=True)
    other = Part()
    other.strict_loading = False
    first = other.first.weight.detach().clone()
    validate(other, tmp_path / "part.ckpt")
    assert torch.equal(other.second.bias, module.second.bias)
    assert torch.equal(other.first.weight, first.double())


def test_hyperparameters_that_can_not_be_read_back_are_named(tmp_path: Path) -> None:
    module, trainer = Module(options={"act": nn.ReLU()}), L.Trainer(strategy=One("cpu"), max_epochs=1, **QUIET)
    trainer.fit(module, batches())
    with pytest.raises(CheckpointError, match=r"checkpoint\['hyper_parameters'\]\['options'\]\['act'\] is a torch.nn"):
        trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert not list(tmp_path.iterdir())


def fit_two(folder: str, epochs: int, ckpt: str | None, sharded: bool = True) -> list[float]:
    two = Two(process_group_backend="gloo")
    two.save_distributed_checkpoint = sharded
    trainer, module = fit(two, epochs, ckpt)
    trainer.save_checkpoint(Path(folder) / f"{epochs}.ckpt")
    return module.losses


@pytest.mark.parametrize("sharded", [True, False])
def test_two_replicas(tmp_path: Path, sharded: bool) -> None:
    whole = run_ranks(fit_two, 2, str(tmp_path / "whole"), 2, None)
    run_ranks(fit_two, 2, str(tmp_path / "part"), 1, None, sharded)
    resumed = run_ranks(fit_two, 2, str(tmp_path / "part"), 2, str(tmp_path / "part" / "1.ckpt"), sharded)
    for rank in range(2):
        assert resumed[rank] == pytest.approx(whole[rank][8:], abs=1e-12)
    assert (tmp_path / "part" / "2.ckpt").is_dir() == sharded


class Positions:
    """A loader that knows where it stands, another place on each rank."""

    def __init__(self) -> None:
        self.at = 10 * int(os.environ["RANK"])

    def __iter__(self) -> Any:
        for _ in range(4):
            self.at += 1
            yield torch.ones(2, 4, dtype=torch.float64)

    def __len__(self) -> int:
        return 4

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def stop_in_the_middle(path: str, steps: int, ckpt: str | None) -> int:
    trainer = L.Trainer(strategy=Two(process_group_backend="gloo"), devices=2, max_steps=steps * 2, **QUIET)
    loader = Positions()
    trainer.fit(Module(), loader, ckpt_path=ckpt)
    trainer.save_checkpoint(path)
    return loader.at


def test_every_data_rank_s_loader_continues_where_it_stood(tmp_path: Path) -> None:
    path = str(tmp_path / "half.ckpt")
    assert run_ranks(stop_in_the_middle, 2, path, 2, None) == [2, 12]
    assert run_ranks(stop_in_the_middle, 2, str(tmp_path / "end.ckpt"), 3, path) == [3, 13]
    with pytest.warns(UserWarning, match=r"for each of its 2 data ranks, and there are 1 now"):
        fit(One("cpu"), 1, path)
