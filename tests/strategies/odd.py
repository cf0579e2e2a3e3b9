"""Modules as people write them that are not like the others: each trains as on one process, or is refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.modules import Batch, Trained
from tests.plan.models import VOCABULARY, FusedBlock, Nano, Stack


class Odd(Trained):
    """A model on tokens, trained as the others are."""

    rows_of = "nano"

    def __init__(self, model: nn.Module) -> None:
        L.LightningModule.__init__(self)
        self.model, self.optimizer, self.ragged = model, {}, False
        self.seen, self.norm, self.gradients = [], 0.0, {}

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.model(batch["ids"]).flatten(0, 1), batch["labels"].flatten())


class OnVectors(Odd):
    """A model on vectors of eight numbers."""

    rows_of = "stack"

    def loss(self, batch: Batch) -> Tensor:
        return F.mse_loss(self.model(batch["x"].to(self.dtype)), batch["y"].to(self.dtype))


class Pair(nn.Module):
    """Two linears, which tensor ranks can divide, and something before or after them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.down(torch.relu(self.up(self.before(x)))))

    def before(self, x: Tensor) -> Tensor:
        return x

    def after(self, y: Tensor) -> Tensor:
        return y


def weight_norm() -> nn.Module:
    model = Stack()
    parametrizations.weight_norm(model.net[2])
    return model


def spectral_norm() -> nn.Module:
    model = Stack()
    parametrizations.spectral_norm(model.net[6])
    return model


def orthogonal() -> nn.Module:
    model = Stack()
    parametrizations.orthogonal(model.net[2])
    return model


def old_weight_norm() -> nn.Module:
    model = Stack()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model.net[2])
    return model


def mixing_hook() -> nn.Module:
    """A hook that mixes the channels which a cut would divide."""
    model = Stack()
    model.net[0].register_forward_hook(lambda module, args, out: out * 2 + out.mean(-1, keepdim=True))
    return model


def backward_hooks() -> nn.Module:
    model = Stack()
    model.net[2].register_full_backward_hook(lambda module, into, out: (into[0] * 0.5,))
    return model


class SharedBlock(Nano):
    """One block stands twice in the list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.layers[0], self.layers[1], self.layers[0]])


class Looped(Nano):
    """Goes through its blocks twice."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        for layer in [*self.layers, *self.layers]:
            x = layer(x)
        return self.head(self.norm(x))


class LeavesOut(Nano):
    """Leaves out a block in every second step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.steps += 1
        x = self.token(ids)
        for layer in self.layers[self.steps % 2 :]:
            x = layer(x)
        return self.head(self.norm(x))


class Tied(Nano):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.token.weight


class TiedByHand(Nano):
    """Multiplies with the embedding's weight itself."""

    def __init__(self) -> None:
        super().__init__()
        del self.head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x) @ self.token.weight.t()


class OneBlock(Nano):
    def __init__(self) -> None:
        super().__init__(depth=1)


class Padded(Nano):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, 48, padding_idx=50)


class Sibling(Nano):
    """A block also reads what the block before the last one returned."""

    def forward(self, ids: Tensor) -> Tensor:
        x = before = self.token(ids)
        for layer in self.layers:
            x, before = layer(x) + before, x
        return self.head(self.norm(x))


class FusedThreeWays(FusedBlock):
    """Calls the same linears twice in one forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + self.down(F.gelu(self.up(x)))


class Encoder(Nano):
    """torch's own layers: they leave their modules aside in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(48, 4, VOCABULARY, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.token(ids))))


class Translator(Nano):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Transformer(48, 4, 2, 2, VOCABULARY, dropout=0.0, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        return self.head(self.norm(self.layers(x, x)))


class Recurrent(Nano):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.LSTM(48, 48, 2, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.token(ids))[0]))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 16),
            nn.ReLU(),
            nn.Linear(16, 4),
        ]
        self.net = nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.view(-1, 1, 2, 4))


