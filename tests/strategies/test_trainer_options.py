"""The trainer's other options on each layout: profilers, checks, bars; they change no result, and one rank speaks."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from torch import Tensor

from tests.ranks import RanksFailed, run_ranks
from tests.strategies.watched import ONE, Place, Watched, compare, left

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


def with_options(layout: str, folder: str) -> tuple[dict[str, Any], list[str]]:
    at, results = Place(layout, folder), {}
    ways: dict[str, dict[str, Any]] = {
        "checks": {"detect_anomaly": True, "deterministic": True, "benchmark": True, "inference_mode": False},
        **{name: {"profiler": kind(f"{folder}/{layout}", name)} for name, kind in PROFILERS.items()},
    }
    try:
        for name, options in ways.items():
            module, trainer = at.module(), at.trainer(max_epochs=1, **options)
            trainer.fit(module, at.train(), at.evaluate())
            results[name] = left(trainer, module)
            at.known(trainer)
    finally:
        torch.use_deterministic_algorithms(False)
    return results, sorted(path.name for path in Path(f"{folder}/{layout}").iterdir())


def test_options_change_no_result(tmp_path: Path) -> None:
    ((one, _),) = run_ranks(with_options, 1, ONE, str(tmp_path))
    found = run_ranks(with_options, 4, "both", str(tmp_path), timeout=60)
    compare([results for results, _ in found], one, "both")
    files = {name for _, names in found for name in names}
    assert {f"fit-{name}-{rank}.txt" for name in PROFILERS for rank in range(4)} <= files  # a rank's times are its own


def bare(layout: str, folder: str) -> dict[str, Any]:
    at = Place(layout, folder)
    module, trainer = at.module(), at.trainer(barebones=True, enable_checkpointing=None, logger=None, **SILENT)
    trainer.fit(module, at.train(), at.evaluate())
    return left(trainer, module)


SILENT: dict[str, Any] = {"enable_progress_bar": None, "enable_model_summary": None, "num_sanity_val_steps": None}


@pytest.mark.parametrize("layout", ["data", "tensor"])
def test_bare_bones(layout: str, tmp_path: Path) -> None:
    (one,) = run_ranks(bare, 1, ONE, str(tmp_path))
    assert one["metrics"] == {} and len(one["calls"]) == 10
    compare(run_ranks(bare, 2, layout, str(tmp_path)), one, layout)


def bars(layout: str, folder: str) -> list[tuple[str, dict[str, float]]]:
    at, shown = Place(layout, folder), []
    for bar in (TQDMProgressBar(), RichProgressBar(leave=True)):
        module, out = at.module(Shows), io.StringIO()
        with contextlib.redirect_stdout(out):
            trainer = at.trainer(callbacks=[bar], enable_progress_bar=True, num_sanity_val_steps=1)
            trainer.fit(module, at.train(), at.evaluate())
            trainer.validate(module, at.evaluate())
            trainer.predict(module, at.evaluate())
        shown.append((out.getvalue(), {k: float(v) for k, v in bar.get_metrics(trainer, module).items()}))
        at.known(trainer)
    return shown


class Shows(Watched):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("shown", loss, prog_bar=True, sync_dist=True)
        return loss


def test_one_rank_shows_bars_and_tables(tmp_path: Path) -> None:
    (one,) = run_ranks(bars, 1, ONE, str(tmp_path))
    first, *others = run_ranks(bars, 4, "both", str(tmp_path))
    assert [out for rank in others for out, _ in rank] == [""] * 6
    for (out, metrics), (expected, values) in zip(first, one, strict=True):
        assert metrics == pytest.approx(values)
        for word in ("Epoch 1", "Validat", "Predicting", "Validate metric"):
            assert (word in out) == (word in expected), word
    assert all(word in first[0][0] for word in ("Epoch 1", "Predicting", "Validate metric"))


class Broken(Watched):
    """Its gradient is not a number on the last rank."""

    def loss(self, parts: list[dict[str, Tensor]]) -> Tensor:
        loss = super().loss(parts)
        is_last = self._trainer is not None and self.global_rank == self.trainer.world_size - 1
        return loss + (self.model.net[0].weight.sum() * 0).sqrt() if is_last else loss


def anomaly(layout: str, folder: str) -> None:
    at = Place(layout, folder)
    at.trainer(detect_anomaly=True).fit(at.module(Broken), at.train())


def test_an_anomaly_on_one_rank_ends_all(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(anomaly, 2, "data", str(tmp_path))
    first, last = failed.value.outcomes
    assert last.error == "RuntimeError" and "returned nan values" in last.message
    assert first.error == "PeerError" and "rank 1 (data 1) raised RuntimeError" in first.message
