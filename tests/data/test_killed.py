"""A preparation that is killed leaves nothing half made, and the next one works."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_bharat.data import DataError, Prepared, prepare
from lightning_bharat.data import folder as folders
from lightning_bharat.data import pack as packing
from lightning_bharat.data.folder import _remove_abandoned, whole_or_nothing
from tests.data.texts import write_corpus
from tests.ranks import server


def stops_in(function: str, corpus: Path, folder: Path, reached: Path) -> None:
    """Prepare, and stand still for ever where ``function`` has returned."""
    original: Callable = getattr(packing, function)

    def stand(*args: Any) -> Any:
        original(*args)
        reached.touch()
        time.sleep(1000)

    setattr(packing, function, stand)
    prepare(corpus, folder, vocab_size=300)


@pytest.mark.parametrize("function", ["_tokenizer", "_write_split", "_write", "_copy_licences"])
def test_killed_preparation(function: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "texts.jsonl", count=60)
    folder, reached = tmp_path / "prepared", tmp_path / "reached"
    job = server.start(stops_in, 1, function, corpus, folder, reached)
    deadline = time.monotonic() + 30
    while not reached.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reached.exists()
    assert len(list(tmp_path.glob(".prepared.*"))) == 1
    job.kill(0)
    job.wait(10)
    with pytest.raises(DataError, match="does not exist"):
        Prepared.open(folder)

    made = prepare(corpus, folder, vocab_size=300)
    made.check()
    assert sum(split.documents for split in made.splits.values()) == 60
    assert not list(tmp_path.glob(".prepared.*")), "what the killed process left is gone"


def test_two_at_once_agree(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "texts.jsonl", count=60)
    made: list[Prepared] = []
    threads = [
        threading.Thread(target=lambda: made.append(prepare(corpus, tmp_path / "prepared", vocab_size=300)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 3
    assert len({each.digest("train") for each in made}) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prepared", "texts.jsonl"]


def test_a_folder_appears_with_all_its_files_or_not(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with pytest.raises(RuntimeError), whole_or_nothing(target) as unfinished:
        (unfinished / "a").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with whole_or_nothing(target) as unfinished:
        (unfinished / "a").write_text("1")
        assert not target.exists()
        with whole_or_nothing(target) as second:  # the first's folder is not taken for abandoned
            (second / "b").write_text("2")
        with pytest.raises(FileExistsError), whole_or_nothing(target):
            pass
        os.rename(target, tmp_path / "second")
    assert [path.name for path in target.iterdir()] == ["a"]
    assert (target.stat().st_mode & 0o777) == 0o777 & ~_umask()


def test_a_new_folder_that_another_takes_for_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "made"
    made: list[str] = []
    mkdtemp = tempfile.mkdtemp

    def removed_at_once(**options: Any) -> str:
        made.append(mkdtemp(**options))
        if len(made) == 1:
            _remove_abandoned(target)
        return made[-1]

    monkeypatch.setattr(folders, "tempfile", SimpleNamespace(mkdtemp=removed_at_once))
    with whole_or_nothing(target) as unfinished:
        (unfinished / "a").write_text("1")
    assert len(made) == 2 and [path.name for path in tmp_path.rglob("*")] == ["made", "a"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
