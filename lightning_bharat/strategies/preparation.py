"""From the module as the person wrote it to the one that trains: cut, divided, with its weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_bharat.plan.blocks import find_units
from lightning_bharat.plan.cut_context import ContextFlow
from lightning_bharat.plan.elsewhere import is_elsewhere
from lightning_bharat.plan.model_plan import ModelPlan
from lightning_bharat.plan.shards import TensorSlice
from lightning_bharat.strategies import _lightning, context, planning
from lightning_bharat.strategies._torch import replace_groups_of_copies, set_timeout
from lightning_bharat.strategies.agreement import agree_on_weights
from lightning_bharat.strategies.batch_norm import normalize_over_ranks
from lightning_bharat.strategies.buffers import compare_buffers
from lightning_bharat.strategies.compiled import compile_arguments, compile_block
from lightning_bharat.strategies.compression import CompressedGroup
from lightning_bharat.strategies.data import DataShards
from lightning_bharat.strategies.expert import spread_experts
from lightning_bharat.strategies.explained import explained
from lightning_bharat.strategies.fits import check_memory
from lightning_bharat.strategies.float8 import refuse_float8_cuts
from lightning_bharat.strategies.initialize import Initializer
from lightning_bharat.strategies.own_cut import is_cut, refuse_undone
from lightning_bharat.strategies.recompute import recompute
from lightning_bharat.strategies.refusals import refuse_compiled_parent, refuse_gradient_hooks, refuse_module
from lightning_bharat.strategies.schedule import KINDS
from lightning_bharat.strategies.stage import keep_own
from lightning_bharat.strategies.tensor import cut_module
from lightning_bharat.strategies.whole_form import WholeForm

if TYPE_CHECKING:
    from lightning_bharat.strategies.hybrid import HybridStrategy


class Preparation:
    """One module, made ready in the order that each part needs: convert, agree, plan, cut, recompute, compile, divide,
    initialize.

    Attributes:
        plan: where the module can be cut. ``None`` for a module that its own ``configure_model`` has cut.
        slices: by full name, which part of a parameter this tensor rank holds.
        held: by full name, the pipeline stages that hold a parameter.
        cut: the same by ids of parameters.
        form: the module before all that.
    """

    def __init__(self, strategy: HybridStrategy, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.module, self.strategy = module, strategy
        self.plan: ModelPlan | None = None
        self.slices: dict[str, TensorSlice] = {}
        self.held: dict[str, set[int]] = {}
        self._shards: DataShards | None = None
        self._sequence: ContextFlow | None = None
        self._experts: list[str] = []
        strategy.model = strategy.precision_plugin.convert_module(module)
        self.form = WholeForm(module)
        if is_cut(module):
            self._take_as_it_is()
        else:
            self._cut(trainer)
            for name, words in explained(strategy.options, strategy.layout, str(strategy.precision_plugin.precision)):
                strategy.choices.setdefault(name, words)
        self._synchronize_metrics()
        self.form.cut()
        named = module.named_parameters(remove_duplicate=False)
        self.cut = {id(p): self.slices[name] for name, p in named if name in self.slices}

    def _cut(self, trainer: pl.Trainer) -> None:
        strategy, module, options, layout = self.strategy, self.module, self.strategy.options, self.strategy.layout
        choices = strategy.choices
        device = strategy.root_device
        refuse_float8_cuts(strategy.precision_plugin, layout)
        units = find_units(module)
        self._blocks = len(units)  # of all stages: each rank says the same
        divided = layout.data > 1 or layout.expert > 1 or options.offload
        if divided or layout.tensor > 1 or layout.context > 1:
            refuse_module(module, units, divided)
        check_memory(strategy, module, units)
        start = Initializer(module, strategy.first_weights)
        agreed = agree_on_weights(module, device, start.given)
        choices["weights"] = start.words or agreed
        self.plan = planning.plan_for(strategy, trainer, module)
        sequence_cut = context.find_for(strategy, trainer, module) if layout.context > 1 else None
        stages = strategy.stage_blocks(self.plan)
        split = layout.pipeline > 1 and KINDS[strategy.schedule].split_backward
        _lightning.show_whole_summary(trainer, module)
        if layout.tensor > 1:
            sequence, loss = (planning.used(strategy, self.plan, name) for name in ("sequence", "loss"))
            assert strategy.tensor_group is not None
            self.slices = cut_module(
                module, self.plan, strategy.tensor_group, sequence, loss, stages=stages, split_backward=split
            )
        if sequence_cut:
            self._sequence = context.carry_out(strategy, module, sequence_cut, stages, split)
        if layout.expert > 1:
            self._experts, slices = spread_experts(strategy, module, self.plan)
            self.slices |= slices
        if layout.data > 1 and (count := normalize_over_ranks(module, strategy.data_group)):
            choices["batch norm"] = f"statistics over the rows of all data ranks, in {count} modules"
        if layout.pipeline > 1:
            refuse_compiled_parent(module, self.plan.blocks)
            mine = strategy.stages_of_rank()
            self.held = keep_own(module, self.plan, stages, mine, device)
            units = [name for name in units if not any(map(is_elsewhere, module.get_submodule(name).parameters()))]
        self._change_blocks(units)
        if divided:
            self._divide(units)
        else:
            choices["data_parallel_size"] = "1: nothing is divided over data ranks"
        start.fill(self.slices, device, options.offload)
        if self._shards is not None:
            self._shards.ready()
        self._move()

    def _change_blocks(self, units: list[str]) -> None:
        options, choices = self.strategy.options, self.strategy.choices
        device, mode = self.strategy.root_device, options.activation_checkpointing
        compiling = None if options.compile is False else compile_arguments(options.compile, mode, device)
        for name, wanted in (
            ("activation_checkpointing", options.activation_checkpointing),
            ("compile", compiling is not None and (compiling or True)),
        ):
            if wanted and not units:
                raise ValueError(
                    f"{name}={wanted!r} works on repeated blocks, and {type(self.module).__name__} has no list of "
                    f"them; put two or more modules of one class in an nn.ModuleList, or leave {name} out"
                )
            if wanted:
                choices[name] = f"{wanted}, for {self._blocks} blocks"
        for block in {id(m): m for m in map(self.module.get_submodule, units)}.values():
            if compiling is not None:
                compile_block(block, compiling)
            if options.activation_checkpointing:  # around what is compiled: torch.compile can't look into it
                recompute(block, options.activation_checkpointing)

    def _divide(self, units: list[str]) -> None:
        strategy, layout = self.strategy, self.strategy.layout
        mesh = strategy.device_mesh["data_parallel"]
        if layout.replicate > 1:
            shards, same_batch = layout.data // layout.replicate, layout.context * layout.tensor
            shape = (layout.pipeline, layout.replicate, shards, same_batch)  # of all ranks: each must be in it
            names = ("stages", "replicate", "shard", "same_batch")
            every = init_device_mesh(strategy.root_device.type, shape, mesh_dim_names=names)
            set_timeout(every, strategy.options.timeout)
            mesh = every["replicate", "shard"]
        options = strategy.options
        # Between the micro-batches of a pipeline weights stay whole.
        reshard = False if layout.pipeline > 1 else options.reshard_after_forward
        copies = strategy.expert_mesh["expert_copies"] if self._experts else None
        experts, alone = self._experts, list[nn.Parameter]()
        if copies and copies.size() == 1 and layout.pipeline == 1 and not options.offload:
            # On one rank FSDP2 would copy them in each step. (It moves what is offloaded, and pipelines scale by it.)
            experts, alone = [], [p for name in experts for p in self.module.get_submodule(name).parameters()]
        self._shards = DataShards(
            self.module, mesh, units, reshard, options.offload, experts, copies, options.reduce_dtype, alone
        )
        if options.gradient_compression is not None:
            replace_groups_of_copies(self.module, CompressedGroup)
        blocks = f"{self._blocks} blocks one at a time, the rest for a whole step"
        what = blocks if self._blocks else "the whole module at once"
        if layout.pipeline > 1:
            what = "a stage's weights for a whole step"
        replicas = f" in {layout.replicate} copies" if layout.replicate > 1 else ""
        strategy.choices["data_parallel_size"] = f"{layout.data}: FSDP2{replicas} gathers {what}"

    def _move(self) -> None:
        device = self.strategy.root_device
        if self._shards is None or not self.strategy.options.offload:
            self.module.to(device)
            return
        for metric in (m for m in self.module.modules() if isinstance(m, Metric)):
            metric.to(device)
        _lightning.set_device(self.module, device)

    def _take_as_it_is(self) -> None:
        strategy = self.strategy
        refuse_undone(self.module, strategy.options, dist.get_process_group_ranks(strategy.data_group))
        strategy.choices["plan"] = "the module was cut by its own configure_model, and is taken as it is"
        _lightning.materialize_distributed(self.module, strategy.root_device)
        self.module.to(strategy.root_device)
        strategy.choices["weights"] = f"what it left whole: {agree_on_weights(self.module, strategy.root_device)}"

    def _synchronize_metrics(self) -> None:
        """torchmetrics gather over all ranks unless told: tensor and pipeline peers would count twice."""
        for metric in (m for m in self.module.modules() if isinstance(m, Metric)):
            if metric.process_group is None and self.strategy.layout.data < self.strategy.layout.devices:
                metric.process_group = self.strategy.data_group

    # ---- while it runs

    def refuse_hooks(self) -> None:
        """Refuse gradient hooks that were registered on pieces."""
        parameters = self.module.named_parameters(remove_duplicate=False)
        refuse_gradient_hooks((name, p) for name, p in parameters if isinstance(p, DTensor) or name in self.slices)

    def compare_buffers(self) -> None:
        """Refuse buffers that data ranks have changed in different ways. All ranks must call it."""
        if self.strategy.layout.data > 1:
            compare_buffers(self.module, self.strategy.data_group, self.strategy.root_device)

    def step(self, run: Callable[[], Any], backward: bool) -> Any:
        """Call ``run``, a step of the module, with whole weights."""
        out = self._shards.step(run, backward) if self._shards else run()
        if self._sequence:
            self._sequence.ended()
        return out

    def scheduled(self, run: Callable[[], float]) -> None:
        """Call ``run``, all forward and backward passes of a step, and multiply the gradients by what it returns."""
        if self._shards:
            self._shards.scheduled(run)
            return
        factor = run()
        for parameter in self.module.parameters() if factor != 1 else ():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def divided_parameters(self) -> list[nn.Parameter]:
        """The parameters that this rank holds, as optimizers know them."""
        if self._shards:
            self._shards.divide()
        return [parameter for parameter in self.module.parameters() if not is_elsewhere(parameter)]

    def parameters(self) -> list[nn.Parameter]:
        """Those that have gradients, in the middle of a step too."""
        return self._shards.parameters if self._shards else list(self.module.parameters())

    def before_backward(self) -> None:
        """A backward pass begins."""
        if self._shards:
            self._shards.before_backward()

    def after_backward(self) -> None:
        """A backward pass has ended."""
        if self._shards:
            self._shards.after_backward()

    def watch(self, optimizer: Optimizer) -> None:
        """Tell the data cut about steps of ``optimizer``."""
        if self._shards:
            self._shards.watch(optimizer)

    def rest(self) -> None:
        """Divide what is whole."""
        if self._shards:
            self._shards.rest()

    def undo(self) -> None:
        """The module is as before again; its weights are on ``meta``."""
        if self._shards:
            self._shards.release()
        self.form.restore()

    def without_sync(self) -> AbstractContextManager:
        """Backward passes in here do not exchange gradients."""
        if self._shards:
            return self._shards.without_sync()
        outermost = [m for m in self.module.modules() if isinstance(m, FSDPModule)]
        return _WithoutSync(outermost) if outermost else nullcontext()  # type: ignore[arg-type]


class _WithoutSync:
    """For modules that were cut by their own ``configure_model``."""

    def __init__(self, modules: list[FSDPModule]) -> None:
        self._modules = modules

    def __enter__(self) -> None:
        for module in self._modules:
            module.set_requires_gradient_sync(False, recurse=False)

    def __exit__(self, *_: Any) -> None:
        for module in self._modules:
            module.set_requires_gradient_sync(True, recurse=False)
