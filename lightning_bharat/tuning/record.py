"""What a trial leaves about itself beside its values: code, data, memory, time, steps and tokens."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

GIT_SECONDS = 5.0  # for a repository on a slow disk; a trial is not held up for longer


def code_version(folder: str | os.PathLike[str] = ".") -> dict[str, Any] | None:
    """The commit that the code in ``folder`` is at.

    Returns:
        ``{"commit": 40 digits, "dirty": whether tracked files differ from it}``; ``None`` without git or a commit.
    """
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if not commit:
        return None
    # what is not tracked is left alone: a study's own folder is often in the repository
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return None if changed is None else {"commit": commit, "dirty": bool(changed)}


def data_version(datamodule: object) -> str | None:
    """Names the content of a datamodule's data, as far as it is known without reading them.

    Of :class:`~lightning_bharat.datamodules.TokenDataModule` it is the digest of each prepared split; of others their
    attribute ``data_version`` or ``version``, if that is a text or a number.

    Returns:
        ``None`` where nothing is known.
    """
    prepared = getattr(datamodule, "_prepared", None)  # the property would open what is not prepared yet
    if prepared is not None and hasattr(prepared, "digest"):
        return ", ".join(f"{split} {prepared.digest(split)}" for split in prepared.splits)
    for name in ("data_version", "version"):
        found = getattr(datamodule, name, None)
        if isinstance(found, (str, int, float)) and not isinstance(found, bool):
            return str(found)
    return None


def peak_memory(device: torch.device | None = None) -> int:
    """Bytes that this process held at most: on ``device`` if that is a GPU, else resident in the host's memory."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class TrialRecorder(pl.Callback):
    """Counts what a fit costs. Give it to the trial's Trainer, and ask for :meth:`record` on rank 0 afterwards.

    After a fit that ends by itself, memory is the largest rank's and tokens are those of all data ranks, by one
    exchange at its end. After an error there is none, since other ranks may be gone: then memory is this rank's, and
    tokens are taken to be as many on each data rank as here.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._began: float | None = None
        self._seconds: float | None = None
        self._steps_before = self._steps = 0
        self._tokens: int | None = None
        self._peak: int | None = None
        self._data: str | None = None

    def record(self) -> dict[str, Any]:
        """The trial's user attributes ``seconds``, ``steps``, ``tokens``, ``peak_memory_bytes`` and ``data``.

        ``steps`` and ``tokens`` are of this fit alone, not of one that it went on from. ``tokens`` counts all places of
        ``input_ids`` in training batches; ``None`` where batches have none.
        """
        return {
            "seconds": self._seconds,
            "steps": self._steps,
            "tokens": self._tokens,
            "peak_memory_bytes": self._peak,
            "data": self._data,
        }

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._forget()  # a second fit has a record of its own
        self._began = time.monotonic()
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps_before = trainer.global_step
        self._data = data_version(getattr(trainer, "datamodule", None))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if isinstance(ids, Tensor):
            self._tokens = (self._tokens or 0) + ids.numel()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._note(trainer)
        # not the strategy's all_gather: that one may be over data ranks alone
        if not (dist.is_available() and dist.is_initialized()) or (world := dist.get_world_size()) == 1:
            return
        tokens = -1 if self._tokens is None else self._tokens
        mine = torch.tensor([self._peak or 0, tokens], dtype=torch.int64, device=trainer.strategy.root_device)
        gathered = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(gathered, mine)
        peaks, counts = zip(*(ranks.tolist() for ranks in gathered), strict=True)
        self._peak = max(peaks)
        if min(counts) >= 0:  # ranks that share a batch have counted the same one
            self._tokens = sum(counts) * _data_ranks(trainer) // world

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._note(trainer)
        if self._tokens is not None:
            self._tokens *= _data_ranks(trainer)

    def _note(self, trainer: pl.Trainer) -> None:
        if self._began is not None:
            self._seconds = time.monotonic() - self._began
        self._steps = trainer.global_step - self._steps_before
        self._peak = peak_memory(trainer.strategy.root_device)


def _data_ranks(trainer: pl.Trainer) -> int:
    """How many ranks read different batches: the strategy knows."""
    kwargs = trainer.distributed_sampler_kwargs
    return int(kwargs["num_replicas"]) if kwargs else 1


def _git(folder: str | os.PathLike[str], *words: str) -> str | None:
    """What git says; ``None``: there is no git, no repository, or no answer in time."""
    try:
        done = subprocess.run(
            ["git", "-C", os.fspath(folder), "--no-optional-locks", *words],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=GIT_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
