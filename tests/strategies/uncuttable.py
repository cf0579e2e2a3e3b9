"""Modules that can't lie on stages of a pipeline, or whose step can't be run on parts of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.modules import Batch, Trained
from tests.plan.models import FusedBlock, Nano


def _embedded(model: Nano, ids: Tensor) -> Tensor:
    return model.token(ids) + model.position(torch.arange(ids.shape[1], device=ids.device))


def _cross_entropy(logits: Tensor, batch: Batch, **options: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), **options)


class _Deep(Trained):
    rows_of = "deep"

    def __init__(self, block: type[nn.Module] = FusedBlock) -> None:
        super().__init__()
        self.model = Nano(block, depth=4)

    def blocks(self, x: Tensor) -> Tensor:
        for layer in self.model.layers:
            x = layer(x)
        return x

    def logits(self, ids: Tensor) -> Tensor:
        return self.model.head(self.model.norm(self.blocks(_embedded(self.model, ids))))

    def loss(self, batch: Batch) -> Tensor:
        return _cross_entropy(self.logits(batch["ids"]), batch)


class Twice(_Deep):
    """Two passes through the model."""

    def loss(self, batch: Batch) -> Tensor:
        ids = batch["ids"]
        return F.mse_loss(self.logits(ids), self.logits(ids.flip(1)))


class TwiceInARow(_Deep):
    """The second pass begins with what the first one made."""

    def loss(self, batch: Batch) -> Tensor:
        x = self.blocks(self.blocks(_embedded(self.model, batch["ids"])))
        return _cross_entropy(self.model.head(x), batch)


class NoLoss(_Deep):
    """Returns a dict without a loss."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return {"logits": self.logits(batch["ids"])}


class SkipsBatches(_Deep):
    """Returns ``None`` for some batches."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = self.loss(batch)
        return None if batch_idx == 0 else loss


class ManyLosses(_Deep):
    """A loss for each sample."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return _cross_entropy(self.logits(batch["ids"]), batch, reduction="none")


class Sum(_Deep):
    """A sum over samples is not the mean of its parts."""

    def loss(self, batch: Batch) -> Tensor:
        return _cross_entropy(self.logits(batch["ids"]), batch, reduction="sum") / 100


class Contrastive(_Deep):
    """Each sample is compared with all others of its batch."""

    def loss(self, batch: Batch) -> Tensor:
        x = self.blocks(_embedded(self.model, batch["ids"])).mean(1)
        return F.cross_entropy(x @ x.T, torch.arange(len(x), device=x.device))


class Skips(_Deep):
    """As in a U-Net: what the first block returns is added after the last."""

    def blocks(self, x: Tensor) -> Tensor:
        first = x = self.model.layers[0](x)
        for layer in list(self.model.layers)[1:]:
            x = layer(x)
        return x + first


class _Remembers(FusedBlock):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        self.kept = x
        return x


class Remembers(_Deep):
    """Blocks keep activations as attributes, which the loss reads."""

    def __init__(self) -> None:
        super().__init__(_Remembers)

    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) + sum(layer.kept.square().mean() for layer in self.model.layers)


class _WithAuxiliary(FusedBlock):
    def forward(self, x: Tensor) -> Any:
        x = super().forward(x)
        return x, x.square().mean()


class Auxiliary(_Deep):
    """Each block returns a loss of its own beside the hidden state, as experts do."""

    def __init__(self) -> None:
        super().__init__(_WithAuxiliary)

    def loss(self, batch: Batch) -> Tensor:
        x, extra = _embedded(self.model, batch["ids"]), 0.0
        for layer in self.model.layers:
            x, more = layer(x)
            extra = extra + more
        return _cross_entropy(self.model.head(x), batch) + extra


class Compiled(_Deep):
    """The parent of the blocks is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.model.compile(backend="eager")

    def loss(self, batch: Batch) -> Tensor:
        return _cross_entropy(self.model(batch["ids"]), batch)


class OneBlock(_Deep):
    """Fewer blocks than stages."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Nano(depth=1)


class _Pyramid(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = FusedBlock(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[:, ::2]


class Pyramid(_Deep):
    """The hidden state gets shorter from block to block."""

    def __init__(self) -> None:
        super().__init__(_Pyramid)

    def loss(self, batch: Batch) -> Tensor:
        x = self.blocks(_embedded(self.model, batch["ids"]))
        return _cross_entropy(self.model.head(x), {"labels": batch["labels"][:, ::16]})


class Penalty(_Deep):
    """The loss reads the weights of all blocks."""

    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) + 1e-3 * sum(p.square().sum() for p in self.model.parameters())


class DropsLayers(_Deep):
    """Blocks are left out by chance."""

    def blocks(self, x: Tensor) -> Tensor:
        for layer in self.model.layers:
            if float(torch.rand(())) < 0.5:
                x = layer(x)
        return x


class Backwards(_Deep):
    """Blocks in another order than the list's."""

    def blocks(self, x: Tensor) -> Tensor:
        for layer in reversed(self.model.layers):
            x = layer(x)
        return x


class LeavesOut(_Deep):
    """A block that is never used."""

    def blocks(self, x: Tensor) -> Tensor:
        for layer in list(self.model.layers)[:-1]:
            x = layer(x)
        return x


class _BatchNormed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.norm = FusedBlock(width), nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x).transpose(1, 2)).transpose(1, 2)


class BatchNormed(_Deep):
    """Statistics over the rows of a batch."""

    def __init__(self) -> None:
        super().__init__(_BatchNormed)


class ByHand(_Deep):
    """Optimizes by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Unsplittable(_Deep):
    """A batch that is one tensor without a batch dimension."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"ids": tuple(batch["ids"].tolist()), "labels": tuple(batch["labels"].tolist())}

    def loss(self, batch: Any) -> Tensor:
        return super().loss({name: torch.tensor(rows) for name, rows in batch.items()})


class OverHidden(_Deep):
    """The loss adds a mean over a hidden state in the middle."""

    def loss(self, batch: Batch) -> Tensor:
        x = _embedded(self.model, batch["ids"])
        middle: Any = None
        for i, layer in enumerate(self.model.layers):
            x = layer(x)
            middle = x if i == 1 else middle
        return _cross_entropy(self.model.head(x), batch) + middle.square().mean()


class NoList(Trained):
    """No list of blocks."""

    rows_of = "stack"

    def __init__(self) -> None:
        super().__init__("stack")
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    def loss(self, batch: Batch) -> Tensor:
        return F.mse_loss(self.model(batch["x"]), batch["y"])


class GraphBetween(_Deep):
    """The hidden state is detached between blocks: the first ones do not train."""

    def blocks(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.model.layers):
            x = layer(x.detach() if i == 2 else x)
        return x


ALL: dict[str, Callable[[], Trained]] = {
    kind.__name__: kind
    for kind in list(globals().values())
    if isinstance(kind, type)
    and issubclass(kind, Trained)
    and kind is not Trained
    and not kind.__name__.startswith("_")
}
