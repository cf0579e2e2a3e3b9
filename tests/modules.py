"""LightningModules for the strategies' tests: the models of tests/plan/models.py, trained as people train them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lightning_bharat.models import GPT, GPTConfig
from lightning_bharat.plan.elsewhere import is_elsewhere
from lightning_bharat.plan.shards import gather
from tests.pipelines import DEEP
from tests.plan.models import MODELS, TIME, VOCABULARY, Stack, Wrapped

Batch = dict[str, Tensor]


def gpt() -> nn.Module:
    """The package's own decoder."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return GPT(GPTConfig(vocab_size=VOCABULARY, **sizes))


def zoo() -> dict[str, Callable[[], nn.Module]]:
    """Name to factory: own decoder, nanoGPT-like, Hugging Face's Llama, Qwen3 and GPT-2, and a stack of linears."""
    return {"gpt": gpt, **MODELS}


class Trained(L.LightningModule):
    """An ordinary module that keeps what a run can be compared by.

    Attributes:
        seen: for each optimizer step the loss (mean over data ranks), and before clipping the norm of all gradients.
        gradients: whole, of the first step, by name.
    """

    def __init__(self, model: str = "nano", optimizer: dict[str, Any] | None = None, ragged: bool = False) -> None:
        super().__init__()
        self.model = {**zoo(), **DEEP}[model]()
        self.optimizer, self.ragged = optimizer or {}, ragged
        self.seen: list[tuple[float, float]] = []
        self.norm = 0.0
        self.gradients: dict[str, Tensor] = {}

    def loss(self, batch: Batch) -> Tensor:
        if isinstance(self.model, Wrapped):  # its own loss is computed in float32
            logits = self.model.model(input_ids=batch["ids"]).logits
            return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        if hasattr(self.model, "loss"):
            return self.model.loss(batch)
        if isinstance(self.model, Stack):
            return F.mse_loss(self.model(batch["x"].to(self.dtype)), batch["y"].to(self.dtype))
        return F.cross_entropy(self.model(batch["ids"]).flatten(0, 1), batch["labels"].flatten())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, sync_dist=True)
        self.log("rows", float(len(batch["rows"])), sync_dist=True, reduce_fx="sum")
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val", self.loss(batch), sync_dist=True, batch_size=len(batch["rows"]))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norm = grad_norm(self)
        if not self.gradients:
            self.gradients = {
                name: whole(self, name, p.grad) for name, p in self.named_parameters() if p.grad is not None
            }

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append((float(self.trainer.callback_metrics["loss"]), self.norm))

    def configure_optimizers(self) -> Any:
        decay = [p for p in self.parameters() if p.ndim > 1]
        rest = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        # Adam turns a gradient that is zero but for rounding into a whole step, unless eps is far above the rounding:
        # with 1e-8, two right runs of the same model part by 1e-8 within ten steps.
        optimizer = torch.optim.AdamW(groups, **{"lr": 1e-2, "eps": 1e-4, **self.optimizer})
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def grad_norm(module: L.LightningModule) -> float:
    """Norm of all gradients, by the strategy or on one process."""
    strategy = module.trainer.strategy
    if hasattr(strategy, "grad_norm"):
        return strategy.grad_norm().item()
    return torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]).item()


def whole(module: L.LightningModule, name: str, tensor: Tensor) -> Tensor:
    """All of a parameter or gradient, wherever its pieces are. All ranks must call it."""
    strategy = module.trainer.strategy
    found = gather(tensor, getattr(strategy, "slices", {}).get(name), getattr(strategy, "tensor_group", None))
    return (found.full_tensor() if isinstance(found, DTensor) else found).detach().clone()


