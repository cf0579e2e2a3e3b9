"""``strategy="bharat_deepspeed"`` on real ranks: the losses of one process in every stage of ZeRO.

DeepSpeed keeps float32 copies of what it divides, so nothing can be compared in float64. An import of DeepSpeed and the
first engine take seconds, a fit a fraction of one: each rank runs many fits.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_bharat import DeepSpeedStrategy
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.opened import open_any
from lightning_bharat.commands.checkpoint import convert, describe, export
from tests.modules import PlacedRows, Trained
from tests.ranks import RanksFailed, run_ranks

pytestmark = pytest.mark.timeout(240)  # some thirty fits in one go: 15 s, on two cores that do nothing else

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


def fit(
    strategy: dict[str, Any] | str,
    steps: int = 10,
    ckpt: str | None = None,
    out: str | None = None,
    kind: type[Losses] = Losses,
    **options: Any,
) -> list[float]:
    """Losses of training on the ranks that call it: 8 batches an epoch, of which three are accumulated, so that the
    last step of an epoch has two."""
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    L.seed_everything(7, verbose=False)
    module = kind("nano")
    trainer = L.Trainer(
        strategy=strategy if isinstance(strategy, str) else DeepSpeedStrategy(**strategy),
        accelerator="cpu",
        devices=ranks,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**ACCUMULATED, **options},
    )
    trainer.fit(module, PlacedRows("nano", 8, 8, ranks, rank, False), ckpt_path=ckpt)
    if out is not None:
        trainer.save_checkpoint(out)
    return [loss for loss, _ in module.seen]


def losses_of_one() -> list[float]:
    return fit("auto")


def losses_of_cases() -> dict[str, list[float]]:
    return {name: fit(strategy, **options) for name, (strategy, options) in CASES.items()}


@pytest.fixture(scope="module")
def whole() -> list[float]:
    return run_ranks(losses_of_one, 1)[0]


@pytest.mark.parametrize("name", CASES)
def test_losses_of_one_process(name: str, ran: Any, whole: list[float]) -> None:
    cases = ran["cases"]
    assert len(cases[name]) == len(whole) == 27  # batches of ten steps
    apart = max(abs(a / b - 1) for a, b in zip(cases[name], whole, strict=True))
    if name.startswith("bf16"):
        assert 1e-6 < apart < 3e-2
    else:
        assert apart < 1e-5


# ---- what is refused, and errors


def fails_on_one_rank() -> None:
    class Fails(Losses):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1 and self.global_rank == 1:
                raise ValueError("a bad batch")
            return super().training_step(batch, batch_idx)

    fit({"stage": 3}, kind=Fails)


def test_one_rank_s_error_ends_all() -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(fails_on_one_rank, 2, timeout=120)  # the rest has ten seconds after the first failure
    first, second = failed.value.outcomes
    assert (first.error, second.error) == ("PeerError", "ValueError")
    assert "rank 1 raised ValueError: a bad batch" in first.message
    assert not first.timed_out and not second.timed_out


def test_without_deepspeed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-bharat\[deepspeed\]"'):
        L.Trainer(strategy="bharat_deepspeed", accelerator="cpu", devices=2)


# ---- checkpoints

# From which to which: stages, or "hybrid".
CONTINUED = ((1, 3), (3, 1), (2, "hybrid"), (3, "hybrid"), ("hybrid", 2), ("hybrid", 3), (0, 2), (2, 0))


def under(kind: int | str) -> dict[str, Any] | str:
    return "bharat_hybrid" if kind == "hybrid" else {"stage": kind}


def saved_and_continued(folder: str) -> dict[Any, list[float]]:
    """Losses after four steps (eleven batches), each from a checkpoint of one kind under another."""
    for kind in ("hybrid", 0, 1, 2, 3):
        fit(under(kind), steps=4, out=f"{folder}/{kind}")
    return {(before, after): fit(under(after), ckpt=f"{folder}/{before}") for before, after in CONTINUED}


def continued_on_one_rank(folder: str) -> dict[Any, list[float]]:
    return {kind: fit({"stage": 2}, ckpt=f"{folder}/{kind}") for kind in (3, "hybrid")}


def test_any_stage_and_number_of_ranks_continues_any_other_and_hybrid(ran: Any, whole: list[float]) -> None:
    folder, of_pairs = ran["folder"], ran["continued"]
    on_one = run_ranks(continued_on_one_rank, 1, str(folder))[0]
    assert of_pairs.keys() == set(CONTINUED)
    for kind, losses in {**of_pairs, **on_one}.items():
        assert losses == pytest.approx(whole[11:], rel=1e-5), kind


def test_commands_read_what_deepspeed_wrote(ran: Any, tmp_path: Path) -> None:
    folder = ran["folder"]
    words = describe(open_any(folder / "3"))
    assert "step:         4 " in words and "directory of DeepSpeed" in words and "optimizers:   1" in words
    convert(folder / "3", tmp_path / "converted")
    export(folder / "2", tmp_path / "exported")
    ours, theirs = open_any(tmp_path / "converted"), open_any(folder / "2")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert ours.weights().keys() == theirs.weights().keys() == exported.keys()
    for name, tensor in exported.items():
        torch.testing.assert_close(ours.weights()[name].read(), tensor, rtol=0, atol=1e-5)
    moments = [opened.content["optimizer_states"][0]["state"] for opened in (ours, theirs)]
    assert moments[0].keys() == moments[1].keys() == exported.keys()
    for name in exported:
        torch.testing.assert_close(*(own[name]["exp_avg"].read() for own in moments), rtol=0, atol=1e-6)
        assert float(moments[1][name]["step"]) == 4


class Runs:
    """Would create a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("it_ran"),)


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_code_in_a_file_is_not_run(ran: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ran["folder"] / "2", "bad")
    file = tmp_path / "bad" / "checkpoint" / name
    torch.save({**torch.load(file, weights_only=False), "more": Runs()}, file)
    with pytest.raises(CheckpointError, match="could run code when read"):
        open_any(tmp_path / "bad")
    assert not Path("it_ran").exists()


