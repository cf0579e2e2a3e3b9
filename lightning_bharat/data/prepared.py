"""A folder of prepared data: what is in it, and whether it is what was written."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from tokenizers import Tokenizer

from lightning_bharat.data.errors import DataError
from lightning_bharat.data.tokenizer import load_tokenizer
from lightning_bharat.data.windows import TokenStream

MANIFEST = "prepared.json"
FORMAT = 1
SPLITS = ("train", "val", "test")


@dataclass
class Split:
    """One part of the data: counts, and the digest of each of its files by name."""

    documents: int
    characters: int
    bytes: int
    tokens: int
    files: dict[str, str] = field(default_factory=dict)


@dataclass
class Prepared:
    """Packed tokens on disk.

    Attributes:
        folder: where they are; ``train``, ``val`` and ``test`` in it are folders of litdata chunks.
        vocab_size: token numbers are below it; the size to give a model's embedding.
        known_tokens: tokens of the tokenizer; less than ``vocab_size`` where there was little text to learn from.
        end_of_text: number of the token behind each document.
        dtype: of a token on disk.
        lossless: texts come back from tokens exactly as they were (on a sample).
        splits: by name.
        recipe: arguments and digests of the sources; equal recipes give equal data.
    """

    folder: Path
    vocab_size: int
    known_tokens: int
    end_of_text: int
    dtype: str
    lossless: bool
    splits: dict[str, Split]
    recipe: dict[str, Any]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Prepared:
        """Read a folder's manifest.

        Raises:
            DataError: the folder or its manifest is missing or damaged.
        """
        folder = Path(folder)
        file = folder / MANIFEST
        if not file.is_file():
            state = "holds no prepared data" if folder.is_dir() else "does not exist"
            raise DataError(
                f"folder={str(folder)!r} {state}; write `bharat data prepare TEXTS {folder}` first, or give the "
                "datamodule texts= to prepare it"
            )
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            if stored.pop("format") != FORMAT:
                raise DataError(f"{file} was written by another version of lightning-bharat; prepare the data again")
            splits = {name: Split(**split) for name, split in stored.pop("splits").items()}
            np.dtype(stored["dtype"])
            return cls(folder=folder, splits=splits, **stored)
        except DataError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{file} is damaged ({error}); remove {folder} and prepare the data again") from error

    def write(self, folder: Path) -> None:
        """Write the manifest into ``folder``."""
        stored = {key: value for key, value in asdict(self).items() if key != "folder"}
        text = json.dumps({"format": FORMAT, **stored}, indent=1, ensure_ascii=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        return load_tokenizer(self.folder / "tokenizer.json")

    def stream(self, split: str) -> TokenStream:
        """The tokens of ``"train"``, ``"val"`` or ``"test"``.

        Raises:
            DataError: there is no such split, or its files are missing or have another size.
        """
        if split not in self.splits:
            raise DataError(
                f"{self.folder} holds no {split!r} data, only {', '.join(self.splits)}; "
                f"prepare it again with {split}_fraction= or {split}_texts="
            )
        stream = TokenStream(self.folder / split, np.dtype(self.dtype))
        if len(stream) != self.splits[split].tokens:
            raise DataError(
                f"{self.folder / split} holds {len(stream)} tokens instead of {self.splits[split].tokens}; "
                f"remove {self.folder} and prepare the data again"
            )
        return stream

    def digest(self, split: str) -> str:
        """Names a split's content: the same tokens in the same order have the same digest."""
        files = self.splits[split].files
        chunks = "".join(digest for name, digest in files.items() if name != "index.json")
        return xxhash.xxh3_64_hexdigest(chunks.encode())

    def check(self) -> None:
        """Read every file and compare it with its digest: a second for some gigabytes.

        Raises:
            DataError: names the first file that is not as it was written.
        """
        for name, split in self.splits.items():
            for file, digest in split.files.items():
                path = self.folder / name / file
                if not path.is_file() or file_digest(path) != digest:
                    raise DataError(
                        f"{path} is not as it was written (its digest differs); "
                        f"remove {self.folder} and prepare the data again"
                    )


def file_digest(path: Path) -> str:
    """XXH3 of a file's bytes: 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
