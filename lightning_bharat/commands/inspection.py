"""Looking at a LightningCLI project without training it: its parser, and its module on ``meta`` inside its trainer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_bharat.commands.project import BadInput, ProjectCLI, configure_optimizers_late
from lightning_bharat.commands.signature import HelpFormatter

Look = Callable[[pl.Trainer, pl.LightningModule], None]

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
# What of a project's trainer changes what a step computes or what a rank holds.
_KEPT = ("precision", "max_steps", "max_epochs", "accumulate_grad_batches", "limit_train_batches")


class InspectionCLI(ProjectCLI):
    """A project's parser for commands that are not the Trainer's; it takes the configs that ``bharat fit`` saves.

    Nothing is built before it is asked for. Subclasses add their own options in :meth:`add_options`.
    """

    def __init__(self, prog: str, description: str, words: list[str]) -> None:
        look = {"prog": prog, "description": description, "formatter_class": HelpFormatter}
        super().__init__(run=False, parser_kwargs=look, load_from_checkpoint_support=False, args=words)

    def add_options(self, parser: LightningArgumentParser) -> None:
        """Add the command's own options."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.add_options(parser)
        super().add_arguments_to_parser(parser)
        skip: set[str | int] = {"model", "train_dataloaders", "val_dataloaders", "datamodule"}
        parser.add_method_arguments(pl.Trainer, "fit", skip=skip)

    def instantiate_classes(self) -> None:
        """Nothing yet."""

    def after_instantiate_classes(self) -> None:
        """Nothing yet."""

    def build(self, meta: bool = False) -> tuple[pl.LightningModule, pl.LightningDataModule | None]:
        """The project's module and datamodule.

        Args:
            meta: build the module on ``meta``, where it takes no memory, however large it is.

        Raises:
            BadInput: the module can't be built on ``meta``.
        """
        options = self.config.clone()
        options.pop("trainer")
        try:
            made = self.parser.instantiate(options, instantiators=[(_on_meta, nn.Module, True)] if meta else None)
        except ValueError as error:  # jsonargparse wraps what a class raises
            raise _bad_input_in(error) or error from None
        configure_optimizers_late(made.model, made)
        return made.model, made.get("data")

    def trainer_settings(self, *names: str) -> dict[str, Any]:
        """Those of the project's settings of its trainer that are set."""
        return {name: self.config.trainer[name] for name in names if self.config.trainer.get(name) is not None}

    def look_on_meta(self, look: Look) -> None:
        """Build the module on ``meta`` and the data as they are, go as far as a fit goes before it places the module on
        devices, and call ``look(trainer, module)``.

        Raises:
            BadInput: the module can't be built on ``meta``.
        """
        module, data = self.build(meta=True)
        settings = {"max_epochs": 1, **QUIET, **self.trainer_settings(*_KEPT)}
        with suppress(_Looked):
            pl.Trainer(strategy=_Look(look), accelerator="cpu", **settings).fit(module, datamodule=data)


def quiet() -> None:
    """Keep Lightning's remarks about accelerators, seeds and epochs out of a command's own output."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")


class _Looked(Exception):
    """All was seen; the fit ends here."""


class _Look(SingleDeviceStrategy):
    """Looks at the module where other strategies begin to place it on devices."""

    def __init__(self, look: Look) -> None:
        super().__init__(device="cpu")
        self._look = look

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Also what ``configure_model`` makes is on ``meta``."""
        with super().tensor_init_context(empty_init), torch.device("meta"):
            yield

    def setup(self, trainer: pl.Trainer) -> None:
        assert self.lightning_module is not None
        self._look(trainer, self.precision_plugin.convert_module(self.lightning_module))  # type: ignore[arg-type]
        raise _Looked

    def teardown(self) -> None:
        """Nothing was placed anywhere."""


def _on_meta(kind: type[nn.Module], *args: Any, applied_instantiation_links: dict, **kwargs: Any) -> nn.Module:
    try:
        with torch.device("meta"):
            return kind(*args, **kwargs)
    except NotImplementedError as error:
        raise BadInput(
            f"{kind.__qualname__} could not be built on meta, without memory: {error}. Keep the values of tensors out "
            "of its __init__ (no .item() or .tolist() of what it has just made)"
        ) from error


def _bad_input_in(error: BaseException | None) -> BadInput | None:
    while error is not None and not isinstance(error, BadInput):
        error = error.__cause__
    return error
