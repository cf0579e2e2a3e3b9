"""The same global batch on another number of data ranks: batch sizes are per data rank, so each takes more or less.

A checkpoint says how large the batches of training loaders were, and how many data ranks took one in each step. A run
that goes on from it with the same ``batch_size`` and other data ranks gives each rank its part of the same rows; a
``batch_size`` that is another one than before is taken as it is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader, DistributedSampler

from lightning_bharat.checkpoints import plain
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.manifest import FORMAT, Manifest
from lightning_bharat.checkpoints.stored import is_checkpoint
from lightning_bharat.strategies import _lightning_loops, _lightning_resume, placed
from lightning_bharat.strategies.loaders import LoaderError

if TYPE_CHECKING:
    from lightning_bharat.plan.layout import Layout
    from lightning_bharat.strategies.connection import ConnectedStrategy as _Base
else:
    _Base = object


@dataclass(frozen=True)
class Batches:
    """Of a training loader.

    Attributes:
        given: its batch size as the person gives it; ``None`` where it can't be known or changed.
        size: of a data rank's batches.
        data: data ranks.
    """

    given: int | None
    size: int | None
    data: int

    @property
    def rows(self) -> int:
        """Of a step, over all data ranks."""
        return (self.size or 0) * self.data

    def on(self, data: int, given: int | None) -> int | None:
        """The size of each rank's batches on so many data ranks, with ``given`` written there.

        Raises:
            LoaderError: the rows do not divide.
        """
        if given is None or given != self.given or self.size is None:
            return given
        if self.rows % data:
            fits = ", ".join(str(n) for n in range(1, self.rows + 1) if self.rows % n == 0)
            raise LoaderError(
                f"batch_size={given}: {self.size} rows on each of {self.data} data ranks, a global batch of "
                f"{self.rows}, can't be divided over {data} data ranks; take {fits} of them, or write another "
                "batch_size, which is taken as it is"
            )
        return self.rows // data


class KeepsBatch(_Base):
    """Mixed into a strategy, before what hands loaders to Lightning."""

    _former: list[Batches] | None = None
    _loaders: tuple[tuple[Any, Batches], ...] = ()
    _making: list[tuple[Any, Batches]] | None = None

    def keep_batch(self, trainer: Any) -> None:
        """From here on training loaders are made; those of the checkpoint that the run goes on from are known."""
        planned, self.planned_batch = self.planned_batch, None
        self._former = [planned] if planned else saved_batches(_lightning_resume.ckpt_path(trainer))
        self._loaders = ()
        _lightning_loops.around_training_loaders(trainer, self._begin, self._end)

    def _begin(self) -> None:
        self._making = []

    def _end(self) -> None:
        self._loaders, self._making = tuple(self._making or self._loaders), None

    def process_dataloader(self, dataloader: object) -> object:
        kwargs = self.distributed_sampler_kwargs
        former = self._former[0].data if self._former else None
        sampler = getattr(dataloader, "sampler", None)
        if type(sampler) is DistributedSampler and former == sampler.num_replicas != kwargs["num_replicas"]:
            placed.share_anew(dataloader, **kwargs)
        if self._making is not None:
            self._making.append((dataloader, self._kept(dataloader)))
        return super().process_dataloader(dataloader)

    def _kept(self, loader: Any) -> Batches:
        """Change the batch size of ``loader`` to what keeps the global batch, and give it a place in its order."""
        assert self._making is not None
        given, data, number = _given(loader), self.layout.data, len(self._making)
        size = given
        if self._former is not None and number < len(self._former):
            size = self._former[number].on(data, given)
        if size != _size(loader):
            _resize(loader, size)
            unit = getattr(loader, "unit", "rows")
            rank_zero_info(f"batch_size={given}: {size} {unit} on each of {data} data ranks keep the global batch.")
        assert self.lightning_module is not None
        loop: Any = self.lightning_module.trainer.fit_loop
        placed.begin_epoch(loader, loop.epoch_progress.current.processed)
        progress: Any = loop.epoch_loop.batch_progress
        if placed.has_known_order(loader):
            placed.place(loader, data, lambda: progress.current.processed)
        return Batches(given, size, data)

    def batches(self) -> list[dict[str, Any]]:
        """Of the training loaders, for a checkpoint."""
        return [asdict(batches) for _, batches in self._loaders]

    def batches_in_tokens(self) -> bool:
        """Whether a training loader's batches are of so many tokens, in any number of rows."""
        return any(getattr(loader, "unit", "rows") == "tokens" for loader, _ in self._loaders)

    def batches_refused(self, layout: Layout) -> str:
        """Why the order of the data or the global batch can't be kept by a change to ``layout``; "" if it can."""
        for loader, batches in self._loaders:
            kind = type(loader).__name__
            if not (hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")):
                return (
                    f"the place in the order of the training data can't be kept: {kind} has no state_dict and "
                    "load_state_dict"
                    + (f", and its {type(loader.sampler).__name__} no order that is known" if _of_torch(loader) else "")
                    + ". Give a DataLoader of a dataset with a length and leave the sampler to Lightning, "
                    "TokenDataModule, or a loader that has both"
                )
            if batches.given is None and _of_torch(loader) and layout.data != batches.data:
                return (
                    f"the batches of {kind} come from {type(loader.batch_sampler).__name__}, whose size can't be "
                    f"changed; give batch_size=, or keep data={batches.data}"
                )
            try:
                batches.on(layout.data, batches.given)
            except LoaderError as error:
                return str(error)
        return ""


def _of_torch(loader: object) -> bool:
    return isinstance(loader, DataLoader)


def _size(loader: Any) -> int | None:
    """Of a batch; ``None`` where it can't be changed."""
    size = getattr(loader, "batch_size", None)
    return size if isinstance(size, int) and (placed.is_resizable(loader) or hasattr(loader, "resize")) else None


def _given(loader: Any) -> int | None:
    """The size before it was changed here: a person may give the same object again."""
    return getattr(loader, "given_batch_size", _size(loader))


def _resize(loader: Any, size: int | None) -> None:
    assert size is not None
    loader.given_batch_size = _given(loader)
    if placed.is_resizable(loader):
        placed.resize(loader, size)
    else:
        loader.resize(size)


def saved_batches(path: Any) -> list[Batches] | None:
    """Of the training loaders of the run that has saved ``path``; ``None`` if that is not known."""
    if not path:
        return None
    try:
        folder = Path(path)
        said = Manifest.read(folder).batches if is_checkpoint(folder) else plain.read(folder)[FORMAT]["batches"]
    except (CheckpointError, KeyError):  # plain Lightning's, or to be said where the checkpoint is read
        return None
    return [Batches(**of_loader) for of_loader in said] or None
