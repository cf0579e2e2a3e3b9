"""Frozen weights are written once: later checkpoints share their bytes, and each of them stands alone."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.distributed.tensor import DTensor

from lightning_bharat.callbacks import FaultTolerantCheckpoint
from lightning_bharat.checkpoints import Share, directory
from lightning_bharat.checkpoints.errors import WriteError
from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.checkpoints.opened import open_any, reader
from lightning_bharat.checkpoints.saving import Compression, Saver
from lightning_bharat.checkpoints.tiers import Tier, copy_to
from lightning_bharat.checkpoints.whole import problems
from lightning_bharat.cluster.warm_job import free_port
from lightning_bharat.plan.elsewhere import is_elsewhere
from tests.cluster.test_host_memory import FILES, SMALL, on_own_host
from tests.modules import PlacedRows, Trained, fit
from tests.ranks import run_ranks


class HalfFrozen(Trained):
    """Only its last block and what follows are trained."""

    rows_of = "gpt"

    def __init__(self) -> None:
        super().__init__("gpt")
        parameters = list(self.parameters())
        for parameter in parameters[: len(parameters) // 2]:
            parameter.requires_grad_(False)
        self.frozen = {n for n, p in self.named_parameters() if not p.requires_grad}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)


class ByHand(L.Callback):
    """Changes frozen weights in a way that no flag and no counter tells."""

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == 2:
            for parameter in module.parameters():
                if not parameter.requires_grad and not is_elsewhere(parameter):
                    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                    local.data.mul_(1.5)


def run(folder: str, layout: dict[str, Any], steps: int) -> tuple[set[str], dict[str, torch.Tensor]]:
    keep = FaultTolerantCheckpoint(f"{folder}/disk", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    common: dict[str, Any] = {"enable_checkpointing": True, "default_root_dir": folder, "rows_kind": PlacedRows}
    made: list[HalfFrozen] = []

    def module() -> HalfFrozen:
        made.append(HalfFrozen())
        return made[-1]

    found = fit(module, layout, steps, ckpt="last", callbacks=[keep, ByHand()], **common)
    return made[0].frozen, found.weights


def files(checkpoint: Path, pattern: str = "frozen_*") -> dict[str, int]:
    """By name, and which bytes on the disk they are."""
    return {path.name: path.stat().st_ino for path in checkpoint.glob(pattern)}


@pytest.mark.parametrize("layout", [{}, {"pipeline_parallel_size": 2}], ids=["data", "pipeline"])
def test_ranks_write_frozen_weights_once_and_again_when_they_were_changed_by_hand(
    tmp_path: Path, layout: dict[str, Any]
) -> None:
    run_ranks(run, 2, str(tmp_path), layout, 4)
    steps = [tmp_path / f"disk/step={step}.ckpt" for step in (1, 2, 3, 4, 5)]
    assert files(steps[0]) and files(steps[0]) == files(steps[1])
    assert files(steps[2]) == files(steps[3]) and not set(files(steps[2]).values()) & set(files(steps[0]).values())
    assert not set(files(steps[2], "rank_*").values()) & set(files(steps[3], "rank_*").values())
    frozen, weights = run_ranks(run, 2, str(tmp_path), layout, 5)[0]
    assert files(steps[4]) == files(steps[3])  # a new process goes on from that
    stored = open_any(steps[4]).weights()
    assert frozen and all(torch.equal(reader(stored[name])(), value) for name, value in weights.items())
    shutil.rmtree(steps[0])
    directory.remove(steps[3])
    for path in (steps[1], steps[2], steps[4], Path(copy_to(Tier(str(tmp_path / "tier")), steps[4]))):
        assert not list(problems(path))


def test_hosts_keep_the_frozen_files_of_the_host_before_in_memory_too(tmp_path: Path) -> None:
    first = run_ranks(on_own_host, 2, str(tmp_path), free_port(), 5, {}, HalfFrozen)
    frozen = [file.replace("rank", "frozen") for file in FILES]
    assert [there for _, _, there in first] == 2 * [{"step=4.ckpt": sorted([*SMALL, *FILES, *frozen])}]
    shutil.rmtree(tmp_path / "host1")
    second = run_ranks(on_own_host, 2, str(tmp_path), free_port(), 7, {}, HalfFrozen)
    assert [begun for _, begun, _ in second] == [4, 4]


def save(saver: Saver, path: Path, base: torch.Tensor, step: int) -> Path:
    state = {"base": Share.of(base, frozen=True), "w": Share.of(torch.full((3,), float(step)))}
    saver.save(path, {"state_dict": state, "global_step": step}, Manifest.of({"global_step": step}))
    assert not list(problems(path))
    stored = open_any(path).weights()
    assert torch.equal(reader(stored["base"])(), base) and float(reader(stored["w"])()[0]) == step
    return path


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_damaged_changed_and_lost_ones_are_written_anew(tmp_path: Path, compression: Compression | None) -> None:
    saver, base = Saver(compression, read_back=True), torch.randn(100)
    first = save(saver, tmp_path / "a.ckpt", base, 1)
    last = save(saver, tmp_path / "last.ckpt", base, 2)
    assert files(first) == files(last) and len(files(last)) == 1
    (one,) = first.glob("frozen_*")
    assert files(save(saver, tmp_path / "last.ckpt", base, 3)) == files(first)  # in the place of its parent
    assert one.stat().st_nlink == 2
    content = bytearray(one.read_bytes())
    content[-1] ^= 1
    one.write_bytes(content)
    assert any(problems(first)) and any(problems(last))
    assert files(save(saver, tmp_path / "b.ckpt", base, 4)) != files(first)  # damage does not go on
    shutil.rmtree(tmp_path / "b.ckpt")
    save(saver, tmp_path / "c.ckpt", base, 5)
    changed = files(save(saver, tmp_path / "d.ckpt", base.data.add_(1), 6))
    assert changed != files(tmp_path / "c.ckpt")
    (tmp_path / "d.ckpt" / next(iter(changed))).unlink()
    (tmp_path / "d.ckpt" / next(iter(changed))).symlink_to(one)
    assert files(save(saver, tmp_path / "e.ckpt", base, 7)) != changed


def test_room_is_needed_for_what_is_written_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, base = Saver(), torch.randn(100_000)
    save(saver, tmp_path / "a.ckpt", base, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 100_000))
    save(saver, tmp_path / "b.ckpt", base, 2)
    with pytest.raises(WriteError, match="needs 40. KB"):
        save(Saver(), tmp_path / "c.ckpt", base, 3)


def test_another_disk_gets_files_of_its_own(tmp_path: Path) -> None:
    saver, base = Saver(), torch.randn(100)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        if Path(memory).stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("needs two file systems")
        save(saver, Path(memory) / "a.ckpt", base, 1)
        there = save(saver, tmp_path / "b.ckpt", base, 2)
    assert [path.stat().st_nlink for path in there.glob("frozen_*")] == [1] and not list(problems(there))
