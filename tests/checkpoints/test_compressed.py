"""Compressed shards: the same values in fewer bytes, on any layout; damage and lies are found, in words."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zstandard

from lightning_bharat.checkpoints import Checkpoint, CheckpointError, Share, compressed_file, save
from lightning_bharat.checkpoints.index import INDEX
from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.checkpoints.safetensors_file import DTYPES, Entry
from lightning_bharat.checkpoints.saving import Compression, Saver
from lightning_bharat.checkpoints.tiers import Tier, copy_to
from lightning_bharat.checkpoints.whole import problems
from lightning_bharat.cli import main
from lightning_bharat.commands import checkpoints as commands
from lightning_bharat.plan.layout import Layout
from tests.checkpoints.cases import Case
from tests.checkpoints.test_broken import seal
from tests.checkpoints.test_layouts import load_case, save_case
from tests.ranks import run_ranks

SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 3, 4), (129,), (0, 4), (40, 9)]


def entry(key: str, tensor: torch.Tensor) -> Entry:
    return Entry(key, tensor.dtype, tuple(tensor.shape), lambda: tensor)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_type_and_any_part_of_any_shape(dtype: torch.dtype, tmp_path: Path, monkeypatch: object) -> None:
    monkeypatch.setattr(compressed_file, "PIECE", 64)  # type: ignore[attr-defined]
    draw, size = random.Random(0), dtype.itemsize
    tensors = {}
    for shape in SHAPES:
        count = torch.Size(shape).numel()
        raw = torch.randint(2 if dtype == torch.bool else 256, (count * size,), dtype=torch.uint8)
        tensors[str(shape)] = raw.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)
    digest, places = compressed_file.write(tmp_path / "a.zst", [entry(key, t) for key, t in tensors.items()])
    assert len(digest) == 32
    for key, tensor in tensors.items():
        for _ in range(8):
            starts = [draw.randint(0, n) for n in tensor.shape]
            lengths = [draw.randint(0, n - o) for o, n in zip(starts, tensor.shape, strict=True)]
            part = compressed_file.read(tmp_path / "a.zst", places[key], tensor.shape, dtype, starts, lengths)
            expected = tensor[tuple(slice(o, o + n) for o, n in zip(starts, lengths, strict=True))]
            same = [t.contiguous().reshape(-1).view(torch.uint8) for t in (part, expected)]
            assert part.shape == expected.shape and torch.equal(*same)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compressed")
    run_ranks(save_case, 2, Layout(tensor=2), str(folder / "two.ckpt"), 1, "zstd")
    save_case(Layout(), str(folder / "plain.ckpt"))
    return folder


def test_another_layout_reads_the_same_values(saved: Path) -> None:
    expected = Case(Layout(), seed=1).expected()
    assert {path.suffix for path in (saved / "two.ckpt").iterdir()} == {"", ".json", ".pt", ".zst"}
    for layout in (Layout(), Layout(tensor=2)):
        for found, _, _ in run_ranks(load_case, layout.devices, layout, str(saved / "two.ckpt")):
            assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_commands_read_it(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = saved / "two.ckpt"
    assert main(["checkpoint", "show", str(two)]) == 0
    assert "times smaller" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(two)]) == 0
    assert commands.diff(two, saved / "plain.ckpt") == 0
    assert main(["checkpoint", "convert", str(two), str(tmp_path / "whole.ckpt")]) == 0
    assert main(["checkpoint", "export", str(two), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_damage_anywhere_is_found(saved: Path) -> None:
    draw, path = random.Random(0), saved / "two.ckpt" / "rank_00001.zst"
    good = path.read_bytes()
    for _ in range(200):
        place = draw.randrange(len(good))
        flipped = bytearray(good)
        flipped[place] ^= 1 << draw.randrange(8)
        for damaged in (bytes(flipped), good[:place]):
            path.write_bytes(damaged)
            assert any(problems(path.parent)), place
    path.write_bytes(good)
    assert not any(problems(path.parent))


@pytest.fixture
def one(tmp_path: Path) -> Path:
    tensor = torch.arange(1000.0)
    save(tmp_path / "one.ckpt", {"state_dict": {"w": Share.of(tensor)}}, Manifest(), "zstd")
    return tmp_path / "one.ckpt"


def read(folder: Path) -> torch.Tensor:
    return Checkpoint(folder).load()["state_dict"]["w"].read()


ZSTD = zstandard.ZstdCompressor()
LIES = {
    "a bomb": ZSTD.compress(bytes(2**26)),
    "too short": ZSTD.compress(bytes(100)),
    "no length": zstandard.ZstdCompressor(write_content_size=False).compress(bytes(4000)),
    "noise": bytes(range(256)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_piece_of_another_length_is_refused_unread(one: Path, lie: str) -> None:
    assert torch.equal(read(one), torch.arange(1000.0))
    index = json.loads((one / INDEX).read_text())
    (chunk,) = index["tensors"]["w"]["chunks"]
    chunk["pieces"] = [len(LIES[lie])]
    (one / INDEX).write_text(json.dumps(index))
    (one / "rank_00000.zst").write_bytes(LIES[lie])
    seal(one)
    with pytest.raises(CheckpointError, match=r"rank_00000.zst is damaged: "):
        read(one)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"begin": -1}, "is not a list of sizes"),
        ({"pieces": [1, 2]}, "2 pieces can't hold 4000 bytes"),
        ({"pieces": "all"}, "is not a list of sizes"),
        ({"pieces": [10**9]}, "can't hold 1000000000"),
        ({"begin": 10**9}, "a piece has fewer bytes"),
        ({"file": "../rank_00000.zst"}, "is not the name of a safetensors or .zst file"),
    ],
)
def test_an_index_that_can_not_be_is_refused(one: Path, change: dict, words: str) -> None:
    index = json.loads((one / INDEX).read_text())
    index["tensors"]["w"]["chunks"][0].update(change)
    (one / INDEX).write_text(json.dumps(index))
    seal(one)
    with pytest.raises(CheckpointError, match=words):
        read(one)


def test_a_tensor_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "one.ckpt"
    save(folder, {"state_dict": {"w": Share.of(torch.arange(8.0))}}, Manifest())
    index = json.loads((folder / INDEX).read_text())
    index["tensors"]["w"] |= {"shape": [10**15], "chunks": [{**index["tensors"]["w"]["chunks"][0], "sizes": [10**15]}]}
    (folder / INDEX).write_text(json.dumps(index))
    seal(folder)
    with pytest.raises(CheckpointError, match="can't hold 4000000000000000"):
        read(folder)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_what_a_disk_has_not_kept_is_found_before_it_is_committed(
    compression: Compression | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content = tmp_path / "a.ckpt", {"state_dict": {"w": Share.of(torch.arange(1000.0))}}
    Saver(compression, read_back=True).save(path, content, Manifest(step=1))
    assert not any(problems(path)) and Manifest.read(path).step == 1
    sync = os.fsync

    def forgets(descriptor: int) -> None:
        sync(descriptor)
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if Path(name).stem.startswith("rank_"):
            with open(name, "r+b") as file:
                file.seek(900)
                file.write(bytes(4))

    monkeypatch.setattr(os, "fsync", forgets)
    with pytest.raises(CheckpointError, match="its bytes are not those that were written"):
        Saver(compression, read_back=True).save(path, content, Manifest(step=2))
    assert Manifest.read(path).step == 1 and [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("at", ["", "file://"])
def test_a_tier_packs_its_copies_and_leaves_what_they_are_of(saved: Path, tmp_path: Path, at: str) -> None:
    run_ranks(save_case, 2, Layout(tensor=2), str(tmp_path / "run/two.ckpt"))
    source = tmp_path / "run/two.ckpt"
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    for checkpoint in (source, saved / "two.ckpt"):  # the second is compressed already
        copy = Path(copy_to(Tier(f"{at}{tmp_path}/tier", compression="zstd"), checkpoint).removeprefix("file://"))
        assert not list(problems(copy)) and {path.suffix for path in copy.iterdir()} == {"", ".json", ".pt", ".zst"}
        assert commands.diff(copy, checkpoint) == 0
        of, its = (Manifest.read(path) for path in (checkpoint, copy))
        assert replace(its, files={}) == replace(of, files={})
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["two.ckpt"]
    shard = source / "rank_00001.safetensors"
    shard.write_bytes(before[shard.name][:-1] + b"\1")
    with pytest.raises(CheckpointError, match="rank_00001.safetensors is damaged"):
        copy_to(Tier(f"{at}{tmp_path}/tier", compression="zstd"), source)
    with pytest.raises(ValueError, match="compression='gzip'.: write 'zstd', or None"):
        Tier("x", compression="gzip")  # type: ignore[arg-type]
