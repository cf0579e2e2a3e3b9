"""benchmarks/populations.py: its trainings grow as it says, and it says what it found."""

from __future__ import annotations

import importlib.util
import json
import math

import optuna
import pytest

from benchmarks.populations import best_metric, gain, main


def test_a_generation_at_the_best_values_gains_one() -> None:
    study = optuna.create_study()
    for of, value, gained in ((0, 1e-3, 1.0), (9, 0.1, 1.0), (9, 1e-2, math.exp(-1))):
        trial = study.ask()
        trial.set_user_attr("generation", of)
        trial.suggest_float("x0", value, value)
        assert gain(trial, 10) == pytest.approx(gained)
        study.tell(trial, 0.0)


def test_a_population_adds_its_gains() -> None:
    assert 0 < best_metric("pbt", 1, 1, 0, 0) < best_metric("pbt", 1, 3, 0, 0) < 3


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_it_says_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "6", "--generations", "2", "--numbers", "1"]) == 0
    text = capsys.readouterr().out
    assert "better, of 6" in text and json.loads(text.splitlines()[-1])["results"][0]["numbers"] == 1
