"""Checkpoints in stores: the commands by URL, and stores that are slow, gone or hold half of something."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from lightning_bharat.checkpoints import remote
from lightning_bharat.checkpoints.fetched import bring
from lightning_bharat.checkpoints.remote import Remote, StoreError
from lightning_bharat.checkpoints.whole import checkpoints_in, problems
from lightning_bharat.cli import main
from lightning_bharat.commands.checkpoint import convert
from lightning_bharat.plan.layout import Layout
from tests.checkpoints.stores import Torn, gone, served, silent
from tests.checkpoints.test_layouts import save_case
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights on one rank and on two, compressed ones, and a plain file."""
    folder = tmp_path_factory.mktemp("saved")
    save_case(Layout(), str(folder / "run/one=1.ckpt"))
    run_ranks(save_case, 2, Layout(tensor=2), str(folder / "run/checkpoints/two.ckpt"))
    convert(folder / "run/one=1.ckpt", folder / "run/plain.ckpt")
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "run", tmp_path / "run"))


@pytest.fixture
def url(run: Path) -> Iterator[str]:
    with served(run.parent) as at:
        yield f"{at}/run"


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> object:
    def by(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["checkpoint", *words])
        found = capsys.readouterr()
        return code, found.out + found.err

    return by


def test_commands_by_url_say_what_they_say_of_a_folder(run: Path, url: str, said, tmp_path: Path) -> None:
    for command in ("list", "verify"):
        (code, here), (other, there) = said(command, str(run)), said(command, url)
        assert code == other == 0 and there == here.replace(str(run), url), there
    for name in ("one=1.ckpt", "checkpoints/two.ckpt", "plain.ckpt"):
        assert said("show", f"{url}/{name}")[1] == said("show", str(run / name))[1].replace(str(run), url)
    assert said("diff", f"{url}/one=1.ckpt", f"{url}/checkpoints/two.ckpt") == (0, "the same: 59 tensors\n")
    assert said("diff", f"{url}/plain.ckpt", str(run / "plain.ckpt"))[0] == 0
    assert said("export", f"{url}/checkpoints/two.ckpt", str(tmp_path / "out"))[0] == 0
    assert said("convert", f"{url}/checkpoints/two.ckpt", str(tmp_path / "whole.ckpt"))[0] == 0
    assert said("convert", f"{url}/plain.ckpt", str(tmp_path / "again.ckpt"))[0] == 0
    expected = torch.load(run / "plain.ckpt", weights_only=True)["state_dict"]
    exported = load_file(tmp_path / "out/model.safetensors")
    whole = torch.load(tmp_path / "whole.ckpt", weights_only=True)["state_dict"]
    for name, value in expected.items():
        assert torch.equal(exported.get(name, value), value) and torch.equal(whole[name], value)
    assert not any(problems(tmp_path / "again.ckpt"))


def test_what_is_damaged_there_is_named_by_url(run: Path, url: str, said) -> None:
    shard = run / "checkpoints/two.ckpt/rank_00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    code, text = said("verify", url)
    assert code == 1 and f"{url}/checkpoints/two.ckpt/rank_00001.safetensors is damaged" in text
    assert f"{url}/one=1.ckpt: whole" in text
    code, text = said("convert", f"{url}/checkpoints/two.ckpt", str(run / "out.ckpt"))
    assert code == 2 and f"{url}/checkpoints/two.ckpt/rank_00001.safetensors is damaged" in text
    assert not (run / "out.ckpt").exists()
    shard.write_bytes(content[:-9])
    assert "has" in said("list", url)[1] and "is damaged" in said("list", url)[1]
    shard.unlink()
    assert f"{url}/checkpoints/two.ckpt/rank_00001.safetensors is missing" in said("verify", url)[1]
    (run / "one=1.ckpt/COMMIT").unlink()
    assert f"{url}/one=1.ckpt/COMMIT is missing" in said("list", url)[1]
    (run / "one=1.ckpt/more").touch()
    assert said("verify", f"{url}/nothing")[1].count("has no checkpoint directory") == 1
    assert f"{url}/no.ckpt/MANIFEST.json is missing" in said("show", f"{url}/no.ckpt")[1]
    assert "can't be opened" in said("show", "nostore://x")[1]


def test_prune_by_url_removes_commit_first_and_never_the_last_whole_one(
    run: Path, said, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, removed = fsspec.filesystem("memory"), []
    store.put(str(run), "/bucket/run", recursive=True)
    at = "memory://bucket/run"
    manifest = f"{at}/checkpoints/two.ckpt/MANIFEST.json"  # of the same step: the last by name
    assert [str(place) for place in checkpoints_in(Remote(at))] == [f"{at}/checkpoints/two.ckpt", f"{at}/one=1.ckpt"]
    remove = type(store)._rm

    def watched(self: object, path: str) -> None:
        removed.append(path)
        if len(removed) == 2:
            raise ConnectionResetError("the connection is lost")
        remove(self, path)

    monkeypatch.setattr(type(store), "_rm", watched)
    code, text = said("prune", at, "--keep", "1")
    assert code == 2 and f"{at}/checkpoints/two.ckpt can't be reached: ConnectionResetError" in text
    assert removed[0] == "/bucket/run/checkpoints/two.ckpt/COMMIT" and store.exists(manifest)
    assert said("prune", at, "--keep", "1")[0] == 0  # half a checkpoint is left to be looked at
    code, text = said("list", at)
    assert "COMMIT is missing" in text and text.count("all files there") == 1
    store.rm("/bucket", recursive=True)


def test_a_store_that_is_slow_or_gone_is_an_error_and_never_an_empty_one(
    run: Path, said, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remote, "PATIENCE", 0.6)
    with silent() as quiet, served(run.parent, Torn) as torn:
        for at, why in ((f"{gone()}/run", "can't be reached"), (f"{quiet}/run", "does not answer")):
            for command in ("list", "verify", "show", "prune"):
                code, text = said(command, at)
                assert code == 2 and at in text and why in text and "no checkpoint" not in text, (command, text)
        code, text = said("verify", f"{torn}/run/one=1.ckpt")
        assert code == 2 and f"{torn}/run/one=1.ckpt/rank_00000.safetensors does not answer" in text
        with pytest.raises(StoreError, match="does not answer"):
            bring(Remote(f"{torn}/run/one=1.ckpt"), tmp_path / "here")
    assert [path.name for path in (tmp_path / "here").iterdir()] == [".fetching"]


def test_a_checkpoint_is_brought_here_once_whole_or_not_at_all(run: Path, url: str, tmp_path: Path) -> None:
    there, here = Remote(f"{url}/one=1.ckpt"), tmp_path / "here"
    (here / "one=1.ckpt").mkdir(parents=True)  # another one of that name stays
    path = bring(there, here)
    assert path.name == "one=1-v1.ckpt" and not any(problems(path))
    made = path.stat().st_ino
    assert bring(there, here) == path and path.stat().st_ino == made
    shard = run / "checkpoints/two.ckpt/rank_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match=f"{url}/checkpoints/two.ckpt/rank_00000.safetensors is damaged"):
        bring(Remote(f"{url}/checkpoints/two.ckpt"), here)
    assert sorted(path.name for path in here.iterdir()) == [".fetching", "one=1-v1.ckpt", "one=1.ckpt"]
