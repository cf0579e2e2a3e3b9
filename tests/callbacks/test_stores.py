"""Runs that go on from what lies in a store."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_bharat import events
from lightning_bharat.callbacks import FaultTolerantCheckpoint, Tier
from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.checkpoints.whole import checkpoints_in, problems
from tests.checkpoints.stores import gone, served
from tests.modules import PlacedRows, fit
from tests.ranks import RanksFailed, run_ranks


class Begun(L.Callback):
    """Where a run began."""

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.step, self.path = trainer.global_step, str(trainer.ckpt_path or "")


def run(folder: str, store: str, steps: int, ckpt: str = "last") -> tuple[int, str, str]:
    """Where a run began, and of what it warned."""
    begun = Begun()
    keep = FaultTolerantCheckpoint(
        f"{folder}/disk", every_n_train_steps=1, tiers=[Tier(store, keep=0, compression="zstd")] if store else ()
    )
    with warnings.catch_warnings(record=True) as warned:
        common: dict[str, Any] = {"enable_checkpointing": True, "default_root_dir": folder}
        found = fit("gpt", {}, steps, ckpt=ckpt, callbacks=[begun, keep], rows_kind=PlacedRows, **common)
    torch.save(found.weights, f"{folder}/after.pt")
    return begun.step, begun.path, "\n".join(str(warning.message) for warning in warned)


def in_one_process(folder: str) -> list[tuple[int, str, str]]:
    """A store of fsspec's that lives in this process, which has no folders and no renames; the disk is lost."""
    found = [run(folder, "memory://bucket/run", 2)]
    shutil.rmtree(f"{folder}/disk")
    return [*found, run(folder, "memory://bucket/run", 4)]


def test_the_disk_is_lost_and_the_store_has_it(tmp_path: Path) -> None:
    first, (step, path, _) = run_ranks(in_one_process, 1, str(tmp_path))[0]
    assert first[:2] == (0, "") and step == 2 and path == str(tmp_path / "disk/fetched/step=2.ckpt")
    assert not list((tmp_path / "disk/fetched").glob("*.ckpt"))  # it has done its part
    run_ranks(run, 1, str(tmp_path / "other"), "", 4)
    undisturbed, weights = (torch.load(tmp_path / name / "after.pt") for name in ("other", "."))
    assert all(torch.equal(weights[name], value) for name, value in undisturbed.items())
    assert [e["path"] for e in events.read(tmp_path) if e["kind"] == "tier"][-1] == "memory://bucket/run/step=4.ckpt"


def test_the_newest_whole_one_of_all_tiers_is_gone_on_from_and_a_half_one_is_passed_over(tmp_path: Path) -> None:
    store = tmp_path / "store"
    run_ranks(run, 2, str(tmp_path), f"file://{store}", 4)
    steps = [Manifest.read(path).step for path in checkpoints_in(store)]
    shutil.rmtree(tmp_path / "disk")
    (store / f"step={steps[-1]}.ckpt/COMMIT").unlink()  # as a copy that was interrupted
    both = run_ranks(run, 2, str(tmp_path), f"file://{store}", 5)
    half = f"file://{store}/step={steps[-1]}.ckpt"
    assert both[0][:2] == both[1][:2] == (steps[-2], str(tmp_path / f"disk/fetched/step={steps[-2]}.ckpt"))
    assert f"{half} is passed over: {half}/COMMIT is missing" in both[0][2]
    for path in (store / f"step={steps[-1]}.ckpt", *store.glob("*.ckpt")):
        (path / "COMMIT").unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "disk")
    with pytest.raises(RanksFailed, match="none of the . checkpoints is whole"):
        run_ranks(run, 2, str(tmp_path), f"file://{store}", 5)


def test_a_store_that_is_gone_is_no_start_from_the_beginning(tmp_path: Path) -> None:
    away = gone()
    with pytest.raises(RanksFailed, match=f"{away} can't be reached") as failed:
        run_ranks(run, 2, str(tmp_path), away, 2)
    assert all(f"{away} can't be reached" in str(outcome) for outcome in failed.value.outcomes)
    run_ranks(run, 2, str(tmp_path), "", 2)
    step, path, warned = run_ranks(run, 2, str(tmp_path), away, 3)[0]
    assert step == 2 and "can't be reached: " in warned and f"{path} is taken" in warned
    assert {e["kind"] for e in events.read(tmp_path)} >= {"save", "tier_failed"}


def test_a_checkpoint_by_url_is_gone_on_from(tmp_path: Path) -> None:
    run_ranks(run, 2, str(tmp_path / "one"), "", 2)
    [name] = [path.name for path in (tmp_path / "one/disk").glob("*.ckpt")]
    with served(tmp_path / "one") as url:
        found = run_ranks(run, 2, str(tmp_path / "other"), "", 3, f"{url}/disk/{name}")
    here = tmp_path / "other/fetched" / name
    assert [one[:2] for one in found] == [(2, str(here))] * 2 and not list(problems(here))
