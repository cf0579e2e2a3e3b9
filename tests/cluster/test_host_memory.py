"""Checkpoints in hosts' memory: a rank or a host is lost, and the run goes on from a step that no disk has.

Each rank plays the launcher of a host of its own, with its own folder, server and sockets. Real launchers of two hosts:
tests/faults/two_hosts.py.
"""

from __future__ import annotations

import os
import re
import shutil
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist

from lightning_bharat.callbacks import FaultTolerantCheckpoint
from lightning_bharat.checkpoints import host_memory
from lightning_bharat.checkpoints.digest import digest_of
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.file_server import FileServer, ask, pull
from lightning_bharat.checkpoints.whole import checkpoints_in
from lightning_bharat.cluster.host_memory import PLACE_VARIABLE, LaunchMemory, newest_of_all
from lightning_bharat.cluster.warm_job import free_port
from tests.cluster.launching import launched
from tests.modules import PlacedRows, fit
from tests.ranks import REPOSITORY, RanksFailed, run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {"data": {}, "tensor": {"tensor_parallel_size": 2}}


class Patient(L.Callback):
    """Begins no step while something is written, so that each save has its turn; knows where the run began."""

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.step = trainer.global_step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.strategy.saves.copied()
        trainer.strategy.saves.writer.wait()


def on_own_host(
    folder: str, port: int, steps: int, layout: dict[str, Any], module: Any = "gpt"
) -> tuple[list[float], int, dict[str, Any]]:
    """Train as the only rank of a host: losses, the step begun at, and the files of checkpoints in its memory after."""
    rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    os.environ |= {"LOCAL_RANK": "0", PLACE_VARIABLE: f"{folder}/host{rank}"}
    Path(folder, f"host{rank}").mkdir(exist_ok=True)
    memory = LaunchMemory([folder])
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0, timedelta(seconds=20))
    os.environ[host_memory.VARIABLE] = memory.meet(store, rank, size, "127.0.0.1").to_json()
    begun = Patient()
    keep = FaultTolerantCheckpoint(f"{folder}/disk", every_n_train_steps=100, memory_every_n_train_steps=2)
    options = {"enable_checkpointing": True, "default_root_dir": folder, "rows_kind": PlacedRows}
    result = fit(module, layout, steps, ckpt="last", callbacks=[begun, keep], **options)
    there = {path.name: sorted(file.name for file in path.iterdir()) for path in checkpoints_in(memory.folder)}
    if dist.is_initialized():
        dist.barrier()  # servers answer until all are through
    return result.seen, begun.step, there


def train(folder: Path, ranks: int, steps: int, layout: str) -> list[Any]:
    return run_ranks(on_own_host, ranks, str(folder), free_port(), steps, LAYOUTS[layout] if ranks > 1 else {})


@cache
def undisturbed(layout: str) -> list[float]:
    return run_ranks(plain, 2, LAYOUTS[layout])[0]


def plain(layout: dict[str, Any]) -> list[float]:
    return fit("gpt", layout, 9, rows_kind=PlacedRows).seen


SMALL = ["COMMIT", "MANIFEST.json", "state.pt", "tensors.json"]
FILES = ["rank_00000.safetensors", "rank_00001.safetensors"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_host_that_is_replaced_gets_its_part_from_the_one_behind_it(tmp_path: Path, layout: str) -> None:
    expected = undisturbed(layout)
    first = train(tmp_path, 2, 5, layout)
    assert [begun for _, begun, _ in first] == [0, 0] and first[0][0] == expected[:5]
    assert [there for _, _, there in first] == 2 * [{"step=4.ckpt": sorted([*SMALL, *FILES])}]
    shutil.rmtree(tmp_path / "host1")
    second = train(tmp_path, 2, 7, layout)
    assert [begun for _, begun, _ in second] == [4, 4] and second[0][0] == expected[4:7]
    shutil.rmtree(tmp_path / "host0")
    third = train(tmp_path, 2, 9, layout)
    assert [begun for _, begun, _ in third] == [6, 6] and third[0][0] == expected[6:9]
    assert not list((tmp_path / "disk").glob("*.ckpt"))


def test_the_host_that_is_left_goes_on_alone(tmp_path: Path) -> None:
    train(tmp_path, 2, 5, "data")
    shutil.rmtree(tmp_path / "host1")
    seen, begun, there = train(tmp_path, 1, 8, "data")[0]
    assert begun == 4
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(undisturbed("data")[4:8]), rtol=1e-9, atol=0)
    assert there == {"step=8.ckpt": sorted([*SMALL, FILES[0]])}


