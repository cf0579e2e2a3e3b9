"""Lightning's ModelCheckpoint with its deeds as methods to override; test_private_names.py fails when one moves."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from copy import copy
from datetime import timedelta
from pathlib import Path
from typing import Any
from weakref import proxy

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

# What it remembers of the checkpoints that there are.
_MEMORY = (
    *("best_k_models", "kth_best_model_path", "best_model_score", "best_model_path", "last_model_path"),
    *("kth_value", "current_score", "_last_checkpoint_saved", "_last_global_step_saved"),
)


class OpenModelCheckpoint(ModelCheckpoint):
    """Decides as :class:`ModelCheckpoint` does; what it does then is in :meth:`write`, :meth:`link`, :meth:`remove` and
    :meth:`find_last`, and :meth:`deciding` is around its decisions.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._made_as = super().state_key

    def deciding(self, trainer: pl.Trainer) -> AbstractContextManager:
        """Entered before what is remembered of checkpoints changes, left after they are written. All ranks do."""
        return nullcontext()

    def write(self, trainer: pl.Trainer, path: str) -> None:
        """Write a checkpoint to ``path``. All ranks call it."""
        trainer.save_checkpoint(path, self.save_weights_only)

    def link(self, trainer: pl.Trainer, path: str, name: str) -> None:
        """Let ``name`` be a symbolic link to ``path``. All ranks call it."""
        ModelCheckpoint._link_checkpoint(trainer, path, name)

    def remove(self, trainer: pl.Trainer, path: str) -> None:
        """Remove the checkpoint ``path``. All ranks call it."""
        trainer.strategy.remove_checkpoint(path)

    def find_last(self, trainer: pl.Trainer) -> set[str]:
        """What ``ckpt_path="last"`` chooses the newest of."""
        return super()._find_last_checkpoints(trainer)

    def find_best(self, trainer: pl.Trainer) -> None:
        """Set ``best_model_path`` where it is not known yet; called for ``ckpt_path="best"``."""

    def may_remove(self, path: str) -> bool:
        """Whether the checkpoint that the run went on from may be removed when it is replaced."""
        return False

    # ---- for its children

    def remembered(self) -> dict[str, Any]:
        """What is known of the checkpoints that there are, for :meth:`remember`."""
        return {name: copy(getattr(self, name)) for name in _MEMORY}

    @staticmethod
    def paths(remembered: dict[str, Any]) -> set[str]:
        """Of all checkpoints that :meth:`remembered` speaks of."""
        found = {remembered["best_model_path"], remembered["kth_best_model_path"], remembered["last_model_path"]}
        return (found | set(remembered["best_k_models"])) - {""}

    def remember(self, before: dict[str, Any]) -> None:
        """Let it be as if nothing had been saved since ``before``."""
        vars(self).update(before)

    def is_saved(self, trainer: pl.Trainer) -> bool:
        """Whether the state after this step has been saved."""
        return self._last_global_step_saved == trainer.global_step

    def save_last_now(self, trainer: pl.Trainer) -> None:
        """Save the "last" checkpoint, whatever ``save_last`` says. All ranks must call it."""
        asked, self.save_last = self.save_last, self.save_last or True
        try:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        finally:
            self.save_last = asked

    def next_last_path(self, trainer: pl.Trainer) -> str:
        """Where the "last" checkpoint of this step goes. All ranks must call it."""
        name, candidates = self.CHECKPOINT_NAME_LAST, self._monitor_candidates(trainer)
        path, version = self.format_checkpoint_name(candidates, name), self.STARTING_VERSION
        while self._enable_version_counter and path != self.last_model_path and self.file_exists(path, trainer):
            path, version = self.format_checkpoint_name(candidates, name, ver=version), version + 1
        return path

    def folder(self, trainer: pl.Trainer) -> Path:
        """Where checkpoints go, by ``dirpath`` or the logger's folder."""
        return Path(self._ModelCheckpoint__resolve_ckpt_dir(trainer))  # type: ignore[attr-defined]

    def save_by_own_clock(self) -> None:
        """Save when :meth:`let_time_be` says, and at no other time."""
        self._every_n_epochs = self._every_n_train_steps = 0

    def let_time_be(self, due: bool) -> None:
        """Whether a save is due after this batch, by another clock than ``train_time_interval``."""
        self._train_time_interval = timedelta(0) if due else None

    def tell_loggers(self, trainer: pl.Trainer) -> None:
        """Loggers may look at the checkpoints that there are."""
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    @property
    def state_key(self) -> str:
        """Its name in checkpoints, as it was made."""
        return self._made_as

    # ---- Lightning's

    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Any]) -> None:
        with self.deciding(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Any]) -> None:
        if self.save_last:
            with self.deciding(trainer):
                super()._save_last_checkpoint(trainer, monitor_candidates)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        self.write(trainer, filepath)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath

    def _link_checkpoint(self, trainer: pl.Trainer, filepath: str, linkpath: str) -> None:  # type: ignore[override]
        self.link(trainer, filepath, linkpath)

    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        self.remove(trainer, filepath)

    def _should_remove_checkpoint(self, trainer: pl.Trainer, previous: str, current: str) -> bool:
        if previous != current and self.may_remove(previous):
            return True
        return super()._should_remove_checkpoint(trainer, previous, current)

    def _find_last_checkpoints(self, trainer: pl.Trainer) -> set[str]:
        return self.find_last(trainer)
