"""Saves beside training: they hold what training had when it went on, and none takes the last good one."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_bharat import events
from lightning_bharat.callbacks import FaultTolerantCheckpoint, Tier, fault_tolerant_checkpoint
from lightning_bharat.checkpoints import safetensors_file
from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.checkpoints.snapshot import Snapshot
from lightning_bharat.checkpoints.whole import checkpoints_in, problems
from lightning_bharat.strategies.ends_together import Stopped
from tests.modules import PlacedRows, fit
from tests.ranks import RanksFailed, run_ranks, server

LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "tensor": {"tensor_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2},
}
EVERY: dict[str, Any] = {"every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}", "save_last": True}


class Overtaken(L.Callback):
    """Copies no weight before training waits for it, and writes no file before training has gone on by a whole step,
    which changes all weights."""

    def __init__(self) -> None:
        self.went_on, self.asked = threading.Event(), threading.Event()
        write, wait, complete = safetensors_file.write, Snapshot.wait, Snapshot.complete

        def late(*args: Any) -> Any:
            assert threading.current_thread() is not threading.main_thread()
            assert self.went_on.wait(20)
            return write(*args)

        def ask(snapshot: Snapshot, seconds: float) -> bool:
            if seconds:
                self.asked.set()
            return wait(snapshot, seconds)

        def late_copy(snapshot: Snapshot) -> None:
            assert snapshot._left and self.asked.wait(20)
            self.asked.clear()
            complete(snapshot)

        safetensors_file.write, Snapshot.wait, Snapshot.complete = late, ask, late_copy

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.went_on.clear() if trainer.global_step % 2 == 0 else self.went_on.set()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step % 2:
            self.went_on.set()

    def on_train_end(self, *_: Any) -> None:
        self.went_on.set()


def save(folder: str, layout: dict[str, Any], background: bool) -> list[Any]:
    kind = FaultTolerantCheckpoint if background else ModelCheckpoint
    callbacks = [*([Overtaken()] if background else []), kind(folder, **EVERY)]
    result = fit("gpt", layout, 7, callbacks=callbacks, enable_checkpointing=True, default_root_dir=folder)
    return [result.seen, {name: weight.sum().item() for name, weight in result.weights.items()}]


def digests(checkpoint: Path) -> dict[str, str]:
    """Of the tensors of all ranks, and where they are."""
    files = json.loads((checkpoint / "MANIFEST.json").read_text())["files"]
    return {name: said["xxh3"] for name, said in files.items() if name != "state.pt"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_beside_training_is_what_was_there_before_it_went_on(tmp_path: Path, layout: str) -> None:
    at_once = run_ranks(save, 2, str(tmp_path / "at_once"), LAYOUTS[layout], False)
    beside = run_ranks(save, 2, str(tmp_path / "beside"), LAYOUTS[layout], True)
    assert beside == at_once
    names = ["last.ckpt", "step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    for name in names:
        assert digests(tmp_path / "beside" / name) == digests(tmp_path / "at_once" / name)
        assert not list(problems(tmp_path / "beside" / name))
    assert sorted(path.name for path in checkpoints_in(tmp_path / "beside")) == names


class Killed(L.Callback):
    """SIGKILLs one rank when its writer has run so many lines of the package."""

    def __init__(self, rank: int, lines: int) -> None:
        self.mine, self.lines = os.environ["RANK"] == str(rank), lines

    def on_train_start(self, *_: Any) -> None:
        if self.mine:
            threading.settrace(self.trace)

    def trace(self, frame: Any, event: str, _: Any) -> Any:
        if "lightning_bharat/checkpoints" not in frame.f_code.co_filename:
            return None
        if event == "line":
            self.lines -= 1
            if self.lines == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.trace


def save_until_killed(folder: str, rank: int, lines: int) -> None:
    keep = FaultTolerantCheckpoint(folder, every_n_train_steps=1, filename="{step}", save_last=True)
    fit("gpt", {}, 200, callbacks=[Killed(rank, lines), keep], enable_checkpointing=True, default_root_dir=folder)


def resume(folder: str, steps: int) -> tuple[int, str]:
    keep = FaultTolerantCheckpoint(folder, every_n_train_steps=1, filename="{step}", save_last=True)
    begun = Begun()
    fit("gpt", {}, steps, ckpt="last", callbacks=[begun, keep], enable_checkpointing=True, default_root_dir=folder)
    return begun.step, begun.path


class Begun(L.Callback):
    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.step, self.path = trainer.global_step, str(trainer.ckpt_path)


@pytest.mark.parametrize("seed", range(6))
def test_killed_while_it_saves_beside_training(tmp_path: Path, seed: int) -> None:
    rank, draw = seed % 2, random.Random(seed)
    each = (5800, 1650)[rank]  # lines that a save takes
    with pytest.raises(RanksFailed) as failed:
        run_ranks(save_until_killed, 2, str(tmp_path), rank, draw.randrange(each, 3 * each))
    assert -signal.SIGKILL in [outcome.exit_code for outcome in failed.value.outcomes]
    listed = checkpoints_in(tmp_path)
    assert not [problem for path in listed for problem in problems(path)]
    committed = max(event["step"] for event in events.read(tmp_path) if event["kind"] == "save")
    newest = max(Manifest.read(path).step for path in listed)
    assert newest >= committed
    assert run_ranks(resume, 2, str(tmp_path), newest + 2)[0][0] == newest
    left = {path.name for path in tmp_path.iterdir()} - {"events.jsonl", ".first_losses.jsonl", ".lock"}
    assert left == {"last.ckpt", f"step={newest + 2}.ckpt"}, "what a kill left is cleaned up"
    assert Manifest.read(tmp_path / "last.ckpt").step == newest + 2


class Filler(L.Callback):
    """Something else that takes all space but a tenth of a megabyte, before the saves of steps 3 to 5, or in them."""

    def __init__(self, folder: str, within: bool) -> None:
        self.folder, self.within, self.write = Path(folder), within, safetensors_file.write

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.strategy.saves.writer.wait()
        if trainer.is_global_zero and trainer.global_step == 3:
            if self.within:
                safetensors_file.write = self.fill_and_write
            else:
                self.fill()
        elif trainer.is_global_zero and trainer.global_step == 6:
            (self.folder / "other").unlink()
        trainer.strategy.barrier()

    def fill(self) -> None:
        (self.folder / "other").write_bytes(bytes(shutil.disk_usage(self.folder).free - 100_000))

    def fill_and_write(self, *args: Any) -> Any:
        if not (self.folder / "other").exists():
            self.fill()
        return self.write(*args)


def fill(folder: str, allowed: int, within: bool) -> list[list[Any]]:
    keep = FaultTolerantCheckpoint(folder, every_n_train_steps=1, filename="{step}", max_failed_saves=allowed)
    root = f"{folder}-root"
    callbacks = [Filler(folder, within), keep]
    fit("gpt", {}, 7, callbacks=callbacks, enable_checkpointing=True, default_root_dir=root)
    return [[event["kind"], event["step"], event.get("error", "")] for event in events.read(Path(root))]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB, for checkpoints of less than one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("file systems can't be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_the_saves_that_do_not_fit(small_disk: Path) -> None:
    seen = run_ranks(fill, 2, str(small_disk), 3, False)[0]
    kinds = [(kind, step) for kind, step, _ in seen if kind.startswith("save")]
    assert kinds == [("save", 1), ("save", 2), *(("save_failed", n) for n in (3, 4, 5)), ("save", 6), ("save", 7)]
    words = next(error for kind, _, error in seen if kind == "save_failed")
    assert re.search(r"step=3.ckpt needs .*B and .*disk has 98.* KB free: free some space", words)
    assert [path.name for path in small_disk.iterdir() if not path.name.startswith(".")] == ["step=7.ckpt"]
    assert not list(problems(small_disk / "step=7.ckpt"))


def test_too_many_failed_saves_end_the_run_on_all_ranks_in_words(small_disk: Path) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(fill, 2, str(small_disk), 0, True)
    for outcome in failed.value.outcomes:
        assert "after step 3 could not be saved: OSError: [Errno 28] No space left on device" in outcome.message
        assert "failure 1 in a row (max_failed_saves=0)" in outcome.message
    (left,) = checkpoints_in(small_disk)
    assert left.name == "step=2.ckpt" and not list(problems(left))


def test_a_disk_that_holds_no_checkpoint_is_said_before_the_first_step(small_disk: Path) -> None:
    (small_disk / "other").write_bytes(bytes(8 * 2**20 - 8 * 2**10))  # left is what the lock needs
    (said,) = [words for words in run_ranks(warnings_at_the_start, 2, str(small_disk))[0] if "no save will" in words]
    assert said.startswith(f"{os.uname().nodename}: no save will succeed as it is: {small_disk}/a checkpoint needs")
    assert "KB free: free some space" in said


def warnings_at_the_start(folder: str) -> list[str]:
    keep = FaultTolerantCheckpoint(folder, every_n_train_steps=100, filename="{step}", save_last=False)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fit("gpt", {}, 1, callbacks=[keep], enable_checkpointing=True, default_root_dir=f"{folder}-root")
    return [str(warning.message) for warning in warned]


def stopped(folder: str, how: str) -> tuple[list[Any], list[list[Any]]]:
    """A run that is asked to stop on its last rank in the middle of step 3."""
    ask, losses = Asked(how), Losses()
    limit = timedelta(hours=1) if how == "time" else None
    keep = FaultTolerantCheckpoint(every_n_train_steps=100, time_limit=limit)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with suppress(Stopped):
        fit("gpt", {}, 6, rows_kind=PlacedRows, callbacks=[ask, losses, keep], ckpt="last", **WITH_LOGS, **root(folder))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    seen = events.read(Path(folder)) if os.environ["RANK"] == "0" else []
    return losses.seen, [[event["kind"], event["step"], event.get("why")] for event in seen]


WITH_LOGS: dict[str, Any] = {"enable_checkpointing": True, "logger": True}


def root(folder: str) -> dict[str, Any]:
    return {"default_root_dir": folder}


class Losses(L.Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen.append([trainer.global_step, float(trainer.callback_metrics["loss"])])


class Asked(L.Callback):
    def __init__(self, how: str) -> None:
        self.how = how

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2 and os.environ["RANK"] == str(trainer.world_size - 1):
            if self.how.startswith("SIG"):
                os.kill(os.getpid(), signal.Signals[self.how])
            elif self.how == "time":
                keep = next(c for c in trainer.callbacks if isinstance(c, FaultTolerantCheckpoint))
                keep.seconds = 4000  # so long, it seems, does a save take


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "time"])
def test_asked_to_stop_all_ranks_save_after_the_same_step_and_go_on_from_it(tmp_path: Path, how: str) -> None:
    whole, _ = run_ranks(stopped, 2, str(tmp_path / "whole"), "never")[0]
    assert [step for step, _ in whole] == [1, 2, 3, 4, 5, 6]
    first, second = run_ranks(stopped, 2, str(tmp_path / "run"), how)
    assert first[0] == second[0] == whole[:3]
    why = "the end of its time" if how == "time" else how
    assert first[1] == [["train_start", 0, None], ["save", 3, None], ["stop", 3, why]]
    rest, seen = run_ranks(stopped, 2, str(tmp_path / "run"), "never")[0]  # in version_1, of which it knows nothing
    assert rest == whole[3:]
    assert seen[3:][0] == ["train_start", 3, None] and seen[-1] == ["train_end", 6, None]


def test_the_newest_whole_one_is_found_in_any_version_and_damaged_ones_are_named(tmp_path: Path) -> None:
    run_ranks(versions, 2, str(tmp_path), 2)
    folder = tmp_path / "lightning_logs/version_0/checkpoints"
    shutil.copytree(folder, tmp_path / "lightning_logs/version_1/checkpoints")
    for version, step in ((1, 2), (0, 2)):
        file = tmp_path / f"lightning_logs/version_{version}/checkpoints/step={step}.ckpt/rank_00001.safetensors"
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    step, path, warned = run_ranks(versions, 2, str(tmp_path), 4)[0]
    assert step == 1 and path.endswith("step=1.ckpt")
    damaged = [words for words in warned if "is passed over" in words]
    assert len(damaged) == 2 and all("step=2.ckpt/rank_00001.safetensors is damaged" in words for words in damaged)
    folders = {path.parent for path in checkpoints_in(tmp_path)}
    assert folders == {folder, tmp_path / "lightning_logs/version_1/checkpoints"}, "it goes on where it was"


def versions(folder: str, steps: int) -> tuple[int, str, list[str]]:
    begun = Begun()
    keep = FaultTolerantCheckpoint(every_n_train_steps=1, filename="{step}", save_top_k=-1)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fit("gpt", {}, steps, ckpt="last", callbacks=[begun, keep], **WITH_LOGS, **root(folder))
    return begun.step, begun.path, [str(warning.message) for warning in warned]


def keep_all(folder: str, *steps: int) -> list[str]:
    for until in steps:
        keep = FaultTolerantCheckpoint(folder, every_n_train_steps=1, filename="{step}", save_top_k=-1, save_last=True)
        fit("gpt", {}, until, ckpt="last", callbacks=[keep], enable_checkpointing=True, **root(folder))
    return sorted(path.name for path in Path(folder).glob("*.ckpt"))


def test_a_run_that_goes_on_removes_nothing_of_what_is_to_stay(tmp_path: Path) -> None:
    named = [f"step={step}.ckpt" for step in (1, 2, 3, 4, 5)]
    assert run_ranks(keep_all, 2, str(tmp_path), 2, 4, 5)[0] == ["last.ckpt", *named]


def hold(folder: str) -> None:
    class Waits(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            Path(folder, "held").touch()
            threading.Event().wait()

    keep = FaultTolerantCheckpoint(folder)
    fit("gpt", {}, 1, callbacks=[Waits(), keep], enable_checkpointing=True, **root(folder))


def test_a_second_run_in_the_folder_is_refused_as_long_as_the_first_lives(tmp_path: Path) -> None:
    first = server.start(hold, 2, str(tmp_path))
    try:
        while not (tmp_path / "held").exists():
            time.sleep(0.02)
        with pytest.raises(RanksFailed) as failed:
            run_ranks(resume, 2, str(tmp_path), 1)
        for outcome in failed.value.outcomes:
            assert f"written to by another run: process {first.pids[0]} on {os.uname().nodename}" in outcome.message
    finally:
        first.kill(0, signal.SIGKILL)
        first.wait(20)
    assert run_ranks(resume, 2, str(tmp_path), 1)[0] == (0, "None")


def by_itself(folder: str) -> tuple[list[Any], list[str]]:
    """Every step takes no time, so costs alone decide; the clock is the real one."""
    keep = FaultTolerantCheckpoint(
        folder, filename="{step}", interval="auto", save_top_k=-1, time_between_failures=timedelta(microseconds=1)
    )
    fault_tolerant_checkpoint.FIRST_SAVE = 0.0
    fit("gpt", {}, 8, callbacks=[keep], enable_checkpointing=True, **root(folder))
    return [keep.stall > 0, keep.state_key], sorted(path.name for path in Path(folder).glob("*.ckpt"))


def test_an_interval_of_its_own_is_the_same_on_all_ranks(tmp_path: Path) -> None:
    (known, saved), (other, _) = run_ranks(by_itself, 2, str(tmp_path))
    assert known == other and known[0] and "step=1.ckpt" in saved
    assert max(Manifest.read(tmp_path / name).step for name in saved) == 8, "the end is saved"
    assert "'every_n_epochs': 1" in known[1]


def test_arguments_that_can_not_be_are_refused() -> None:
    with pytest.raises(ValueError, match="interval='often': write 'auto'"):
        FaultTolerantCheckpoint(interval="often")
    with pytest.raises(ValueError, match="interval='auto' and every_n_epochs are given"):
        FaultTolerantCheckpoint(interval="auto", every_n_epochs=1)
    with pytest.raises(ValueError, match="'SIGWHAT' is no signal"):
        FaultTolerantCheckpoint(stop_signals=["SIGWHAT"])
    with pytest.raises(ValueError, match="SIGKILL can't be caught"):
        FaultTolerantCheckpoint(stop_signals=[9])
    with pytest.raises(ValueError, match="max_failed_saves=-1"):
        FaultTolerantCheckpoint(max_failed_saves=-1)
    with pytest.raises(ValueError, match="memory_every_n_train_steps=0: write a whole number from 1 up"):
        FaultTolerantCheckpoint(memory_every_n_train_steps=0)


def test_under_lightning_s_own_strategy_it_is_a_model_checkpoint(tmp_path: Path) -> None:
    names = []
    for kind in (ModelCheckpoint, FaultTolerantCheckpoint):
        keep = kind(tmp_path / kind.__name__, monitor="loss", save_top_k=2, save_last=True, every_n_train_steps=1)
        fit("stack", None, 6, callbacks=[keep], enable_checkpointing=True, **root(str(tmp_path)))
        names.append(sorted(path.name for path in Path(keep.dirpath).glob("*.ckpt")))
    assert names[0] == names[1] and len(names[0]) == 3
    for file in (tmp_path / "FaultTolerantCheckpoint").glob("*.ckpt"):
        file.write_bytes(file.read_bytes()[:-50]) if file.name == "last.ckpt" else None
    keep, begun = FaultTolerantCheckpoint(tmp_path / "FaultTolerantCheckpoint", every_n_train_steps=1), Begun()
    with pytest.warns(UserWarning, match="last.ckpt is passed over"):
        fit("stack", None, 8, ckpt="last", callbacks=[keep, begun], enable_checkpointing=True, **root(str(tmp_path)))
    assert begun.step >= 4 and begun.path.endswith(f"step={begun.step}.ckpt")


class Meddles(L.Callback):
    """Changes a weight by hand after the first save, before the step; checkpoints come before it."""

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == 1:
            with torch.no_grad():
                next(iter(module.parameters())).add_(1)
            self.changed.set()

    def __init__(self) -> None:
        self.changed, complete = threading.Event(), Snapshot.complete

        def late(snapshot: Snapshot) -> None:
            assert not snapshot._left or self.changed.wait(20)
            complete(snapshot)

        Snapshot.complete = late


def meddle(folder: str) -> list[str]:
    keep = FaultTolerantCheckpoint(folder, every_n_train_steps=1, filename="{step}", save_top_k=-1)
    fit("gpt", {}, 3, callbacks=[Meddles(), keep], enable_checkpointing=True, **root(folder))
    return [event.get("error", event["kind"]) for event in events.read(Path(folder))]


def test_weights_that_are_changed_by_hand_cost_a_save_and_are_copied_at_once_from_then_on(tmp_path: Path) -> None:
    seen = run_ranks(meddle, 2, str(tmp_path))[0]
    assert "was changed before it had been copied" in seen[1]
    assert seen[2:] == ["save", "save", "train_end"]
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step=2.ckpt", "step=3.ckpt"]


def in_tiers(folder: str, steps: int) -> tuple[int, str]:
    begun = Begun()
    tiers = [Tier(f"{folder}/shared", every=2, keep=2), f"{folder}/memory", Tier(f"file://{folder}/store", keep=2)]
    keep = FaultTolerantCheckpoint(
        f"{folder}/disk", every_n_train_steps=1, filename="{step}", tiers=tiers, monitor="loss", mode="min"
    )
    tell = Overdue(keep)
    callbacks = [begun, keep, tell]
    fit("gpt", {}, steps, ckpt="last", callbacks=callbacks, enable_checkpointing=True, **root(folder))
    return begun.step, begun.path


class Overdue(L.Callback):
    """Lets copies be made before the next step, so that none waits."""

    def __init__(self, keep: FaultTolerantCheckpoint) -> None:
        self.keep = keep

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.keep.settle(trainer)
        if self.keep._copies:
            self.keep._copies.wait()


def test_tiers_get_every_kth_save_keep_the_newest_and_are_gone_on_from(tmp_path: Path) -> None:
    run_ranks(in_tiers, 2, str(tmp_path), 7)
    saved = [event["step"] for event in events.read(tmp_path) if event["kind"] == "save"]
    there = {
        name: sorted(int(path.name[5:-5]) for path in (tmp_path / name).iterdir() if not path.name.startswith("."))
        for name in ("disk", "shared", "memory", "store")
    }
    assert there["memory"] == saved[-1:] and there["store"] == saved[-2:]
    assert there["shared"] == saved[1::2][-2:] and len(there["disk"]) == 1
    copies = [path for name in ("shared", "memory", "store") for path in checkpoints_in(tmp_path / name)]
    assert len(copies) == 5 and not [problem for path in copies for problem in problems(path)]
    assert not list((tmp_path / "disk").glob(".*.hold"))
    shutil.rmtree(tmp_path / "disk")  # the disk is lost, and the newest copy damaged
    shutil.rmtree(tmp_path / "store")
    newest = tmp_path / f"memory/step={saved[-1]}.ckpt"
    (newest / "state.pt").write_bytes(b"x" * (newest / "state.pt").stat().st_size)
    expected = there["shared"][-1] if there["shared"][-1] != saved[-1] else saved[-1]
    step, path = run_ranks(in_tiers, 2, str(tmp_path), 8)[0]
    assert (step, path) == (expected, str(tmp_path / f"shared/step={expected}.ckpt"))


def best(folder: str, steps: int) -> tuple[int, str]:
    begun = Begun()
    keep = FaultTolerantCheckpoint(monitor="loss", every_n_train_steps=1, filename="{step}", save_last=True)
    fit("gpt", {}, steps, ckpt="best", callbacks=[begun, keep], **WITH_LOGS, **root(folder))
    return begun.step, keep.best_model_path


def test_best_is_found_in_a_new_process_and_none_is_a_start(tmp_path: Path) -> None:
    (step, path), other = run_ranks(best, 2, str(tmp_path), 5)
    assert step == 0 and (step, path) == other
    assert run_ranks(best, 2, str(tmp_path), 6)[0][0] == Manifest.read(Path(path)).step > 0
