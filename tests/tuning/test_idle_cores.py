"""Cores of idle workers go to the most promising trial, on all of its ranks, and nowhere else."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import lightning as L
import optuna
import pytest
import torch

from lightning_bharat.commands.project import BadInput
from lightning_bharat.tuning import SearchSpace, tune
from lightning_bharat.tuning.idle_cores import MOST, cores_of, move
from lightning_bharat.tuning.slots import Slot, usable_cores
from tests.ranks import run_ranks
from tests.tuning import tuned

OWN, OTHER = Slot(0, (0, 1)), Slot(1, (2, 3))


class CountsCores(tuned.Tuned):
    """Logs on how many cores and threads it is trained."""

    def on_validation_start(self) -> None:
        cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
        self.seen = [*getattr(self, "seen", []), (cores, threads)]
        loops: L.Trainer = self.trainer
        (Path(loops.default_root_dir) / f"cores{loops.global_rank}").write_text(str(self.seen))


def _study(direction: str, *curves: dict[int, float]) -> list[optuna.Trial]:
    study = optuna.create_study(direction=direction)
    trials = [study.ask() for _ in curves]
    for trial, curve in zip(trials, curves, strict=True):
        for step, value in curve.items():
            trial.report(value, step)
    return trials


@pytest.mark.parametrize(
    ("direction", "curves", "ahead"),
    [
        ("minimize", [{0: 3.0, 1: 2.0}, {0: 2.5}], 1),  # by the last step of both
        ("maximize", [{0: 3.0, 1: 2.0}, {0: 2.5}], 0),
        ("minimize", [{0: 1.0}, {}], 0),
        ("minimize", [{0: 1.0}, {0: 1.0}], 0),
        ("minimize", [{0: float("nan")}, {0: 1.0}], None),
        ("minimize", [{}, {}], None),
    ],
)
def test_who_is_the_most_promising(direction: str, curves: list[dict[int, float]], ahead: int | None) -> None:
    trials = _study(direction, *curves)
    got = [cores_of(trial, OWN, [OTHER], [0, 1]) for trial in trials]
    assert got == [(0, 1, 2, 3) if number == ahead else (0, 1) for number in (0, 1)]
    assert [trial.user_attrs.get(MOST) for trial in trials] == [4 if number == ahead else None for number in (0, 1)]
    assert all(cores_of(trial, OWN, [], [0, 1]) == (0, 1) for trial in trials), "none are idle, or not any more"


def _moved(cores: list[int]) -> tuple[set[int], int]:
    move(cores, 1)
    return os.sched_getaffinity(0), torch.get_num_threads()


def test_a_rank_takes_a_thread_for_each_core() -> None:
    cores = sorted(usable_cores())[:2]
    assert run_ranks(_moved, 1, cores) == [(set(cores), len(cores))]


@pytest.mark.skipif(len(usable_cores()) < 2, reason="two cores are needed")
def test_the_last_trial_gets_the_cores_of_the_other_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space = SearchSpace({"trainer.max_epochs": optuna.distributions.IntDistribution(1, 12)})
    points = [{"trainer.max_epochs": 1}, {"trainer.max_epochs": 12}]
    hybrid = {"class_path": "lightning_bharat.HybridStrategy", "init_args": {"data_parallel_size": 2}}
    config = tuned.config(tmp_path, devices=2, strategy=hybrid)
    options: dict[str, Any] = {"n_trials": 2, "points": points, "workers": 2, "idle_cores": True, "folder": "study"}
    args = ["--model=tests.tuning.test_idle_cores.CountsCores", "--model.seconds=0.05", "--data.data=2"]
    study = tune(config, space, args=args, **options)
    short, long = sorted(study.trials, key=lambda trial: trial.params["trainer.max_epochs"])
    cores = len(usable_cores())
    assert MOST not in short.user_attrs and long.user_attrs[MOST] == cores // 2 * 2
    for rank in range(2):
        seen = ast.literal_eval((tmp_path / f"study/trials/{long.number:04d}/cores{rank}").read_text())
        assert seen[0] == (cores // 2, max(1, cores // 4)) and seen[-1] == (cores // 2 * 2, max(1, cores // 2))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"monitor": ["val_loss", "train_loss"]}, "by 2 metrics no trial is the most promising"),
        ({"engine": "ray"}, "engine='ray' gives workers their cores"),
        ({"engine": {"name": "ray"}}, "engine='ray' gives workers their cores"),
    ],
)
def test_what_has_no_idle_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    space = SearchSpace({"model.lr": optuna.distributions.FloatDistribution(0.1, 0.2)})
    with pytest.raises(BadInput, match=says):
        tune(tuned.config(tmp_path), space, n_trials=1, idle_cores=True, **more)
    with pytest.raises(BadInput, match="an objective sets its threads itself"):
        tune(tuned.parabola, n_trials=1, idle_cores=True)
