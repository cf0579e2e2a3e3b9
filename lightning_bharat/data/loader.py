"""A loader that knows, in samples, how far training has come, and goes on from there on any number of data ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf
from typing import Any

from torch.utils.data import DataLoader, Dataset

from lightning_bharat.data.errors import DataError
from lightning_bharat.data.shared_batches import SharedBatches

# What must be equal for a position to mean the same sample, and what to say when it is not.
SAME_ORDER = {
    "sharding": "samples were shared in another way",
    "data": "these are other data",
    "samples": "the number of samples differs",
    "seed": "the order was drawn with another seed",
    "shuffle": "one is shuffled and the other is not",
    "sizes": "the lengths of samples, or the samples of files, differ",
}


def unchanged(batch: Any) -> Any:
    """The batch as the dataset's ``__getitems__`` made it."""
    return batch


class OrderedLoader:
    """Batches in the global order for one data rank, with an exact position.

    Iterating goes through one epoch; the next iteration is the next epoch, unless Lightning's call of
    ``batch_sampler.sampler.set_epoch`` or :meth:`load_state_dict` says otherwise. The state counts what the training
    loop has *consumed*, not what worker processes fetched ahead, in samples of the global order: it is the same on all
    ranks and loads on any number of them.

    It wraps a ``DataLoader`` instead of being one, because Lightning would give a ``DataLoader`` a
    ``DistributedSampler`` of its own (and, to overfit, a ``SequentialSampler``), and both would lose the order.

    Args:
        dataset: gives a whole batch for a list of sample numbers by ``__getitems__``, or samples for ``collate_fn``.
        batches: the order and this rank's share.
        num_workers: worker processes; 0 reads in this process.
        pin_memory: as in ``DataLoader``.
        collate_fn: makes a batch of a list of samples, where the dataset does not.
        data: name of the data's content; a state of other data is refused.
        finished_batches: how many batches of this epoch the training loop has finished, where it knows better than the
            loader (a batch handed out and not finished was not consumed).
        on_resume: called before the first epoch after a resume with the number of this epoch's batches that count as
            done, in today's batches over all ranks: what the training loop's count must say to end with the last one.
        batches_of_epoch: where the training loop ends an epoch, if before the last batch (``limit_train_batches``).

    Raises:
        DataError: ``batches`` share another number of samples than ``dataset`` has.
    """

    def __init__(
        self,
        dataset: Dataset,
        batches: SharedBatches,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        collate_fn: Callable[[Any], Any] = unchanged,
        data: str = "",
        finished_batches: Callable[[], int] | None = None,
        on_resume: Callable[[int], None] | None = None,
        batches_of_epoch: Callable[[], float] = lambda: inf,
    ) -> None:
        if hasattr(dataset, "__len__") and len(dataset) != batches.length:
            raise DataError(
                f"the dataset has {len(dataset)} samples, and {type(batches).__name__} shares {batches.length}; give "
                "it one length for each sample (or, by file, all samples of each file)"
            )
        self.dataset = dataset
        self.batch_sampler = Announced(batches, self._before_epoch)
        self._batches = batches
        self._data = data
        self._finished_batches = finished_batches
        self._on_resume = on_resume
        self._batches_of_epoch = batches_of_epoch
        self._resumed_at: int | None = None
        self._ahead = 0  # by how many epochs Lightning's count is before the data's
        self._handed = 0
        self._begun = False
        self.dataloader: DataLoader = DataLoader(
            dataset, batch_sampler=batches, num_workers=num_workers, pin_memory=pin_memory, collate_fn=collate_fn
        )

    @property
    def batch_size(self) -> int:
        """Of a data rank in a step, in :attr:`unit`."""
        return self._batches.batch_size

    @property
    def unit(self) -> str:
        """What :attr:`batch_size` counts: ``"rows"``, or ``"tokens"`` with padding."""
        return self._batches.unit

    def resize(self, batch_size: int) -> None:
        """Go on with batches of another size, from the same position.

        Raises:
            DataError: fewer samples than one step takes.
        """
        self._batches.resize(batch_size)
        self.batch_sampler.batch_size = batch_size
        if self._resumed_at is not None:
            self._resumed_at = len(self) - self._batches.left()

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing is fixed before the first batch is asked for, so that a state or an epoch may still come
        # after Lightning made its iterator.
        if self._begun or not self._batches.left():
            self._batches.go_to(self._batches.epoch + 1)
        self._begun, self._handed = True, 0
        for batch in self.dataloader:
            self._handed += 1
            yield batch

    def _before_epoch(self, epoch: int) -> None:
        if self._resumed_at is not None:
            if self._on_resume is not None:
                self._on_resume(self._resumed_at)
            # Lightning counts an epoch that `max_steps` ended early as done; then what is left of it comes first.
            unfinished = self._resumed_at < min(len(self), self._batches_of_epoch())
            self._ahead = int(unfinished and epoch == self._batches.epoch + 1)
        self._resumed_at = None
        epoch -= self._ahead
        if self._begun or epoch != self._batches.epoch:
            self._batches.go_to(epoch)
        self._begun, self._handed = False, 0

    def _consumed(self) -> int:
        """Batches handed out by this iteration and finished."""
        if self._finished_batches is None:
            return self._handed
        before = len(self) - self._batches.left()
        return min(self._handed, max(0, self._finished_batches() - before))

    def state_dict(self) -> dict[str, Any]:
        """The position: plain numbers and words, equal on all ranks."""
        return {**self._batches.state_dict(self._consumed()), "data": self._data}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, which a run on any number of data ranks and any batch size has left.

        Raises:
            DataError: the state belongs to other data or another order, or what is left cannot be shared by the ranks.
        """
        mine, its = self.state_dict(), {"sharding": "rank", **state}
        for key, words in SAME_ORDER.items():
            if its.get(key) != mine.get(key):
                raise DataError(
                    f"the position in the checkpoint cannot be kept: {words} ({key} was {its.get(key)!r} and is "
                    f"{mine.get(key)!r}). Use the prepared data and arguments of that run, or begin at the first "
                    "sample by loading its weights alone"
                )
        self._batches.load_state_dict(state)
        self._resumed_at = len(self) - self._batches.left()
        self._begun, self._handed = False, 0


class Announced:
    """Sizes of batches, and the place where Lightning announces an epoch: ``batch_sampler.sampler.set_epoch``."""

    def __init__(self, batches: Any, set_epoch: Callable[[int], None]) -> None:
        self.batch_size = batches.batch_size
        self.drop_last = batches.drop_last
        self.sampler = self
        self.set_epoch = set_epoch
