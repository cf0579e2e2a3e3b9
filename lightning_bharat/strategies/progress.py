"""Tells the launcher how far the trainer is: ``bharat launch`` finds a rank that hangs by it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_bharat.cluster import heartbeat


def tell_progress(trainer: pl.Trainer) -> None:
    """Let ``trainer`` say what it does, if a launcher looks at it. Called when one of its functions begins."""
    if not heartbeat.is_watched():
        return
    heartbeat.tell_run(trainer.default_root_dir)
    heartbeat.progress("setup")
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(callback, _Progress) for callback in callbacks):
        callbacks.insert(0, _Progress())


class _Progress(pl.Callback):
    """First of the callbacks: what others do in a hook, such as to save, comes after it."""

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        heartbeat.progress("step", trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        heartbeat.progress("step")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        heartbeat.progress("step", trainer.global_step)

    def on_save_checkpoint(self, *_: Any) -> None:
        heartbeat.progress("save")

    def on_train_end(self, *_: Any) -> None:
        heartbeat.progress("end")

    def on_validation_start(self, *_: Any) -> None:
        heartbeat.progress("validation")

    def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
        heartbeat.progress("validation")

    def on_validation_end(self, *_: Any) -> None:
        heartbeat.progress("end")

    def on_test_start(self, *_: Any) -> None:
        heartbeat.progress("validation")

    def on_test_batch_start(self, *_: Any, **__: Any) -> None:
        heartbeat.progress("validation")

    def on_test_end(self, *_: Any) -> None:
        heartbeat.progress("end")

    def on_predict_start(self, *_: Any) -> None:
        heartbeat.progress("validation")

    def on_predict_batch_start(self, *_: Any, **__: Any) -> None:
        heartbeat.progress("validation")

    def on_predict_end(self, *_: Any) -> None:
        heartbeat.progress("end")
