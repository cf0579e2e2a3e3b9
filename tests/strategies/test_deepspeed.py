"""``strategy="bharat_deepspeed"`` on real ranks: the losses of one process in every stage of ZeRO.

DeepSpeed keeps float32 copies of what it divides, so nothing can be compared in float64. An import of DeepSpeed and the
first engine take seconds, a fit a fraction of one: each rank runs many fits.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from lightning_bharat import DeepSpeedStrategy
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.opened import open_any
from lightning_bharat.commands.checkpoint import convert, describe, export
from tests.modules import Rows, Trained
from tests.ranks import RanksFailed, run_ranks

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


class Resumed(Rows):
    """Knows its position."""

    at = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in list(super().__iter__())[self.at :]:
            self.at += 1
            yield batch
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


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
    trainer.fit(module, Resumed("nano", 8, 8, ranks, rank, False), ckpt_path=ckpt)
    if out is not None:
        trainer.save_checkpoint(out)
    return [loss for loss, _ in module.seen]


def losses_of_one() -> list[float]:
    return fit("auto")


def losses_of_cases() -> dict[str, list[float]]:
    torch.manual_seed(0)
    return {name: fit(strategy, **options) for name, (strategy, options) in CASES.items()}


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


# ---- what is refused, and errors


def fails_on_one_rank() -> None:
    class Fails(Losses):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1 and self.global_rank == 1:
                raise ValueError("a bad batch")
            return super().training_step(batch, batch_idx)

    fit({"stage": 3}, kind=Fails)


def test_one_rank_s_error_ends_all() -> None:
    began = time.monotonic()
    with pytest.raises(RanksFailed) as failed:
        run_ranks(fails_on_one_rank, 2)
    first, second = failed.value.outcomes
    assert (first.error, second.error) == ("PeerError", "ValueError")
    assert "rank 1 raised ValueError: a bad batch" in first.message
    assert not first.timed_out and time.monotonic() - began < 30


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Any, list[float]]]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(saved_and_continued, 2, str(folder), timeout=100)[0]


def test_any_stage_and_number_of_ranks_continues_any_other_and_hybrid(saved: Any, whole: list[float]) -> None:
    folder, of_pairs = saved
    on_one = run_ranks(continued_on_one_rank, 1, str(folder))[0]
    assert of_pairs.keys() == set(CONTINUED)
    for kind, losses in {**of_pairs, **on_one}.items():
        assert losses == pytest.approx(whole[11:], rel=1e-5), kind


def test_commands_read_what_deepspeed_wrote(saved: Any, tmp_path: Path) -> None:
    folder, _ = saved
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
def test_code_in_a_file_is_not_run(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved[0] / "2", "bad")
    file = tmp_path / "bad" / "checkpoint" / name
    torch.save({**torch.load(file, weights_only=False), "more": Runs()}, file)
    with pytest.raises(CheckpointError, match="could run code when read"):
        open_any(tmp_path / "bad")
    assert not Path("it_ran").exists()


def test_incomplete_and_foreign_checkpoints(saved: Any, tmp_path: Path) -> None:
    for change, words in (
        (
            lambda tag: (tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink(),
            "incomplete: 2 ranks have written it",
        ),
        (lambda tag: (tag / "mp_rank_01_model_states.pt").touch(), "several model-parallel ranks"),
        (lambda tag: (tag / "zero").mkdir(), "a universal one"),
    ):
        shutil.copytree(saved[0] / "2", tmp_path / "copy")
        change(tmp_path / "copy" / "checkpoint")
        with pytest.raises(CheckpointError, match=words):
            open_any(tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy")
