"""Averages of the weights on cut modules equal those that Lightning's own callbacks make on one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bharat import callbacks as ours
from lightning_bharat.callbacks.averages import Averages, _local
from lightning_bharat.checkpoints.document import STATE
from lightning_bharat.checkpoints.index import read_index
from lightning_bharat.checkpoints.opened import open_any
from lightning_bharat.checkpoints.stored import StoredTensor
from lightning_bharat.commands import checkpoint
from lightning_bharat.plan.layout import Layout
from lightning_bharat.strategies.hybrid import HybridStrategy
from tests.modules import Batch, Rows, Trained, whole
from tests.ranks import RanksFailed, run_ranks

STOP, END = 6, 10  # 4 batches an epoch: stopped in the second, ended in the third
LAYOUTS = {"one": Layout(), "data": Layout(data=2), "tensor": Layout(tensor=2), "both": Layout(data=2, tensor=2)}


def often(average: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """An average of which the number of weights matters."""
    return average + 2 * (weight - average) / (count + 2)


def in_place(averages: list[Tensor], weights: list[Tensor], count: Tensor) -> None:
    for average, weight in zip(averages, weights, strict=True):
        average.lerp_(weight, 1 / (float(count) + 3))


def make(kind: str, package: Any) -> Callback:
    """A callback of ``package``: Lightning's callbacks, or ours."""

    class ByEpoch(package.WeightAveraging):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return epoch_idx is not None

    makers: dict[str, Callable[[], Callback]] = {
        "none": Callback,
        "ema": lambda: package.EMAWeightAveraging(decay=0.8),
        "swa": package.WeightAveraging,
        "each epoch": lambda: ByEpoch(use_buffers=False),
        "avg_fn": lambda: package.WeightAveraging(avg_fn=often),
        "multi_avg_fn": lambda: package.WeightAveraging(device="cpu", multi_avg_fn=in_place),
        "sometimes": lambda: package.EMAWeightAveraging(
            "cpu", decay=0.5, update_every_n_steps=3, update_starting_at_epoch=1
        ),
    }
    return makers[kind]()


class Averaged(Trained):
    """Its validation losses show with which weights it was validated."""

    rows_of = "nano"
    save_in_validation: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.double()  # plain Lightning copies it before it makes it float64, and would average float32
        self.register_buffer("drift", torch.zeros(3, dtype=torch.float64))
        self.vals: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.drift += torch.arange(3)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("drift", self.drift.sum(), batch_size=len(batch["rows"]))

    def on_validation_batch_end(self, *_: Any) -> None:
        if self.save_in_validation and self.trainer.global_step == STOP:
            self.trainer.save_checkpoint(self.save_in_validation)

    def on_validation_end(self) -> None:
        self.vals += [float(self.trainer.callback_metrics[name]) for name in ("val", "drift")]


class Stateful(Rows):
    """Knows where it stands, so that a run can be stopped in the middle of an epoch."""

    at = start = 0

    def __iter__(self) -> Iterator[Batch]:
        start, self.start = self.start, 0
        for self.at, batch in enumerate(super().__iter__(), 1):
            if self.at > start:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["at"]


