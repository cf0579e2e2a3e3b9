"""``ModelCheckpoint`` whose saves are written beside training, and none of which takes the last good one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_bharat import events
from lightning_bharat.callbacks.room import warn_of_room
from lightning_bharat.checkpoints import directory
from lightning_bharat.checkpoints.background import Background
from lightning_bharat.checkpoints.errors import CheckpointError, WriteError, disk_errors
from lightning_bharat.strategies._model_checkpoint import OpenModelCheckpoint
from lightning_bharat.strategies.background_saves import BackgroundSaves
from lightning_bharat.strategies.checkpoint import ShardedCheckpoints

PATIENCE = 5.0  # seconds that a save may still take when a rank has failed: the others are ended after six


@dataclass
class _Flight:
    """A save that has begun.

    Attributes:
        path: where it goes.
        step: of the trainer.
        before: what was remembered of checkpoints before it.
        began: on the clock of ``time.perf_counter``.
        stall: seconds that training waited for it.
        names: further names of the checkpoint.
        aside: whether nothing is decided by it.
    """

    path: str
    step: int
    before: dict[str, Any]
    began: float
    stall: float = 0.0
    ended: float = 0.0
    names: list[str] = field(default_factory=list)
    aside: bool = False


class BackgroundCheckpoint(OpenModelCheckpoint):
    """The part of :class:`FaultTolerantCheckpoint` that saves.

    Args:
        args, kwargs: of ``ModelCheckpoint``.
        max_failed_saves: as there.
    """

    def __init__(self, *args: Any, max_failed_saves: int = 3, **kwargs: Any) -> None:
        if isinstance(max_failed_saves, bool) or not isinstance(max_failed_saves, int) or max_failed_saves < 0:
            raise ValueError(f"max_failed_saves={max_failed_saves!r}: write a whole number from 0 up")
        super().__init__(*args, **kwargs)
        self.max_failed_saves = max_failed_saves
        self.stall = self.seconds = 0.0
        self._failed_saves, self._since = 0, 0.0
        self._orphans: set[str] = set()
        self._flight: _Flight | None = None
        self._before: dict[str, Any] | None = None
        self._writer = Background()  # of strategies that have none

    # ---- hooks

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        warn_of_room(trainer, Path(str(self.dirpath)))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if saves := self._saves_of(trainer):
            saves.copied()  # at the end of training callbacks may put other weights in their place

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self.settle(trainer, ends=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        watch = getattr(trainer.strategy, "watch", None)
        if self._writer_of(trainer).wait(PATIENCE if watch is not None and watch.first is not None else None):
            with suppress(CheckpointError):  # the run ends by something else
                self.settle(trainer)

    def state_dict(self) -> dict[str, Any]:
        """With what a checkpoint replaces, which a process that is killed after it can't remove any more."""
        replaced = self.paths(self._before) - self.paths(self.remembered()) if self._before else self._orphans
        if self._before and self.save_top_k == -1:  # without a monitor it remembers the newest one alone, and keeps all
            replaced -= {self._before["best_model_path"]}
        return {**super().state_dict(), "replaced": sorted(replaced)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._orphans = set(state_dict.get("replaced", []))

    # ---- what ModelCheckpoint has decided

    @contextmanager
    def deciding(self, trainer: pl.Trainer) -> Iterator[None]:
        if self._before is not None or self.is_saved(trainer):  # of a save that has just begun
            yield
            return
        self._since = time.perf_counter()
        self.settle(trainer)
        self._before = self.remembered()
        try:
            yield
        except WriteError as error:
            self._failed(trainer, _Flight("", trainer.global_step, self._before, self._since), error)
        finally:
            self._before = None

    def write(self, trainer: pl.Trainer, path: str) -> None:
        saves = self._saves_of(trainer)
        if saves and self._flight is not None and self.is_saved(trainer):
            there = Path(self._flight.path)
            self._also(trainer, path, lambda: directory.link(there, Path(path)))
            return
        since = self._since if self._before else time.perf_counter()
        flight = _Flight(path, trainer.global_step, self._before or self.remembered(), since)
        last, self.last_model_path = self.last_model_path, self._last_path_in(trainer, path)
        try:
            with saves.put_off() if saves else self._errors_of(trainer):
                super().write(trainer, path)
        finally:
            self.last_model_path = last
        self.stall = flight.stall = time.perf_counter() - flight.began
        self._writer_of(trainer).do(lambda: setattr(flight, "ended", time.perf_counter()))
        self._flight = flight
        known, self._orphans, orphans = self.paths(self.remembered()), set(), self._orphans
        for orphan in sorted(orphans - known):
            if str(self.dirpath) == str(Path(orphan).parent):
                self.remove(trainer, orphan)

    def write_aside(self, trainer: pl.Trainer, path: Path) -> None:
        """Save to ``path``, without a trace in what is known of checkpoints. All ranks must call it, while nothing is
        written."""
        saves = self._saves_of(trainer)
        assert saves is not None and self._flight is None
        with saves.put_off():
            trainer.save_checkpoint(path)
        self._flight = _Flight(str(path), trainer.global_step, {}, 0.0, aside=True)

    def link(self, trainer: pl.Trainer, path: str, name: str) -> None:
        if self._saves_of(trainer):
            self._also(trainer, name, lambda: directory.point(Path(name), Path(path)))
        else:
            super().link(trainer, path, name)

    def remove(self, trainer: pl.Trainer, path: str) -> None:
        if self._saves_of(trainer):
            self._after(trainer, lambda: directory.remove(Path(path)))
        else:
            super().remove(trainer, path)

    # ---- after a save

    def _also(self, trainer: pl.Trainer, name: str, make: Callable[[], None]) -> None:
        if self._flight is not None:
            self._flight.names.append(name)
        self._after(trainer, make)

    def _after(self, trainer: pl.Trainer, step: Callable[[], None]) -> None:
        """Let rank 0 do ``step`` when the checkpoint is there, if it ever is."""
        if trainer.is_global_zero:
            self._writer_of(trainer).do(step)

    def settle(self, trainer: pl.Trainer, ends: bool = False) -> None:
        """Wait for the save that has begun, if any, and see how it went. All ranks must call it.

        Raises:
            CheckpointError: it has failed, as too many before it, or as the last one of a run that ``ends``.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return
        writer = self._writer_of(trainer)
        writer.wait()
        error = writer.take_error()
        if flight.aside:
            if error is not None:
                rank_zero_warn(f"step {flight.step} could not be kept in hosts' memory: {error}")
            return
        if isinstance(error, WriteError):
            self._failed(trainer, flight, error, ends)
            return
        self._failed_saves, self.seconds = 0, flight.ended - flight.began
        saves = self._saves_of(trainer)
        self.stall = flight.stall + (saves.waited if saves else 0.0)
        if error is not None:  # rank 0's: of a name, or of what was to be removed
            rank_zero_warn(f"{flight.path} is saved; after it, {type(error).__name__}: {error}")
        facts = {"step": flight.step, "path": flight.path, "names": flight.names}
        self.event(trainer, "save", **facts, stall=self.stall, seconds=self.seconds)
        self.saved(trainer, Path(flight.path))
        self.tell_loggers(trainer)

    def saved(self, trainer: pl.Trainer, path: Path) -> None:
        """Called when a checkpoint is there. All ranks call it."""

    def _failed(self, trainer: pl.Trainer, flight: _Flight, error: Exception, ends: bool = False) -> None:
        self.remember(flight.before)
        self._failed_saves += 1
        said = f"the checkpoint after step {flight.step} could not be saved: {error}"
        self.event(trainer, "save_failed", step=flight.step, error=str(error), in_a_row=self._failed_saves)
        if ends:
            raise CheckpointError(f"{said}. It was the last one of the run") from error
        if self._failed_saves > self.max_failed_saves:
            allowed = f"max_failed_saves={self.max_failed_saves}"
            raise CheckpointError(f"{said}. It is failure {self._failed_saves} in a row ({allowed})") from error
        rank_zero_warn(f"{said}. Training goes on, and older checkpoints stay")

    @property
    def is_writing(self) -> bool:
        """Whether a save has begun and not been settled. The same on all ranks."""
        return self._flight is not None

    def is_written(self, trainer: pl.Trainer) -> bool:
        """Whether this rank has nothing more to write."""
        return self._writer_of(trainer).is_idle

    def event(self, trainer: pl.Trainer, kind: str, **facts: Any) -> None:
        if trainer.is_global_zero:
            events.append(Path(trainer.default_root_dir), kind, **facts)

    # ---- the strategy

    def _saves_of(self, trainer: pl.Trainer) -> BackgroundSaves | None:
        strategy = trainer.strategy
        directories = isinstance(strategy, ShardedCheckpoints) and strategy.save_distributed_checkpoint
        return strategy.saves if directories else None  # type: ignore[attr-defined]

    def _writer_of(self, trainer: pl.Trainer) -> Background:
        saves = self._saves_of(trainer)
        return saves.writer if saves else self._writer

    def _errors_of(self, trainer: pl.Trainer) -> AbstractContextManager:
        return disk_errors() if trainer.world_size == 1 else nullcontext()  # else not all ranks have them

    def _last_path_in(self, trainer: pl.Trainer, path: str) -> str:
        """What a checkpoint of this step says of the last one, which may be a second name of it."""
        return self.next_last_path(trainer) if self.save_last is True else self.last_model_path
