"""benchmarks/input.py: its files can be read, and a run is what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import input_stages
from benchmarks import input_workers as benchmark
from benchmarks.paired import Interval


@pytest.mark.filterwarnings("ignore")
def test_a_run_of_the_default_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SAMPLES": 16, "EPOCHS": 2, "STEP_SECONDS": 0.0}.items():
        monkeypatch.setattr(benchmark, name, value)
    benchmark.write_pictures(tmp_path)
    assert benchmark.Pictures(tmp_path)[0].shape == (3,)
    run = benchmark.fit(tmp_path, tunes=False)
    assert run.workers == 0 and 0 < run.wait_after < 1 and run.step > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beside", [False, True])
def test_a_run_from_text(beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "STEP_SECONDS", 0.0)
    monkeypatch.setattr(input_stages, "COPIES", 1)
    input_stages.write_texts(tmp_path)
    step, shares = input_stages.read(tmp_path, beside)
    assert step > 0 and set(shares) == {"read", "tokenize", "pack", "augment", "batch", "train"}
    assert shares["tokenize"] > shares["pack"] > 0


def test_verdicts() -> None:
    good, none = Interval(0.6, 0.5, 0.7), Interval(1.0, 0.9, 1.1)
    given = (6, 2, 60.0, 40.0, 0.5, 0.1)
    assert benchmark.Result(*given, ratio=good, null=none).verdict == "met"
    assert benchmark.Result(*given, ratio=none, null=none).verdict == "missed"
    assert benchmark.Result(*given, ratio=good, null=Interval(1.2, 1.0, 1.4)).verdict == "void"
