"""``strategy="bharat_hybrid"``: an ordinary LightningModule, cut over data, tensor, pipeline and context ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from lightning_bharat.checkpoints.weights import parameter_names
from lightning_bharat.plan.model_plan import ModelPlan
from lightning_bharat.plan.shards import TensorSlice
from lightning_bharat.strategies import _lightning, _lightning_loops, already_cut
from lightning_bharat.strategies.arguments import known_arguments
from lightning_bharat.strategies.callbacks import refuse_callbacks
from lightning_bharat.strategies.choose import Predicted
from lightning_bharat.strategies.connection import ConnectedStrategy
from lightning_bharat.strategies.optimizer_proof import prove_optimizer
from lightning_bharat.strategies.options import Auto, Options
from lightning_bharat.strategies.pipelined import Pipelined
from lightning_bharat.strategies.precision import across_ranks, refuse_precision, total_norm
from lightning_bharat.strategies.preparation import Preparation
from lightning_bharat.strategies.randomness import agree_on_random_numbers, apart
from lightning_bharat.strategies.refusals import refuse_lazy
from lightning_bharat.strategies.scheduled_steps import ScheduledSteps
from lightning_bharat.strategies.token_weights import TokenWeightError, TokenWeights
from lightning_bharat.strategies.whole_norms import WholeNorms, hooks_see_gradients


class HybridStrategy(Pipelined):
    """Trains an unchanged LightningModule on data × tensor × pipeline × context ranks.

    Parameters, gradients and optimizer states are divided over the data ranks by FSDP2; weights of attention heads,
    channels and the vocabulary over the tensor ranks, where a dry run and a proof in float64 show that nothing changes.
    Batch sizes are per data rank; tensor ranks of one data rank load the same batches.

    Args:
        data_parallel_size: ``"auto"`` takes all ranks that the other sizes leave.
        tensor_parallel_size: neighbours on a host. ``"auto"`` is 1 as long as the model fits.
        pipeline_parallel_size: stages of consecutive blocks, each on other ranks. ``"auto"`` is 1.
        context_parallel_size: ranks that hold parts of the sequence of the same batches, in blocks; the rest of the
            model is whole on each.
        expert_parallel_size: ranks over which experts are spread, taken out of the data and context ranks.
        replicate_size: copies of the divided parameters among the data ranks (hybrid sharding); divides the data size.
        num_microbatches: parts of a batch that follow one another through a pipeline. ``None``: twice the stages, or
            the largest number below that divides the batch.
        schedule: of a pipeline: "GPipe", "1F1B", "LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble",
            "ZBVZeroBubble" or "DualPipeV"; all but the first two put two stages on each rank. "auto" takes the fastest
            that fits, by its order of work and the times of a measured block.
        microbatch_fn: ``function(batch, number)`` that returns the parts, for batches that are not split along
            dimension 0 of their tensors.
        sequence_parallel: also divide the hidden state between cuts along the sequence. ``"auto"``: where proven.
        loss_parallel: keep logits divided along the vocabulary in the loss. ``"auto"``: where proven.
        token_weighted: weigh data ranks and accumulated batches by their valid labels, so that the gradient is the mean
            over all labels. ``False`` is Lightning's mean of means. The step returns and logs the mean over its own
            rank's labels in both cases.
        plan: where to cut: Hugging Face's strings by module name, or a :class:`~lightning_bharat.ModelPlan`. ``None``
            finds it.
        reshard_after_forward: free a block's gathered weights between forward and backward (``None``: yes). ``False``:
            all are gathered while a step begins, and stay (ZeRO's stage 2). An ``int`` divides them over that many
            ranks meanwhile.
        reduce_dtype: type in which data ranks average gradients: ``"bfloat16"`` halves what float32 sends; with
            ``"float32"`` a sum of bfloat16 gradients is rounded once. ``None``: their own. Not with a pipeline.
        gradient_compression: ``"int8"`` averages gradients over the ``replicate_size`` copies in eight bits, a quarter
            of what float32 sends, and adds what rounding took away to the next step's: for slow links between hosts.
        activation_checkpointing: ``"full"`` computes blocks again in the backward pass, ``"selective"`` all of a block
            but matrix products and attention.
        offload: keep parameters, gradients and optimizer states in the host's memory.
        compile: ``torch.compile`` each block: ``True``, or that function's arguments, such as ``{"backend": "eager"}``.
        weights: start from these weights instead of the module's own: a ``.safetensors`` file, a folder of them (as
            Hugging Face writes), a checkpoint, or a state dict. Each rank reads its parts alone. A module may give them
            itself, by a method ``initial_weights()`` that returns them by full names.
        save_distributed_checkpoint: write directories, each rank its parts; ``False`` gathers a plain ``.ckpt``.
        checkpoint_compression: "zstd" writes tensors without loss in fewer bytes: space, not time, is saved.
        checkpoint_read_back: compare tensors on the disk with what was written, before a directory gets its name.
        process_group_backend: ``None``: ``"nccl"`` on CUDA, ``"gloo"`` on the CPU.
        timeout: of collectives.

    Attributes:
        schedule: the one that is used; "auto" before it has been chosen.
        predicted: by ``schedule="auto"``, what each schedule would take, the chosen one first.

    Raises:
        ValueError: an argument with a value that this version does not do, by name.
        TypeError: an argument that there is not; names the nearest.
        LayoutError: sizes that do not fit the devices or the model.
        PlanError: a model that can't be cut as asked.
    """

    @known_arguments
    def __init__(
        self,
        data_parallel_size: Auto = "auto",
        tensor_parallel_size: Auto = "auto",
        pipeline_parallel_size: Auto = "auto",
        context_parallel_size: int = 1,
        expert_parallel_size: int = 1,
        replicate_size: int = 1,
        num_microbatches: int | None = None,
        schedule: str = "1F1B",
        sequence_parallel: bool | Literal["auto"] = "auto",
        loss_parallel: bool | Literal["auto"] = "auto",
        token_weighted: bool = False,
        microbatch_fn: Callable | None = None,
        plan: dict[str, str] | ModelPlan | None = None,
        reshard_after_forward: bool | int | None = None,
        reduce_dtype: Literal["bfloat16", "float32"] | None = None,
        gradient_compression: Literal["int8"] | None = None,
        activation_checkpointing: Literal["full", "selective"] | None = None,
        offload: bool = False,
        compile: bool | dict[str, Any] = False,
        weights: Any = None,
        save_distributed_checkpoint: bool = True,
        checkpoint_compression: Literal["zstd"] | None = None,
        checkpoint_read_back: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__()
        given = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        self.options = Options(**given)
        self.schedule = schedule  # "auto" until there is a plan
        self.predicted: tuple[Predicted, ...] = ()
        self.save_distributed_checkpoint = save_distributed_checkpoint
        self.saves.saver.compression, self.saves.saver.read_back = checkpoint_compression, checkpoint_read_back
        self.plan: ModelPlan | None = None
        self.slices: dict[str, TensorSlice] = {}
        self._has_stepped = False
        self._tokens: TokenWeights | None = None

    # ---- setting up

    def setup_environment(self) -> None:
        ConnectedStrategy.setup_environment(self)
        self.watch_errors()
        module = self._module()
        refuse_callbacks(module.trainer, self.world_size)
        if self.world_size > 1:
            refuse_lazy(module)
        self.arrange_ranks(module)
        if self._prepared is None:
            self.schedule = self.options.schedule
        assert self.watch is not None
        self.watch.rank_name = self.layout.name
        across_ranks(self.precision_plugin, self._groups_of, self.root_device, self._stages)
        _lightning.give_mesh(module, self.device_mesh)

    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module = self._module()
        _lightning_loops.use_no_grad(trainer)
        if self.world_size > 1:
            _lightning_loops.agree_on_stopping(trainer, partial(self.reduce_boolean_decision, all=False))
        if self._prepared is None or self._prepared.module is not module:
            self._prepared = already_cut.take(self, module)
            if self._prepared is None:
                with self.changing():
                    self._prepared = Preparation(self, trainer, module)
                already_cut.remember(self, self._prepared)
            self.plan, self.slices = self._prepared.plan, self._prepared.slices
            self._pipeline = ScheduledSteps(self, self._prepared) if self.layout.pipeline > 1 else None
            self.stages = self._pipeline.stages if self._pipeline else None
        plugin: Any = self.precision_plugin
        plugin.backward_ended = self._prepared.after_backward
        if self.world_size > 1 and hooks_see_gradients(trainer, module):  # the look at each function takes time
            plugin.in_hooks = self._whole_norms
        for group in (self.tensor_group, self.context_group):
            if group is not None:
                agree_on_random_numbers(group, self.root_device)
        _lightning.count_by_data_ranks(trainer, self.layout.data)
        self._tokens = TokenWeights(self.data_group) if self.options.token_weighted else None
        self.barrier()
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self.keep_batch(trainer)
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fitting:
            if self._tokens and len(self.optimizers) > 1:
                raise TokenWeightError(
                    f"token_weighted=True weighs the gradients of one optimizer, and configure_optimizers returns "
                    f"{len(self.optimizers)}; write token_weighted=False and weigh losses in the step"
                )
            for optimizer in self.optimizers:
                if self.world_size > 1:
                    staged = self.layout.pipeline > 1
                    prove_optimizer(optimizer, parameter_names(module), self.slices, staged)
                self._prepared.watch(optimizer)
            self.keep_run()
            self.watch_steps()
            self.follow_loops()

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        self.optimizers, self.lr_scheduler_configs = [], []  # those of an earlier run
        super().setup_optimizers(trainer)

    def model_to_device(self) -> None:
        """Done when the module is prepared, block by block."""

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Where tensors are made: on ``meta`` with ``empty_init``; they get their values when the module is cut."""
        on: AbstractContextManager = torch.device("meta") if empty_init else nullcontext()
        with on, self.precision_plugin.tensor_init_context():
            yield

    @property
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        # None stays None: Lightning takes a strategy's own plugin for the user's choice, above Trainer(precision=...)
        if precision_plugin is not None:
            refuse_precision(precision_plugin)
            across_ranks(precision_plugin, self._groups_of, torch.device("cpu"), self._stages)
        self._precision_plugin = precision_plugin

    # ---- steps

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.random_states.batch_starts(self.root_device)
        if batch_idx == 0 and self._prepared is not None:
            self._prepared.refuse_hooks()

    def on_validation_start(self) -> None:
        self.saves.copied()  # callbacks may put other weights in their place
        self._compare_buffers()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        self._compare_buffers()
        return super().lightning_module_state_dict()

    def _compare_buffers(self) -> None:
        if self._prepared is not None:
            self._prepared.compare_buffers()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        here = self.layout.coordinates(self.global_rank)["data"]
        with apart(here, self.root_device) if self.layout.data > 1 else nullcontext():
            out = self._training_step(args, kwargs)
        self.batch_trained(out)
        return out

    def _training_step(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._pipeline:
            return self._pipeline.train(super().training_step, args, kwargs, self._tokens)
        by_hand = not self._module().automatic_optimization
        step = self._whole("training_step", args, kwargs, backward=not by_hand)
        # Such a step may clip by torch's own function.
        with self._whole_norms(in_step=True) if by_hand and self.world_size > 1 else nullcontext():
            return self._tokens.watch(step) if self._tokens else step()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate("validation_step", args, kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate("test_step", args, kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate("predict_step", args, kwargs)

    def _evaluate(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._pipeline:
            return self._pipeline.evaluate(getattr(super(), name), args, kwargs, share=name == "predict_step")
        return self._whole(name, args, kwargs)()

    def _whole(self, name: str, args: tuple, kwargs: dict[str, Any], backward: bool = False) -> Callable[[], Any]:
        assert self._prepared is not None
        step = getattr(super(), name)
        return lambda: self._prepared.step(lambda: step(*args, **kwargs), backward)  # type: ignore[union-attr]

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        if self._pipeline:
            return self._pipeline.backward(closure_loss, optimizer)
        if self._tokens:
            module = self._module()
            divided_by = module.trainer.accumulate_grad_batches if module.automatic_optimization else None
            # Not the module's: those outside of blocks are gathered now, and their gradients are not on them.
            stepped = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
            closure_loss = self._tokens.weigh(closure_loss, divided_by, stepped)
        assert self._prepared is not None
        self._prepared.before_backward()
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable, model: Any = None, **kwargs: Any) -> Any:
        if not self._module().automatic_optimization and self._prepared is not None:
            self._prepared.rest()  # hooks read gradients of parameters as optimizers know them
        out = super().optimizer_step(optimizer, self.saves.before_change(closure), model, **kwargs)
        if not self._has_stepped:  # soon, and again where buffers are used
            self._has_stepped = True
            self._compare_buffers()
        if self._tokens:
            self._tokens.stepped()
        return out

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Backward passes in here exchange no gradients: all but the last of an accumulation window."""
        # Rescaling of what is accumulated (token_weighted) needs reduced gradients; a step that optimizes by hand
        # reads, clips and clears gradients, which are in no parameter before they are exchanged.
        by_hand = not self._module().automatic_optimization
        # In another type gradients would be added up in that, so each batch's are reduced, and added up in their own.
        apart = by_hand or self.options.reduce_dtype is not None
        plain = self._prepared and not (self._tokens or self._pipeline or apart)
        blocked = self._prepared.without_sync() if self._prepared and plain else nullcontext()
        with blocked:
            yield

    def grad_norm(self, norm_type: float = 2.0) -> Tensor:
        """The norm of all gradients as one vector, over all ranks. All ranks must call it, after the backward pass."""
        assert self._prepared is not None
        return total_norm(self._prepared.parameters(), self._groups_of, norm_type, self.root_device, self._stages())

    def _whole_norms(self, in_step: bool = False) -> WholeNorms:
        assert self._prepared is not None
        return WholeNorms(self._prepared.parameters, self._groups_of, in_step, refuse=self.layout.pipeline > 1)

    def _groups_of(self, parameter: Tensor) -> list[dist.ProcessGroup]:
        cut = self._prepared.cut.get(id(parameter)) if self._prepared is not None else None
        group = cut and (cut.group or self.tensor_group)
        return [group] if group else []

    # ---- words, and the end

    def explain(self) -> str:
        """Each choice that was made and why, as text."""
        lines = [f"{self._layout or 'layout not known yet'}"]
        lines += [f"{name}: {why}" for name, why in self.choices.items()]
        if self.plan is not None:
            lines += ["", str(self.plan)]
        return "\n".join(lines)

    def teardown(self) -> None:
        if self._prepared is not None:
            self._prepared.rest()
        super().teardown()

    def __repr__(self) -> str:
        return f"HybridStrategy({self._layout or self.options})"
