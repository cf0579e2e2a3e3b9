"""What the ranks of a trial do: one fit of a project's config, or a person's objective function."""

from __future__ import annotations

import difflib
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser
from optuna import TrialPruned

from lightning_bharat.callbacks.optuna_pruning import OptunaPruning
from lightning_bharat.cluster.rank_main import ask
from lightning_bharat.commands.project import ProjectCLI
from lightning_bharat.tuning import current, fit_parser
from lightning_bharat.tuning.generation import Generation, GenerationEnd
from lightning_bharat.tuning.grouping import group_loggers
from lightning_bharat.tuning.idle_cores import IdleCores
from lightning_bharat.tuning.record import TrialRecorder
from lightning_bharat.tuning.remote_trial import RemoteTrial

CONFIG = "config.yaml"


@dataclass(frozen=True)
class Orders:
    """For the ranks of one trial.

    Attributes:
        study: its name.
        number: of the trial.
        folder: the trial's.
        cores: on which these ranks run.
        params: values that are chosen already, by key.
        user_attrs: what the trial was enqueued with.
        config: the study's own, which ``bharat fit`` takes.
        monitors: metrics that are the trial's values.
        ckpt_path: of the trial that this one retries, where the fit goes on.
        prune: whether the first monitored metric is reported while the fit runs.
        idle_cores: whether the trial asks for the cores of idle workers.
        generation: of a population's member, at whose end the fit ends; ``None``: it is a whole one.
    """

    study: str
    number: int
    folder: Path
    cores: tuple[int, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    user_attrs: Mapping[str, Any] = field(default_factory=dict)
    config: Path = Path(CONFIG)
    monitors: Sequence[str] = ()
    ckpt_path: str | None = None
    prune: bool = True
    idle_cores: bool = False
    generation: Generation | None = None

    @property
    def begins(self) -> str | None:
        """The checkpoint that the fit goes on from."""
        donor = self.generation.begins if self.generation else None
        return self.ckpt_path or (str(donor) if donor else None)

    @property
    def words(self) -> list[str]:
        """What follows ``bharat fit``."""
        return [f"--config={self.config}", *words_of(self.params)]


@dataclass(frozen=True)
class Result:
    """What a rank of a trial sends back.

    Attributes:
        values: of the monitored metrics, or of the objective.
        pruned_at: the step at which a pruner ended it; ``None``: it ran to its end.
        record: attributes for the trial.
        metrics: what was logged last, by name.
    """

    values: list[float]
    pruned_at: int | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


def run_config(orders: Orders) -> Result:
    """Fit the config of the study with the trial's values."""
    trial = _begin(orders)
    cli = TrialCLI(orders)
    if orders.ckpt_path and not cli.recorder.record()["steps"]:  # the trial was cut off after its end
        cli.trainer.validate(cli.model, datamodule=cli.datamodule)
        if not set(orders.monitors) <= cli.trainer.callback_metrics.keys():  # it logs one of them while it trains
            cli = TrialCLI(replace(orders, ckpt_path=None))
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items() if value.numel() == 1}
    values = [] if trial.pruned_at is not None else _values(metrics, orders.monitors)
    return Result(values, trial.pruned_at, cli.recorder.record(), metrics)


def run_objective(orders: Orders, objective: Callable[[Any], float | Sequence[float]]) -> Result:
    """Call ``objective`` with the trial, on every rank."""
    trial = _begin(orders)
    try:
        values = objective(trial)
    except TrialPruned:
        return Result([], trial.pruned_at if trial.pruned_at is not None else -1)
    finally:
        if os.environ["RANK"] == "0":
            ask(("end", ()))
    if trial.pruned_at is not None:  # OptunaPruning ended a fit, and the function returned what it had by then
        return Result([], trial.pruned_at)
    return Result([float(value) for value in (values if isinstance(values, Sequence) else [values])])


class TrialCLI(ProjectCLI):
    """A fit of the study's config with a trial's values, in the trial's folder."""

    def __init__(self, orders: Orders) -> None:
        self._orders, self.recorder = orders, TrialRecorder()
        self._end = GenerationEnd(orders.generation) if orders.generation else None
        super().__init__(self._settle, run=False, args=orders.words, save_config_callback=None)
        with self._end.copying() if self._end else nullcontext():
            self._fit()

    def setup_parser(self, *_: Any) -> None:
        """That of ``bharat fit``, which the process server has built."""
        self.parser = fit_parser.take()

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse them; loggers are grouped by the study."""
        super().parse_arguments(parser, args)
        self._as_given = self.config
        self.config = group_loggers(self.config, self._orders.study, self._orders.number)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """In the trial's folder; the config that is kept there is that of a fit anywhere."""
        if int(os.environ.get("RANK", 0)) == 0:
            options = self._as_given.clone()
            options.pop("config", None)
            text = self.parser.dump(options, skip_unset=False, skip_validation=True)  # they were parsed just now
            (self._orders.folder / CONFIG).write_text(text)
        return super().instantiate_trainer(default_root_dir=str(self._orders.folder), **kwargs)

    def _fit(self) -> None:
        names = inspect.signature(pl.Trainer.fit).parameters.keys() - {"self", "model"}
        options = {name: self.config_init[name] for name in names if name in self.config_init}
        if self._orders.begins:  # as an option, LightningCLI would put its hyperparameters over the trial's
            options["ckpt_path"] = self._orders.begins
        self.trainer.fit(self.model, datamodule=self.datamodule, **options)

    def _settle(self, trainer: pl.Trainer) -> None:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.insert(0, self.recorder)
        if self._orders.idle_cores:
            callbacks.append(IdleCores())
        if self._end is not None:
            self._end.join(callbacks)
        if self._orders.prune and not any(isinstance(callback, OptunaPruning) for callback in callbacks):
            callbacks.insert(0, OptunaPruning(monitor=self._orders.monitors[0]))


def _begin(orders: Orders) -> RemoteTrial:
    if orders.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, orders.cores)
    trial = RemoteTrial(orders.number, orders.params, orders.user_attrs)
    current.set_trial(trial)
    return trial


def _values(logged: Mapping[str, float], monitors: Sequence[str]) -> list[float]:
    """Of the monitored metrics, as they were last logged.

    Raises:
        ValueError: one was not logged; names those that were.
    """
    for name in monitors:
        if name not in logged:
            near = difflib.get_close_matches(name, logged, 1)
            said = f"; write monitor={near[0]!r}" if near else ""
            raise ValueError(f"monitor={name!r} was not logged by this fit, which logged {sorted(logged)}{said}")
    return [logged[name] for name in monitors]


def words_of(values: Mapping[str, Any]) -> list[str]:
    """As a command line has them."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
