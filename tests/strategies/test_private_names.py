"""Private names of Lightning, torch, torchmetrics, DeepSpeed and torchft: they stand in some files, or in a short list,
and mean what is relied on.

When a test here fails after an upgrade, its words say which name moved or changed and what the package asks of it.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib import import_module
from inspect import signature
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities import device_dtype_mixin, distributed, init
from lightning.pytorch import strategies
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, ThroughputMonitor
from lightning.pytorch.core import optimizer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loops import fetchers, fit_loop, training_epoch_loop
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies.launchers import multiprocessing, subprocess_script
from lightning.pytorch.trainer.connectors import data_connector
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import CombinedLoader, exceptions
from lightning.pytorch.utilities.model_summary import summarize
from torch import Tensor, nn, overrides
from torch._inductor import cpp_builder, exc
from torch.distributed import _composable_state, distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.utils import checkpoint
from torch.utils.data import DataLoader, dataloader
from torchmetrics import CatMetric
from torchmetrics.utilities.data import dim_zero_cat

import lightning_bharat
from lightning_bharat.strategies import _lightning_deepspeed, _model_checkpoint
from lightning_bharat.strategies._torch import flight_record, note_rates
from tests.ranks import run_ranks

PACKAGE = Path(lightning_bharat.__file__).parent
_LIGHTNINGS = ("_lightning", *(f"_lightning_{part}" for part in ("deepspeed", "logged", "loops", "resume")))
_FILES = (*_LIGHTNINGS, "_model_checkpoint", "_torch", "_torchmetrics", "_deepspeed", "_torchft")
OF_OTHERS = tuple(f"strategies/{name}.py" for name in _FILES)

# Their names are checked in tests/tuning/test_samplers.py and test_bandit.py.
OF_TUNING = ("tuning/_optuna.py", "tuning/_ray.py")

# What other files may use: torch has no public name for it, and much outside of torch is built on it.
EVERYWHERE = {
    "_parameters": "the registries of nn.Module, which nn.Module's own documentation of its hooks speaks of",
    "_buffers": "",
    "_modules": "",
    "_foreach_mul_": "in torch's documentation: one kernel for a list of tensors",
    "_foreach_clamp_min_": "",
    "_foreach_clamp_max_": "",
    "_foreach_norm": "",
    "_pytree": "trees of tensors, as every transform of torch takes them",
    "_python_dispatch": "TorchDispatchMode, with which torch's documentation shows how to see all operators",
    "_subclasses": "FakeTensorMode, of torch's documentation on fake tensors",
    "_version": "in torch's notes on autograd: how often a tensor was changed in place",
    "_make_wrapper_subclass": "what tensor subclasses are made with",
    "_C": "DisableTorchFunctionSubclass, of torch's notes on extending it",
    "_c10d_functional": "by these names of their libraries collectives are known among all operators",
    "_c10d_functional_autograd": "",
    "_assert_async": "an assert that does not wait for the device",
    "_grouped_mm": "the operator behind grouped_mm",
    "_scaled_dot_product_flash_attention": "the operators behind scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu": "",
    "_scaled_dot_product_efficient_attention": "",
    "_scaled_dot_product_cudnn_attention": "",
    "_reset_parameters": "nn.Transformer's and nn.MultiheadAttention's, beside the others' reset_parameters",
    "_init_weights": "transformers': each of its models has one",
    "_tp_plan": "transformers': where its authors cut a model",
}

# Private names of Lightning's classes that classes of this package set or override, on purpose.
INHERITED = {"_after_closure", "_configure_launcher", "_launcher", "_precision_plugin"}
INHERITED |= {
    "_format_config",
    "_init_config_if_needed",
    "_initialize_deepspeed_inference",
    "_setup_model_and_optimizer",
}
# torchelastic's, likewise: its agents and contexts are made to be extended by these.
INHERITED |= {"_rendezvous", "_start_workers", "_monitor_workers", "_restart_workers", "_stop_workers"}
INHERITED |= {"_pcontext", "_remaining_restarts", "_start", "_poll", "_close"}

# What OpenModelCheckpoint calls by other names.
INHERITED |= {"_save_topk_checkpoint", "_save_last_checkpoint", "_save_checkpoint", "_remove_checkpoint"}
INHERITED |= {"_link_checkpoint", "_find_last_checkpoints", "_last_global_step_saved", "_last_checkpoint_saved"}
INHERITED |= {"_every_n_epochs", "_every_n_train_steps", "_train_time_interval", "_should_remove_checkpoint"}

# Attributes that these files give to objects of torch's.
OURS = {"_agrees"}


CHECKS: dict[str, Callable[[], None]] = {}


def relied_on(*names: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Registers a check of private names, whose docstring says what is asked of them."""

    def register(check: Callable[[], None]) -> Callable[[], None]:
        CHECKS.update(dict.fromkeys(names, check))
        return check

    return register


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def files() -> dict[str, ast.Module]:
    return {p.relative_to(PACKAGE).as_posix(): ast.parse(p.read_text()) for p in sorted(PACKAGE.rglob("*.py"))}


