"""Saves beside training, while other things happen to the same run."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_bharat import events
from lightning_bharat.callbacks import FaultTolerantCheckpoint, Tier
from lightning_bharat.checkpoints import safetensors_file
from lightning_bharat.checkpoints.background import Background
from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.checkpoints.whole import checkpoints_in, problems
from lightning_bharat.plan.layout import Layout
from tests.modules import PlacedRows, fit
from tests.ranks import run_ranks
from tests.strategies.test_relayout import Watched


class Late(L.Callback):
    """From the second step on no file is written before something waits for it."""

    def __init__(self) -> None:
        self.is_late, self.seen = False, []
        self.asked = threading.Event()
        write, wait = safetensors_file.write, Background.wait

        def late(*args: Any) -> str:
            assert not self.is_late or threading.current_thread() is threading.main_thread() or self.asked.wait(20)
            return write(*args)

        def ask(writer: Background, *args: Any) -> bool:
            if not writer.is_idle:
                self.seen.append(True)
                self.asked.set()
            return wait(writer, *args)

        safetensors_file.write, Background.wait = late, ask  # type: ignore[assignment, method-assign]

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        strategy: Any = trainer.strategy
        strategy.saves.writer.wait()
        self.asked.clear()
        self.is_late = trainer.global_step == 1
        self.seen = []
        if self.is_late:
            strategy.relayout(Layout(tensor=2))  # when the batch is through


def run(folder: str, changes: bool) -> tuple[list[float], list[bool]]:
    from lightning_bharat.strategies.hybrid import HybridStrategy

    L.seed_everything(1, verbose=False)
    module, late = Watched(batch=4), Late()
    seen: list[bool] = []

    class Seen(L.Callback):
        def on_fit_start(self, *_: Any) -> None:
            seen.extend(late.seen)

    keep = FaultTolerantCheckpoint(f"{folder}/disk", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = L.Trainer(
        strategy=HybridStrategy(data_parallel_size=2),
        devices=2,
        accelerator="cpu",
        precision="64-true",
        max_steps=4,
        callbacks=[keep, *([late, Seen()] if changes else [])],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    return module.losses, seen


def test_the_layout_changes_while_a_save_is_written(tmp_path: Path) -> None:
    losses, was_writing = run_ranks(run, 2, str(tmp_path / "changed"), True)[0]
    expected, _ = run_ranks(run, 2, str(tmp_path / "kept"), False)[0]
    assert any(was_writing) and losses == pytest.approx(expected, abs=1e-9)
    there = checkpoints_in(tmp_path / "changed/disk")
    assert [Manifest.read(path).step for path in there] == [1, 2, 3, 4]
    assert [Manifest.read(path).layout["tensor"] for path in there] == [1, 1, 2, 2]
    assert not [problem for path in there for problem in problems(path)]
    assert [e["step"] for e in events.read(tmp_path / "changed") if e["kind"] == "save"] == [1, 2, 3, 4]


def packed(folder: str, layout: dict[str, Any], steps: int) -> tuple[int, dict[str, torch.Tensor]]:
    tier = Tier(f"file://{folder}/store", compression="zstd")
    keep = FaultTolerantCheckpoint(f"{folder}/disk", every_n_train_steps=1, tiers=[tier])
    options = {**layout, "checkpoint_compression": "zstd", "checkpoint_read_back": True}
    common: dict[str, Any] = {"enable_checkpointing": True, "default_root_dir": folder, "rows_kind": PlacedRows}
    begun: list[int] = []

    class Begun(L.Callback):
        def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
            begun.append(trainer.global_step)

    found = fit("gpt", options, steps, ckpt="last", callbacks=[keep, Begun()], **common)
    return begun[0], found.weights


@pytest.mark.parametrize("layout", [{}, {"tensor_parallel_size": 2}], ids=["the same layout", "another one"])
def test_compressed_read_back_and_copied_ones_are_gone_on_from(tmp_path: Path, layout: dict[str, Any]) -> None:
    run_ranks(packed, 2, str(tmp_path / "cut"), {}, 2)
    os.rename(tmp_path / "cut/disk", tmp_path / "lost")
    begun, weights = run_ranks(packed, 2, str(tmp_path / "cut"), layout, 4)[0]
    _, expected = run_ranks(packed, 2, str(tmp_path / "whole"), {}, 4)[0]
    assert begun == 2
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-9 if layout else 0, atol=1e-9 if layout else 0)
