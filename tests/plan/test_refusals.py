"""Blocks that compute something else when they are cut: they stay whole, or the plan is refused, with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_bharat.plan.blocks import PlanError
from lightning_bharat.plan.find import find_plan
from lightning_bharat.plan.model_plan import ModelPlan
from tests.plan.models import VOCABULARY, FusedBlock, Nano, batch_of, step


class Pair(nn.Module):
    """Two linears, with something between them."""

    def __init__(self, width: int = 48, inner: int = 96) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        return x + self.down(self.between(F.relu(self.up(x)), x))

    def between(self, h, x):
        return h


class NormBetween(Pair):
    def __init__(self, width: int = 48) -> None:
        super().__init__(width)
        self.norm = nn.LayerNorm(96)

    def between(self, h, x):
        return self.norm(h)


class ScalePerChannel(Pair):
    def __init__(self, width: int = 48) -> None:
        super().__init__(width)
        self.scale = nn.Parameter(torch.ones(96))

    def between(self, h, x):
        return h * self.scale


class Softmax(Pair):
    def between(self, h, x):
        return h.softmax(-1)


class Rolled(Pair):
    def between(self, h, x):
        return h.roll(1, -1)


class BestChannels(Pair):
    def between(self, h, x):
        values, where = h.topk(8, -1)
        return torch.zeros_like(h).scatter(-1, where, values)


class DividedByWidth(Pair):
    def between(self, h, x):
        return h / h.shape[-1]


class FirstHalf(Pair):
    """Uses half of the channels: each rank has another half."""

    def __init__(self, width: int = 48) -> None:
        super().__init__(width)
        self.down = nn.Linear(48, width)

    def between(self, h, x):
        return h[..., :48]


class OnLongSequences(Pair):
    """Mixes channels where the sequence is longer than those of a short dry run."""

    def between(self, h, x):
        return h - h.mean(-1, keepdim=True) if x.shape[1] > 16 else h


class InTrainingAlone(Pair):
    def between(self, h, x):
        return h - h.mean(-1, keepdim=True) if self.training else h


class BufferOfChannels(Pair):
    """Remembers what all its channels were on average."""

    mean: torch.Tensor

    def __init__(self, width: int = 48) -> None:
        super().__init__(width)
        self.register_buffer("mean", torch.zeros(()))

    def between(self, h, x):
        if self.training:
            self.mean.lerp_(h.detach().mean(), 0.1)
        return h


def plan_of(block: Callable[[], nn.Module], **kwargs) -> ModelPlan:
    module = Nano(lambda width: block())  # type: ignore[arg-type]
    return find_plan(module, step, batch_of(module, 0), **kwargs)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (NormBetween, r"normalized_shape=\[96\], expected input with shape \[\*, 96\], but got .*48"),
        (ScalePerChannel, r"tensor a \(48\) must match the size of tensor b \(96\)"),
        (Softmax, r"output 0 differs by \d\.\de-\d\d of its largest value"),
        (Rolled, r"output 0 differs by \d\.\de-\d\d"),
        (BestChannels, r"output 0 differs by \d\.\de-\d\d"),
        (DividedByWidth, r"output 0 differs by \d\.\de-\d\d"),
        (FirstHalf, "differs|shapes cannot be multiplied"),
        (OnLongSequences, r"output 0 differs by \d\.\de-\d\d"),
        (InTrainingAlone, r"output 0 differs in training by \d\.\de-\d\d"),
        (BufferOfChannels, "the buffer mean gets another value in training"),
    ],
)
def test_a_block_that_can_not_be_cut_stays_whole_with_the_numbers_and_is_refused_where_it_is_asked_for(block, words):
    plan = plan_of(block)
    assert plan.cuts == {"a": ()}
    with pytest.raises(PlanError, match=rf"the cut of layers.0: up → down is not right: .*{words}"):
        plan_of(block, plan={"layers.*.up": "colwise", "layers.*.down": "rowwise"})


class Gated(Pair):
    """A whole parameter inside of the cut, in training alone: each rank has a part of its gradient."""

    def __init__(self, width: int = 48) -> None:
        super().__init__(width)
        self.gain = nn.Parameter(torch.ones(()))

    def between(self, h, x):
        return h * self.gain if self.training else h


def test_gradients_are_proven_in_training_too():
    assert plan_of(Gated).summed == {"a": ("gain",)}


class Counting(Pair):
    """Buffers that training changes, alike on every rank."""

    calls: torch.Tensor

    def __init__(self, width: int = 48) -> None:
        super().__init__(width)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        self.calls += self.training
        return super().forward(self.norm(x.transpose(1, 2)).transpose(1, 2))


def test_buffers_that_change_alike_on_every_rank_are_no_reason_against_a_cut():
    assert plan_of(Counting).cuts["a"][0].rows == ("down",)


class Reader(Nano):
    """A translator's shape: what runs before the blocks has a linear as wide as the vocabulary."""

    def __init__(self) -> None:
        super().__init__(FusedBlock)
        self.first = nn.Linear(48, VOCABULARY)
        self.second = nn.Linear(VOCABULARY, 48)

    def forward(self, ids):
        x = self.second(F.relu(self.first(self.token(ids))))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def test_a_linear_before_the_blocks_is_no_head_though_it_is_as_wide_as_the_vocabulary():
    module = Reader()
    (vocabulary,) = find_plan(module, step, batch_of(module, 0)).outside
    assert [column.module for column in vocabulary.columns] == ["head"]


class OneLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(x)


class Outer(nn.Module):
    """As a LightningModule: its step calls a part of it, never itself."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def vectors_plan(module: nn.Module, run: Callable) -> ModelPlan:
    batch = {"x": torch.randn(4, 8), "y": torch.randn(4, 4)}
    return find_plan(module, lambda m, b: F.mse_loss(run(m, b["x"]), b["y"]), batch)


@pytest.mark.parametrize(
    ("module", "run"),
    [
        (Outer(net=nn.Linear(8, 4)), lambda m, x: m.net(x)),
        (Outer(net=OneLinear()), lambda m, x: m.net(x)),
        (Outer(one=nn.Linear(8, 8), two=nn.Linear(8, 4)), lambda m, x: m.two(m.one(x).relu())),
    ],
)
def test_a_model_without_blocks_says_what_to_write(module, run):
    with pytest.raises(PlanError, match="tensor_parallel_size=1") as refused:
        vectors_plan(module, run)
    assert "''" not in str(refused.value)


def test_blocks_that_do_not_run_are_named():
    def skipping(m, batch):
        x = m.token(batch["ids"])
        return F.mse_loss(m.layers[0](x), x)

    module = Nano()
    with pytest.raises(PlanError, match=r"block 'layers.1' of 'layers' does not run .* tensor_parallel_size=1"):
        find_plan(module, skipping, batch_of(module, 0))


def test_the_random_numbers_of_the_run_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    def draws(module, batch):
        return step(module, batch) + torch.rand(()) * 0

    module = Nano()
    torch.manual_seed(5)
    find_plan(module, draws, batch_of(module, 0))
    assert torch.equal(torch.rand(3), expected)
