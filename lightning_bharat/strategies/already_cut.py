"""A module that an earlier trainer has cut: another one with the same sizes goes on with it, any other is refused."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from lightning_bharat.plan.layout import Layout
from lightning_bharat.strategies.connection import ConnectedStrategy
from lightning_bharat.strategies.options import Options
from lightning_bharat.strategies.refusals import ModuleError

if TYPE_CHECKING:
    from lightning_bharat.strategies.hybrid import HybridStrategy
    from lightning_bharat.strategies.preparation import Preparation

# The options that have changed the module; others are the trainer's own.
_CHANGING = (
    "sequence_parallel",
    "loss_parallel",
    "schedule",
    "reshard_after_forward",
    "reduce_dtype",
    "gradient_compression",
    "activation_checkpointing",
    "offload",
    "compile",
)
_INSTEAD = (
    "Use the same Trainer, or a HybridStrategy with the same arguments; else write a checkpoint, with "
    "save_distributed_checkpoint=False if a plain Trainer is to read it, and load it into a module that is built anew"
)


@dataclass
class _Cut:
    """An attribute of a module: by what it was cut. Copies of the module have ``None`` in its place."""

    preparation: Preparation
    options: Options
    layout: Layout
    precision: Any
    choices: dict[str, str]

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


def remember(strategy: HybridStrategy, preparation: Preparation) -> None:
    """Let later trainers know how the module was prepared."""
    module: Any = preparation.module
    precision = strategy.precision_plugin.precision
    module.cut_by_bharat = _Cut(preparation, strategy.options, strategy.layout, precision, strategy.choices)
    if strategy.world_size > 1:
        module.setup = partial(_setup, module)  # the first of its methods that any trainer calls


def forget(module: pl.LightningModule) -> None:
    """The module is going to be as the person built it."""
    for name in ("cut_by_bharat", "setup"):
        vars(module).pop(name, None)


def take(strategy: HybridStrategy, module: pl.LightningModule) -> Preparation | None:
    """How an earlier trainer prepared ``module``, for ``strategy`` to go on with; ``None``: it is as the person built
    it.

    Raises:
        ModuleError: it was cut in another way.
    """
    cut: _Cut | None = getattr(module, "cut_by_bharat", None)
    if cut is None:
        return None
    for name, was, wanted in _differences(cut, strategy):
        raise ModuleError(
            f"an earlier Trainer has cut the module with {name}={was}, and now {wanted} is asked for. {_INSTEAD}"
        )
    strategy.schedule, strategy.predicted = cut.preparation.strategy.schedule, cut.preparation.strategy.predicted
    cut.preparation.strategy = strategy
    strategy.choices |= cut.choices
    strategy.model = module
    return cut.preparation


def _differences(cut: _Cut, strategy: HybridStrategy) -> list[tuple[str, Any, Any]]:
    before, now = cut.options, strategy.options
    pairs: list[tuple[str, Any, Any]] = [("layout", cut.layout, strategy.layout)]
    pairs += [("precision", cut.precision, strategy.precision_plugin.precision)]
    pairs += [(name, getattr(before, name), getattr(now, name)) for name in _CHANGING]
    found = [pair for pair in pairs if pair[1] != pair[2]]
    if now.plan not in (None, before.plan, cut.preparation.plan):
        found.append(("plan", before.plan, "another one"))
    if now.weights is not None and now.weights is not before.weights:
        found.append(("weights", "others" if before.weights is not None else None, "a start from these"))
    return found


def _setup(module: pl.LightningModule, *args: Any, **kwargs: Any) -> Any:
    cut: _Cut | None = module.cut_by_bharat  # type: ignore[assignment]
    if cut is not None and not isinstance(module.trainer.strategy, ConnectedStrategy):
        raise ModuleError(f"an earlier Trainer has cut the module over ranks ({cut.layout}). {_INSTEAD}")
    return type(module).setup(module, *args, **kwargs)
