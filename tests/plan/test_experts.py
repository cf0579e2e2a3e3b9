"""Which modules hold fused experts, and what the proof lets pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bharat.plan.blocks import PlanError
from lightning_bharat.plan.experts import check_experts, cut_experts, find_experts
from lightning_bharat.plan.prove_experts import prove_experts
from tests.experts import mixtral, own, qwen3_moe
from tests.plan.models import Nano


class Fused(nn.Module):
    """Fused experts with biases and transposed weights, written without a loop; what it computes is in ``mix``."""

    def __init__(self, experts: int = 4, width: int = 6) -> None:
        super().__init__()
        self.count_of_experts = experts
        self.up = nn.Parameter(torch.randn(experts, width, 8))
        self.up_bias = nn.Parameter(torch.randn(experts, 8))
        self.down = nn.Parameter(torch.randn(experts, 8, width))

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        assert chosen.max() < self.count_of_experts if len(chosen) else True
        inner = F.gelu(torch.einsum("ni,nkio->nko", hidden, self.up[chosen]) + self.up_bias[chosen])
        return self.mix(torch.einsum("nki,nkio->nko", inner, self.down[chosen]), chosen, weights)

    def mix(self, out: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return (out * weights[..., None]).sum(1)


class Squared(Fused):
    def mix(self, out: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return (out * weights[..., None].square()).sum(1)


class Softmax(Fused):
    def mix(self, out: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return (out * weights.softmax(-1)[..., None]).sum(1)


class Numbered(Fused):
    """The number of an expert matters, which another rank counts in another way."""

    def mix(self, out: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return (out * (weights * (1 + chosen))[..., None]).sum(1)


class Centered(Fused):
    """A token's output depends on the other tokens."""

    def mix(self, out: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return (out * weights[..., None]).sum(1) - out.mean()


class Diary:
    """The only expert rank; notes when rows travel."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.notes: list[str] = []

    def depart(self, x: Tensor, received: list[int], sent: list[int]) -> Callable[[], Tensor]:
        self.notes.append("depart")

        def arrive() -> Tensor:
            self.notes.append("arrive")
            return x.detach().clone()

        return arrive

    def note(self, x: Tensor) -> Tensor:
        self.notes.append("shared experts")
        x.register_hook(lambda grad: self.notes.append("their gradient"))
        return x


def test_shared_experts_compute_while_tokens_travel_and_so_do_their_gradients() -> None:
    moe: Any = own().layers[0].mlp  # type: ignore[union-attr]
    diary = Diary()
    cut_experts(moe.experts, find_experts(moe)[0], diary)
    moe.shared_experts.register_forward_hook(lambda module, args, out: diary.note(out))
    moe(torch.randn(2, 3, 32, requires_grad=True)).sum().backward()
    assert diary.notes == [
        *("depart", "arrive"),  # how many tokens come
        *("depart", "shared experts", "arrive", "depart", "arrive"),
        *("depart", "arrive", "depart", "their gradient", "arrive"),
    ]


class InList(nn.Module):
    def __init__(self, *members: nn.Module) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)


@pytest.mark.parametrize(
    ("make", "name", "experts"),
    [
        (own, "layers.0.mlp.experts", 8),
        (qwen3_moe, "model.model.layers.0.mlp.experts", 8),
        (mixtral, "model.model.layers.0.mlp.experts", 4),
    ],
)
def test_found_and_proven(make, name: str, experts: int) -> None:
    module = make()
    found = check_experts(module, 2)
    assert [found[0].name, found[0].experts, found[0].counts] == [name, experts, ("num_experts",)]
    assert len(found) == 2
    prove_experts(module, found, 2)


def test_other_ways_to_write_them() -> None:
    module = InList(Fused(), Fused(8), nn.Linear(3, 3))
    found = check_experts(module, 4)
    assert [(each.name, each.counts) for each in found] == [
        ("members.0", ("count_of_experts",)),
        ("members.1", ("count_of_experts",)),
    ]
    with torch.device("meta"):
        blank = InList(Fused(), Fused(8))
    prove_experts(blank, found, 4)
    prove_experts(module, found, 64)  # four of them are tried


@pytest.mark.parametrize("kind", [Squared, Softmax, Numbered, Centered])
def test_what_is_no_sum_over_choices_is_refused(kind: type[Fused]) -> None:
    module = InList(kind())
    with pytest.raises(PlanError, match=rf"members.0 \({kind.__name__}\) does not compute the same .* differs by"):
        prove_experts(module, check_experts(module, 2), 2)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Nano(), "no module of Nano holds fused experts. That is a module whose parameters all have the experts"),
        (InList(nn.Bilinear(3, 4, 5)), r"members.0 \(Bilinear\) is none"),
        (InList(Fused(6)), "does not divide the 6 experts of members.0; sizes that do: 1, 2, 3, 6"),
    ],
)
def test_refused_by_name(module: nn.Module, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        check_experts(module, 4)


def test_tied_experts_are_refused() -> None:
    module = InList(Fused(), Fused())
    module.members[1].down = module.members[0].down
    with pytest.raises(PlanError, match="members.0.down and members.1.down are one tensor"):
        check_experts(module, 2)


def test_no_experts_in_dense_models() -> None:
    assert find_experts(Nano()) == []
