"""Language models from text files, without preparing them: tokenized while training goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import EVAL_DATALOADERS

from lightning_bharat.data.errors import DataError
from lightning_bharat.data.prepared import file_digest
from lightning_bharat.data.text_documents import Documents
from lightning_bharat.data.text_loader import TextLoader
from lightning_bharat.data.text_stream import Augment, TextStream
from lightning_bharat.data.tokenizer import Encoder, end_token, load_tokenizer
from lightning_bharat.datamodules.in_step import data_rank, in_step
from lightning_bharat.datamodules.tokens import vocabulary_of


class TextDataModule(L.LightningDataModule):
    """Sequences of tokens from ``.txt`` and ``.jsonl`` files, read, tokenized, packed and augmented beside training.

    Batches are those of :class:`~lightning_bharat.datamodules.TokenDataModule`, which is the better choice where text
    is read more than once: it tokenizes once, shuffles all sequences, and knows how many there are.

    **Stages.** One process beside training reads, tokenizes (``num_workers`` threads), packs, augments and batches;
    each stage works while the others do, and at most a few items ahead of the next.

    **Layouts.** Documents come in an order that depends on the seed and the epoch alone, packed one behind another with
    an end-of-text token between; sequences are shuffled within blocks of 262,144 tokens. The data ranks' batches of a
    step, one behind another, are those of one process. Each rank tokenizes all text for that.

    **Resume.** A run goes on with exactly the sequences that are left, on any number of data ranks, as with
    ``TokenDataModule``; it begins to read at the document where the block of these sequences begins.

    **The end of an epoch.** In training the rest that does not fill a step is left out; in validation the last batch is
    smaller. The length of an epoch is not known before its end.

    Args:
        texts: ``.txt`` and ``.jsonl`` files or folders of them.
        tokenizer: a ``tokenizer.json`` or a folder with one.
        val_texts: for validation.
        end_of_text: the token behind each document, where the tokenizer's has an unusual name.
        sequence_length: T, tokens of a sequence.
        batch_size: B, sequences a step of each data rank.
        eval_batch_size: the same outside training; ``None`` takes ``batch_size``.
        augment: called as ``augment(sequence, generator)`` for each training sequence, ``{"input_ids": (T,), "labels":
            (T,)}``, and returns what takes its place. ``generator`` is seeded by seed, epoch and the sequence's number
            in it; with random numbers of it alone the result is the same on every layout, and after a resume.
        shuffle: documents and sequences, anew in each epoch.
        seed: of the order and of ``augment``.
        num_workers: threads that tokenize; 0: all stages run one after another between steps, without a process.

    Raises:
        DataError: a path is missing, a line is not as described, there is too little text, or the model's vocabulary is
            smaller than the tokenizer's. The message names the file and the line, or says what to write.

    Example:
        >>> data = TextDataModule("corpus", "tokenizer.json", sequence_length=128, batch_size=16)
    """

    def __init__(
        self,
        texts: str | list[str],
        tokenizer: str,
        *,
        val_texts: str | list[str] | None = None,
        end_of_text: str | None = None,
        sequence_length: int = 256,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        augment: Augment | None = None,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 1,
    ) -> None:
        super().__init__()
        if num_workers < 0:
            raise DataError(f"num_workers={num_workers}: write 0 or the number of threads that tokenize")
        self.texts, self.val_texts = texts, val_texts
        self.tokenizer, self.end_of_text = tokenizer, end_of_text
        self.sequence_length, self.batch_size, self.eval_batch_size = sequence_length, batch_size, eval_batch_size
        self.augment, self.shuffle, self.seed, self.num_workers = augment, shuffle, seed, num_workers
        self._documents: dict[str, Documents] = {}
        self._train: TextLoader | None = None
        self._resume: dict[str, Any] | None = None

    @property
    def vocab_size(self) -> int:
        """Size to give a model's embedding."""
        return self._encoder().size

    def setup(self, stage: str) -> None:
        """Find the documents, on every rank, and refuse a model that has no room for the tokenizer's tokens."""
        self._refuse_smaller_model()
        if stage == "fit":
            self._train = self._resume = None
            self._documents = {"train": Documents(self.texts)}
        if self.val_texts is not None and stage in ("fit", "validate"):
            self._documents["val"] = Documents(self.val_texts)

    def train_dataloader(self) -> TextLoader:
        """This data rank's share of the training sequences, with its position."""
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0  # the same batches again and again
        self._train = self._loader(
            "train", self.batch_size, augment=self.augment, shuffle=self.shuffle and not overfit, drop_last=True
        )
        if self._resume is not None:
            self._train.load_state_dict(self._resume)
        return self._train

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """This data rank's share of the validation sequences; nothing where no texts were given."""
        if self.val_texts is None:
            return []
        size = self.eval_batch_size or self.batch_size
        return self._loader("val", size, augment=None, shuffle=False, drop_last=False)

    def state_dict(self) -> dict[str, Any]:
        """The position in training."""
        return {} if self._train is None else {"train": self._train.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's position.

        Raises:
            DataError: it belongs to other data.
        """
        self._resume = state_dict.get("train")
        if self._resume is not None and self._train is not None:
            self._train.load_state_dict(self._resume)

    def _encoder(self) -> Encoder:
        tokenizer = load_tokenizer(self.tokenizer)
        return Encoder(tokenizer, end_token(tokenizer, self.end_of_text))

    def _loader(self, split: str, size: int, *, augment: Augment | None, shuffle: bool, drop_last: bool) -> TextLoader:
        stream = TextStream(
            self._documents[split],
            self._encoder(),
            self.sequence_length,
            size,
            augment=augment,
            seed=self.seed,
            shuffle=shuffle,
            drop_last=drop_last,
            threads=self.num_workers,
            **data_rank(self.trainer),
        )
        training = in_step(self.trainer) if split == "train" and self.trainer is not None else {}
        path = Path(self.tokenizer)
        digest = file_digest(path / "tokenizer.json" if path.is_dir() else path)
        return TextLoader(
            stream,
            beside=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            data=f"{self._documents[split].digest}, {digest}, sequence_length={self.sequence_length}",
            **training,
        )

    def _refuse_smaller_model(self) -> None:
        module = None if self.trainer is None else self.trainer.lightning_module
        room, needed = None if module is None else vocabulary_of(module), self.vocab_size
        if room is not None and room < needed:
            raise DataError(
                f"the model has room for vocab_size={room} tokens and tokenizer={os.fspath(self.tokenizer)!r} has "
                f"{needed}; build the model with vocab_size={needed}"
            )