def test_incomplete_and_foreign_checkpoints(ran: Any, tmp_path: Path) -> None:
    for change, words in (
        (
            lambda tag: (tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink(),
            "incomplete: 2 ranks have written it",
        ),
        (lambda tag: (tag / "mp_rank_01_model_states.pt").touch(), "several model-parallel ranks"),
        (lambda tag: (tag / "zero").mkdir(), "a universal one"),
    ):
        shutil.copytree(ran["folder"] / "2", tmp_path / "copy")
        change(tmp_path / "copy" / "checkpoint")
        with pytest.raises(CheckpointError, match=words):
            open_any(tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy")


# ---- modules whose parts do not divide


class Odd(L.LightningModule):
    """Sizes that two ranks can't divide, one tensor under two names, buffers, and weights that do not train."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 3)
        self.inner = nn.Linear(3, 3)
        self.register_buffer("steps", torch.zeros(2))
        self.fixed = nn.Linear(3, 3).requires_grad_(False)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.words.weight

    def loss(self, ids: Tensor) -> Tensor:
        hidden = self.fixed(self.inner(self.words(ids)))
        return cross_entropy(self.head(hidden * (1 + self.steps.mean() / 10)), ids.roll(1))

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        self.steps += 1
        return self.loss(ids)

    def validation_step(self, ids: Tensor, batch_idx: int) -> None:
        self.log("val", self.loss(ids), sync_dist=True)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.arange(24) % 7, batch_size=4)

    val_dataloader = train_dataloader

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def of_odd(strategy: Any, ranks: int, **options: Any) -> tuple[L.Trainer, Odd]:
    L.seed_everything(7, verbose=False)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=ranks, logger=False, **quiet, **options)
    return trainer, Odd()


def odd_through_all_stages(folder: str) -> dict[Any, float]:
    found: dict[Any, float] = {}
    for stage in (1, 2, 3):
        trainer, module = of_odd(DeepSpeedStrategy(stage), 2, max_epochs=1)
        trainer.fit(module)
        found[stage] = float(trainer.callback_metrics["val"])
        trainer.save_checkpoint(f"{folder}/odd {stage}")
    for before, after in ((1, 3), (3, 1), (2, 2), (3, 3)):
        trainer, module = of_odd(DeepSpeedStrategy(after), 2)
        found[before, after] = trainer.validate(module, ckpt_path=f"{folder}/odd {before}", verbose=False)[0]["val"]
    return found


def test_parts_that_do_not_divide(ran: Any) -> None:
    every = ran["odd"]
    assert list(every.values()) == pytest.approx([every[1]] * len(every), rel=1e-5)
    read = {stage: open_any(ran["folder"] / f"odd {stage}") for stage in (1, 2, 3)}
    assert all(opened.weights().keys() == Odd().state_dict().keys() for opened in read.values())
    for name, tensor in read[1].weights().items():
        for stage in (2, 3):
            torch.testing.assert_close(whole_of(read[stage].weights()[name]), whole_of(tensor), rtol=1e-5, atol=1e-5)
    states = {stage: opened.content["optimizer_states"][0] for stage, opened in read.items()}
    assert [len(state["param_groups"][0]["params"]) for state in states.values()] == [3, 3, 3]
    for name, own in states[1]["state"].items():
        theirs = states[3]["state"][name]["momentum_buffer"]
        torch.testing.assert_close(whole_of(theirs), whole_of(own["momentum_buffer"]), rtol=1e-5, atol=1e-5)


def whole_of(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value.read()


# ---- all of it on two ranks


def all_of_it(folder: str) -> dict[str, Any]:
    continued = saved_and_continued(folder)
    return {"cases": losses_of_cases(), "continued": continued, "odd": odd_through_all_stages(folder)}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, without_a_compiler = tmp_path_factory.mktemp("ran"), {"PATH": ""}
    every = run_ranks(all_of_it, 2, str(folder), timeout=220, env=without_a_compiler)[0]
    return {**every, "folder": folder}
