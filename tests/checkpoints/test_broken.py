"""Checkpoints that are damaged, malicious or of another model, and saves that are killed."""

from __future__ import annotations

import functools
import json
import os
import pickle
import signal
import time
from pathlib import Path

import pytest
import torch

from lightning_bharat.checkpoints import (
    Checkpoint,
    CheckpointError,
    load_weights,
    optimizers,
    safetensors_file,
    weights,
)
from lightning_bharat.checkpoints.digest import digest_of
from lightning_bharat.checkpoints.document import STATE, as_plain
from lightning_bharat.checkpoints.index import INDEX
from lightning_bharat.checkpoints.manifest import COMMIT, MANIFEST, Manifest
from lightning_bharat.checkpoints.opened import open_any
from lightning_bharat.plan.layout import Layout
from tests.checkpoints.cases import Case
from tests.checkpoints.test_layouts import load_case, save_case
from tests.ranks import RanksFailed, run_ranks, server


class Malicious:
    """Pickled, it makes whoever unpickles it write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.path, "was here")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_case(Layout(), str(tmp_path / "last.ckpt"))
    return tmp_path / "last.ckpt"


def load(folder: Path) -> Case:
    case = Case(Layout(), seed=3)
    load_weights(case.module, {}, Checkpoint(folder).load()["state_dict"])
    return case


def seal(folder: Path) -> None:
    """Let sizes and digests agree with what is there: damage done on purpose."""
    (folder / COMMIT).unlink(missing_ok=True)
    Manifest(**{**json.loads((folder / MANIFEST).read_text()), "files": {}}).write(folder, {})


@pytest.mark.parametrize("name", [INDEX, STATE, MANIFEST, "rank_00000.safetensors"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_missing_file_is_named(folder: Path, name: str, listed: bool) -> None:
    (folder / name).unlink()
    words = r"missing.*(incomplete copy)"
    if not listed and name != MANIFEST:
        seal(folder)
        words = "not among the files that .* lists"
    with pytest.raises(CheckpointError, match=rf"{name} is {words}"):
        load(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    data = (folder / "rank_00000.safetensors").read_bytes()
    (folder / "rank_00000.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=rf"has {len(data) - 100} bytes and was written with {len(data)}"):
        load(folder)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"chunks"', '"chunk"', "damaged: KeyError"),
        ('"rank_00000.safetensors"', '"../elsewhere.safetensors"', "not the name of a safetensors or .zst file"),
        ('"F32"', '"F33"', "damaged: KeyError: 'F33'"),
        ("{", "", "can't be read as JSON"),
    ],
)
def test_a_damaged_index_is_refused(folder: Path, old: str, new: str, words: str) -> None:
    (folder / INDEX).write_text((folder / INDEX).read_text().replace(old, new, 1))
    seal(folder)
    with pytest.raises(CheckpointError, match=words):
        load(folder)


@pytest.mark.parametrize("chunk", [{"offsets": [4, 0]}, {"offsets": [-1, 0]}, {"sizes": [1, 8]}, {"sizes": "all"}])
def test_rectangles_that_can_not_be_are_refused(folder: Path, chunk: dict) -> None:
    content = json.loads((folder / INDEX).read_text())
    content["tensors"]["embedding.weight"]["chunks"][0].update(chunk)
    (folder / INDEX).write_text(json.dumps(content))
    seal(folder)
    with pytest.raises(CheckpointError, match="is damaged"):
        load(folder)


OUTSIDE = ["../secret.txt", "/etc/passwd", "..", "", "sub/../../secret.txt", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_that_names_files_outside_of_its_folder_is_refused(folder: Path, name: str) -> None:
    (folder.parent / "secret.txt").write_text("secret")
    content = json.loads((folder / MANIFEST).read_text())
    content["files"][name] = {"bytes": 6, "xxh3": "0" * 32}
    (folder / MANIFEST).write_text(json.dumps(content))
    (folder / COMMIT).write_text(json.dumps({"xxh3": digest_of(folder / MANIFEST)}))
    with pytest.raises(CheckpointError, match="is not the name of a file in this directory"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value"), [("step", "7"), ("files", []), ("layout", 3), ("batches", {}), ("files", {"a": {"bytes": "1"}})]
)
def test_a_manifest_of_other_types_is_refused(folder: Path, key: str, value: object) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**content, key: value}))
    (folder / COMMIT).write_text(json.dumps({"xxh3": digest_of(folder / MANIFEST)}))
    with pytest.raises(CheckpointError, match="MANIFEST.json is damaged: "):
        load(folder)


@pytest.mark.parametrize("name", [INDEX, STATE, "rank_00000.safetensors"])
def test_a_link_in_place_of_a_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
    with pytest.raises(CheckpointError, match=rf"{name} is a symbolic link"):
        load(folder)


@pytest.mark.parametrize("name", [INDEX, MANIFEST, COMMIT])
def test_deep_json_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("[" * 100_000)
    if name == INDEX:
        seal(folder)
    with pytest.raises(CheckpointError, match=rf"{name} is damaged: it can't be read as JSON"):
        load(folder)


@pytest.mark.parametrize("name", [".metadata", INDEX, MANIFEST, COMMIT, STATE, "rank_00000.safetensors"])
def test_no_pickle_is_run(folder: Path, name: str) -> None:
    target = folder.parent / "proof"
    (folder / name).write_bytes(pickle.dumps(Malicious(target)))
    if name not in (MANIFEST, COMMIT):
        seal(folder)
    if name == ".metadata":
        load(folder)
    else:
        with pytest.raises(CheckpointError, match="damaged|can't be read"):
            load(folder)
    assert not target.exists()
    pickle.loads((folder / name).read_bytes())  # it would have worked
    assert target.read_text() == "was here"


def test_no_pickle_inside_of_a_torch_file_is_run(folder: Path) -> None:
    target = folder.parent / "proof"
    torch.save({"state_dict": Malicious(target)}, folder / STATE)
    seal(folder)
    with pytest.raises(CheckpointError, match="could run code"):
        load(folder)
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"seed_everything: 1\nmodel:\n", b"\x80\x02", bytes(range(256))], ids=str)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config.yaml is damaged, or "):
        open_any(tmp_path / "config.yaml")


def test_another_form_and_other_directories_are_refused(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(CheckpointError, match=r"a newer form than this lightning_bharat reads \(99, not 3\)"):
        load(folder)
    (folder / MANIFEST).write_text(json.dumps({**content, "version": "2"}))
    with pytest.raises(CheckpointError, match=r"another form than this"):
        load(folder)
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        load(folder.parent)


def test_another_model_is_refused_by_names(folder: Path) -> None:
    case = Case(Layout(), seed=3)
    case.module.extra = torch.nn.Linear(2, 2, bias=False)
    del case.module.blocks[1].norm
    case.module.blocks[0].out = torch.nn.Linear(8, 4)
    state = Checkpoint(folder).load()["state_dict"]
    with pytest.raises(CheckpointError) as error:
        load_weights(case.module, {}, state)
    words = str(error.value)
    assert words.startswith("This is a checkpoint of another model: it lacks extra.weight; it has ")
    assert "blocks.1.norm.bias, blocks.1.norm.weight, unknown here" in words
    assert "blocks.0.out.weight is [8, 8] in the checkpoint and [4, 8] here" in words
    with pytest.raises(CheckpointError, match=r"^This is a checkpoint of another model: blocks.0.out"):
        load_weights(case.module, {}, state, strict=False)  # a shape is refused in any case
    case.module.blocks[0].out = torch.nn.Linear(8, 8)
    load_weights(case.module, {}, state, strict=False)
    assert torch.equal(case.module.blocks[0].out.weight, Case(Layout(), seed=1).whole["blocks.0.out.weight"])


def test_another_optimizer_is_refused_by_names(folder: Path) -> None:
    case = Case(Layout(), seed=3)
    saved = Checkpoint(folder).load()["optimizer_states"][0]
    names = weights.parameter_names(case.module)
    parameters = list(case.module.parameters())
    with pytest.raises(CheckpointError, match="has 2 parameter groups, and this one 1"):
        optimizers.load_state(torch.optim.AdamW(parameters), names, {}, saved)
    other = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}])
    with pytest.raises(CheckpointError, match=r"another model, by group 0 .*blocks.0.norm.weight.*unknown here"):
        optimizers.load_state(other, names, {}, saved)
    stranger = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(CheckpointError, match=r"parameter 0 of group 0 of AdamW \(shape \[2\]\) is not a parameter"):
        optimizers.load_state(stranger, names, {}, saved)


def load_other(layout: Layout, folder: str) -> None:
    case = Case(layout, seed=2)
    case.module.blocks[0].extra = torch.nn.Linear(2, 2)
    from lightning_bharat.checkpoints.errors import together

    state = Checkpoint(Path(folder)).load()["state_dict"]
    together(lambda: load_weights(case.module, case.slices, state))


def test_every_rank_has_the_words(folder: Path) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(load_other, 2, Layout(tensor=2), str(folder))
    for outcome in failed.value.outcomes:
        assert "another model: it lacks blocks.0.extra.bias, blocks.0.extra.weight" in outcome.message


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ({"a": [1, Case]}, r"checkpoint\['a'\]\[1\] is a builtins.type"),
        ({"f": functools.partial(print)}, r"checkpoint\['f'\] is a functools.partial"),
        ({"h": {"model": torch.nn.Linear(1, 1)}}, r"checkpoint\['h'\]\['model'\] is a torch.nn.modules.linear.Linear"),
        ({"s": signal.SIGTERM}, r"checkpoint\['s'\] is a signal.Signals"),
    ],
)
def test_what_can_not_be_read_back_is_refused_by_its_key(value: dict, key: str) -> None:
    with pytest.raises(CheckpointError, match=key):
        as_plain(value)


def save_and_hang(layout: Layout, folder: str) -> None:
    """Save another version, and stop in the middle of a file."""
    write_bytes = safetensors_file.as_bytes
    written = []

    def slowly(entry: safetensors_file.Entry) -> object:
        written.append(entry.key)
        if len(written) == 3:
            Path(f"{folder}.writing.{os.environ['RANK']}").touch()
            time.sleep(60)
        return write_bytes(entry)

    safetensors_file.as_bytes = slowly
    save_case(layout, folder, seed=5)


def test_a_save_that_is_killed_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    layout, folder = Layout(tensor=2), tmp_path / "last.ckpt"
    run_ranks(save_case, 2, layout, str(folder))
    job = server.start(save_and_hang, 2, layout, str(folder))
    end = time.monotonic() + 20
    while len(list(tmp_path.glob("*.writing.*"))) < 2:
        assert time.monotonic() < end
        time.sleep(0.02)
    for rank in range(2):
        job.kill(rank, signal.SIGKILL)
    job.wait(10)
    for mark in tmp_path.glob("*.writing.*"):
        mark.unlink()
    shown = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert shown == ["last.ckpt"]
    assert len(list(tmp_path.iterdir())) == 2  # the half one, hidden
    expected = Case(Layout(), seed=1).expected()
    found = run_ranks(load_case, 2, layout, str(folder))[0][0]
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    run_ranks(save_case, 2, layout, str(folder), 6)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]  # the next save has cleaned up
    found = run_ranks(load_case, 2, layout, str(folder))[0][0]
    assert torch.equal(found["blocks.0.qkv.weight"], Case(Layout(), seed=6).whole["blocks.0.qkv.weight"])


def save_to_full_disk(folder: str) -> None:
    def full(path: Path, *args: object) -> str:
        if os.environ["RANK"] == "1":
            raise OSError(28, "No space left on device", str(path))
        return write(path, *args)

    write, safetensors_file.write = safetensors_file.write, full
    save_case(Layout(tensor=2), folder)


def test_a_full_disk_on_one_rank_is_every_rank_s_error(folder: Path) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(save_to_full_disk, 2, str(folder))
    for outcome in failed.value.outcomes:
        assert "No space left on device" in outcome.message
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    load(folder)
