"""The loops that are compared: each trains the same decoder, from the same start, on the batches that it is given.

All of them do what a person needs in a step: zero the gradients, forward, backward, clip to a norm, AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from lightning_bharat import DeepSpeedStrategy, HybridStrategy, Layout
from lightning_bharat.models import GPT, GPTConfig, GPTModule
from lightning_bharat.strategies.tensor import cut_module

Batch = dict[str, Tensor]

CLIP = 1.0
SEED = 7


def batches(config: GPTConfig, rows: int, time: int, count: int, data_rank: int) -> list[Batch]:
    """Random tokens, ``count`` times (rows, time); others on each data rank."""
    draw = torch.Generator().manual_seed(data_rank)
    tokens = torch.randint(config.vocab_size, (count, rows, time + 1), generator=draw)
    return [{"input_ids": t[:, :-1].contiguous(), "labels": t[:, 1:].contiguous()} for t in tokens]


class ByTrainer:
    """Lightning's Trainer with a strategy. What Lightning can do around a step whatever the strategy (loggers, progress
    bars, checkpoints) is off.

    Attributes:
        losses: of each step.
        callbacks: the Trainer's.
    """

    def __init__(
        self, config: GPTConfig, layout: Layout, strategy: Strategy | str, kind: type[GPTModule] = GPTModule
    ) -> None:
        self.config, self.layout, self.strategy, self.kind = config, layout, strategy, kind
        self.losses: list[Tensor] = []
        self.callbacks: list[L.Callback] = [_KeepLosses(self.losses)]

    def __call__(self, batches: Iterable[Batch]) -> None:
        L.seed_everything(SEED, verbose=False)
        trainer = L.Trainer(
            strategy=self.strategy,
            accelerator="cpu",
            devices=self.layout.devices,
            max_epochs=1,
            gradient_clip_val=CLIP,
            callbacks=self.callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(self.kind(self.config), batches)


class _KeepLosses(L.Callback):
    def __init__(self, losses: list[Tensor]) -> None:
        self.losses = losses

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"])


def ours(
    config: GPTConfig,
    layout: Layout,
    microbatches: int,
    schedule: str = "1F1B",
    keeps_weights: bool = False,
    kind: type[GPTModule] = GPTModule,
) -> tuple[HybridStrategy, ByTrainer]:
    """The strategy of this package, with ``microbatches`` under a pipeline, and its loop.

    Args:
        keeps_weights: gathered ones stay from forward to backward.
    """
    strategy = HybridStrategy(
        data_parallel_size=layout.data,
        tensor_parallel_size=layout.tensor,
        pipeline_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        expert_parallel_size=layout.expert,
        reshard_after_forward=False if keeps_weights else None,
        num_microbatches=microbatches if layout.pipeline > 1 else None,
        schedule=schedule,
    )
    return strategy, ByTrainer(config, layout, strategy, kind)


def lightnings(config: GPTConfig, layout: Layout) -> ByTrainer:
    """Lightning's own strategy for both cuts, which the module carries out in its ``configure_model``."""
    strategy = ModelParallelStrategy(data_parallel_size=layout.data, tensor_parallel_size=layout.tensor)
    return ByTrainer(config, layout, strategy, CutByItself)


def deepspeeds(config: GPTConfig, layout: Layout, stage: int) -> ByTrainer:
    """DeepSpeed's ZeRO on data ranks."""
    return ByTrainer(config, layout, DeepSpeedStrategy(stage))


