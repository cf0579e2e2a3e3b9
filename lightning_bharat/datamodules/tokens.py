"""Text corpora for language models: prepared once, then the same order of sequences on every layout."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from tokenizers import Tokenizer

from lightning_bharat.data.errors import DataError
from lightning_bharat.data.loader import OrderedLoader
from lightning_bharat.data.pack import prepare
from lightning_bharat.data.prepared import MANIFEST, Prepared
from lightning_bharat.data.sharding import Sharding, refuse_sharding, token_batches, token_data
from lightning_bharat.data.tokenizer import Encoder, load_tokenizer
from lightning_bharat.datamodules.in_step import data_rank, in_step


class TokenDataModule(L.LightningDataModule):
    """Sequences of tokens from text, for training, validation, test and prediction.

    A batch is ``{"input_ids": (B, T), "labels": (B, T)}``, int64; ``labels[t]`` is the token behind ``input_ids[t]``
    (shifted already), so a loss is ``cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())``. Documents are
    packed one behind another with an end-of-text token between them, or come one by one, padded (``sharding``).

    **Layouts.** The order of all sequences depends on the seed and the epoch alone. At each step the data ranks'
    batches, one behind another, are the batch that one process with the whole batch size gets; ranks that share a data
    coordinate (tensor peers, pipeline stages) get the same batch.

    **Resume.** A checkpoint holds the position in sequences. A run goes on with exactly the sequences that are left,
    also in the middle of an epoch, with other workers, and on another number of data ranks; ``batch_size`` may differ,
    too (Lightning's count of the epoch's batches is then converted). Only what the loop has finished counts.

    **The end of an epoch.** In training the rest that does not fill a step on every rank is left out, and is another
    one in each epoch (``drop_last=True``); or it is a smaller step. In evaluation no sequence is left out or counted
    twice: the last batch is smaller, and may differ by one sequence between ranks, which
    ``self.log(..., sync_dist=True)`` weighs by batch size. Less than one sequence at the very end of the tokens is
    left out.

    Args:
        folder: of prepared data (``bharat data prepare``), or where to make it from ``texts``.
        texts: ``.txt`` and ``.jsonl`` files, or folders of them; ``None`` where ``folder`` holds prepared data.
        val_texts: texts of their own for validation, instead of ``val_fraction``.
        test_texts: texts of their own for testing, instead of ``test_fraction``.
        tokenizer: a ``tokenizer.json`` or a folder with one; ``None`` trains one on the texts.
        end_of_text: the token behind each document, where the tokenizer's has an unusual name.
        vocab_size: of a tokenizer that is trained.
        val_fraction: of the documents, set aside for validation.
        test_fraction: of the documents, set aside for testing.
        sequence_length: T, tokens of a sequence.
        batch_size: B, sequences a step of each data rank.
        eval_batch_size: the same outside training; ``None`` takes ``batch_size``.
        shuffle: another order in each epoch.
        drop_last: see above; in training only.
        seed: of the order and of the split.
        sharding: how data ranks share the training data. ``"rank"``: each has its part of every step. ``"file"``: each
            reads files of its own (:class:`~lightning_bharat.data.FileBatches`). ``"length"``: documents one by one, in
            steps of like length (:class:`~lightning_bharat.data.LengthBatches`). ``"tokens"``: the same, as many as fit
            in ``max_tokens`` (:class:`~lightning_bharat.data.TokenBatches`). Documents longer than ``sequence_length``
            are cut; where a batch is padded, inputs are end-of-text tokens and labels -100. Evaluation reads such
            documents or sequences in the order in which they are stored.
        max_tokens: with ``sharding="tokens"``, in place of ``batch_size``: rows × T of each data rank's batch at most.
        num_workers: processes that read ahead; 0 reads between steps, which takes microseconds a sequence.
        check: compare every prepared file with its digest before training.

    Raises:
        DataError: a path is missing, there is too little text, the folder holds something else or is damaged, or the
            model's vocabulary is smaller than the tokenizer's. The message says what to write.

    Example:
        >>> data = TokenDataModule("prepared", texts="corpus", vocab_size=4096, sequence_length=128, batch_size=16)
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        texts: str | list[str] | None = None,
        *,
        val_texts: str | list[str] | None = None,
        test_texts: str | list[str] | None = None,
        tokenizer: str | None = None,
        end_of_text: str | None = None,
        vocab_size: int = 8192,
        val_fraction: float = 0.05,
        test_fraction: float = 0.0,
        sequence_length: int = 256,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        seed: int = 0,
        sharding: Sharding = "rank",
        max_tokens: int | None = None,
        num_workers: int = 0,
        check: bool = True,
    ) -> None:
        super().__init__()
        refuse_sharding(sharding, max_tokens)
        self.folder = os.fspath(folder)
        self.texts = texts
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.sharding = sharding
        self.max_tokens = max_tokens
        self.num_workers = num_workers
        self.check = check
        self._preparation: dict[str, Any] = {
            "val_texts": val_texts,
            "test_texts": test_texts,
            "tokenizer": tokenizer,
            "end_of_text": end_of_text,
            "vocab_size": vocab_size,
            "val_fraction": val_fraction,
            "test_fraction": test_fraction,
            "seed": seed,
        }
        self._prepared: Prepared | None = None
        self._train: OrderedLoader | None = None
        self._resume: dict[str, Any] | None = None

    @property
    def prepared(self) -> Prepared:
        """What the folder holds: counts, splits, the tokenizer."""
        if self._prepared is None:
            self._prepared = Prepared.open(self.folder)
        return self._prepared

    @property
    def vocab_size(self) -> int:
        """Size to give a model's embedding; known before the data are prepared, and the same afterwards."""
        if os.path.exists(os.path.join(self.folder, MANIFEST)):
            return self.prepared.vocab_size
        if (path := self._preparation["tokenizer"]) is not None:
            return Encoder(load_tokenizer(path), end=0).size
        return self._preparation["vocab_size"]

    @property
    def end_of_text(self) -> int:
        """Number of the token behind each document."""
        return self.prepared.end_of_text

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the prepared data."""
        return self.prepared.tokenizer()

    def prepare_data(self) -> None:
        """Make ``folder`` from ``texts``, where it is not there; on one rank of each node, as Lightning calls it."""
        prepared = (
            Prepared.open(self.folder) if self.texts is None else prepare(self.texts, self.folder, **self._preparation)
        )
        if self.check:
            prepared.check()

    def setup(self, stage: str) -> None:
        """Open the data on every rank, and refuse a model that has no room for its tokens."""
        self._prepared = Prepared.open(self.folder)
        self._refuse_smaller_model()
        if stage == "fit":
            self._train = self._resume = None

    def train_dataloader(self) -> OrderedLoader:
        """This data rank's share of the shuffled training sequences, with its position."""
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0  # the same batches again and again
        self._train = self._loader(
            "train", self.batch_size, shuffle=self.shuffle and not overfit, drop_last=self.drop_last
        )
        if self._resume is not None:
            self._train.load_state_dict(self._resume)
        return self._train

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """This data rank's share of the validation sequences; nothing where none were set aside."""
        return self._evaluation("val") if "val" in self.prepared.splits else []

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """This data rank's share of the test sequences."""
        return self._evaluation("test")

    def predict_dataloader(self) -> EVAL_DATALOADERS:
        """The test sequences, or the validation ones where there are no test data."""
        return self._evaluation("test" if "test" in self.prepared.splits else "val")

    def state_dict(self) -> dict[str, Any]:
        """The position in training.

        The loader's own state is in the checkpoint as well, but Lightning does not load it where the loader was made
        early, by ``trainer.estimated_stepping_batches`` in ``configure_optimizers``.
        """
        return {} if self._train is None else {"train": self._train.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's position.

        Raises:
            DataError: it belongs to other data, or cannot be kept.
        """
        self._resume = state_dict.get("train")
        if self._resume is not None and self._train is not None:
            self._train.load_state_dict(self._resume)

    def _evaluation(self, split: str) -> OrderedLoader:
        return self._loader(split, self.eval_batch_size or self.batch_size, shuffle=False, drop_last=False)

    def _loader(self, split: str, batch_size: int, *, shuffle: bool, drop_last: bool) -> OrderedLoader:
        data = token_data(self.prepared, split, self.sequence_length, self.sharding)
        sharding = self.sharding if split == "train" else "rank"
        try:
            order = {**data_rank(self.trainer), "seed": self.seed, "shuffle": shuffle, "drop_last": drop_last}
            batches = token_batches(data, sharding, batch_size, self.max_tokens, **order)
        except DataError as error:
            tokens = self.prepared.splits[split].tokens
            raise DataError(
                f"{split} data of {tokens} tokens are {len(data)} sequences of "
                f"sequence_length={self.sequence_length}: {error}"
            ) from error
        training = in_step(self.trainer, lambda: len(batches)) if split == "train" and self.trainer is not None else {}
        return OrderedLoader(
            data,
            batches,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            data=f"{self.prepared.digest(split)}, sequence_length={self.sequence_length}",
            **training,
        )

    def _refuse_smaller_model(self) -> None:
        module = None if self.trainer is None else self.trainer.lightning_module
        room = None if module is None else vocabulary_of(module)
        if room is not None and room < self.prepared.known_tokens:
            raise DataError(
                f"the model has room for vocab_size={room} tokens and the tokenizer of {self.folder} has "
                f"{self.prepared.known_tokens}; build the model with vocab_size={self.prepared.vocab_size}, "
                f"or prepare the data with vocab_size={room} in another folder"
            )


def vocabulary_of(module: L.LightningModule) -> int | None:
    """The size of a model's vocabulary where it says it: in its hyperparameters, or in a ``config`` (Hugging Face)."""
    sizes = [module.hparams.get("vocab_size")]
    sizes += [getattr(getattr(part, "config", None), "vocab_size", None) for part in module.modules()]
    return next((size for size in sizes if isinstance(size, int)), None)
