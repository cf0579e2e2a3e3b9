"""Documents one by one out of packed chunks, and windows by the file in which they begin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_bharat.data import IGNORED, DataError, Prepared, TokenDocuments, TokenWindows, prepare
from lightning_bharat.data import pack as packing
from tests.data.texts import sentences, write_corpus

END = 0


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("documents")
    corpus = write_corpus(folder / "texts.jsonl", count=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "CHUNK_BYTES", 2_000)
        return prepare(corpus, folder / "prepared", vocab_size=400, val_fraction=0)


@pytest.mark.parametrize("length", [16, 50, 10_000])
def test_every_document_is_read_alone_and_whole(prepared: Prepared, length: int) -> None:
    stream = prepared.stream("train")
    documents = TokenDocuments(stream, length, END)
    assert len(stream.documents()) == 61 and documents.lengths.max() == min(
        length, np.diff(stream.documents()).max() - 1
    )
    tokenizer, text, texts = prepared.tokenizer(), [], []
    for index, size in enumerate(documents.lengths):
        sample = documents[index]
        inputs, labels = sample["input_ids"], sample["labels"]
        assert inputs[1:size].equal(labels[: size - 1])
        assert (labels[size:] == IGNORED).all() and (inputs[size:] == END).all() and END not in inputs[:size]
        text += [*inputs[:size].tolist()]
        if labels[size - 1] == END:
            texts.append(tokenizer.decode(text))
            text = []
    assert sorted(texts) == sorted(sentences(60))


def test_a_batch_is_as_wide_as_its_longest(prepared: Prepared) -> None:
    documents = TokenDocuments(prepared.stream("train"), 50, END)
    short = np.argsort(documents.lengths)[:3].tolist()
    batch = documents.__getitems__(short)
    widest = int(documents.lengths[short].max())
    assert batch["input_ids"].shape == batch["labels"].shape == (3, -(-widest // 8) * 8)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert (batch["labels"] != IGNORED).sum() == documents.lengths[short].sum()


def test_windows_of_each_file(prepared: Prepared) -> None:
    windows = TokenWindows(prepared.stream("train"), 50)
    ends = np.cumsum(windows.stream.files())
    begins = np.arange(len(windows)) * 50
    assert (
        len(ends) > 3
        and windows.files().tolist()
        == np.bincount(np.searchsorted(ends, begins, side="right"), minlength=len(ends)).tolist()
    )


@pytest.mark.parametrize("place, value", [(0, 7), (1, 3), (-1, 5)])
def test_a_damaged_header_is_named(prepared: Prepared, place: int, value: int) -> None:
    stream = prepared.stream("train")
    chunk, header, _ = stream._files[0]
    numbers = np.memmap(chunk, np.uint32, mode="r+", shape=(header // 4,))
    before = numbers[place]
    numbers[place] = value
    numbers.flush()
    try:
        with pytest.raises(DataError, match="does not say where documents begin"):
            TokenDocuments(stream, 50, END)
    finally:
        numbers[place] = before
        numbers.flush()
