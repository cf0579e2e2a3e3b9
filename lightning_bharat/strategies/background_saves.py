"""When a strategy's checkpoints are written: at once, or beside training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lightning_bharat.checkpoints.background import Background, InStore
from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.checkpoints.saving import Saver, Saving
from lightning_bharat.strategies._torch import default_store

_runs = count()


class BackgroundSaves:
    """The saves of a strategy that has the attributes ``watch`` and ``options``.

    Attributes:
        writer: runs what has been put off. One save at a time: the next one waits for it.
        last: the save that was begun last.
    """

    def __init__(self, strategy: Any) -> None:
        self.writer = Background()
        self.last: Saving | None = None
        self._saver, self._strategy = Saver(), strategy
        self._ranks: InStore | None = None
        self._puts_off = False

    @contextmanager
    def put_off(self) -> Iterator[None]:
        """In here a save returns when the values have been copied to host memory; ``writer`` does the rest."""
        self._puts_off = True
        try:
            yield
        finally:
            self._puts_off = False

    def save(self, path: Path, checkpoint: dict[str, Any], manifest: Manifest) -> None:
        """Save, or begin to. All ranks must call it.

        Raises:
            CheckpointError: on every rank with the same words; of what is put off, ``writer`` has the error.
        """
        self.writer.wait()
        if not self._puts_off:
            self._saver.save(path, checkpoint, manifest)
            return
        if self._ranks is None:
            self._ranks = self._meet()
        self.last, ranks = self._saver.begin(path, checkpoint, manifest, copy=True), self._ranks
        self.writer.do(lambda saving=self.last: saving.write(ranks))  # type: ignore[misc]

    def _meet(self) -> InStore:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return InStore(dist.HashStore(), 0, 1)
        # A process may run several trainers, and torchelastic's restarts share one store.
        prefix = f"saves/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_runs)}"
        store = dist.PrefixStore(prefix, default_store())
        patience = self._strategy.options.timeout
        return InStore(
            store, dist.get_rank(), dist.get_world_size(), self._lost, patience.total_seconds() if patience else 1800
        )

    def _lost(self) -> str:
        first = self._strategy.watch and self._strategy.watch.first
        return str(first) if first and first.is_gone else ""