class Transposed(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.net[2].weight = nn.Parameter(torch.randn(32, 64).t() / 8)


class Double(Pair):
    """A buffer that is float64 whatever the precision."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((8,), 1.1, dtype=torch.float64))

    def before(self, x: Tensor) -> Tensor:
        return (x * self.scale).to(x.dtype)


class Quantized(Pair):
    """Frozen integers, as quantization leaves them."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.Parameter(torch.arange(1, 9, dtype=torch.int8), requires_grad=False)

    def before(self, x: Tensor) -> Tensor:
        return x / self.levels.to(x.dtype)


class Empty(Pair):
    """Parameters without elements, and one without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.none, self.empty = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(0, 3))
        self.scale = nn.Parameter(torch.ones(()))

    def after(self, y: Tensor) -> Tensor:
        return y * self.scale + self.empty.sum()


class PartlyEvaluated(Pair):
    """A frozen part in evaluation mode, with statistics and dropout of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> PartlyEvaluated:
        super().train(mode)
        self.front.eval()
        return self

    def before(self, x: Tensor) -> Tensor:
        return self.front(x)


class Normalized(Pair):
    """Batch norms of several kinds, in front of what tensor ranks divide and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.BatchNorm1d(8, momentum=None), nn.BatchNorm1d(4)
        self.image = nn.BatchNorm2d(2, affine=False, track_running_stats=False)

    def before(self, x: Tensor) -> Tensor:
        return self.first(self.image(x.view(-1, 2, 2, 2)).flatten(1))

    def after(self, y: Tensor) -> Tensor:
        return self.last(y)


class NormalizedBlock(FusedBlock):
    def __init__(self, width: int = 48) -> None:
        super().__init__(width)
        self.batch_norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.batch_norm(super().forward(x).transpose(1, 2)).transpose(1, 2)


class Centered(Pair):
    """Remembers the mean of what it returns, and subtracts it."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def after(self, y: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(self.over_ranks(y.detach().mean(0)), 0.1)
        return y - self.mean

    def over_ranks(self, mean: Tensor) -> Tensor:
        return mean


class CenteredByStrategy(OnVectors):
    """As the refusal says."""

    def __init__(self, model: Centered) -> None:
        super().__init__(model)
        self.model.over_ranks = lambda mean: self.trainer.strategy.reduce(mean)  # type: ignore[method-assign]


class Branches(nn.Module):
    """Takes another part of itself in every second step."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.steps = Pair(), Pair(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return (self.one if self.steps % 2 else self.two)(x)


class Lists(nn.Module):
    """Weights without modules."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(8, 8) / 3 for _ in range(3)])
        self.last = nn.ParameterDict({"weight": torch.randn(8, 4) / 3})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return x @ self.last["weight"]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Stack()

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.net, dict(self.net.named_parameters()), (x,))


def compiled() -> nn.Module:
    model = Stack()
    model.net = torch.compile(model.net, backend="eager")
    return model


def compiled_in_place() -> nn.Module:
    model = Nano(depth=2)
    for layer in model.layers:
        layer.compile(backend="eager")
    return model


def hooked_gradients() -> nn.Module:
    model = Stack()
    model.net[0].weight.register_hook(lambda grad: grad / 2)
    return model


class HooksLater(OnVectors):
    def on_fit_start(self) -> None:
        self.model.net[0].weight.register_post_accumulate_grad_hook(lambda p: p.grad.div_(2))


class LimitedNorm(Nano):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, 48, max_norm=1.0)


class Sparse(Nano):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, 48, sparse=True)


class Complex(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(8, dtype=torch.complex64))

    def before(self, x: Tensor) -> Tensor:
        return (x * self.phase).abs().to(x.dtype)


class TwoTypes(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))

    def before(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype)


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.LazyLinear(4))


def scripted() -> nn.Module:
    model = Stack()
    model.net = torch.jit.script(model.net)
    return model


def data_parallel() -> nn.Module:
    return nn.Sequential(nn.DataParallel(Stack()))


