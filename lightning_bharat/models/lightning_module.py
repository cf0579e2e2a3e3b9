"""The decoder as an ordinary LightningModule: nothing in it knows how many devices it will be cut over."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable
from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions
from torch.nn import functional as F
from torch.optim import AdamW

from lightning_bharat.checkpoints import CheckpointError, load_weights
from lightning_bharat.models.config import GPTConfig
from lightning_bharat.models.gpt import GPT
from lightning_bharat.models.moe import Gate, MixtureOfExperts, Spread, balance_loss
from lightning_bharat.models.mup import decayed_groups, refuse_other_scales
from lightning_bharat.models.upcycle import is_dense, upcycled
from lightning_bharat.models.weights import Weights, hyper_parameters_of, read_weights, under

Batch = dict[str, Tensor]


class GPTModule(L.LightningModule):
    """Trains a :class:`GPT` to predict the next token.

    A batch has ``input_ids`` and ``labels``, both (batch, time) int64. ``labels[:, t]`` is the token that follows
    ``input_ids[:, t]``, or -100 where none is to be predicted.

    Args:
        config: sizes of the model.
        learning_rate: AdamW's, the top one of a schedule.
        weight_decay: of matrices; embeddings and norms have none.
        betas: AdamW's.
        lr_scheduler: makes a schedule of an optimizer, stepped after each optimizer step. In a LightningCLI config a
            ``class_path`` such as ``lightning_bharat.models.WarmupCosine`` with ``init_args``; in Python for example
            ``lambda optimizer: WarmupCosine(optimizer, 100, 1000)``. A constant rate if None.
        weights: where to start from, see :func:`read_weights`: own checkpoints and exports, or Hugging Face's Llama.
            Those of a dense model begin one with experts, see :func:`~lightning_bharat.models.upcycle.upcycled`.
        freeze: patterns of parameters that aren't trained, such as ``model.layers.0.*``.
        lazy: build the model in ``configure_model`` in place of here: on ``meta`` under ``"bharat_hybrid"``, so that no
            process ever holds all of it.
        chunked_loss: never hold all logits: the loss goes over the tokens chunk by chunk, by torch's
            ``linear_cross_entropy``. Worth it for a vocabulary wider than the model. ``"bf16-mixed"`` multiplies by the
            head in float32 then, and tensor ranks each hold all of the head.

    Raises:
        ValueError: a pattern in ``freeze`` fits no parameter.
        CheckpointError: ``weights`` can't be read or are those of another model: names and shapes that differ.
    """

    model: GPT

    def __init__(
        self,
        config: GPTConfig,
        learning_rate: float = 3e-4,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        lr_scheduler: LRSchedulerCallable | None = None,
        weights: str | Path | None = None,
        freeze: list[str] | None = None,
        lazy: bool = False,
        chunked_loss: bool = False,
    ) -> None:
        super().__init__()
        # load_from_checkpoint gives what was saved: plain values, which can be loaded without running code
        self.config = config if isinstance(config, GPTConfig) else GPTConfig(**config)
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.lr_scheduler, self.weights, self.freeze_patterns = lr_scheduler, weights, freeze or []
        self.chunked_loss = chunked_loss
        self.save_hyperparameters(
            {
                "config": asdict(self.config),
                "learning_rate": learning_rate,
                "weight_decay": weight_decay,
                "betas": list(betas),
                "freeze": freeze,
                "lazy": lazy,
                "chunked_loss": chunked_loss,
            }
        )
        self._start_is_missing = False
        if not lazy:
            self._build()

    def configure_model(self) -> None:
        if not hasattr(self, "model"):  # Lightning calls this for each of fit, validate, test and predict
            # A strategy with a mesh gives each rank its part of what is on meta.
            with nullcontext() if self.device_mesh is None else torch.device("meta"):
                self._build()

    def _build(self) -> None:
        self.model = GPT(self.config)
        _freeze(self, self.freeze_patterns)
        self._start_is_missing = self.weights is not None
        if self.weights is not None and not self._is_on_meta:
            _start_from(self, self.weights)

    @property
    def _is_on_meta(self) -> bool:
        return self.model.norm.weight.is_meta

    def initial_weights(self) -> Weights | None:
        """What a model on ``meta`` starts from, by full names and still on disk, for a strategy that gives each rank
        its part of it; ``None`` for a start by ``reset_parameters``, and for a model that is there already."""
        if self.weights is None or not self._is_on_meta:
            return None
        self._start_is_missing = False
        return _given(self.config, self.weights)

    def _refuse_another_start(self) -> None:
        if self._start_is_missing:
            raise ValueError(
                f"weights={str(self.weights)!r} were not read: the model was built on meta, and "
                f"{type(self.trainer.strategy).__name__} does not ask for initial_weights(). Write lazy=False"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        refuse_other_scales(self.config, checkpoint.get("hyper_parameters"))

    on_fit_start = on_validation_start = on_test_start = on_predict_start = _refuse_another_start

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss if self.config.router_aux_loss_coef is None else loss + self._balance_loss()

    def _balance_loss(self) -> Tensor:
        assert self.config.router_aux_loss_coef is not None
        routed = [router.routed for router in self._routers() if router.routed is not None]
        loss = balance_loss(routed, self.trainer.strategy.reduce)
        self.log("balance_loss", loss)
        return self.config.router_aux_loss_coef * loss

    def on_train_start(self) -> None:
        self._balanced_at = self.trainer.global_step

    def on_train_batch_end(self, *_: Any) -> None:
        if self.config.num_experts and self.trainer.global_step > self._balanced_at:
            self._balanced_at = self.trainer.global_step
            self._balance()

    def _balance(self) -> None:
        """Log how tokens were spread since the last optimizer step, on all ranks, and move the biases by it."""
        routers = self._routers()
        empty = torch.zeros(routers[0].num_experts + 3, dtype=torch.float64, device=self.device)
        taken = [router.take() for router in routers]  # nothing of another pipeline stage's
        seen = self.trainer.strategy.reduce(torch.stack([empty if t is None else t for t in taken]))
        spread = Spread.of(seen)
        self.log("expert_imbalance", spread.imbalance)
        self.log("dropped_tokens", spread.dropped)
        self.log("router_entropy", spread.entropy)
        for router, load in zip(routers, seen[:, :-3], strict=True):
            router.balance(load)

    def _routers(self) -> list[Gate]:
        return [layer.mlp.gate for layer in self.model.layers if isinstance(layer.mlp, MixtureOfExperts)]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), prog_bar=True, sync_dist=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("test_loss", self._loss(batch), sync_dist=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Log-likelihood of each label, (batch, time); 0 where it is -100."""
        return -self._loss(batch, reduction="none").view_as(batch["labels"])

    def _loss(self, batch: Batch, reduction: str = "mean") -> Tensor:
        labels = batch["labels"].flatten()
        if self.chunked_loss:
            hidden, head = self.model.hidden(batch["input_ids"]).flatten(0, 1), self.model.lm_head.weight
            return F.linear_cross_entropy(
                hidden, head, labels, reduction=reduction, options=LinearCrossEntropyOptions()
            )
        return F.cross_entropy(self(batch["input_ids"]).flatten(0, 1), labels, reduction=reduction)

    def configure_optimizers(self) -> Any:
        embeddings = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        decayed = {name: p for name, p in trained.items() if p.ndim >= 2 and id(p) not in embeddings}
        rest = [p for p in trained.values() if p.ndim < 2 or id(p) in embeddings]
        groups = decayed_groups(decayed, self.config, self.learning_rate, self.weight_decay)
        optimizer = AdamW([*groups, {"params": rest, "weight_decay": 0.0}], lr=self.learning_rate, betas=self.betas)
        if self.lr_scheduler is None:
            return optimizer
        schedule = {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def _freeze(module: nn.Module, patterns: list[str]) -> None:
    names = [name for name, _ in module.named_parameters()]
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(f"freeze={pattern!r} fits no parameter; names are like {', '.join(names[:3])}")
        for name in found:
            module.get_parameter(name).requires_grad_(False)


def _given(config: GPTConfig, path: str | Path) -> Weights:
    found = under(read_weights(path), "model.")
    refuse_other_scales(config, hyper_parameters_of(path))
    return upcycled(found, config) if config.num_experts and is_dense(found) else found


def _start_from(module: GPTModule, path: str | Path) -> None:
    try:
        load_weights(module, {}, _given(module.config, path))
    except CheckpointError as error:
        raise CheckpointError(f"weights={str(path)!r}: {error}") from error
    module._start_is_missing = False
