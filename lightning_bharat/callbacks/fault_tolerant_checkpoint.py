"""``ModelCheckpoint`` for runs that break."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_bharat import events
from lightning_bharat.callbacks.memory_checkpoint import MemoryCheckpoint
from lightning_bharat.callbacks.stop_request import StopRequest, in_words, requeue
from lightning_bharat.checkpoints import directory, host_memory
from lightning_bharat.checkpoints.errors import on_rank_zero
from lightning_bharat.checkpoints.fetched import FETCHED
from lightning_bharat.checkpoints.interval import best_interval, between_failures
from lightning_bharat.checkpoints.lock import FolderLock
from lightning_bharat.checkpoints.newest import newest_of
from lightning_bharat.checkpoints.opened import content_of
from lightning_bharat.checkpoints.remote import place_of
from lightning_bharat.checkpoints.tiers import Tier, Tiers, forget_holds
from lightning_bharat.strategies.collectives import highest
from lightning_bharat.strategies.ends_together import Stopped

FIRST_SAVE = 60.0  # seconds of training, by when it is known what a step takes, and not what a save costs


class FaultTolerantCheckpoint(MemoryCheckpoint):
    """Lightning's ``ModelCheckpoint`` with all of its arguments and behaviour, for runs that break.

    Under ``bharat_hybrid`` a save stops training for a moment: weights are copied to the host beside the next forward
    and backward pass, and written and committed by a thread. The next save, and the end of the run, wait for it. What
    it replaces is removed after it is committed. A save of the same step under a second name (``save_last=True``) is
    written once; both names share the files' bytes.
    Under other strategies, and with ``save_distributed_checkpoint=False``, a save is written before training goes on.

    ``ckpt_path="last"`` goes on from the newest whole checkpoint of this run, also where Lightning has given the run a
    new ``version_N``, and begins anew where there is none; the run then writes into that folder. ``"best"`` is the best
    one that it knows of.

    Args:
        args, kwargs: of ``ModelCheckpoint``.
        interval: ``"auto"`` saves as often as costs and failures make best (Young and Daly), by the seconds that a save
            stops training and the failures of this run so far; in the place of ``every_n_train_steps``,
            ``every_n_epochs`` and ``train_time_interval``. The end of training is saved, too.
        time_between_failures: what ``"auto"`` takes until it has seen a failure.
        stop_signals: names or numbers; when a rank gets one, all save after the same step and leave the trainer by
            :class:`Stopped`, which ends the process with exit code 0.
        time_limit: likewise before this time is over, counted from the start of training; ``None``: before the Slurm
            job ends, if there is one.
        tiers: further places that saves are copied to, as :class:`~lightning_bharat.checkpoints.tiers.Tier` or paths.
        max_failed_saves: saves that may fail in a row, for lack of space or by another fault of the disk, with a
            warning and the older checkpoints in place; the next one raises.
        memory_every_n_train_steps: of how many steps one is kept in the memory of hosts, each with the files of its own
            ranks and those of the host before it; the newest one alone. ``ckpt_path="last"`` goes on from it after a
            restart by ``bharat launch``, which it needs, also when a host is lost.

    Raises:
        ValueError: an argument that can't be, by name.
        CheckpointError: on all ranks: another run writes to this folder; in training, after the same step, more saves
            have failed than may.
    """

    def __init__(
        self,
        *args: Any,
        interval: Literal["auto"] | None = None,
        time_between_failures: timedelta = timedelta(days=1),
        stop_signals: Sequence[str | int] = ("SIGTERM", "SIGUSR1"),
        time_limit: timedelta | None = None,
        tiers: Sequence[Tier | str] = (),
        max_failed_saves: int = 3,
        memory_every_n_train_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        triggers = ("every_n_train_steps", "every_n_epochs", "train_time_interval")
        given = [name for name in triggers if kwargs.get(name) is not None]
        if interval not in (None, "auto"):
            raise ValueError(f"interval={interval!r}: write 'auto', or train_time_interval=timedelta(...)")
        if interval and given:
            raise ValueError(f"interval='auto' and {given[0]} are given; leave one of them out")
        kwargs |= {"max_failed_saves": max_failed_saves, "memory_every_n_train_steps": memory_every_n_train_steps}
        super().__init__(*args, **kwargs)
        self.interval, self.time_between_failures = interval, time_between_failures
        self._request = StopRequest(stop_signals, time_limit)
        self.tiers = [tier if isinstance(tier, Tier) else Tier(str(tier)) for tier in tiers]
        self._copies: Tiers | None = None
        self._asked_folder = self.dirpath
        self._lock: FolderLock | None = None
        self._found = ""
        self._is_training = False
        self._steps = 0
        self._next_save = 0.0
        self._longest_step = 0.0
        self._batch_began = 0.0
        if interval:
            self.save_by_own_clock()

    # ---- a run begins and ends

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._lock = self._lock or FolderLock(Path(str(self.dirpath)))
            on_rank_zero(self._alone)
            if self.tiers and trainer.is_global_zero and self._copies is None:
                self._copies = Tiers(self.tiers, partial(self.event, trainer))

    def _alone(self) -> None:
        """Take the folder, and clean up after a process that had it before."""
        assert self._lock is not None
        if self._lock.take():
            directory.forget_leavings(self._lock.folder)
            forget_holds(self._lock.folder)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._request.start()
        self._steps = trainer.global_step
        self._batch_began = time.monotonic()
        if not self._is_training:  # else it goes on, in another layout
            self.event(trainer, "train_start", step=trainer.global_step, ckpt_path=str(trainer.ckpt_path or ""))
        self._is_training = True
        self._plan_next(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.interval and not self.is_saved(trainer):
            self.save_last_now(trainer)
        super().on_train_end(trainer, pl_module)
        self._wait_for_copies(trainer)
        self.event(trainer, "train_end", step=trainer.global_step)
        self._request.stop()  # Lightning puts back what was there before it came

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._leave()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave()

    def _leave(self) -> None:
        self._is_training = False
        self._request.stop()
        if self._lock is not None:
            self._lock.release()

    # ---- after a step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        stepped = trainer.global_step != self._steps
        asked, due, writing = self._agree(trainer)
        if self.is_writing and not writing:
            self.settle(trainer)
        if self.interval:
            self.let_time_be(bool(due))
        super().on_train_batch_end(trainer, *args)
        if due:
            self._plan_next(trainer)
        if asked:
            self._stop(trainer, asked)
        if stepped:
            self.keep_in_memory(trainer)

    def _agree(self, trainer: pl.Trainer) -> tuple[int, int, int]:
        """Whether to stop, whether a save is due, and whether one is being written. The same on all ranks."""
        now, stepped = time.monotonic(), trainer.global_step != self._steps  # else gradients would be lost
        self._longest_step = max(self._longest_step, now - self._batch_began)
        asked = self._request.asks(2 * (self.seconds + self._longest_step)) if stepped else 0
        due = bool(self.interval) and stepped and trainer.is_global_zero and now > self._next_save
        self._steps, self._batch_began = trainer.global_step, now
        found = highest(trainer, [asked, due, self.is_writing and not self.is_written(trainer)])
        return found[0], found[1], found[2]

    def _plan_next(self, trainer: pl.Trainer) -> None:
        """By rank 0's clock."""
        if not (self.interval and trainer.is_global_zero):
            return
        seconds = FIRST_SAVE
        if self.stall:
            known = events.read(Path(trainer.default_root_dir))
            default = self.time_between_failures.total_seconds()
            seconds = best_interval(self.stall, between_failures(known, time.time(), default))
        self._next_save = time.monotonic() + max(seconds, self.seconds)

    def _stop(self, trainer: pl.Trainer, asked: int) -> None:
        if not self.is_saved(trainer):
            self.save_last_now(trainer)
        self.settle(trainer)
        self._wait_for_copies(trainer)
        why = in_words(asked)
        self.event(trainer, "stop", step=trainer.global_step, why=why)
        rank_zero_info(f"Stopped after step {trainer.global_step} by {why}; ckpt_path='last' goes on.")
        if trainer.is_global_zero:
            requeue(trainer)
        raise Stopped(trainer.global_step, why)

    # ---- tiers

    def saved(self, trainer: pl.Trainer, path: Path) -> None:
        """Let the tiers have it. A copy that the run went on from has done its part."""
        fetched = Path(self._found)
        if fetched.parent == Path(str(self.dirpath)) / FETCHED and trainer.is_global_zero:
            directory.remove(fetched)
        if self._copies is None:
            return
        if path.is_dir():
            self._copies.offer(path)
        else:
            rank_zero_warn(f"tiers take directories, and {path} is a file: write save_distributed_checkpoint=True")

    def _wait_for_copies(self, trainer: pl.Trainer) -> None:
        if self.tiers:
            on_rank_zero(self._copies.wait if self._copies else lambda: None)

    # ---- going on

    def find_last(self, trainer: pl.Trainer) -> set[str]:
        """The newest whole checkpoint; one in a store is copied to a folder in that of this run. Other ranks than the
        first look at sizes only: the first one's counts."""
        own = self._folders(trainer) or [self.folder(trainer)]
        places = [*own, *(place_of(tier.path) for tier in self.tiers)]
        places += [known.folder] if (known := host_memory.hosts()) else []
        found = newest_of(places, rank_zero_warn, every_byte=trainer.is_global_zero, here=own[-1] / FETCHED)
        if found is not None and self._asked_folder is None:
            self.dirpath = next((str(folder) for folder in own if folder in found.parents), self.dirpath)
        self._found = str(found or "")
        return {str(found)} if found else set()

    def may_remove(self, path: str) -> bool:
        """What was found is no more than a step of this run; what a person names stays."""
        return path == self._found and Path(path).parent == Path(str(self.dirpath))

    def find_best(self, trainer: pl.Trainer) -> None:
        """The one that the newest whole checkpoint names, by its path or beside it."""
        newest = newest_of(self._folders(trainer), rank_zero_warn, every_byte=False)
        if newest is None:
            return
        known = content_of(newest).get("callbacks", {}).get(self.state_key, {})
        named = Path(str(known.get("best_model_path") or newest))
        there = [path for path in (named, newest.parent / named.name) if path.exists()]
        self.best_model_path = str(there[0]) if there else ""

    def _folders(self, trainer: pl.Trainer) -> list[Path]:
        """Where this run may have written, of which Lightning's loggers give each start another one."""
        folder = self.folder(trainer)
        if self._asked_folder is not None or not trainer.loggers:
            return [folder]
        return sorted(folder.parent.parent.glob("*/checkpoints"))
