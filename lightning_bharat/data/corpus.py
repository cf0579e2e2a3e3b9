"""Documents out of text files: ``.txt`` in passages, ``.jsonl`` line by line, folders of both."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import xxhash

from lightning_bharat.data.errors import DataError

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
SUFFIXES = (".txt", ".jsonl")
PASSAGE = 64_000  # characters after which a .txt file is cut at the next paragraph's end
LONGEST_PASSAGE = 4 * PASSAGE  # ... and at the latest here


class Corpus:
    """The documents of text files, in a fixed order.

    A line of a ``.jsonl`` file is a document: ``{"text": "..."}`` or a string. A ``.txt`` file is read in passages of
    about 64,000 characters, cut at a paragraph's end; each is a document, so that a long book can be split. Text is
    UTF-8 and kept as it is, line ends too. Of a folder, the ``.txt`` and ``.jsonl`` files directly in it are read.

    Args:
        texts: a file, a folder, or several.

    Raises:
        DataError: a path does not exist or no text file is there; and, while reading, a line that is not as described.
    """

    def __init__(self, texts: Paths) -> None:
        given = [texts] if isinstance(texts, (str, os.PathLike)) else list(texts)
        self.files = [file for path in given for file in _text_files(Path(path))]
        if not self.files:
            raise DataError(f"texts={texts!r}: no path given; write a .txt or .jsonl file or a folder of them")

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            yield from (text for text in _documents(file) if text)

    def digest(self) -> str:
        """XXH3 of all files' bytes, in order: 32 hexadecimal digits."""
        digest = xxhash.xxh3_128()
        for file in self.files:
            with file.open("rb") as stream:
                while piece := stream.read(1 << 22):
                    digest.update(piece)
            digest.update(b"\0")
        return digest.hexdigest()


def _text_files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
        if not found:
            raise DataError(f"texts={str(path)!r}: no .txt or .jsonl file is in this folder")
        return found
    if not path.is_file():
        raise DataError(
            f"texts={str(path)!r} does not exist; write the path of a .txt or .jsonl file or of a folder of them, "
            "or get some text with `bharat data fetch DIR`"
        )
    if path.suffix not in SUFFIXES:
        raise DataError(f"texts={str(path)!r}: a text file ends in .txt or .jsonl; rename it or convert it")
    return [path]


def _documents(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            yield from _lines(stream, file) if file.suffix == ".jsonl" else _passages(stream)
    except UnicodeDecodeError as error:
        raise _not_text(file, error) from error


def _lines(stream: TextIO, file: Path) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield document_of_line(line, file, number)


def document_of_line(line: str, file: Path, number: int) -> str:
    """The document on a line of a ``.jsonl`` file.

    Raises:
        DataError: names the file and the line.
    """
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{file}, line {number} is not JSON ({error})") from error
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise DataError(f'{file}, line {number}: write {{"text": "the document"}} or a string in quotes')
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError(f"{file}, line {number} holds half of a surrogate pair, which is no Unicode text")
    return text


def pieces(file: Path) -> Iterator[tuple[str, int]]:
    """A file's text in pieces, each with the number of its first line: lines of a ``.jsonl``, passages of a ``.txt``.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            if file.suffix == ".jsonl":
                yield from ((line, number) for number, line in enumerate(stream, start=1))
                return
            number = 1
            for passage in _passages(stream):
                yield passage, number
                number += passage.count("\n")
    except UnicodeDecodeError as error:
        raise _not_text(file, error) from error


def _not_text(file: Path, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8")


def _passages(stream: TextIO) -> Iterator[str]:
    lines: list[str] = []
    length = 0
    while line := stream.readline(LONGEST_PASSAGE):
        lines.append(line)
        length += len(line)
        if (length >= PASSAGE and not line.strip()) or length >= LONGEST_PASSAGE:
            yield "".join(lines)
            lines, length = [], 0
    yield "".join(lines)
