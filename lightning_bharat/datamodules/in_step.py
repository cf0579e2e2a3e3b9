"""What a loader of ours asks of the trainer and tells it: which data rank it is for, and how far an epoch is."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import lightning as L


def data_rank(trainer: L.Trainer | None) -> dict[str, int]:
    """Number of data ranks and which this is: the strategy knows which ranks share their data."""
    kwargs = None if trainer is None else trainer.distributed_sampler_kwargs
    return {"num_replicas": kwargs["num_replicas"], "rank": kwargs["rank"]} if kwargs else {}


def in_step(trainer: L.Trainer, length: Callable[[], float] = lambda: inf) -> dict[str, Callable]:
    """The arguments of a training loader that keep its position and Lightning's count of batches together.

    Args:
        length: batches of a whole epoch, where they are known.
    """

    def counted() -> Any:
        """Lightning's count of this epoch's batches."""
        return trainer.fit_loop.epoch_loop.batch_progress

    def set_finished(batches: int) -> None:
        """Make Lightning's count say what the position says.

        It differs where the checkpoint's batches had another size, and where it was saved in ``on_train_epoch_start``
        (Lightning then still holds the last epoch's count, and would skip the new one).
        """
        progress = counted()
        if off := batches - progress.current.processed:
            for name in ("ready", "started", "processed", "completed"):  # they differ by one in the middle of a batch
                setattr(progress.current, name, max(0, getattr(progress.current, name) + off))
            progress.is_last_batch = batches >= length()

    return {
        "finished_batches": lambda: counted().current.processed,
        "on_resume": set_finished,
        "batches_of_epoch": lambda: trainer.num_training_batches,
    }
