"""`bharat data prepare` and `show`: what they print."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_bharat.commands import data
from lightning_bharat.data import DataError
from tests.data.texts import write_corpus


def test_prepare_then_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path / "texts.jsonl")
    data.prepare(str(corpus), tmp_path / "prepared", vocab_size=400)
    first = capsys.readouterr().out
    assert "train" in first and "190" in first and "vocab_size 400" in first
    data.show(tmp_path / "prepared", sequence_length=32, check=True)
    assert "sequences of 32" in (second := capsys.readouterr().out)
    assert "every file is as it was written" in second
    next((tmp_path / "prepared" / "val").glob("*.bin")).write_bytes(b"")
    with pytest.raises(DataError, match="not as it was written"):
        data.show(tmp_path / "prepared", check=True)


def test_fetch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.fetch(tmp_path / "corpus", packages=False)
    assert "English" in capsys.readouterr().out
