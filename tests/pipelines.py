"""Models for pipelines: deep enough for two stages a rank, and written in the ways that people write models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.plan.models import VOCABULARY, FusedBlock, Nano, Wrapped, llama


class Recomputing(Nano):
    """Recomputes its blocks itself."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return self.head(self.norm(x))


class _TupleBlock(FusedBlock):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        return super().forward(x), None


class Tuples(Nano):
    """Blocks return tuples; a raw parameter is added before them, and the loss is computed inside the model."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__(_TupleBlock, depth=depth)
        self.shift = nn.Parameter(torch.randn(48))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["ids"]
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device)) + self.shift
        for layer in self.layers:
            x, _ = layer(x, mask=None)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), batch["labels"].flatten())


class Shared(Nano):
    """What is computed before the blocks is read by all of them and after them: its gradients come from all stages."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["ids"]
        start = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        x = start
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x + 0.5 * start)).flatten(0, 1), batch["labels"].flatten())


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


class Residuals(nn.Module):
    """A stack of multilayer perceptrons on embedded ids."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)
        self.net = nn.Sequential(*(_Residual(16) for _ in range(depth)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.net(self.token(ids)))


def _deep_llama() -> Wrapped:
    made = llama()
    config: Any = made.model.config
    config.num_hidden_layers = 4
    return Wrapped(type(made.model)(config))


DEEP: dict[str, Callable[[], nn.Module]] = {
    "deep": partial(Nano, depth=4),
    "deep llama": _deep_llama,
    "recomputing": partial(Recomputing, depth=4),
    "tuples": Tuples,
    "shared": partial(Shared, depth=4),
    "residuals": Residuals,
}
