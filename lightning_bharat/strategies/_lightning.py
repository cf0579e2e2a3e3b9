"""All of Lightning's private names that this package touches; test_private_names.py fails when one moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from inspect import signature
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.strategies.deepspeed import _format_precision_config
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
)
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.callbacks import ModelSummary, ThroughputMonitor
from lightning.pytorch.core.optimizer import _configure_optimizers
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher as SubprocessLauncher
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import _TunerExitException
from lightning.pytorch.utilities.model_summary import summarize
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_bharat.checkpoints.fetched import on_disk
from lightning_bharat.strategies._model_checkpoint import OpenModelCheckpoint
from lightning_bharat.strategies._torchmetrics import know_of_updates
from lightning_bharat.strategies.attempt_store import store_of_attempt

__all__ = ["NOT_AN_ERROR", "SubprocessLauncher"]

# By these Lightning leaves a trainer on all ranks with nothing being wrong: its tuner is ready.
NOT_AN_ERROR = (_TunerExitException,)


def default_backend(device: torch.device) -> str:
    """``"nccl"`` for CUDA, ``"gloo"`` for the CPU."""
    return _get_default_process_group_backend_for_device(device)


def init_process_group(
    environment: ClusterEnvironment, backend: str, timeout: timedelta | None, device: torch.device
) -> None:
    """Make the process group of all ranks, if there is none."""
    if dist.is_initialized():
        return
    store = store_of_attempt(timeout)
    given: dict[str, Any] = {} if store is None else {"store": store}
    device_id = None if device.type == "cpu" else device
    _init_dist_connection(environment, backend, timeout=timeout, device_id=device_id, **given)


def set_rank(rank: int) -> None:
    """Tell Lightning's ``rank_zero_only`` functions (in both of its places) who this is."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only as of_lightning

    of_lightning.rank = rank_zero_only.rank = rank  # type: ignore[attr-defined]


def keep_ckpt_path(trainer: pl.Trainer) -> None:
    """Let :func:`ckpt_path` know which checkpoint ``trainer`` goes on from, as soon as it has chosen one. ``"best"``
    may be one of an earlier process, and is none where training begins."""
    connector: Any = trainer._checkpoint_connector
    if "chosen" in vars(connector):
        return
    connector.chosen, choose = None, connector._select_ckpt_path

    def chosen(state_fn: TrainerFn, path: Any, *args: Any, **kwargs: Any) -> Any:
        callback = trainer.checkpoint_callback
        if path == "best" and isinstance(callback, OpenModelCheckpoint) and not callback.best_model_path:
            callback.find_best(trainer)
            if state_fn == TrainerFn.FITTING and not callback.best_model_path:
                rank_zero_warn('ckpt_path="best", and there is no best checkpoint yet: training begins anew')
                path = None
        connector.chosen = on_disk(choose(state_fn, path, *args, **kwargs), trainer.default_root_dir)
        return connector.chosen

    connector._select_ckpt_path = chosen


def ckpt_path(trainer: pl.Trainer) -> Any:
    """The checkpoint that will be read, as the strategy's setup may ask; ``trainer.ckpt_path`` is known later."""
    return getattr(trainer._checkpoint_connector, "chosen", None)


def set_device(module: nn.Module, device: torch.device) -> None:
    """Make ``module.device`` say ``device``, without moving anything."""
    _update_properties(module, device=device)


def give_mesh(module: pl.LightningModule, mesh: DeviceMesh) -> None:
    """For a ``configure_model`` that was written for Lightning's ``ModelParallelStrategy``."""
    module._device_mesh = mesh


def attach(module: pl.LightningModule, trainer: pl.Trainer) -> None:
    """Make ``module.trainer`` say ``trainer``, and change nothing in either."""
    module._trainer = trainer


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
    _around(loop, "setup_data", before=look)
    _around(loop, "on_run_start", after=look)
    _around(loop, "on_advance_start", after=look)
    _around(trainer._logger_connector, "update_train_step_metrics", before=look)
    _around(loop.epoch_loop.val_loop, "run", after=look)
    _around(loop, "on_advance_end", after=look)


def _nothing() -> None: ...


