"""Callbacks that save, measure or write: on data 2 × tensor 2 they leave what they leave on one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    DeviceStatsMonitor,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    RichProgressBar,
    ThroughputMonitor,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger

from lightning_bharat import HybridStrategy
from tests.modules import Rows, Trained, fit
from tests.ranks import RanksFailed, run_ranks

BOTH: dict[str, Any] = {"tensor_parallel_size": 2}  # on 4 ranks data 2 × tensor 2


def watch(folder: str, plain: bool) -> dict[str, Any]:
    best = ModelCheckpoint(f"{folder}/best", "{epoch}-{val:.6f}", "val", save_top_k=2, save_last=True)
    often = ModelCheckpoint(f"{folder}/often", "{step}", every_n_train_steps=3, save_top_k=-1)
    steps: list[int] = []
    result = fit(
        "stack",
        None if plain else BOTH,
        steps=10,
        enable_checkpointing=True,
        logger=CSVLogger(folder, "logs", version=0),
        log_every_n_steps=1,
        callbacks=[
            best,
            often,
            LearningRateMonitor(),
            DeviceStatsMonitor(cpu_stats=True),
            ThroughputMonitor(lambda batch: len(batch["rows"]), window_size=3),
            LambdaCallback(on_train_batch_end=lambda trainer, *_: steps.append(trainer.global_step)),
        ],
    )
    scores = {Path(path).name: float(score) for path, score in best.best_k_models.items()}
    return {"seen": result.seen, "scores": scores, "best": Path(best.best_model_path).name, "steps": steps}


def test_what_is_saved_and_logged(tmp_path: Path) -> None:
    whole = run_ranks(watch, 1, str(tmp_path / "one"), True)[0]
    for found in run_ranks(watch, 4, str(tmp_path / "four"), False, timeout=60):
        assert found["steps"] == whole["steps"] == list(range(1, 11))
        assert found["best"] == whole["best"]
        assert found["scores"] == pytest.approx(whole["scores"])
    names = [
        sorted(p.relative_to(tmp_path / n).as_posix() for p in (tmp_path / n).glob("*/*.ckpt")) for n in ("one", "four")
    ]
    assert names[0] == names[1] and "best/last.ckpt" in names[0] and "often/step=9.ckpt" in names[0]
    logs = [(tmp_path / n / "logs/version_0/metrics.csv").read_text() for n in ("one", "four")]
    rates, samples = (_columns(logs, name) for name in ("lr-AdamW/pg1", "train/device/samples_per_sec"))
    assert rates[0] == pytest.approx(rates[1]) and len(rates[0]) == 10
    assert samples[0] and samples[1]
    assert _columns(logs, "DeviceStatsMonitor.on_train_batch_start/cpu_percent")[1]


def _columns(logs: list[str], name: str) -> list[list[float]]:
    found = []
    for log in logs:
        header, *rows = (line.split(",") for line in log.splitlines())
        place = next(i for i, column in enumerate(header) if name in column)
        found.append([float(row[place]) for row in rows if row[place]])
    return found


class Writer(BasePredictionWriter):
    """Keeps the rows that were predicted."""

    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.by_batch: list[int] = []
        self.by_epoch: list[int] = []

    def write_on_batch_end(self, trainer: Any, module: Any, prediction: Any, *_: Any) -> None:
        self.by_batch += prediction

    def write_on_epoch_end(self, trainer: Any, module: Any, predictions: Any, batch_indices: Any) -> None:
        self.by_epoch += [row for batch in predictions for row in batch]


class Predicts(Trained):
    def predict_step(self, batch: Any, batch_idx: int) -> list[int]:
        assert self.model(batch["x"].to(self.dtype)).shape == (len(batch["rows"]), 4)
        return batch["rows"].tolist()


def predict() -> tuple[list[int], list[int]]:
    import lightning as L

    writer, rank = Writer(), int(os.environ["RANK"])
    trainer = L.Trainer(
        strategy=HybridStrategy(**BOTH),
        accelerator="cpu",
        devices=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[writer],
    )
    trainer.predict(Predicts("stack"), Rows("stack", 8, 2, 2, rank // 2, False))
    return writer.by_batch, writer.by_epoch


def test_each_data_rank_writes_its_predictions() -> None:
    ranks = run_ranks(predict, 4)
    assert [by_batch for by_batch, _ in ranks] == [by_epoch for _, by_epoch in ranks]
    assert ranks[0] == ranks[1] and ranks[2] == ranks[3]
    assert sorted(ranks[0][0] + ranks[2][0]) == list(range(16))


def find_rate(plain: bool, folder: str) -> tuple[float, list[float], Any]:
    finder = LearningRateFinder(1e-4, 1.0, num_training_steps=12, update_attr=False)
    result = fit("stack", None if plain else BOTH, callbacks=[finder], default_root_dir=folder, steps=4)
    assert finder.optimal_lr is not None
    return finder.optimal_lr.suggestion(0, 1), finder.optimal_lr.results["loss"], result.seen


def test_the_rate_is_found_and_the_weights_come_back(tmp_path: Path) -> None:
    whole = run_ranks(find_rate, 1, True, str(tmp_path / "one"))[0]
    for found in run_ranks(find_rate, 4, False, str(tmp_path / "four"), timeout=60):
        assert found[0] == whole[0]
        torch.testing.assert_close(torch.tensor(found[2]), torch.tensor(whole[2]), rtol=1e-9, atol=1e-9)


class Fails(Trained):
    rows_of = "stack"

    def __init__(self) -> None:
        super().__init__("stack")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2:
            raise ArithmeticError("on all ranks")
        return super().training_step(batch, batch_idx)


def fail(folder: str) -> None:
    fit(Fails, BOTH, callbacks=[OnExceptionCheckpoint(folder, "kept")], enable_checkpointing=True)


def test_an_error_ends_all_ranks_also_with_a_callback_that_saves_then(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="ArithmeticError: on all ranks"):
        run_ranks(fail, 4, str(tmp_path))


def bars() -> list[bool]:
    found = []
    for bar in (TQDMProgressBar(), RichProgressBar()):
        fit("stack", BOTH, callbacks=[bar], enable_progress_bar=True, steps=2)
        found.append(bar.is_enabled)
    return found


def test_one_rank_shows_a_bar() -> None:
    assert run_ranks(bars, 4) == [[True, True], *[[False, False]] * 3]