def single_linear() -> nn.Module:
    return nn.Linear(8, 4)


def bilinear() -> nn.Module:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Bilinear(8, 8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x, x)

    return Squared()


Kind = tuple[type[Odd], Callable[[], Any]]

# Right over data ranks, and over tensor ranks.
RIGHT: dict[str, Kind] = {
    "channels last": (OnVectors, Convolutions),
    "transposed": (OnVectors, Transposed),
    "float64 buffer": (OnVectors, Double),
    "int8": (OnVectors, Quantized),
    "empty": (OnVectors, Empty),
    "partly evaluated": (OnVectors, PartlyEvaluated),
    "compiled": (OnVectors, compiled),
    "batch norm": (OnVectors, Normalized),
    "batch norm in blocks": (Odd, lambda: Nano(NormalizedBlock)),
    "buffer by the strategy": (CenteredByStrategy, Centered),
    "orthogonal": (OnVectors, orthogonal),
    "weight norm": (OnVectors, weight_norm),
    "spectral norm": (OnVectors, spectral_norm),
    "mixing hook": (OnVectors, mixing_hook),
    "backward hooks": (OnVectors, backward_hooks),
    "functional": (OnVectors, Functional),
    "shared block": (Odd, SharedBlock),
    "looped": (Odd, Looped),
    "tied": (Odd, Tied),
    "tied by hand": (Odd, TiedByHand),
    "one block": (Odd, OneBlock),
    "padding": (Odd, Padded),
    "sibling": (Odd, Sibling),
    "twice": (Odd, lambda: Nano(FusedThreeWays)),
    "encoder": (Odd, Encoder),
    "translator": (Odd, Translator),
}
# Right over data ranks, and nothing to cut over tensor ranks.
RIGHT_OVER_DATA: dict[str, Kind] = {
    "branches": (OnVectors, Branches),
    "leaves out": (Odd, LeavesOut),
    "lists": (OnVectors, Lists),
    "single linear": (OnVectors, single_linear),
    "bilinear": (OnVectors, bilinear),
    "old weight norm": (OnVectors, old_weight_norm),
    "lstm": (Odd, Recurrent),
}

DATA, TENSOR = "data", "tensor"
# Refused over these axes, by these words; the trainer's options.
REFUSED: dict[str, tuple[Kind, tuple[str, ...], str, dict[str, Any]]] = {
    "gradient hook": ((OnVectors, hooked_gradients), (DATA, TENSOR), r"model.net.0.weight has a hook .*p\.grad", {}),
    "later hook": ((HooksLater, Stack), (DATA, TENSOR), r"model.net.0.weight has a hook on its gradient", {}),
    "buffer": ((OnVectors, Centered), (DATA,), r"buffer model.mean is not the same on all data ranks: .*reduce", {}),
    "max_norm": ((Odd, LimitedNorm), (DATA,), r"model.token \(Embedding\) has max_norm=1.0.*F.normalize", {}),
    "sparse": ((Odd, Sparse), (DATA, TENSOR), r"model.token \(Embedding\) has sparse gradients.*sparse=False", {}),
    "complex": ((OnVectors, Complex), (DATA, TENSOR), r"model.phase is torch.complex64: .*torch.complex\(real", {}),
    "two types": (
        (OnVectors, TwoTypes),
        (DATA,),
        r"several types: model.scale \(torch.bfloat16\) and model.up.weight \(torch.float32\); .*precision=",
        {"precision": "32-true"},
    ),
    "lazy": ((OnVectors, lazy), (DATA, TENSOR), "parameter model.0.weight has no shape yet: call the lazy module", {}),
    "scripted": (
        (OnVectors, scripted),
        (DATA, TENSOR),
        r"model.net \(\w+\) is compiled by torch.jit, .*Python module",
        {},
    ),
    "DataParallel": (
        (OnVectors, data_parallel),
        (DATA, TENSOR),
        r"model.0 \(DataParallel\) distributes by itself; write",
        {},
    ),
}