def fit(
    kind: str,
    layout: Layout | None = None,
    steps: int = END,
    save: str | None = None,
    ckpt: str | None = None,
    options: dict[str, Any] | None = None,
    save_in_validation: str | None = None,
    save_after: str | None = None,
) -> dict[str, Any]:
    """Train with our callback, or with Lightning's on one plain process (``layout=None``).

    Saves after :data:`STOP` steps to the folder ``save``, in the validation after them, and when training has ended;
    begins at ``ckpt``.
    """
    plain = layout is None
    layout = layout or Layout()
    L.seed_everything(7, verbose=False)
    callbacks: list[Callback] = [make(kind, lightnings if plain else ours)]
    if save is not None:
        callbacks.append(ModelCheckpoint(save, "{step}", every_n_train_steps=STOP, save_top_k=-1))
    hybrid = HybridStrategy(layout.data, layout.tensor, **(options or {}))
    loop = L.Trainer(
        strategy="auto" if plain else hybrid,
        devices=layout.devices,
        accelerator="cpu",
        precision="64-true",
        max_steps=steps,
        val_check_interval=2,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=save is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rank = int(os.environ.get("RANK", 0)) // layout.tensor
    module = Averaged()
    module.save_in_validation = save_in_validation
    rows = [Stateful("nano", 8, 4, layout.data, rank, False), Rows("nano", 8, 2, layout.data, rank, False)]
    loop.fit(module, *rows, ckpt_path=ckpt)
    left = {name: whole(module, name, p) for name, p in module.named_parameters()}
    left["drift"] = module.drift.clone()
    loop.validate(module, rows[1], verbose=False)
    if save_after is not None:
        loop.save_checkpoint(save_after)
    kept = sum(_local(t).numel() for t in callbacks[0]._averages.tensors.values()) if kind == "ema" and not plain else 0
    return {"losses": [loss for loss, _ in module.seen], "vals": module.vals, "left": left, "kept": kept}


def assert_same(found: dict[str, Any], expected: dict[str, Any], vals: slice = slice(0, None)) -> None:
    """The losses, the validation losses ``vals`` of the expected ones, and the weights that training left."""
    count = len(found["losses"])
    assert found["losses"] == pytest.approx(expected["losses"][-count:], abs=1e-9)
    compared = expected["vals"][vals]
    assert found["vals"][-len(compared) :] == pytest.approx(compared, abs=1e-9)
    for name, value in expected["left"].items():
        torch.testing.assert_close(found["left"][name], value, rtol=0, atol=1e-9, msg=name)


@pytest.fixture(scope="module")
def whole_run() -> Callable[[str], dict[str, Any]]:
    """Plain Lightning on one process with its own callback, not stopped; run once for each kind."""
    runs: dict[str, dict[str, Any]] = {}

    def run(kind: str) -> dict[str, Any]:
        if kind not in runs:
            runs[kind] = run_ranks(fit, 1, kind)[0]
        return runs[kind]

    return run


def fits(kinds: list[str], layout: Layout, options: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """:func:`fit` of each kind, one after another on the same ranks."""
    return [fit(kind, layout, options=options) for kind in kinds]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_averages_as_lightning_does_on_one_process(whole_run: Callable, layout: str) -> None:
    kinds = ["ema", "swa"]
    for rank in run_ranks(fits, LAYOUTS[layout].devices, kinds, LAYOUTS[layout]):
        for kind, found in zip(kinds, rank, strict=True):
            assert_same(found, whole_run(kind))


def test_functions_and_intervals(whole_run: Callable) -> None:
    kinds = ["avg_fn", "multi_avg_fn", "sometimes"]
    for rank in run_ranks(fits, 4, kinds, LAYOUTS["both"], {"reshard_after_forward": False}):
        for kind, found in zip(kinds, rank, strict=True):
            assert_same(found, whole_run(kind))


def test_before_the_first_update_the_weights_are_the_module_s_own(whole_run: Callable) -> None:
    for found in run_ranks(fit, 2, "each epoch", LAYOUTS["data"]):
        assert_same(found, whole_run("each epoch"), slice(6, None))
        assert found["vals"][:6] == pytest.approx(whole_run("none")["vals"][:6], abs=1e-9)
    assert whole_run("each epoch")["vals"][2:4] == whole_run("each epoch")["vals"][:2]  # Lightning's: the initial ones


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[dict[str, Any]]]]:
    """The checkpoint of a run on a layout, saved after :data:`STOP` steps, beside it ``within.ckpt`` of the validation
    after them, and what its ranks found; run once for each layout."""
    runs: dict[str, tuple[Path, list[dict[str, Any]]]] = {}

    def run(name: str) -> tuple[Path, list[dict[str, Any]]]:
        if name not in runs:
            folder, layout = tmp_path_factory.mktemp("stopped"), LAYOUTS[name]
            within = str(folder / "within.ckpt")
            ranks = run_ranks(fit, layout.devices, "ema", layout, STOP, str(folder), None, None, within)
            runs[name] = folder / f"step={STOP}.ckpt", ranks
        return runs[name]

    return run


@pytest.mark.parametrize(("first", "then"), [("data", "tensor"), ("both", "one"), ("one", "both"), ("tensor", "data")])
def test_resumed_on_another_layout(stopped: Callable, whole_run: Callable, first: str, then: str) -> None:
    layout = LAYOUTS[then]
    for found in run_ranks(fit, layout.devices, "ema", layout, END, None, str(stopped(first)[0])):
        assert len(found["losses"]) == END - STOP
        assert_same(found, whole_run("ema"), slice(8, None))


def load(path: Path) -> dict[str, Tensor]:
    """The ``state_dict`` of a checkpoint."""
    return {name: v.read() if isinstance(v, StoredTensor) else v for name, v in open_any(path).weights().items()}


def test_averages_are_stored_in_pieces_once_and_exported(stopped: Callable) -> None:
    path, ranks = stopped("both")
    left = ranks[0]["left"]
    index = read_index(path)
    model = {name for name, _ in Averaged().named_parameters()}
    for name in model:
        for stored in (name, f"current_model_state/{name}"):
            assert stored in index.state_dict_metadata
    count = sum(p.numel() for p in Averaged().parameters())
    assert all(rank["kept"] < 0.35 * count for rank in ranks)  # what is not cut is divided over data ranks
    size = 8 * count
    files = {file.name: file.stat().st_size for file in path.glob("*.safetensors")}
    assert len(files) == 4
    assert sum(files.values()) < 4.3 * size  # averages, weights and AdamW's two moments, each once
    assert max(files.values()) < 1.5 * size
    assert (path / STATE).stat().st_size < size / 2
    averages = load(path)
    for name in model:
        torch.testing.assert_close(averages[name], left[name], rtol=0, atol=1e-9, msg=name)