def without_a_launcher(folder: str) -> None:
    keep = FaultTolerantCheckpoint(folder, every_n_train_steps=2, memory_every_n_train_steps=1)
    with pytest.warns(UserWarning, match="memory_every_n_train_steps=1 needs bharat launch"):
        fit("gpt", {}, 2, callbacks=[keep], enable_checkpointing=True, default_root_dir=folder)


def test_without_a_launcher_it_says_so(tmp_path: Path) -> None:
    run_ranks(without_a_launcher, 1, str(tmp_path))
    assert len(checkpoints_in(tmp_path)) == 1


def test_a_copy_that_is_damaged_is_no_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, 2, 3, "data")
    shutil.rmtree(tmp_path / "host1")
    copy = next((tmp_path / "host0").rglob(FILES[1]))
    content = bytearray(copy.read_bytes())
    content[-3] ^= 1
    copy.write_bytes(content)
    with pytest.raises(RanksFailed, match=r"step=2.ckpt is passed over: .*rank_00001.safetensors is damaged"):
        train(tmp_path, 2, 4, "data")


def test_what_has_lost_a_file_on_all_hosts_is_no_checkpoint() -> None:
    whole = {"id": "a", "step": 4, "needs": ["x", "y"]}
    newer = {"id": "b", "step": 6, "needs": ["x", "y"]}
    first = {"4": {**whole, "files": ["x"]}, "6": {**newer, "files": ["x"]}}
    second = {"4": {**whole, "files": ["y"]}}
    found = newest_of_all([first, second])
    assert found is not None and (found.step, found.name) == (4, "4")
    other = {"6": {**newer, "id": "c", "files": ["y"]}}  # of another run that had the same name
    assert newest_of_all([first, other]) is None and newest_of_all([{}]) is None


def test_files_are_for_hosts_of_the_run_alone(tmp_path: Path) -> None:
    (tmp_path / "served/step=2.ckpt").mkdir(parents=True)
    (tmp_path / "served/step=2.ckpt/file").write_bytes(b"content")
    (tmp_path / "secret").write_bytes(b"not served")
    server, got = FileServer(tmp_path / "served", "127.0.0.1", "token"), tmp_path / "got"
    try:
        pull(server.address, "token", "step=2.ckpt/file", got)
        assert got.read_bytes() == b"content"
        assert ask(server.address, "token", "step=2.ckpt/file?digest")["digest"] == digest_of(got)
        for token, name in (("other", "step=2.ckpt/file"), ("", "step=2.ckpt/file"), ("token", "../secret")):
            with pytest.raises(CheckpointError, match=f"could not be fetched from {server.address}: HTTP Error 40"):
                pull(server.address, token, name, got)
        assert server.address.startswith("127.0.0.1:")
    finally:
        server.close()
    with pytest.raises(CheckpointError, match="could not be fetched from .*refused"):
        pull(server.address, "token", "step=2.ckpt/file", got)


SCRIPT = """
import os, pathlib, signal
from tests.cluster.test_host_memory import FaultTolerantCheckpoint, Patient, PlacedRows, fit, host_memory

class Dies(Patient):
    def on_train_batch_end(self, trainer, *_):
        died = pathlib.Path(f"died{trainer.global_step}")
        if trainer.global_step in (5, 7) and os.environ["RANK"] == "1" and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)

patient = Dies()
keep = FaultTolerantCheckpoint("disk", every_n_train_steps=100, memory_every_n_train_steps=2)
seen = fit("gpt", {}, 9, ckpt="last", rows_kind=PlacedRows, callbacks=[keep, patient], enable_checkpointing=True).seen
print("began at", patient.step, [loss for loss, _ in seen], "from", host_memory.hosts().folder)
"""


def test_ranks_are_lost_and_so_is_a_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    assert launched(tmp_path, SCRIPT, "--max-restarts=0", ranks=2).code == 1
    kept = re.search("the newest step stays in memory, in (.*): the same command", capsys.readouterr().err)
    assert kept and checkpoints_in(Path(kept[1]))
    done = launched(tmp_path, SCRIPT, "--max-restarts=1", ranks=2)
    assert done.code == 0
    begun = [event["step"] for event in done.events("training")]
    assert begun == [0, 4, 6]
    losses = [loss for loss, _ in undisturbed("data")]
    assert f"began at 6 {losses[6:9]} from {kept[1]}" in done.output(0, 1)
    assert not Path(kept[1]).exists(), "a run that has ended gives the memory back"