def defined(tree: ast.AST) -> Iterator[str]:
    """The names that a file gives to functions, classes, variables and attributes of its own."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is(node.value, "self", "cls"):
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "self.__dict__.update":
            yield from (keyword.arg for keyword in node.keywords if keyword.arg)


def _is(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def used(tree: ast.AST) -> Iterator[str]:
    """The private names that a file takes from elsewhere: of imported modules, attributes, and strings that name one.

    What stands on a module of the standard library (``os._exit``) is not meant.
    """
    standard = set()
    in_text = {id(part) for text in ast.walk(tree) if isinstance(text, ast.JoinedStr) for part in text.values}
    for node in ast.walk(tree):
        if id(node) in in_text:
            continue
        if isinstance(node, ast.Import):
            standard |= {alias.name for alias in node.names if alias.name in sys.stdlib_module_names}
            parts = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            parts = [] if parts[0] in ("__future__", PACKAGE.name) or parts[0] in sys.stdlib_module_names else parts
        elif isinstance(node, ast.Attribute):
            parts = [] if _is(node.value, *standard) else [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = [node.value] if re.fullmatch(r"_[a-zA-Z]\w*", node.value) else []
        else:
            continue
        yield from filter(is_private, parts)


def foreign(tree: ast.Module, everyone_s: set[str]) -> set[str]:
    return {name for name in used(tree) if name not in everyone_s or name in EVERYWHERE or name in CHECKS}


def own_names(trees: dict[str, ast.Module]) -> set[str]:
    """Those that this package gives, anywhere in it."""
    return {name for tree in trees.values() for name in defined(tree)}


def test_the_rule_sees_what_it_forbids() -> None:
    text = """
import os
import torch.distributed._shard
from torch._inductor import config
from lightning.fabric import _thing
from lightning_bharat.strategies._torch import Root
class Own:
    def _method(self): ...
def use(x, own):
    os._exit(1)
    self._set = x._hidden
    getattr(x, "_named")
    own._method(x._deep[0]._deeper(), __name__, x.__dict__)
    self._inherited
"""
    tree = ast.parse(text)
    found = foreign(tree, set(defined(tree)))
    assert found == {"_shard", "_inductor", "_thing", "_hidden", "_named", "_deep", "_deeper", "_inherited"}


def test_private_names_stand_in_some_files_or_in_the_list() -> None:
    trees = files()
    own = own_names(trees)
    allowed = set(EVERYWHERE) | INHERITED
    found = {name: foreign(tree, own) - allowed for name, tree in trees.items() if name not in OF_OTHERS + OF_TUNING}
    found = {name: private for name, private in found.items() if private}
    assert not found, f"private names of other packages; give them a function in {' or '.join(OF_OTHERS)}: {found}"


def test_nothing_in_the_list_is_left_over() -> None:
    everything = {name for tree in files().values() for name in used(tree)}
    assert set(EVERYWHERE) <= everything, set(EVERYWHERE) - everything


def own_classes() -> Iterator[type]:
    for module in walk_packages([str(PACKAGE)], f"{PACKAGE.name}."):
        try:
            names = vars(import_module(module.name))
        except ModuleNotFoundError as error:
            assert error.name == "ray", "all other extras are installed for the tests"
            continue
        for kind in names.values():
            if isinstance(kind, type) and kind.__module__ == module.name:
                yield kind


def private_of(kind: type) -> set[str]:
    """Private methods of a class, and private attributes that its source sets on ``self``."""
    try:
        text = inspect.getsource(kind)
    except (OSError, TypeError):  # written in C, or made at run time
        return set()
    assigned = set(re.findall(r"\bself\.(_[a-zA-Z]\w*)(?:: [^=\n]*)? = ", text))
    methods = {name for name in vars(kind) if name in text}  # and not what a metaclass adds
    return {name for name in methods | assigned if is_private(name)}


def test_no_class_takes_a_private_name_that_a_class_it_extends_has() -> None:
    """An upgrade may give Lightning's strategy an attribute that ours has already: one would overwrite the other."""
    taken: dict[str, set[str]] = {}
    seen: set[str] = set()
    for kind in own_classes():
        for base in kind.__mro__[1:]:
            if base.__module__.split(".")[0] in ("lightning", "torch"):
                both = private_of(kind) & private_of(base) - set(EVERYWHERE)
                seen |= both & INHERITED
                if both - INHERITED:
                    taken[f"{kind.__qualname__}, which extends {base.__qualname__}"] = both - INHERITED
    assert not taken
    assert seen == INHERITED, "not taken any more, or not found any more"


def test_every_private_name_of_these_files_is_checked_below() -> None:
    trees = files()
    own = own_names(trees)
    found = {name for file in OF_OTHERS for name in foreign(trees[file], own)} - OURS
    assert found - set(CHECKS) == set(), "write a check: that it exists, and means what is relied on"
    assert set(CHECKS) - found == set(), "nothing uses it any more: take out its check"