def test_plain_lightning_and_we_continue_from_each_other_s_ckpt(tmp_path: Path, whole_run: Callable) -> None:
    plain, gathered = tmp_path / "plain", tmp_path / "gathered"
    run_ranks(fit, 1, "ema", None, STOP, str(plain))
    run_ranks(fit, 4, "ema", LAYOUTS["both"], STOP, str(gathered), None, {"save_distributed_checkpoint": False})
    checkpoint.convert(plain / f"step={STOP}.ckpt", tmp_path / "converted")
    assert "current_model_state/model.head.weight" in read_index(tmp_path / "converted").state_dict_metadata
    runs = run_ranks(fit, 2, "ema", LAYOUTS["data"], END, None, str(tmp_path / "converted"))
    runs += run_ranks(fit, 4, "ema", LAYOUTS["both"], END, None, str(plain / f"step={STOP}.ckpt"))
    runs += run_ranks(fit, 1, "ema", None, END, None, str(gathered / f"step={STOP}.ckpt"))
    runs += run_ranks(fit, 2, "ema", LAYOUTS["tensor"], END, None, str(gathered / f"step={STOP}.ckpt"))
    for found in runs:
        assert_same(found, whole_run("ema"), slice(8, None))


def test_saved_in_validation_both_are_the_right_way_round(stopped: Callable) -> None:
    """Lightning's callback would save the averages as the weights that train, and these as the averages."""
    path, _ = stopped("data")
    before, within = (open_any(saved).content for saved in (path, path.with_name("within.ckpt")))
    for key in ("state_dict", "current_model_state"):
        for name, value in before[key].items():
            torch.testing.assert_close(within[key][name].read(), value.read(), rtol=0, atol=0, msg=name)


def test_saved_after_training_it_continues_with_the_weights_that_trained(tmp_path: Path, whole_run: Callable) -> None:
    path = str(tmp_path / "after.ckpt")
    run_ranks(fit, 2, "ema", LAYOUTS["data"], 8, None, None, None, None, path)
    for found in run_ranks(fit, 2, "ema", LAYOUTS["tensor"], END, None, path):
        assert len(found["losses"]) == 2
        assert_same(found, whole_run("ema"), slice(10, None))


def test_masks_and_counts_stay_what_they_are() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
    module.register_buffer("causal", torch.ones(3, 3, dtype=torch.bool).tril())
    module.register_buffer("count", torch.tensor(0))
    module.register_buffer("mean", torch.tensor(2.0))
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    averages = Averages(module, None)
    for count, mean in ((1, 4.0), (2, 6.0)):
        module.count.fill_(count)
        module.mean.fill_(mean)
        averages.update(module, None, None, use_buffers=True)
    found = averages.tensors
    assert torch.equal(found["mask"], before["mask"]) and torch.equal(found["causal"], before["causal"])
    assert found["count"] == 2 and found["mean"] == 4


class Small(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_small(callback: Callback, strategy: Any = "auto", devices: int = 1) -> Tensor:
    L.seed_everything(3, verbose=False)
    module = Small()
    trainer = L.Trainer(
        strategy=strategy,
        devices=devices,
        accelerator="cpu",
        max_steps=4,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.ones(8, 2), batch_size=2))
    return module.layer.weight.detach().clone()


def test_a_callback_that_was_used_before_begins_anew() -> None:
    callback = ours.EMAWeightAveraging(decay=0.5)
    assert torch.equal(fit_small(callback), fit_small(callback))


def under_ddp() -> Tensor:
    return fit_small(ours.EMAWeightAveraging(decay=0.5), "ddp", 2)


def test_it_works_under_ddp() -> None:
    expected = fit_small(lightnings.EMAWeightAveraging(decay=0.5))
    for found in run_ranks(under_ddp, 2):
        torch.testing.assert_close(found, expected)


def under_model_parallel() -> None:
    from lightning.pytorch.strategies import ModelParallelStrategy

    fit_small(ours.WeightAveraging(), ModelParallelStrategy(), 2)


def test_it_is_refused_under_strategies_that_cut_in_another_way() -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(under_model_parallel, 2)
    for outcome in failed.value.outcomes:
        assert (
            'does not know how ModelParallelStrategy cuts a module; write strategy="bharat_hybrid"' in outcome.message
        )


def test_two_functions_are_refused() -> None:
    with pytest.raises(ValueError, match="avg_fn and multi_avg_fn are both given"):
        ours.WeightAveraging(avg_fn=often, multi_avg_fn=in_place)


def test_it_is_made_from_a_config() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(Callback, "callback")
    arguments = {"decay": 0.9, "device": "cpu"}
    given = {"class_path": "lightning_bharat.callbacks.EMAWeightAveraging", "init_args": arguments}
    made = parser.instantiate(parser.parse_object({"callback": given})).callback
    assert isinstance(made, ours.EMAWeightAveraging) and made.device == torch.device("cpu")
