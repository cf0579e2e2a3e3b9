"""Measures how long training waits for its batches, and gives the training loader the workers that it needs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_bharat import events
from lightning_bharat.data.alike import RANDOM, why_workers_matter
from lightning_bharat.data.loading import Search, Setting, Waited, most_workers
from lightning_bharat.strategies import _lightning_loops, _torch

WINDOW = 50  # steps of a measurement, where a loader can be changed in the middle of an epoch
WARM_UP = 3  # steps that measure what is only done once


class DataLoaderTuner(pl.Callback):
    """Logs the input wait, and shortens it by more workers and batches read ahead.

    ``input_wait`` is the share of a training step in which the slowest rank waited for its loader;
    ``input_wait_seconds`` says how long. Validation and saves are not counted. Where the share is above ``limit``,
    ``num_workers`` and ``prefetch_factor`` of the training loader are changed, on all ranks alike, within the cores and
    the memory of the host that each rank has a share of; ``pin_memory`` is set on CUDA devices. The next measurement
    shows whether a step takes less; if not, the change is taken back. A line says what was gained.

    The batches stay the same, in the same order. A change is made between two epochs; in the middle of one where the
    strategy knows the loader's place in it (``bharat_hybrid``, with samplers of torch that have a known order). What
    reads other samples with other workers is found beforehand by reading a few in a worker: random augmentation and
    collating, datasets that count, open files. They are not touched, and a line says why.

    ``persistent_workers`` is left as it is: workers that live on do not see what a dataset is told between epochs.

    Args:
        limit: a share of waiting that is not worth a change; 1.0 only measures.
        redraw: change workers also where random augmentation then draws other numbers.

    Raises:
        ValueError: ``limit`` is not a share.
    """

    def __init__(self, limit: float = 0.02, redraw: bool = False) -> None:
        if not 0 <= limit <= 1:
            raise ValueError(f"limit={limit!r}: write a share of a step from 0 to 1, such as 0.02")
        self.limit, self.redraw = limit, redraw

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._search = Search(self.limit)
        self._setting: Setting | None = None
        self._settled = self.limit == 1
        self._checked = False
        self._batches, self._batch_bytes = 0, 0
        self._began = self._fetched = 0.0
        self._waited, self._logged = _Sums(), _Sums()
        _lightning_loops.around_fetch(trainer, self._fetch_begins, self._fetch_ends)
        self._agreeing = _agreeing(trainer)

    def _fetch_begins(self) -> None:
        if not self._began:  # the iterator, which starts workers, comes before the first batch of an epoch
            self._began = time.perf_counter()

    def _fetch_ends(self) -> None:
        self._fetched = time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = 0.0
        loader = _loader(trainer)
        if self._setting is not None and loader is not None and _setting(loader) != self._setting:
            self._take(trainer, loader, self._setting)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, agreeing = time.perf_counter(), _agreeing(trainer)
        wait = max(0.0, self._fetched - self._began - (agreeing - self._agreeing))
        step, self._began, self._agreeing = now - self._began, 0.0, agreeing
        self._batches += 1
        if self._batches > WARM_UP:
            self._waited.add(wait, step)
        self._logged.add(wait, step)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log(trainer, pl_module)
        if not self._settled and self._waited.steps >= WINDOW:
            self._batch_bytes = sum(leaf.nbytes for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
            loader = _loader(trainer)
            is_last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            if loader is not None and hasattr(loader, "placed_ranks") and not is_last:
                self._tune(trainer, loader)
                if self._setting is not None and _setting(loader) != self._setting:
                    self._take(trainer, loader, self._setting)
                    _lightning_loops.begin_again(trainer, loader)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loader = _loader(trainer)
        if not self._settled and self._waited.steps and loader is not None:
            self._tune(trainer, loader)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        wait, step = _slowest(trainer, [self._logged.wait / self._logged.steps, self._logged.step / self._logged.steps])
        self._logged = _Sums()
        pl_module.log("input_wait", wait / step, prog_bar=True)
        pl_module.log("input_wait_seconds", wait)

    # ---- tuning; all ranks decide by the same numbers

    def _tune(self, trainer: pl.Trainer, loader: DataLoader) -> None:
        """Choose the setting to go on with."""
        sums, self._waited = self._waited, _Sums()
        setting = _setting(loader)
        ahead = setting.prefetch_factor or 0
        most = most_workers(trainer.num_devices, self._batch_bytes)
        workers = setting.num_workers
        mine: list[float] = [sums.wait / sums.steps, sums.step / sums.steps, -most, workers, -workers, ahead, -ahead]
        wait, step, fewest, *given = _slowest(trainer, mine)
        if given != [workers, -workers, ahead, -ahead]:
            self._settle("not all ranks have the same num_workers and prefetch_factor; they stay")
            return
        now = Waited(setting, wait, step)
        chosen, words = self._search.look(now, -int(fewest))
        if words:
            self._say(trainer, words)
        if chosen == setting:
            return
        if chosen.num_workers != workers and not self._checked:
            self._checked = True
            if why := self._why_not(trainer, loader):
                self._settle(f"{now.share:.0%} of a step waits for input, and num_workers={workers} stays: {why}")
                return
        self._setting = chosen

    def _why_not(self, trainer: pl.Trainer, loader: DataLoader) -> str:
        """Why the workers must stay as they are; the same on all ranks."""
        seeded = getattr(loader.batch_sampler, "in_workers", False)  # each sample for itself, by the strategy
        why = "" if self.redraw else why_workers_matter(loader)
        why = "" if seeded and why == RANDOM else why
        if not _slowest(trainer, [float(bool(why))])[0]:
            return ""
        return (why or "on another rank it could give other batches") + "; if that may be, write redraw=True"

    def _settle(self, words: str) -> None:
        self._settled = True
        rank_zero_info(f"DataLoaderTuner: {words}")

    def _say(self, trainer: pl.Trainer, words: str) -> None:
        rank_zero_info(f"DataLoaderTuner: {words}")
        if trainer.is_global_zero:
            events.append(Path(trainer.default_root_dir), "loader", message=words, step=trainer.global_step)

    def _take(self, trainer: pl.Trainer, loader: DataLoader, setting: Setting) -> None:
        _torch.forget_workers(loader)
        loader.num_workers, loader.prefetch_factor = setting.num_workers, setting.prefetch_factor
        loader.pin_memory = loader.pin_memory or trainer.strategy.root_device.type == "cuda"


class _Sums:
    """Seconds of steps."""

    def __init__(self) -> None:
        self.steps, self.wait, self.step = 0, 0.0, 0.0

    def add(self, wait: float, step: float) -> None:
        self.steps, self.wait, self.step = self.steps + 1, self.wait + wait, self.step + step


def _loader(trainer: pl.Trainer) -> DataLoader | None:
    """The one that training reads; ``None`` where there are several, or it is another kind."""
    loaders = _lightning_loops.training_loaders(trainer)
    loader = getattr(loaders[0], "dataloader", loaders[0]) if len(loaders) == 1 else None
    return loader if isinstance(loader, DataLoader) else None


def _setting(loader: DataLoader) -> Setting:
    return Setting(loader.num_workers, loader.prefetch_factor if loader.num_workers else None)


def _agreeing(trainer: pl.Trainer) -> float:
    """Seconds in which ranks compared their batches while they were fetched: no wait for input."""
    return getattr(trainer.strategy, "agreeing_seconds", 0.0)


def _slowest(trainer: pl.Trainer, values: list[float]) -> list[float]:
    """The largest of all ranks' for each."""
    device = trainer.strategy.root_device
    mine = torch.tensor(values, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    return trainer.strategy.reduce(mine, reduce_op="max").tolist()