def _around(
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
    _around(trainer.fit_loop.epoch_loop, "on_advance_end", after=ended, what="batch")


def around_fetch(trainer: pl.Trainer, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Call ``begin`` before training asks for a batch, or for an iterator at the start of an epoch, and ``end`` when it
    has the batch."""
    loop = trainer.fit_loop.epoch_loop
    _around(loop, "on_run_start", before=begin, what="fetch")
    _around(loop, "_on_before_fetch", before=begin, what="fetch")
    _around(loop, "_on_after_fetch", after=end, what="fetch")


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


def before_each_batch(trainer: pl.Trainer, begin: Callable[[], None]) -> None:
    """Call ``begin`` before training asks for a batch, where all that belongs to the one before is through."""
    _around(trainer.fit_loop.epoch_loop, "advance", before=begin, what="groups")


def around_training_loaders(trainer: pl.Trainer, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Call ``begin`` before the trainer may make its training loaders, and ``end`` after."""
    _around(trainer.fit_loop, "setup_data", begin, end, what="loaders")


def follow_loops(trainer: pl.Trainer, follower: Any) -> None:
    """Call the methods of ``follower``, a :class:`~lightning_bharat.strategies.goes_on.GoesOn`, at what they name."""
    loop: Any = trainer.fit_loop
    epoch, validation = loop.epoch_loop, loop.epoch_loop.val_loop
    _around(loop, "setup_data", after=follower.loaders_made, what="resume")
    _around(loop, "on_advance_end", after=follower.epoch_ended, what="resume")

    def begun() -> None:
        batches = epoch.batch_progress.current.ready
        follower.epoch_begins(batches)
        if batches > 0:
            # Plateau schedulers see what was logged before, and what this epoch logs.
            loop._restarting = False

    def again() -> None:
        """A validation that was stopped is run from its first batch on."""
        total: Any = validation.batch_progress.total
        if validation.restarting:
            total.ready = total.started = total.processed = total.completed

    _around(epoch, "on_run_start", after=begun, what="resume")
    _around(validation, "reset", before=follower.validation_begins, after=again, what="resume")


def in_validation(trainer: pl.Trainer) -> bool:
    """Whether a validation in the middle of training has begun and not come to its last batch's end."""
    progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    finished = progress.is_last_batch and progress.current.completed == progress.current.ready
    return trainer.state.fn == TrainerFn.FITTING and trainer.validating and not finished


def before_validation(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Lightning's dict, saved :func:`in_validation`, such that this is run again from its first batch on.

    Lightning goes on behind the batch that it had come to, without what was logged before, and may count the one that
    follows as the last (its issue 19549).
    """
    progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    total: Any = progress.total
    before = total.completed - progress.current.completed
    # So one says that it is in the middle: one batch has been started more than were processed.
    middle = {"ready": before + 1, "started": before + 1, "processed": before, "completed": before}
    none = dict.fromkeys(middle, 0)
    key = "epoch_loop.val_loop.batch_progress"
    of_fit = {**checkpoint["loops"]["fit_loop"], key: {"total": middle, "current": none, "is_last_batch": False}}
    return {**checkpoint, "loops": {**checkpoint["loops"], "fit_loop": of_fit}}


def training_loaders(trainer: pl.Trainer) -> list[Any]:
    """Those that training goes through."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def leave_finished_epoch(trainer: pl.Trainer) -> None:
    """Begin with the next epoch where the one of a checkpoint was through, also in a run that counts steps: Lightning
    would go on in it, call the hooks of its end again and count it twice. After the loops have read their state."""
    loop: Any = trainer.fit_loop
    now = loop.epoch_progress.current
    if loop.restarting and now.ready == now.started == now.processed and loop.epoch_loop.batch_progress.is_last_batch:
        loop._restarting = loop.epoch_loop.restarting = False


def load_positions(trainer: pl.Trainer, begin_epoch: Callable[[Any, int], None]) -> None:
    """Let training loaders that were made before the checkpoint was read (for ``trainer.estimated_stepping_batches``)
    know their epoch, by ``begin_epoch``, and read their positions, too. After the loops have read their state."""
    loop: Any = trainer.fit_loop
    if loop._data_fetcher is not None and loop._combined_loader_states_to_load:
        for loader in training_loaders(trainer):
            begin_epoch(loader, loop.epoch_progress.current.processed)
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)


def share_logged(trainer: pl.Trainer, data: int, data_after: int) -> None:
    """Give each data rank the same part of what all have logged in this epoch so far, so that other data ranks can go
    on with it. All ranks must call it.

    Args:
        data: how many there are.
        data_after: how many go on.
    """
    for metric in trainer.fit_loop.epoch_loop._results.result_metrics:
        meta = metric.meta
        if not (metric.is_tensor and meta.on_epoch and meta.sync.should) or metric.has_reset:
            continue
        metric.value = meta.sync(metric.value.clone())
        if meta.is_mean_reduction:
            metric.value = metric.value * data / data_after
            count = meta.sync(metric.cumulated_batch_size.double())
            metric.cumulated_batch_size = count * data / data_after
        elif meta.is_sum_reduction:
            metric.value = metric.value / data_after
        metric._computed = None


def last_values(trainer: pl.Trainer) -> dict[str, Any]:
    """The values that callbacks and schedulers look at, as they were last."""
    connector = trainer._logger_connector
    return {name: value.detach().cpu().clone() for name, value in connector._callback_metrics.items()}


def put_last_values(trainer: pl.Trainer, values: Mapping[str, Any]) -> None:
    """After Lightning has cleared its own."""
    device = trainer.strategy.root_device
    trainer._logger_connector._callback_metrics.update({name: value.to(device) for name, value in values.items()})


def end_epoch(trainer: pl.Trainer) -> None:
    """Let plateau schedulers see the end of the epoch, where the checkpoint was written in its last hook: Lightning
    goes on with the next epoch, though they come after the hook."""
    loop = trainer.fit_loop
    if not (loop.restarted_on_epoch_end or loop.resumed_on_epoch_end):
        return
    looked_at = [config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    if looked_at and all(name in trainer.callback_metrics for name in looked_at):
        loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)


_OF_LOGGED = (
    *("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx"),
    *("dataloader_idx", "metric_attribute"),
)


def logged(trainer: pl.Trainer) -> dict[str, Any]:
    """What ``self.log`` has added up in this epoch of training, as plain data."""
    found = {}
    for key, metric in trainer.fit_loop.epoch_loop._results.items():
        meta, sync = metric.meta, metric.meta.sync
        if metric.has_reset or not meta.on_epoch or sync.group is not None:
            continue
        found[key] = {
            "meta": {name: getattr(meta, name) for name in _OF_LOGGED},
            "reduce": meta.reduce_fx.__name__,
            "sync": {"_should": sync.should, "rank_zero_only": sync.rank_zero_only},
            "states": {name: getattr(metric, name).detach().cpu().clone() for name in _sums(metric)},
        }
    return found


def _sums(metric: Any) -> tuple[str, ...]:
    """A metric of the module that is logged has its states itself."""
    if not metric.is_tensor:
        return ()
    return ("value", "cumulated_batch_size") if metric.meta.is_mean_reduction else ("value",)


def put_logged(trainer: pl.Trainer, saved: Mapping[str, Any]) -> None:
    """Go on adding to it."""
    device, results = trainer.strategy.root_device, trainer.fit_loop.epoch_loop._results
    for key, said in saved.items():
        meta = _Metadata(reduce_fx=getattr(torch, said["reduce"]), **said["meta"])
        meta.sync = _Sync(fn=trainer.strategy.reduce, **said["sync"])
        metric = _ResultMetric(meta, is_tensor=bool(said["states"]))
        if not said["states"]:
            metric.value = trainer.lightning_module.get_submodule(said["meta"]["metric_attribute"])
        for name, value in said["states"].items():
            setattr(metric, name, value)
        know_of_updates(metric, 1)
        results[key] = metric.to(device)
    trainer._logger_connector._first_loop_iter = False  # with the first batch of an epoch it begins anew


def shared_out(of_ranks: list[Mapping[str, Any]], data: int) -> dict[str, Any]:
    """What each of ``data`` ranks goes on with, of what others have logged."""
    found = {}
    for key, first in of_ranks[0].items():
        states, own = {}, [logged[key]["states"] for logged in of_ranks if key in logged]
        for name, value in first["states"].items():
            every = torch.stack([states[name].double() for states in own])
            if first["reduce"] in ("max", "min"):
                value = getattr(every, first["reduce"])(0)
                value = value if isinstance(value, torch.Tensor) else value.values
            else:
                value = every.sum(0) / data
            states[name] = value
        found[key] = {**first, "states": states}
    return {key: said for key, said in found.items() if said["states"]}


class LeftRun:
    """A run of ``fit`` that is left in the middle of an epoch, to go on from a checkpoint in the same process: what
    Lightning begins anew with each run is kept.

    Leaving ends the workers of its loaders, and Lightning's signal handlers.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        connector: Any = trainer._logger_connector
        self._connector = {
            name: getattr(connector, name)
            for name in (
                *("_callback_metrics", "_logged_metrics", "_progress_bar_metrics"),
                *("_first_loop_iter", "_current_fx"),
            )
        }
        self._logs_hparams, trainer.enable_autolog_hparams = trainer.enable_autolog_hparams, False  # they are logged
        trainer.fit_loop.teardown()
        trainer._signal_connector.teardown()
        loop: Any = trainer.fit_loop.epoch_loop
        self._results, loop._results = loop._results, type(loop._results)(training=True)

    def put_back(self, trainer: pl.Trainer) -> None:
        """After Lightning has cleared its own."""
        vars(trainer._logger_connector).update(self._connector)
        trainer.fit_loop.epoch_loop._results = self._results

    def go_on(self, trainer: pl.Trainer) -> None:
        """After the loops have read their state: let them go on with the next batch, as if they had not been left."""
        trainer.enable_autolog_hparams = self._logs_hparams
        made = trainer.fit_loop.epoch_loop

        def begun() -> None:
            # What Lightning does with the first batch of a run that was stopped has been done.
            made.restarting = False
            made.__dict__["bharat_around"]["on_run_start"].pop("restart")

        _around(made, "on_run_start", after=begun, what="restart")


def fits_in_children(trainer: pl.Trainer) -> bool:
    """Whether ``fit`` starts the ranks as children that have the trainer alone (``ddp_fork``, ``ddp_spawn``), not the
    whole script."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def validation_is_due(trainer: pl.Trainer) -> bool:
    """Whether ``fit`` validates after the batch that has just been trained; ask in ``on_train_batch_end``."""
    loop: Any = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def use_no_grad(trainer: pl.Trainer) -> None:
    """Evaluate under ``no_grad``: tensors of ``inference_mode`` can't be gathered into parameters that train later."""
    for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop, trainer.fit_loop.epoch_loop.val_loop):
        loop.inference_mode = False


def count_by_data_ranks(trainer: pl.Trainer, data: int) -> None:
    """Let ThroughputMonitor multiply by the data ranks: tensor peers see the same samples."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ThroughputMonitor):
            for throughput in callback._throughputs.values():
                throughput.world_size = data


def optimizers_of(module: pl.LightningModule) -> tuple[list[Any], list[Any]]:
    """The optimizers and schedulers that ``configure_optimizers`` of ``module`` makes now."""
    made: Any = module.configure_optimizers()
    if made is None:
        return [], []
    optimizers, schedulers, _ = _configure_optimizers(made)
    return optimizers, [s["scheduler"] if isinstance(s, dict) else s for s in schedulers]


def show_whole_summary(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Let ModelSummary show ``module`` as it is now, before it is cut."""
    example = module.example_input_array
    if any(parameter.is_meta for parameter in module.parameters()):
        module.example_input_array = None  # it could not be run
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelSummary) and callback._max_depth:
            whole: Any = _Summary(summarize(module, max_depth=callback._max_depth))
            callback._summary = lambda *_, whole=whole: whole  # type: ignore[method-assign]
    module.example_input_array = example


