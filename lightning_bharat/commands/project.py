"""``bharat fit``, ``validate``, ``test``, ``predict``: LightningCLI for modules and datamodules by class path."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MethodType
from typing import Any, NoReturn

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.cli import (
    LightningArgumentParser,
    LightningCLI,
    LRSchedulerTypeTuple,
    SaveConfigCallback,
    instantiate_class,
)
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_bharat import register
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.commands.signature import HelpFormatter, OneMessage, say_error
from lightning_bharat.data.errors import DataError
from lightning_bharat.plan.blocks import PlanError
from lightning_bharat.plan.layout import LayoutError
from lightning_bharat.strategies.deepspeed_config import ConfigError

_EXAMPLES = {
    "fit": "bharat fit --model my.module.MyModel --data my.data.MyData --trainer.strategy bharat_hybrid "
    "--trainer.devices 4",
    "validate": "bharat validate --config config.yaml --ckpt_path checkpoints/last.ckpt",
    "test": "bharat test --config config.yaml --ckpt_path checkpoints/last.ckpt",
    "predict": "bharat predict --config config.yaml --ckpt_path checkpoints/last.ckpt",
}
_MODULES = (
    "A config of a LightningCLI project works as it is. Where it was written by a command that fixes its classes (no\n"
    "class_path in it), name them before it: --model my.module.MyModel --data my.data.MyData --config config.yaml"
)


_NESTED = re.compile(r"NestedArg\(key='(.*?)', val='?(.*?)'?\)")


class ProjectParser(OneMessage, LightningArgumentParser):
    """LightningCLI's parser with this command's way of saying errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """As :class:`OneMessage`; where a strategy's argument has no class before it, with what to write."""
        if 'key "trainer.strategy"' in message and "NestedArg" in message:
            message = "an argument of a strategy needs its class before it: --trainer.strategy HybridStrategy" + (
                f" --trainer.strategy.{named[1]} {named[2]}" if (named := _NESTED.search(message)) else ""
            )
        super().error(message, ex)

    def instantiate(self, *args: Any, instantiators: Sequence[Any] | None = None, **kwargs: Any) -> Namespace:
        """Build the classes; what a strategy refuses is said in its own words, which a union of types would bury."""
        return super().instantiate(
            *args, instantiators=[*(instantiators or ()), (self._build, Strategy, True)], **kwargs
        )

    def _build(self, kind: type, *args: Any, applied_instantiation_links: Any, **kwargs: Any) -> Any:
        try:
            return kind(*args, **kwargs)
        except (ValueError, ModuleNotFoundError) as error:  # the second: an extra that is not installed
            self.error(str(error))


class BadInput(Exception):
    """Options that can't be done as they are; the message says why."""


BAD_PROJECT = (BadInput, ConfigError, LayoutError, PlanError, CheckpointError, DataError, MisconfigurationException)


class SaveConfig(SaveConfigCallback):
    """LightningCLI's, which never writes over another run's config; said in this command's options."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the config to the run's folder.

        Raises:
            BadInput: on all ranks: a config is there.
        """
        path = Path(trainer.log_dir or "", self.config_filename)
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and trainer.strategy.broadcast(path.is_file()):
            return  # what is there is this run's, of an earlier attempt
        if not self.already_saved and trainer.strategy.broadcast(path.is_file()):
            raise BadInput(
                f"the config of this run would be written over {path}; write another folder, as in "
                "--trainer.default_root_dir runs/2, or let a logger number the folders (--trainer.logger true)"
            )
        super().setup(trainer, pl_module, stage)


class ProjectCLI(LightningCLI):
    """LightningCLI for any module and datamodule by class path.

    ``--optimizer`` and ``--lr_scheduler`` work as in LightningCLI, but are built when the strategy asks for them: by
    then it has put pieces in the place of the parameters that the module had before.

    Args:
        grant: called with the trainer before it runs.
    """

    def __init__(self, grant: Callable[[pl.Trainer], None] | None = None, **kwargs: Any) -> None:
        register()
        self._grant = grant
        kwargs.setdefault("save_config_callback", SaveConfig)
        super().__init__(parser_class=ProjectParser, auto_configure_optimizers=False, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words that :func:`lightning_bharat.cli.main` passed on."""
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_optimizer_args((Optimizer,), "optimizer")
        parser.add_lr_scheduler_args(LRSchedulerTypeTuple, "lr_scheduler")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer; what it refuses is bad input."""
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError) as error:
            raise BadInput(str(error)) from error
        if self._grant is not None:
            self._grant(trainer)
        return trainer

    def after_instantiate_classes(self) -> None:
        configure_optimizers_late(self.model, self.settings)

    @property
    def settings(self) -> Namespace:
        """The options of the command that runs, with its classes instantiated."""
        return self.config_init[self.subcommand] if self.subcommand else self.config_init


def configure_optimizers_late(model: pl.LightningModule, settings: Namespace) -> None:
    """Let ``model`` build the optimizer and scheduler of ``settings``, if they are there, when it is asked for them."""
    optimizer, scheduler = settings.get("optimizer"), settings.get("lr_scheduler")
    if not optimizer:
        if scheduler:
            raise BadInput("--lr_scheduler needs --optimizer; without it configure_optimizers of the module makes both")
        return

    def configure_optimizers(self: pl.LightningModule) -> Any:
        made = instantiate_class(self.parameters(), optimizer)
        return LightningCLI.configure_optimizers(self, made, instantiate_class(made, scheduler) if scheduler else None)

    model.configure_optimizers = MethodType(configure_optimizers, model)  # type: ignore[method-assign]


def _command(name: str) -> Callable[[list[str]], int]:
    def run(words: list[str]) -> int:
        from lightning_bharat.commands.best_layout import HELP, Wish

        method = getattr(pl.Trainer, name)
        description = f"{method.__doc__.strip().splitlines()[0]}\n\nExample:\n    {_EXAMPLES[name]}\n\n{_MODULES}"
        if name == "fit":
            description += f"\n\n{HELP}"
        look = {"description": description, "formatter_class": HelpFormatter}
        try:
            wish = Wish.of(words) if name == "fit" else Wish(tuple(words))
            ProjectCLI(wish.grant, parser_kwargs={"prog": "bharat", name: look}, args=[name, *wish.words])
        except BAD_PROJECT as error:
            say_error(f"bharat {name}", error)
            return 2
        return 0

    run.__name__, run.__doc__ = name, f"Run ``Trainer.{name}`` as the words after ``bharat {name}`` say."
    return run


fit, validate, test, predict = map(_command, ("fit", "validate", "test", "predict"))
