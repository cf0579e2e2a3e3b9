"""Text to prepared data: split by content, tokenized, packed into litdata chunks; whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from tokenizers import Tokenizer

from lightning_bharat.data.corpus import Corpus, Paths
from lightning_bharat.data.errors import DataError
from lightning_bharat.data.folder import whole_or_nothing
from lightning_bharat.data.prepared import SPLITS, Prepared, Split, file_digest
from lightning_bharat.data.tokenizer import Encoder, end_token, load_tokenizer, train_tokenizer

CHUNK_BYTES = 64_000_000
BATCH_CHARACTERS = 1_000_000  # encoded at a time, on all cores
LEARNED_CHARACTERS = 200_000_000  # of which a tokenizer is trained; more text is thinned out evenly
LEFT_OUT = len(SPLITS)


def prepare(
    texts: Paths,
    folder: str | os.PathLike[str],
    *,
    val_texts: Paths | None = None,
    test_texts: Paths | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    end_of_text: str | None = None,
    vocab_size: int = 8192,
    val_fraction: float = 0.05,
    test_fraction: float = 0.0,
    seed: int = 0,
) -> Prepared:
    """Tokenize and pack texts into ``folder``, which appears whole or not at all.

    A document goes to train, val or test by a hash of its text, so that the same document is never in two of them;
    repeated documents are kept once. Everything is a function of the arguments and the texts: where ``folder`` already
    holds the result, it is returned at once.

    Args:
        texts: ``.txt`` and ``.jsonl`` files or folders of them; see :class:`Corpus`.
        folder: to make.
        val_texts: texts of their own for validation, instead of a fraction.
        test_texts: texts of their own for testing, instead of a fraction.
        tokenizer: a ``tokenizer.json`` or a folder with one; ``None`` trains one on the training documents.
        end_of_text: the token behind each document, where the tokenizer's is not one of the usual names.
        vocab_size: of a tokenizer that is trained.
        val_fraction: of the documents, at least one; 0 for none.
        test_fraction: the same.
        seed: of the split.

    Raises:
        DataError: no text, too little to split, or ``folder`` holds something else.
    """
    folder = Path(folder)
    corpora = {"train": Corpus(texts)}
    corpora |= {name: Corpus(own) for name, own in (("val", val_texts), ("test", test_texts)) if own is not None}
    fractions = {
        "val": 0.0 if "val" in corpora else _fraction("val_fraction", val_fraction),
        "test": 0.0 if "test" in corpora else _fraction("test_fraction", test_fraction),
    }
    recipe = _recipe(corpora, fractions, tokenizer, end_of_text, vocab_size, seed)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return _same(folder, recipe)
    try:
        with whole_or_nothing(folder) as unfinished:
            assigned = _assign(corpora["train"], fractions, seed)
            made = _tokenizer(corpora["train"], assigned, tokenizer, vocab_size)
            encoder = Encoder(made, end_token(made, end_of_text))
            made.save(str(unfinished / "tokenizer.json"))
            splits = _write(unfinished, corpora, assigned, encoder)
            prepared = Prepared(
                folder=folder,
                vocab_size=encoder.size if tokenizer is not None else vocab_size,
                known_tokens=encoder.size,
                end_of_text=end_token(made, end_of_text),
                dtype=encoder.dtype.name,
                lossless=not any(encoder.loses(text) for text in _first(corpora["train"], 20)),
                splits=splits,
                recipe=recipe,
            )
            _copy_licences(corpora.values(), unfinished)
            prepared.write(unfinished)
    except FileExistsError:
        return _same(folder, recipe)  # another node's process was first
    return prepared


def _fraction(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise DataError(f"{name}={value}: write a fraction of the documents from 0 to below 1, such as 0.05")
    return value


def _recipe(
    corpora: dict[str, Corpus],
    fractions: dict[str, float],
    tokenizer: str | os.PathLike[str] | None,
    end_of_text: str | None,
    vocab_size: int,
    seed: int,
) -> dict[str, Any]:
    recipe: dict[str, Any] = {f"{name} texts": corpus.digest() for name, corpus in corpora.items()}
    recipe |= {f"{name}_fraction": value for name, value in fractions.items() if value}
    recipe |= {"seed": seed} if any(fractions.values()) else {}
    if tokenizer is None:
        return recipe | {"vocab_size": vocab_size}
    path = Path(tokenizer)
    file = path / "tokenizer.json" if path.is_dir() else path
    load_tokenizer(file)  # refuses in words what is missing
    return recipe | {"tokenizer": file_digest(file), "end_of_text": end_of_text}


def _same(folder: Path, recipe: dict[str, Any]) -> Prepared:
    there = Prepared.open(folder)
    differ = sorted(key for key in recipe.keys() | there.recipe.keys() if recipe.get(key) != there.recipe.get(key))
    if differ:
        raise DataError(
            f"folder={str(folder)!r} was prepared otherwise ({_differences(differ, recipe, there.recipe)}); "
            "write another folder, or remove this one to prepare it anew"
        )
    return there


def _differences(keys: list[str], mine: dict[str, Any], its: dict[str, Any]) -> str:
    def words(key: str) -> str:
        if key.endswith("texts") or key == "tokenizer":
            return f"other {key}" if key in mine and key in its else f"{key} {'not ' if key in mine else ''}used"
        return f"{key} was {its.get(key)!r} and is {mine.get(key)!r}"

    return ", ".join(words(key) for key in keys)


def _assign(corpus: Corpus, fractions: dict[str, float], seed: int) -> np.ndarray:
    """For each document the number of its split in SPLITS, or LEFT_OUT where it repeats another: uint8."""
    hashes = np.fromiter((_hash(text, seed) for text in corpus), dtype=np.uint64)
    values, firsts = np.unique(hashes, return_index=True)
    counts = {name: max(1, round(len(values) * share)) if share else 0 for name, share in fractions.items()}
    if len(values) <= sum(counts.values()):
        if not len(values):
            raise DataError(f"the texts {', '.join(map(str, corpus.files))} are empty; give some text")
        raise DataError(
            f"the texts hold {len(values)} different documents, too few to set {sum(counts.values())} aside; "
            "write val_fraction=0 and test_fraction=0, give val_texts=, or cut the text into more documents "
            "(a line of a .jsonl file each)"
        )
    assigned = np.full(len(hashes), LEFT_OUT, dtype=np.uint8)
    assigned[firsts] = SPLITS.index("train")
    assigned[firsts[: counts["val"]]] = SPLITS.index("val")  # the smallest hashes: np.unique sorts
    assigned[firsts[counts["val"] : counts["val"] + counts["test"]]] = SPLITS.index("test")
    return assigned


def _hash(text: str, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(text.encode(), seed=seed % (1 << 64))


def _tokenizer(corpus: Corpus, assigned: np.ndarray, path: str | os.PathLike[str] | None, vocab_size: int) -> Tokenizer:
    if path is not None:
        return load_tokenizer(path)
    total = sum(len(text) for text in _of_split(corpus, assigned, "train"))
    every = -(-total // LEARNED_CHARACTERS)
    learned = (text for number, text in enumerate(_of_split(corpus, assigned, "train")) if number % every == 0)
    return train_tokenizer(learned, vocab_size)


def _of_split(corpus: Corpus, assigned: np.ndarray, split: str) -> Iterator[str]:
    number = SPLITS.index(split)
    return (text for text, its in zip(corpus, assigned, strict=True) if its == number)


def _write(folder: Path, corpora: dict[str, Corpus], assigned: np.ndarray, encoder: Encoder) -> dict[str, Split]:
    written = {}
    for name in SPLITS:
        if name in corpora and name != "train":
            documents: Iterable[str] = corpora[name]
        elif SPLITS.index(name) in assigned:
            documents = _of_split(corpora["train"], assigned, name)
        else:
            continue
        written[name] = _write_split(folder / name, documents, encoder)
        if not written[name].documents:
            raise DataError(f"{name}_texts: {', '.join(map(str, corpora[name].files))} are empty; give some text")
    return written


def _write_split(folder: Path, documents: Iterable[str], encoder: Encoder) -> Split:
    from litdata import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    # The writer itself, in this process: `litdata.optimize` starts processes that import the user's script again.
    writer = BinaryWriter(str(folder), chunk_bytes=CHUNK_BYTES, item_loader=TokensLoader())
    split = Split(0, 0, 0, 0)
    for batch in _batches(documents):
        for text, tokens in zip(batch, encoder(batch), strict=True):
            writer.add_item(split.documents, tokens)
            split.documents += 1
            split.characters += len(text)
            split.bytes += len(text.encode())
            split.tokens += len(tokens)
    if split.documents:
        writer.done()
        # Not writer.merge(): it waits for an index of every rank of the process group, and one rank prepares.
        (folder / f"{writer.rank}.index.json").rename(folder / "index.json")
        split.files = {file.name: file_digest(file) for file in sorted(folder.iterdir(), key=_chunk_number)}
    return split


def _chunk_number(file: Path) -> tuple[int, str]:
    number = file.stem.rpartition("-")[2]
    return (int(number) if number.isdigit() else -1, file.name)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _first(corpus: Corpus, count: int) -> list[str]:
    return [text for text, _ in zip(corpus, range(count), strict=False)]


def _copy_licences(corpora: Iterable[Corpus], folder: Path) -> None:
    for corpus in corpora:
        for licences in {file.parent / "licences" for file in corpus.files}:
            if licences.is_dir():
                shutil.copytree(licences, folder / "licences", dirs_exist_ok=True, symlinks=True)
