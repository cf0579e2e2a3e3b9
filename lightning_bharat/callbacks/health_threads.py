"""The threads of a monitored run: connected to its strategy's store, ranks and names."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from lightning_bharat.callbacks.health_record import Record
from lightning_bharat.cluster import last_words
from lightning_bharat.health.finding import EXIT_CODE, Finding, HealthError
from lightning_bharat.health.policy import KINDS, Policy
from lightning_bharat.health.prober import Intervals, Prober
from lightning_bharat.health.progress import Progress
from lightning_bharat.health.watcher import Watcher
from lightning_bharat.strategies._torch import default_store, flight_record
from lightning_bharat.strategies.hybrid import HybridStrategy
from lightning_bharat.strategies.liveness import watched_ranks

_runs = count()


class Threads:
    """Started for one call of ``fit``.

    Args:
        policy: of each kind.
        record: where findings are written that need no decision of all ranks.
        inbox: takes the others.
        folders: that the run writes to.
        hang_seconds: as of the watcher.
        silence_seconds: as of the watcher.
        intervals: of the prober.

    Attributes:
        progress: to be told by the main thread.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        policy: Policy,
        record: Record,
        inbox: Callable[[Finding], None],
        folders: Sequence[Path],
        hang_seconds: float,
        silence_seconds: float,
        intervals: Intervals,
    ) -> None:
        self.progress = Progress()
        self._policy, self._record, self._inbox, self.trainer = policy, record, inbox, trainer
        strategy: Any = trainer.strategy
        self._peers = getattr(strategy, "watch", None)  # how a rank's error ends all, where the strategy has that
        store = _store()
        rank, world, name = trainer.global_rank, trainer.world_size, rank_name(trainer)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or trainer.num_devices
        watched = watched_ranks(rank, world, local) if store is not None else []
        self._watcher: Watcher | None = None
        if policy.wants("hang", "silent"):
            self._watcher = Watcher(
                *(store, rank, name, watched, world, self.progress, hang_seconds, silence_seconds),
                *(record.folder / "health", self._stands_still, flight_record),
            )
        kinds = [kind for kind in KINDS if policy.wants(kind)]
        written = [record.folder, Path(tempfile.gettempdir()), *_checkpoint_folders(trainer), *folders]
        self._prober = Prober(
            *(kinds, store, rank, world, name, trainer.local_rank, strategy.root_device, written),
            *(self.progress, self._found, intervals),
        )

    def start(self) -> None:
        """Begin to watch."""
        if self._watcher is not None:
            self._watcher.announce()
            self._watcher.start()
        self._prober.start()

    def stop(self) -> None:
        """Watch no more."""
        if self._watcher is not None:
            self._watcher.stop()
        self._prober.stop()

    # ---- called in threads

    def _found(self, finding: Finding) -> None:
        action = self._policy[finding.kind]
        if action == "log":
            self._record.write([finding], action, self.progress.step)
        elif action != "ignore":
            self._inbox(finding)

    def _stands_still(self, finding: Finding) -> None:
        """All ranks hear the same, and none can wait for its main thread."""
        action = self._policy[finding.kind]
        mute = finding.facts.get("ranks", []) if finding.kind == "silent" else []
        writer = next(rank for rank in (*range(self.trainer.world_size), 0) if rank not in mute)
        if self.trainer.global_rank == writer and action != "ignore":
            self._record.write([finding], action, self.progress.step)
        if action in ("restart", "leave_node"):
            self._end(HealthError(action, [finding]))

    def _end(self, error: HealthError) -> None:
        if self._peers is not None and self._peers.is_running:
            telling = threading.Thread(target=self._peers.report, args=(error,), daemon=True)
            telling.start()  # the store may be what does not answer
            telling.join(3)
        last_words.say(type(error).__name__, str(error))
        os.write(2, f"{rank_name(self.trainer)(self.trainer.global_rank)} ends: HealthError: {error}\n".encode())
        sys.stdout.flush()
        os._exit(EXIT_CODE)


def rank_name(trainer: pl.Trainer) -> Callable[[int], str]:
    """A rank's name in messages."""
    strategy = trainer.strategy
    return strategy.layout.name if isinstance(strategy, HybridStrategy) else "rank {}".format


def here(trainer: pl.Trainer) -> str:
    """This rank and its host, in words."""
    return f"{rank_name(trainer)(trainer.global_rank)} on {os.uname().nodename}"


def _store() -> dist.Store | None:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    # A process may run several trainers, and torchelastic's restarts share one store.
    return dist.PrefixStore(
        f"health/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_runs)}", default_store()
    )


def _checkpoint_folders(trainer: pl.Trainer) -> list[Path]:
    folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    return [Path(folder) for folder in folders if folder]
