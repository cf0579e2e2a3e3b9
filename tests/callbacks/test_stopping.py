"""Callbacks that end a run, or change how it goes on: all ranks do the same at the same step."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.utilities.spike import TrainingSpikeException
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    SpikeDetection,
    Timer,
)
from torch import Tensor

from tests.modules import Batch, Trained, assert_equal, fit
from tests.ranks import run_ranks

BOTH: dict[str, Any] = {"tensor_parallel_size": 2}  # on 4 ranks data 2 × tensor 2
RANK = "RANK"


class Judged(Trained):
    """Logs a score that gets worse on one rank alone from the second epoch on."""

    rows_of = "stack"

    def __init__(self) -> None:
        super().__init__("stack")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        worse = os.environ[RANK] == "2" and self.current_epoch >= 2
        self.log("score", float(self.current_epoch if worse else -self.current_epoch), sync_dist=False)


def stop_early(plain: bool, monitor: str, patience: int, min_delta: float) -> tuple[Any, int, int]:
    stop = EarlyStopping(monitor, min_delta=min_delta, patience=patience)
    module = Judged if monitor == "score" else "stack"
    result = fit(module, None if plain else BOTH, steps=100, callbacks=[stop], max_epochs=10)
    return result, stop.stopped_epoch, stop.wait_count


def test_early_stopping_by_a_value_of_all_ranks() -> None:
    whole, epoch, _ = run_ranks(stop_early, 1, True, "val", 2, 1e9)[0]
    assert epoch == 2
    for result, stopped, _ in run_ranks(stop_early, 4, False, "val", 2, 1e9):
        assert stopped == epoch
        assert_equal(result, whole)


def test_early_stopping_by_what_one_rank_sees() -> None:
    ranks = run_ranks(stop_early, 4, False, "score", 2, 0.0)
    assert [len(result.seen) for result, _, _ in ranks] == [16] * 4  # epochs 0 to 3, of which 2 and 3 were worse
    assert [wait for _, _, wait in ranks] == [0, 0, 2, 0]


class Clock(Timer):
    """Time passes with the first rank's steps."""

    steps = 0

    def time_elapsed(self, stage: str = "train") -> float:
        return self._offset + (self.steps if os.environ[RANK] == "0" else 0)

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        self.steps += 1
        super().on_train_batch_end(trainer, *args, **kwargs)


def run_out_of_time(folder: str) -> tuple[int, int]:
    keep = ModelCheckpoint(folder, "last", every_n_train_steps=3)
    options = {"enable_checkpointing": True}
    stopped = fit("stack", BOTH, callbacks=[Clock(timedelta(seconds=3)), keep], **options)
    resumed = fit("stack", BOTH, callbacks=[Clock(timedelta(seconds=3))], ckpt=f"{folder}/last.ckpt")
    return len(stopped.seen), len(resumed.seen)


def test_timer_stops_all_ranks_by_the_clock_of_the_first(tmp_path: Path) -> None:
    assert run_ranks(run_out_of_time, 4, str(tmp_path)) == [(3, 0)] * 4


class Spiking(Trained):
    """The loss of one data rank jumps."""

    rows_of = "stack"

    def __init__(self) -> None:
        super().__init__("stack")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 1e6 if batch_idx == 2 and int(os.environ[RANK]) >= 2 else loss


def spike(folder: str) -> str:
    with pytest.raises(TrainingSpikeException) as found:
        fit(Spiking, BOTH, callbacks=[SpikeDetection(exclude_batches_path=folder)])
    return str(found.value)


def test_spike_detection_ends_all_ranks(tmp_path: Path) -> None:
    assert run_ranks(spike, 4, str(tmp_path)) == ["Training spike detected in batch 2"] * 4
    assert json.loads((tmp_path / "skip_batches.json").read_text()) == [1, 2]


def accumulate(plain: bool) -> Any:
    scheduler = GradientAccumulationScheduler({0: 2, 1: 4, 2: 1})
    return fit("stack", None if plain else BOTH, steps=7, callbacks=[scheduler])


def test_accumulation_changes_by_epoch() -> None:
    whole = run_ranks(accumulate, 1, True)[0]
    assert len(whole.seen) == 12  # two steps in the first epoch, one in the second, four in the third
    for result in run_ranks(accumulate, 4, False):
        assert_equal(result, whole)
