"""Text to packed tokens and back: whole, split by content, and refused in words where it can't be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from litdata import StreamingDataset
from litdata import TokensLoader as LitTokensLoader

from lightning_bharat.data import DataError, Prepared, TokenWindows, prepare
from lightning_bharat.data import pack as packing
from lightning_bharat.data.corpus import PASSAGE, Corpus
from lightning_bharat.data.tokenizer import Encoder, end_token, load_tokenizer, train_tokenizer
from tests.data.texts import sentences, write_corpus

ODD = "क्\u200dष தமிழ் 語 🙂\t\r\n  x\x00 é e\u0301 <|endoftext|> \ud7ff ok"


def documents(prepared: Prepared, split: str) -> list[str]:
    """The documents of a split, read back from its tokens."""
    stream, end = prepared.stream(split), prepared.end_of_text
    tokens = stream.read(0, len(stream))
    pieces = np.split(tokens, np.flatnonzero(tokens == end) + 1)
    decode = prepared.tokenizer().decode
    return [decode(piece[:-1].tolist(), skip_special_tokens=False) for piece in pieces if len(piece)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts.jsonl")


@pytest.fixture(scope="module")
def prepared(corpus: Path) -> Prepared:
    return prepare(corpus, corpus.parent / "prepared", vocab_size=600, val_fraction=0.1, test_fraction=0.05)


def test_every_document_comes_back_once(prepared: Prepared) -> None:
    found = [text for split in ("train", "val", "test") for text in documents(prepared, split)]
    assert sorted(found) == sorted(set(sentences(200)))
    assert {name: split.documents for name, split in prepared.splits.items()} == {"train": 170, "val": 20, "test": 10}
    assert prepared.lossless


def test_a_document_keeps_its_split_when_others_come(corpus: Path, prepared: Prepared, tmp_path: Path) -> None:
    more = write_corpus(tmp_path / "more.jsonl", count=20, seed=1)
    again = prepare([corpus, more, corpus], tmp_path / "prepared", vocab_size=600, val_fraction=0.1)
    assert again.splits["train"].documents + again.splits["val"].documents == 220, "repeats are kept once"
    moved = set(documents(prepared, "val")) ^ set(documents(again, "val"))
    assert len(moved & set(documents(prepared, "val"))) <= 2


def test_the_same_texts_give_the_same_data(corpus: Path, prepared: Prepared, tmp_path: Path) -> None:
    again = prepare(corpus, tmp_path / "again", vocab_size=600, val_fraction=0.1, test_fraction=0.05)
    assert [again.digest(split) for split in again.splits] == [prepared.digest(split) for split in prepared.splits]
    other = prepare(corpus, tmp_path / "other", vocab_size=600, val_fraction=0.1, test_fraction=0.05, seed=1)
    assert other.digest("train") != prepared.digest("train")


def test_preparing_again_returns_what_is_there(corpus: Path, prepared: Prepared) -> None:
    before = (prepared.folder / "prepared.json").stat().st_ino
    again = prepare(corpus, prepared.folder, vocab_size=600, val_fraction=0.1, test_fraction=0.05)
    assert again == prepared
    assert (prepared.folder / "prepared.json").stat().st_ino == before


def test_other_arguments_or_texts_are_refused(corpus: Path, prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vocab_size was 600 and is 500.*write another folder"):
        prepare(corpus, prepared.folder, vocab_size=500, val_fraction=0.1, test_fraction=0.05)
    with pytest.raises(DataError, match="other train texts"):
        other = write_corpus(tmp_path / "x.jsonl", count=60)
        prepare(other, prepared.folder, vocab_size=600, val_fraction=0.1, test_fraction=0.05)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("not to be overwritten")
    with pytest.raises(DataError, match="holds no prepared data"):
        prepare(corpus, tmp_path / "full", vocab_size=600)


def test_any_unicode_comes_back() -> None:
    tokenizer = train_tokenizer(sentences(50), vocab_size=400)
    encoder = Encoder(tokenizer, end_token(tokenizer))
    (tokens,) = encoder([ODD])
    assert tokens[-1] == end_token(tokenizer) and (tokens[:-1] != end_token(tokenizer)).all(), "a text can't end itself"
    assert tokenizer.decode(tokens[:-1].tolist(), skip_special_tokens=False) == ODD
    assert not encoder.loses(ODD)


def test_vowel_signs_stay_in_their_words() -> None:
    # GPT-2's pattern cuts Indic words at each vowel sign, and then no token is longer than a syllable.
    tokenizer = train_tokenizer(["தமிழ்மொழி " * 20, "ज्ञाकिता " * 20], vocab_size=400)
    assert len(tokenizer.encode("தமிழ்மொழி தமிழ்மொழி").ids) == 2


def test_a_tokenizer_that_exists(corpus: Path, prepared: Prepared, tmp_path: Path) -> None:
    theirs = prepare(corpus, tmp_path / "theirs", tokenizer=prepared.folder, val_fraction=0)
    assert theirs.vocab_size == prepared.known_tokens
    assert sorted(documents(theirs, "train")) == sorted(set(sentences(200)))
    assert list(theirs.splits) == ["train"]
    with pytest.raises(DataError, match=r"end_of_text='</s>' is not a token .*<\|endoftext\|>"):
        prepare(corpus, tmp_path / "no", tokenizer=prepared.folder, end_of_text="</s>")
    with pytest.raises(DataError, match="leave tokenizer= out to train one"):
        prepare(corpus, tmp_path / "no", tokenizer=tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DataError, match="not a file of the tokenizers library"):
        load_tokenizer(tmp_path / "broken.json")


def test_validation_texts_of_their_own(corpus: Path, tmp_path: Path) -> None:
    val = write_corpus(tmp_path / "val.jsonl", count=7, seed=5)
    made = prepare(corpus, tmp_path / "prepared", vocab_size=400, val_texts=val)
    assert documents(made, "val") == sentences(7, seed=5)
    assert made.splits["train"].documents == 200


def test_windows_meet_across_chunks(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CHUNK_BYTES", 2_000)
    made = prepare(corpus, tmp_path / "prepared", vocab_size=400, val_fraction=0)
    stream = made.stream("train")
    assert len(made.splits["train"].files) > 5
    whole = stream.read(0, len(stream))
    windows = TokenWindows(stream, 50)
    batch = windows.__getitems__(list(range(len(windows))))
    assert batch["input_ids"].shape == batch["labels"].shape == ((len(whole) - 1) // 50, 50)
    assert (batch["input_ids"].flatten().numpy() == whole[: len(windows) * 50]).all()
    assert (batch["labels"].flatten().numpy() == whole[1 : len(windows) * 50 + 1]).all()
    assert windows[3]["labels"].equal(batch["labels"][3])


def test_litdata_reads_the_chunks(prepared: Prepared) -> None:
    theirs = StreamingDataset(str(prepared.folder / "train"), item_loader=LitTokensLoader(block_size=32))
    stream = prepared.stream("train")
    assert all((theirs[i] == stream.read(32 * i, 32 * i + 32)).all() for i in (0, 5, len(theirs) - 1))


def test_a_book_is_read_in_passages(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    paragraph = "a line of prose\r\nand another\r\n\r\n"
    book.write_bytes((paragraph * 6_000).encode() + "अ ब ".encode() * (3 * PASSAGE))  # the last line is long
    passages = list(Corpus(book))
    assert "".join(passages) == book.read_bytes().decode()
    assert all(passage.endswith("\r\n\r\n") for passage in passages[:2])
    assert max(map(len, passages)) < 6 * PASSAGE
    assert prepare(book, tmp_path / "prepared", vocab_size=300).splits["val"].documents == 1


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", b'{"text": "x"}\n{"txt": 1}\n', 'line 2: write {"text"'),
        ("a.jsonl", b"{", "line 1 is not JSON"),
        ("a.jsonl", b'"\\ud800"', "half of a surrogate pair"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.txt", b"", "are empty"),
        ("a.txt", b"one short text", "1 different documents, too few to set 1 aside"),
        ("a.csv", b"x", "ends in .txt or .jsonl"),
    ],
)
def test_texts_that_cannot_be_used(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        prepare(tmp_path / name, tmp_path / "prepared", vocab_size=300)
    assert words in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name], "nothing is left behind"


def test_paths_and_numbers_that_cannot_be_used(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; write the path of a .txt"):
        prepare(tmp_path / "missing", tmp_path / "prepared")
    with pytest.raises(DataError, match="no .txt or .jsonl file is in this folder"):
        prepare(tmp_path, tmp_path / "prepared")
    with pytest.raises(DataError, match="vocab_size=100: write 257"):
        prepare(corpus, tmp_path / "prepared", vocab_size=100)
    with pytest.raises(DataError, match=r"val_fraction=5: write a fraction"):
        prepare(corpus, tmp_path / "prepared", val_fraction=5)
    with pytest.raises(DataError, match="does not exist; write `bharat data prepare"):
        Prepared.open(tmp_path / "prepared")


@pytest.fixture
def copy(corpus: Path, tmp_path: Path) -> Prepared:
    return prepare(corpus, tmp_path / "copy", vocab_size=400)


def test_damage_is_named(copy: Prepared) -> None:
    chunk = next((copy.folder / "train").glob("*.bin"))
    whole = chunk.read_bytes()
    copy.check()
    chunk.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    copy.stream("train")
    with pytest.raises(DataError, match=r"chunk-0-0.bin is not as it was written"):
        copy.check()
    chunk.write_bytes(whole[:-10])
    with pytest.raises(DataError, match=f"{len(whole) - 10} bytes instead of {len(whole)}"):
        copy.stream("train")
    chunk.unlink()
    with pytest.raises(DataError, match="it is missing"):
        copy.stream("train")


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        '{"chunks": 3}',
        '{"chunks": [{}]}',
        '{"chunks": [{"filename": "../../x.bin", "chunk_size": 1, "dim": 1, "chunk_bytes": 14}]}',
        '{"chunks": [{"filename": "x.bin", "chunk_size": 1, "dim": 5, "chunk_bytes": 14}]}',
        '{"chunks": []}',
    ],
)
def test_a_damaged_index_is_named(copy: Prepared, index: str) -> None:
    (copy.folder / "train" / "index.json").write_text(index)
    with pytest.raises(DataError, match=r"index.json is damaged|holds 0 tokens instead of"):
        copy.stream("train")


@pytest.mark.parametrize("change", [{"format": 99}, {"splits": 3}, {"dtype": "no"}, {"more": 1}])
def test_a_damaged_manifest_is_named(copy: Prepared, change: dict) -> None:
    file = copy.folder / "prepared.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError, match="prepare the data again"):
        Prepared.open(copy.folder)
