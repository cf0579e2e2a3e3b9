"""What the ranks of ``bharat verify`` do: a few steps of a project's module, with everything written down."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from lightning_bharat.commands.inspection import QUIET, InspectionCLI, quiet
from lightning_bharat.commands.no_dropout import NoDropout
from lightning_bharat.commands.sized_strategy import sized_strategy
from lightning_bharat.plan.elsewhere import is_elsewhere
from lightning_bharat.plan.layout import Layout
from lightning_bharat.plan.shards import fill, gather

# What of a project's trainer changes what a step computes.
_KEPT = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")

DESCRIPTION = """\
Compare a few steps of a module whole, on one rank, with the same steps cut over many.

Both start from the same weights and see the same batches, in float64. Losses, gradients and the weights at the end are
compared, and the exit code is 0 if all are equal, else 1. Dropout is switched off for the comparison. All of it runs
on this machine's CPU: set the sizes of the model to small ones.

Example:
    bharat verify --config config.yaml --model.width 64 --model.depth 2
    bharat verify --config config.yaml --layout tensor=2 data=2,pipeline=2 --steps 5
"""


class VerifyCLI(InspectionCLI):
    """The parser of ``bharat verify``, for the command and for its ranks."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        super().__init__("bharat verify", DESCRIPTION, words)

    def add_options(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--layout", nargs="+", type=str, default=["data=2,tensor=2"], help="Layouts to compare with one rank."
        )
        parser.add_argument("--steps", type=PositiveInt, default=3, help="Optimizer steps.")
        parser.add_argument(
            "--double",
            type=bool,
            default=True,
            help="In float64, where equal means equal to 1e-9; else in float32.",
        )
        parser.add_argument("--timeout", type=PositiveFloat, default=300, help="Seconds for each layout.")

    @property
    def accumulate(self) -> int:
        """Batches of a rank in one optimizer step."""
        return self.config.trainer.get("accumulate_grad_batches") or 1


@dataclass
class Record:
    """What one run did.

    Attributes:
        batches: those that it trained on, in order.
        start: weights and buffers before the first step, whole, by name.
        losses: for each batch, as Lightning reports it: divided by the number of batches in a step.
        gradients: for each optimizer step, whole, by name, before clipping.
        end: weights after the last step.
        notes: what the reader of the comparison must know.
    """

    batches: list[Any] = field(default_factory=list)
    start: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    end: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)


def run_whole(words: list[str], data: int) -> Record:
    """On one rank: the steps that ``data`` data ranks share, by accumulating their batches."""
    quiet()
    cli, record = VerifyCLI(words), Record()
    module, datamodule = cli.build()
    needed = data * cli.accumulate * cli.config.steps
    if not module.automatic_optimization and data * cli.accumulate > 1:
        raise NotImplementedError(
            "a module that optimizes by hand can't accumulate the batches of data ranks on one rank; "
            "compare tensor cuts alone: --layout tensor=2"
        )

    def taken(loaders: Any) -> list[Any]:
        record.batches = _take(loaders, needed)
        return record.batches

    _give_batches(module, datamodule, taken)
    ours = sized_strategy(cli, Layout())  # where Lightning's own strategy on one device does not do the same work
    plain = not is_overridden("configure_model", module) and not ours.options.token_weighted
    _fit(cli, module, datamodule, "auto" if plain else ours, 1, data * cli.accumulate, _Recorder(record, None))
    return record


def run_cut(words: list[str], layout: Layout, batches: list[Any], start: dict[str, Tensor]) -> Record:
    """On one of the ranks of ``layout``: the same steps, with its share of ``batches``."""
    quiet()
    cli, record = VerifyCLI(words), Record()
    module, datamodule = cli.build()
    own = layout.coordinates(int(os.environ["RANK"]))["data"]
    _give_batches(module, datamodule, lambda _: batches[own :: layout.data])
    _fit(cli, module, datamodule, sized_strategy(cli, layout), layout.devices, cli.accumulate, _Recorder(record, start))
    return record


