"""A loader over text files that knows how far training has come, and goes on from there on any number of data ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_bharat.data.errors import DataError
from lightning_bharat.data.loader import SAME_ORDER, Announced, unchanged
from lightning_bharat.data.text_stream import Made, Place, TextStream

BATCHES_AHEAD = 4  # that wait for training


class TextLoader:
    """Batches of one data rank, made in a process beside training.

    Each iteration is an epoch, and has a process of its own, which ends with it or with this one. As in
    :class:`~lightning_bharat.data.OrderedLoader` the state counts what the training loop has finished, in sequences;
    it is the same on all ranks, and loads on any number of them. How many batches an epoch has is known at its end.

    Args:
        stream: the batches.
        beside: make them in a process; else in this one, between steps.
        pin_memory: as in ``DataLoader``.
        data: name of the data's content; a state of other data is refused.
        finished_batches: how many of this epoch's the training loop has finished; ``None``: all that were handed out.
        on_resume: called in the first epoch after a resume with the number of its batches that count as done.
        batches_of_epoch: where the training loop ends an epoch, if before its last batch.

    Attributes:
        busy: seconds that each stage has worked for the batches of this iteration so far.
    """

    def __init__(
        self,
        stream: TextStream,
        *,
        beside: bool = True,
        pin_memory: bool = False,
        data: str = "",
        finished_batches: Callable[[], int] | None = None,
        on_resume: Callable[[int], None] | None = None,
        batches_of_epoch: Callable[[], float] = lambda: inf,
    ) -> None:
        self.batch_sampler = Announced(stream, self._announced)
        self._stream, self._beside, self._pin_memory, self._data = stream, beside, pin_memory, data
        self._finished_batches, self._on_resume = finished_batches, on_resume
        self._batches_of_epoch = batches_of_epoch
        self._resumed = False
        self._ahead = 0  # by how many epochs Lightning's count is before the data's
        self._running: Place | None = None
        self.busy: dict[str, float] = {}
        self._go_to(Place())

    def _go_to(self, place: Place) -> None:
        """Where the next iteration begins."""
        self._start = place
        self._behind, self._handed = {0: place}, 0

    @property
    def batch_size(self) -> int:
        """Sequences in a batch."""
        return self._stream.batch_size

    def resize(self, batch_size: int) -> None:
        """Go on with batches of another size, from the same position; for the next iteration."""
        self._stream.batch_size = self.batch_sampler.batch_size = batch_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        # A generator: Lightning makes iterators to see that it can, and never asks them for a batch.
        place = Place(self._start.epoch + 1) if self._start.ended else self._start
        self._go_to(place)
        self._running, self._start = place, Place(place.epoch + 1)
        self._stream.place = place
        made: DataLoader[Made] = DataLoader(
            self._stream,
            batch_size=None,
            num_workers=int(self._beside),
            prefetch_factor=BATCHES_AHEAD if self._beside else None,
            pin_memory=self._pin_memory,
            collate_fn=unchanged,
            generator=torch.Generator(),  # the run's random numbers are not for this
        )
        yield from self._handing(made, self._behind)

    def _handing(self, batches: DataLoader[Made], behind: dict[int, Place]) -> Iterator[dict[str, Tensor]]:
        for number, made in enumerate(_handed_over(batches), start=1):
            if made.error or made.batch is None:
                raise DataError(made.error)
            if behind is self._behind:
                behind[number], self._handed, self.busy = made.behind, number, made.busy
                for past in range(min(behind), self._consumed()):
                    del behind[past]
            yield made.batch

    def _consumed(self) -> int:
        """Batches handed out by this iteration and finished."""
        if self._finished_batches is None:
            return self._handed
        assert self._running is not None
        before = self._running.position // self._stream.global_batch
        return max(min(self._behind), min(self._handed, self._finished_batches() - before))

    def _announced(self, epoch: int) -> None:
        """Lightning says which epoch comes, also when it has an iterator for it already."""
        if self._resumed:
            place, done = self._start_of_resume, 0
            self._resumed = False
            if not place.ended:
                done = place.position // self._stream.global_batch
                if self._on_resume is not None:
                    self._on_resume(done)
            # Lightning counts an epoch that `max_steps` ended early as done; then what is left of it comes first.
            unfinished = not place.ended and 0 < done < self._batches_of_epoch()
            self._ahead = int(unfinished and epoch == place.epoch + 1)
        epoch -= self._ahead
        if self._running is not None and self._running.epoch == epoch:
            self._start = self._running
        elif self._start.epoch != epoch or self._start.ended or self._running is not None:
            self._go_to(Place(epoch))

    def state_dict(self) -> dict[str, Any]:
        """The position: plain numbers and words, equal on all ranks."""
        place = self._behind[self._consumed()] if self._handed else self._behind[0]
        stream = self._stream
        order = {"samples": len(stream.documents), "seed": stream.seed, "shuffle": stream.shuffle, "data": self._data}
        return {**asdict(place), **order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, which a run on any number of data ranks and any batch size has left.

        Raises:
            DataError: the state belongs to other data or another order.
        """
        mine = self.state_dict()
        for key, words in SAME_ORDER.items():
            if state.get(key) != mine.get(key):
                raise DataError(
                    f"the position in the checkpoint cannot be kept: {words} ({key} was {state.get(key)!r} and is "
                    f"{mine.get(key)!r}). Use the texts and arguments of that run, or begin at the first document by "
                    "loading its weights alone"
                )
        self._start_of_resume = Place(**{name: state[name] for name in Place.__dataclass_fields__})
        self._go_to(self._start_of_resume)
        self._resumed, self._running, self._ahead = True, None, 0


def _handed_over(batches: DataLoader[Made]) -> Iterator[Made]:
    try:
        yield from batches
    except (OSError, EOFError) as error:  # its own errors it hands over as words
        raise RuntimeError(
            "DataLoader worker, which reads and tokenizes text, exited unexpectedly while it handed over a batch: it "
            "was killed, perhaps for lack of memory"
        ) from error