# ---- DeepSpeed's


@relied_on("_hp_mapping")
def deepspeed_knows_the_parts_of_parameters() -> None:
    """In stages 1 and 2 a parameter's _hp_mapping is its part in what a rank steps on; other names have no _."""
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    tensor_fragment = import_module("deepspeed.utils.tensor_fragment")  # deepspeed.utils has a class of that name
    address = tensor_fragment.fragment_address(numel=2, start=1)
    parameter, flat = torch.zeros(4), torch.arange(8.0)
    fragment = tensor_fragment.get_hp_fragment_mapping(parameter, 3, flat, {}, {}, False, 0, 0, 8)
    assert (fragment.hp_fragment_address.start, fragment.hp_fragment_address.numel) == (3, 4)
    assert fragment.lp_fragment_address.start == 0 and type(fragment.lp_fragment_address) is type(address)
    assert "._hp_mapping = " in inspect.getsource(import_module("deepspeed.utils.mixed_precision_linkage"))
    text = inspect.getsource(stage3.DeepSpeedZeroOptimizer_Stage3)
    for name in ("fp32_partitioned_groups_flat", "fp16_groups", "sub_group_to_group_id", "grad_position"):
        assert f"self.{name} = " in text or f"self.{name}: " in text
    assert "def get_param_id(" in text and "group_idx, dest_offset, num_elements = self.grad_position[" in text
    text = inspect.getsource(stage_1_and_2.DeepSpeedZeroOptimizer)
    assert "self.single_partition_of_fp32_groups = " in text and "self.bit16_groups = " in text


# ---- Lightning's


@relied_on("_update_properties")
def device_is_said() -> None:
    """_update_properties(module, device=...) changes what module.device says, and moves nothing."""
    module = BoringModel()
    device_dtype_mixin._update_properties(module, device=torch.device("meta"))
    assert module.device.type == "meta" and not module.layer.weight.is_meta


@relied_on("_get_default_process_group_backend_for_device", "_init_dist_connection")
def groups_are_made() -> None:
    """Lightning's function makes the process group with a time-out and a device."""
    backend = distributed._get_default_process_group_backend_for_device
    assert (backend(torch.device("cpu")), backend(torch.device("cuda"))) == ("gloo", "nccl")
    environment, limit = LightningEnvironment(), timedelta(seconds=1)
    signature(distributed._init_dist_connection).bind(environment, "gloo", timeout=limit, device_id=None)


@relied_on("_configure_optimizers")
def optimizers_and_schedulers_are_taken_apart() -> None:
    """_configure_optimizers(what the hook returned) gives lists of optimizers and of schedulers or their dicts."""
    made = BoringModel().configure_optimizers()
    optimizers, schedulers, _ = optimizer._configure_optimizers(made)
    assert (optimizers, schedulers) == made
    assert optimizer._configure_optimizers({"optimizer": made[0][0], "lr_scheduler": {"scheduler": 1}})[1] == [
        {"scheduler": 1}
    ]


