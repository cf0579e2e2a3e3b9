"""Tokenizers of the ``tokenizers`` library: byte-level BPE trained on any script, or one that exists."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from lightning_bharat.data.errors import DataError

END_OF_TEXT = "<|endoftext|>"
# Names of the same token in well-known tokenizers, from the most to the least certain.
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>", "[SEP]")

# Words are cut as in GPT-4o's o200k, where a vowel sign (\p{M}) and the joiners of Indic scripts belong to the word.
# GPT-2's pattern cuts at each sign: Tamil then takes 1.75 times and Marathi 1.4 times the tokens.
WORDS = (
    r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}\x{200C}\x{200D}]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMALLEST_VOCABULARY = 257  # all bytes and the end of text


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE: every Unicode text comes back unchanged, in every script.

    The same documents give the same tokenizer.

    Args:
        documents: texts to learn from.
        vocab_size: number of tokens at most, with 256 bytes and the end of text; little text gives fewer.

    Raises:
        DataError: ``vocab_size`` is below 257.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(f"vocab_size={vocab_size}: write {SMALLEST_VOCABULARY} (256 bytes, end of text) or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(END_OF_TEXT, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a ``tokenizer.json``, or the one in a folder such as a Hugging Face model's.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    file = Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise DataError(
            f"tokenizer={str(path)!r}: {file} does not exist; write the path of a tokenizer.json, "
            "or leave tokenizer= out to train one on the texts"
        )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"tokenizer={str(path)!r}: {file} is not a file of the tokenizers library ({error})") from error


def end_token(tokenizer: Tokenizer, name: str | None = None) -> int:
    """Number of the token that stands behind each document.

    Args:
        tokenizer: to look in.
        name: the token's text; ``None`` tries the usual ones.

    Raises:
        DataError: the tokenizer has no such token; the message lists the special ones it has.
    """
    for candidate in (name,) if name is not None else END_NAMES:
        number = tokenizer.token_to_id(candidate)
        if number is not None:
            return number
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    asked = f"end_of_text={name!r} is not a token" if name is not None else "none of the usual names of it is a token"
    raise DataError(
        f"documents are joined by an end-of-text token, and {asked} of this tokenizer; "
        f"write end_of_text= with one of its special tokens: {', '.join(special[:20]) or 'it has none'}"
    )


class Encoder:
    """Documents to token numbers.

    Text that looks like a special token is encoded as the text that it is: a document cannot end itself, or open a
    system message.

    Args:
        tokenizer: to encode with.
        end: number of the token put behind each document.
    """

    def __init__(self, tokenizer: Tokenizer, end: int) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())  # settings below must not reach the caller's
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._end = end
        self.size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.dtype = np.dtype(np.uint16 if self.size <= 1 << 16 else np.int32)

    def __call__(self, documents: list[str]) -> list[np.ndarray]:
        """One array of token numbers for each document, the end of text last; on all cores."""
        encoded = self._tokenizer.encode_batch_fast(documents, add_special_tokens=False)
        return [np.array([*tokens.ids, self._end], dtype=self.dtype) for tokens in encoded]

    def loses(self, document: str) -> bool:
        """Whether this text does not come back as it was."""
        ids = self._tokenizer.encode(document, add_special_tokens=False).ids
        return self._tokenizer.decode(ids, skip_special_tokens=False) != document
