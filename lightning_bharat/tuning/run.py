"""A hyperparameter search over Trainer runs, as one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna import Study
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection

from lightning_bharat.commands.project import BadInput
from lightning_bharat.tuning.after_earlier import Transfer, earlier_studies, sampler_after
from lightning_bharat.tuning.best import Best
from lightning_bharat.tuning.budget import Budget
from lightning_bharat.tuning.controller import Controller
from lightning_bharat.tuning.engines import make_engine
from lightning_bharat.tuning.for_population import members_for
from lightning_bharat.tuning.idle_cores import check as idle_cores_check
from lightning_bharat.tuning.leases import Leases
from lightning_bharat.tuning.limits import Limit
from lightning_bharat.tuning.lineage import in_words
from lightning_bharat.tuning.population import Population
from lightning_bharat.tuning.proposals import Proposals
from lightning_bharat.tuning.pruners import make_pruner
from lightning_bharat.tuning.retry import MAX_RETRIES
from lightning_bharat.tuning.same_study import agree
from lightning_bharat.tuning.samplers import make_sampler
from lightning_bharat.tuning.space import SearchSpace
from lightning_bharat.tuning.stopping import make_rules
from lightning_bharat.tuning.storage import open_storage
from lightning_bharat.tuning.study_config import StudyCLI, StudyConfig
from lightning_bharat.tuning.warm_start import Points, checked_points, enqueue
from lightning_bharat.tuning.work import Work

Mode = Literal["min", "max"]
_DIRECTIONS: dict[str, Literal["minimize", "maximize"]] = {"min": "minimize", "max": "maximize"}
Objective = Callable[[Any], "float | Sequence[float]"]


def tune(
    target: str | Path | Objective | StudyConfig,
    space: SearchSpace | str | Path | None = None,
    *,
    monitor: str | Sequence[str] = "val_loss",
    mode: Mode | Sequence[Mode] = "min",
    n_trials: int | None = None,
    sampler: str | Mapping[str, Any] | BaseSampler = "tpe",
    pruner: str | Mapping[str, Any] | BasePruner | None = None,
    stop: Any = None,
    population: Mapping[str, Any] | Population | None = None,
    limits: Sequence[Limit] = (),
    workers: int = 1,
    ranks: int = 1,
    engine: str | Mapping[str, Any] = "warm",
    idle_cores: bool = False,
    seed: int | None = None,
    study_name: str | None = None,
    folder: str | Path | None = None,
    storage: str | Path | None = None,
    max_retries: int = MAX_RETRIES,
    points: Points | None = None,
    transfer: Transfer | None = None,
    args: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> Study:
    """Search for the best settings of a LightningCLI project, or of an objective function.

    A study is kept in its folder (``runs/NAME``): the same call again goes on with it. Each trial runs in processes of
    its own, under whatever strategy the config names; this process alone holds the study.

    Args:
        target: a config of ``bharat fit`` (or one that is parsed already), or ``objective(trial) -> float`` as for
            ``optuna.Study.optimize``.
        space: what is searched, or its YAML file; for an objective nothing: it asks for its values itself.
        monitor: the logged metric whose last value is a trial's; several for several objectives.
        mode: ``"min"`` or ``"max"``, for each metric.
        n_trials: the study's trials in all, over all its starts and hosts; of a population by default its size times
            its generations.
        sampler: how points are chosen: see :func:`~lightning_bharat.tuning.samplers.make_sampler`.
        pruner: how trials are cut short: see :func:`~lightning_bharat.tuning.pruners.make_pruner`.
        stop: rules that end the study early: see :func:`~lightning_bharat.tuning.stopping.make_rules`.
        population: trains a population instead (Jaderberg et al. 2017), as in ``{"size": 4, "interval": 2}``: see
            :class:`~lightning_bharat.tuning.population.Population`. Each trial is one generation of a member, and
            ``sampler`` draws the first.
        limits: the most of something that a trial may need, such as ``Limit("peak_memory_bytes", "2 GiB")``: they are
            constraints that are known after it.
        workers: trials at a time on this host, each with its own share of cores and devices.
        ranks: processes that call an objective together; a config has its ``trainer.devices``.
        engine: what starts them: see :func:`~lightning_bharat.tuning.engines.make_engine`.
        idle_cores: give the cores of workers that have nothing to do to the most promising trial that runs, from its
            next validation on; with other numbers of threads values differ by rounding.
        seed: of the sampler, and of trials whose config has no ``seed_everything``.
        study_name: by default the config's file name, or the objective's.
        folder: of the study.
        storage: by default a journal in the folder; else ``sqlite:///…``, ``postgresql://…``, ``grpc://host:port``.
        max_retries: how often a trial whose process was killed is started again, from its own checkpoint.
        points: that are tried first, each once over all starts of the study: dicts of values, a CSV, or an earlier
            study, of which the best are taken; see :func:`~lightning_bharat.tuning.warm_start.warm_start`.
        transfer: earlier studies to learn from, for as long as their results agree with this one's: folders, storages
            and names, or studies; see :class:`~lightning_bharat.tuning.transfer.TransferSampler`.
        args: options of ``bharat fit`` over the config, such as ``["--data.batch_size=4"]``.
        say: told one line at each trial's end.

    Returns:
        The study. The best trial's config is ``best.yaml`` in its folder, for ``bharat fit --config``.

    Raises:
        BadInput: what can't be done as it is, before anything runs.
        SameError: trials one after another ended by the same error.
    """
    if n_trials is None and stop is None and sampler != "grid" and population is None:
        raise BadInput('nothing would end the study: write n_trials=40, or a rule such as stop={"name": "time", ...}')
    monitors, directions = _metrics(monitor, mode)
    config = None if callable(target) else _config(target, args, seed)
    searched = _space(space, config)
    name = study_name or _name_of(target)
    home = Path(folder or Path("runs", name)).absolute()
    proposals, members = Proposals(searched), None if population is None else Population.read(population)
    if members is not None:
        others = {"monitor": monitor, "pruner": pruner, "sampler": sampler}
        proposals, n_trials = members_for(members, config, searched, home, seed or 0, n_trials, others)
        if points is not None or transfer is not None:
            raise BadInput("population: its members begin where its sampler says; leave points and transfer out")
    if idle_cores:
        idle_cores_check(config is not None, monitors, engine if isinstance(engine, str) else str(engine.get("name")))
    starts = make_engine(
        engine,
        target if callable(target) else None,
        lambda orders, slot: config.ranks(orders.params, len(slot.devices)) if config else ranks,
        on_cpu=config is not None and config.on_cpu,
        say=say,
    )
    kept = open_storage(storage or home)
    earlier = [] if transfer is None else earlier_studies(transfer, name, kept, directions, searched)
    first = (
        [] if points is None else checked_points(points, searched, [StudyDirection[one.upper()] for one in directions])
    )
    study = optuna.create_study(
        study_name=name,
        storage=kept,
        sampler=sampler_after(earlier, make_sampler(sampler, seed, searched, directions, n_trials), seed),
        pruner=make_pruner(pruner, directions=directions),
        directions=directions,
        load_if_exists=True,
    )
    agree(study, directions, monitors if config else [], members)
    enqueue(study, first)
    work = Work(
        home,
        config.keep(home) if config else None,
        monitors,
        config.seed if config else None,
        prune=len(monitors) == 1,
        limits=limits,
        max_retries=max_retries,
        idle_cores=idle_cores,
    )
    places = starts.slots(workers)
    starts.warm_up()
    budget, best = Budget(n_trials, make_rules(stop)), Best(study, work, say)
    Controller(study, starts, places, work, proposals, budget, Leases(study), best.trial_ended).run()
    best.study_ended(budget.reason)
    if members is not None:
        say(in_words(study, home))
    return study


def _metrics(
    monitor: str | Sequence[str], mode: Mode | Sequence[Mode]
) -> tuple[list[str], list[Literal["minimize", "maximize"]]]:
    """Their names, and the direction of each."""
    monitors, modes = ([given] if isinstance(given, str) else list(given) for given in (monitor, mode))
    if len(modes) == 1:
        modes *= len(monitors)
    if len(modes) != len(monitors) or not set(modes) <= _DIRECTIONS.keys():
        raise BadInput(
            f'mode={mode!r}: expected "min" or "max", one for all of the {len(monitors)} metrics or for each'
        )
    return monitors, [_DIRECTIONS[one] for one in modes]


def _config(target: str | Path | StudyConfig, args: Sequence[str], seed: int | None) -> StudyConfig:
    if isinstance(target, StudyConfig):
        return target
    return StudyConfig(StudyCLI(["--config", str(target), *args]), seed or 0)


def _space(space: SearchSpace | str | Path | None, config: StudyConfig | None) -> SearchSpace | None:
    if config is None:
        if space is not None:
            raise BadInput(
                "an objective asks for its values itself, by trial.suggest_float and others: leave space out"
            )
        return None
    if space is None:
        raise BadInput("a config needs a space: which of its options are searched, and where")
    searched = space if isinstance(space, SearchSpace) else SearchSpace.from_yaml(space)
    searched.check(config.words)
    return searched


def _name_of(target: str | Path | Objective | StudyConfig) -> str:
    if isinstance(target, StudyConfig):
        return target.name
    return getattr(target, "__name__", "study") if callable(target) else Path(target).stem