def of_stages(trainer: L.Trainer, mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """What all stages of a pipeline hold; parameters of several stages must be equal on them."""
    group = getattr(trainer.strategy, "pipeline_group", None)
    if group is None:
        return mine
    parts: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(parts, mine, group=group)
    together: dict[str, Tensor] = {}
    for part in parts:
        for name, tensor in part.items():
            assert torch.equal(together.setdefault(name, tensor), tensor), f"{name} differs between stages"
    return together


class Rows:
    """Batches of ``batch`` rows over all data ranks, always in the same order; each rank gets its share of each.

    ``last``: rows of an additional smaller batch at the end.
    """

    def __init__(self, model: str, batch: int, batches: int, data: int, rank: int, ragged: bool, last: int = 0) -> None:
        self.sizes, self.data, self.rank = [batch] * batches + ([last] if last else []), data, rank
        generator = torch.Generator().manual_seed(0)
        count = sum(self.sizes)
        if model == "stack":
            draw = [torch.randn(count, n, generator=generator, dtype=torch.float64) for n in (8, 4)]
            self.rows = {"x": draw[0], "y": draw[1]}
        else:
            tokens = torch.randint(0, VOCABULARY, (count, TIME + 1), generator=generator)
            labels = tokens[:, 1:].clone()
            if ragged:
                keep = torch.randint(0, TIME, (count, 1), generator=generator)
                labels[torch.arange(TIME) >= keep] = -100
            self.rows = {"ids": tokens[:, :-1].clone(), "labels": labels}
        self.rows["rows"] = torch.arange(count)

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Batch]:
        start = 0
        for size in self.sizes:
            share = size // self.data
            here = slice(start + self.rank * share, start + (self.rank + 1) * share)
            yield {name: rows[here] for name, rows in self.rows.items()}
            start += size


class PlacedRows(Rows):
    """Knows its place: goes on with the batch behind those that were taken."""

    at = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in list(super().__iter__())[self.at :]:
            self.at += 1
            yield batch
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Result(dict):
    """What a run left: ``seen``, ``gradients``, ``weights``, ``metrics``, ``explain``."""

    __getattr__ = dict.__getitem__


def fit(
    module: Callable[[], Any] | str = "nano",
    strategy: dict[str, Any] | None = None,
    steps: int = 6,
    ragged: bool = False,
    optimizer: dict[str, Any] | None = None,
    batch: int = 8,
    batches: int = 4,
    last: int = 0,
    ckpt: str | None = None,
    rows_kind: type[Rows] = Rows,
    **trainer: Any,
) -> Result:
    """Train on the ranks that call it. ``strategy``: HybridStrategy's arguments; ``None`` is one plain process."""
    import lightning_bharat

    ranks = int(os.environ.get("WORLD_SIZE", 1)) if strategy is not None else 1
    rank = int(os.environ.get("RANK", 0)) if strategy is not None else 0
    peers = (strategy or {}).get("tensor_parallel_size", 1) * (strategy or {}).get("context_parallel_size", 1)
    data = ranks // peers // (strategy or {}).get("pipeline_parallel_size", 1)
    L.seed_everything(7, verbose=False)
    made = Trained(module, optimizer, ragged) if isinstance(module, str) else module()
    name = module if isinstance(module, str) else getattr(made, "rows_of", "nano")
    loop = L.Trainer(
        **{
            "strategy": "auto" if strategy is None else lightning_bharat.HybridStrategy(**strategy),
            "devices": ranks,
            "accelerator": "cpu",
            "precision": "64-true",
            "max_steps": steps,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **trainer,
        }
    )
    rows = [rows_kind(name, batch, batches, data, rank // peers % data, ragged, last) for _ in range(2)]
    loop.fit(made, *rows, ckpt_path=ckpt)
    after = of_stages(loop, {n: whole(made, n, p) for n, p in made.named_parameters() if not is_elsewhere(p)})
    if getattr(made, "gradients", None) is not None:
        made.gradients = of_stages(loop, made.gradients)
    explain = loop.strategy.explain() if strategy is not None else ""
    metrics = {k: float(v) for k, v in loop.callback_metrics.items()}
    kept = ("seen", "gradients")
    return Result({k: getattr(made, k, None) for k in kept}, weights=after, metrics=metrics, explain=explain)


def assert_equal(found: Result, expected: Result, tolerance: float = 1e-9) -> None:
    """Losses, norms, gradients, logged values and final weights agree."""
    seen = [torch.tensor(run.seen, dtype=torch.float64) for run in (found, expected)]
    torch.testing.assert_close(*seen, rtol=tolerance, atol=tolerance)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=tolerance, atol=tolerance, msg=name)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e3 * tolerance, msg=name)
    assert found.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        assert abs(found.metrics[name] - value) <= tolerance * max(1, abs(value)), (name, found.metrics[name] - value)
