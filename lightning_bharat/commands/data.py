"""What `bharat data ...` runs: fetch, prepare, show."""

from __future__ import annotations

from pathlib import Path

from lightning_bharat.commands.table import table
from lightning_bharat.data.fetch import Fetched, fetch_corpus
from lightning_bharat.data.languages import LANGUAGES
from lightning_bharat.data.pack import prepare as pack
from lightning_bharat.data.prepared import Prepared
from lightning_bharat.data.windows import TokenWindows


def fetch(folder: Path, *, packages: bool = True) -> None:
    """Fetch real text in English and, on Debian and Ubuntu, in Indian languages.

    English is the Python documentation that comes with every interpreter. The other languages are help pages of GNOME
    and LibreOffice, from Debian packages that are downloaded and unpacked, not installed, without being root. The text
    stands under the licences in FOLDER/licences.

    Example:
        bharat data fetch corpus

    Args:
        folder: to make: one LANGUAGE.jsonl with a page a line, licences, and a report.
        packages: also read Debian's packages; without them there is English only, and no network is used.
    """
    print(_fetched(folder, fetch_corpus(folder, packages)))


def _fetched(folder: Path, report: Fetched) -> str:
    rows = [
        [LANGUAGES[code].name, f"{report.bytes(code) / 1000:,.0f}", ", ".join(sources), f"{folder / code}.jsonl"]
        for code, sources in sorted(report.languages.items(), key=lambda item: -report.bytes(item[0]))
    ]
    lines = [table(["language", "kB", "from", "file"], rows)]
    lines += [f"not fetched: {words}" for words in report.missing]
    return "\n".join([*lines, f"licences: {folder / 'licences'}"])


def prepare(
    texts: str,
    folder: Path,
    *,
    val_texts: str | None = None,
    test_texts: str | None = None,
    tokenizer: str | None = None,
    end_of_text: str | None = None,
    vocab_size: int = 8192,
    val_fraction: float = 0.05,
    test_fraction: float = 0.0,
    seed: int = 0,
) -> None:
    """Tokenize text and pack it for training.

    FOLDER appears whole or not at all. Preparing again what is there already takes no time.

    Example:
        bharat data prepare corpus prepared --vocab_size 4096

    Args:
        texts: a .txt or .jsonl file ({"text": ...} a line), or a folder of them.
        folder: to make; give it to TokenDataModule.
        val_texts: texts of their own for validation, instead of a fraction of the documents.
        test_texts: texts of their own for testing, instead of a fraction of the documents.
        tokenizer: a tokenizer.json or a folder with one; by default one is trained on the texts.
        end_of_text: the token behind each document, where the tokenizer's has an unusual name.
        vocab_size: of the tokenizer that is trained.
        val_fraction: of the documents, set aside for validation; 0 for none.
        test_fraction: of the documents, set aside for testing; 0 for none.
        seed: of the split.
    """
    prepared = pack(
        texts,
        folder,
        val_texts=val_texts,
        test_texts=test_texts,
        tokenizer=tokenizer,
        end_of_text=end_of_text,
        vocab_size=vocab_size,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        seed=seed,
    )
    print(describe(prepared))


def show(folder: Path, *, sequence_length: int = 256, check: bool = False) -> None:
    """Print what a folder of prepared data holds.

    Example:
        bharat data show prepared

    Args:
        folder: of prepared data.
        sequence_length: tokens of a sequence, to count them.
        check: read every file and compare it with its digest.
    """
    prepared = Prepared.open(folder)
    if check:
        prepared.check()
    print(describe(prepared, sequence_length))
    if check:
        print("every file is as it was written")


def describe(prepared: Prepared, sequence_length: int = 256) -> str:
    """A table of the splits, the vocabulary, and how the training text begins."""
    rows = [
        [
            name,
            f"{split.documents:,}",
            f"{split.tokens:,}",
            f"{split.bytes / max(1, split.tokens):.2f}",
            f"{len(TokenWindows(prepared.stream(name), sequence_length)):,}",
        ]
        for name, split in prepared.splits.items()
    ]
    head = ["split", "documents", "tokens", "bytes/token", f"sequences of {sequence_length}"]
    beginning = prepared.stream("train").read(0, min(24, prepared.splits["train"].tokens)).tolist()
    text = prepared.tokenizer().decode(beginning, skip_special_tokens=False)
    back = "comes back from tokens exactly" if prepared.lossless else "does NOT come back from tokens exactly"
    return "\n".join(
        [
            table(head, rows),
            f"vocab_size {prepared.vocab_size} ({prepared.known_tokens} tokens known), end of text is token "
            f"{prepared.end_of_text}, {prepared.dtype} on disk; text {back}",
            f"begins: {text!r} ({len(beginning)} tokens)",
        ]
    )
