"""Private names of Lightning's loops: where their batches come from, and calls around what they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader


def step_and_source(trainer: pl.Trainer) -> tuple[str, Any]:
    """The step that the trainer is about to run, and where its loader comes from."""
    loops: dict[Any, tuple[str, Any]] = {
        TrainerFn.VALIDATING: ("validation_step", trainer.validate_loop),
        TrainerFn.TESTING: ("test_step", trainer.test_loop),
        TrainerFn.PREDICTING: ("predict_step", trainer.predict_loop),
    }
    name, loop = loops.get(trainer.state.fn, ("training_step", trainer.fit_loop))
    return name, loop._data_source


def loaders_of(trainer: pl.Trainer) -> tuple[Any, bool, Callable[[], None]]:
    """The loaders that the trainer is about to go through, as the person gives them; whether a batch has a part of
    each; and a function that makes the trainer take the same ones, without asking for them again."""
    source = step_and_source(trainer)[1]
    asked, loaders = source.instance, _request_dataloader(source)

    def once() -> Any:
        del source.dataloader
        return loaders if source.instance is asked else source.dataloader()

    def keep() -> None:
        source.dataloader = once

    if isinstance(loaders, CombinedLoader):
        return loaders.iterables, loaders._mode != "sequential", keep
    return loaders, trainer.state.fn == TrainerFn.FITTING, keep


def agree_on_stopping(trainer: pl.Trainer, agree: Callable[[bool], bool]) -> None:
    """Let all ranks stop training at the same batch when ``trainer.should_stop`` is set on one of them.

    Args:
        agree: whether it is set on some rank, from whether it is on this one.
    """

    def look() -> None:
        trainer.should_stop = agree(trainer.should_stop)

    loop = trainer.fit_loop
    # Around these, hooks that may set it have been called, and what reads it comes next.
    around(loop, "setup_data", before=look)
    around(loop, "on_run_start", after=look)
    around(loop, "on_advance_start", after=look)
    around(trainer._logger_connector, "update_train_step_metrics", before=look)
    around(loop.epoch_loop.val_loop, "run", after=look)
    around(loop, "on_advance_end", after=look)


def _nothing() -> None: ...


def around(
    owner: Any,
    name: str,
    before: Callable[[], None] = _nothing,
    after: Callable[[], None] = _nothing,
    what: str = "stopping",
) -> None:
    """Call ``before`` and ``after`` whenever ``owner.name`` is called; one pair for each ``what``."""
    pairs = owner.__dict__.setdefault("bharat_around", {}).setdefault(name, {})
    pairs[what] = before, after
    method = getattr(type(owner), name)

    def around(*args: Any, **kwargs: Any) -> Any:
        for first, _ in list(pairs.values()):
            first()
        out = method(owner, *args, **kwargs)
        for _, last in list(pairs.values()):  # one of them may take itself out
            last()
        return out

    setattr(owner, name, around)


def after_each_batch(trainer: pl.Trainer, ended: Callable[[], None]) -> None:
    """Call ``ended`` when a batch of training is through with all that Lightning does for it: hooks, schedulers, logs,
    validation."""
    around(trainer.fit_loop.epoch_loop, "on_advance_end", after=ended, what="batch")


def around_fetch(trainer: pl.Trainer, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Call ``begin`` before training asks for a batch, or for an iterator at the start of an epoch, and ``end`` when it
    has the batch."""
    loop = trainer.fit_loop.epoch_loop
    around(loop, "on_run_start", before=begin, what="fetch")
    around(loop, "_on_before_fetch", before=begin, what="fetch")
    around(loop, "_on_after_fetch", after=end, what="fetch")


def before_each_batch(trainer: pl.Trainer, begin: Callable[[], None]) -> None:
    """Call ``begin`` before training asks for a batch, where all that belongs to the one before is through."""
    around(trainer.fit_loop.epoch_loop, "advance", before=begin, what="groups")


def around_training_loaders(trainer: pl.Trainer, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Call ``begin`` before the trainer may make its training loaders, and ``end`` after."""
    around(trainer.fit_loop, "setup_data", begin, end, what="loaders")


def training_loaders(trainer: pl.Trainer) -> list[Any]:
    """Those that training goes through."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def begin_again(trainer: pl.Trainer, loader: Any) -> None:
    """Let training take its next batches from a new iterator over ``loader``, which has a state, from where the last
    finished batch ends. The random numbers of this process stay as they are."""
    loader.load_state_dict(loader.state_dict())
    iterate_anew(trainer)


def iterate_anew(trainer: pl.Trainer) -> None:
    """Let training take its next batches from a new iterator, whose loader begins behind the last finished batch."""
    loop: Any = trainer.fit_loop
    state = torch.get_rng_state()
    iter(loop._data_fetcher)
    torch.set_rng_state(state)
    loop._data_fetcher.fetched += loop.epoch_loop.batch_progress.current.ready


def accumulates(trainer: pl.Trainer) -> bool:
    """Whether the batch that is being run is followed by another one before the optimizer steps."""
    return trainer.fit_loop._should_accumulate()


def trained_batches(trainer: pl.Trainer) -> int:
    """How many batches this rank has trained on, in all epochs."""
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return total.processed


def in_window(trainer: pl.Trainer) -> bool:
    """Whether batches were trained on whose gradients no step of the optimizer has used yet."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    done = progress.current.processed
    fitting = trainer.state.fn == TrainerFn.FITTING and trainer.lightning_module.automatic_optimization
    last = (progress.is_last_batch and done == progress.current.ready) or done >= trainer.num_training_batches
    return fitting and not last and done % trainer.accumulate_grad_batches != 0


def validation_is_due(trainer: pl.Trainer) -> bool:
    """Whether ``fit`` validates after the batch that has just been trained; ask in ``on_train_batch_end``."""
    loop: Any = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def use_no_grad(trainer: pl.Trainer) -> None:
    """Evaluate under ``no_grad``: tensors of ``inference_mode`` can't be gathered into parameters that train later."""
    for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop, trainer.fit_loop.epoch_loop.val_loop):
        loop.inference_mode = False
