"""Which checkpoints are whole: digests of every file, and the commands over folders of checkpoints."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from lightning_bharat.checkpoints import Checkpoint, CheckpointError, load_weights
from lightning_bharat.checkpoints.whole import checkpoints_in, newest_whole, problems
from lightning_bharat.cli import main
from lightning_bharat.commands import checkpoints as commands
from lightning_bharat.commands.checkpoint import convert
from lightning_bharat.plan.layout import Layout
from tests.checkpoints.cases import Case
from tests.checkpoints.test_layouts import save_case
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of the same weights, on one rank and on two, and one of others."""
    folder = tmp_path_factory.mktemp("run")
    save_case(Layout(), str(folder / "one.ckpt"))
    run_ranks(save_case, 2, Layout(tensor=2), str(folder / "two.ckpt"))
    save_case(Layout(), str(folder / "other.ckpt"), seed=5)
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def files(checkpoint: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.iterdir())


def test_a_bit_that_flips_or_a_byte_that_is_missing_anywhere_is_found(run: Path) -> None:
    draw, checkpoint = random.Random(0), run / "two.ckpt"
    assert files(checkpoint)[:2] == ["COMMIT", "MANIFEST.json"] and len(files(checkpoint)) == 6
    for name in files(checkpoint):
        good = (checkpoint / name).read_bytes()
        for _ in range(200):
            place = draw.randrange(len(good))
            flipped = bytearray(good)
            flipped[place] ^= 1 << draw.randrange(8)
            for damaged in (bytes(flipped), good[:place]):
                (checkpoint / name).write_bytes(damaged)
                assert any(problems(checkpoint)), (name, place)
        (checkpoint / name).write_bytes(good)
    assert not any(problems(checkpoint))


def test_a_flipped_bit_is_not_loaded(run: Path) -> None:
    path = run / "one.ckpt" / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    state = Checkpoint(path.parent).load()["state_dict"]
    with pytest.raises(CheckpointError, match=r"rank_00000.safetensors is damaged: its bytes are not those"):
        load_weights(Case(Layout(), seed=3).module, {}, state)


def test_a_file_that_was_added_is_named(run: Path) -> None:
    (run / "one.ckpt" / "rank_00007.safetensors").write_bytes(b"")
    assert [problem.split()[1:5] for problem in problems(run / "one.ckpt")] == [["is", "not", "among", "the"]]


def test_the_newest_whole_one_is_found(run: Path) -> None:
    assert len(checkpoints_in(run)) == 3
    newest = newest_whole(run)
    assert newest is not None
    (newest / "state.pt").write_bytes(b"")
    assert newest_whole(run) not in (None, newest)
    for path in checkpoints_in(run):
        (path / "COMMIT").unlink(missing_ok=True)
    assert newest_whole(run) is None


def test_list_and_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count(": whole") == 3
    (run / "two.ckpt" / "rank_00001.safetensors").unlink()
    assert main(["checkpoint", "verify", str(run)]) == 1
    said = capsys.readouterr().out
    assert "two.ckpt: damaged" in said and "rank_00001.safetensors is missing" in said
    assert main(["checkpoint", "list", str(run)]) == 0
    said = capsys.readouterr().out
    assert said.count("all files there") == 2 and "incomplete copy" in said


def test_diff(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.diff(run / "one.ckpt", run / "two.ckpt") == 0
    convert(run / "two.ckpt", run / "plain.ckpt")
    assert commands.diff(run / "one.ckpt", run / "plain.ckpt") == 1  # its optimizer counts parameters, and has no names
    assert "blocks" not in capsys.readouterr().out.replace("optimizer_states/0/state/blocks", "")
    capsys.readouterr()
    assert commands.diff(run / "one.ckpt", run / "other.ckpt") == 1
    said = capsys.readouterr().out
    assert "blocks.0.qkv.weight" in said and "tensors differ" in said
    assert commands.diff(run / "one.ckpt", run / "other.ckpt", tolerance=1e9) == 0


def test_prune_never_removes_the_last_whole_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = checkpoints_in(run)[-1]
    (newest / "tensors.json").write_text("{}")
    commands.prune(run, keep=1, dry_run=True)
    assert len(checkpoints_in(run)) == 3
    commands.prune(run, keep=1)
    left = checkpoints_in(run)
    assert newest in left and len(left) == 2 and newest_whole(run) is not None
    assert "damaged, left as it is" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="keep=0: at least one checkpoint stays"):
        commands.prune(run, keep=0)
    with pytest.raises(CheckpointError, match="has no checkpoint directory"):
        commands.verify(run / left[0] / "nothing")


def test_other_tensors_and_shapes_are_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, state in (("a", {"w": torch.ones(2), "x": torch.ones(1)}), ("b", {"w": torch.ones(3)})):
        torch.save({"state_dict": state}, tmp_path / f"{name}.ckpt")
    assert commands.diff(tmp_path / "a.ckpt", tmp_path / "b.ckpt") == 1
    said = capsys.readouterr().out
    assert "float32 [2] and float32 [3]" in said and "only in the first" in said