class _Batches:
    """Batches as a loader. Not a list, which Lightning takes for several loaders."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _give_batches(
    module: pl.LightningModule,
    datamodule: pl.LightningDataModule | None,
    choose: Callable[[Callable[[], Any]], list[Any]],
) -> None:
    """Let the training loader be what ``choose`` makes of the project's own hook."""
    owner: Any = datamodule if datamodule is not None else module
    loaders = owner.train_dataloader
    owner.train_dataloader = lambda: _Batches(choose(loaders))


def _take(loaders: Any, number: int) -> list[Any]:
    """The first ``number`` batches as Lightning would combine them, over as many epochs as that takes."""
    taken: list[Any] = []
    combined = CombinedLoader(loaders(), "max_size_cycle")
    while len(taken) < number:
        before = len(taken)
        taken.extend(batch for batch, _, _ in islice(iter(combined), number - before))
        if len(taken) == before:
            raise ValueError("the training loader gives no batches")
    return taken


def _fit(
    cli: VerifyCLI,
    module: pl.LightningModule,
    datamodule: pl.LightningDataModule | None,
    strategy: Any,
    devices: int,
    accumulate: int,
    recorder: _Recorder,
) -> None:
    pl.seed_everything(cli.config.seed_everything, verbose=False)
    settings = {**cli.trainer_settings(*_KEPT), **QUIET}
    if module.automatic_optimization:
        settings["accumulate_grad_batches"] = accumulate
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=devices,
        precision="64-true" if cli.config.double else "32-true",
        max_steps=cli.config.steps,
        limit_val_batches=0,
        use_distributed_sampler=False,
        callbacks=[recorder],
        **settings,
    )
    with recorder.no_dropout:
        trainer.fit(module, datamodule=datamodule)


class _Recorder(pl.Callback):
    """Writes down whole values, on every rank those of its pipeline stages."""

    def __init__(self, record: Record, start: dict[str, Tensor] | None) -> None:
        self.record, self.start, self.no_dropout = record, start, NoDropout()
        self._random_state = torch.empty(0)

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.no_dropout.switch_off(module)
        slices = self._slices(trainer)
        if self.start is None:
            self.record.start = {**self._weights(trainer, module), **{n: b.clone() for n, b in module.named_buffers()}}
            return
        for name, parameter in module.named_parameters():
            if not is_elsewhere(parameter):
                fill(parameter, slices.get(name), self.start[name])
        for name, buffer in module.named_buffers():
            buffer.copy_(self.start[name])

    def on_train_batch_start(self, *_: Any) -> None:
        self._random_state = torch.get_rng_state()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self.record.losses.append(loss.item())
        if self.start is None and not torch.equal(self._random_state, torch.get_rng_state()):
            self.record.notes["The step draws random numbers that are not dropout; ranks may draw others."] = None

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer) -> None:
        own = {p for group in optimizer.param_groups for p in group["params"]}
        slices, group = self._slices(trainer), getattr(trainer.strategy, "tensor_group", None)
        self.record.gradients.append(
            {
                name: gather(parameter.grad, slices.get(name), group).clone()
                for name, parameter in module.named_parameters()
                if parameter in own and parameter.grad is not None
            }
        )

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.record.end = self._weights(trainer, module)
        if self.no_dropout.met:
            self.record.notes["Dropout was switched off: what it drops differs from rank to rank by design."] = None

    @staticmethod
    def _slices(trainer: pl.Trainer) -> dict:
        return getattr(trainer.strategy, "slices", {})

    def _weights(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Tensor]:
        slices, group = self._slices(trainer), getattr(trainer.strategy, "tensor_group", None)
        here = [(name, p) for name, p in module.named_parameters() if not is_elsewhere(p)]
        return {name: gather(p, slices.get(name), group).clone() for name, p in here}
