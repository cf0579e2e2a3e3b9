"""A loop over the stages of a pipeline, written by hand with ``torch.distributed.pipelining``."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional as F
from torch.nn.utils import clip_grads_with_norm_

from benchmarks.contestants import CLIP, SEED, Batch, adamw, norm
from lightning_bharat import HybridStrategy
from lightning_bharat.models import GPT, GPTConfig

LOSSES = 8  # that the last stage tells the others, to be compared; a loop by hand has no need of it


class Part(nn.Module):
    """Some blocks of a decoder, the embedding before the first and the head after the last."""

    def __init__(self, model: GPT, blocks: range) -> None:
        super().__init__()
        self.rotary = model._rotary
        self.embed_tokens = model.embed_tokens if blocks.start == 0 else None
        self.layers = nn.ModuleList(model.layers[i] for i in blocks)
        last = blocks.stop == len(model.layers)
        self.norm, self.lm_head = (model.norm, model.lm_head) if last else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        rotary = self.rotary(0, x.shape[1], x.device)
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        for layer in self.layers:
            x = layer(x, rotary)
        return x if self.norm is None or self.lm_head is None else self.lm_head(self.norm(x))


class ByStages:
    """1F1B over the stages of ``strategy``, which has been set up.

    Attributes:
        losses: of each step; after the first ones on the last stage alone.
    """

    def __init__(self, config: GPTConfig, strategy: HybridStrategy) -> None:
        self.config, self.strategy = config, strategy
        self.losses: list[Tensor] = []

    def __call__(self, batches: Iterable[Batch]) -> None:
        torch.manual_seed(SEED)
        strategy, group = self.strategy, self.strategy.pipeline_group
        assert group is not None and strategy.plan is not None and strategy.options.num_microbatches is not None
        rank, ranks, parts = dist.get_rank(group), dist.get_world_size(group), strategy.options.num_microbatches
        part = Part(GPT(self.config), strategy.stage_blocks(strategy.plan)[rank])
        optimizer, schedule = adamw(part, part.embed_tokens), None
        for batch in batches:
            optimizer.zero_grad()
            if schedule is None:
                schedule = self._schedule(part, rank, ranks, batch["input_ids"], parts, group)
            losses: list[Tensor] = []
            if rank == 0:
                schedule.step(batch["input_ids"])
            else:
                schedule.step(target=batch["labels"], losses=losses)
            _clip(list(part.parameters()), group)
            optimizer.step()
            self._keep(losses, ranks, group)

    def _schedule(
        self, part: Part, rank: int, ranks: int, ids: Tensor, parts: int, group: dist.ProcessGroup
    ) -> Schedule1F1B:
        rows, time = ids.shape[0] // parts, ids.shape[1]
        hidden = torch.empty(rows, time, self.config.hidden_size, requires_grad=True)
        logits = torch.empty(rows, time, self.config.vocab_size)
        stage = PipelineStage(
            part,
            rank,
            ranks,
            ids.device,
            input_args=ids[:rows] if rank == 0 else hidden,
            output_args=logits if rank == ranks - 1 else hidden,
            group=group,
        )
        return Schedule1F1B(stage, parts, loss_fn=_loss)

    def _keep(self, losses: list[Tensor], ranks: int, group: dist.ProcessGroup) -> None:
        loss = torch.stack(losses).mean().detach() if losses else torch.zeros(())
        if len(self.losses) < LOSSES:
            dist.broadcast(loss, group_src=ranks - 1, group=group)
        self.losses.append(loss)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@torch.no_grad()
def _clip(parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    square = norm(parameters).square()
    dist.all_reduce(square, group=group)
    clip_grads_with_norm_(parameters, CLIP, square.sqrt())
