"""Where each document of text files lies, so that any one can be read when its turn comes."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import xxhash

from lightning_bharat.data.corpus import Corpus, Paths, document_of_line, pieces
from lightning_bharat.data.errors import DataError


class Documents:
    """The documents of :class:`Corpus`, by number; 24 bytes of memory for each.

    All files are read through once, which takes about a second for 100 MB, and is nothing beside tokenizing them.
    Documents that are empty are kept, and have no text.

    Args:
        texts: ``.txt`` and ``.jsonl`` files or folders of them.

    Attributes:
        digest: of all text.

    Raises:
        DataError: a path does not exist, a file is not UTF-8, or there is no text at all.
    """

    def __init__(self, texts: Paths) -> None:
        self.files = Corpus(texts).files
        digest, places = xxhash.xxh3_64(), []
        self._sizes = []
        for number, file in enumerate(self.files):
            start = 0
            for text, line in pieces(file):
                encoded = text.encode()
                digest.update(encoded)
                if text.strip() if file.suffix == ".jsonl" else text:
                    places.append((start, len(encoded), line, number))
                start += len(encoded)
            self._sizes.append(start)
            digest.update(b"\0")
        if not places:
            raise DataError(f"the texts {', '.join(map(str, self.files))} are empty; give some text")
        self._starts, sizes, lines, of = (np.array(column, dtype=np.int64) for column in zip(*places, strict=True))
        self._lengths, self._lines, self._of = sizes, lines.astype(np.int32), of.astype(np.int32)
        self.digest = digest.hexdigest()
        self._open: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> str:
        """The text of a document.

        Raises:
            DataError: names the file and the line that can't be used.
        """
        number, size = int(self._of[index]), int(self._lengths[index])
        file = self.files[number]
        # Read by its place: a descriptor that forked processes share has one position for all.
        encoded = os.pread(self._descriptor(number), size, int(self._starts[index]))
        try:
            text = encoded.decode()
        except UnicodeDecodeError as error:
            raise self._changed(number) from error
        if len(encoded) < size:
            raise self._changed(number)
        return document_of_line(text, file, int(self._lines[index])) if file.suffix == ".jsonl" else text

    def _descriptor(self, number: int) -> int:
        if number not in self._open:
            self._open[number] = os.open(self.files[number], os.O_RDONLY | os.O_CLOEXEC)
            if os.fstat(self._open[number]).st_size != self._sizes[number]:
                raise self._changed(number)
        return self._open[number]

    def _changed(self, number: int) -> DataError:
        return DataError(f"{self.files[number]} has changed since training began; leave the texts alone while it reads")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # another process opens the files itself

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)
