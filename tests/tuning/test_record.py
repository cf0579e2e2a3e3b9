"""What a trial notes about itself, and where its loggers write."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_bharat import HybridStrategy
from lightning_bharat.datamodules import TokenDataModule
from lightning_bharat.models import GPTConfig, GPTModule
from lightning_bharat.tuning.grouping import group_loggers
from lightning_bharat.tuning.record import TrialRecorder, code_version, data_version, peak_memory
from tests.ranks import run_ranks

ROWS, TIME, BATCH = 8, 6, 2
MORE = 128 * 2**20  # bytes that rank 1 holds for a moment


class Fails(L.Callback):
    """At a batch."""

    def __init__(self, at: int | None) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        if args[-1] == self.at:
            raise ValueError("as asked")


def recorded(strategy: dict[str, Any] | None, fails_at: int | None = None) -> dict[str, Any]:
    """The record of a fit over 8 rows of 6 tokens, and this process's own peak as ``mine``."""
    torch.ones(MORE if os.environ.get("RANK") == "1" else 1, dtype=torch.uint8)  # freed at once: a peak stays
    rows = torch.arange(ROWS * TIME).view(ROWS, TIME) % 16
    data = [{"input_ids": row, "labels": row} for row in rows]
    recorder = TrialRecorder()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        strategy=HybridStrategy(**strategy) if strategy is not None else "auto",
        max_epochs=1,
        callbacks=[recorder, Fails(fails_at)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    module = GPTModule(GPTConfig(vocab_size=16, **sizes))
    try:
        trainer.fit(module, DataLoader(data, batch_size=BATCH))  # type: ignore[arg-type]
    except ValueError:
        assert fails_at is not None
    return recorder.record() | {"mine": peak_memory()}


def test_one_process_counts_its_own() -> None:
    found = recorded(None)
    assert (found["steps"], found["tokens"], found["data"]) == (ROWS // BATCH, ROWS * TIME, None)
    assert 0 < found["seconds"] < 60 and 2**20 < found["peak_memory_bytes"] <= found["mine"]


@pytest.mark.parametrize(
    ("strategy", "steps"),
    [({"data_parallel_size": 2}, 2), ({"tensor_parallel_size": 2}, 4), ({"pipeline_parallel_size": 2}, 4)],
    ids=["data", "tensor", "pipeline"],
)
def test_ranks_count_each_token_once_and_the_largest_memory(strategy: dict[str, Any], steps: int) -> None:
    found = run_ranks(recorded, 2, strategy)
    for rank in found:
        assert (rank["steps"], rank["tokens"]) == (steps, ROWS * TIME)
        assert found[0]["mine"] + MORE // 2 < rank["peak_memory_bytes"] <= found[1]["mine"]


def test_a_fit_that_fails_is_recorded_too() -> None:
    found = recorded(None, fails_at=1)
    assert (found["steps"], found["tokens"]) == (2, 2 * BATCH * TIME) and found["peak_memory_bytes"] > 2**20
    assert recorded(None, fails_at=0)["tokens"] == BATCH * TIME


def test_a_second_fit_has_its_own_record() -> None:
    recorder = TrialRecorder()
    seen = []
    for _ in range(2):
        quiet = {"enable_model_summary": False, "enable_progress_bar": False, "logger": False}
        trainer = L.Trainer(fast_dev_run=2, accelerator="cpu", callbacks=[recorder], **quiet)
        module = GPTModule(GPTConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
        row = {"input_ids": torch.zeros(TIME, dtype=torch.long), "labels": torch.zeros(TIME, dtype=torch.long)}
        trainer.fit(module, DataLoader([row] * 4, batch_size=1))  # type: ignore[arg-type]
        seen.append((recorder.record()["steps"], recorder.record()["tokens"]))
    assert seen == [(2, 2 * TIME)] * 2


def git(folder: Path, *words: str) -> str:
    names = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *names, *words], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_code_is_named_by_its_commit_and_whether_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_version(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert code_version(tmp_path) is None  # no commit yet
    (tmp_path / "train.py").write_text("1")
    git(tmp_path, "add", "train.py")
    git(tmp_path, "commit", "-q", "-m", "one")
    clean = {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "study.journal").write_text("not tracked")
    assert code_version(tmp_path) == clean
    (tmp_path / "train.py").write_text("2")
    assert code_version(tmp_path / "runs") == clean | {"dirty": True}
    assert code_version(tmp_path / "missing") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version(tmp_path) is None  # no git


def test_data_are_named_by_what_they_know_of_themselves(tmp_path: Path) -> None:
    lines = (json.dumps({"text": f"so it goes on and on, number {i}. " * 9}) for i in range(40))
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    data = TokenDataModule(str(tmp_path / "out"), texts=str(tmp_path / "text.jsonl"), vocab_size=300, sequence_length=8)
    assert data_version(data) is None and not (tmp_path / "out").exists()
    data.prepare_data()
    data.setup("fit")
    assert data_version(data) == f"train {data.prepared.digest('train')}, val {data.prepared.digest('val')}"
    assert data_version(SimpleNamespace(data_version="v3", version=1)) == "v3"
    assert data_version(SimpleNamespace(version=2)) == "2"
    assert data_version(SimpleNamespace(version=lambda: 2)) is None and data_version(None) is None


def parsed(*words: str) -> Namespace:
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(L.Trainer, "trainer")
    config = parser.parse_args(list(words))
    assert isinstance(config, Namespace)
    return config


@pytest.mark.parametrize(
    ("logger", "arguments", "others"),
    [
        ("CSVLogger", {"name": "width", "version": "trial_0007"}, {}),
        ("TensorBoardLogger", {"name": "width", "version": "trial_0007"}, {}),
        ("WandbLogger", {"name": "width/trial_0007", "project": None}, {"group": "width"}),
        (
            "MLFlowLogger",
            {"experiment_name": "width", "run_name": "trial_0007", "tags": {"study": "width", "trial": "trial_0007"}},
            {},
        ),
        ("CometLogger", {"project": None}, {"name": "width/trial_0007", "tags": ["width"]}),
    ],
)
def test_loggers_are_grouped_by_study(logger: str, arguments: dict[str, Any], others: dict[str, Any]) -> None:
    folder = ["--trainer.logger.save_dir=logs"] if logger in ("CSVLogger", "TensorBoardLogger") else []
    config = parsed(f"--trainer.logger={logger}", *folder)
    before = config.clone()
    grouped = group_loggers(config, "width", 7)
    assert config == before
    found = grouped.trainer.logger
    assert {name: found.init_args[name] for name in arguments} == arguments
    assert dict(found.get("dict_kwargs") or {}) == others
    again = LightningArgumentParser()
    again.add_lightning_class_args(L.Trainer, "trainer")
    again.parse_object({"trainer": {"logger": found.as_dict()}})  # a trial's config can be given to bharat fit


def test_what_a_person_set_stays(tmp_path: Path) -> None:
    words = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}", "--trainer.logger.name=mine"]
    grouped = group_loggers(parsed(*words), "width", 7)
    assert grouped.trainer.logger.init_args.name == "mine"
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(L.Trainer, "trainer")
    logger = parser.instantiate(grouped).trainer.logger
    assert isinstance(logger, CSVLogger) and logger.log_dir == str(tmp_path / "mine" / "trial_0007")
    tags = {"class_path": "lightning.pytorch.loggers.MLFlowLogger", "init_args": {"tags": {"a": "b"}}}
    plain = group_loggers(
        {"trainer": {"logger": [tags, {"class_path": "lightning.pytorch.loggers.CSVLogger"}]}}, "w", 1
    )
    assert plain["trainer"]["logger"][0]["init_args"] == {
        "tags": {"a": "b"},
        "experiment_name": "w",
        "run_name": "trial_0001",
    }
    assert plain["trainer"]["logger"][1]["init_args"] == {"name": "w", "version": "trial_0001"}


@pytest.mark.parametrize(
    "logger", [True, False, None, [], {"class_path": "no.such.Logger"}, {"class_path": "json.JSONEncoder"}]
)
def test_what_is_no_logger_of_ours_to_group_is_left(logger: Any) -> None:
    config = {"trainer": {"logger": logger}}
    assert group_loggers(config, "width", 7) == config
    assert group_loggers({}, "width", 7) == {}