class _Summary:
    """What a summary says now: Lightning's own looks at the module again each time that it is asked."""

    def __init__(self, summary: Any) -> None:
        self._data = summary._get_summary_data()
        for name in ("total_parameters", "trainable_parameters", "model_size", "total_training_modes", "total_flops"):
            setattr(self, name, getattr(summary, name))

    def _get_summary_data(self) -> list[tuple[str, list[str]]]:
        return self._data


def materialize_distributed(module: nn.Module, device: torch.device) -> None:
    """Give memory and values to what a module that is already distributed has on ``meta``."""
    _materialize_distributed_module(module, device)


# Of Lightning's DeepSpeedStrategy, with their defaults. "config" and "stage" are arguments of its child.
DEEPSPEED_ARGUMENTS = {
    name: parameter.default
    for name, parameter in signature(DeepSpeedStrategy.__init__).parameters.items()
    if name not in ("self", "config", "stage")
}
_OF_ZERO = ["stage", "contiguous_gradients", "overlap_comm", "allgather_partitions", "reduce_scatter"]
_OF_ZERO += ["allgather_bucket_size", "reduce_bucket_size", "sub_group_size"]


def is_of_config(argument: str) -> bool:
    """Whether an argument of DeepSpeedStrategy becomes a part of DeepSpeed's config."""
    return argument in _OF_ZERO or argument in signature(DeepSpeedStrategy._create_default_config).parameters


def deepspeed_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The config that Lightning's DeepSpeedStrategy makes of its arguments; defaults for those that are left out."""
    every = {"stage": 2, **DEEPSPEED_ARGUMENTS, **arguments}
    known = {name: value for name, value in every.items() if is_of_config(name)}
    return DeepSpeedStrategy._create_default_config(None, **known)  # type: ignore[arg-type]


def add_precision(config: dict[str, Any], precision: str, strategy: DeepSpeedStrategy) -> None:
    """Ask DeepSpeed for the type of ``precision``, with the scaler that ``strategy`` has been given, where ``config``
    says nothing of it."""
    names = ("loss_scale", "loss_scale_window", "min_loss_scale", "initial_scale_power", "hysteresis")
    _format_precision_config(config, precision, **{name: getattr(strategy, name) for name in names})


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


def meet_by_deepspeed(strategy: Any) -> None:
    """As Lightning's DeepSpeedStrategy lets ranks meet, which also asks whether their devices are all GPUs."""
    reset_seed()
    strategy.set_world_ranks()
    strategy._init_deepspeed_distributed()
