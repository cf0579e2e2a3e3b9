"""Low-rank adapters on frozen models, by peft and by hand: one process in float64 to 1e-9 on each layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.modules import gpt
from tests.plan.models import Nano, llama
from tests.ranks import run_ranks
from tests.strategies.layouts import Case, check, places, run
from tests.strategies.odd import Odd

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Adapted(nn.Module):
    """A frozen linear and a trained product of two thin matrices, as a person writes it."""

    def __init__(self, inside: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.inside = inside.requires_grad_(False)
        self.a = nn.Linear(inside.in_features, rank, bias=False)
        self.b = nn.Linear(rank, inside.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x) + self.b(self.a(x))


class Lora(Odd):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)


def by_hand() -> Lora:
    model = Nano(depth=2).requires_grad_(False)
    for layer in model.layers:
        layer.qkv, layer.out = Adapted(layer.qkv), Adapted(layer.out)
        layer.up, layer.down = Adapted(layer.up), Adapted(layer.down)
    return Lora(model)


def with_peft(model: nn.Module, names: list[str], **options: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=names, lora_dropout=0.0, init_lora_weights=False, **options)
    return get_peft_model(model, config)


class OnLlama(Lora):
    def __init__(self, names: list[str], **options: Any) -> None:
        super().__init__(llama())
        self.model.model = with_peft(self.model.model, names, **options)

    def loss(self, batch: Any) -> Tensor:
        logits = self.model.model(input_ids=batch["ids"]).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


class OnGpt(Lora):
    def __init__(self) -> None:
        super().__init__(gpt())
        self.model = with_peft(self.model, ALL)


CASES = {
    "by hand": Case(by_hand),
    "llama": Case(lambda: OnLlama(ALL)),
    "llama attention": Case(lambda: OnLlama(["q_proj", "v_proj"], modules_to_save=["lm_head"]), both=False),
    "own": Case(OnGpt, both=False),
}


@pytest.mark.parametrize(("name", "layout"), places(CASES))
def test_as_on_one_process(name: str, layout: str) -> None:
    check(CASES, name, layout)


def cuts(name: str) -> str:
    return run(CASES[name], {"tensor_parallel_size": 2}).explain


@pytest.mark.parametrize(("name", "cut"), [("by hand", "qkv.b (48 + 48 + 48)"), ("llama", "o_proj.lora_A.default")])
def test_adapters_are_cut_with_what_they_adapt(name: str, cut: str) -> None:
    assert cut in run_ranks(cuts, 2, name)[0]