class CutByItself(GPTModule):
    """The decoder with torch's tensor parallelism, of the sequence and the loss too, and ``fully_shard``."""

    @property
    def meshes(self) -> tuple[DeviceMesh, DeviceMesh]:
        """The data ranks and the tensor ranks."""
        assert self.device_mesh is not None
        return self.device_mesh["data_parallel"], self.device_mesh["tensor_parallel"]

    def configure_model(self) -> None:
        data, tensor = self.meshes
        if tensor.size() > 1:
            parallelize_module(self.model, tensor, _outside_blocks())
            for block in self.model.layers:
                parallelize_module(block, tensor, _in_a_block())
        if data.size() > 1:
            for block in self.model.layers:
                fully_shard(block, mesh=data)
            fully_shard(self.model, mesh=data)

    def _loss(self, batch: Batch, reduction: str = "mean") -> Tensor:
        with self._loss_parallel():
            loss = super()._loss(batch, reduction)
        return loss.full_tensor() if isinstance(loss, DTensor) else loss

    def backward(self, loss: Tensor) -> None:
        with self._loss_parallel():
            loss.backward()

    def _loss_parallel(self) -> AbstractContextManager:
        return loss_parallel() if self.meshes[1].size() > 1 else nullcontext()


def _outside_blocks() -> dict[str, Any]:
    return {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }


def _in_a_block() -> dict[str, Any]:
    columns, rows = ColwiseParallel, RowwiseParallel(output_layouts=Shard(1))
    return {
        "input_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
        ),
        "self_attn.q_proj": columns(),
        "self_attn.k_proj": columns(),
        "self_attn.v_proj": columns(),
        "self_attn.o_proj": rows,
        "post_attention_layernorm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "mlp.gate_proj": columns(),
        "mlp.up_proj": columns(),
        "mlp.down_proj": rows,
    }


class HandWritten:
    """A loop without Lightning, with the cuts of ``strategy``, which has been set up.

    Attributes:
        losses: of each step.
    """

    def __init__(self, config: GPTConfig, strategy: HybridStrategy) -> None:
        self.config, self.strategy = config, strategy
        self.losses: list[Tensor] = []

    def __call__(self, batches: Iterable[Batch]) -> None:
        torch.manual_seed(SEED)
        model = GPT(self.config)
        clip = self._cut(model)
        optimizer = adamw(model, model.embed_tokens)
        for batch in batches:
            optimizer.zero_grad()
            logits = model(batch["input_ids"])
            loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
            loss.backward()
            clip()
            optimizer.step()
            self._after_step(model)
            self.losses.append(loss.detach())

    def _after_step(self, model: GPT) -> None: ...

    def _cut(self, model: GPT) -> Any:
        """Cut the model as the strategy has cut its own; returns how to clip its gradients."""
        layout, plan, group = self.strategy.layout, self.strategy.plan, self.strategy.tensor_group
        holder = nn.ModuleDict({"model": model})  # gives weights the names that they have in the LightningModule
        pieces: dict[str, Any] = {}
        if group is not None and plan is not None:
            pieces = cut_module(holder, plan, group, sequence=True, loss=True)
        if layout.data > 1:
            mesh = self.strategy.device_mesh["data_parallel"]
            for block in model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        if group is None:
            return lambda: clip_grad_norm_(model.parameters(), CLIP)
        cut = [p for name, p in holder.named_parameters() if name in pieces]
        whole = [p for name, p in holder.named_parameters() if name not in pieces]
        return lambda: _clip(cut, whole, group)


@torch.no_grad()
def _clip(cut: list[nn.Parameter], whole: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    """torch's own clipping does not know that ``cut`` are pieces, of which each rank of ``group`` has others."""
    pieces, rest = norm(cut).square(), norm(whole).square()
    dist.all_reduce(pieces, group=group)
    clip_grads_with_norm_([*cut, *whole], CLIP, (pieces + rest).sqrt())


def norm(parameters: list[nn.Parameter]) -> Tensor:
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def adamw(model: nn.Module, embedding: nn.Module | None) -> torch.optim.AdamW:
    """As :class:`GPTModule` has it: matrices decay, the embedding and norms do not."""
    weight = embedding.weight if embedding is not None else None
    decayed = [p for p in model.parameters() if p.ndim >= 2 and p is not weight]
    rest = [p for p in model.parameters() if p.ndim < 2 or p is weight]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95))