@relied_on("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
def optimizers_have_hooks() -> None:
    """An optimizer's hooks on its step are in these two dictionaries."""
    made = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    for register, name in (
        (made.register_step_pre_hook, "_optimizer_step_pre_hooks"),
        (made.register_step_post_hook, "_optimizer_step_post_hooks"),
    ):
        register(print)
        assert list(vars(made)[name].values()) == [print]


@relied_on("_materialize_distributed_module")
def meta_gets_memory() -> None:
    """_materialize_distributed_module(module, device) gives memory, and values by reset_parameters."""
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    init._materialize_distributed_module(module, torch.device("cpu"))
    assert not module.weight.is_meta and module.weight.abs().max() < 1


@relied_on("_SubprocessScriptLauncher")
def launcher_calls_the_function() -> None:
    """_SubprocessScriptLauncher(environment, processes, nodes).launch(function, *args, trainer=...) calls it."""
    launcher = subprocess_script._SubprocessScriptLauncher(LightningEnvironment(), 1, 1)
    assert launcher.launch(lambda *args: args, 1, 2, trainer=None) == (1, 2)
    launcher.kill(15)


@relied_on("_MultiProcessingLauncher")
def forked_ranks_send_the_trainers_state() -> None:
    """Strategies whose ranks are children have a _MultiProcessingLauncher, which sends rank 0's trainer.state."""
    trainer = L.Trainer(strategy="ddp_fork", devices=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    launcher = trainer.strategy.launcher
    assert type(launcher) is multiprocessing._MultiProcessingLauncher
    assert "trainer.state = worker_output.trainer_state" in inspect.getsource(type(launcher))


@relied_on("_TunerExitException")
def tuner_leaves_by_it() -> None:
    """The tuner leaves a trainer by an exception that is no error."""
    assert issubclass(exceptions._TunerExitException, Exception)
    from lightning.pytorch.callbacks import lr_finder

    assert "raise _TunerExitException" in inspect.getsource(lr_finder)


@relied_on("_should_accumulate")
def loops_know_whether_a_step_follows() -> None:
    """The fit loop's _should_accumulate() says, of the batch that is being run, whether it comes without a step."""
    trainer = L.Trainer(barebones=True, accumulate_grad_batches=2)
    progress = trainer.fit_loop.epoch_loop.batch_progress
    answers = []
    for _ in range(2):
        progress.increment_ready()
        answers.append(trainer.fit_loop._should_accumulate())
    assert answers == [True, False]


@relied_on("_create_default_config", "_format_precision_config", "_init_deepspeed_distributed")
def deepspeed_s_config_is_made_of_arguments() -> None:
    """Lightning's DeepSpeedStrategy makes its config of arguments without looking at itself, adds a type, and meets."""
    kind = strategies.DeepSpeedStrategy
    made = _lightning_deepspeed.deepspeed_config({"stage": 3, "offload_optimizer": True})
    assert made["zero_optimization"]["stage"] == 3 and made["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    _lightning_deepspeed.add_precision(made, "bf16-mixed", kind())
    assert made["bf16"] == {"enabled": True}
    assert "deepspeed.init_distributed(" in inspect.getsource(kind._init_deepspeed_distributed)
    for name in ("_init_config_if_needed", "_initialize_deepspeed_inference"):  # what the child's own is called by
        assert f"self.{name}(" in inspect.getsource(kind)
    assert "self._format_config()" in inspect.getsource(kind._init_config_if_needed)
    assert "self._setup_model_and_optimizer(model, optimizer, scheduler)" in inspect.getsource(kind)


@relied_on("_data_source")
def loops_know_their_loaders() -> None:
    """Each loop has a _data_source, whose dataloader() is the person's."""
    trainer = L.Trainer(barebones=True)
    loader = BoringModel().train_dataloader()
    for loop in (trainer.fit_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop._data_source.instance = loader
        assert loop._data_source.dataloader() is loader


@relied_on("_request_dataloader", "_mode")
def loaders_are_asked_for_by_the_source() -> None:
    """_request_dataloader(source) returns what source.dataloader() does; a CombinedLoader knows its _mode."""
    source = L.Trainer(barebones=True).fit_loop._data_source
    source.dataloader = lambda: [1, 2]
    assert data_connector._request_dataloader(source) == [1, 2]
    assert CombinedLoader([[1]], "sequential")._mode == "sequential"


@relied_on("_logger_connector")
def values_are_logged_after_a_batch_s_hooks() -> None:
    """After the hooks of a batch, the loop calls _logger_connector.update_train_step_metrics, then on_advance_end."""
    advance = inspect.getsource(training_epoch_loop._TrainingEpochLoop.advance)
    assert advance.index('"on_train_batch_end"') < advance.index("_logger_connector.update_train_step_metrics()")
    run = inspect.getsource(fit_loop._FitLoop.run)
    calls = ("setup_data", "skip", "on_run_start", "done", "on_advance_start", "advance", "on_advance_end")
    places = [run.index(f"self.{name}") for name in calls]
    assert places == sorted(places)


KEPT = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics", "_first_loop_iter", "_current_fx")


@relied_on(*KEPT, "_results", "_Metadata", "_ResultMetric", "_Sync", "_should")
def logged_values_are_begun_anew_before_the_strategy_s_setup() -> None:
    """Trainer._run resets what _logger_connector and the loops' _results hold, then calls Strategy.setup; a result has
    value, cumulated_batch_size and meta, of which meta.sync(value) is that of all ranks."""
    run = inspect.getsource(L.Trainer._run)
    assert run.index("reset_results()") < run.index("reset_metrics()") < run.index("self.strategy.setup(self)")
    trainer = L.Trainer(barebones=True)
    assert set(KEPT) <= set(vars(trainer._logger_connector))
    results = type(trainer.fit_loop.epoch_loop._results)(training=True)
    results.log("training_step", "loss", torch.tensor(2.0), batch_size=3)
    (result,) = results.result_metrics
    again = type(result)(_Metadata("training_step", "loss", reduce_fx=torch.mean), is_tensor=True)
    again.meta.sync = _Sync(fn=_Sync.no_op, _should=False)
    assert type(result) is _ResultMetric and again.meta == result.meta, "made from what is saved of it, it is the same"
    assert result.meta.is_mean_reduction and not result.meta.sync.should and not result.has_reset
    assert (float(result.value), int(result.cumulated_batch_size)) == (6, 3)


@relied_on("_restarting", "_combined_loader")
def loops_know_that_they_go_on() -> None:
    """A loop's _restarting is its own, until an epoch is through; plateau schedulers do not see it before."""
    trainer = L.Trainer(barebones=True)
    loop = trainer.fit_loop
    loop.epoch_progress.increment_ready()
    loop.restarting = True
    loop._restarting = False
    assert loop.epoch_loop.restarting and loop.epoch_loop.val_loop.restarting and not loop.restarting
    end = inspect.getsource(fit_loop._FitLoop.on_advance_end)
    assert "if not self.restarting and self.epoch_loop._num_ready_batches_reached():" in end
    assert not loop.restarted_on_epoch_end and not loop.resumed_on_epoch_end and loop._combined_loader is None
    for progress in (loop.epoch_loop.batch_progress, loop.epoch_loop.val_loop.batch_progress):
        names = {"ready", "started", "processed", "completed"}
        assert set(progress.state_dict()) == {"total", "current", "is_last_batch"}
        assert set(vars(progress.total)) == set(vars(progress.current)) == names


@relied_on("_signal_connector")
def signal_handlers_end_with_a_run() -> None:
    """_signal_connector.teardown() puts back the handlers that were there before register_signal_handlers()."""
    connector, before = L.Trainer(barebones=True)._signal_connector, signal.getsignal(signal.SIGTERM)
    connector.register_signal_handlers()
    assert signal.getsignal(signal.SIGTERM) is not before
    connector.teardown()
    assert signal.getsignal(signal.SIGTERM) is before


@relied_on("_should_check_val_fx")
def validation_is_asked_for_once_a_batch() -> None:
    """_TrainingEpochLoop asks it when a batch has been trained, with all that it looks at as in on_train_batch_end; and
    it skips that validation when it goes on from a checkpoint of that hook."""
    loop = training_epoch_loop._TrainingEpochLoop
    assert "self._should_check_val_fx(data_fetcher)" in inspect.getsource(loop.on_advance_end)
    assert "self.val_loop.increment_progress_to_evaluation_end()" in inspect.getsource(loop.advance)


@relied_on("_data_fetcher", "_combined_loader_states_to_load", "_load_combined_loader_states")
def loaders_made_early_do_not_read_their_state() -> None:
    """FitLoop.setup_data makes loaders and their _data_fetcher once, and then loads the states that are there; those
    of a checkpoint that is read later stay in _combined_loader_states_to_load."""
    setup = inspect.getsource(fit_loop._FitLoop.setup_data)
    assert setup.index("self._load_combined_loader_states()") < setup.index("iter(self._data_fetcher)")
    loop = L.Trainer(barebones=True).fit_loop
    assert loop._data_fetcher is None and loop._combined_loader_states_to_load == []


@relied_on("_throughputs")
def throughput_is_counted_by_stage() -> None:
    """ThroughputMonitor has a Throughput with a world_size for each stage."""
    trainer, monitor = L.Trainer(barebones=True), ThroughputMonitor(batch_size_fn=len)
    trainer.state.fn, trainer.state.stage = TrainerFn.FITTING, RunningStage.TRAINING
    monitor.setup(trainer, BoringModel(), "fit")
    assert monitor._throughputs and all(t.world_size == 1 for t in monitor._throughputs.values())


@relied_on("_monitor_candidates", "_enable_version_counter", "_ModelCheckpoint__resolve_ckpt_dir")
def model_checkpoint_decides_and_then_calls() -> None:
    """ModelCheckpoint._save_topk_checkpoint and _save_last_checkpoint set what is remembered, call _save_checkpoint,
    and then _remove_checkpoint for what was replaced; a time interval of 0 saves after each batch."""
    kind = ModelCheckpoint
    for name in ("_save_none_monitor_checkpoint", "_update_best_and_save", "_save_last_checkpoint"):
        text = inspect.getsource(getattr(kind, name))
        assert text.index("self._save_checkpoint(trainer, filepath)") < text.index("self._remove_checkpoint(trainer, ")
    text = inspect.getsource(kind._save_last_checkpoint)
    assert "self._enable_version_counter" in text and "!= self.last_model_path" in text
    assert "self._link_checkpoint(trainer, self._last_checkpoint_saved, filepath)" in text
    text = inspect.getsource(kind._save_checkpoint)
    assert "self._last_global_step_saved = trainer.global_step" in text and "after_save_checkpoint(proxy(self))" in text
    text = inspect.getsource(kind.on_train_batch_end)
    assert "skip_time = trainer.strategy.broadcast(skip_time)" in text
    assert "train_time_interval = self._train_time_interval" in text and "self._every_n_train_steps < 1" in text
    text = inspect.getsource(type(L.Trainer(barebones=True)._checkpoint_connector)._parse_ckpt_path)
    assert "candidates |= callback._find_last_checkpoints(self.trainer)" in text
    assert set(_model_checkpoint._MEMORY) <= vars(kind(monitor="x")).keys()
    trainer = L.Trainer(logger=False, accelerator="cpu", default_root_dir="elsewhere")
    assert Path(kind()._ModelCheckpoint__resolve_ckpt_dir(trainer)).parts[-2:] == ("elsewhere", "checkpoints")
    assert set(kind()._monitor_candidates(trainer)) == {"epoch", "step"}


@relied_on("_max_depth", "_summary", "_get_summary_data")
def summaries_are_asked_for() -> None:
    """ModelSummary._summary(trainer, module) returns what has _get_summary_data() and the totals."""
    callback = ModelSummary(max_depth=3)
    assert callback._max_depth == 3
    signature(callback._summary).bind(None, None)
    assert "self._summary(trainer, pl_module)" in inspect.getsource(ModelSummary.on_fit_start)
    data = dict(summarize(BoringModel(), max_depth=1)._get_summary_data())
    assert data["Name"] == ["layer"] and data["Params"][0].strip() == "66"


@relied_on("_device_mesh", "_trainer")
def modules_know_mesh_and_trainer() -> None:
    """LightningModule.device_mesh and .trainer say what stands in _device_mesh and _trainer."""
    module: Any = BoringModel()
    module._device_mesh, module._trainer = mesh, trainer = object(), L.Trainer(barebones=True)
    assert module.device_mesh is mesh and module.trainer is trainer


# ---- torch's


@relied_on("_apply")
def tensors_are_replaced() -> None:
    """Module._apply(function) replaces all parameters and buffers by what the function returns."""
    with torch.device("meta"):
        module = nn.BatchNorm1d(2)
    module._apply(lambda t: torch.zeros_like(t, device="cpu"))
    assert not any(t.is_meta for t in (*module.parameters(), *module.buffers()))


@relied_on("_composable_state", "_module_state_mapping")
def divided_modules_are_remembered() -> None:
    """torch.distributed._composable_state._module_state_mapping has the modules that fully_shard refuses to take
    again."""
    module, state = nn.Linear(1, 1), FSDPState()
    _composable_state._insert_module_state(module, state)
    assert module in _composable_state._module_state_mapping
    with pytest.raises(AssertionError, match="more than once"):
        _composable_state._insert_module_state(module, state)


@relied_on("_non_persistent_buffers_set")
def buffers_that_are_not_saved() -> None:
    """Module._non_persistent_buffers_set has the names of buffers that state_dict leaves out."""
    module = nn.Module()
    module.register_buffer("saved", torch.ones(1))
    module.register_buffer("left", torch.ones(1), persistent=False)
    assert module._non_persistent_buffers_set == {"left"} and list(module.state_dict()) == ["saved"]


@relied_on("_version", "_is_view", "_base")
def tensors_know_changes_and_views() -> None:
    """Tensor._version counts changes in place; _is_view() and _base know of what it is a view."""
    tensor = torch.ones(2)
    before = tensor._version
    tensor.add_(1)
    assert tensor._version == before + 1
    part = tensor[:1]
    assert part._is_view() and part._base is tensor and tensor._base is None and not tensor._is_view()


@relied_on("_backward_hooks", "_post_accumulate_grad_hooks")
def hooks_on_gradients_are_seen() -> None:
    """Tensor._backward_hooks and _post_accumulate_grad_hooks are empty or None until a hook is registered."""
    one, two = (nn.Parameter(torch.ones(1)) for _ in range(2))
    assert not one._backward_hooks and not two._post_accumulate_grad_hooks
    one.register_hook(lambda grad: grad)
    two.register_post_accumulate_grad_hook(lambda parameter: None)
    assert one._backward_hooks and two._post_accumulate_grad_hooks


@relied_on("_checkpoint_connector", "_select_ckpt_path")
def the_checkpoint_is_chosen_before_the_strategy_is_set_up() -> None:
    """Trainer._checkpoint_connector._select_ckpt_path is asked once by fit, before Strategy.setup."""
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", max_steps=0)
    choose, asked = trainer._checkpoint_connector._select_ckpt_path, []
    trainer._checkpoint_connector._select_ckpt_path = lambda *a, **k: asked.append(choose(*a, **k)) or asked[-1]
    setup, known = trainer.strategy.setup, []
    trainer.strategy.setup = lambda trainer: (known.append(list(asked)), setup(trainer))
    trainer.fit(BoringModel())
    assert known == [asked] == [[None]]


@relied_on("_compiled_call_impl")
def compiled_modules_say_so() -> None:
    """nn.Module._compiled_call_impl is None until compile(); torch.compile(module) makes an OptimizedModule."""
    module = nn.Linear(1, 1)
    assert module._compiled_call_impl is None
    assert type(torch.compile(module)).__name__ == "OptimizedModule"
    module.compile()
    assert module._compiled_call_impl is not None


@relied_on("_defaults", "_reductions", "_update_count", "_computed", "_forward_cache", "_to_sync", "_persistent")
def metrics_keep_states_and_what_they_were() -> None:
    """torchmetrics: states by name with their defaults and reductions, and what was computed until the next update."""
    metric = CatMetric()
    assert metric._defaults == {"value": []} and metric._reductions == {"value": dim_zero_cat}
    assert metric._persistent == {"value": False}
    assert metric._to_sync and metric._update_count == 0
    metric(torch.ones(2))
    assert metric._update_count == 1 and torch.equal(metric._forward_cache, torch.ones(2))
    metric.compute()
    assert metric._computed is not None
    metric.update(torch.ones(1))
    assert metric._computed is None


@relied_on("_found_inf_per_device", "_check_inf_per_device")
def scaler_has_flags() -> None:
    """GradScaler writes a flag a device, by unscale_ and by _check_inf_per_device, and step reads the same tensors."""
    parameter = nn.Parameter(torch.ones(1))
    optimizer, scaler = torch.optim.SGD([parameter], lr=1.0), torch.amp.GradScaler("cpu")
    parameter.grad = scaler.scale(torch.ones(1))
    scaler.unscale_(optimizer)
    (flag,) = scaler._found_inf_per_device(optimizer).values()
    assert flag.ndim == 0 and flag == 0
    flag.fill_(1)
    scaler.step(optimizer)
    assert parameter == 1, "a step was made although the flag says that a gradient is not finite"
    assert [flag.ndim for flag in scaler._check_inf_per_device(optimizer).values()] == [0]
    assert "self._check_inf_per_device(optimizer)" in inspect.getsource(scaler.step), "called by fused optimizers"


@relied_on("_C", "_autograd", "_top_saved_tensors_default_hooks")
def recomputation_is_seen() -> None:
    """Inside torch.utils.checkpoint, the hooks on saved tensors are those of its own _checkpoint_hook."""

    def seen(x: Tensor) -> Tensor:
        names.append(torch._C._autograd._top_saved_tensors_default_hooks(False)[0].__qualname__)
        return x * x

    names: list[str] = []
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    checkpoint.checkpoint(seen, torch.ones(1, requires_grad=True), use_reentrant=False)
    assert names[0].startswith("_checkpoint_hook."), names


@relied_on("_current_graph_task_id")
def a_backward_pass_is_seen() -> None:
    """-1 outside of backward passes, another number in them."""
    seen: list[int] = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda _: seen.append(torch._C._current_graph_task_id()))
    assert torch._C._current_graph_task_id() == -1
    x.sum().backward()
    assert seen[0] >= 0


@relied_on("_get_current_function_mode", "_pop_mode_temporarily")
def function_modes_are_a_stack() -> None:
    """The innermost mode is known, and sees nothing until it is pushed again."""
    assert overrides._get_current_function_mode() is None
    with overrides.BaseTorchFunctionMode(), overrides.BaseTorchFunctionMode() as innermost:
        assert overrides._get_current_function_mode() is innermost
        with overrides._pop_mode_temporarily():
            assert overrides._get_current_function_mode() not in (None, innermost)
        assert overrides._get_current_function_mode() is innermost


@relied_on("_last_lr")
def schedulers_keep_their_last_rates() -> None:
    """What get_last_lr() says is the attribute, and so is what a checkpoint keeps."""
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(sgd, 1)
    assert scheduler._last_lr == scheduler.get_last_lr() == [0.5]
    sgd.param_groups[0]["lr"] = 0.25
    note_rates(scheduler)
    assert scheduler.get_last_lr() == [0.25] and scheduler.state_dict()["_last_lr"] == [0.25]


@relied_on("_inductor")
def a_missing_compiler_is_said() -> None:
    """get_cpp_compiler() raises InvalidCxxCompiler where no C++ compiler is."""
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(exc.InvalidCxxCompiler):
        cpp_builder.get_cpp_compiler()


def on_a_rank() -> None:
    """What needs a process group: its store, its time-outs, and FSDP2's state."""
    torch.distributed.init_process_group("gloo")
    store = distributed_c10d._get_default_store()
    store.set("key", "value")
    assert store.get("key") == b"value"
    mesh = init_device_mesh("cpu", (1,))
    signature(distributed_c10d._set_pg_timeout).bind(timedelta(seconds=7), mesh.get_group(0))
    module: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    fully_shard(module[0], mesh=mesh)
    fully_shard(module, mesh=mesh)
    state = module._get_fsdp_state()
    assert isinstance(module, FSDPModule) and isinstance(state, FSDPState)
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    assert not module._forward_pre_hooks and not module._forward_hooks, "hooks that are not FSDP's handles"
    state._lazy_init()
    assert state._state_ctx.all_states == [state, module[0]._get_fsdp_state()]
    assert state._training_state == TrainingState.IDLE
    (group,) = state._fsdp_param_groups
    assert "replicate_process_group" in inspect.getsource(type(group)._all_reduce_process_group.fget)
    assert not group.is_unsharded
    assert {parameter._module_info.module for parameter in group.fsdp_params} == {module[1]}
    x = torch.ones(1, 2)
    ((given,), _) = state._pre_forward(module, (x,), {})
    assert given is x and group.is_unsharded and state._state_ctx.iter_forward_root is state
    assert all(type(parameter.unsharded_param) is nn.Parameter for parameter in group.fsdp_params)
    out = module(x)
    assert state._post_forward(module, (x,), out) is not None
    assert group.is_unsharded and state._state_ctx.iter_forward_root is None, "the root stays whole after its forward"
    module.set_requires_gradient_sync(True)
    (weight, _) = group.fsdp_params
    assert weight._orig_size == (2, 2) and weight._unsharded_param is weight.unsharded_param
    weight.unsharded_accumulated_grad = torch.ones(2, 2)  # of batches before, to which the next one adds
    state._register_root_post_backward_final_callback  # noqa: B018 - that it is there; it may be called in a backward
    state._pre_forward(module, (), {})
    module(x).sum().backward()
    group.post_backward()
    state._root_post_backward_final_callback()
    assert state._state_ctx.iter_forward_root is None and module[1].weight.grad is not None
    assert weight.unsharded_accumulated_grad is None
    assert torch.equal(module[1].weight.grad.full_tensor(), 1 + module[0](x).expand(2, 2))
    module.reshard()
    assert not group.is_unsharded
    group.unshard(async_op=True)
    assert group._all_gather_result is not None and not group.is_unsharded, "gathered ahead, and not used yet"
    group.finalize_backward()
    assert group._all_gather_result is None and not group.is_unsharded


@relied_on(
    *("_get_default_store", "_set_pg_timeout", "_fully_shard", "_fsdp_common", "_fsdp_state", "_get_fsdp_state"),
    *("_pre_forward_hook_handle", "_post_forward_hook_handle", "_lazy_init", "_fsdp_param_groups", "_module_info"),
    *("_pre_forward", "_post_forward", "_state_ctx", "_training_state", "_root_post_backward_final_callback"),
    *("_register_root_post_backward_final_callback", "_all_gather_result"),
    *("_orig_size", "_unsharded_param"),
)
def groups_and_fsdp() -> None:
    """FSDP2's state gathers and divides its root's weights, driven by hand as strategies/_torch.py does."""
    run_ranks(on_a_rank, 1)


@relied_on("_MultiProcessingDataLoaderIter", "_iterator", "_shutdown_workers")
def kept_workers_are_a_loader_s_iterator() -> None:
    """With persistent workers a DataLoader keeps its iterator, which can end them; without, it keeps none."""
    loader = DataLoader(range(4), num_workers=1, persistent_workers=True)  # type: ignore[arg-type]
    assert len(list(loader)) == 4 and isinstance(loader._iterator, dataloader._MultiProcessingDataLoaderIter)
    workers = loader._iterator._workers
    loader._iterator._shutdown_workers()
    assert not any(worker.is_alive() for worker in workers)
    loader._iterator = None
    loader.num_workers = 0
    assert len(list(loader)) == 4 and loader._iterator is None


@relied_on("_on_before_fetch", "_on_after_fetch")
def a_fetch_is_announced() -> None:
    """The epoch's loop gives both to its fetcher in on_run_start, which begins an iteration before, in all epochs but
    the first; and counts the batches of before, where it goes on in the middle."""
    loop = training_epoch_loop._TrainingEpochLoop
    source = inspect.getsource(loop.on_run_start)
    order = ["iter(data_fetcher)", "data_fetcher.fetched += self.batch_progress.current.ready"]
    order += ["_start_profiler = self._on_before_fetch", "_stop_profiler = self._on_after_fetch"]
    assert [source.index(words) for words in order] == sorted(source.index(words) for words in order)
    fetch = inspect.getsource(fetchers._DataFetcher.__next__)
    assert fetch.index("_start_profiler()") < fetch.index("next(self.iterator)") < fetch.index("_stop_profiler()")


def on_a_recorded_rank() -> str:
    """A collective, and what the flight recorder has of it."""
    torch.distributed.init_process_group("gloo")
    torch.distributed.all_reduce(torch.ones(2))
    return flight_record()


@relied_on("_dump_fr_trace_json", "_distributed_c10d")
def the_flight_recorder() -> None:
    """It gives what backends remember of their collectives as JSON, where ``TORCH_FR_BUFFER_SIZE`` asks for it."""
    (told,) = run_ranks(on_a_recorded_rank, 1, env={"TORCH_FR_BUFFER_SIZE": "10"})
    assert [entry["profiling_name"] for entry in json.loads(told)["entries"]] == ["gloo:all_reduce"]


@relied_on("_streaming_load", "_serialization")
def a_stream_is_read_as_plain_data() -> None:
    """_streaming_load(weights_only=True) reads what _streaming_save has written, and raises for one that is cut off."""
    from torch.distributed import _serialization

    buffer = io.BytesIO()
    _serialization._streaming_save({"a": torch.arange(5), "b": [1, "c"]}, buffer)
    written = buffer.getvalue()
    read: Any = _serialization._streaming_load(io.BytesIO(written), weights_only=True)
    assert read["a"].tolist() == [0, 1, 2, 3, 4] and read["b"] == [1, "c"]
    for cut in range(len(written)):
        try:
            _serialization._streaming_load(io.BytesIO(written[:cut]), weights_only=True)
        except Exception:
            continue
        raise AssertionError(f"{cut} of {len(written)} bytes were taken for all")


@pytest.mark.parametrize("check", dict.fromkeys(CHECKS.values()), ids=lambda check: check.__name__)
def test_it_exists_and_means_what_is_relied_on(check: Callable[[], None]) -> None:
    names = ", ".join(name for name, its in CHECKS.items() if its is check)
    try:
        check()
    except Exception as error:
        raise AssertionError(f"{names}: no longer what these files ask: {check.__doc__}") from error
